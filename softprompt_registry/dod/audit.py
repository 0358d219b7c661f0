"""An audit of a DoD: how large it is, and what in it makes a number wrong or teaches less than it could.

The tasks are read once, one at a time. What compares texts across tasks keeps an 8-byte hash of each, not the text. The
findings depend on the content alone: not on the order of tasks and pairs, and not on the time.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from softprompt_registry.config import Share, flatten, settings
from softprompt_registry.dod.audit_findings import (
    FINDING_KINDS,
    SEVERITIES,
    Audit,
    Example,
    Finding,
    Lengths,
    Sizes,
    TaskRow,
    excerpt,
    what_is_found,
)
from softprompt_registry.dod.audit_texts import NO_PUNCTUATION, SameRoots, SharedTexts, hash_of, telling_words
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import PAIR_SPLITS, TASK_SPLITS, Pair, Task, TaskSplit, text_key
from softprompt_registry.dod.vocabulary import held_out_words, words_of
from softprompt_registry.errors import DataError
from softprompt_registry.pages.formatting import plural
from softprompt_registry.recording import NullRecorder, Recorder


@settings
class AuditConfig:
    """From where on an audit calls something a finding."""

    min_pairs_per_task: NonNegativeInt = 50
    """A task with fewer pairs is a finding."""
    min_label_balance: Share = 0.5
    """Least balance of a classification task, from 0 to 1: the smaller of the rarest label's share of the pairs over an
    equal share, and an equal share over the most frequent label's."""
    max_label_leak_share: Share = 0.05
    """Largest share of a classification task's inputs, from 0 to 1, that may contain their own label, an inflection or a
    derivation of it."""
    max_shared_input_share: Share = 0.5
    """Largest share of a task's inputs, from 0 to 1, that other tasks of its side may have too."""
    max_pair_tokens: PositiveInt | None = 400
    """Longest input and output together (paper section A.7). Pairs without a token count are counted in words, of which
    a text has fewer than tokens. None skips this."""
    max_hard_prompt_tokens: PositiveInt | None = 300
    """Longest hard prompt; counted only with a tokenizer. None skips this."""
    max_examples: NonNegativeInt = 5
    """Examples kept of each finding."""


def audit_dod(path: Path, *, config: AuditConfig, tokenizer: Any = None, recorder: Recorder | None = None) -> Audit:
    """Read the DoD once and say what is in it.

    Inputs and hard prompts count as the same text when they are equal in compatibility form (NFKC), without case and with
    single spaces.

    Args:
        tokenizer: a Hugging Face tokenizer, for pairs without a token count and for hard prompts.
        recorder: gets the progress, and the numbers of errors, warnings and notes.

    Raises:
        DataError: the file is not a DoD, or has no tasks.
    """
    recorder = recorder or NullRecorder()
    reading = _Reading(config, tokenizer)
    with DodStore.open(path) as store:
        names = store.task_names()
        if not names:
            raise DataError(f"auditing DoD {str(path)!r}: found no tasks; expected at least one. Build it again.")
        with recorder.progress("audit tasks", len(names)) as bar:
            for task in store.tasks():
                reading.read(task)
                bar.advance(note=excerpt(task.name))
        reading.compare_tasks(store)
        digest = store.digest
    audit = reading.audit(path, digest)
    for severity in SEVERITIES:
        recorder.metric(f"{severity}s", audit.number_of(severity))
    return audit


