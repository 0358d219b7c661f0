"""Tunes the same soft prompts with PEFT and transformers' Trainer, with a plain PEFT loop, and with the fleet.

    python benchmarks/tuning.py --dod general.sqlite
    python benchmarks/tuning.py --dod general.sqlite --tasks 4 --pairs 16 --json figures.json

All ways take the same token rows, initial embeddings, order of examples, epochs, batch size and learning rate, and none
stops early; before anything is timed it is checked that PEFT and we give the same loss. Timed are training and validation,
not loading and not the making of token ids. Each way runs in a process of its own, so that peak memory is its own, and the
ways take turns. Without `--dod` the sample DoD of the demo is used.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matrix_products import flops_of_training, matrix_product_rate
from measuring import in_own_process, medians, options_of, peak_mib, write_figures
from peft_baselines import Rows, Settings, check_same_loss, with_loop, with_trainer

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.loading import load_base_model
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Task
from softprompt_registry.soft_prompts.fleet import Fleet
from softprompt_registry.soft_prompts.performance import Trial, measure
from softprompt_registry.soft_prompts.progress import prepare
from softprompt_registry.soft_prompts.tuning_settings import TuningConfig

TEST_PAIRS = 16


def config_of(arguments: argparse.Namespace, slots: int) -> TuningConfig:
    return TuningConfig(
        num_virtual_tokens=arguments.k,
        learning_rate=arguments.learning_rate,
        epochs=arguments.epochs,
        patience_epochs=None,
        batch_size=arguments.batch_size,
        slots=slots,
        max_sequence_tokens=arguments.max_tokens,
        max_train_pairs=arguments.pairs,
        max_validation_pairs=max(arguments.pairs // 4, 1),
        max_test_pairs=0,
    )


def chosen_tasks(arguments: argparse.Namespace) -> list[Task]:
    """Tasks drawn from the DoD; the same ones for all ways."""
    chosen: list[Task] = []
    with DodStore.open(arguments.dod) as store:
        names = sorted(store.task_names())
        random.Random(0).shuffle(names)
        for name in names:
            task = store.task(name)
            inputs, outputs = _mean_words(task)
            if inputs <= arguments.max_words and outputs <= arguments.max_output_words:
                chosen.append(task)
            if len(chosen) == arguments.tasks:
                break
    if len(chosen) < arguments.tasks:
        raise SystemExit(f"{arguments.dod} has {len(chosen)} such tasks, expected {arguments.tasks}")
    return sorted(chosen, key=lambda task: task.name)


def _mean_words(task: Task) -> tuple[float, float]:
    """Of its train pairs' inputs and outputs."""
    pairs = task.pairs_of("train")
    texts = [pair.input for pair in pairs], [pair.output for pair in pairs]
    inputs, outputs = (statistics.mean(len(text.split()) for text in of) for of in texts)
    return inputs, outputs


def run_way(arguments: argparse.Namespace) -> dict[str, Any]:
    """One way in this process."""
    base = load_base_model(arguments.base_model, dtype=arguments.dtype, device=arguments.device)
    tasks = chosen_tasks(arguments)
    way, _, slots = arguments.way.partition(" ")
    config = config_of(arguments, int(slots or 1))
    if way == "fleet":
        figures, prompts = _with_fleet(base, tasks, config)
    else:
        figures, prompts = _with_peft(base, tasks, config, way)
    figures["peak_mib"] = peak_mib(base.device)
    figures["label_accuracy"] = _accuracy(base, tasks, prompts, arguments)
    return figures


def _with_fleet(base: BaseModel, tasks: Sequence[Task], config: TuningConfig) -> tuple[dict[str, Any], list[Any]]:
    fleet = Fleet(base, config)
    done = {progress.task.name: progress for progress, _ in fleet.tune(tasks)}
    ordered = [done[task.name] for task in tasks]
    return {
        "seconds": fleet.statistics.seconds,
        "train_tokens": fleet.statistics.train_tokens,
        "train_loss": statistics.mean(progress.train_losses[-1] for progress in ordered),
        "validation_loss": statistics.mean(progress.validation_losses[-1] for progress in ordered),
    }, [progress.prompt.detach().float() for progress in ordered]


def _with_peft(
    base: BaseModel, tasks: Sequence[Task], config: TuningConfig, way: str
) -> tuple[dict[str, Any], list[Any]]:
    rows = []
    for task in tasks:
        prepared = prepare(base, task, config)
        train, validation = (
            [(row.prompt, row.target) for row in part] for part in (prepared.train, prepared.validation)
        )
        rows.append(Rows(task.name, train, validation, prepared.initial))
    settings = Settings(config.epochs, config.batch_size, config.learning_rate, config.seed)
    difference = check_same_loss(base, rows[:2], rows_per_task=4)
    tune = with_trainer if way == "trainer" else with_loop
    results = tune(base.model, base.tokenizer, rows, settings, dtype=base.dtype)
    return {
        "seconds": sum(result.seconds for result in results),
        "train_tokens": sum(result.train_tokens for result in results),
        "train_loss": statistics.mean(result.final_train_loss for result in results),
        "validation_loss": statistics.mean(result.validation_losses[-1] for result in results),
        "loss_difference": difference,
    }, [result.embeddings for result in results]


