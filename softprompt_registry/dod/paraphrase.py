"""More wordings of a DoD's hard prompts, written by an LLM: shorter, and with everything that the task needs (paper A.8).

Only tasks of the training side are paraphrased. The new DoD has the same pairs; its training tasks have further hard
prompts behind their own, among which the translator's training draws. Answers are asked for and kept as `asking.py` says.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from softprompt_registry.config import Share, settings
from softprompt_registry.dod.asking import Rounds, answers_path, recorded_settings
from softprompt_registry.dod.prompt_files import read_prompt, read_styles
from softprompt_registry.dod.store import DodStore, dod_written_whole, require_free
from softprompt_registry.dod.task import Task, seed_of
from softprompt_registry.dod.vocabulary import share_of_english
from softprompt_registry.errors import DataError
from softprompt_registry.fingerprints import digest_of_dod
from softprompt_registry.language_models.answer_cache import AnswerCache, Asked
from softprompt_registry.language_models.opening import LanguageModelConfig
from softprompt_registry.language_models.protocol import CompletionRequest, LanguageModel, recorded_name
from softprompt_registry.recording import NullRecorder, Recorder

MAX_LABELS = 20
"""A task with at most so many distinct outputs has them as labels, also where it is stored as a generation task."""
MAX_NAMED_LABELS = 100
"""So also with at most this many, where there are four pairs for each of them and the hard prompt names half of them."""
MAX_QUOTED_WORDS = 4
"""A longer text in quotation marks is an example or an explanation."""
_QUOTED = re.compile(
    r"[\"“”]([^\"“”\n]*)[\"“”]|`([^`\n]+)`|"
    r"(?<!\w)'((?:[^'\n]|(?<=\w)'(?=\w))+)'(?!\w)|(?<!\w)‘((?:[^‘’\n]|(?<=\w)’(?=\w))+)’(?!\w)"
)
_BRACKETS = re.compile(r"<[^<>\s][^<>\n]{0,30}>|(?<!\w)\[[^\[\]\n]{1,30}\](?!\w)|\{[^{}\n]{1,30}\}")
_VALUES = re.compile(r"\[\s*['\"\[-]?\s*\d[^\[\]\n]*\]|\{\s*['\"-]?\d[^{}\n]*\}|\(\s*-?\d+(?:\s*,\s*-?\d+)+\s*\)")
"""A list, set or index as an example of what comes in: "[1, 2, 3]", "['1', 'l']", "(3, 4)"."""
_OPTION = re.compile(r"(?<!\w)\(([A-Z])\)")
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+|(?:,\d{3})+(?!\d))?(?!\w|\.\d)")
_ITEM_NUMBER = re.compile(r"(?<!\w)(\()(\d{1,2})\)|(?<![\w(.-])(\d{1,2})\)|^[ \t]*(\d{1,2})\.(?=\s)", re.MULTILINE)
_EXAMPLE = re.compile(r"\b(?:e\.?g\b\.?|for example|for instance)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.?!][\"'”’)]*(?=\s+[A-Z\"'“‘(\[]|\s*$)|\n")


@settings
class ParaphraseConfig:
    """How many paraphrases, and which are good."""

    factor: PositiveInt = 10
    """Paraphrases of each training task's first hard prompt. Paper: 10 and 100."""
    temperature: float = 0.5
    """Sampling temperature. Paper: 0.5."""
    max_tokens: PositiveInt = 300
    """Longest paraphrase, in tokens of the base model. Paper: 300."""
    max_tries: PositiveInt = 3
    """Requests for one paraphrase before it is given up."""
    condense_over: int = 40
    """A hard prompt of more tokens than this must become shorter."""
    min_english: Share = 0.5
    """Share of a paraphrase's words, from 0 to 1, that an English lexicon must have."""
    prompts_folder: str | None = None
    """Folder with your own copies of the prompt files; null uses those of the package (`softprompt_registry/dod/prompts`)."""
    skip_failed_requests: bool = False
    """Count a request that the server failed as a refused answer, instead of ending with an error when the rest is done."""
    seed: int = 0
    """Seed of the sampling."""
    generator: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    """The LLM that writes. Paper: Mistral-Small-3.1-24B-Instruct in vLLM."""


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
    failed_share: float
    """Share of the wanted paraphrases that did not come out, from 0 to 1."""
    asked: Asked
    """What this run alone asked for."""


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
    require_free(out, doing, overwrite=overwrite)
    requests = _Requests(config)
    with DodStore.open(dod) as source:
        # The translator learns a classification task's label list, in any order; its hard prompts are not asked of it.
        tasks = {
            task.name: _Paraphrased(task, count_tokens)
            for task in source.tasks("train")
            if task.kind == "generation" and task.hard_prompts
        }
        if not tasks:
            raise DataError(
                f"{doing}: none of its {len(source.task_names('train'))} training tasks is a generation task with a hard "
                "prompt; expected at least one. Label lists need no paraphrases: their order is shuffled while the "
                "translator trains."
            )
        # The answers last: what fails before the first request leaves no file of them behind.
        with dod_written_whole(out, doing, overwrite=overwrite) as store, AnswerCache(answers_path(out)) as cache:
            rounds = Rounds(model, cache, recorder, skip_failed=config.skip_failed_requests)
            _write_paraphrases(list(tasks.values()), requests, rounds, count_tokens, config)
            for task in source.tasks():
                written = tasks[task.name].texts if task.name in tasks else []
                store.add_task(dataclasses.replace(task, hard_prompts=(*task.hard_prompts, *written)))
            missing = {name: config.factor - len(task.written) for name, task in tasks.items()}
            wanted = config.factor * len(tasks)
            report = ParaphraseReport(
                path=out,
                digest=store.digest,
                tasks=len(tasks),
                wanted=wanted,
                made=wanted - sum(missing.values()),
                refused=dict(rounds.refused.most_common()),
                failed_by_task={name: count for name, count in missing.items() if count},
                failed_share=sum(missing.values()) / wanted,
                asked=rounds.asked,
            )
            store.set_metadata(
                "build",
                {
                    "builder": "paraphrase",
                    "settings": recorded_settings(config),
                    "model": recorded_name(model),
                    "from": {"name": source.name, "digest": source.digest, "build": source.metadata().get("build")},
                    # How many hard prompts each task had before: with them, the digest before can be worked out again.
                    "hard_prompts_before": {name: len(task.before) for name, task in tasks.items()},
                    "wanted": report.wanted,
                    "made": report.made,
                    "refused": report.refused,
                    "failed_by_task": report.failed_by_task,
                },
            )
    recorder.metric("failed_share", report.failed_share)
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
    """What a paraphrase has to repeat, in the order and spelling of the hard prompt.

    Labels that the hard prompt names (the task's own, or its outputs where they are few), short texts in quotation marks,
    tags in brackets, options such as (A), and numbers. Not: what stands in an example ("e.g."), the numbers of a list's
    items, and longer texts in quotation marks, with all that is in them.
    """
    found: dict[str, tuple[int, str]] = {}
    aside: list[tuple[int, int]] = []
    """Where a number or an option is part of something else."""

    def add(text: str, place: int) -> None:
        found.setdefault(text if _case_counts(text) else text.lower(), (place, text))

    for label in _labels(task, hard_prompt):
        for match in _pattern(label).finditer(hard_prompt):
            add(label, match.start())
            aside.append(match.span())
    examples = list(_example_spans(hard_prompt))
    values = [match.span() for match in _VALUES.finditer(hard_prompt)]
    for match in _QUOTED.finditer(hard_prompt):
        aside.append(match.span())
        text = next(group for group in match.groups() if group is not None).strip(" .,;:")
        if text and len(text.split()) <= MAX_QUOTED_WORDS and not _within(match, [*examples, *values]):
            add(text, match.start())
    for match in _BRACKETS.finditer(hard_prompt):
        if not _within(match, [*values, *aside]):
            add(match[0], match.start())
            aside.append(match.span())
    aside += [*examples, *values, *_item_numbers(hard_prompt)]
    for match in _OPTION.finditer(hard_prompt):
        if not _within(match, aside) and match[1] not in found:
            add(match[0], match.start())
    for match in _NUMBER.finditer(hard_prompt):
        if not _within(match, aside):
            add(match[0], match.start())
    return [text for _, text in sorted(found.values())]