class _Reading:
    """What is known while the tasks go by."""

    def __init__(self, config: AuditConfig, tokenizer: Any) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._counts: Counter[str] = Counter()
        self._tasks: dict[str, set[str]] = defaultdict(set)
        self._examples: dict[str, list[tuple[float, Example]]] = defaultdict(list)
        self._rows: list[dict[str, Any]] = []
        self._inputs, self._hard_prompts = SharedTexts(), SharedTexts()
        self._label_sets: dict[frozenset[str], dict[TaskSplit, list[str]]] = {}
        self._lengths: dict[str, Counter[int]] = {side: Counter() for side in TASK_SPLITS}
        self._num_hard_prompts = self._counted_in_words = 0

    def _note(self, code: str, task: str, detail: str, text: str = "", weight: float = 0.0, *, count: int = 1) -> None:
        """A finding in one task, and its example."""
        self._counts[code] += count
        self._tasks[code].add(task)
        self._example(code, weight, task, text, detail)

    def _example(self, code: str, weight: float, task: str, text: str, detail: str) -> None:
        """Offer an example; the heaviest are kept, equal ones in the order of task and text."""
        kept = self._examples[code]
        kept.append((-weight, Example(task, excerpt(text), excerpt(detail))))
        if len(kept) > 20 * (self._config.max_examples + 1):
            self._examples[code] = self._best(code)

    def _best(self, code: str) -> list[tuple[float, Example]]:
        kept = sorted(self._examples[code], key=lambda item: (item[0], dataclasses.astuple(item[1])))
        return kept[: self._config.max_examples]

    def read(self, task: Task) -> None:
        """Take in one task."""
        splits: Counter[str] = Counter(pair.split for pair in task.pairs)
        self._rows.append(
            {"name": task.name, "side": task.split, "kind": task.kind, "pairs": len(task.pairs)}
            | {split: splits[split] for split in PAIR_SPLITS}
            | {"labels": len(task.labels), "balance": None, "label_in_inputs": None, "other_label_in_inputs": None}
        )
        for split in PAIR_SPLITS:
            if not splits[split]:
                self._note(f"tasks_without_{split}_pairs", task.name, plural(len(task.pairs), "pair"))
        if len(task.pairs) < self._config.min_pairs_per_task:
            self._note("small_tasks", task.name, plural(len(task.pairs), "pair"), weight=-len(task.pairs))
        if not task.ground_truth:
            self._note("missing_ground_truth", task.name, plural(len(task.pairs), "pair"))
        self._read_duplicates(task)
        self._read_lengths(task)
        self._read_hard_prompts(task)
        if task.kind == "classification":
            self._read_balance(task)
            self._read_labels(task)
            self._read_label_words(task)

    def _read_duplicates(self, task: Task) -> None:
        places: dict[str, list[Pair]] = {}
        for pair in task.pairs:
            places.setdefault(text_key(pair.input), []).append(pair)
        self._inputs.add(places)
        self._read_near_duplicates(task, places)
        several = "contradictions" if task.kind == "classification" else "several_outputs"
        counts: Counter[str] = Counter()
        for pairs in places.values():
            if len(pairs) == 1:
                continue
            splits, outputs = {pair.split for pair in pairs}, {pair.output for pair in pairs}
            codes = ["leaks_between_splits"] if "train" in splits and len(splits) > 1 else []
            codes += [several] if len(outputs) > 1 else []
            for code in codes or ["repeated_inputs"]:  # counted as repeated only where nothing is worse about it
                counts[code] += 1
                self._note(code, task.name, _splits_and_outputs(pairs), min(p.input for p in pairs), len(pairs))
        self._rows[-1] |= {
            "leaks": counts["leaks_between_splits"],
            "contradictions": counts["contradictions"],
            "repeated": counts["repeated_inputs"],
        }

    def _read_near_duplicates(self, task: Task, places: Mapping[str, list[Pair]]) -> None:
        alike: dict[str, list[str]] = {}
        for key in places:
            alike.setdefault(key.translate(NO_PUNCTUATION), []).append(key)
        for letters, keys in alike.items():
            if len(keys) > 1 and letters:  # without letters a text is punctuation alone, which is then what it says
                pairs = [pair for key in keys for pair in places[key]]
                first, detail = min(pair.input for pair in pairs), _splits_and_outputs(pairs)
                self._note("near_duplicates", task.name, detail, first, len(keys), count=len(keys))

    def _read_lengths(self, task: Task) -> None:
        uncounted = [pair for pair in task.pairs if pair.num_tokens is None]
        if self._tokenizer is None:
            self._counted_in_words += len(uncounted)
            counted = iter([len(pair.input.split()) + len(pair.output.split()) for pair in uncounted])
        else:
            inputs, outputs = (self._num_tokens([getattr(p, part) for p in uncounted]) for part in ("input", "output"))
            counted = map(sum, zip(inputs, outputs, strict=True))
        measured = [next(counted) if pair.num_tokens is None else pair.num_tokens for pair in task.pairs]
        self._lengths[task.split].update(measured)
        self._rows[-1]["longest"] = max(measured)
        limit = self._config.max_pair_tokens
        for length, pair in zip(measured, task.pairs, strict=True):
            if limit is not None and length > limit:
                self._note("long_pairs", task.name, f"{length:,} long", pair.input, length)

    def _num_tokens(self, texts: Sequence[str]) -> list[int]:
        return (
            [len(ids) for ids in self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []
        )

    def _read_hard_prompts(self, task: Task) -> None:
        self._num_hard_prompts += len(task.hard_prompts)
        self._hard_prompts.add(dict.fromkeys(map(text_key, task.hard_prompts)))
        if task.split == "train":
            for prompt in task.hard_prompts:
                held_out = sorted(held_out_words().intersection(words_of(prompt)))
                if held_out:
                    words = ", ".join(held_out)
                    self._note("held_out_words_in_hard_prompts", task.name, words, prompt, len(held_out))
        limit = self._config.max_hard_prompt_tokens
        if self._tokenizer is not None and limit is not None:
            for prompt, length in zip(task.hard_prompts, self._num_tokens(task.hard_prompts), strict=True):
                if length > limit:
                    self._note("long_hard_prompts", task.name, f"{length:,} tokens", prompt, length)

    def _read_balance(self, task: Task) -> None:
        counts = Counter({label: 0 for label in task.labels})
        counts.update(pair.output for pair in task.pairs)
        ordered = sorted(counts, key=lambda label: (counts[label], label))
        equal = len(task.pairs) / len(counts)
        balance = min(counts[ordered[0]] / equal, equal / counts[ordered[-1]])
        self._rows[-1]["balance"] = balance
        if balance < self._config.min_label_balance:
            detail = " and ".join(f"{excerpt(label)!r} {counts[label]:,}" for label in (ordered[0], ordered[-1]))
            detail = (
                f"balance {balance:.2f}: {detail} of {plural(len(task.pairs), 'pair')}; equal would be {equal:,.4g}"
            )
            self._note("unbalanced_labels", task.name, detail, weight=-balance)

    def _read_labels(self, task: Task) -> None:
        trained = {pair.output for pair in task.pairs if pair.split == "train"}
        for label in task.labels:
            if trained and label not in trained:  # without any train pair, that alone is the finding
                self._note("labels_without_train_pairs", task.name, f"label {label!r}")
            held_out = sorted(held_out_words().intersection(words_of(label)))
            if task.split == "train" and held_out:
                self._note("held_out_labels", task.name, f"label {label!r}: {', '.join(held_out)}")
        spellings: dict[str, list[str]] = {}
        for label in task.labels:
            spellings.setdefault(text_key(label), []).append(label)
        for labels in spellings.values():
            if len(labels) > 1:
                counts = Counter(pair.output for pair in task.pairs)
                detail = ", ".join(f"{label!r} {counts[label]:,}" for label in sorted(labels))
                self._note("label_spellings", task.name, detail, weight=len(labels), count=len(labels))
        sides = self._label_sets.setdefault(frozenset(map(text_key, task.labels)), {"train": [], "test": []})
        sides[task.split].append(task.name)

    def _read_label_words(self, task: Task) -> None:
        needed = {label: telling_words(label) for label in task.labels}
        roots = SameRoots({word for words in needed.values() for word in words})
        own = other = 0
        examples: list[tuple[str, str, str]] = []
        for pair in task.pairs:
            seen: dict[str, str] = {}  # label word → the word of the input that shares its root
            for word in words_of(pair.input):
                if found := roots[word]:
                    seen = dict.fromkeys(found, word) | seen
            if not seen:
                continue
            inside = [label for label, words in needed.items() if words and words <= seen.keys()]
            if pair.output in inside:
                own += 1
                said = ", ".join(sorted(seen[word] for word in needed[pair.output]))
                examples.append((pair.input, pair.output, said))
            others = sorted(label for label in inside if label != pair.output)
            if others:
                other += 1
                detail = f"label {pair.output!r}, the input also has {', '.join(map(repr, others))}"
                self._note("other_labels_in_inputs", task.name, detail, pair.input, len(others))
        share = own / len(task.pairs)
        self._rows[-1] |= {"label_in_inputs": share, "other_label_in_inputs": other / len(task.pairs)}
        if share > self._config.max_label_leak_share:
            text, label, said = min(examples)
            detail = f"{own:,} of {plural(len(task.pairs), 'input')}; here label {label!r}, the input says {said!r}"
            self._note("labels_in_inputs", task.name, detail, text, share)

    def compare_tasks(self, store: DodStore) -> None:
        """What only shows across tasks; the texts of the examples are read again, since only hashes were kept."""
        names = [row["name"] for row in self._rows]
        side_of = {row["name"]: row["side"] for row in self._rows}
        on_test_side = [row["side"] == "test" for row in self._rows]
        for shared, on_both_sides, on_one_side in (
            (self._inputs, "inputs_on_both_sides", "shared_inputs"),
            (self._hard_prompts, "hard_prompts_on_both_sides", None),
        ):
            both_sides, one_side, per_task = shared.compare(on_test_side, self._config.max_examples)
            for code, group in ((on_both_sides, both_sides), (on_one_side, one_side)):
                if code is None or not group.count:
                    continue
                self._counts[code] += group.count
                self._tasks[code].update(names[task] for task in group.tasks)
                for digest, tasks in group.examples:
                    among = sorted(names[task] for task in tasks)
                    task = store.task(among[0])
                    texts = [p.input for p in task.pairs] if shared is self._inputs else task.hard_prompts
                    text = min(text for text in texts if hash_of(text_key(text)) == digest)
                    self._example(
                        code, len(tasks), task.name, text, f"{plural(len(among), 'task')}; {_by_side(among, side_of)}"
                    )
            if shared is self._inputs:
                for row, (both, one, size) in zip(self._rows, per_task, strict=True):
                    row |= {"shared_inputs": one, "both_sides_inputs": both}
                    if one > self._config.max_shared_input_share * size:
                        detail = f"{one:,} of {plural(size, 'different input')}"
                        self._note("mostly_shared_tasks", row["name"], detail, weight=one / size)
        for labels, sides in self._label_sets.items():
            among = sorted(sides["train"] + sides["test"])
            for code, is_so in (
                ("label_sets_on_both_sides", all(sides.values())),
                ("repeated_label_sets", max(map(len, sides.values())) > 1),
            ):
                if is_so:
                    self._tasks[code].update(among)
                    self._note(code, among[0], _by_side(among, side_of), ", ".join(sorted(labels)), len(among))

    def audit(self, path: Path, digest: str) -> Audit:
        """The findings, sizes and rows."""
        settings, rows = flatten(self._config), sorted(self._rows, key=lambda row: str(row["name"]))
        findings = tuple(
            Finding(
                code=code,
                kind=kind,
                title=f"{plural(self._counts[code], kind.unit)} {what_is_found(kind, settings)}",
                count=self._counts[code],
                tasks=tuple(sorted(self._tasks[code])),
                examples=tuple(example for _, example in self._best(code)),
            )
            for code, kind in FINDING_KINDS.items()
            if self._counts[code]
        )
        for row in rows:
            kinds = Counter(f.kind.severity for f in findings if row["name"] in self._tasks[f.code])
            row |= {"errors": kinds["error"], "warnings": kinds["warning"]}
        off, not_checked = "the settings switch it off", {}
        if self._config.max_pair_tokens is None:
            not_checked["long_pairs"] = off
        if self._config.max_hard_prompt_tokens is None:
            not_checked["long_hard_prompts"] = off
        elif self._tokenizer is None and self._num_hard_prompts:
            not_checked["long_hard_prompts"] = "it needs a tokenizer"
        if len({row["side"] for row in rows}) == 1:
            both_sides = (code for code in FINDING_KINDS if code.endswith("_on_both_sides"))
            not_checked |= dict.fromkeys(both_sides, f"all tasks are {rows[0]['side']} tasks")
        counts = [row["pairs"] for row in rows]
        total = Counter({key: sum(row[key] for row in rows) for key in PAIR_SPLITS})
        lengths = sum(self._lengths.values(), Counter[int]())
        p50, p90, p99 = (_percentile(lengths, percent) for percent in (50, 90, 99))
        units = {0: "tokens", sum(counts): "words"}
        return Audit(
            path=path,
            digest=digest,
            settings=settings,
            sizes=Sizes(
                tasks=len(rows),
                train_tasks=sum(row["side"] == "train" for row in rows),
                test_tasks=sum(row["side"] == "test" for row in rows),
                classification_tasks=sum(row["kind"] == "classification" for row in rows),
                pairs=sum(counts),
                train_pairs=total["train"],
                validation_pairs=total["validation"],
                test_pairs=total["test"],
                min_pairs=min(counts),
                median_pairs=statistics.median(counts),
                max_pairs=max(counts),
                label_sets=len(self._label_sets),
                hard_prompts=self._num_hard_prompts,
            ),
            lengths=Lengths(units.get(self._counted_in_words, "tokens or words"), p50, p90, p99, max(lengths)),
            findings=findings,
            not_checked=not_checked,
            rows=tuple(TaskRow(**row) for row in rows),
            pair_lengths={side: dict(sorted(counted.items())) for side, counted in self._lengths.items()},
        )


def _splits_and_outputs(pairs: Sequence[Pair]) -> str:
    """ "2 train and 1 validation; output x | y"."""
    splits: Counter[str] = Counter(pair.split for pair in pairs)
    where = " and ".join(f"{splits[split]} {split}" for split in PAIR_SPLITS if splits[split])
    return f"{where}; output {' | '.join(map(excerpt, sorted({pair.output for pair in pairs})[:4]))}"


def _by_side(names: Sequence[str], side_of: Mapping[str, str]) -> str:
    """ "train: a, b, c and 31 more; test: d"."""
    texts = []
    for side in TASK_SPLITS:
        there = [name for name in names if side_of[name] == side]
        more = f" and {len(there) - 3:,} more" if len(there) > 3 else ""
        texts += [f"{side}: {', '.join(map(excerpt, there[:3]))}{more}"] if there else []
    return "; ".join(texts)


def _percentile(counts: Mapping[int, int], percent: int) -> int:
    """Nearest rank: the least length that so many percent of the pairs do not exceed."""
    rank = -(-percent * sum(counts.values()) // 100)
    for length in sorted(counts):
        rank -= counts[length]
        if rank <= 0:
            break
    return length
