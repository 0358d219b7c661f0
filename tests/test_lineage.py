"""Lineage: both ways from any point of the chain, and honest about links that are gone."""

from __future__ import annotations

import mlflow
import pytest
from logged_models import (
    DOD_DIGEST,
    FINGERPRINT,
    OTHER_FINGERPRINT,
    Chain,
    log_chain,
    log_dataset,
    log_model,
)
from mlflow import MlflowClient
from mlflow.entities import LoggedModelInput

from softprompt_registry.errors import RegistryError
from softprompt_registry.registry.lineage import LineageGraph, lineage, to_text
from softprompt_registry.registry.registration import register


@pytest.fixture
def store(mlflow_store: str) -> MlflowClient:
    return MlflowClient()


def wrap(chain: Chain) -> tuple[str, str]:
    """A portable prompt made from the chain's translator by a `register` run; (its id, the run's)."""
    lineage_params = {"base_fingerprint": FINGERPRINT, "base_model": "tiny-llama"}
    lineage_params |= {"dod_name": "sample", "dod_digest": DOD_DIGEST}
    with mlflow.start_run(run_name="register", tags={"softprompt.stage": "register"}) as run:
        mlflow.log_input(model=LoggedModelInput(chain.translator_id))
        portable_id = log_model(
            "portable_prompt", "portable_prompt", **lineage_params, translator_model_id=chain.translator_id
        )
        # As the stage does it: the evaluation of the translator, repeated for the model that is served.
        mlflow.log_metric("evaluation.label_f1", 0.4125, model_id=portable_id)
    return portable_id, run.info.run_id


def edges(graph: LineageGraph) -> set[tuple[str, str, str]]:
    return {(edge.source, edge.how, edge.target) for edge in graph.edges}


def ids(graph: LineageGraph) -> set[str]:
    return {node.id for node in graph.nodes}


def test_the_tree_from_dod_and_base_model_to_the_served_version(store: MlflowClient) -> None:
    chain = log_chain()
    portable_id, register_run = wrap(chain)
    register(f"models:/{portable_id}", "translate")
    register(chain.translator_uri, "translator")
    for alias in ("champion", "best"):
        store.set_registered_model_alias("translate", alias, "1")
    above = f"""\
DoD 'sample' 5a5a5a5a5a5a
└─ run tune {chain.tune_run}
   └─ bank 'bank' {chain.bank_id}
      └─ run train-translator {chain.train_run}
         └─ translator 'translator' {chain.translator_id}  (label_f1 0.412, label_recall 0.5)
            ├─ run evaluate {chain.evaluate_run}
"""
    below = f"""\
            └─ run register {register_run}
               └─ portable prompt 'portable_prompt' {portable_id}  (label_f1 0.412)
                  └─ version translate/1 @best @champion"""
    base = f"""
base model 'tiny-llama' 1f2e1f2e1f2e
└─ run tune {chain.tune_run}  (above)"""
    assert to_text(lineage("models:/translate@champion")) == f"{above}{below}  <- asked for{base}"
    assert to_text(lineage("models:/translate/1")) == f"{above}{below}  <- asked for{base}"
    # From further up the translator's other offspring belongs to it too.
    asked_for_bank = above.replace(chain.bank_id, f"{chain.bank_id}  <- asked for")
    translator_version = "            ├─ version translator/1\n"
    assert to_text(lineage(f"models:/{chain.bank_id}")) == f"{asked_for_bank}{translator_version}{below}{base}"


