"""Times the verifier, and scoring each row alone.

    python benchmarks/verifier.py
    python benchmarks/verifier.py --quick --json figures.json
    python benchmarks/verifier.py --dod general.sqlite --task task1391

16 candidates, the soft prompt and no prompt on 32 pairs of one task: 576 rows. The other way puts one whole row after the
other through the model, [BOS][candidate][line break][text][target], with logits at all positions as transformers gives them,
in the same dtype. Both ways must give the same scores. Timed is scoring with the making of token ids, not loading.

The candidates are the ground truths of other tasks: their hard prompts, or their labels behind a beginning. The soft prompt
is made of vocabulary embeddings: its numbers do not change the speed. Without `--dod` the sample DoD of the demo is used.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matrix_products import layer_weights, matrix_product_rate
from measuring import clock, write_figures
from torch.profiler import ProfilerActivity, profile

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.loading import load_base_model
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.soft_prompts.encoding import RowEncoder, encode_inside
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.verbalization.verification import Verification
from softprompt_registry.verbalization.verifier import Verifier, VerifierConfig

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product", "_flash_attention", "_efficient_attention")
"""Operations of torch that are matrix products, by the beginning of their names."""
QUICK_ROWS = 48


@dataclass(frozen=True)
class Work:
    """What both ways score."""

    soft_prompt: SoftPrompt
    texts: list[str]
    pairs: list[Pair]


def work_of(base: BaseModel, arguments: argparse.Namespace) -> Work:
    with DodStore.open(arguments.dod) as store:
        names = sorted(store.task_names())
        name = arguments.task or names[0]
        task = store.task(name)
        others = [store.task(other) for other in names if other != name]
    texts = list(dict.fromkeys(text for other in others if (text := _instruction(other))))[: arguments.candidates]
    held_out = [*task.pairs_of("test"), *task.pairs_of("validation"), *task.pairs_of("train")]
    if len(texts) < arguments.candidates or len(held_out) < arguments.pairs:
        raise SystemExit(
            f"{arguments.dod} has {len(texts)} other tasks with a ground truth, and {name!r} has {len(held_out)} pairs; "
            f"expected {arguments.candidates} and {arguments.pairs}"
        )
    chosen = torch.randperm(base.ref.vocab_size, generator=torch.Generator().manual_seed(0))[: arguments.k]
    embeddings = base.input_embeddings[chosen.to(base.device)].float().cpu()
    record = SoftPromptRecord(name, "unknown", base.ref, task.template)
    return Work(SoftPrompt(embeddings, None, record), texts, held_out[: arguments.pairs])


def _instruction(task: Task) -> str:
    if task.hard_prompts:
        return task.hard_prompts[0]
    return f"Classify the given input into one of the following: {task.ground_truth}" if task.labels else ""


def row_by_row(base: BaseModel, work: Work, config: VerifierConfig, rows: Sequence[int]) -> dict[int, float]:
    """Mean log-likelihood per target token of chosen rows; row r is pair r % pairs of condition r // pairs."""
    template = work.soft_prompt.record.template
    encoder = RowEncoder.of(base, work.soft_prompt.record)
    soft = work.soft_prompt.embeddings.to(base.device, base.dtype)[None]  # (1, K, D)
    embed = base.model.get_input_embeddings()
    scores = {}
    with torch.no_grad():
        for row in rows:
            condition, number = divmod(row, len(work.pairs))
            encoded, _ = encoder.pair(template, work.pairs[number], config.max_pair_tokens)
            prompt, target = encoded.prompt, encoded.target
            if condition > 1:
                text = encoded.prompt[len(base.bos) :]
                prompt = [*base.bos, *base.tokenize(work.texts[condition - 2]), *encode_inside(base, "\n"), *text]
            ids = torch.tensor([[*prompt, *target]], device=base.device)  # (1, N)
            if condition == 1:
                logits = base.model(inputs_embeds=torch.cat([soft, embed(ids)], dim=1), use_cache=False).logits
            else:
                logits = base.model(input_ids=ids, use_cache=False).logits
            last = logits[0, -len(target) - 1 : -1].float()  # (target tokens, V)
            tokens = last.log_softmax(dim=1)[torch.arange(len(target)), torch.tensor(target)]
            scores[row] = float(tokens.mean())
    return scores


def scores_of(found: Verification, texts: Sequence[str]) -> list[float]:
    """The scores of all rows, in the order of `row_by_row`."""
    by_text = {candidate.text: candidate.item_scores for candidate in found.candidates}
    conditions = [found.no_prompt_scores, found.soft_prompt_scores, *(by_text[text] for text in texts)]
    return [score for scores in conditions for score in scores]


