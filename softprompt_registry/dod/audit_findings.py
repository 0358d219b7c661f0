"""What an audit of a DoD looks for, and what one found."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from softprompt_registry.pages.formatting import percent, plural

Severity = Literal["error", "warning", "note"]
"""`error`: a number measured with this DoD would be wrong, or a task cannot be used. `warning`: a task teaches less than
it could. `note`: worth knowing."""
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
JSON_EXAMPLES, JSON_TASKS, EXCERPT_LETTERS = 3, 10, 200
"""What `Audit.to_json` keeps of each finding, so that it fits into a DoD's metadata, and of each text."""


@dataclass(frozen=True)
class FindingKind:
    """What an audit looks for."""

    severity: Severity
    unit: str
    what: str
    """Follows a count of the unit; may name settings (see `what_is_found`)."""
    why: str
    """What it spoils, and what to do."""


FINDING_KINDS: dict[str, FindingKind] = {
    "inputs_on_both_sides": FindingKind(
        "error",
        "input",
        "both in a train task and in a test task",
        "The translator is measured on soft prompts of texts that it saw in training. Move the tasks to one "
        "side, or remove the inputs from one of them.",
    ),
    "label_sets_on_both_sides": FindingKind(
        "error",
        "label set",
        "both of a train task and of a test task",
        "The translator can repeat a label list from memory. Move the tasks to one side.",
    ),
    "hard_prompts_on_both_sides": FindingKind(
        "error",
        "hard prompt",
        "both of a train task and of a test task",
        "The translator can repeat the hard prompt from memory. Move the tasks to one side.",
    ),
    "leaks_between_splits": FindingKind(
        "error",
        "input",
        "in train and in validation or test pairs of one task",
        "The soft prompt is stopped or measured on what it was tuned on. Keep all pairs of an input in one split.",
    ),
    "held_out_labels": FindingKind(
        "error",
        "label",
        "of train tasks with a word held out for the evaluation",
        "The evaluation sets have these labels, so a translator that names them there proves little. Replace the "
        "labels or leave the tasks out.",
    ),
    "labels_without_train_pairs": FindingKind(
        "error",
        "label",
        "without train pairs",
        "No soft prompt can learn such a label, yet a verbalization is scored on naming it. Add train pairs or "
        "drop the label.",
    ),
    "tasks_without_train_pairs": FindingKind(
        "error",
        "task",
        "without train pairs",
        "There is nothing to tune a soft prompt on. Give some of the pairs to the train split.",
    ),
    "tasks_without_validation_pairs": FindingKind(
        "warning",
        "task",
        "without validation pairs",
        "Tuning cannot tell when to stop. Give some of the pairs to the validation split.",
    ),
    "tasks_without_test_pairs": FindingKind(
        "warning",
        "task",
        "without test pairs",
        "How well the soft prompt does the task stays unknown. Give some of the pairs to the test split.",
    ),
    "small_tasks": FindingKind(
        "warning",
        "task",
        "with fewer than {min_pairs_per_task} pairs",
        "A soft prompt learns so few examples by heart. Add pairs or leave the task out.",
    ),
    "unbalanced_labels": FindingKind(
        "warning",
        "task",
        "with a label balance below {min_label_balance:g}",
        "The balance is 1 when all labels are equally frequent; at 0.5 the rarest has half its equal share, or "
        "the most frequent has twice that. A soft prompt then learns the frequent labels first. Add pairs of the "
        "rare ones.",
    ),
    "labels_in_inputs": FindingKind(
        "warning",
        "task",
        "with the label itself in over {max_label_leak_share} of the inputs",
        "The label, an inflection or a derivation of it stands in the input, so copying solves the pair. Rewrite "
        "or remove these inputs.",
    ),
    "contradictions": FindingKind(
        "warning",
        "input",
        "with several labels within one task",
        "At most one of the labels can be predicted. Keep the right one.",
    ),
    "label_spellings": FindingKind(
        "warning",
        "label",
        "of one task that differ only in case, white space or Unicode form from another",
        "One label counts as several, and a soft prompt is tuned and scored on its spelling. Write it in one way, as "
        "`build-dod files` does by default.",
    ),
    "repeated_inputs": FindingKind(
        "warning",
        "input",
        "repeated within one task with the same output",
        "The pair weighs double in tuning and in every mean. Remove the copies.",
    ),
    "repeated_label_sets": FindingKind(
        "warning",
        "label set",
        "of several tasks on one side",
        "The tasks teach, or test, one verbalization several times. Merge them or change their labels.",
    ),
    "mostly_shared_tasks": FindingKind(
        "warning",
        "task",
        "with over {max_shared_input_share} of the inputs in other tasks of the same side",
        "Such a task may be a copy under another name. Remove true copies; different questions about the same "
        "texts are fine.",
    ),
    "missing_ground_truth": FindingKind(
        "warning",
        "task",
        "with neither labels nor hard prompts",
        "Such a task can neither teach the translator nor be scored against a truth. Add hard prompts.",
    ),
    "long_pairs": FindingKind(
        "warning",
        "pair",
        "longer than {max_pair_tokens} tokens",
        "Long inputs are cut when a soft prompt is tuned. Shorten or remove them.",
    ),
    "long_hard_prompts": FindingKind(
        "warning",
        "hard prompt",
        "longer than {max_hard_prompt_tokens} tokens",
        "The translator does not learn to write that much. Condense them.",
    ),
    "shared_inputs": FindingKind(
        "note",
        "input",
        "in several tasks on one side",
        "Tasks from one source often ask different questions about the same texts.",
    ),
    "several_outputs": FindingKind(
        "note",
        "input",
        "with several outputs within one generation task",
        "Fine where a task has more than one good answer.",
    ),
    "near_duplicates": FindingKind(
        "note",
        "input",
        "of one task that differ only in punctuation or spacing from another",
        "Fine where punctuation is what the task asks about. Else the text weighs double, and one in another split was "
        "seen in training.",
    ),
    "other_labels_in_inputs": FindingKind(
        "note",
        "input",
        "with the word of another label of the task",
        "Such inputs can mislead, or make a task harder in a useful way.",
    ),
    "held_out_words_in_hard_prompts": FindingKind(
        "note",
        "hard prompt",
        "of train tasks with a held-out word",
        "A common word in a sentence is no label, but the translator has seen it.",
    ),
}
"""Errors first, then warnings, then notes."""


