"""torch.compile for the parts of a frozen model where it can join several small operations into one."""

from __future__ import annotations

import shutil

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.errors import ConfigError

FUSIBLE = ("Norm", "MLP")
"""Ends of the names of transformers' classes. Attention is left alone: it goes through a cache whose length changes with each
batch and gains little, as its time goes into matrix products."""


def compile_parts(base_model: BaseModel) -> None:
    """Compile the norms and MLPs of a base model in place, for all batch sizes and lengths.

    They are compiled when they first run, which takes about half a minute. Calling it again changes nothing.

    Raises:
        ConfigError: on a CPU without a C++ compiler, which torch needs there.
    """
    if base_model.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise ConfigError(
            "compiling the base model: torch.compile needs a C++ compiler on a CPU, and there is no g++, clang++ or c++. "
            "Install one, or leave `compile` at false."
        )
    parts = [module for module in base_model.model.modules() if type(module).__name__.endswith(FUSIBLE)]
    inner = {id(child) for part in parts for child in part.modules() if child is not part}
    outermost = [part for part in parts if id(part) not in inner]
    for part in outermost:
        if part._compiled_call_impl is None:
            part.compile(dynamic=True)
