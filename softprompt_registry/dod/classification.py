"""A DoD of classification tasks, written by an LLM: seed words → label sets → sentences (paper sections 4.2 and A.2).

The work goes in rounds. A round asks for everything that is still missing; when all its answers are there, they are
checked in a fixed order, and what was refused is asked for again in the next round, a bounded number of times. Answers are
on the disk as soon as they arrive (`<out>.answers`), and what they are worth is worked out from them anew. So a build that
was stopped, however it was stopped, asks for nothing twice and ends with the same DoD. What counts as a good answer is in
`answer_checks.py`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from softprompt_registry.config import Share, settings
from softprompt_registry.dod.answer_checks import (
    label_set_fault,
    read_string_list,
    sentence_fault,
)
from softprompt_registry.dod.classification_requests import ClassificationRequests, recorded_settings
from softprompt_registry.dod.store import dod_written_whole
from softprompt_registry.dod.task import Pair, PairShares, Task, assign_pair_splits, draw_task_split, seed_of
from softprompt_registry.errors import LanguageModelError
from softprompt_registry.language_models.answer_cache import AnswerCache, Asked, ask_all
from softprompt_registry.language_models.opening import LanguageModelConfig
from softprompt_registry.language_models.protocol import CompletionRequest, LanguageModel, recorded_name
from softprompt_registry.recording import NullRecorder, Recorder


@settings
class ClassificationConfig:
    """How many tasks, how they are asked for, and which answers are good."""

    num_tasks: PositiveInt = 5500
    """Tasks to write. Paper: 5,500."""
    labels_per_task: Annotated[int, Field(ge=2)] = 5
    """Labels of each task. Paper: 5."""
    sentences_per_label: PositiveInt = 100
    """Sentences for each label. Paper: 100."""
    related_labels: bool = True
    """Labels of one theme. False gives the paper's Preliminary DoD, whose labels have nothing in common (table 9)."""
    seed_words: PositiveInt = 3
    """Random words that inspire a label set. Paper: 3."""
    min_seed_letters: int = 4
    """Shortest seed word. Paper: longer than 3 letters."""
    sentences_per_call: PositiveInt = 10
    """Sentences asked for in one request. Paper: 10."""
    label_temperature: float = 0.5
    """Sampling temperature for label sets. Paper: 0.5."""
    sentence_temperature: float = 0.4
    """Sampling temperature for sentences. Paper: 0.4."""
    presence_penalty: float = 0.5
    """For sentences. Paper: 0.5."""
    max_label_tries: PositiveInt = 8
    """Requests for the label set of one task, each with other seed words, before the task is given up."""
    max_extra_calls: NonNegativeInt = 10
    """Further requests for one label whose sentences were partly refused, before it has to do with what it has."""
    min_sentences_per_label: PositiveInt | None = None
    """A task whose labels all have this many is kept although some are missing; null asks for all of them."""
    min_words: int = 3
    """Shortest sentence, in words."""
    max_words: int = 60
    """Longest sentence, in words."""
    min_english: Share = 0.5
    """Share of a sentence's words, from 0 to 1, that an English lexicon must have."""
    max_tokens_per_sentence: PositiveInt = 60
    """Room in an answer for each sentence, in the LLM's tokens."""
    test_share: Share = 0.1
    """Share of tasks on the test side of the DoD. Paper: 10 %."""
    pair_shares: PairShares = (0.8, 0.1, 0.1)
    """Shares of train, validation and test sentences of each label. Paper: 80/20, without test sentences."""
    prompts_folder: str | None = None
    """Folder with your own copies of the prompt files; null uses those of the package (`softprompt_registry/dod/prompts`)."""
    skip_failed_requests: bool = False
    """Count a request that the server failed as a refused answer, instead of ending with an error when the rest is done."""
    seed: int = 0
    """Seed of seed words, sampling and splits."""
    generator: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    """The LLM that writes. Paper: Mistral-Small-3.1-24B-Instruct in vLLM."""

    def __post_init__(self) -> None:
        if self.min_words > self.max_words:
            raise ValueError(
                f"min_words is {self.min_words} and max_words {self.max_words}, expected no more than that"
            )
        if (self.min_sentences_per_label or 1) > self.sentences_per_label:
            raise ValueError(
                f"min_sentences_per_label is {self.min_sentences_per_label} and sentences_per_label "
                f"{self.sentences_per_label}, expected no more than that"
            )


@dataclass(frozen=True)
class ClassificationReport:
    """What a build made, and what it refused."""

    path: Path
    digest: str
    tasks: int
    pairs: int
    given_up: Mapping[str, int]
    """Reason → tasks that were not made."""
    refused: Mapping[str, int]
    """Reason → refused label sets ("labels: …"), whole answers ("answer: …") and sentences ("sentence: …")."""
    answers: int
    """Answers used, those of earlier runs included."""
    asked: Asked
    """What this run alone asked for."""