def _accuracy(base: BaseModel, tasks: Sequence[Task], prompts: Sequence[Any], arguments: argparse.Namespace) -> float:
    """Mean label accuracy of the classification tasks, else mean exact match, of the last epoch's prompts."""
    config = config_of(arguments, 1)
    trials = []
    for task, prompt in zip(tasks, prompts, strict=True):
        pairs = task.pairs_of("test")[:TEST_PAIRS]
        only_tests = prepare(base, replace(task, pairs=(*pairs, *task.pairs_of("train")[:1])), _all_tests(config))
        trials.append(
            Trial(task, prompt.to(base.device), [row.prompt for row in only_tests.test], only_tests.test_outputs)
        )
    scores = measure(base, trials, max_new_tokens=16, tokens_per_forward=1024)
    found = [score["label_accuracy"] for score in scores if "label_accuracy" in score]
    return statistics.mean(found or [score["exact_match"] for score in scores if "exact_match" in score])


def _all_tests(config: TuningConfig) -> TuningConfig:
    return TuningConfig(
        num_virtual_tokens=config.num_virtual_tokens, max_sequence_tokens=config.max_sequence_tokens, max_train_pairs=1
    )


def share_of_rate(arguments: argparse.Namespace, figures: dict[str, Any]) -> tuple[float, float]:
    """(measured matrix-product rate in FLOP/s, FLOP/s that training needed at the fleet's speed)."""
    base = load_base_model(arguments.base_model, dtype=arguments.dtype, device=arguments.device)
    config = config_of(arguments, 1)
    row_tokens: list[int] = []
    projected = 0
    for task in chosen_tasks(arguments):
        for row in prepare(base, task, config).train:
            row_tokens.append(row.num_tokens + config.num_virtual_tokens)
            projected += len(row.target)
    rate = matrix_product_rate(base.device, base.dtype)
    needed = flops_of_training(base.model.config, row_tokens, projected)
    return rate, config.epochs * needed / figures["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dod", type=Path, help="default: the sample DoD of the demo")
    parser.add_argument("--base-model", default="packaged:smollm2-135m-instruct")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", help="default: the first GPU, else the CPU")
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument(
        "--max-words", type=float, default=math.inf, help="of a task's inputs on average; leave others out"
    )
    parser.add_argument("--max-output-words", type=float, default=math.inf, help="the same for its outputs")
    parser.add_argument("--pairs", type=int, default=32, help="train pairs of a task; a quarter as many validate")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=256, help="of a row")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4, 16], help="the fleet runs once with each")
    parser.add_argument("--beside", choices=["trainer", "loop"], nargs="+", default=["trainer", "loop"])
    parser.add_argument("--runs", type=int, default=1, help="turns of each way; their medians are printed")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.dod is None:
            from softprompt_registry.sample import build_sample_dod

            arguments.dod = Path(folder) / "sample.sqlite"
            build_sample_dod(arguments.dod)
        if arguments.way:
            print(json.dumps(run_way(arguments)))
            return
        report(arguments)


def report(arguments: argparse.Namespace) -> None:
    ways = [*arguments.beside, *(f"fleet {slots}" for slots in arguments.slots)]
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(arguments.runs):
        for way in ways:
            started = time.perf_counter()
            runs[way].append(_in_own_process(way, arguments))
            print(f"{way}: {time.perf_counter() - started:.0f} s with loading", file=sys.stderr, flush=True)
    results = {way: medians(taken) for way, taken in runs.items()}
    for figures in results.values():
        figures["tokens_per_s"] = figures["train_tokens"] / figures["seconds"]
        figures["s_per_prompt"] = figures["seconds"] / arguments.tasks
    print(
        f"{arguments.tasks} tasks of {arguments.dod.name}, {arguments.pairs} train pairs, {arguments.epochs} epochs, ",
        end="",
    )
    print(f"batches of {arguments.batch_size}, K={arguments.k}, {arguments.dtype}, {torch.get_num_threads()} threads")
    columns = ("tokens_per_s", "s_per_prompt", "peak_mib", "train_loss", "validation_loss", "label_accuracy")
    print(f"{'':12}" + "".join(f"{name:>17}" for name in columns))
    for way, figures in results.items():
        print(f"{way:12}" + "".join(f"{figures[name]:17,.3f}" for name in columns))
    best = results[f"fleet {arguments.slots[-1]}"]
    differences = [results[way]["loss_difference"] for way in arguments.beside]
    print(f"largest difference of PEFT's loss from ours on one row: {max(differences):.1e}")
    ratios = {way: results[way]["seconds"] / best["seconds"] for way in arguments.beside}
    for way, ratio in ratios.items():
        print(f"the fleet with {arguments.slots[-1]} slots is {ratio:.2f} × as fast as {way}")
    rate, used = share_of_rate(arguments, best)
    print(f"matrix products: {rate / 1e9:,.0f} GFLOP/s measured; training needed {used / 1e9:,.0f}, {used / rate:.0%}")
    figures = {
        **{f"speedup_vs_peft_{way}": ratio for way, ratio in ratios.items()},
        "tokens_per_s": best["tokens_per_s"],
        "peak_mib": best["peak_mib"],
        "matrix_product_share": used / rate,
    }
    write_figures(arguments.json, figures, ways=results)


def _in_own_process(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    left_out = ("way", "json", "slots", "beside", "runs")
    return in_own_process(__file__, "--way", way, *options_of(arguments, left_out=left_out))


if __name__ == "__main__":
    main()
