"""More wordings of a DoD's hard prompts, written by an LLM: shorter, and with everything that the task needs (paper A.8).

Only tasks of the training side are paraphrased. The new DoD has the same pairs; its training tasks have further hard
prompts behind their own, among which the translator's training draws. Answers are kept as in `classification.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softprompt_registry.dod.classification import answers_path
from softprompt_registry.dod.classification_requests import recorded_settings
from softprompt_registry.dod.files import seed_of
from softprompt_registry.dod.prompt_files import read_prompt, read_styles
from softprompt_registry.dod.store import DodStore, dod_written_whole
from softprompt_registry.dod.task import Task
from softprompt_registry.dod.vocabulary import share_of_english
from softprompt_registry.errors import ConfigError, DataError
from softprompt_registry.fingerprints import digest_of_dod
from softprompt_registry.language_models.answer_cache import AnswerCache, Asked, ask_all
from softprompt_registry.language_models.opening import LanguageModelConfig
from softprompt_registry.language_models.protocol import CompletionRequest, LanguageModel
from softprompt_registry.recording import NullRecorder, Recorder

MAX_LABELS = 20
"""A task with at most so many distinct outputs has them as labels, also where it is stored as a generation task."""
_QUOTED = re.compile(r"[\"“”]([^\"“”\n]{1,40})[\"“”]|`([^`\n]{1,40})`|(?<!\w)['‘]([^'‘’\n]{1,40})['’](?!\w)")
_MARKERS = re.compile(
    r"<[^<>\s][^<>\n]{0,30}>|\[[^\[\]\n]{1,30}\]|\{[^{}\n]{1,30}\}|\([A-Za-z0-9]\)|(?<![\w.])\d+(?![\w]|\.\d)"
)


@dataclass(frozen=True)
class ParaphraseConfig:
    """How many paraphrases, and which are good."""

    factor: int = 10
    """Paraphrases of each training task's first hard prompt. Paper: 10 and 100."""
    temperature: float = 0.5
    """Sampling temperature. Paper: 0.5."""
    max_tokens: int = 300
    """Longest paraphrase, in tokens of the base model. Paper: 300."""
    max_tries: int = 3
    """Requests for one paraphrase before it is given up."""
    condense_over: int = 40
    """A hard prompt of more tokens than this must become shorter."""
    min_english: float = 0.5
    """Share of a paraphrase's words, from 0 to 1, that an English lexicon must have."""
    prompts_folder: str | None = None
    """Folder with your own copies of the prompt files; null uses those of the package (`softprompt_registry/dod/prompts`)."""
    skip_failed_requests: bool = False
    """Count a request that the server failed as a refused answer, instead of ending with an error when the rest is done."""
    seed: int = 0
    """Seed of the sampling."""
    generator: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    """The LLM that writes. Paper: Mistral-Small-3.1-24B-Instruct in vLLM."""

    def __post_init__(self) -> None:
        if min(self.factor, self.max_tries, self.max_tokens) < 1:
            raise ConfigError(
                f"reading the settings of paraphrasing: factor is {self.factor}, max_tries {self.max_tries}, max_tokens "
                f"{self.max_tokens}; expected 1 or more of each. Correct them."
            )


@dataclass(frozen=True)
class ParaphraseReport:
    """What was written, and what was refused."""

    path: Path
    digest: str
    tasks: int
    """Tasks that were paraphrased."""
    wanted: int
    made: int
    refused: Mapping[str, int]
    """Reason → refused answers; one paraphrase can be refused several times."""
    failed_by_task: Mapping[str, int]
    """Task → paraphrases that were given up; only tasks that have any."""
    asked: Asked
    """What this run alone asked for."""

    @property
    def failed_share(self) -> float:
        """Share of the wanted paraphrases that did not come out, from 0 to 1."""
        return 1 - self.made / self.wanted if self.wanted else 0.0


