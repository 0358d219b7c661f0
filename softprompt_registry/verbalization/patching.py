"""InSPEcT: a soft prompt read by its own base model, without training (section 4.4 and appendix A.3 of the paper).

Two passes. The source pass reads the soft prompt alone and keeps the hidden states of all layers at its K places. The target
pass reads a few example descriptions and K placeholder tokens, " x" each; at the output of layer t the states of the
placeholders are overwritten with those of source layer s, and the continuation that the model writes is taken as one more
description. Which pair (s, t) reads best is a hyper-parameter: `evaluation/layer_grid.py` looks for it.

Hundreds of rows, each with a pair of its own, share a batch. All begin with the same descriptions, which are computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from softprompt_registry.base_models.decoding import JoinedBatch, RowDecoder
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.grouped_attention import grouped_attention
from softprompt_registry.base_models.growing_cache import growing_cache
from softprompt_registry.base_models.layers import decoder_layers, hidden_of, with_hidden
from softprompt_registry.base_models.prefixes import Prefixes
from softprompt_registry.errors import ConfigError
from softprompt_registry.soft_prompts.encoding import encode_inside

if TYPE_CHECKING:
    import torch
    from torch import nn

EMBEDDINGS = -1
"""The number of the embedding layer, below layer 0."""
MAX_NEW_TOKENS = 60
"""The paper's length cap of a description."""
PLACEHOLDER = " x"
STOPS = "\n$.|"
LEAST_SHARE = 0.2
"""Share of a text that must be left when it is cut at one of the stops."""
CACHE_BYTES = 5 << 28
"""Bytes of keys and values in one batch on a CPU: some 200 rows of a model of 135 M parameters in float32."""
FREE_MEMORY_SHARE = 0.5
"""Share of a GPU's free memory for keys and values."""
OWN_FOLDER = Path(__file__).with_name("example_descriptions")


class LayerPair(NamedTuple):
    """From the output of which layer states are taken, and at the output of which one they are put in.

    Layers count from 0; -1 is the embedding layer. The last one, L - 1, is left out on both sides, as in the paper.
    """

    source: int
    target: int


class PatchedRow(NamedTuple):
    """One row to be read: which soft prompt, by its place among the states, with which pair."""

    prompt: int
    pair: LayerPair


@dataclass(frozen=True)
class TargetPrompt:
    """What the target pass reads, as token ids."""

    before: tuple[int, ...]
    """BOS and the example descriptions: P tokens."""
    placeholder: int
    """The token that stands K times behind them."""


def all_pairs(num_layers: int, step: int = 1) -> list[LayerPair]:
    """Every pair of layers -1, -1 + step, … up to L - 2, ordered by source, then target: L² pairs at step 1.

    Args:
        num_layers: L.

    Raises:
        ConfigError: the step is below 1.
    """
    if step < 1:
        raise ConfigError(f"choosing layer pairs: the step is {step}, expected at least 1. Use 1 for the full grid.")
    layers = range(EMBEDDINGS, num_layers - 1, step)
    return [LayerPair(source, target) for source in layers for target in layers]


def read_examples(kind: str, folder: str | Path | None = None) -> list[str]:
    """The example descriptions for soft prompts of this kind of task, one per line of a text file.

    Args:
        kind: "classification" takes `classification.txt`, any other kind `general.txt`.
        folder: of changed copies of these files; None and a missing file mean our own.

    Raises:
        ConfigError: the folder is missing, or the file has no line with text.
    """
    name = "classification.txt" if kind == "classification" else "general.txt"
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(
            f"reading example descriptions: there is no folder {str(folder)!r}; expected one with {name!r} in it. Correct "
            "the folder, or leave it out for the descriptions that come with the package."
        )
    path = OWN_FOLDER / name
    if folder is not None and (Path(folder) / name).is_file():
        path = Path(folder) / name
    examples = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not examples:
        raise ConfigError(
            f"reading the example descriptions in {str(path)!r}: the file has no text; expected one description per line. "
            "Write some, three for instance."
        )
    return examples


