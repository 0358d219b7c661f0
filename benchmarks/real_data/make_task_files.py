"""Write the task files of the real-data experiment in docs/experiments.md, for `softprompt build-dod files`.

    python benchmarks/real_data/make_task_files.py --super-natural DIR --inspect DIR --out task_files

`--super-natural` holds `tasks.jsonl.gz` and `pairs.jsonl.gz`: Super-NaturalInstructions with one (input, output) pair per
line and one task record per line. `--inspect` holds `{sst2,sst5,trec,subj,agnews}_{train,validation,test}.jsonl.gz` with
`text` and `label`. Tasks are chosen by a rule fixed before any result was seen: shortest mean input first, at most two of
a category, outputs of at most 12 words and definitions of at most 80 words on average; 16 of the benchmark's training
tasks and 8 of its test tasks. `--train`, `--test` and `--per-category` change these numbers; `--sample` adds the tasks of the
sample DoD, so that there are label lists to learn from.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LABELS = {
    "sst2": ["positive", "negative"],
    "sst5": ["terrible", "bad", "neutral", "good", "great"],
    "trec": ["description", "entity", "abbreviation", "human", "location", "number"],
    "subj": ["objective", "subjective"],
    "agnews": ["world", "sports", "business", "technology"],
}
WHAT = {
    "sst2": "the sentiment of the movie review",
    "sst5": "the sentiment of the movie review",
    "trec": "what the question asks for",
    "subj": "the sentence",
    "agnews": "the topic of the news text",
}
SAMPLE = Path(__file__).parents[2] / "softprompt_registry/sample/dod"


def read(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def words(texts: list[str]) -> float:
    return sum(len(text.split()) for text in texts) / len(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--super-natural", type=Path, required=True)
    parser.add_argument("--inspect", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=16, help="training tasks of Super-NaturalInstructions")
    parser.add_argument("--test", type=int, default=8, help="test tasks of Super-NaturalInstructions")
    parser.add_argument("--per-category", type=int, default=2, help="tasks of one category at most")
    parser.add_argument("--sample", action="store_true", help="the sample DoD's tasks too")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)

    pairs: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in read(arguments.super_natural / "pairs.jsonl.gz"):
        pairs[row["task"]].append({"input": row["input"], "output": row["output"]})
    known = {row["task"]: row for row in read(arguments.super_natural / "tasks.jsonl.gz")}
    ordered = sorted(pairs, key=lambda name: (words([pair["input"] for pair in pairs[name]]), name))

    records = []
    for split, count in (("train", arguments.train), ("test", arguments.test)):
        categories: Counter[str] = Counter()
        for name in ordered:
            task = known[name]
            short = words([pair["output"] for pair in pairs[name]]) <= 12 and words([task["definition"]]) <= 80
            if task["split"] != split or not short or categories[task["categories"][0]] == arguments.per_category:
                continue
            if categories.total() == count:
                break
            categories[task["categories"][0]] += 1
            write(arguments.out / f"{name}.jsonl", pairs[name])
            source = "Super-NaturalInstructions, Apache-2.0"
            records.append(
                {
                    "name": name,
                    "kind": "generation",
                    "split": split,
                    "hard_prompts": [task["definition"]],
                    "source": source,
                }
            )
    for name, labels in LABELS.items():
        rows = [
            {"input": row["text"], "output": row["label"], "split": split}
            for split in ("train", "validation", "test")
            for row in read(arguments.inspect / f"{name}_{split}.jsonl.gz")
        ]
        write(arguments.out / f"{name}.jsonl", rows)
        prompt = f"Classify {WHAT[name]} as one of the following: {', '.join(labels)}."
        records.append(
            {"name": name, "kind": "classification", "split": "test", "labels": labels, "hard_prompts": [prompt]}
        )
    if arguments.sample:
        for path in SAMPLE.glob("*.jsonl"):
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if path.name == "tasks.jsonl":
                records += rows
            else:
                write(arguments.out / path.name, rows)
    write(arguments.out / "tasks.jsonl", records)


if __name__ == "__main__":
    main()
