"""The adapter of a translator in training."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

import torch
from peft import LoraConfig, TaskType

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.layers import linear_layers
from softprompt_registry.errors import ConfigError
from softprompt_registry.translators.translator import Translator, adapter_parameters, add_adapter, remove_adapter


def add_untrained_adapter(
    base_model: BaseModel,
    adapter_name: str,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    target_modules: Sequence[str],
    seed: int,
) -> None:
    """Put a LoRA adapter on the target modules of the decoder, and on nothing if one of them is not found.

    Raises:
        ConfigError: the decoder lacks some of the target modules.
    """
    model, found = base_model.model, linear_layers(base_model)
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules or found),
        # Layers that hold their weights the other way round, as those of GPT-2.
        fan_in_fan_out=any(not isinstance(layer, torch.nn.Linear) for layer in found.values()),
    )
    if model.config.get_text_config() is not model.config:  # what reads images may have layers of the same names
        decoder = next(name for name, module in model.named_modules() if module is base_model.decoder)
        lora.exclude_modules = rf"(?!{re.escape(decoder)}\.).*"
    try:
        add_adapter(base_model, lora, adapter_name, seed=seed)
        # Left out of `lora` by now is what PEFT itself translates, as the names of experts.
        wanted: set[str] = set(lora.target_modules or ())
        on = [f".{name.partition('.lora_')[0]}" for name in adapter_parameters(base_model, adapter_name)]
        if missing := [name for name in wanted if not any(layer.endswith(f".{name}") for layer in on)]:
            remove_adapter(base_model, adapter_name)
            raise ValueError(f"it has no layers named {sorted(missing)}")
    except ValueError as error:
        raise ConfigError(
            f"training a translator: the adapter cannot be put on all target modules of {base_model.ref} "
            f"({str(error)[:200]}); its linear layers are {list(found)}. Set target_modules to some of them, or leave it out "
            "for all."
        ) from error


@contextlib.contextmanager
def adapter_in_training(translator: Translator) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Give the adapter's parameters, switched on and trainable; afterwards they are frozen and switched off again.

    Their names are without the adapter's, which follows from the spelling of the output's path: a resumed training may
    spell it otherwise.
    """
    base_model, name = translator.base_model, translator.adapter_name
    parameters = {
        key.replace(f".{name}.", "."): parameter for key, parameter in adapter_parameters(base_model, name).items()
    }
    try:
        with translator.reading():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            yield parameters
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        base_model.model.eval()
