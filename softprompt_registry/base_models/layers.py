"""The decoder layers of a base model, found by their place and not by the names that each architecture gives them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.errors import ConfigError


def decoder_layers(base_model: BaseModel) -> list[nn.Module]:
    """The L decoder layers, in the order in which they run.

    They are the one `nn.ModuleList` that stands in no other one (as the experts of a layer do) and has as many members as the
    config has layers.

    Raises:
        ConfigError: there is no such list, or more than one, or the model keeps other things for later tokens than all keys
            and values, so that its rows cannot continue a shared beginning.
    """
    expected = int(base_model.model.config.get_text_config(decoder=True).num_hidden_layers)
    lists = _outermost_lists(base_model.decoder)
    fitting = [name for name, modules in lists.items() if len(modules) == expected]
    doing = f"finding the decoder layers of base model {base_model.ref}"
    if len(fitting) != 1:
        found = {name: len(modules) for name, modules in lists.items()}
        raise ConfigError(
            f"{doing}: its lists of modules have {found} members; expected exactly one list with the {expected} of its "
            "config. Use a base model with one stack of decoder layers."
        )
    with torch.no_grad():
        prefixes = base_model.prefixes(base_model.input_embeddings[None, :1])
    if prefixes is None:
        raise ConfigError(
            f"{doing}: its rows cannot continue a shared beginning (between tokens it keeps a sliding window or a "
            "recurrent state, for instance, or it counts padding as distance), expected keys and values alone: hidden "
            "states are patched into such rows. Use a base model whose layers all attend to the whole text."
        )
    return list(lists[fitting[0]])


def _outermost_lists(module: nn.Module, path: str = "") -> dict[str, nn.ModuleList]:
    lists: dict[str, nn.ModuleList] = {}
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            lists[f"{path}{name}"] = child
        else:
            lists |= _outermost_lists(child, f"{path}{name}.")
    return lists


def linear_layers(base_model: BaseModel) -> dict[str, nn.Module]:
    """The decoder's linear layers by the last part of their names, such as `q_proj`, in their order; the first of each name.

    The head is not among them. A layer with an adapter on it counts as the one below the adapter.
    """
    found: dict[str, nn.Module] = {}
    for name, layer in _linear_layers(base_model.decoder, base_model.model.get_output_embeddings()):
        found.setdefault(name, layer)
    return found


def _linear_layers(module: nn.Module, head: Any, module_name: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        layer: Any = child.get_base_layer() if isinstance(child, BaseTunerLayer) else child
        if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head:
            # A bare number would also be the name of a decoder layer.
            yield (f"{module_name}.{name}" if name.isdigit() else name), layer
        elif layer is child:
            yield from _linear_layers(child, head, name)


def hidden_of(output: Any) -> torch.Tensor:
    """(B, T, D): the hidden states in what a layer returned, which for some models is a tuple."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """What a layer returned, with other hidden states (B, T, D)."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