def build_dod_classification(
    seed_words: Sequence[str],
    out: Path,
    model: LanguageModel,
    *,
    config: ClassificationConfig,
    overwrite: bool = False,
    recorder: Recorder | None = None,
) -> ClassificationReport:
    """Have `model` write the DoD `out`.

    Args:
        seed_words: see `seed_words.read_seed_words` and `brown_words`.
        out: the DoD to write, whole or not at all; `<out>.answers` beside it keeps every answer.
        model: asked with as much in flight as it takes.

    Raises:
        DataError: `out` exists, the disk is full, or no task came out.
        LanguageModelError: requests failed; all other answers are stored, and the same command asks for the rest.
        BusyError: another process is building the same DoD.
    """
    build = _Build(seed_words, model, config, recorder or NullRecorder())
    doing = f"building a classification DoD with {model.name!r}"
    with dod_written_whole(out, doing, overwrite=overwrite) as store, AnswerCache(answers_path(out)) as cache:
        pairs = 0
        for task in build.tasks(cache):
            store.add_task(task)
            pairs += len(task.pairs)
        made = len(store.task_names())
        if not made:
            raise LanguageModelError(
                f"{doing}: no task came out of {config.num_tasks}; given up: {dict(build.given_up)}, refused: "
                f"{dict(build.refused.most_common(5))}.",
                retryable=False,
                hint=f"Look at what it answers in {str(cache.path)!r}; a larger model or other prompts may help.",
            )
        report = ClassificationReport(
            path=out,
            digest=store.digest,
            tasks=made,
            pairs=pairs,
            given_up=dict(build.given_up),
            refused=dict(build.refused.most_common()),
            answers=build.answers,
            asked=build.asked,
        )
        store.set_metadata(
            "build",
            {
                "builder": "classification",
                "settings": recorded_settings(config),
                "model": recorded_name(model),
                "prompts_digest": build.requests.prompts_digest,
                "seed_words_digest": build.requests.seed_words_digest,
                "tasks": made,
                "given_up": report.given_up,
                "refused": report.refused,
                "answers": report.answers,
            },
        )
    return report


def answers_path(out: Path) -> Path:
    """Where the answers of a build are kept."""
    return out.with_name(out.name + ".answers")


@dataclass
class _Unfinished:
    """A task whose sentences are not all there."""

    name: str
    labels: tuple[str, ...]
    sentences: dict[str, list[str]]
    """Good sentences by label, in the order of their requests."""
    calls: dict[str, int]
    """Requests made so far for each label."""


