"""One real `mlflow models serve`: good requests get the native text, bad ones a 4xx with one sentence and nothing else."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from portable_models import PortableModel, encoded, make_portable_model
from tiny_llm import tiny_base_model

from softprompt_registry.dod.task import Pair
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.verbalization.abstention import AbstentionRule
from softprompt_registry.verbalization.evidence import TriedOn
from softprompt_registry.verbalization.proposers.translator import TranslatorProposer
from softprompt_registry.verbalization.verbalizer import VerbalizationConfig, verbalize
from softprompt_registry.verbalization.verifier import Verifier

START_S = 240
MARK = "PAYLOAD" * 500
"""Stands in every bad request where its content goes, and must never come back."""
PARAMS = {"max_new_tokens": 8}


@dataclass(frozen=True)
class Served:
    url: str
    portable: PortableModel
    log: Path

    def post(self, body: object, content_type: str = "application/json") -> tuple[int, str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/invocations", data, {"Content-Type": content_type})
        try:
            with _direct.open(request, timeout=60) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def good_row(self, seed: int = 0) -> dict[str, str]:
        return {"soft_prompt": encoded(self.portable.soft_prompt(seed).to_bytes())}

    def texts(self, body: dict[str, Any]) -> list[str]:
        status, reply = self.post({**body, "params": PARAMS})
        assert status == 200, reply
        return [row["hard_prompt"] for row in json.loads(reply)["predictions"]]


_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    portable = make_portable_model(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["models", "serve", "-m", str(portable.model_folder), "-p", str(port), "--env-manager", "local"]
    environment = os.environ | {
        "SOFTPROMPT_BASE_MODEL": str(portable.base_folder),
        # `mlflow models serve` starts `uvicorn` by name.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("SOFTPROMPT_TARGET_MODEL", None)
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *command],
            env=environment,
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for_ping(url, process, log)
            yield Served(url, portable, log)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for_ping(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            with _direct.open(f"{url}/ping", timeout=5) as reply:
                assert reply.status == 200
                return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")


def test_every_form_of_a_good_request_gets_the_native_text(served: Served) -> None:
    row, native = served.good_row(), served.portable.text(**PARAMS)
    assert native
    assert served.texts({"dataframe_records": [row]}) == [native]
    assert served.texts({"dataframe_split": {"columns": list(row), "data": [list(row.values())]}}) == [native]
    assert served.texts({"inputs": row}) == [native]
    assert served.texts({"inputs": [row]}) == [native]


def test_instances_stay_rows(served: Served) -> None:
    rows = [served.good_row(0), {**served.good_row(1), "inputs": ["x"]}]
    expected = [served.portable.text(seed, **PARAMS) for seed in (0, 1)]
    assert served.texts({"instances": rows}) == expected


def test_a_good_reply_is_strict_json_with_every_column(served: Served) -> None:
    status, reply = served.post({"dataframe_records": [served.good_row()], "params": {**PARAMS, "num_candidates": 2}})

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    row = json.loads(reply, parse_constant=no_constant)["predictions"][0]
    assert status == 200
    assert list(row) == [
        "hard_prompt", "faithfulness", "faithfulness_interval", "evidence", "abstained", "reason", "candidates", "answers",
        "usage", "base_fingerprint", "translator", "error",
    ]  # fmt: skip
    assert row["faithfulness"] is None and len(row["candidates"]) == 2


def test_rows_with_pairs_or_inputs_are_verified(served: Served) -> None:
    """By the served rule, half of the soft prompt's gain, and with the numbers of the library on the same model."""
    prompt = served.portable.soft_prompt()
    inputs = ["a fine day", "rain", "the sea", "no"]
    pairs = [{"input": text, "output": "xy"[number % 2]} for number, text in enumerate(inputs)]
    rows: list[dict[str, Any]] = [
        {**served.good_row(), "task_pairs": json.dumps(pairs)},
        {**served.good_row(), "inputs": inputs},
        {**served.good_row(), "task_pairs": json.dumps([{"input": MARK, "output": MARK}] * 4)},
        served.good_row(),
    ]
    status, reply = served.post({"dataframe_records": rows, "params": {**PARAMS, "num_candidates": 3}})
    *verified, bad, plain = json.loads(reply)["predictions"]
    assert status == 200
    native = verbalize(
        [prompt, prompt],
        [TranslatorProposer(served.portable.translator, rows_per_batch=1)],
        VerbalizationConfig(num_candidates=3, **PARAMS),
        verifier=Verifier(served.portable.base_model),
        evidence=[TriedOn(pairs=tuple(Pair(**pair) for pair in pairs)), TriedOn(inputs=tuple(inputs))],
        rule=AbstentionRule(0.5),
    )
    for row, expected, evidence in zip(verified, native, ("pairs", "probe inputs"), strict=True):
        assert row["error"] is None and row["evidence"] == evidence
        assert row["faithfulness"] == pytest.approx(expected.faithfulness, abs=1e-3)
        assert row["abstained"] is expected.abstained
        assert row["hard_prompt"] == (None if expected.abstained else expected.text)
        assert [one["text"] for one in row["candidates"]] == [one.text for one in expected.candidates]
        assert [one["verified_score"] for one in row["candidates"]] == pytest.approx(
            [one.verified_score for one in expected.candidates], rel=1e-3
        )
    assert "tokens" in bad["error"] and bad["candidates"] == [] and MARK[:20] not in reply
    assert plain["hard_prompt"] == plain["candidates"][0]["text"] and "not verified" in plain["reason"]