def seconds_of(call: Callable[[], Any]) -> tuple[Any, float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = clock(device)
    result = call()
    return result, clock(device) - started


def matrix_product_share(call: Callable[[], Any]) -> float:
    """Share of the device's time in matrix products, as torch's profiler finds it."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        call()
    times: dict[str, float] = {}
    for event in profiled.key_averages():
        if event.key.startswith("aten::"):
            own = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
            times[event.key.removeprefix("aten::")] = own
    return sum(own for name, own in times.items() if name.startswith(PRODUCTS)) / sum(times.values())


def report(arguments: argparse.Namespace) -> None:
    base = load_base_model(arguments.base_model, dtype=arguments.dtype, device=arguments.device)
    work = work_of(base, arguments)
    config = VerifierConfig(max_pairs=arguments.pairs, tokens_per_forward=arguments.tokens_per_forward)
    num_rows = (len(work.texts) + 2) * len(work.pairs)
    measured = list(range(num_rows))
    if arguments.quick:  # evenly over conditions and pairs
        measured = [round(i * num_rows / QUICK_ROWS) for i in range(min(QUICK_ROWS, num_rows))]

    def verify(verifier: Verifier) -> Verification:
        return verifier.verify(work.soft_prompt, work.texts, pairs=work.pairs)

    verify(Verifier(base, config))  # the first call sets up libraries
    row_by_row(base, work, config, measured[:2])
    ours_s, alone_s = [], []
    for _ in range(arguments.runs):
        verifier = Verifier(base, config)
        found, seconds = seconds_of(partial(verify, verifier))
        ours_s.append(seconds)
        alone, seconds = seconds_of(lambda: row_by_row(base, work, config, measured))
        alone_s.append(seconds * num_rows / len(measured))
        print(f"{ours_s[-1]:.1f} s and {alone_s[-1]:.1f} s", file=sys.stderr, flush=True)
    ours = scores_of(found, work.texts)
    difference = max(abs(ours[row] - score) / max(abs(score), 1.0) for row, score in alone.items())
    counted = verifier.statistics
    share = matrix_product_share(lambda: verify(Verifier(base, config)))
    rate = matrix_product_rate(base.device, base.dtype)
    model = base.model.config
    needed = 2 * layer_weights(model) * counted.tokens
    needed += 2 * model.hidden_size * model.vocab_size * counted.target_tokens
    figures = {
        "speedup_vs_row_by_row": statistics.median(alone_s) / statistics.median(ours_s),
        "seconds": statistics.median(ours_s),
        "seconds_row_by_row": statistics.median(alone_s),
        "largest_difference": difference,
        "matrix_product_time_share": share,
        "matrix_product_rate_share": needed / statistics.median(ours_s) / rate,
        "padding_share": 1 - counted.tokens / counted.padded_tokens,
        "tokens": counted.tokens,
        "target_tokens": counted.target_tokens,
    }
    words = [len(base.tokenize(text)) for text in work.texts]
    print(
        f"{len(work.texts)} candidates of {statistics.mean(words):.0f} tokens × {len(work.pairs)} pairs of "
        f"{work.soft_prompt.record.task!r}, K={arguments.k}, {arguments.dtype} on {base.device}, "
        f"{torch.get_num_threads()} threads"
    )
    if len(measured) < num_rows:
        print(f"row by row: {len(measured)} of {num_rows} rows timed, multiplied up")
    print(f"{'':14}{'seconds':>10}{'rows/s':>10}")
    for way, seconds in (("verifier", figures["seconds"]), ("row by row", figures["seconds_row_by_row"])):
        print(f"{way:14}{seconds:10.2f}{num_rows / seconds:10.1f}")
    speedup = figures["speedup_vs_row_by_row"]
    print(f"the verifier is {speedup:.1f} × as fast; largest difference of a score {difference:.1e}")
    print(
        f"its time: {share:.0%} in matrix products by the profiler; the products it needs would take "
        f"{figures['matrix_product_rate_share']:.0%} at the measured {rate / 1e9:,.0f} GFLOP/s; "
        f"{figures['padding_share']:.1%} of {counted.padded_tokens:,} tokens are padding"
    )
    write_figures(arguments.json, figures)
    tolerance = 1e-3 if arguments.dtype == "float32" else 5e-2
    if difference > tolerance:
        raise SystemExit(f"the scores of the two ways differ by {difference:.1e}, more than {tolerance:.0e}")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dod", type=Path, help="default: the sample DoD of the demo")
    parser.add_argument("--task", help="whose pairs to score; default: the first one by name")
    parser.add_argument("--base-model", default="packaged:smollm2-135m-instruct")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", help="default: the first GPU, else the CPU")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--tokens-per-forward", type=int, help="default: what suits the free memory")
    parser.add_argument("--runs", type=int, default=3, help="turns of each way; their medians are printed")
    parser.add_argument("--quick", action="store_true", help=f"one turn, and {QUICK_ROWS} rows of the other way")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args(given)
    if arguments.quick:
        arguments.runs = 1
    with tempfile.TemporaryDirectory() as folder:
        if arguments.dod is None:
            from softprompt_registry.sample import build_sample_dod

            arguments.dod = Path(folder) / "sample.sqlite"
            build_sample_dod(arguments.dod)
        report(arguments)


if __name__ == "__main__":
    main()