@dataclass(frozen=True)
class Example:
    """One place where a finding occurs; `text` is an excerpt, or empty where the task as a whole is meant."""

    task: str
    text: str
    detail: str


@dataclass(frozen=True)
class Finding:
    """What an audit found of one kind: how often, in which tasks (in order of their names), and the worst examples."""

    code: str
    kind: FindingKind
    title: str
    """The count in words: "2 tasks without test pairs"."""
    count: int
    tasks: tuple[str, ...]
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class TaskRow:
    """What an audit knows about one task; None where it does not apply to the task's kind."""

    name: str
    side: str
    kind: str
    pairs: int
    train: int
    validation: int
    test: int
    labels: int
    balance: float | None
    label_in_inputs: float | None
    """Share of the inputs that contain their own label."""
    other_label_in_inputs: float | None
    leaks: int
    contradictions: int
    repeated: int
    shared_inputs: int
    """Inputs that other tasks of the same side have too."""
    both_sides_inputs: int
    longest: int
    """The longest pair, in the unit of `Lengths`."""
    errors: int
    """Kinds of errors that the task takes part in."""
    warnings: int


@dataclass(frozen=True)
class Sizes:
    """How much of what a DoD has."""

    tasks: int
    train_tasks: int
    test_tasks: int
    classification_tasks: int
    pairs: int
    train_pairs: int
    validation_pairs: int
    test_pairs: int
    min_pairs: int
    median_pairs: float
    max_pairs: int
    label_sets: int
    hard_prompts: int


@dataclass(frozen=True)
class Lengths:
    """How long pairs are, input and output together."""

    unit: str
    """`tokens`, `words`, or `tokens or words` where only some pairs have a token count."""
    p50: int
    p90: int
    p99: int
    max: int


@dataclass(frozen=True)
class Audit:
    """What an audit found; equal for equal content."""

    path: Path
    digest: str
    settings: Mapping[str, Any]
    """The `AuditConfig`, field by field."""
    sizes: Sizes
    lengths: Lengths
    findings: tuple[Finding, ...]
    """Errors first, then warnings, then notes."""
    not_checked: Mapping[str, str]
    """Kind of finding that could not be looked for → why."""
    rows: tuple[TaskRow, ...]
    """A row per task, in order of their names."""
    pair_lengths: Mapping[str, Mapping[int, int]]
    """Side → length → number of pairs. The other histograms follow from the rows."""

    def number_of(self, severity: Severity) -> int:
        """How many kinds of findings have this severity."""
        return sum(finding.kind.severity == severity for finding in self.findings)

    def passed(self, strict: bool) -> bool:
        """Strictly, a DoD passes without errors and warnings; otherwise an audit only reports and every DoD passes."""
        return not strict or self.number_of("error") + self.number_of("warning") == 0

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        found = [plural(self.number_of(severity), severity) for severity in SEVERITIES if self.number_of(severity)]
        among = f"{plural(self.sizes.tasks, 'task')} and {plural(self.sizes.pairs, 'pair')}"
        if not found:
            return f"Nothing found in {among}."
        return f"{', '.join(found[:-1]) + ' and ' if found[1:] else ''}{found[-1]} in {among}."

    def table(self) -> dict[str, list[Any]]:
        """The rows as columns."""
        return {f.name: [getattr(row, f.name) for row in self.rows] for f in dataclasses.fields(TaskRow)}

    def to_json(self) -> dict[str, Any]:
        """The audit without rows and plots, and with the first examples and tasks of each finding: a DoD's metadata."""
        return {
            "digest": self.digest,
            "verdict": self.verdict,
            "settings": dict(self.settings),
            "sizes": dataclasses.asdict(self.sizes),
            "lengths": dataclasses.asdict(self.lengths),
            "findings": [
                {
                    "code": finding.code,
                    "severity": finding.kind.severity,
                    "title": finding.title,
                    "count": finding.count,
                    "num_tasks": len(finding.tasks),
                    "tasks": [excerpt(name) for name in finding.tasks[:JSON_TASKS]],
                    "examples": [
                        {key: excerpt(value) for key, value in dataclasses.asdict(example).items()}
                        for example in finding.examples[:JSON_EXAMPLES]
                    ],
                }
                for finding in self.findings
            ],
            "not_checked": dict(self.not_checked),
        }


def what_is_found(kind: FindingKind, settings: Mapping[str, Any]) -> str:
    """What follows the count: "tasks" "with fewer than 50 pairs"."""
    shares = {name: percent(value) for name, value in settings.items() if name.endswith("_share")}
    return kind.what.format(**{**settings, **shares})


def excerpt(text: str) -> str:
    """The beginning of a text on one line, with what cannot be printed replaced."""
    line = re.sub(r"\s+", " ", text[: 4 * EXCERPT_LETTERS]).strip()
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)
    return line if len(line) <= EXCERPT_LETTERS else line[: EXCERPT_LETTERS - 1].rstrip() + "…"
