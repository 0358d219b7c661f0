"""A DoD so small that the packaged 135M model can write it, and the check that it did."""

from __future__ import annotations

from pathlib import Path

from softprompt_registry.dod.answer_checks import label_set_schema
from softprompt_registry.dod.classification import ClassificationConfig, build_dod_classification
from softprompt_registry.dod.store import DodStore
from softprompt_registry.errors import LanguageModelError
from softprompt_registry.language_models.protocol import Completion, CompletionRequest, LanguageModel

MODEL = "packaged:smollm2-135m-instruct"
WORDS = "music river kitchen winter school doctor garden market engine letter island summer bread horse window".split()
SMALL = ClassificationConfig(
    num_tasks=3,
    labels_per_task=2,
    sentences_per_label=2,
    sentences_per_call=1,
    max_label_tries=12,
    max_extra_calls=20,
    min_sentences_per_label=1,
    test_share=0.0,
    prompts_folder=str(Path(__file__).parent / "data" / "small_prompts"),
)
"""What a 135M model can write: it repeats itself and the label, so about half of its answers are refused."""
GREEDY = [
    CompletionRequest("The capital of France is", max_tokens=12),
    CompletionRequest("Name three fruits.", system="You answer in one line.", max_tokens=16, stop=("\n",)),
    CompletionRequest("Give two kinds of tools as JSON.", max_tokens=60, json_schema=label_set_schema(2)),
]


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
