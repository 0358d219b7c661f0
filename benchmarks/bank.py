"""Writes a bank of 5,500 soft prompts of 20 × 4096 numbers and reads single members, and the same in two other ways.

    python benchmarks/bank.py
    python benchmarks/bank.py --quick --json figures.json

Ours: `BankWriter.add`, which leaves each member on the disk (fsync) as it would during a tuning run, and `finish`; all
members started from the same numbers, which is the default. Beside it what a user would write instead: a folder per prompt
as PEFT saves it (adapter_model.safetensors and adapter_config.json), and one dict of all tensors in `torch.save`. Neither
waits for the disk, and neither keeps a record. Each way runs in a process of its own, so that peak memory is its own, and
is read in a second one: the first member in a fresh process (libraries are imported before), then members at random
places, files in the system's cache. Of `torch.save` each read loads the whole file; `mmap=True`, which loads less, is
timed apart. Making the tensors is timed apart and taken off.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from measuring import in_own_process, medians, peak_mib, write_figures

if TYPE_CHECKING:
    import torch

READS = 100
WHOLE_READS = 5
"""Reads of a file that is read whole each time."""
EPOCHS = 20

Shape = tuple[int, int, int]
"""N members, K virtual tokens, D hidden size."""


def prompts(shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and (K, D) float32 of each member."""
    import torch

    num_members, num_tokens, width = shape
    generator = torch.Generator().manual_seed(0)
    for number in range(num_members):
        yield name_of(number), torch.randn(num_tokens, width, generator=generator)


def name_of(number: int) -> str:
    return f"task{number:05d}"


def write_bank(folder: Path, shape: Shape) -> None:
    import torch

    from softprompt_registry.base_models.reference import BaseModelRef
    from softprompt_registry.soft_prompts.bank import BankWriter
    from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord

    base = BaseModelRef("benchmark", None, "float32", shape[2], 32_000, 32, "a" * 64, "b" * 64, "c" * 64)
    start = torch.zeros(shape[1:])
    losses = [1 / (epoch + 3) for epoch in range(EPOCHS)]
    with BankWriter(folder) as writer:
        for position, (task, numbers) in enumerate(prompts(shape)):
            record = SoftPromptRecord(
                task=task,
                kind="classification",
                base_model=base,
                template="{x}",
                labels=("music", "films", "books"),
                tuning={"epochs": EPOCHS, "train_losses": losses, "validation_losses": losses},
                metrics={"validation_loss": losses[-1], "label_accuracy": 0.75},
            )
            writer.add(position, SoftPrompt(numbers, start, record))
        writer.finish(None)


def read_bank(folder: Path) -> Callable[[str], torch.Tensor]:
    from softprompt_registry.soft_prompts.bank import SoftPromptBank

    bank = SoftPromptBank(folder)
    return lambda task: bank.member(task).embeddings


def write_peft_folders(folder: Path, shape: Shape) -> None:
    from safetensors.torch import save_file

    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": shape[1], "token_dim": shape[2]}
    for task, numbers in prompts(shape):
        (folder / task).mkdir(parents=True)
        save_file({"prompt_embeddings": numbers}, folder / task / "adapter_model.safetensors")
        (folder / task / "adapter_config.json").write_text(json.dumps(config, indent=2))


def read_peft_folders(folder: Path) -> Callable[[str], torch.Tensor]:
    from safetensors.torch import load_file

    def read(task: str) -> torch.Tensor:
        json.loads((folder / task / "adapter_config.json").read_text())
        found: torch.Tensor = load_file(folder / task / "adapter_model.safetensors")["prompt_embeddings"]
        return found

    return read


def write_dict(folder: Path, shape: Shape) -> None:
    import torch

    folder.mkdir()
    torch.save(dict(prompts(shape)), folder / "prompts.pt")


def read_dict(folder: Path, *, mmap: bool = False) -> Callable[[str], torch.Tensor]:
    import torch

    def read(task: str) -> torch.Tensor:
        # A member alone, not a view that keeps all of them in memory.
        found: torch.Tensor = torch.load(folder / "prompts.pt", weights_only=True, mmap=mmap)[task].clone()
        return found

    return read


WAYS: dict[str, tuple[Callable[[Path, Shape], None], Callable[[Path], Callable[[str], torch.Tensor]], int]] = {
    "ours": (write_bank, read_bank, READS),
    "PEFT folders": (write_peft_folders, read_peft_folders, READS),
    "torch.save": (write_dict, read_dict, WHOLE_READS),
}
"""Name → what writes, what reads, how often it is read."""


