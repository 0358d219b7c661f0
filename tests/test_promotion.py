"""Promotion: the policy decides, the run remembers, and the alias moves only if both agree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlflow
import pytest
from logged_models import DOD_DIGEST, FINGERPRINT, OTHER_FINGERPRINT, log_chain, log_evaluation
from mlflow import MlflowClient
from mlflow.entities import Run

from softprompt_registry.errors import ConfigError, PromotionRefused, RegistryError
from softprompt_registry.registry import promotion
from softprompt_registry.registry.lookup import aliases_of
from softprompt_registry.registry.promotion import Policy, RuleResult, promote, read_policy
from softprompt_registry.registry.registration import register


@pytest.fixture
def store(mlflow_store: str) -> MlflowClient:
    return MlflowClient()


def register_translator(**chain: Any) -> str:
    """A new version of 'translator'; gives its LoggedModel's id."""
    return register(log_chain(**chain).translator_uri, "translator").model_id


def champion(store: MlflowClient) -> int | None:
    return (aliases_of("translator") or {}).get("champion")


def promotion_runs(store: MlflowClient) -> list[Run]:
    experiment = store.get_experiment_by_name("test")
    assert experiment is not None
    condition = "tags.`softprompt.stage` = 'promote'"
    return list(store.search_runs([experiment.experiment_id], condition, order_by=["attributes.start_time"]))