def paraphrase_dod(
    dod: Path,
    out: Path,
    model: LanguageModel,
    count_tokens: Callable[[str], int],
    *,
    config: ParaphraseConfig,
    overwrite: bool = False,
    recorder: Recorder | None = None,
) -> ParaphraseReport:
    """Write the DoD `out`: `dod` with paraphrased hard prompts on its training side.

    Args:
        count_tokens: tokens of a text for the base model that the translator will be trained on.

    Raises:
        DataError: `out` exists, `dod` has nothing to paraphrase, or the disk is full.
        LanguageModelError: requests failed; all other answers are stored, and the same command asks for the rest.
    """
    recorder = recorder or NullRecorder()
    doing = f"paraphrasing DoD {str(dod)!r} with {model.name!r}"
    with (
        DodStore.open(dod) as source,
        dod_written_whole(out, doing, overwrite=overwrite) as store,
        AnswerCache(answers_path(out)) as cache,
    ):
        tasks = [_Paraphrased.of(task, count_tokens) for task in source.tasks("train") if task.hard_prompts]
        if not tasks:
            raise DataError(
                f"{doing}: none of its {len(source.task_names('train'))} training tasks has a hard prompt; expected at "
                "least one. Label lists need no paraphrases: their order is shuffled while the translator trains."
            )
        work = _Paraphrasing(model, count_tokens, config, recorder)
        work.run(tasks, cache)
        by_name = {task.name: task for task in tasks}
        for task in source.tasks():
            written = by_name[task.name].texts(config.factor) if task.name in by_name else ()
            store.add_task(dataclasses.replace(task, hard_prompts=(*task.hard_prompts, *written)))
        made = sum(len(task.written) for task in tasks)
        report = ParaphraseReport(
            path=out,
            digest=store.digest,
            tasks=len(tasks),
            wanted=config.factor * len(tasks),
            made=made,
            refused=dict(work.refused.most_common()),
            failed_by_task={
                task.name: config.factor - len(task.written) for task in tasks if len(task.written) < config.factor
            },
            asked=work.asked,
        )
        store.set_metadata(
            "build",
            {
                "builder": "paraphrase",
                "settings": recorded_settings(config),
                "model": model.name,
                "from": {"name": source.name, "digest": source.digest, "build": source.metadata().get("build")},
                # How many hard prompts each task had before: with them, the digest before can be worked out again.
                "hard_prompts_before": {task.name: task.num_before for task in tasks},
                "wanted": report.wanted,
                "made": made,
                "refused": report.refused,
            },
        )
    return report


def digest_before_paraphrasing(store: DodStore) -> str | None:
    """Digest of the DoD that this one was paraphrased from, worked out from its own content; None if it was not.

    A bank that was tuned on the one may be used with the other: paraphrases change no pair.
    """
    build: dict[str, Any] = store.metadata().get("build") or {}
    before: dict[str, int] | None = build.get("hard_prompts_before")
    if before is None:
        return None
    digests, splits = {}, {}
    for task in store.tasks():
        kept = task.hard_prompts[: before.get(task.name, len(task.hard_prompts))]
        digests[task.name] = dataclasses.replace(task, hard_prompts=kept).digest
        splits[task.name] = task.split
    return digest_of_dod(digests, splits)


def must_keep(task: Task, hard_prompt: str) -> list[str]:
    """What a paraphrase has to repeat letter for letter, in the order of the hard prompt.

    Labels that the hard prompt names (the task's own, or its outputs where they are few), words in quotation marks, tags in
    any brackets, option letters and whole numbers.
    """
    outputs = {pair.output.strip() for pair in task.pairs}
    labels = [*task.labels, *(outputs if len(outputs) <= MAX_LABELS else ())]
    found: dict[str, int] = {}
    for label in labels:
        place = _place_of(label, hard_prompt)
        if label and place is not None:
            found.setdefault(label, place)
    for match in _QUOTED.finditer(hard_prompt):
        text = next(group for group in match.groups() if group is not None).strip(" .,;:")
        if text and len(text.split()) <= 4:
            found.setdefault(text, match.start())
    for match in _MARKERS.finditer(hard_prompt):
        found.setdefault(match[0], match.start())
    return sorted(found, key=lambda text: (found[text], text))