def measure_writing(way: str, folder: Path, shape: Shape) -> dict[str, float]:
    """One way in this process; a bank's libraries are imported before."""
    import safetensors.torch  # noqa: F401

    import softprompt_registry.soft_prompts.bank  # noqa: F401

    started = time.perf_counter()
    for _ in prompts(shape):
        pass
    made = time.perf_counter() - started
    started = time.perf_counter()
    WAYS[way][0](folder, shape)
    seconds = time.perf_counter() - started - made
    return {
        "write_s": seconds,
        "write_mb_per_s": shape[0] * shape[1] * shape[2] * 4 / 1e6 / seconds,
        "write_peak_mib": peak_mib(),
        "mib": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20,
    }


def measure_reading(way: str, folder: Path, shape: Shape) -> dict[str, float]:
    """Milliseconds until the first member is there, and for one more."""
    import torch

    import softprompt_registry.soft_prompts.bank  # noqa: F401

    _, opened, count = WAYS[way]
    places = random.Random(1)

    def once(read: Callable[[str], torch.Tensor]) -> float:
        task = name_of(places.randrange(shape[0]))
        started = time.perf_counter()
        # The numbers are touched: a tensor may be a promise to read them later.
        assert bool(torch.isfinite(read(task)).all())
        return (time.perf_counter() - started) * 1000

    first = once(lambda task: opened(folder)(task))
    read = opened(folder)
    figures = {"first_ms": first, "member_ms": statistics.median(once(read) for _ in range(count))}
    figures["read_peak_mib"] = peak_mib()
    if way == "torch.save":
        mapped = read_dict(folder, mmap=True)
        figures["mmap_member_ms"] = statistics.median(once(mapped) for _ in range(WHOLE_READS))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=5500)
    parser.add_argument("--k", type=int, default=20, help="virtual tokens of each")
    parser.add_argument("--d", type=int, default=4096, help="hidden size")
    parser.add_argument("--runs", type=int, default=3, help="turns of each way; their medians are printed")
    parser.add_argument("--quick", action="store_true", help="a tenth of the members")
    parser.add_argument("--folder", type=Path, help="write below this folder instead of the system's temporary one")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--reading", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    members = arguments.members // 10 if arguments.quick else arguments.members
    shape: Shape = (members, arguments.k, arguments.d)
    if arguments.way:
        measure = measure_reading if arguments.reading else measure_writing
        print(json.dumps(measure(arguments.way, arguments.folder, shape)))
        return
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.runs):
        for way, taken in runs.items():
            taken.append(_in_own_processes(way, shape, arguments.folder))
    results = {way: medians(taken) for way, taken in runs.items()}
    small_shape = (max(members // 10, 10), *shape[1:])
    small = _in_own_processes("ours", small_shape, arguments.folder)
    columns = (
        *("write_s", "write_mb_per_s", "write_peak_mib", "mib"),
        *("first_ms", "member_ms", "read_peak_mib"),
    )
    print(
        f"{members:,} soft prompts of {arguments.k} × {arguments.d}: {members * arguments.k * arguments.d * 4 / 1e6:,.0f} MB"
    )
    print(f"{'':14}" + "".join(f"{name:>16}" for name in columns))
    for way, figures in results.items():
        print(f"{way:14}" + "".join(f"{figures[name]:16,.2f}" for name in columns))
    for way, taken in runs.items():
        speeds = sorted(figures["write_mb_per_s"] for figures in taken)
        print(f"{way}: MB written per s in each run: " + ", ".join(f"{speed:,.0f}" for speed in speeds))
    print(f"peak memory of writing ours with {small_shape[0]} members: {small['write_peak_mib']:.0f} MiB")
    print(f"one member of torch.save with mmap=True: {results['torch.save']['mmap_member_ms']:.2f} ms")
    ours = results["ours"]
    for way in list(WAYS)[1:]:
        other = results[way]
        print(
            f"ours writes {ours['write_mb_per_s'] / other['write_mb_per_s']:.2f} × as fast as {way}, reads a member "
            f"{other['member_ms'] / ours['member_ms']:.2f} × as fast, takes {ours['mib'] / other['mib']:.2f} × the disk "
            f"and {ours['write_peak_mib'] / other['write_peak_mib']:.2f} × the memory"
        )
    figures = {**ours, "write_peak_mib_tenth": small["write_peak_mib"]}
    for way, prefix in (("PEFT folders", "peft_folders"), ("torch.save", "torch_save")):
        figures |= {f"{prefix}_{name}": value for name, value in results[way].items()}
    write_figures(arguments.json, figures)


def _in_own_processes(way: str, shape: Shape, parent: Path | None) -> dict[str, float]:
    """Written by one process, read by another."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        sizes = ["--members", str(shape[0]), "--k", str(shape[1]), "--d", str(shape[2])]
        for option in ([], ["--reading"]):
            given = ["--way", way, "--folder", f"{folder}/written", *sizes, *option]
            figures |= in_own_process(__file__, *given)
    return figures


if __name__ == "__main__":
    main()
