"""How well each condition works on each target LLM, and what it costs: means, intervals, paired differences, margins.

Everything is worked out from the scored answers and nothing else, so that a logged result can be computed again. A mean is
over tasks, of which each is the mean over its answered items; missing answers are left out and counted. Differences are over
those (task, item) pairs only that both conditions have answers to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from statistics import fmean
from typing import Any, NamedTuple, get_args

from softprompt_registry.dod.task import TaskKind
from softprompt_registry.errors import DataError
from softprompt_registry.evaluation.statistics import (
    TIE_TOLERANCE,
    Interval,
    PairedComparison,
    bootstrap_mean,
    paired_bootstrap,
)
from softprompt_registry.language_models.protocol import Prices
from softprompt_registry.portability.conditions import CONDITIONS, FEW_SHOT_5, FEW_SHOTS, SOFT_PROMPT, TRANSLATIONS
from softprompt_registry.portability.scoring import HEADLINE, HEADLINES, METRICS, STATES, ScoredAnswer
from softprompt_registry.storage import check_format_version, complete_record

FORMAT_VERSION = 1
"""Of `Portability.to_json`."""


class Measure(NamedTuple):
    """A metric over all tasks that have it, or over those of one kind."""

    metric: str
    kind: TaskKind | None = None

    @property
    def name(self) -> str:
        """`rouge_l`, `rouge_l_generation`."""
        return self.metric if self.kind is None else f"{self.metric}_{self.kind}"


ALL_TASKS = Measure(HEADLINE)


class Comparison(NamedTuple):
    """Condition a minus condition b on one target, paired over tasks."""

    target: str
    a: str
    b: str
    measure: Measure
    result: PairedComparison
    num_items: int
    """(task, item) pairs that both have answers to."""


class Margin(NamedTuple):
    """A task in which a translation's task ROUGE-L beats few-shot examples."""

    target: str
    translation: str
    few_shot: str
    task: str
    kind: TaskKind
    score: float
    few_shot_score: float
    over_items: PairedComparison
    """The margin, paired over the task's items."""