def _labels(task: Task, hard_prompt: str) -> list[str]:
    """The labels that the hard prompt names."""
    outputs = sorted({pair.output.strip() for pair in task.pairs} - {""})
    several_pairs = len(task.pairs) >= 4 * len(outputs)
    if len(outputs) > (MAX_NAMED_LABELS if several_pairs else MAX_LABELS):
        outputs = []
    found = {label: _spelling_in(hard_prompt, label) for label in dict.fromkeys((*task.labels, *outputs))}
    if len(outputs) > MAX_LABELS and 2 * sum(found[output] is not None for output in outputs) < len(outputs):
        outputs = []
    known = {*task.labels, *outputs}
    return [spelling for label, spelling in found.items() if label in known and spelling is not None]


def _spelling_in(hard_prompt: str, label: str) -> str | None:
    """How a hard prompt spells a label; None if it does not name it.

    Where the case differs, the spelling in which it does not count: of "SIMILAR" and "Similar" the second.
    """
    label = label.rstrip(".!") or label  # "Yes." is the output that many a hard prompt calls "Yes"
    if _pattern(label, ignore_case=False).search(hard_prompt):
        return label
    match = _pattern(label, ignore_case=True).search(hard_prompt) if len(label) > 1 else None
    if match is None:
        return None
    return match[0] if _case_counts(label) else label