def test_every_way_in_leads_to_the_whole_chain(store: MlflowClient) -> None:
    chain = log_chain()
    portable_id, register_run = wrap(chain)
    register(f"models:/{portable_id}", "translate")
    dod, base = f"dod:{DOD_DIGEST[:36]}", f"base:{FINGERPRINT}"
    tune, train, evaluate = f"run:{chain.tune_run}", f"run:{chain.train_run}", f"run:{chain.evaluate_run}"
    whole = {dod, base, tune, train, evaluate, f"run:{register_run}", "version:translate/1"}
    whole |= {chain.bank_id, chain.translator_id, portable_id}
    focus_of = {
        f"models:/{chain.base_id}": base,
        f"models:/{chain.bank_id}": chain.bank_id,
        f"models:/{chain.bank_id}#moods": chain.bank_id,
        f"models:/{chain.translator_id}": chain.translator_id,
        f"models:/{portable_id}": portable_id,
        "models:/translate/1": "version:translate/1",
        f"runs:/{chain.tune_run}": tune,
        f"runs:/{chain.train_run}": train,
        f"runs:/{chain.train_run}/translator": chain.translator_id,
    }
    for uri, focus in focus_of.items():
        graph = lineage(uri)
        assert (graph.focus, ids(graph)) == (focus, whole), uri
    # An evaluation makes nothing, so what was made of the translator later is not its lineage.
    assert ids(lineage(f"runs:/{chain.evaluate_run}")) == whole - {
        f"run:{register_run}",
        portable_id,
        "version:translate/1",
    }
    assert edges(lineage("models:/translate/1")) == {
        (dod, "input", tune),
        (base, "input", tune),
        (tune, "made", chain.bank_id),
        (dod, "input", train),
        (base, "input", train),
        (chain.bank_id, "input", train),
        (train, "made", chain.translator_id),
        (dod, "input", evaluate),
        (chain.translator_id, "evaluated", evaluate),
        (dod, "input", f"run:{register_run}"),
        (base, "input", f"run:{register_run}"),
        (chain.translator_id, "input", f"run:{register_run}"),
        (f"run:{register_run}", "made", portable_id),
        (portable_id, "registered", "version:translate/1"),
    }


def test_other_chains_stay_out(store: MlflowClient) -> None:
    log_chain(fingerprint=OTHER_FINGERPRINT)
    chain, sibling = log_chain(), log_chain()
    found = ids(lineage(chain.translator_uri))
    assert sibling.bank_id not in found and f"base:{OTHER_FINGERPRINT}" not in found
    # Both experiments' LoggedModels of one base model are one node, with what was made from either.
    found = ids(lineage(f"models:/{chain.base_id}"))
    assert {chain.translator_id, sibling.translator_id} <= found
    assert [item for item in found if item.startswith("base:")] == [f"base:{FINGERPRINT}"]


def test_a_second_evaluation_on_another_dataset(store: MlflowClient) -> None:
    chain = log_chain()
    with mlflow.start_run() as run:
        log_dataset(run.info.run_id, name="unseen", digest="e0" * 32)
        mlflow.log_metric("evaluation.label_f1", 0.125, model_id=chain.translator_id)
    graph = lineage(chain.translator_uri)
    assert (f"dod:{'e0' * 18}", "input", f"run:{run.info.run_id}") in edges(graph)
    assert (chain.translator_id, "evaluated", f"run:{run.info.run_id}") in edges(graph)
    assert "(label_f1 0.125, label_recall 0.5)" in to_text(graph)


def test_versions_that_someone_registered_or_copied_with_mlflow_alone(store: MlflowClient) -> None:
    chain = log_chain()
    mlflow.register_model(chain.translator_uri, "by-hand")
    register(chain.translator_uri, "translator")
    store.copy_model_version("models:/translator/1", "copied")
    graph = lineage("models:/by-hand/1")
    assert {"version:by-hand/1", "version:copied/1", "version:translator/1"} <= ids(graph)
    assert lineage("models:/copied/1").focus == "version:copied/1"


def test_a_deleted_bank_is_shown_as_unknown(store: MlflowClient) -> None:
    chain = log_chain()
    store.delete_logged_model(chain.bank_id)
    text = to_text(lineage(chain.translator_uri))
    assert text.startswith(f"DoD 'sample' 5a5a5a5a5a5a\n└─ run train-translator {chain.train_run}\n")
    assert f"\nbank {chain.bank_id} (unknown)\n└─ run train-translator {chain.train_run}  (above)" in text


