"""vLLM in this process: the packaged model answers, and writes a small DoD. Run with `make test-vllm`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_dod import GREEDY, MODEL, check_small_dod, texts

from softprompt_registry.errors import LanguageModelError
from softprompt_registry.language_models.protocol import Completion, CompletionRequest, LanguageModel

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def in_process() -> Iterator[LanguageModel]:
    from softprompt_registry.language_models.on_vllm import OnVllm, VllmConfig

    model = OnVllm(VllmConfig(MODEL, dtype="float32", max_model_len=1024, max_num_seqs=32, enforce_eager=True))
    yield model
    model.close()


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
