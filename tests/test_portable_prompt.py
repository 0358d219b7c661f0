"""The servable model in this process: what a request gets, row by row, and what refuses it as a whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
from llm_server import KEY, LlmServer, Reply, error_body
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel
from portable_models import PortableModel, encoded, predict
from safetensors.torch import save as save_tensors
from tiny_llm import save_tiny_model, tiny_base_model

from mlflow_plugins import portable_prompt, soft_prompt_bank
from mlflow_plugins.scoring_server import read_body
from mlflow_plugins.serving_requests import RequestRefused, ServingConfig
from softprompt_registry.base_models.loading import BASE_MODEL_VARIABLE
from softprompt_registry.errors import BaseModelMismatch, ConfigError
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.verbalization.proposers.translator import TranslatorProposer
from softprompt_registry.verbalization.verbalizer import NOT_VERIFIED, VerbalizationConfig

SHORT_TEXT = {"max_new_tokens": 8}


@pytest.fixture
def model(portable: PortableModel, base_in_environment: None) -> PyFuncModel:
    return portable.served()


def refusal(model: PyFuncModel, *rows: dict[str, Any], **params: Any) -> str:
    """The sentence of a request that must be refused with HTTP status 400."""
    with pytest.raises(MlflowException) as caught:
        predict(model, *rows, **params)
    assert caught.value.get_http_status_code() == 400
    sentence: str = json.loads(caught.value.serialize_as_json())["message"]
    return sentence


def good_row(portable: PortableModel, seed: int = 0) -> dict[str, Any]:
    return {"soft_prompt": encoded(portable.soft_prompt(seed).to_bytes())}


def payload_of(portable: PortableModel, embeddings: torch.Tensor, **header: str) -> str:
    fingerprint = portable.base_model.ref.fingerprint
    return encoded(save_tensors({"embeddings": embeddings}, metadata={"base_fingerprint": fingerprint, **header}))


# --- Good requests ---


def test_a_good_row_gets_the_translators_own_text(portable: PortableModel, model: PyFuncModel) -> None:
    result = predict(model, good_row(portable))[0]

    assert result["hard_prompt"] == portable.text(**SHORT_TEXT) != ""
    assert result["candidates"] == [
        {
            "text": result["hard_prompt"],
            "proposer": "translator:greedy",
            "score": result["candidates"][0]["score"],
            "verified_score": None,
        }
    ]
    assert result["candidates"][0]["score"] < 0
    assert (result["faithfulness"], result["abstained"], result["reason"]) == (None, False, NOT_VERIFIED)
    assert result["base_fingerprint"] == portable.base_model.ref.fingerprint
    assert result["translator"] == portable.translator.id
    assert (result["answers"], result["error"]) == (None, None)
    assert result["usage"] == {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0}
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("wrap", ["data:;base64,{}", "data:application/octet-stream;base64,{}", "{}\n"])
def test_the_payload_may_be_a_data_uri_or_have_line_breaks(
    portable: PortableModel, model: PyFuncModel, wrap: str
) -> None:
    row = {"soft_prompt": wrap.format(good_row(portable)["soft_prompt"])}
    assert predict(model, row)[0]["hard_prompt"] == portable.text(**SHORT_TEXT)


def test_candidates_are_ranked_and_depend_on_the_seed_alone(portable: PortableModel, model: PyFuncModel) -> None:
    rows = [good_row(portable, 0), good_row(portable, 1)]
    together = predict(model, *rows, num_candidates=4, seed=3)
    alone = predict(model, rows[1], num_candidates=4, seed=3)[0]
    other = predict(model, rows[1], num_candidates=4, seed=30)[0]

    assert together[1] == alone  # whoever shares the request
    scores = [candidate["score"] for candidate in alone["candidates"]]
    assert len(scores) == 4 and scores == sorted(scores, reverse=True)
    assert alone["hard_prompt"] == alone["candidates"][0]["text"]
    assert other["candidates"] != alone["candidates"]
    config = VerbalizationConfig(num_candidates=4, max_new_tokens=8, seed=3)
    (native,) = TranslatorProposer(portable.translator).propose([portable.soft_prompt(1)], config)
    assert {candidate["text"] for candidate in alone["candidates"]} == {candidate.text for candidate in native}


def test_the_prefill_begins_every_text(portable: PortableModel, model: PyFuncModel) -> None:
    result = predict(model, good_row(portable), prefill="Classify:", num_candidates=2)[0]
    assert all(candidate["text"].startswith("Classify:") for candidate in result["candidates"])
    assert portable.text(**SHORT_TEXT, prefill="Classify:") in [one["text"] for one in result["candidates"]]


# --- Bad rows ---


def bad_rows(portable: PortableModel) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """By name: a row, and words that its error must hold."""
    good = portable.soft_prompt().embeddings
    other = tiny_base_model(seed=7, name="another-llama")
    foreign = SoftPrompt(good, None, SoftPromptRecord("t", "classification", other.ref, "{x}"))
    here = portable.base_model.ref.fingerprint[:12]
    broken = good.clone()
    broken[0, 0] = float("nan")
    soft = good_row(portable)["soft_prompt"]
    return {
        "wrong width": ({"soft_prompt": payload_of(portable, good[:, :10].contiguous())}, ["(4, 10)", "D=64"]),
        "wrong rank": ({"soft_prompt": payload_of(portable, good[None])}, ["(1, 4, 64)", "(K, D)"]),
        "too many tokens": ({"soft_prompt": payload_of(portable, torch.zeros(300, 64))}, ["K=300", "at most 256"]),
        "NaN": ({"soft_prompt": payload_of(portable, broken)}, ["NaN or infinity"]),
        "float64": ({"soft_prompt": payload_of(portable, good.double())}, ["torch.float64", "torch.float32"]),
        "other tensor": ({"soft_prompt": encoded(save_tensors({"weights": good}))}, ["'weights'", "'embeddings'"]),
        "no fingerprint": ({"soft_prompt": encoded(save_tensors({"embeddings": good}))}, ["no 'base_fingerprint'"]),
        "other base": (
            {"soft_prompt": encoded(foreign.to_bytes())},
            ["another-llama@" + other.ref.fingerprint[:12], f"local:tiny@{here}"],
        ),
        "not base64": ({"soft_prompt": "?" * 5000}, ["5000 characters are not base64"]),
        "not ASCII": ({"soft_prompt": "é" * 40}, ["40 characters are not base64"]),
        "not safetensors": ({"soft_prompt": encoded(b"0" * 100)}, ["100 bytes are not safetensors"]),
        "cut off": ({"soft_prompt": encoded(portable.soft_prompt().to_bytes()[:-8])}, ["are not safetensors"]),
        "giant": ({"soft_prompt": "A" * 7_000_000}, ["5250000 bytes", "at most 4194304"]),
        "empty": ({"soft_prompt": ""}, ["it is empty"]),
        "null": ({"soft_prompt": None}, ["it is empty"]),
        "a list": ({"soft_prompt": [soft]}, ["found a list", "expected a string"]),
        "other data URI": ({"soft_prompt": "data:text/plain,hello"}, ["without ';base64,'"]),
        "registry": ({"soft_prompt": "models:/secret-name/1"}, ["allow_registry_references is false"]),
        "inputs": ({"soft_prompt": soft, "inputs": "one"}, ["reading inputs: found a string", "list of strings"]),
        "input types": ({"soft_prompt": soft, "inputs": ["one", 2]}, ["a list with other values"]),
        "no inputs": ({"soft_prompt": soft, "inputs": []}, ["found 0 inputs", "1 to 64"]),
        "long input": ({"soft_prompt": soft, "inputs": ["x" * 20_001]}, ["20001 characters", "at most 20000"]),
        "pairs": ({"soft_prompt": soft, "task_pairs": "[{"}, ["reading task_pairs: its 2 characters are not JSON"]),
        "pair form": ({"soft_prompt": soft, "task_pairs": '[["a", "b"]]'}, ["JSON of another form"]),
        "no pairs": ({"soft_prompt": soft, "task_pairs": "[]"}, ["found 0 pairs, expected 1 to 64"]),
        "many pairs": ({"soft_prompt": soft, "task_pairs": pairs(65)}, ["found 65 pairs, expected 1 to 64"]),
        "long pair": (
            {"soft_prompt": soft, "task_pairs": pairs(1, "x" * 20_001)},
            ["20001 characters", "at most 20000"],
        ),
        "pair too long": (
            {"soft_prompt": soft, "task_pairs": pairs(4, "x" * 600)},
            ["soft prompt 'soft_prompt' with pair 0", "its text and answer have", "602 tokens"],
        ),
        "surrogate": ({"soft_prompt": soft, "task_pairs": pairs(4, "\ud800")}, ["half of a surrogate pair"]),
        "surrogate input": ({"soft_prompt": soft, "inputs": ["\ud800"] * 4}, ["half of a surrogate pair"]),
    }


def pairs(count: int, output: str = "b") -> str:
    return json.dumps([{"input": f"a {number}", "output": output} for number in range(count)])


def test_a_bad_row_gets_its_own_error_and_spoils_no_other(portable: PortableModel, base_in_environment: None) -> None:
    bad = bad_rows(portable)
    model = portable.served(max_rows=len(bad) + 2)
    before, *found, after = predict(model, good_row(portable), *(row for row, _ in bad.values()), good_row(portable))

    assert before == after and before["hard_prompt"] == portable.text(**SHORT_TEXT)
    for (name, (_, words)), result in zip(bad.items(), found, strict=True):
        assert result["hard_prompt"] is None and result["candidates"] == [], name
        assert all(word in result["error"] for word in words), (name, result["error"])
        assert len(result["error"]) <= 700 and str(portable.base_folder.parent) not in result["error"]


def test_when_all_rows_are_bad_the_request_is_refused(model: PyFuncModel) -> None:
    first = (
        "reading soft_prompt: its 1 characters are not base64; expected base64-encoded safetensors, as "
        "`base64 soft_prompt.safetensors` prints it. Encode the file again."
    )
    assert refusal(model, {"soft_prompt": "?"}) == first
    assert refusal(model, {"soft_prompt": "?"}, {"soft_prompt": ""}) == (
        f"none of the 2 rows can be used; the first: {first}"
    )


def test_a_text_must_fit_the_base_model(portable: PortableModel, model: PyFuncModel) -> None:
    sentence = refusal(model, good_row(portable), max_new_tokens=512)
    assert "leave room for 507 new tokens" in sentence and "max_new_tokens is 512. Lower it." in sentence


# --- Unusable requests ---


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"num_candidates": 17}, "num_candidates is 17, expected 16 or less"),
        ({"max_new_tokens": 513}, "max_new_tokens is 513, expected 512 or less"),
        ({"temperature": 0.0}, "temperature is 0.0, expected above 0"),
        ({"temperature": float("nan")}, "temperature is nan, expected a finite number"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
        ({"prefill": "x" * 1001}, "expected at most 1000 characters"),
        ({"prefill": "\ud800"}, "found what JSON cannot hold"),
        ({"answer": True}, "this server has no target LLM"),
    ],
)
def test_parameters_out_of_range_are_refused(
    portable: PortableModel, model: PyFuncModel, params: dict[str, Any], words: str
) -> None:
    assert words in refusal(model, good_row(portable), **params)


def test_too_many_rows_and_none_are_refused(portable: PortableModel, model: PyFuncModel) -> None:
    assert "it has 17 rows, expected at most 16" in refusal(model, *[good_row(portable)] * 17)
    with pytest.raises(RequestRefused, match="it has no rows") as caught:
        model.predict(pd.DataFrame({"soft_prompt": []}, dtype=object))
    assert caught.value.get_http_status_code() == 400


def test_what_mlflow_itself_does_in_process(
    portable: PortableModel, model: PyFuncModel, caplog: pytest.LogCaptureFixture
) -> None:
    """In process MLflow checks the frame first: it refuses a missing column, and drops unknown names with a warning."""
    assert "soft_prompt" in refusal(model, {"inputs": ["x"]})
    assert predict(model, {**good_row(portable), "foo": 1}, bar=2)[0]["error"] is None


@pytest.mark.parametrize(
    ("rows", "params", "words"),
    [
        ([{"soft_prompt": "x", "soft": 1}], {}, "'soft' is unknown; the columns are soft_prompt, inputs, task_pairs"),
        ([{"inputs": ["x"]}], {}, "there is no column soft_prompt"),
        ([{"soft_prompt": "x"}], {"candidates": 2}, "unknown 'candidates'; known are num_candidates"),
        ([{"soft_prompt": "x"}], {"num_candidates": "2"}, "num_candidates is '2', expected a whole number"),
        ([{"soft_prompt": "x"}], {"num_candidates": True}, "num_candidates is True, expected a whole number"),
        ([{"soft_prompt": "x"}], {"verify": 1}, "verify is 1, expected true or false"),
        ([{"soft_prompt": "x"}], {"x" * 500: 1}, "unknown '" + "x" * 28 + "…"),
    ],
)
def test_what_mlflow_lets_through_is_refused_by_the_model(
    model: PyFuncModel, rows: list[dict[str, Any]], params: dict[str, Any], words: str
) -> None:
    served = model._model_impl  # called as a server without schema enforcement calls it
    with pytest.raises(RequestRefused) as caught:
        served.predict(pd.DataFrame(rows), params)
    assert words in caught.value.sentence


def test_an_unexpected_error_says_nothing_but_the_log_entry(
    portable: PortableModel, model: PyFuncModel, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        name = "broken"

        def propose(self, soft_prompts: object, config: object) -> list[list[Any]]:
            raise RuntimeError(f"{KEY} in /some/path")

    model._model_impl._proposer = Broken()
    with pytest.raises(RequestRefused) as caught:
        predict(model, good_row(portable))
    assert caught.value.get_http_status_code() == 500
    body = caught.value.serialize_as_json()
    assert KEY not in body and "/some/path" not in body and "Traceback" not in body
    entry = body.partition("under entry ")[2][:12]
    assert f"log entry {entry}" in caplog.text and KEY in caplog.text


def test_the_sentence_survives_what_the_scoring_server_does_to_it() -> None:
    refused = RequestRefused("a sentence.")
    refused.message = f"Failed to predict data '{KEY}'. \nError: {refused.message}"
    assert json.loads(refused.serialize_as_json()) == {
        "error_code": "INVALID_PARAMETER_VALUE",
        "message": "a sentence.",
    }


# --- Bodies of requests ---


@pytest.mark.parametrize(
    ("body", "rows"),
    [
        ({"dataframe_records": [{"soft_prompt": "a"}, {"inputs": ["x"]}]}, [{"soft_prompt": "a"}, {"inputs": ["x"]}]),
        ({"instances": [{"soft_prompt": "a"}, {"inputs": ["x"]}]}, [{"soft_prompt": "a"}, {"inputs": ["x"]}]),
        ({"inputs": {"soft_prompt": "a", "inputs": ["x", "y"]}}, [{"soft_prompt": "a", "inputs": ["x", "y"]}]),
        (
            {"inputs": {"soft_prompt": ["a", "b"], "inputs": [["x"], None]}},
            [{"soft_prompt": "a", "inputs": ["x"]}, {"soft_prompt": "b", "inputs": None}],
        ),
        (
            {"dataframe_split": {"columns": ["soft_prompt", "inputs"], "index": [7], "data": [["a", ["x"]]]}},
            [{"soft_prompt": "a", "inputs": ["x"]}],
        ),
    ],
)
def test_all_forms_of_a_body_become_rows(body: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    content = json.dumps({**body, "params": {"seed": 1}}).encode()
    assert read_body(content, "application/json; charset=utf-8", ServingConfig()) == (rows, {"seed": 1})


def test_a_giant_body_is_refused_before_it_is_parsed() -> None:
    config = ServingConfig(
        max_rows=1, max_payload_bytes=1000, max_inputs=1, max_task_pairs=1, max_input_characters=1000
    )
    with pytest.raises(RequestRefused, match="it has 4501 bytes, expected at most 4500"):
        read_body(b"{" * 4501, "application/json", config)


# --- Registry references ---


def test_registry_references(
    portable: PortableModel, base_in_environment: None, mlflow_store: str, tmp_path: Path
) -> None:
    first, second = portable.soft_prompt(0), portable.soft_prompt(1)
    second = SoftPrompt(
        second.embeddings, None, SoftPromptRecord("moods", "classification", second.record.base_model, "")
    )
    other = tiny_base_model(seed=7, name="another-llama").ref
    foreign = SoftPrompt(first.embeddings, None, SoftPromptRecord("t", "classification", other, ""))
    bank = SoftPromptBank.save([first, second], tmp_path / "bank")
    first.save(tmp_path / "prompt")
    foreign.save(tmp_path / "foreign")
    with mlflow.start_run() as run:
        for name in ("prompt", "foreign"):
            mlflow.log_artifacts(str(tmp_path / name), f"all/{name}")
        bank_uri = soft_prompt_bank.log_model(bank, name="bank", registered_model_name="tiny-bank").model_uri
    runs = f"runs:/{run.info.run_id}/all"
    model = portable.served(allow_registry_references=True)
    references = [
        f"{runs}/prompt",
        f"{bank_uri}#moods",
        "models:/tiny-bank/1#tones",
        "models:/tiny-bank/1",
        "models:/tiny-bank/1#nothing",
        f"{runs}/prompt#tones",
        f"{runs}/foreign",
        "models:/unknown/3",
        runs,
    ]
    results = predict(model, *[{"soft_prompt": reference} for reference in references])

    texts = [portable.text(seed, **SHORT_TEXT) for seed in (0, 1)]
    assert [result["hard_prompt"] for result in results[:3]] == [texts[0], texts[1], texts[0]]
    words = [
        "found a bank, expected '#' and a task",
        "it has no such member among its 2 (tones, moods)",
        "found a soft prompt, expected no '#'",
        f"another-llama@{other.fingerprint[:12]}",
        "reading soft_prompt 'models:/unknown/3': the registry of this server could not find or read it",
        "found 2 soft prompts and banks there",
    ]
    for result, word in zip(results[3:], words, strict=True):
        assert word in result["error"]
        assert "/tmp" not in result["error"] and str(tmp_path) not in result["error"]


# --- Answers of a target LLM ---


def answered(prompt: str) -> Reply:
    return Reply(403, error_body(f"the key {KEY} may not do that")) if "FAIL" in prompt else Reply()


def test_answers_of_the_target_llm(
    portable: PortableModel, base_in_environment: None, llm_server: LlmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTPROMPT_TARGET_MODEL", "big-llm")
    monkeypatch.setenv("OPENAI_BASE_URL", llm_server.url)
    llm_server.reply_to = answered
    prices = {"target_price_per_million_prompt_tokens": 1.0, "target_price_per_million_completion_tokens": 10.0}
    model = portable.served(**prices, prompt_template="<{hard_prompt}> {input}")
    rows = [
        {**good_row(portable, 0), "inputs": ["one {input}", "FAIL"]},
        good_row(portable, 0),
        {**good_row(portable, 1), "inputs": ["two"]},
    ]
    first, second, third = predict(model, *rows, answer=True)

    text = portable.text(0, **SHORT_TEXT)
    assert first["answers"][0] == {"input": "one {input}", "answer": f"<{text}> one {{input}}".upper(), "error": None}
    assert first["answers"][1]["answer"] is None and "HTTP 403" in first["answers"][1]["error"]
    assert first["usage"] == {"requests": 2, "prompt_tokens": 7, "completion_tokens": 3, "cost": 37 / 1_000_000}
    assert "answer is true, but this row has none" in second["error"] and second["answers"] is None
    assert third["answers"][0]["error"] is None and third["usage"]["requests"] == 1
    received = llm_server.received
    assert received[0].authorization == f"Bearer {KEY}" and {one.body["model"] for one in received} == {"big-llm"}
    assert received[0].body["messages"][0] == {
        "role": "system",
        "content": "You are a helpful assistant. Follow the task exactly.",
    }
    assert KEY not in json.dumps([first, second, third])


def test_without_a_key_the_hard_prompts_still_come(
    portable: PortableModel, base_in_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    model = portable.served(target_model="big-llm")
    result = predict(model, {**good_row(portable), "inputs": ["one"]}, answer=True)[0]
    assert result["hard_prompt"] == portable.text(**SHORT_TEXT) and result["error"] is None
    assert "OPENAI_API_KEY is not set" in result["answers"][0]["error"]


# --- The flavor ---


def test_the_saved_model_names_its_base_and_holds_none_of_it(portable: PortableModel) -> None:
    handle = portable_prompt.load_model(str(portable.model_folder))
    assert handle.record == portable.translator.record
    files = {path.name for path in handle.folder.iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json", "translator.json"}
    written = [path for path in portable.model_folder.rglob("*") if path.is_file() and path.suffix != ".py"]
    assert not any(str(portable.base_folder).encode() in path.read_bytes() for path in written)
    assert not any(path.suffix in (".pkl", ".bin", ".pt") for path in written)

    requirements = (portable.model_folder / "requirements.txt").read_text().splitlines()
    names = {line.partition("==")[0] for line in requirements}
    assert names >= {"mlflow", "torch", "transformers", "peft", "safetensors", "openai"}
    assert "softprompt-registry" in names or (portable.model_folder / "code" / "mlflow_plugins").is_dir()
    assert "+" not in "".join(requirements)
    info = mlflow.models.get_model_info(str(portable.model_folder))
    assert info.flavors["softprompt_portable_prompt"]["base_fingerprint"] == portable.base_model.ref.fingerprint
    assert info.flavors["python_function"]["config"] == portable_prompt.DEFAULT_MODEL_CONFIG
    assert info.signature.inputs.required_input_names() == ["soft_prompt"]
    assert info.signature.inputs.optional_input_names() == ["inputs", "task_pairs"]


def test_log_model_makes_a_logged_model(portable: PortableModel, base_in_environment: None, mlflow_store: str) -> None:
    info = portable_prompt.log_model(
        portable.translator_folder, name="portable", params={"note": "x"}, model_config={"max_rows": 1}
    )
    logged = mlflow.get_logged_model(info.model_id)
    assert logged.params["note"] == "x" and logged.model_type == portable_prompt.FLAVOR_NAME
    model = mlflow.pyfunc.load_model(info.model_uri)
    assert predict(model, good_row(portable))[0]["hard_prompt"] == portable.text(**SHORT_TEXT)
    assert "expected at most 1" in refusal(model, good_row(portable), good_row(portable))


def test_a_trace_holds_digests_but_no_payload(
    portable: PortableModel, base_in_environment: None, mlflow_store: str
) -> None:
    predict(portable.served(trace=True), good_row(portable))
    mlflow.flush_trace_async_logging()
    traces = mlflow.search_traces(return_type="list")
    assert len(traces) == 1
    recorded = traces[0].to_json()
    assert good_row(portable)["soft_prompt"][:40] not in recorded and "soft_prompt_digests" in recorded


def test_another_base_model_fails_the_start_with_both_names(
    portable: PortableModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = save_tiny_model(tmp_path / "other-llama", seed=7)
    monkeypatch.setenv(BASE_MODEL_VARIABLE, str(other))
    with pytest.raises(BaseModelMismatch, match=r"local:tiny@.* local:other-llama@"):
        portable.served()


def test_without_vllm_its_engine_fails_the_start_before_anything_is_loaded(
    portable: PortableModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed, where it is
    monkeypatch.setenv(BASE_MODEL_VARIABLE, str(tmp_path / "no-such-base-model"))
    with pytest.raises(
        ConfigError, match="engine 'vllm': the package vllm cannot be imported .* set engine to 'transformers'"
    ):
        portable.served(engine="vllm")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"max_rows": "16"}, "max_rows is '16', expected a whole number"),
        ({"min_faithfulness": None}, "min_faithfulness is None, expected a number"),
        ({"engine": "VLLM"}, "engine is 'VLLM', expected 'transformers' or 'vllm'"),
        ({"vllm_gpu_memory_utilization": 0.0}, "vllm_gpu_memory_utilization is 0.0, expected above 0"),
        ({"prompt_template": "{input}"}, "has no '{hard_prompt}'"),
        ({"maxrows": 1}, "unknown 'maxrows'; known are base_model, dtype"),
    ],
)
def test_wrong_settings_are_refused_when_saving(
    portable: PortableModel, tmp_path: Path, setting: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        portable_prompt.save_model(portable.translator_folder, tmp_path / "model", model_config=setting)