def test_a_bad_row_among_good_ones(served: Served) -> None:
    rows = [served.good_row(), {"soft_prompt": MARK + "?"}, {"soft_prompt": 5}, {**served.good_row(), "inputs": MARK}]
    status, reply = served.post({"dataframe_records": rows, "params": PARAMS})
    good, *bad = json.loads(reply)["predictions"]
    assert status == 200 and good["hard_prompt"] == served.portable.text(**PARAMS)
    assert "not base64" in bad[0]["error"]
    assert "found a whole number" in bad[1]["error"]
    assert "reading inputs" in bad[2]["error"]
    assert MARK[:20] not in reply


def bad_requests(served: Served) -> dict[str, tuple[object, str]]:
    """By name: a body, and words of the sentence that must come back."""
    good = served.good_row()
    embeddings = served.portable.soft_prompt().embeddings
    other = tiny_base_model(seed=7, name="another-llama").ref
    foreign = SoftPrompt(embeddings, None, SoftPromptRecord(MARK, "classification", other, ""))

    def rows(*content: object, **params: object) -> dict[str, object]:
        return {"dataframe_records": list(content), "params": params}

    return {
        "empty": (b"", "0 bytes are not JSON"),
        "not JSON": (b"{" + MARK.encode(), "are not JSON"),
        "not UTF-8": (b"\xff\xfe\xfd" + MARK.encode(), "are not JSON"),
        "deep": (b"[" * 100_000, "are not JSON"),
        "a list": ([MARK], "found a list, expected an object"),
        "no rows key": ({"rows": [good]}, "'rows' is unknown"),
        "key beside": ({"dataframe_records": [good], "parameters": {}}, "'parameters' is unknown"),
        "two forms": ({"dataframe_records": [good], "inputs": [good]}, "found 2 of"),
        "chat body": ({"messages": [{"role": "user", "content": MARK}]}, "'messages' is unknown"),
        "no rows": (rows(), "it has no rows"),
        "rows of text": (rows(MARK), "does not hold rows"),
        "text for rows": ({"inputs": MARK}, "does not hold rows"),
        "ragged split": ({"dataframe_split": {"columns": ["soft_prompt"], "data": [[MARK, 1]]}}, "does not hold rows"),
        "double column": ({"dataframe_split": {"columns": ["soft_prompt"] * 2, "data": []}}, "different names"),
        "no soft_prompt": (rows({"inputs": [MARK]}), "there is no column soft_prompt"),
        "unknown column": (rows({**good, "x" + MARK: MARK}), "is unknown; the columns are"),
        "17 rows": (rows(*[good] * 17), "it has 17 rows, expected at most 16"),
        "unknown param": (rows(good, foo=MARK), "unknown 'foo'; known are num_candidates"),
        "param type": (rows(good, num_candidates=MARK), "expected a whole number"),
        "param range": (rows(good, num_candidates=10**400), "expected 16 or less"),
        "params list": ({"dataframe_records": [good], "params": [MARK]}, "found a list, expected an object"),
        "not base64": (rows({"soft_prompt": MARK + "?"}), "not base64"),
        "not safetensors": (rows({"soft_prompt": MARK}), "not safetensors"),
        "number": (rows({"soft_prompt": 5}), "found a whole number"),
        "null": (rows({"soft_prompt": None}), "it is empty"),
        "giant": (rows({"soft_prompt": MARK * 2000}), "expected at most 4194304"),
        "other base": (rows({"soft_prompt": encoded(foreign.to_bytes())}), "another-llama@"),
        "registry": (rows({"soft_prompt": f"models:/{MARK}/1"}), "allow_registry_references is false"),
        "no target": (rows({**good, "inputs": [MARK]}, answer=True), "this server has no target LLM"),
        "task pairs": (rows({**good, "task_pairs": MARK}), "are not JSON"),
        "65 pairs": (rows({**good, "task_pairs": json.dumps([{"input": MARK, "output": "x"}] * 65)}), "found 65 pairs"),
    }


def test_every_bad_request_gets_one_sentence_and_harms_nothing(served: Served) -> None:
    native = served.portable.text(**PARAMS)
    for name, (body, words) in bad_requests(served).items():
        status, reply = served.post(body)
        assert 400 <= status < 500, (name, status, reply[:500])
        content = json.loads(reply)
        assert set(content) == {"error_code", "message"}, name
        assert words in content["message"], (name, content["message"])
        assert len(reply) < 2000 and "Traceback" not in reply and MARK[:60] not in reply, name
        assert str(served.portable.base_folder.parent) not in reply, name
        assert served.texts({"dataframe_records": [served.good_row()]}) == [native], name


@pytest.mark.parametrize("content_type", ["text/csv", "application/x-www-form-urlencoded", "text/plain; x=y", ""])
def test_other_content_types_are_refused(served: Served, content_type: str) -> None:
    status, reply = served.post({"dataframe_records": [served.good_row()]}, content_type)
    assert status == 400 and "expected 'application/json'" in json.loads(reply)["message"]


def test_the_server_is_still_well(served: Served) -> None:
    for place in ("ping", "health", "version"):
        with _direct.open(f"{served.url}/{place}", timeout=10) as reply:
            assert reply.status == 200
    assert "Traceback" not in served.log.read_text()