def _example_spans(text: str) -> Iterator[tuple[int, int]]:
    """Where examples are: from "e.g." to the end of its sentence, or of the parentheses that it stands in."""
    for match in _EXAMPLE.finditer(text):
        depth = 0
        for character in text[: match.start()]:
            depth = depth + 1 if character == "(" else max(depth - (character == ")"), 0)
        close = match.end()
        inside = depth
        while inside >= depth > 0 and close < len(text):
            inside += {"(": 1, ")": -1}.get(text[close], 0)
            close += 1
        if depth and inside < depth:
            yield match.start(), close
            continue
        end = _SENTENCE_END.search(text, match.end())
        yield match.start(), end.end() if end else len(text)


def _item_numbers(text: str) -> list[tuple[int, int]]:
    """Where a list's items have their numbers: "(1) … (2) …", "1) … 2) …", and "1. … 2. …" at the beginning of lines."""
    by_style: dict[int, list[tuple[int, tuple[int, int]]]] = {}
    for match in _ITEM_NUMBER.finditer(text):
        style = match.lastindex or 0
        by_style.setdefault(style, []).append((int(match[style]), match.span()))
    spans = []
    for items in by_style.values():
        numbers = {number for number, _ in items}
        if {1, 2} <= numbers or {0, 1} <= numbers:
            spans += [span for _, span in items]
    return spans


def _within(match: re.Match[str], spans: Sequence[tuple[int, int]]) -> bool:
    return any(start <= match.start() and match.end() <= end for start, end in spans)


def paraphrase_fault(text: str, original: str, keep: Sequence[str], min_english: float) -> str | None:
    """Why a paraphrase is refused, apart from its length; None if it is good."""
    if not text:
        return "empty"
    if share_of_english(text) < min_english:
        return "not English"
    if _plain(text) == _plain(original):
        return "a copy of the original"
    if not all(_pattern(item).search(text) for item in keep):
        return "a label or format marker is lost"
    return None


def _case_counts(phrase: str) -> bool:
    """For single characters ("A" is no article) and for what has capitals elsewhere than at its beginning ("IN", "IsA")."""
    return len(phrase) == 1 or phrase[1:] != phrase[1:].lower()


def _pattern(phrase: str, *, ignore_case: bool | None = None) -> re.Pattern[str]:
    """Finds a phrase as whole words, in the case that counts unless `ignore_case` says; 5 is not in 0.5 or 5,000."""
    if ignore_case is None:
        ignore_case = not _case_counts(phrase)
    before = r"(?<!\w)" if phrase[:1].isalnum() else ""
    after = r"(?!\w)" if phrase[-1:].isalnum() else ""
    if phrase[:1].isdigit():
        before += r"(?<!\d\.)"
    if phrase[-1:].isdigit():
        after += r"(?!\.\d|,\d{3}(?!\d))"
    return re.compile(before + re.escape(phrase) + after, re.IGNORECASE if ignore_case else 0)


