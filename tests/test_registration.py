"""Registration: what cannot be traced or judged is refused; what is registered says where it came from."""

from __future__ import annotations

import mlflow
import pytest
from logged_models import DOD_DIGEST, FINGERPRINT, OTHER_FINGERPRINT, log_chain, log_evaluation, log_model
from mlflow import MlflowClient

from softprompt_registry.errors import BaseModelMismatch, RegistryError
from softprompt_registry.registry.conventions import base_model_name
from softprompt_registry.registry.registration import list_models, register


@pytest.fixture
def store(mlflow_store: str) -> MlflowClient:
    return MlflowClient()


def test_a_registered_model_loads_by_its_uri(store: MlflowClient) -> None:
    class Echo(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
        def predict(self, context: object, model_input: list[str]) -> list[str]:
            return model_input

    params = {"base_fingerprint": FINGERPRINT, "dod_digest": DOD_DIGEST}
    with mlflow.start_run() as run:
        info = mlflow.pyfunc.log_model(
            name="echo",
            python_model=Echo(),
            params=params,
            pip_requirements=[],
            model_type="softprompt_portable_prompt",
        )
    log_evaluation(info.model_id, label_f1=0.25)
    by_run = register(f"runs:/{run.info.run_id}/echo", "echo")
    assert (by_run.name, by_run.version, by_run.model_id) == ("echo", 1, info.model_id)
    assert by_run.uri == "models:/echo/1"
    assert by_run.metrics == {"label_f1": 0.25}
    assert mlflow.pyfunc.load_model(by_run.uri).predict(["hello"]) == ["hello"]
    assert register(f"models:/{info.model_id}", "echo") == by_run


def test_a_version_carries_its_lineage_as_tags_and_as_markdown(store: MlflowClient) -> None:
    chain = log_chain(label_f1=0.4125)
    registered = register(chain.translator_uri, "translator")
    version = store.get_model_version("translator", "1")
    assert version.tags == {
        "softprompt.base_fingerprint": FINGERPRINT,
        "softprompt.base_model": "tiny-llama",
        "softprompt.dod_name": "sample",
        "softprompt.dod_digest": DOD_DIGEST,
        "softprompt.bank_digest": "ba" * 32,
        "softprompt.artifact_digest": "7a" * 32,
        "softprompt.model_type": "softprompt_translator",
        "softprompt.model_id": registered.model_id,
        "softprompt.run_id": chain.train_run,
        "softprompt.metric.label_f1": "0.4125",
    }
    experiment = f"#/experiments/{store.get_run(chain.train_run).info.experiment_id}"
    assert version.description == (
        "Translator `translator`\n\n"
        "| fact | value |\n|---|---|\n"
        f"| base model | tiny-llama `{FINGERPRINT}` |\n"
        f"| DoD | sample `{DOD_DIGEST}` |\n"
        f"| bank | `{'ba' * 32}` |\n"
        f"| artifact | `{'7a' * 32}` |\n"
        f"| logged model | [{chain.translator_id}]({experiment}/models/{chain.translator_id}) |\n"
        f"| run | [{chain.train_run}]({experiment}/runs/{chain.train_run}) |\n\n"
        "| evaluation | value |\n|---|---|\n| label_f1 | 0.4125 |\n"
    )
    # The LoggedModel's page in the UI links to its versions through this tag of MLflow's.
    assert '"translator"' in store.get_logged_model(chain.translator_id).tags["mlflow.modelVersions"]


def test_registering_again_gives_the_same_version_with_its_newest_evaluation(store: MlflowClient) -> None:
    chain = log_chain(label_f1=0.25)
    first = register(chain.translator_uri, "translator")
    log_evaluation(chain.translator_id, label_f1=0.75)
    second = register(chain.translator_uri, "translator")
    assert (second.version, second.metrics) == (first.version, {"label_f1": 0.75})
    version = store.get_model_version("translator", "1")
    assert version.tags["softprompt.metric.label_f1"] == "0.75"
    assert "| label_f1 | 0.75 |" in str(version.description)
    assert register(log_chain().translator_uri, "translator").version == 2


def test_all_that_is_missing_is_listed_at_once(store: MlflowClient) -> None:
    bare = mlflow.initialize_logged_model(name="bare", model_type="softprompt_translator")
    with pytest.raises(RegistryError) as caught:
        register(bare.model_uri, "translator")
    message = str(caught.value)
    assert message.startswith(
        f"registering translator 'bare' (models:/{bare.model_id}): its lineage is incomplete.\n  - its status is PENDING"
    )
    assert "(param 'base_fingerprint'): make it with a stage" in message
    assert "(param 'dod_digest'): make it from a DoD with `softprompt tune`" in message
    assert "(metrics 'evaluation.*'): run `softprompt evaluate` on it" in message
    assert store.search_registered_models() == []


def test_an_infinite_metric_is_no_evaluation(store: MlflowClient) -> None:
    chain = log_chain(label_f1=float("inf"))
    with pytest.raises(RegistryError, match=r"incomplete\.\n  - no evaluation \(metrics 'evaluation\.\*'\)[^\n]*$"):
        register(chain.translator_uri, "translator")


def test_a_translator_of_another_base_model_than_its_bank_is_refused(store: MlflowClient) -> None:
    chain = log_chain()
    params = {"base_fingerprint": OTHER_FINGERPRINT, "base_model": "big-llama", "dod_digest": DOD_DIGEST}
    odd = log_model("translator", "odd", **params, bank_model_id=chain.bank_id)
    log_evaluation(odd, label_f1=0.5)
    with pytest.raises(
        BaseModelMismatch, match="belongs to big-llama@9c0d9c0d9c0d.* from 'bank' of tiny-llama@1f2e1f2e1f2e"
    ):
        register(f"models:/{odd}", "translator")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("team/translator", "no '/' or ':' in it, and `models:/`"),
        ("C# to F#", "address one with '#' or '?'. Use for instance 'C- to F'."),
        ("models:/x", "Use for instance 'models-x'."),
        (" ", "no empty name"),
        ("..", "Use for instance 'translator'."),
    ],
)
def test_names_that_mlflow_refuses(store: MlflowClient, name: str, message: str) -> None:
    with pytest.raises(RegistryError) as caught:
        register("models:/m-0", name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/m-0", "it is not in this MLflow store. Check the id, and that MLFLOW_TRACKING_URI"),
        ("runs:/nothing/translator", "it is not in this MLflow store"),
        ("translator", "expected 'models:/m-<id>' or 'runs:/<run id>/<name>'"),
        ("models:/translator/1", "expected 'models:/m-<id>'"),
        ("models:/translator@champion", "expected 'models:/m-<id>'"),
        ("runs:/only", "expected 'models:/m-<id>'"),
    ],
)
def test_what_is_no_logged_model_or_not_there(store: MlflowClient, uri: str, message: str) -> None:
    with pytest.raises(RegistryError) as caught:
        register(uri, "translator")
    assert message in str(caught.value)


