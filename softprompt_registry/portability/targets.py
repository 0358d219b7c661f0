"""The target LLMs: which ones, how they are reached, what they cost."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields

from pydantic import PositiveInt

from softprompt_registry.config import settings
from softprompt_registry.errors import ConfigError
from softprompt_registry.language_models.openai_settings import OpenAICompatibleConfig
from softprompt_registry.language_models.opening import LanguageModelConfig, engine_config
from softprompt_registry.language_models.protocol import PriceConfig, without_folders


@settings
class TargetConfig(PriceConfig, LanguageModelConfig):
    """One target LLM: what `LanguageModelConfig` says, and what a comparison of several needs."""

    name: str = ""
    """In tables and plots. Empty: the model's."""
    max_tokens: PositiveInt = 256
    """Longest answer, in the target's tokens; for reasoning models with the tokens of their thoughts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if inner := sorted(set(self.options) & {price.name for price in fields(PriceConfig)}):
            raise ValueError(f"{inner} stand in its options, expected beside them")
        engine_config(self)  # refuses what cannot work before anything is asked

    @property
    def title(self) -> str:
        """The name in tables: of a model that is a folder, the folder's own name."""
        return self.name or without_folders(self.model)

    @property
    def key(self) -> str:
        return key_of(self.title)

    def told(self, text: str) -> str:
        """A text about this target without the folder that its model is in."""
        return text.replace(self.model, without_folders(self.model)) if self.model else text

    @property
    def is_remote(self) -> bool:
        """Behind a server, which may bill what is asked; otherwise in this process."""
        return self.engine == "openai"

    @property
    def identity(self) -> str | None:
        """What answers of a remote target are kept under: its model, how it is asked, and which server it is on.

        Two servers may call different weights by one name, and a comparison of targets must not mix them up; so a server that
        has moved to another address is asked again. None in this process, where the loaded weights say it.
        """
        settings = engine_config(self)
        if not isinstance(settings, OpenAICompatibleConfig):
            return None
        return f"{settings.identity} at {settings.address}"


def key_of(title: str) -> str:
    """A title as a part of MLflow's names: few signs, at most 250 of them, and nothing that a path would be shortened by."""
    parts = re.sub(r"[^A-Za-z0-9_./-]", "-", title).split("/")
    return "/".join(part for part in parts if part.strip("."))[:_MAX_KEY].rstrip("/") or "-"


_MAX_KEY = 150


def require_different_names(targets: Sequence[TargetConfig]) -> None:
    """Raises `ConfigError` where there is no target, or two have one name: tables could not tell them apart."""
    names = [target.key for target in targets]
    if not names:
        raise ConfigError("reading the target LLMs: found none, expected at least one. Name it under `targets`.")
    if twice := sorted(name for name, times in Counter(names).items() if times > 1):
        raise ConfigError(
            f"reading the target LLMs: found the names {twice} more than once, expected different ones, also "
            "where signs other than letters, digits and -_./ are left out. Set `name` of each."
        )
