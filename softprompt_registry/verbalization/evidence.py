"""What texts are tried on: pairs of a soft prompt's task, or a few typical inputs, from files or from a DoD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from softprompt_registry.dod.file_rows import Fault, is_text, rows_of, unit_of
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import ConfigError, DataError
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.verbalization.held_out import MIN_ITEMS


@dataclass(frozen=True)
class TriedOn:
    """What the texts of one soft prompt are tried on."""

    pairs: tuple[Pair, ...] = ()
    """Pairs of its task that it was not tuned on."""
    inputs: tuple[str, ...] = ()
    """Typical ones; beside pairs they are not used."""

    def __bool__(self) -> bool:
        return bool(self.pairs or self.inputs)

    @property
    def too_few(self) -> str | None:
        """What is missing, if there is something but not enough."""
        found, what = (len(self.pairs), "pairs") if self.pairs else (len(self.inputs), "inputs")
        return f"found {found} {what}, expected at least {MIN_ITEMS}" if 0 < found < MIN_ITEMS else None


@dataclass(frozen=True)
class Evidence:
    """What a user has at hand for some soft prompts."""

    tried_on: list[TriedOn]
    """For each soft prompt, in order."""
    labelled_tasks: dict[str, Task]
    """Tasks whose labels are known from data, by name."""
    what: str | None = None
    """What it is, in words; None where there is nothing."""


def collect_evidence(
    soft_prompts: Sequence[SoftPrompt],
    *,
    dod: Path | None = None,
    pairs: Path | None = None,
    inputs: Path | None = None,
    labels_from_data: bool = False,
) -> Evidence:
    """What the files hold for these soft prompts; at most one of `dod`, `pairs` and `inputs` is given.

    Args:
        dod: whose test pairs of each soft prompt's task are taken.
        pairs: a file of rows, for one soft prompt, since pairs are of one task.
        inputs: a text file with an input on each line, for all soft prompts.
        labels_from_data: take the labels of classification tasks from the outputs in `dod` or `pairs`.

    Raises:
        ConfigError: pairs for several soft prompts.
        DataError: a task is missing or another one than that of the soft prompt, there is too little, a file is broken,
            or the outputs are no labels.
        FileNotFoundError: there is no such file.
    """
    labelled: dict[str, Task] = {}
    if dod is not None:
        tasks = tasks_of_dod(dod, soft_prompts)
        tried_on = [TriedOn(held_out_pairs(tasks[prompt.record.task])) for prompt in soft_prompts]
        if labels_from_data:
            labelled = with_labels_from_data(tasks)
        return Evidence(tried_on, labelled, "test pairs of their tasks")
    if pairs is not None:
        if len(soft_prompts) != 1:
            raise ConfigError(
                f"reading pairs from {str(pairs)!r}: found {len(soft_prompts)} soft prompts, expected one, since pairs are "
                "of one task. Name one, or give a DoD with the tasks of all."
            )
        found = pairs_of_file(pairs)
        name = soft_prompts[0].record.task
        if labels_from_data:
            labels = labels_among(found, f"taking labels from the outputs in {str(pairs)!r}")
            labelled[name] = Task(name, "classification", found, labels)
        return Evidence([TriedOn(found)], labelled, f"{len(found)} pairs")
    if inputs is not None:
        texts = inputs_of_file(inputs)
        return Evidence([TriedOn(inputs=texts)] * len(soft_prompts), {}, f"{len(texts)} inputs")
    return Evidence([TriedOn()] * len(soft_prompts), {})


# From files -----------------------------------------------------------------------------------------------------------


def pairs_of_file(path: Path) -> tuple[Pair, ...]:
    """The pairs of a file of rows with `input` and `output`, in the format that its ending names, else JSON Lines.

    Raises:
        DataError: a row is no such pair, or there are too few.
        FileNotFoundError: there is no such file.
    """
    doing = f"reading pairs from {str(path)!r}"
    with path.open("rb"):
        pass  # the error of a missing file names it
    pairs = []
    for number, row in rows_of(path, ("input", "output")):
        where = f"{doing}: {unit_of(path)} {number}"
        if isinstance(row, Fault):
            raise DataError(f"{where} is {row.found}, expected {row.expected}. {row.advice}")
        missing = [key for key in ("input", "output") if not is_text(row.get(key))]
        if missing:
            raise DataError(
                f"{where} has no text under {' and '.join(map(repr, missing))}, expected a pair such as "
                '{"input": "a text", "output": "a label"}. Correct it, or leave it out.'
            )
        pairs.append(Pair(row["input"], row["output"]))
    _require_enough(len(pairs), "pairs", doing)
    return tuple(pairs)


def inputs_of_file(path: Path) -> tuple[str, ...]:
    """The lines of a UTF-8 text file, without white space around them; empty ones are left out.

    Raises:
        DataError: the file is not UTF-8, or there are too few.
        FileNotFoundError: there is no such file.
    """
    doing = f"reading inputs from {str(path)!r}"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{doing}: found bytes that are not UTF-8, expected UTF-8 text. Save the file as UTF-8."
        ) from error
    inputs = tuple(line.strip() for line in lines if line.strip())
    _require_enough(len(inputs), "inputs, one on each line", doing)
    return inputs


def _require_enough(found: int, what: str, doing: str) -> None:
    if found < MIN_ITEMS:
        raise DataError(f"{doing}: found {found}, expected at least {MIN_ITEMS} {what}. Add some.")


# From a DoD -----------------------------------------------------------------------------------------------------------


def tasks_of_dod(path: Path, soft_prompts: Sequence[SoftPrompt]) -> dict[str, Task]:
    """The tasks of these soft prompts, by name.

    Raises:
        DataError: the DoD lacks one, or has another one of its name: what it holds out there, the soft prompt may have been
            tuned on.
    """
    doing = f"looking for the tasks of {len(soft_prompts)} soft prompts in {str(path)!r}"
    with DodStore.open(path) as store:
        known = set(store.task_names())
        missing = sorted({prompt.record.task for prompt in soft_prompts} - known)
        if missing:
            raise DataError(
                f"{doing}: {_some(missing)} missing; it has {len(known)} tasks. Give the DoD that they were tuned on, or "
                "verbalize those of other tasks apart."
            )
        tasks = {name: store.task(name) for name in dict.fromkeys(prompt.record.task for prompt in soft_prompts)}
    for prompt in soft_prompts:
        name, expected = prompt.record.task, prompt.record.task_digest
        if expected is not None and tasks[name].digest != expected:
            raise DataError(
                f"{doing}: its task {name!r} has the digest {tasks[name].digest[:12]}, but the soft prompt was tuned on "
                f"{expected[:12]}, so that its test pairs may have been tuned on. Give the DoD that it was tuned on."
            )
    return tasks


def held_out_pairs(task: Task) -> tuple[Pair, ...]:
    """What neither tuned the task's soft prompt nor stopped it.

    Raises:
        DataError: there are too few.
    """
    pairs = tuple(task.pairs_of("test"))
    _require_enough(len(pairs), "test pairs", f"taking the test pairs of task {task.name!r}")
    return pairs


# Labels ---------------------------------------------------------------------------------------------------------------


def labels_among(pairs: Sequence[Pair], doing: str) -> tuple[str, ...]:
    """The different outputs, in the order in which they first come.

    Raises:
        DataError: they are no labels: there is one only, or they do not come twice on average.
    """
    labels = tuple(dict.fromkeys(pair.output for pair in pairs))
    if len(labels) < 2 or 2 * len(labels) > len(pairs):
        raise DataError(
            f"{doing}: {len(pairs)} pairs have {len(labels)} different outputs; expected at least two labels, each twice on "
            "average. Give more pairs, or leave out the labels from data."
        )
    return labels


def with_labels_from_data(tasks: Mapping[str, Task]) -> dict[str, Task]:
    """The classification tasks, with the labels that occur among all their outputs.

    Raises:
        DataError: none of them is a classification.
    """
    found = {
        name: Task(
            name,
            task.kind,
            task.pairs,
            labels_among(task.pairs, f"taking the labels of task {name!r} from its outputs"),
        )
        for name, task in tasks.items()
        if task.kind == "classification"
    }
    if not found:
        raise DataError(
            f"taking labels from the outputs of {_some(sorted(tasks))} no classification; expected at least one that is. "
            "Leave out the labels from data."
        )
    return found


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{'task' if len(names) == 1 else 'tasks'} {shown}{more} {'is' if len(names) == 1 else 'are'}"