@dataclass(frozen=True)
class Portability:
    """The scored answers of one run, and what follows from them.

    The soft prompt works on the small model only, so its answers stand beside those of every target.

    Raises:
        DataError: there is no answer, or there are soft prompts on several small models.
    """

    answers: tuple[ScoredAnswer, ...]
    prices: Mapping[str, Prices] = field(default_factory=dict)
    """By target; those without have no cost."""
    seed: int = 0
    """Seed for the bootstraps."""
    draws: int = 10_000

    def __post_init__(self) -> None:
        small = {answer.target for answer in self.answers if answer.condition == SOFT_PROMPT}
        if not self.answers or len(small) > 1:
            found = f"soft prompts on {sorted(small)}" if self.answers else "no answer"
            raise DataError(
                f"measuring portability: found {found}, expected answers, and soft prompts on one small model. "
                "Ask at least one target about at least one task, and analyse the banks of several models apart."
            )

    @cached_property
    def by_place(self) -> dict[tuple[str, str], list[ScoredAnswer]]:
        """The answers by target and condition, in the order of tables: targets as they came, then `CONDITIONS`."""
        targets = list(dict.fromkeys(answer.target for answer in self.answers))
        found: dict[tuple[str, str], list[ScoredAnswer]] = {(t, c): [] for t in targets for c in CONDITIONS}
        for answer in self.answers:
            found[answer.target, answer.condition].append(answer)
        return {place: answers for place, answers in found.items() if answers}

    @property
    def places(self) -> list[tuple[str, str]]:
        """Every target and condition that was asked, each once; the soft prompt with its small model."""
        return list(self.by_place)

    @property
    def targets(self) -> list[str]:
        """The LLMs that were asked with hard prompts; without any the soft prompt's small model."""
        with_hard_prompts = [target for target, condition in self.places if condition != SOFT_PROMPT]
        return list(dict.fromkeys(with_hard_prompts or [target for target, _ in self.places]))

    @property
    def small_model(self) -> str | None:
        """What the soft prompts work on; None if they were not asked."""
        return next((target for target, condition in self.places if condition == SOFT_PROMPT), None)

    def conditions(self, target: str) -> list[str]:
        """Those that a target can be looked at under, the soft prompt's among them."""
        return [name for name in CONDITIONS if self._place(target, name) in self.by_place]

    def _place(self, target: str, condition: str) -> tuple[str, str]:
        return (self.small_model or target) if condition == SOFT_PROMPT else target, condition

    def of(self, target: str, condition: str) -> list[ScoredAnswer]:
        """The answers of a target under a condition; of the soft prompt its small model's, whatever the target.

        Raises:
            DataError: the target was not asked under that condition.
        """
        found = self.by_place.get(self._place(target, condition))
        if found is None:
            raise DataError(
                f"reading portability results: target {target!r} was not asked under the condition {condition!r}; found "
                f"{self.places}. Name one of these."
            )
        return found

    # Scores -----------------------------------------------------------------------------------------------------------

    @cached_property
    def kinds(self) -> list[TaskKind]:
        """Those that there are tasks of."""
        return [kind for kind in get_args(TaskKind) if any(answer.kind == kind for answer in self.answers)]

    @cached_property
    def measures(self) -> list[Measure]:
        """What conditions are compared by: the headline over all tasks, then each kind's own where it is another number."""
        found = [ALL_TASKS]
        for kind in self.kinds:
            if HEADLINES[kind] != HEADLINE:
                found.append(Measure(HEADLINES[kind]))
            elif len(self.kinds) > 1:
                found.append(Measure(HEADLINE, kind))
        return found

    def task_means(self, target: str, condition: str, measure: Measure = ALL_TASKS) -> dict[str, float]:
        """By task: the mean over its answered items. Tasks without any answer are not in it."""
        return {task: fmean(items.values()) for task, items in self._scores(target, condition, measure).items()}

    def _scores(self, target: str, condition: str, measure: Measure) -> dict[str, dict[int, float]]:
        """By task, by item: the scores of what was answered."""
        found: dict[str, dict[int, float]] = {}
        for answer in self.of(target, condition):
            if measure.metric in answer.scores and measure.kind in (None, answer.kind):
                found.setdefault(answer.task, {})[answer.item] = answer.scores[measure.metric]
        return found

    def interval(self, target: str, condition: str, measure: Measure = ALL_TASKS) -> Interval | None:
        """Mean over tasks with a 95 % bootstrap interval over them; None without an answer."""
        return self._intervals.get((*self._place(target, condition), measure))

    @cached_property
    def _intervals(self) -> dict[tuple[str, str, Measure], Interval]:
        every = dict.fromkeys([*self.measures, *map(Measure, METRICS)])
        return {
            (*place, measure): bootstrap_mean(list(means.values()), self.seed, self.draws)
            for place in self.places
            for measure in every
            if (means := self.task_means(*place, measure))
        }

    # Costs ------------------------------------------------------------------------------------------------------------

    def tokens_per_answer(self, target: str, condition: str) -> float | None:
        """Prompt and completion, mean over the answers; None if the server did not count them."""
        counted = [answer.prompt_tokens + answer.completion_tokens for answer in _counted(self.of(target, condition))]
        return fmean(counted) if counted else None

    def cost(self, target: str, condition: str) -> float | None:
        """Of all answers, in the currency of the prices; None without prices or where an answer's tokens are not known."""
        place = self._place(target, condition)
        answered = [answer for answer in self.of(*place) if not answer.is_missing]
        unknown = [answer for answer in answered if answer.prompt_tokens == 0 and answer.state != "refused"]
        if place[0] not in self.prices or unknown:
            return None
        prices = self.prices[place[0]]
        return prices.cost(
            sum(answer.prompt_tokens for answer in answered), sum(answer.completion_tokens for answer in answered)
        )

    def tokens_saved(self, target: str, condition: str, against: str = FEW_SHOT_5) -> tuple[float, float] | None:
        """Tokens that an answer takes less than under the other condition, on the items that both answered, and their share.

        None if there are no such items, and for a soft prompt on another model than the target, which counts other tokens.
        """
        if against not in self.conditions(target) or self._place(target, condition)[0] != target:
            return None
        other = {answer.key: answer for answer in _counted(self.of(target, against))}
        both = [(answer, other[answer.key]) for answer in _counted(self.of(target, condition)) if answer.key in other]
        if not both:
            return None
        ours, theirs = (sum(a.prompt_tokens + a.completion_tokens for a in side) for side in zip(*both, strict=True))
        return (theirs - ours) / len(both), 1 - ours / theirs

    # Conditions beside each other ---------------------------------------------------------------------------------------

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Every pair of conditions on every target by every measure, where they have items in common."""
        found = []
        for target in self.targets:
            for a, b in combinations(self.conditions(target), 2):
                for measure in self.measures:
                    found.append(self._compare(target, a, b, measure))
        return [comparison for comparison in found if comparison is not None]

    def _compare(self, target: str, a: str, b: str, measure: Measure) -> Comparison | None:
        pairs = _paired(self._scores(target, a, measure), self._scores(target, b, measure))
        if not pairs:
            return None
        means = [(fmean(left for left, _ in items), fmean(right for _, right in items)) for items in pairs.values()]
        left, right = zip(*means, strict=True)
        result = paired_bootstrap(left, right, self.seed, self.draws)
        return Comparison(target, a, b, measure, result, sum(map(len, pairs.values())))

    def comparison(self, target: str, a: str, b: str, measure: Measure = ALL_TASKS) -> PairedComparison | None:
        """Condition a minus condition b, in either order; None if they have no item in common."""
        for found in self.comparisons:
            if (found.target, found.measure) == (target, measure) and {found.a, found.b} == {a, b}:
                return found.result if found.a == a else _turned(found.result)
        return None

    @cached_property
    def margins(self) -> list[Margin]:
        """Tasks in which a translation beats few-shot examples, the largest margin first (paper section 5.2).

        Of many tasks some win by luck, on few items more of them; `over_items` says how sure each one is.
        """
        found = []
        for target in self.targets:
            for translation in TRANSLATIONS:
                for few_shot in FEW_SHOTS:
                    if {translation, few_shot} <= set(self.conditions(target)):
                        found += self._margins(target, translation, few_shot)
        return found

    def _margins(self, target: str, translation: str, few_shot: str) -> list[Margin]:
        kinds = {answer.task: answer.kind for answer in self.of(target, translation)}
        pairs = _paired(self._scores(target, translation, ALL_TASKS), self._scores(target, few_shot, ALL_TASKS))
        found = []
        for task, items in pairs.items():
            ours, theirs = zip(*items, strict=True)
            if fmean(ours) - fmean(theirs) > TIE_TOLERANCE:
                over_items = paired_bootstrap(ours, theirs, self.seed, self.draws)
                means = fmean(ours), fmean(theirs)
                found.append(Margin(target, translation, few_shot, task, kinds[task], *means, over_items))
        return sorted(found, key=lambda margin: -margin.over_items.difference)

    # As numbers and tables --------------------------------------------------------------------------------------------

    def metrics(self, target: str, condition: str) -> dict[str, float]:
        """All numbers of one target and condition, under the same names for each; what is not known has no name.

        Of each of `METRICS` and `measures` the mean with `_low` and `_high`. `accuracy_lost_to_form` is lenient minus strict.
        `num_tasks` counts tasks with an answer, `num_items` what was asked. `coverage` is the share that was answered,
        `runaway_share` the share of answers that ran on to the length limit.
        """
        answers = self.of(target, condition)
        found: dict[str, float] = {}
        for measure in dict.fromkeys([*map(Measure, METRICS), *self.measures]):
            if (interval := self.interval(target, condition, measure)) is not None:
                found[measure.name] = interval.mean
                found[f"{measure.name}_low"], found[f"{measure.name}_high"] = interval.low, interval.high
        if "accuracy_strict" in found:
            found["accuracy_lost_to_form"] = found["accuracy_lenient"] - found["accuracy_strict"]
        states = Counter(answer.state for answer in answers)
        answered = [answer for answer in answers if not answer.is_missing]
        found["num_tasks"] = float(len({answer.task for answer in answered}))
        found["num_items"] = float(len(answers))
        found |= {f"num_{state}": float(states[state]) for state in STATES if state != "answered"}
        found["num_cut"] = float(sum(answer.cut for answer in answered))
        found["num_ambiguous"] = float(sum(answer.ambiguous for answer in answered))
        found["coverage"] = len(answered) / len(answers)
        if answered:
            found["runaway_share"] = found["num_cut"] / len(answered)
        return found | self._costs(target, condition)

    def _costs(self, target: str, condition: str) -> dict[str, float]:
        answers = _counted(self.of(target, condition))
        found: dict[str, float] = {}
        if answers:
            found["prompt_tokens"] = float(sum(answer.prompt_tokens for answer in answers))
            found["completion_tokens"] = float(sum(answer.completion_tokens for answer in answers))
            found["tokens_per_answer"] = (found["prompt_tokens"] + found["completion_tokens"]) / len(answers)
        if (saved := self.tokens_saved(target, condition)) is not None:
            found["tokens_saved_per_answer"], found["tokens_saved_share"] = saved
        if (cost := self.cost(target, condition)) is not None:
            found["cost"] = cost
        return found

    def table(self) -> dict[str, list[Any]]:
        """A row for each target and condition, for `mlflow.log_table`; None where a number is not known."""
        rows = [self.metrics(*place) for place in self.places]
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns: dict[str, list[Any]] = {
            "target": [target for target, _ in self.places],
            "condition": [condition for _, condition in self.places],
        }
        return columns | {name: [row.get(name) for row in rows] for name in names}

    def task_table(self) -> dict[str, list[Any]]:
        """A row for each target, condition and task: items asked, items answered, and the means of `METRICS`."""
        rows = []
        for place, answers in self.by_place.items():
            asked = Counter(answer.task for answer in answers)
            answered = Counter(answer.task for answer in answers if not answer.is_missing)
            kinds = {answer.task: answer.kind for answer in answers}
            means = {metric: self.task_means(*place, Measure(metric)) for metric in METRICS}
            for task, count in asked.items():
                scores = {metric: means[metric].get(task) for metric in METRICS}
                rows.append((*place, task, kinds[task], count, answered[task], *scores.values()))
        return _columns(("target", "condition", "task", "kind", "num_items", "num_answered", *METRICS), rows)

    def comparison_table(self) -> dict[str, list[Any]]:
        """A row for each of `comparisons`."""
        names = ("target", "condition", "other", "metric", *PairedComparison._fields, "num_items")
        return _columns(names, [(*c[:3], c.measure.name, *c.result, c.num_items) for c in self.comparisons])

    def margin_table(self) -> dict[str, list[Any]]:
        """A row for each of `margins`; the interval is over the task's items."""
        names = ("target", "translation", "few_shot", "task", "kind", "score", "few_shot_score")
        over_items = ("margin", "low", "high", "num_items")
        rows = [(*m[:7], *m.over_items[:3], m.over_items.n) for m in self.margins]
        return _columns((*names, *over_items), rows)

    def to_json(self) -> dict[str, Any]:
        """The scored answers in columns, and the settings: all other numbers follow from them."""
        names = [name for name in ScoredAnswer.__dataclass_fields__ if name != "scores"]
        columns: dict[str, list[Any]] = {name: [getattr(item, name) for item in self.answers] for name in names}
        columns |= {metric: [item.scores.get(metric) for item in self.answers] for metric in METRICS}
        return {
            "format_version": FORMAT_VERSION,
            "seed": self.seed,
            "draws": self.draws,
            "prices": {target: prices._asdict() for target, prices in self.prices.items()},
            "answers": columns,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Portability:
        """The reverse of `to_json`.

        Raises:
            ArtifactError: the record is of another format version, or incomplete.
        """
        what = "the result of a portability run"
        check_format_version(record, FORMAT_VERSION, what)
        with complete_record(what):
            columns = record["answers"]
            names = [name for name in ScoredAnswer.__dataclass_fields__ if name != "scores"]
            answers = []
            for number in range(len(columns["target"])):
                scores = {metric: columns[metric][number] for metric in METRICS}
                known = {metric: score for metric, score in scores.items() if score is not None}
                answers.append(ScoredAnswer(**{name: columns[name][number] for name in names}, scores=known))
            prices = {target: Prices(**entries) for target, entries in record["prices"].items()}
            return cls(tuple(answers), prices, record["seed"], record["draws"])


def _counted(answers: Sequence[ScoredAnswer]) -> list[ScoredAnswer]:
    """What was answered and has its tokens counted."""
    return [answer for answer in answers if not answer.is_missing and answer.prompt_tokens > 0]


def _paired(
    a: Mapping[str, Mapping[int, float]], b: Mapping[str, Mapping[int, float]]
) -> dict[str, list[tuple[float, float]]]:
    """By task that both have: the scores of the items that both have."""
    found = {
        task: [(score, b[task][item]) for item, score in a[task].items() if item in b[task]] for task in a if task in b
    }
    return {task: items for task, items in found.items() if items}


def _turned(result: PairedComparison) -> PairedComparison:
    """b minus a from a minus b."""
    difference, low, high, wins, ties, losses, n = result
    return PairedComparison(-difference, -high, -low, losses, ties, wins, n)


def _columns(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    return {name: [row[number] for row in rows] for number, name in enumerate(names)}
