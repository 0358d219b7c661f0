"""Reads one soft prompt with every layer pair of InSPEcT: all pairs together, and one pair at a time in two plain ways.

    python benchmarks/layer_grid.py
    python benchmarks/layer_grid.py --quick --json figures.json

The plain ways, each measured on a few pairs and extrapolated to the forward passes of the whole grid:

- naive: for every new token the whole text again, without a cache, with logits of the full vocabulary at all positions, as a
  direct reading of the method does it;
- cached: transformers' own cache, and logits at the last position alone.

All ways must give the same texts for the sampled pairs: rounding may decide between two tokens of nearly equal logits,
nothing else may differ. The soft prompt is made of random vocabulary embeddings; its numbers do not matter for the speed.
Each way runs in a process of its own, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from matrix_products import flops_of_training, matrix_product_rate
from measuring import clock, in_own_process, options_of, peak_mib, write_figures

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.layers import decoder_layers
from softprompt_registry.base_models.loading import load_base_model
from softprompt_registry.verbalization.patching import (
    EMBEDDINGS,
    LayerPair,
    PatchedRow,
    TargetPrompt,
    all_pairs,
    cut_description,
    read_examples,
    read_patched,
    source_states,
    target_prompt,
)

NEAR_TIE = 1e-2
"""Logits of the two best tokens that are closer than this may change places by rounding."""
QUICK = {"step": 3, "naive_pairs": 1, "cached_pairs": 2}


def soft_prompt_of(base: BaseModel, num_virtual_tokens: int) -> torch.Tensor:
    """(1, K, D): embeddings of random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.ref.vocab_size, (1, num_virtual_tokens), generator=generator)
    return base.input_embeddings[ids.to(base.device)].float()


def sampled(pairs: Sequence[LayerPair], count: int) -> list[LayerPair]:
    """The first ones of an order drawn once, so that each way samples the same."""
    order = list(pairs)
    random.Random(0).shuffle(order)
    return order[:count]


def run_way(arguments: argparse.Namespace) -> dict[str, Any]:
    """One way in this process."""
    base = load_base_model(arguments.base_model, dtype=arguments.dtype, device=arguments.device)
    pairs = all_pairs(base.ref.num_layers, arguments.step)
    target = target_prompt(base, read_examples("classification"))
    states = source_states(base, soft_prompt_of(base, arguments.k))  # also warms up
    figures: dict[str, Any]
    if arguments.way == "grid":
        sizes: list[int] = []

        def note(rows: int) -> None:
            sizes.append(rows)
            _say(f"{sum(sizes)} of {len(pairs)} pairs")

        started = clock(base.device)
        found = read_patched(
            base,
            states,
            [PatchedRow(0, pair) for pair in pairs],
            target,
            max_new_tokens=arguments.new_tokens,
            rows_per_batch=arguments.rows_per_batch,
            on_rows=note,
        )
        figures = {"seconds": clock(base.device) - started, "rows_per_batch": max(sizes)}
        figures["needed_flops"] = _needed_flops(base, target, arguments.k, found)
        texts = dict(zip(pairs, found, strict=True))
        gaps: dict[LayerPair, list[float]] = {}
    else:
        texts, gaps, seconds = {}, {}, 0.0
        count = arguments.naive_pairs if arguments.way == "naive" else arguments.cached_pairs
        for pair in sampled(pairs, count):
            read = _naive if arguments.way == "naive" else _cached
            started = clock(base.device)
            texts[pair], gaps[pair] = read(base, states[0], pair, target, arguments.new_tokens)
            seconds += clock(base.device) - started
            _say(f"{arguments.way}: source {pair.source}, target {pair.target}, {len(texts[pair])} tokens")
        figures = {"seconds": seconds}
    figures["forwards"] = sum(min(len(ids) + 1, arguments.new_tokens) for ids in texts.values())
    figures["peak_mib"] = peak_mib(base.device)
    read_texts = [[pair, ids, gaps.get(pair, []), cut_description(base.decode(ids))] for pair, ids in texts.items()]
    return {"figures": figures, "texts": read_texts}


@contextmanager
def _patched(base: BaseModel, pair: LayerPair, places: slice, states: torch.Tensor) -> Iterator[None]:
    """Overwrite the placeholders' states after the target layer, in forward passes that reach over them."""
    if pair.target == EMBEDDINGS:
        yield
        return

    def overwrite(module: Any, inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] >= places.stop:
            hidden[:, places] = states[1 + pair.source]

    handle = decoder_layers(base)[pair.target].register_forward_hook(overwrite)
    try:
        yield
    finally:
        handle.remove()


def _prompt(base: BaseModel, states: torch.Tensor, pair: LayerPair, target: TargetPrompt) -> tuple[torch.Tensor, slice]:
    """(1, P + K, D) embeddings, and where the placeholders stand in them."""
    places = slice(len(target.before), len(target.before) + states.shape[1])
    ids = torch.tensor([[*target.before, *[target.placeholder] * states.shape[1]]], device=base.device)
    embeds: torch.Tensor = base.model.get_input_embeddings()(ids)
    if pair.target == EMBEDDINGS:
        embeds[:, places] = states[1 + pair.source]
    return embeds, places


@torch.no_grad()
def _naive(
    base: BaseModel, states: torch.Tensor, pair: LayerPair, target: TargetPrompt, new_tokens: int
) -> tuple[list[int], list[float]]:
    """Token ids, and by how much the best token was better at each step."""
    embeds, places = _prompt(base, states, pair, target)
    found: list[int] = []
    gaps: list[float] = []
    with _patched(base, pair, places, states):
        while len(found) < new_tokens:
            token, gap = _best(base.model(inputs_embeds=embeds, use_cache=False).logits[0, -1])
            gaps.append(gap)
            if token in base.end_ids:
                break
            found.append(token)
            embeds = torch.cat([embeds, base.input_embeddings[None, [token]]], dim=1)
    return found, gaps


