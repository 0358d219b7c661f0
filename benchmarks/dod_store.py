"""Writes and reads a DoD of 5,500 tasks × 500 pairs (2.75 million rows), and the same rows in two other ways.

    python benchmarks/dod_store.py
    python benchmarks/dod_store.py --quick --json figures.json

Ours: `dod_written_whole` and `DodStore.add_task`, which works out each task's digest. Beside it what a user would write
instead: a plain `sqlite3` loop with one INSERT per row and a commit per task, without digests, and Hugging Face `datasets`
(Arrow, written by `Dataset.from_generator`; needs the extra `hub`). Each runs in a process of its own, so that peak
memory is its own. Making the rows is timed apart and taken off; for ours, so is making `Task` objects of them, which
checks them (`task_objects_s`). One task is read 200 times at random places, files in the system's cache. The ways take
turns three times over and the medians count, because a shared machine changes its speed while this runs.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from measuring import in_own_process, medians, peak_mib, write_figures

PAIRS = 500
LABELS = ("music", "films", "books", "art", "software")
READS = 200
WORDS = (
    "the a new old red river city garden people early late after before runs opens holds under quiet letter day".split()
)


def texts() -> list[str]:
    """500 sentences of 8 to 20 words."""
    generator = random.Random(0)
    return [" ".join(generator.choices(WORDS, k=generator.randint(8, 20))) for _ in range(PAIRS)]


def rows_of(task: int, sentences: list[str]) -> list[tuple[str, str, str]]:
    """(input, output, split) of one task; no two tasks share an input."""
    return [
        (f"{sentence} {task} {row}", LABELS[row % 5], "train" if row < 400 else "validation" if row < 450 else "test")
        for row, sentence in enumerate(sentences)
    ]


def seconds_to_make_rows(num_tasks: int) -> float:
    sentences = texts()
    started = time.perf_counter()
    for task in range(num_tasks):
        rows_of(task, sentences)
    return time.perf_counter() - started


def with_dod_store(folder: Path, num_tasks: int) -> dict[str, float]:
    from softprompt_registry.dod.store import DodStore, dod_written_whole
    from softprompt_registry.dod.task import Pair, Task

    def tasks() -> Iterator[Task]:
        sentences = texts()
        for number in range(num_tasks):
            pairs = tuple(Pair(text, label, split) for text, label, split in rows_of(number, sentences))  # type: ignore[arg-type]
            yield Task(name=f"task{number:05d}", kind="classification", pairs=pairs, labels=LABELS)

    path = folder / "ours.sqlite"
    started = time.perf_counter()
    for _ in tasks():
        pass
    made = time.perf_counter() - started
    started = time.perf_counter()
    with dod_written_whole(path, "benchmark") as store:
        for task in tasks():
            store.add_task(task)
    written = time.perf_counter() - started
    task_objects = made - seconds_to_make_rows(num_tasks)
    with DodStore.open(path) as store:
        read = _milliseconds(lambda number: len(store.task(f"task{number:05d}").pairs), num_tasks)
        started = time.perf_counter()
        assert store.digest
        manifest = store.manifest()
        manifest_s = time.perf_counter() - started
    assert manifest["num_pairs"] == num_tasks * PAIRS
    return {
        "write_s": written - task_objects,
        "task_objects_s": task_objects,
        "task_read_ms": read,
        "mib": path.stat().st_size / 2**20,
        "manifest_s": manifest_s,
    }


def with_sqlite_loop(folder: Path, num_tasks: int) -> dict[str, float]:
    path = folder / "loop.sqlite"
    sentences = texts()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE tasks (id INTEGER PRIMARY KEY, name TEXT UNIQUE)")
    connection.execute("CREATE TABLE rows (task_id INTEGER, input TEXT, output TEXT, split TEXT)")
    connection.execute("CREATE INDEX rows_by_task ON rows (task_id)")
    started = time.perf_counter()
    for number in range(num_tasks):
        task_id = connection.execute("INSERT INTO tasks (name) VALUES (?)", (f"task{number:05d}",)).lastrowid
        for text, label, split in rows_of(number, sentences):
            connection.execute("INSERT INTO rows VALUES (?, ?, ?, ?)", (task_id, text, label, split))
        connection.commit()
    written = time.perf_counter() - started

    def read(number: int) -> int:
        query = "SELECT input, output, split FROM rows WHERE task_id = ?"
        return len(connection.execute(query, (number + 1,)).fetchall())

    result = {"write_s": written, "task_read_ms": _milliseconds(read, num_tasks), "mib": path.stat().st_size / 2**20}
    connection.close()
    return result


def with_hf_datasets(folder: Path, num_tasks: int) -> dict[str, float]:
    import datasets

    datasets.disable_progress_bars()

    def rows() -> Iterator[dict[str, str]]:
        sentences = texts()
        for number in range(num_tasks):
            for text, label, split in rows_of(number, sentences):
                yield {"task": f"task{number:05d}", "input": text, "output": label, "split": split}

    started = time.perf_counter()
    dataset = datasets.Dataset.from_generator(rows, cache_dir=str(folder / "cache"))
    dataset.save_to_disk(str(folder / "arrow"))
    written = time.perf_counter() - started
    opened = datasets.load_from_disk(str(folder / "arrow"))

    def read(number: int) -> int:
        # The rows of a task lie together and there are 500 of each, which a user of Arrow would have to know.
        return len(opened[number * PAIRS : (number + 1) * PAIRS]["input"])

    size = sum(file.stat().st_size for file in (folder / "arrow").rglob("*") if file.is_file())
    return {"write_s": written, "task_read_ms": _milliseconds(read, num_tasks), "mib": size / 2**20}


def _milliseconds(read: Callable[[int], int], num_tasks: int) -> float:
    """Median time to read one task."""
    generator = random.Random(1)
    times = []
    for _ in range(READS):
        number = generator.randrange(num_tasks)
        started = time.perf_counter()
        assert read(number) == PAIRS
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1000


def log_to_mlflow(num_tasks: int) -> dict[str, float]:
    """Seconds to log a DoD as a run's input with its manifest, into a fresh SQLite store."""
    import mlflow

    from softprompt_registry.dod.store import DodStore
    from softprompt_registry.dod.task import Pair, Task
    from softprompt_registry.stages.dods import log_dod

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dod.sqlite"
        with DodStore.create(path) as store:
            for number in range(num_tasks):
                pair = (Pair(f"text {number}", "music"),)
                store.add_task(Task(name=f"task{number:05d}", kind="classification", pairs=pair, labels=LABELS))
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        experiment = mlflow.create_experiment("benchmark", artifact_location=Path(folder).as_uri())
        with mlflow.start_run(experiment_id=experiment):
            started = time.perf_counter()
            log_dod(path, context="benchmark")
            return {"mlflow_log_s": time.perf_counter() - started}


