"""vLLM for real: the packaged model in this process, and behind `vllm serve`, each writing a small DoD.

Run with `make test-vllm`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from softprompt_registry.dod.answer_checks import label_set_schema
from softprompt_registry.dod.classification import ClassificationConfig, build_dod_classification
from softprompt_registry.dod.store import DodStore
from softprompt_registry.errors import LanguageModelError
from softprompt_registry.language_models.openai_compatible import OpenAICompatible, OpenAICompatibleConfig
from softprompt_registry.language_models.protocol import Completion, CompletionRequest, LanguageModel

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MODEL = "packaged:smollm2-135m-instruct"
WORDS = "music river kitchen winter school doctor garden market engine letter island summer bread horse window".split()
SMALL = ClassificationConfig(
    num_tasks=4,
    labels_per_task=2,
    sentences_per_label=3,
    sentences_per_call=3,
    max_label_tries=12,
    max_extra_calls=6,
    min_sentences_per_label=2,
    test_share=0.0,
)
"""What a 135M model can write: it repeats itself and the label, so most of its answers are refused."""
GREEDY = [
    CompletionRequest("The capital of France is", max_tokens=12),
    CompletionRequest("Name three fruits.", system="You answer in one line.", max_tokens=16, stop=("\n",)),
    CompletionRequest("Give two kinds of tools as JSON.", max_tokens=60, json_schema=label_set_schema(2)),
]


@pytest.fixture(scope="module")
def in_process() -> Iterator[LanguageModel]:
    from softprompt_registry.language_models.on_vllm import OnVllm, VllmConfig

    model = OnVllm(VllmConfig(MODEL, dtype="float32", max_model_len=1024, max_num_seqs=32, enforce_eager=True))
    yield model
    model.close()


def texts(results: list[Completion | LanguageModelError]) -> list[str]:
    return [result.text if isinstance(result, Completion) else str(result) for result in results]


def check_small_dod(tmp_path: Path, model: LanguageModel) -> None:
    report = build_dod_classification(WORDS, tmp_path / "small.sqlite", model, config=SMALL)
    assert report.tasks >= 1
    assert report.asked.requests == report.answers  # nothing was asked twice
    with DodStore.open(report.path) as store:
        tasks = list(store.tasks())
    for task in tasks:
        assert len(task.labels) == 2 and {pair.output for pair in task.pairs} == set(task.labels)
        assert not any(pair.output in pair.input.lower().split() for pair in task.pairs)
    again = build_dod_classification(WORDS, tmp_path / "small.sqlite", model, config=SMALL, overwrite=True)
    assert (again.digest, again.asked.requests) == (report.digest, 0)


def test_greedy_answers_are_those_of_transformers(in_process: LanguageModel) -> None:
    from softprompt_registry.language_models.on_transformers import OnTransformers, TransformersConfig

    expected = texts(OnTransformers(TransformersConfig(MODEL)).complete(GREEDY))
    assert texts(in_process.complete(GREEDY)) == expected
    assert len(json.loads(expected[2])["labels"]) == 2


def test_a_prompt_beyond_the_context_spoils_no_other(in_process: LanguageModel) -> None:
    first, second = in_process.complete([CompletionRequest("word " * 3000), GREEDY[0]])
    assert isinstance(first, LanguageModelError) and "max_model_len" in str(first)
    assert isinstance(second, Completion)


def test_results_come_as_they_finish_and_a_closed_stream_leaves_nothing_behind(in_process: LanguageModel) -> None:
    long, short = CompletionRequest("Tell a long story.", max_tokens=200), GREEDY[0]
    stream = in_process.stream([long, short])
    assert next(stream).index == 1
    stream.close()  # type: ignore[attr-defined]
    assert texts(in_process.complete([short])) == texts(in_process.complete([short]))


def test_a_dod_written_in_process(in_process: LanguageModel, tmp_path: Path) -> None:
    check_small_dod(tmp_path, in_process)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of `vllm serve`; starts after the model of this process has gone."""
    from softprompt_registry.base_models import model_location

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "vllm.log"
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        model_location(MODEL)[0],
        "--served-model-name",
        "smol",
    ]
    command += ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "1024"]
    command += ["--enforce-eager", "--generation-config", "vllm"]
    command += ["--structured-outputs-config", '{"backend": "guidance", "disable_any_whitespace": true}']
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ)
    try:
        deadline = time.monotonic() + 240
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_a_dod_written_through_vllm_serve(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none-needed")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with OpenAICompatible(OpenAICompatibleConfig("smol", base_url=served, max_concurrency=16)) as model:
        results = model.complete(GREEDY)
        assert all(isinstance(result, Completion) for result in results), results
        assert len(json.loads(texts(results)[2])["labels"]) == 2
        check_small_dod(tmp_path, model)
