"""A DoD of classification tasks, written by an LLM: seed words → label sets → sentences (paper sections 4.2 and A.2).

The work goes in rounds (see `asking.py`): some for the label sets, then some for the sentences. What counts as a good
answer is in `answer_checks.py`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from softprompt_registry.config import Share, settings
from softprompt_registry.dod.answer_checks import (
    label_set_fault,
    label_set_schema,
    read_string_list,
    sentence_fault,
    sentences_schema,
)
from softprompt_registry.dod.asking import Rounds, answers_path, recorded_settings
from softprompt_registry.dod.prompt_files import read_prompt, read_styles
from softprompt_registry.dod.store import dod_written_whole
from softprompt_registry.dod.task import Pair, PairShares, Task, assign_pair_splits, draw_task_split, seed_of
from softprompt_registry.errors import ConfigError, LanguageModelError
from softprompt_registry.fingerprints import digest_of_json
from softprompt_registry.language_models.answer_cache import AnswerCache, Asked
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
    """Have `model` write the DoD `out`, whole or not at all; `<out>.answers` beside it keeps every answer.

    Args:
        seed_words: see `seed_words.read_seed_words` and `brown_words`.

    Raises:
        DataError: `out` exists, or the disk is full.
        LanguageModelError: no task came out, or requests failed; all other answers are stored, and the same command asks
            for the rest.
        BusyError: another process is building the same DoD.
    """
    requests = ClassificationRequests(seed_words, config)
    doing = f"building a classification DoD with {model.name!r}"
    with dod_written_whole(out, doing, overwrite=overwrite) as store, AnswerCache(answers_path(out)) as cache:
        rounds = Rounds(model, cache, recorder or NullRecorder(), skip_failed=config.skip_failed_requests)
        build = _Build(requests, rounds, config, recorded_name(model))
        made = pairs = 0
        for task in build.tasks():
            store.add_task(task)
            made += 1
            pairs += len(task.pairs)
        if not made:
            raise LanguageModelError(
                f"{doing}: no task came out of {config.num_tasks}; given up: {dict(build.given_up)}, refused: "
                f"{dict(rounds.refused.most_common(5))}.",
                retryable=False,
                hint=f"Look at what it answers in {str(cache.path)!r}; a larger model or other prompts may help.",
            )
        report = ClassificationReport(
            path=out,
            digest=store.digest,
            tasks=made,
            pairs=pairs,
            given_up=dict(build.given_up),
            refused=dict(rounds.refused.most_common()),
            answers=build.answers,
            asked=rounds.asked,
        )
        store.set_metadata(
            "build",
            {
                "builder": "classification",
                "settings": recorded_settings(config),
                "model": recorded_name(model),
                "prompts_digest": requests.prompts_digest,
                "seed_words_digest": requests.seed_words_digest,
                "tasks": made,
                "given_up": report.given_up,
                "refused": report.refused,
                "answers": report.answers,
            },
        )
    return report


class _Draft:
    """A task whose sentences are not all there."""

    def __init__(self, name: str, labels: tuple[str, ...]) -> None:
        self.name, self.labels = name, labels
        self.sentences: dict[str, list[str]] = {label: [] for label in labels}
        """Good sentences by label, in the order of their requests."""
        self.calls: Counter[str] = Counter()
        """Requests made so far for each label."""
        self.seen: set[str] = set()

    @property
    def fewest(self) -> int:
        """Good sentences of the label that has the fewest."""
        return min(map(len, self.sentences.values()))


class _Build:
    """One build, and the counts of what it gave up."""

    def __init__(
        self, requests: ClassificationRequests, rounds: Rounds, config: ClassificationConfig, writer: str
    ) -> None:
        self.given_up: Counter[str] = Counter()
        self.answers = 0
        self._requests, self._rounds, self._config, self._writer = requests, rounds, config, writer

    def tasks(self) -> Iterator[Task]:
        """Every task, after the round that completes it."""
        config = self._config
        drafts = [_Draft("_".join([f"{number:05d}", *labels]), labels) for number, labels in self._label_sets()]
        for attempt in range(config.max_extra_calls + 1):
            calls = [
                (draft, label, call) for draft in drafts for label in draft.labels for call in self._calls(draft, label)
            ]
            if not calls:
                break
            requests = (self._sentences(draft, label, call) for draft, label, call in calls)
            self._rounds.ask("sentences", attempt, requests, len(calls))
            for draft, label, call in calls:
                self._take_sentences(draft, label, call)
            yield from (self._task(draft) for draft in drafts if draft.fewest >= config.sentences_per_label)
            drafts = [draft for draft in drafts if draft.fewest < config.sentences_per_label]
        for draft in drafts:
            if config.min_sentences_per_label is not None and draft.fewest >= config.min_sentences_per_label:
                yield self._task(draft)
            else:
                self.given_up["too few good sentences"] += 1

    def _label_sets(self) -> list[tuple[int, tuple[str, ...]]]:
        """(number, labels) of every task whose label set was found."""
        config = self._config
        found: dict[int, tuple[str, ...]] = {}
        for attempt in range(config.max_label_tries):
            missing = [number for number in range(config.num_tasks) if number not in found]
            if not missing:
                break
            requests = (self._requests.label_set(number, attempt) for number in missing)
            self._rounds.ask("label sets", attempt, requests, len(missing))
            taken = set(map(frozenset, found.values()))
            for number in missing:
                labels = self._labels_in(self._requests.label_set(number, attempt), taken)
                if labels is not None:
                    found[number] = labels
                    taken.add(frozenset(labels))
        if len(found) < config.num_tasks:
            self.given_up["no good label set"] += config.num_tasks - len(found)
        return sorted(found.items())

    def _labels_in(self, request: CompletionRequest, taken: set[frozenset[str]]) -> tuple[str, ...] | None:
        words = self._strings_in(request, "labels")
        if words is None:
            return None
        labels = tuple(word.strip().lower() for word in words)
        fault = label_set_fault(labels, self._config.labels_per_task)
        if fault is None and frozenset(labels) in taken:
            fault = "the label set of another task"
        if fault is not None:
            self._rounds.refused[f"labels: {fault}"] += 1
            return None
        return labels

    def _calls(self, draft: _Draft, label: str) -> range:
        """Numbers of the requests for a label in the next round."""
        config, made = self._config, draft.calls[label]
        missing = config.sentences_per_label - len(draft.sentences[label])
        most = _calls_for(config.sentences_per_label, config) + config.max_extra_calls
        return range(made, min(made + _calls_for(missing, config), most))

    def _sentences(self, draft: _Draft, label: str, call: int) -> CompletionRequest:
        return self._requests.sentences(draft.name, draft.labels, label, call)

    def _take_sentences(self, draft: _Draft, label: str, call: int) -> None:
        """Add the good sentences of one answer."""
        config, sentences = self._config, draft.sentences[label]
        draft.calls[label] += 1
        for sentence in self._strings_in(self._sentences(draft, label, call), "answer") or ():
            if len(sentences) >= config.sentences_per_label:
                break  # more than was needed; not refused
            sentence = " ".join(sentence.split())
            fault = sentence_fault(
                sentence,
                label,
                min_words=config.min_words,
                max_words=config.max_words,
                min_english=config.min_english,
            )
            # Sentences are the same if their letters and digits are.
            key = "".join(filter(str.isalnum, sentence.lower()))
            if fault is None and key in draft.seen:
                fault = "duplicate"
            if fault is not None:
                self._rounds.refused[f"sentence: {fault}"] += 1
                continue
            draft.seen.add(key)
            sentences.append(sentence)

    def _strings_in(self, request: CompletionRequest, what: str) -> list[str] | None:
        """The list of strings in an answer; None, and counted, if it is no such list."""
        answer = self._rounds.answer(request)
        if answer is None:
            self._rounds.refused[f"{what}: the request failed"] += 1
            return None
        self.answers += 1
        result = read_string_list(answer)
        if isinstance(result, str):
            self._rounds.refused[f"{what}: {result}"] += 1
            return None
        return result

    def _task(self, draft: _Draft) -> Task:
        config = self._config
        pairs: list[Pair] = []
        for label, sentences in draft.sentences.items():
            seed = seed_of("splits", config.seed, f"{draft.name}/{label}")
            splits = assign_pair_splits(len(sentences), config.pair_shares, seed)
            pairs += [Pair(text, label, split) for text, split in zip(sentences, splits, strict=True)]
        random.Random(seed_of("order", config.seed, draft.name)).shuffle(pairs)
        return Task(
            name=draft.name,
            kind="classification",
            pairs=tuple(pairs),
            labels=draft.labels,
            split=draw_task_split(draft.name, config.test_share, config.seed),
            source=f"written by {self._writer}",
        )


def _calls_for(sentences: int, config: ClassificationConfig) -> int:
    return -(-sentences // config.sentences_per_call)


class ClassificationRequests:
    """The requests of one build; each follows from the settings and its place alone."""

    def __init__(self, seed_words: Sequence[str], config: ClassificationConfig) -> None:
        if len(seed_words) < config.seed_words:
            raise ConfigError(
                f"building a classification DoD: there are {len(seed_words)} seed words; expected at least "
                f"{config.seed_words}. Give a longer list."
            )
        self._words, self._config = seed_words, config
        name = "label_set" if config.related_labels else "unrelated_label_set"
        self._label_prompt = read_prompt(name, config.prompts_folder, ("count", "words"))
        self._sentence_prompt = read_prompt("sentences", config.prompts_folder, ("count", "label"))
        self._styles = read_styles("styles", config.prompts_folder)
        self.prompts_digest = digest_of_json(
            [astuple(self._label_prompt), astuple(self._sentence_prompt), self._styles]
        )
        """Tells which prompts wrote a DoD."""
        self.seed_words_digest = digest_of_json(list(seed_words))

    def label_set(self, number: int, attempt: int) -> CompletionRequest:
        config = self._config
        seed = seed_of("label set", config.seed, f"{number}/{attempt}")
        words = random.Random(seed).sample(self._words, config.seed_words)
        values = {"count": config.labels_per_task, "words": ", ".join(words)}
        return CompletionRequest(
            self._label_prompt.fill(values),
            system=self._label_prompt.system,
            max_tokens=20 + 12 * config.labels_per_task,
            temperature=config.label_temperature,
            seed=seed % 2**31,
            json_schema=label_set_schema(config.labels_per_task),
        )

    def sentences(self, name: str, labels: tuple[str, ...], label: str, call: int) -> CompletionRequest:
        config = self._config
        seed = seed_of("sentences", config.seed, f"{name}/{label}/{call}")
        values = {
            "count": config.sentences_per_call,
            "label": label,
            "other_labels": ", ".join(other for other in labels if other != label),
            # All labels of a task go through the same styles: a style must not reveal the label.
            "style": self._styles[(seed_of("style", config.seed, name) + call) % len(self._styles)],
        }
        return CompletionRequest(
            self._sentence_prompt.fill(values),
            system=self._sentence_prompt.system,
            max_tokens=20 + config.max_tokens_per_sentence * config.sentences_per_call,
            temperature=config.sentence_temperature,
            presence_penalty=config.presence_penalty,
            seed=seed % 2**31,
            json_schema=sentences_schema(config.sentences_per_call),
        )


@dataclass(frozen=True)
class Estimate:
    """What a build asks for if no answer is refused."""

    label_requests: int
    sentence_requests: int
    prompt_tokens: int
    """About: a token is taken as four characters."""
    completion_tokens: int
    """About: a sentence is taken as 22 tokens with its quotes."""
    max_completion_tokens: int
    """No answer can be longer."""


def estimate(config: ClassificationConfig) -> Estimate:
    """How many requests and tokens a build takes."""
    requests_of = ClassificationRequests([f"word{number}" for number in range(config.seed_words)], config)
    labels = tuple(f"label{number}" for number in range(config.labels_per_task))
    label_request, sentence_request = requests_of.label_set(0, 0), requests_of.sentences("task", labels, labels[0], 0)
    calls = -(-config.sentences_per_label // config.sentences_per_call)
    sentence_requests = config.num_tasks * config.labels_per_task * calls
    requests = ((label_request, config.num_tasks), (sentence_request, sentence_requests))
    return Estimate(
        label_requests=config.num_tasks,
        sentence_requests=sentence_requests,
        prompt_tokens=sum((len(r.prompt) + len(r.system or "")) // 4 * count for r, count in requests),
        completion_tokens=config.num_tasks * 4 * config.labels_per_task
        + sentence_requests * (8 + 22 * config.sentences_per_call),
        max_completion_tokens=sum(r.max_tokens * count for r, count in requests),
    )