def test_a_version_that_meets_the_policy(store: MlflowClient) -> None:
    model_id = register_translator(label_f1=0.4125, label_recall=0.5)
    decision = promote("translator", policy=Policy(minimum={"label_f1": 0.4, "evaluation.label_recall": 0.5}))
    assert champion(store) == 1
    assert decision.promoted and not decision.forced
    assert (decision.name, decision.version, decision.alias, decision.previous_version) == (
        "translator",
        1,
        "champion",
        None,
    )
    assert decision.rules == (
        RuleResult("minimum label_f1", 0.4, 0.4125, True),
        RuleResult("minimum label_recall", 0.5, 0.5, True),
    )
    run = store.get_run(decision.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["softprompt.stage"] == "promote"
    assert run.data.tags["softprompt.outcome"] == "promoted"
    assert run.data.params == {
        "promote.name": "translator",
        "promote.version": "1",
        "promote.alias": "champion",
        "promote.previous_version": "none",
        "promote.promoted": "True",
        "promote.forced": "False",
        "promote.reason": "none",
        "promote.allow_base_change": "False",
        "promote.require_same_base": "True",
        "promote.minimum.label_f1": "0.4",
        "promote.minimum.label_recall": "0.5",
    }
    assert run.data.metrics == {"evaluation.label_f1": 0.4125, "evaluation.label_recall": 0.5}
    assert run.inputs is not None
    assert [item.model_id for item in run.inputs.model_inputs] == [model_id]
    record = json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/decision.json"))
    assert record == {
        "name": "translator",
        "version": 1,
        "alias": "champion",
        "promoted": True,
        "previous_version": None,
        "rules": [
            {"rule": "minimum label_f1", "required": 0.4, "found": 0.4125, "passed": True},
            {"rule": "minimum label_recall", "required": 0.5, "found": 0.5, "passed": True},
        ],
        "forced": False,
        "reason": None,
        "run_id": decision.run_id,
        "policy": {"minimum": {"label_f1": 0.4, "label_recall": 0.5}, "require_same_base": True},
        "allow_base_change": False,
        "metrics": {"label_f1": 0.4125, "label_recall": 0.5},
        "model_id": model_id,
        "base_fingerprint": FINGERPRINT,
    }


def test_a_refusal_names_each_failed_rule_and_is_recorded(store: MlflowClient) -> None:
    register_translator(label_f1=0.5)
    promote("translator", policy=Policy(minimum={"label_f1": 0.5}))
    register_translator(fingerprint=OTHER_FINGERPRINT, label_f1=0.25, cosine=0.5)
    policy = Policy(minimum={"label_f1": 0.5, "rouge_l": 0.125, "cosine": 0.5})
    with pytest.raises(PromotionRefused) as caught:
        promote("translator", policy=policy)
    run = promotion_runs(store)[-1]
    assert str(caught.value) == (
        "promoting 'translator' version 2 to 'champion': 3 of 4 rules failed.\n"
        "  - minimum label_f1: failed, required 0.5, found 0.25\n"
        "  - minimum rouge_l: failed, required 0.125, found none\n"
        f"  - same base model: failed, required {FINGERPRINT}, found {OTHER_FINGERPRINT}\n"
        f"The record is run {run.info.run_id}. Promote a better version, or use --force with --reason."
    )
    assert champion(store) == 1
    assert run.info.status == "FINISHED"
    assert run.data.tags["softprompt.outcome"] == "refused"
    assert run.data.params["promote.promoted"] == "False"
    assert run.data.params["promote.previous_version"] == "1"


def test_force_is_recorded_with_its_reason(store: MlflowClient) -> None:
    register_translator(label_f1=0.25)
    policy = Policy(minimum={"label_f1": 0.5})
    for reason in (None, " "):
        with pytest.raises(RegistryError, match="by force: no reason was given"):
            promote("translator", policy=policy, force=True, reason=reason)
    assert promotion_runs(store) == []
    decision = promote("translator", policy=policy, force=True, reason="demo on Friday ")
    assert champion(store) == 1
    assert (decision.promoted, decision.forced, decision.reason) == (True, True, "demo on Friday")
    assert store.get_run(decision.run_id).data.params["promote.reason"] == "demo on Friday"
    # Nothing had to be overridden here, so nothing was forced.
    assert not promote("translator", policy=Policy(), force=True, reason="to be sure").forced


def test_another_base_model_needs_leave(store: MlflowClient) -> None:
    register_translator()
    register_translator(fingerprint=OTHER_FINGERPRINT)
    promote("translator", 1, policy=Policy())
    with pytest.raises(PromotionRefused, match="same base model: failed"):
        promote("translator", 2, policy=Policy())
    # Another alias has no holder that it must agree with.
    assert promote("translator", 2, alias="candidate", policy=Policy()).rules == ()
    assert promote("translator", 2, policy=Policy(), allow_base_change=True).previous_version == 1
    assert promote("translator", 1, policy=Policy(require_same_base=False)).previous_version == 2
    assert champion(store) == 1


def test_an_evaluation_after_the_registration_counts(store: MlflowClient) -> None:
    model_id = register_translator(label_f1=0.25)
    log_evaluation(model_id, label_f1=0.75)
    assert promote("translator", policy=Policy(minimum={"label_f1": 0.5})).rules[0].found == 0.75


def log_evaluation_on(store: MlflowClient, model_id: str, name: str, digest: str, **metrics: float) -> None:
    """As the stage and MLflow's evaluators do it: each value says which dataset it was measured on."""
    with mlflow.start_run() as run:
        for metric, value in metrics.items():
            store.log_metric(
                run.info.run_id,
                f"evaluation.{metric}",
                value,
                model_id=model_id,
                dataset_name=name,
                dataset_digest=digest[:36],
            )


def test_an_evaluation_on_other_data_does_not_stand_in_for_one_on_the_models_own_dod(store: MlflowClient) -> None:
    """The newest value counted once, whatever it was measured on: three easy rows were enough for a promotion."""
    model_id = register_translator()
    log_evaluation_on(store, model_id, "sample", DOD_DIGEST, label_f1=0.25, label_recall=0.5)
    log_evaluation_on(store, model_id, "three easy rows", "e5" * 32, label_f1=1.0, rouge_l=1.0)
    with pytest.raises(PromotionRefused) as caught:
        promote("translator", policy=Policy(minimum={"label_f1": 0.4, "rouge_l": 0.5}))
    assert "minimum label_f1: failed, required 0.4, found 0.25" in str(caught.value)
    assert "minimum rouge_l: failed, required 0.5, found none" in str(caught.value)
    decision = promote("translator", policy=Policy(minimum={"label_f1": 0.25, "label_recall": 0.5}))
    assert [rule.found for rule in decision.rules] == [0.25, 0.5]
    log_evaluation_on(store, model_id, "sample", DOD_DIGEST, label_f1=0.75)
    assert promote("translator", policy=Policy(minimum={"label_f1": 0.4})).rules[0].found == 0.75


def test_without_an_evaluation_on_its_own_dod_values_of_different_datasets_are_not_mixed(store: MlflowClient) -> None:
    model_id = register_translator()
    log_evaluation_on(store, model_id, "first", "f1" * 32, label_f1=0.75, rouge_l=0.75)
    log_evaluation_on(store, model_id, "second", "2d" * 32, label_f1=0.5)
    decision = promote("translator", policy=Policy(minimum={"label_f1": 0.5}))
    assert decision.rules[0].found == 0.5
    with pytest.raises(PromotionRefused, match="minimum rouge_l: failed, required 0.5, found none"):
        promote("translator", policy=Policy(minimum={"rouge_l": 0.5}))


def test_the_tags_stand_in_for_a_deleted_logged_model(store: MlflowClient) -> None:
    store.delete_logged_model(register_translator(label_f1=0.5))
    assert promote("translator", policy=Policy(minimum={"label_f1": 0.5})).rules[0].found == 0.5


def test_the_latest_version_is_the_default_and_the_holder_may_be_promoted_again(store: MlflowClient) -> None:
    for _ in range(2):
        register_translator()
    assert promote("translator", policy=Policy()).version == 2
    assert promote("translator", policy=Policy()).previous_version == 2
    assert champion(store) == 2


def test_the_run_is_a_child_of_the_callers_run(store: MlflowClient) -> None:
    register_translator()
    with mlflow.start_run() as pipeline:
        decision = promote("translator", policy=Policy())
    assert store.get_run(decision.run_id).data.tags["mlflow.parentRunId"] == pipeline.info.run_id


def test_of_two_promotions_at_once_the_second_is_told(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        register_translator()
    record = promotion._record

    def record_while_another_promotes(*args: Any) -> None:
        record(*args)
        store.set_registered_model_alias("translator", "champion", "1")

    monkeypatch.setattr(promotion, "_record", record_while_another_promotes)
    with pytest.raises(
        RegistryError, match="another promotion moved the alias from none to 1 meanwhile. Promote again"
    ):
        promote("translator", 2, policy=Policy())
    assert champion(store) == 1
    run = promotion_runs(store)[-1]
    assert run.info.status == "FAILED"
    assert "softprompt.outcome" not in run.data.tags


@pytest.mark.parametrize("alias", ["latest", "V2", "two words", ""])
def test_an_alias_that_mlflow_refuses_leaves_no_run(store: MlflowClient, alias: str) -> None:
    register_translator()
    with pytest.raises(RegistryError, match=f"to the alias {re.escape(repr(alias))}.* Use for instance 'champion'"):
        promote("translator", alias=alias, policy=Policy())
    assert promotion_runs(store) == []


def test_what_cannot_be_promoted(store: MlflowClient) -> None:
    with pytest.raises(RegistryError, match="there is no registered model of this name. `softprompt list` shows"):
        promote("translator", policy=Policy())
    model_id = register_translator()
    with pytest.raises(
        RegistryError, match="promoting version 7 of 'translator': there is no such version; there are: 1"
    ):
        promote("translator", 7, policy=Policy())
    mlflow.register_model(f"models:/{model_id}", "translator")
    with pytest.raises(RegistryError, match="version 2: it has no tag 'softprompt.model_id'.* Register it with"):
        promote("translator", policy=Policy())
    assert promotion_runs(store) == []


def test_policy_files(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("minimum:\n  label_recall: 0.5\n  cosine: 1\nrequire_same_base: false\n")
    assert read_policy(path) == Policy(minimum={"label_recall": 0.5, "cosine": 1.0}, require_same_base=False)
    path.write_text("minimum:\n")
    assert read_policy(path) == Policy()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("maximum: {loss: 1}", r"unknown 'maximum'; known are minimum, require_same_base"),
        ("minimum: 0.5", r"minimum is 0\.5, expected a mapping"),
        ("minimum: {label_f1: high}", "minimum.label_f1 is 'high', expected a number"),
        ("minimum: {label_f1: true}", "minimum.label_f1 is True, expected a number"),
        ("minimum: {label_f1: .nan}", "minimum.label_f1 is nan, expected a finite number"),
        ("require_same_base: 3", "require_same_base is 3, expected true or false"),
    ],
)
def test_policy_files_with_mistakes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_policy(tmp_path / "policy.yaml")