class _Paraphrased:
    """One task's hard prompts, those before and those written; its pairs are not kept."""

    def __init__(self, task: Task, count_tokens: Callable[[str], int]) -> None:
        self.name, self.before = task.name, task.hard_prompts
        self.original = task.hard_prompts[0]
        """The hard prompt that is paraphrased."""
        self.num_tokens = count_tokens(self.original)
        self.keep = must_keep(task, self.original)
        self.written: dict[int, str] = {}
        """Number of the paraphrase → its text."""

    @property
    def texts(self) -> list[str]:
        """The paraphrases in the order of their numbers."""
        return [self.written[number] for number in sorted(self.written)]

    def fault(self, text: str, num_tokens: int, config: ParaphraseConfig) -> str | None:
        """Why a whole answer is refused; None if it is good."""
        fault = paraphrase_fault(text, self.original, self.keep, config.min_english)
        if fault is not None:
            return fault
        if self.num_tokens > config.condense_over and num_tokens >= self.num_tokens:
            return "not shorter than the original"
        if _plain(text) in map(_plain, (*self.before, *self.written.values())):
            return "duplicate"
        return None


class _Requests:
    """The requests of one build; each follows from the settings and its place alone."""

    def __init__(self, config: ParaphraseConfig) -> None:
        self._config = config
        self._prompt = read_prompt("paraphrase", config.prompts_folder, ("hard_prompt",))
        self._styles = read_styles("paraphrase_styles", config.prompts_folder)

    def paraphrase(self, task: _Paraphrased, number: int, attempt: int) -> CompletionRequest:
        values = {
            "hard_prompt": task.original,
            "keep": (" | " if "," in "".join(task.keep) else ", ").join(task.keep) or "(nothing in particular)",
            "style": self._styles[number % len(self._styles)],
        }
        return CompletionRequest(
            self._prompt.fill(values),
            system=self._prompt.system,
            max_tokens=self._config.max_tokens + 100,  # the LLM's tokens may be shorter than the base model's
            temperature=self._config.temperature,
            seed=seed_of("paraphrase", self._config.seed, f"{task.name}/{number}/{attempt}") % 2**31,
        )


def _write_paraphrases(
    tasks: Sequence[_Paraphrased],
    requests: _Requests,
    rounds: Rounds,
    count_tokens: Callable[[str], int],
    config: ParaphraseConfig,
) -> None:
    """Ask until every task has its paraphrases or the tries are used up."""
    for attempt in range(config.max_tries):
        missing = [(task, number) for task in tasks for number in range(config.factor) if number not in task.written]
        if not missing:
            return
        rounds.ask("paraphrases", attempt, (requests.paraphrase(*place, attempt) for place in missing), len(missing))
        for task, number in missing:
            answer = rounds.answer(requests.paraphrase(task, number, attempt))
            if answer is None:
                rounds.refused["the request failed"] += 1
                continue
            text = _unwrapped(" ".join(answer.text.split()))
            num_tokens = count_tokens(text)
            if answer.finish_reason == "length" or num_tokens > config.max_tokens:
                # Checked first: a text that was cut has lost what stands at its end.
                fault: str | None = f"over {config.max_tokens} tokens"
            else:
                fault = task.fault(text, num_tokens, config)
            if fault is None:
                task.written[number] = text
            else:
                rounds.refused[fault] += 1


def _plain(text: str) -> str:
    """What two texts have in common that count as the same."""
    return " ".join(text.casefold().split())


def _unwrapped(text: str) -> str:
    """A text without the quotation marks that an LLM may put around the whole of it."""
    inner = text[1:-1]
    wrapped = text[:1] + text[-1:] in ('""', "“”") and not re.search('["“”]', inner)
    return inner.strip() if wrapped else text