WAYS = {"ours": with_dod_store, "sqlite3 loop": with_sqlite_loop, "HF datasets": with_hf_datasets}


def measure(way: str, num_tasks: int) -> dict[str, float]:
    """One way in this process."""
    if way == "mlflow":
        return log_to_mlflow(num_tasks)
    with tempfile.TemporaryDirectory() as folder:
        figures = WAYS[way](Path(folder), num_tasks)
    figures["peak_mib"] = peak_mib()
    figures["write_s"] -= seconds_to_make_rows(num_tasks)
    figures["rows_written_per_s"] = num_tasks * PAIRS / figures["write_s"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=5500)
    parser.add_argument("--runs", type=int, default=3, help="turns of each way; their medians are printed")
    parser.add_argument("--quick", action="store_true", help="a tenth of the tasks")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--way", choices=[*WAYS, "mlflow"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    num_tasks = arguments.tasks // 10 if arguments.quick else arguments.tasks
    if arguments.way:
        print(json.dumps(measure(arguments.way, num_tasks)))
        return
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.runs):
        for way, taken in runs.items():
            taken.append(_in_own_process(way, num_tasks))
    results = {way: medians(taken) for way, taken in runs.items()}
    small = _in_own_process("ours", max(num_tasks // 10, 10))
    logged = _in_own_process("mlflow", num_tasks)
    columns = ("rows_written_per_s", "write_s", "task_read_ms", "peak_mib", "mib")
    print(f"{num_tasks} tasks × {PAIRS} pairs = {num_tasks * PAIRS:,} rows")
    print(f"{'':14}" + "".join(f"{name:>20}" for name in columns))
    for way, figures in results.items():
        print(f"{way:14}" + "".join(f"{figures[name]:20,.1f}" for name in columns))
    ours = results["ours"]
    for way, taken in runs.items():
        speeds = sorted(figures["rows_written_per_s"] for figures in taken)
        print(f"{way}: rows written per s in each run: " + ", ".join(f"{speed:,.0f}" for speed in speeds))
    print(f"making the Task objects of ours: {ours['task_objects_s']:.1f} s")
    print(f"peak memory of ours with a tenth of the tasks: {small['peak_mib']:.0f} MiB")
    print(f"digest and manifest of the whole DoD: {ours['manifest_s']:.2f} s")
    print(f"logging the DoD to MLflow (SQLite store): {logged['mlflow_log_s']:.2f} s")
    for way in list(WAYS)[1:]:
        print(f"ours writes {ours['rows_written_per_s'] / results[way]['rows_written_per_s']:.2f} × as fast as {way}")
    figures = {
        name: ours[name] for name in ("rows_written_per_s", "task_read_ms", "peak_mib", "manifest_s", "task_objects_s")
    }
    figures["mlflow_log_s"] = logged["mlflow_log_s"]
    figures["peak_mib_tenth"] = small["peak_mib"]
    for way, prefix in (("sqlite3 loop", "sqlite_loop"), ("HF datasets", "hf_datasets")):
        figures |= {
            f"{prefix}_{name}": results[way][name] for name in ("rows_written_per_s", "task_read_ms", "peak_mib")
        }
    write_figures(arguments.json, figures)


def _in_own_process(way: str, num_tasks: int) -> dict[str, float]:
    return in_own_process(__file__, "--way", way, "--tasks", str(num_tasks))


if __name__ == "__main__":
    main()