def paraphrase_fault(text: str, original: str, keep: Sequence[str], min_english: float) -> str | None:
    """Why a paraphrase is refused, apart from its length; None if it is good."""
    if not text:
        return "empty"
    if share_of_english(text) < min_english:
        return "not English"
    if " ".join(text.lower().split()) == " ".join(original.lower().split()):
        return "a copy of the original"
    if any(_place_of(item, text) is None for item in keep):
        return "a label or format marker is lost"
    return None


def _place_of(phrase: str, text: str) -> int | None:
    """Where `text` has `phrase` as whole words; the case counts for single characters only ("A" is no article)."""
    flags = re.IGNORECASE if len(phrase) > 1 else 0
    before = r"(?<!\w)" if phrase[:1].isalnum() else ""
    after = r"(?!\w)" if phrase[-1:].isalnum() else ""
    match = re.search(before + re.escape(phrase) + after, text, flags)
    return match.start() if match else None


@dataclass
class _Paraphrased:
    """One task on its way; its pairs are not kept."""

    name: str
    original: str
    num_tokens: int
    num_before: int
    keep: list[str]
    written: dict[int, str] = field(default_factory=dict)
    """Number of the paraphrase → its text."""

    @classmethod
    def of(cls, task: Task, count_tokens: Callable[[str], int]) -> _Paraphrased:
        original = task.hard_prompts[0]
        return cls(task.name, original, count_tokens(original), len(task.hard_prompts), must_keep(task, original))

    def texts(self, factor: int) -> list[str]:
        return [self.written[number] for number in range(factor) if number in self.written]


class _Paraphrasing:
    """The rounds, and what they refused."""

    def __init__(
        self, model: LanguageModel, count_tokens: Callable[[str], int], config: ParaphraseConfig, recorder: Recorder
    ) -> None:
        self.refused: Counter[str] = Counter()
        self.asked = Asked()
        self._model, self._count_tokens, self._config, self._recorder = model, count_tokens, config, recorder
        self._prompt = read_prompt("paraphrase", config.prompts_folder, ("hard_prompt",))
        self._styles = read_styles("paraphrase_styles", config.prompts_folder)

    def run(self, tasks: Sequence[_Paraphrased], cache: AnswerCache) -> None:
        config = self._config
        for attempt in range(config.max_tries):
            missing = [
                (task, number) for task in tasks for number in range(config.factor) if number not in task.written
            ]
            if not missing:
                return
            title = "paraphrases" if attempt == 0 else f"paraphrases, again ({attempt})"
            requests: Iterator[CompletionRequest] = (self._request(task, number, attempt) for task, number in missing)
            skip = config.skip_failed_requests
            ask_all(self._model, cache, requests, title, len(missing), self._recorder, self.asked, skip_failed=skip)
            for task, number in missing:
                self._take(task, number, attempt, cache)

    def _request(self, task: _Paraphrased, number: int, attempt: int) -> CompletionRequest:
        values = {
            "hard_prompt": task.original,
            "keep": ", ".join(task.keep) or "(nothing in particular)",
            "style": self._styles[number % len(self._styles)],
        }
        return CompletionRequest(
            self._prompt.fill(values),
            system=self._prompt.system,
            max_tokens=self._config.max_tokens + 100,  # the LLM's tokens may be shorter than the base model's
            temperature=self._config.temperature,
            seed=seed_of("paraphrase", self._config.seed, f"{task.name}/{number}/{attempt}") % 2**31,
        )

    def _take(self, task: _Paraphrased, number: int, attempt: int, cache: AnswerCache) -> None:
        answer = cache.get(self._model.name, self._request(task, number, attempt))
        if answer is None:
            self.refused["the request failed"] += 1
            return
        text = " ".join(answer.text.split())
        fault = paraphrase_fault(text, task.original, task.keep, self._config.min_english)
        if fault is None:
            num_tokens = self._count_tokens(text)
            if answer.finish_reason == "length" or num_tokens > self._config.max_tokens:
                fault = f"over {self._config.max_tokens} tokens"
            elif task.num_tokens > self._config.condense_over and num_tokens >= task.num_tokens:
                fault = "not shorter than the original"
            elif text in task.written.values():
                fault = "duplicate"
        if fault is None:
            task.written[number] = text
        else:
            self.refused[fault] += 1