def target_prompt(base_model: BaseModel, examples: Sequence[str]) -> TargetPrompt:
    """The examples joined by " | ", then " |", in the base model's tokens.

    The placeholder is the token of " x" within a text, or the last one where the tokenizer needs several.
    """
    text = " | ".join(examples) + " |"
    return TargetPrompt((*base_model.bos, *base_model.tokenize(text)), encode_inside(base_model, PLACEHOLDER)[-1])


def source_states(base_model: BaseModel, soft_prompts: torch.Tensor) -> torch.Tensor:
    """The hidden states that soft prompts leave in every layer, from one pass that reads them alone.

    They stand first in the sequence, as when they were tuned, with nothing before them.

    Args:
        soft_prompts: (G, K, D).
    Returns:
        (G, L, K, D) in the base model's dtype; [:, 1 + s] is the output of layer s, so [:, 0] are the soft prompts themselves
        and the last layer's output is not there.
    """
    import torch

    soft_prompts = soft_prompts.to(base_model.device, base_model.dtype)
    found = [soft_prompts]

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        found.append(hidden_of(output))

    with _hooks([(layer, keep) for layer in decoder_layers(base_model)[:-1]]), torch.no_grad():
        base_model.decoder(inputs_embeds=soft_prompts, use_cache=False)
    return torch.stack(found, dim=1)