@torch.no_grad()
def _cached(
    base: BaseModel, states: torch.Tensor, pair: LayerPair, target: TargetPrompt, new_tokens: int
) -> tuple[list[int], list[float]]:
    embeds, places = _prompt(base, states, pair, target)
    with _patched(base, pair, places, states):
        output = base.model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
    found: list[int] = []
    gaps: list[float] = []
    while True:
        token, gap = _best(output.logits[0, -1])
        gaps.append(gap)
        if token in base.end_ids:
            break
        found.append(token)
        if len(found) == new_tokens:
            break
        ids = torch.tensor([[token]], device=base.device)
        output = base.model(ids, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
    return found, gaps


def _best(logits: torch.Tensor) -> tuple[int, float]:
    values, tokens = logits.float().topk(2)
    return int(tokens[0]), float(values[0] - values[1])


def _needed_flops(base: BaseModel, target: TargetPrompt, num_soft: int, found: Sequence[Sequence[int]]) -> float:
    """Of the descriptions once, of placeholders and new tokens for each row; attention to the descriptions is left out."""
    rows = [len(target.before), *(num_soft + len(ids) for ids in found)]
    return flops_of_training(base.model.config, rows, sum(len(ids) + 1 for ids in found), backward=False)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", default="packaged:smollm2-135m-instruct")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", help="default: the first GPU, else the CPU")
    parser.add_argument("--k", type=int, default=20, help="soft tokens")
    parser.add_argument("--new-tokens", type=int, default=60, help="length cap of a text")
    parser.add_argument("--step", type=int, default=1, help="distance of the layers that are tried; 1 is the full grid")
    parser.add_argument("--rows-per-batch", type=int, help="default: what fits in the memory set aside")
    parser.add_argument("--naive-pairs", type=int, default=3, help="pairs that the naive way is measured on")
    parser.add_argument("--cached-pairs", type=int, default=6, help="pairs that the cached way is measured on")
    parser.add_argument("--quick", action="store_true", help="every third layer, fewer sampled pairs")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--way", choices=["grid", "cached", "naive"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    if arguments.way:
        print(json.dumps(run_way(arguments)))
        return
    report(arguments)


def report(arguments: argparse.Namespace) -> None:
    ways = {way: _in_own_process(way, arguments) for way in ("grid", "cached", "naive")}
    grid = ways["grid"]["figures"]
    texts = {tuple(pair): (ids, text) for pair, ids, _, text in ways["grid"]["texts"]}
    print(
        f"{len(texts)} layer pairs of one soft prompt, K={arguments.k}, at most {arguments.new_tokens} new tokens, "
        f"{arguments.dtype}, {torch.get_num_threads()} threads"
    )
    print(
        f"{'':8}{'pairs':>8}{'measured s':>12}{'whole grid s':>14}{'s per pair':>12}{'peak MiB':>10}{'same texts':>12}"
    )
    seconds: dict[str, float] = {}
    for way, result in ways.items():
        figures = result["figures"]
        seconds[way] = figures["seconds"] / figures["forwards"] * grid["forwards"]
        same = _check_same(way, result["texts"], texts) if way != "grid" else len(texts)
        print(
            f"{way:8}{len(result['texts']):8}{figures['seconds']:12.1f}{seconds[way]:14,.0f}"
            f"{seconds[way] / len(texts):12.3f}{figures['peak_mib']:10,.0f}{same:9}/{len(result['texts'])}"
        )
    print("cached and naive: measured on the sampled pairs, multiplied up to the forward passes of all pairs")
    vs_naive, vs_cached = seconds["naive"] / seconds["grid"], seconds["cached"] / seconds["grid"]
    print(f"all pairs together, {grid['rows_per_batch']} rows a batch: {vs_naive:.1f} × as fast as naive, ", end="")
    print(f"{vs_cached:.1f} × as fast as cached")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rate = matrix_product_rate(device, getattr(torch, arguments.dtype))
    share = grid["needed_flops"] / grid["seconds"] / rate
    print(f"matrix products: {rate / 1e9:,.0f} GFLOP/s measured; the grid needed {share:.0%} of them")
    found = {
        "speedup_vs_naive": vs_naive,
        "speedup_vs_cached": vs_cached,
        "seconds": seconds["grid"],
        "peak_mib": grid["peak_mib"],
        "matrix_product_share": share,
    }
    write_figures(arguments.json, found, ways=ways)


def _check_same(way: str, read: Sequence[Any], texts: dict[tuple[int, ...], Any]) -> int:
    """How many texts of a way are those of the grid; ends the program where another differs by more than rounding."""
    same = 0
    for pair, ids, gaps, text in read:
        expected, grid_text = texts[tuple(pair)]
        if ids == expected:
            same += 1
            continue
        shorter = min(len(ids), len(expected))
        step = next((place for place in range(shorter) if ids[place] != expected[place]), shorter)
        if gaps[step] > NEAR_TIE:
            raise SystemExit(
                f"pair {pair}: {way} says {text!r}, all pairs together {grid_text!r}; they part at token {step}, where the "
                f"best logit leads by {gaps[step]:.4f}: more than rounding"
            )
    return same


def _in_own_process(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    return in_own_process(__file__, "--way", way, *options_of(arguments, left_out=("way", "json", "quick")))


if __name__ == "__main__":
    main()