def test_a_version_outlives_its_logged_model(store: MlflowClient) -> None:
    chain = log_chain()
    register(chain.translator_uri, "translator")
    store.delete_logged_model(chain.translator_id)
    assert to_text(lineage("models:/translator/1")) == (
        f"DoD 'sample' 5a5a5a5a5a5a\n"
        f"└─ run tune {chain.tune_run}\n"
        f"   └─ bank 'bank' {chain.bank_id}\n"
        f"      └─ run train-translator {chain.train_run}\n"
        f"         └─ translator {chain.translator_id} (unknown)\n"
        "            └─ version translator/1  <- asked for\n"
        "base model 'tiny-llama' 1f2e1f2e1f2e\n"
        f"└─ run tune {chain.tune_run}  (above)"
    )


def test_a_lost_model_is_not_an_input_of_the_run_that_made_it(store: MlflowClient) -> None:
    # MLflow lists a run's own models among its inputs as soon as the run logs a metric of them.
    portable_id, register_run = wrap(log_chain())
    register(f"models:/{portable_id}", "translate")
    store.delete_logged_model(portable_id)
    graph = lineage("models:/translate/1")
    assert (f"run:{register_run}", "made", portable_id) in edges(graph)
    assert (portable_id, "input", f"run:{register_run}") not in edges(graph)
    assert f"portable prompt {portable_id} (unknown)" in to_text(graph)


def test_a_model_without_any_lineage(store: MlflowClient) -> None:
    lonely = log_model("portable_prompt", "lonely")
    assert to_text(lineage(f"models:/{lonely}")) == (
        f"DoD (unknown)\n└─ portable prompt 'lonely' {lonely}  <- asked for\n"
        f"base model (unknown)\n└─ portable prompt 'lonely' {lonely}  <- asked for\n"
        f"translator (unknown)\n└─ portable prompt 'lonely' {lonely}  <- asked for"
    )
    stray = mlflow.create_external_model(name="stray", params={"base_fingerprint": FINGERPRINT})
    assert to_text(lineage(stray.model_uri)).splitlines()[2] == "base model (unknown) 1f2e1f2e1f2e"


def test_datasets_that_are_no_dod(store: MlflowClient) -> None:
    with mlflow.start_run() as run:
        log_dataset(run.info.run_id, name="numbers", digest="d1", source_type="local")
        model_id = log_model("bank", "bank", base_fingerprint=FINGERPRINT)
    graph = lineage(f"models:/{model_id}")
    assert ("dataset:numbers:d1", "input", f"run:{run.info.run_id}") in edges(graph)
    assert "dataset 'numbers' d1" in to_text(graph)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("translator", "tracing 'translator': expected 'models:/<name>@<alias>'"),
        ("models:/translator", "expected 'models:/<name>@<alias>'"),
        ("models:/translator/latest", "expected 'models:/<name>@<alias>'"),
        ("models:/m-0", "it is not in this MLflow store. Check the id, and that MLFLOW_TRACKING_URI"),
        ("runs:/0", "tracing 'runs:/0': it is not in this MLflow store"),
        ("runs:/0/bank", "it is not in this MLflow store"),
        ("models:/nobody/1", "there is no registered model of this name; `softprompt list`"),
        ("models:/translator/7", "'translator' has no such version; its aliases are: @champion = 1"),
        ("models:/translator@best", "'translator' has no such alias; its aliases are: @champion = 1"),
    ],
)
def test_what_is_not_there(store: MlflowClient, uri: str, message: str) -> None:
    register(log_chain().translator_uri, "translator")
    store.set_registered_model_alias("translator", "champion", "1")
    with pytest.raises(RegistryError) as caught:
        lineage(uri)
    assert repr(uri) in str(caught.value) and message in str(caught.value)