def read_patched(
    base_model: BaseModel,
    states: torch.Tensor,
    rows: Sequence[PatchedRow],
    target: TargetPrompt,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    rows_per_batch: int | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> list[list[int]]:
    """What the base model says of each row's soft prompt with the row's layer pair, greedily.

    A row's text does not depend on the others of its batch, but for rounding.

    Args:
        states: (G, L, K, D), from `source_states`.
        rows: R of them.
        rows_per_batch: None takes as many as fit in the memory set aside for keys and values.
        on_rows: called after each batch with its number of rows.
    Returns:
        R lists of new token ids, up to the end token (left out) or the cap.

    Raises:
        ConfigError: a layer or a soft prompt does not exist, a number is below 1, the base model's context is too short, or
            it is no plain stack of decoder layers (see `decoder_layers`).
    """
    import torch

    if not rows:
        return []
    layers = decoder_layers(base_model)
    _check_rows(states, rows, max_new_tokens, rows_per_batch)
    num_tokens = len(target.before) + states.shape[2] + max_new_tokens
    if num_tokens > base_model.max_positions:
        raise ConfigError(
            f"reading soft prompts through patched layers: {len(target.before)} tokens of example descriptions, K="
            f"{states.shape[2]} and {max_new_tokens} new tokens are {num_tokens}; the base model takes "
            f"{base_model.max_positions}. Shorten the descriptions, or lower max_new_tokens."
        )
    found: list[list[int]] = []
    with torch.no_grad(), grouped_attention(base_model):
        prefixes = base_model.prefixes(base_model.embed(torch.tensor(target.before))[None])  # of (1, P, D)
        assert prefixes is not None, "decoder_layers has refused such models"
        if rows_per_batch is None:
            rows_per_batch = _rows_that_fit(base_model, prefixes, num_tokens)
        # Batches of equal size: a small last one would take nearly as long as a full one.
        size = math.ceil(len(rows) / math.ceil(len(rows) / rows_per_batch))
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            found += _read_batch(base_model, layers, prefixes, states, batch, target.placeholder, max_new_tokens)
            on_rows(len(batch))
    return found


def _read_batch(
    base_model: BaseModel,
    layers: Sequence[nn.Module],
    prefixes: Prefixes,
    states: torch.Tensor,
    rows: Sequence[PatchedRow],
    placeholder: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """One batch of B rows, of which the placeholders are read behind the prefix that all have in common."""
    import torch

    num_before, num_soft = prefixes.num_tokens, states.shape[2]
    embeds = base_model.embed(torch.full((len(rows), num_soft), placeholder))  # (B, K, D)
    hooks = []
    for layer in sorted({row.pair.target for row in rows}):
        places = [place for place, row in enumerate(rows) if row.pair.target == layer]
        chosen = states[[rows[p].prompt for p in places], [1 + rows[p].pair.source for p in places]]  # (rows, K, D)
        if layer == EMBEDDINGS:
            embeds[places] = chosen
        else:
            hooks.append((layers[layer], _overwrite(places, chosen)))
    mask = torch.ones(len(rows), num_before + num_soft, dtype=torch.long, device=base_model.device)
    positions = torch.arange(num_before, num_before + num_soft, device=base_model.device).expand(len(rows), -1)
    cache = growing_cache(prefixes.of_rows([0] * len(rows)), num_soft + max_new_tokens)
    with _hooks(hooks):
        decoder = RowDecoder(base_model, JoinedBatch(embeds, mask, positions, cache))
    return decoder.greedy(max_new_tokens)


def _overwrite(places: Sequence[int], states: torch.Tensor) -> Callable[..., Any]:
    """A hook that puts `states` in place of what a layer returned for the rows at these places of the batch."""
    import torch

    index = torch.tensor(places, device=states.device)

    def overwrite(module: nn.Module, arguments: Any, output: Any) -> Any:
        return with_hidden(output, hidden_of(output).index_copy(0, index, states))

    return overwrite


@contextmanager
def _hooks(wanted: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Each hook sees, and may replace, what its module returns inside the block."""
    handles = []
    try:
        for module, hook in wanted:
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_rows(
    states: torch.Tensor, rows: Sequence[PatchedRow], max_new_tokens: int, rows_per_batch: int | None
) -> None:
    num_prompts, num_layers = states.shape[:2]
    wrong = next((row for row in rows if not 0 <= row.prompt < num_prompts), None)
    if wrong is not None:
        raise ConfigError(
            f"reading soft prompts through patched layers: a row asks for soft prompt number {wrong.prompt}; expected "
            f"0 to {num_prompts - 1}, the places among the states that were handed in. Correct the row."
        )
    check_pairs([row.pair for row in rows], num_layers)
    if max_new_tokens < 1 or (rows_per_batch is not None and rows_per_batch < 1):
        raise ConfigError(
            f"reading soft prompts through patched layers: max_new_tokens={max_new_tokens}, rows_per_batch="
            f"{rows_per_batch}; expected both above zero. Correct them."
        )


def check_pairs(pairs: Sequence[LayerPair], num_layers: int) -> None:
    """Refuse pairs with layers that are not in the grid of a model with `num_layers`.

    Raises:
        ConfigError: one of them is not among -1 to L - 2.
    """
    for pair in pairs:
        if not all(EMBEDDINGS <= layer <= num_layers - 2 for layer in pair):
            raise ConfigError(
                f"choosing layer pairs: found source {pair[0]} and target {pair[1]}; a model with {num_layers} layers takes "
                f"layers {EMBEDDINGS} (the embeddings) to {num_layers - 2}. Correct the pair."
            )


def _rows_that_fit(base_model: BaseModel, prefixes: Prefixes, num_tokens: int) -> int:
    import torch

    held = sum(tensor[0].numel() * tensor.element_size() for tensor in (*prefixes.keys, *prefixes.values))
    per_row = num_tokens * held / prefixes.num_tokens
    available: float = CACHE_BYTES
    if base_model.device.type == "cuda":
        available = FREE_MEMORY_SHARE * torch.cuda.mem_get_info(base_model.device)[0]
    return max(int(available / per_row), 1)


def cut_description(text: str) -> str:
    """The first description in what was read: up to the first line break, "$", "." or "|" that leaves at least a fifth of the
    text, white space at its ends left out; the whole text where there is none."""
    text = text.strip()
    ends = (place for place, letter in enumerate(text) if letter in STOPS and place >= LEAST_SHARE * len(text))
    return text[: next(ends, len(text))].strip()