class _Build:
    """One build: the rounds, and the counts of what they refused."""

    def __init__(
        self, seed_words: Sequence[str], model: LanguageModel, config: ClassificationConfig, recorder: Recorder
    ) -> None:
        self.given_up: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.answers = 0
        self.asked = Asked()
        self._model, self._config, self._recorder = model, config, recorder
        self.requests = ClassificationRequests(seed_words, config)

    def tasks(self, cache: AnswerCache) -> Iterator[Task]:
        """Every task, as soon as it is complete."""
        config = self._config
        unfinished = [
            _Unfinished(name, labels, {label: [] for label in labels}, dict.fromkeys(labels, 0))
            for name, labels in self._label_sets(cache)
        ]
        for number in range(config.max_extra_calls + 1):
            wanted = {task.name: self._calls_wanted(task, first=number == 0) for task in unfinished}
            active = [task for task in unfinished if any(wanted[task.name].values())]
            if not active:
                break
            total = sum(sum(wanted[task.name].values()) for task in active)
            title = "sentences" if number == 0 else f"sentences, again ({number})"
            self._ask(
                cache, (r for task in active for r in self._sentence_requests(task, wanted[task.name])), title, total
            )
            for task in active:
                self._take_sentences(task, wanted[task.name], cache)
                if self._complete(task):
                    yield self._task(task)
            unfinished = [task for task in unfinished if not self._complete(task)]
        for task in unfinished:
            least = min(map(len, task.sentences.values()))
            if config.min_sentences_per_label is not None and least >= config.min_sentences_per_label:
                yield self._task(task)
            else:
                self.given_up["too few good sentences"] += 1

    # --- Labels ---

    def _label_sets(self, cache: AnswerCache) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(task name, labels) of every task whose label set was found."""
        config = self._config
        found: dict[int, tuple[str, ...]] = {}
        taken: set[frozenset[str]] = set()
        for attempt in range(config.max_label_tries):
            open_tasks = [number for number in range(config.num_tasks) if number not in found]
            if not open_tasks:
                break
            requests = (self.requests.label_set(number, attempt) for number in open_tasks)
            title = "label sets" if attempt == 0 else f"label sets, again ({attempt})"
            self._ask(cache, requests, title, len(open_tasks))
            for number in open_tasks:
                labels = self._labels_in(cache, self.requests.label_set(number, attempt), taken)
                if labels is not None:
                    found[number] = labels
                    taken.add(frozenset(labels))
        missing = config.num_tasks - len(found)
        if missing:
            self.given_up["no good label set"] += missing
        for number in sorted(found):
            yield "_".join([f"{number:05d}", *found[number]]), found[number]

    def _labels_in(
        self, cache: AnswerCache, request: CompletionRequest, taken: set[frozenset[str]]
    ) -> tuple[str, ...] | None:
        words = self._read(cache, request, "labels")
        if words is None:
            return None
        labels = tuple(word.strip().lower() for word in words)
        fault = label_set_fault(labels, self._config.labels_per_task)
        if fault is None and frozenset(labels) in taken:
            fault = "the label set of another task"
        if fault is not None:
            self.refused[f"labels: {fault}"] += 1
            return None
        return labels

    # --- Sentences ---

    def _complete(self, task: _Unfinished) -> bool:
        return all(len(task.sentences[label]) >= self._config.sentences_per_label for label in task.labels)

    def _calls_wanted(self, task: _Unfinished, *, first: bool) -> dict[str, int]:
        """Label → requests to make in this round."""
        config = self._config
        wanted = {}
        for label in task.labels:
            missing = max(config.sentences_per_label - len(task.sentences[label]), 0)
            calls = -(-missing // config.sentences_per_call)
            if not first:
                made = -(-config.sentences_per_label // config.sentences_per_call)
                calls = min(calls, made + config.max_extra_calls - task.calls[label])
            wanted[label] = calls
        return wanted

    def _sentence_requests(self, task: _Unfinished, wanted: Mapping[str, int]) -> Iterator[CompletionRequest]:
        for label, calls in wanted.items():
            for call in range(task.calls[label], task.calls[label] + calls):
                yield self.requests.sentences(task.name, task.labels, label, call)

    def _take_sentences(self, task: _Unfinished, wanted: Mapping[str, int], cache: AnswerCache) -> None:
        """Add the good sentences of this round's answers, in the order of the requests."""
        config = self._config
        seen = {_plain(sentence) for sentences in task.sentences.values() for sentence in sentences}
        for label, calls in wanted.items():
            for call in range(task.calls[label], task.calls[label] + calls):
                for sentence in (
                    self._read(cache, self.requests.sentences(task.name, task.labels, label, call), "answer") or []
                ):
                    sentence = " ".join(sentence.split())
                    if len(task.sentences[label]) >= config.sentences_per_label:
                        break  # more than was needed; not refused
                    fault = sentence_fault(
                        sentence,
                        label,
                        min_words=config.min_words,
                        max_words=config.max_words,
                        min_english=config.min_english,
                    )
                    if fault is None and _plain(sentence) in seen:
                        fault = "duplicate"
                    if fault is not None:
                        self.refused[f"sentence: {fault}"] += 1
                        continue
                    seen.add(_plain(sentence))
                    task.sentences[label].append(sentence)
            task.calls[label] += calls

    def _task(self, task: _Unfinished) -> Task:
        config = self._config
        pairs: list[Pair] = []
        for label in task.labels:
            sentences = task.sentences[label]
            splits = assign_pair_splits(
                len(sentences), config.pair_shares, seed_of("splits", config.seed, f"{task.name}/{label}")
            )
            pairs += [Pair(text, label, split) for text, split in zip(sentences, splits, strict=True)]
        random.Random(seed_of("order", config.seed, task.name)).shuffle(pairs)
        return Task(
            name=task.name,
            kind="classification",
            pairs=tuple(pairs),
            labels=task.labels,
            split=draw_task_split(task.name, config.test_share, config.seed),
            source=f"written by {recorded_name(self._model)}",
        )

    # --- Asking ---

    def _ask(self, cache: AnswerCache, requests: Iterator[CompletionRequest], title: str, total: int) -> None:
        skip = self._config.skip_failed_requests
        ask_all(self._model, cache, requests, title, total, self._recorder, self.asked, skip_failed=skip)

    def _read(self, cache: AnswerCache, request: CompletionRequest, what: str) -> list[str] | None:
        """The list of strings in a stored answer; None, and counted, if it is no such list."""
        answer = cache.get(self._model.identity, request)
        if answer is None:  # it failed, and failures are skipped
            self.refused[f"{what}: the request failed"] += 1
            return None
        self.answers += 1
        result = read_string_list(answer)
        if isinstance(result, str):
            self.refused[f"{what}: {result}"] += 1
            return None
        return result


def _plain(sentence: str) -> str:
    """What makes two sentences the same: letters and digits alone, in lower case."""
    return "".join(character for character in sentence.lower() if character.isalnum())