def test_a_prompt_is_not_given_a_model_version(store: MlflowClient) -> None:
    mlflow.genai.register_prompt("moods.hard", "Say {{label}}.")
    with pytest.raises(RegistryError, match="the name 'moods.hard': a prompt has this name"):
        register(log_chain().translator_uri, "moods.hard")


def test_listing(store: MlflowClient) -> None:
    tiny = log_chain(label_f1=0.25, cosine=0.5)
    big = log_chain(fingerprint=OTHER_FINGERPRINT, base="big-llama", label_f1=0.5)
    register(tiny.translator_uri, "translator")
    register(big.translator_uri, "translator")
    params = {"base_fingerprint": FINGERPRINT, "dod_digest": DOD_DIGEST, "dod_name": "sample", "task": "moods"}
    soft_prompt = log_model("soft_prompt", "moods", **params)
    log_evaluation(soft_prompt, cosine=0.75)
    register(f"models:/{soft_prompt}", "moods")
    mlflow.register_model(tiny.translator_uri, "not-ours")
    store.set_registered_model_alias("translator", "champion", "2")
    store.set_registered_model_alias("translator", "best", "2")

    def listed(**filters: str) -> list[str]:
        return [f"{item.name}/{item.version}" for item in list_models(**filters)]

    assert listed() == ["moods/1", "translator/1", "translator/2"]
    newest = list_models()[-1]
    assert newest.aliases == ("best", "champion")
    assert (newest.model_type, newest.base, newest.dod) == ("softprompt_translator", "big-llama", "sample")
    assert (newest.base_fingerprint, newest.task, newest.metrics) == (OTHER_FINGERPRINT, None, {"label_f1": 0.5})
    assert newest.created.tzinfo is not None
    assert listed(base="tiny-llama") == ["translator/1"]
    assert listed(base=FINGERPRINT[:12]) == ["moods/1", "translator/1"]
    assert listed(base="") == []
    assert listed(task="moods") == ["moods/1"]
    assert listed(task="sample") == ["translator/1", "translator/2"]
    assert listed(metric_filter="label_f1>=0.5") == listed(metric_filter="label_f1 > 0.25") == ["translator/2"]
    assert listed(metric_filter="evaluation.label_f1 < 5e-1") == ["translator/1"]
    assert listed(metric_filter="label_f1<=0.5", base="big-llama") == ["translator/2"]
    assert listed(metric_filter="cosine=0.75", task="moods") == ["moods/1"]
    assert listed(metric_filter="unheard_of>=0") == []


@pytest.mark.parametrize("metric_filter", ["label_f1", "label_f1>=", ">=0.3", "label_f1=>0.3", "a>=1 and b>=1", "a>=-"])
def test_a_metric_filter_that_is_no_comparison(metric_filter: str) -> None:
    with pytest.raises(RegistryError, match=r"expected for instance 'label_f1>=0\.3' with one of >=, <=, >, <, ="):
        list_models(metric_filter=metric_filter)


def test_base_models_are_named_by_fingerprint(store: MlflowClient) -> None:
    # A base model's own name often holds a '.', which MLflow refuses.
    assert base_model_name(FINGERPRINT) == "base-model-1f2e1f2e1f2e"
    mlflow.create_external_model(name=base_model_name(FINGERPRINT))
