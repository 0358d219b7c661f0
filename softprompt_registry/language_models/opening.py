"""Which language model to use, as a setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field
from typing import Any, Literal

from softprompt_registry.config import build_config, settings
from softprompt_registry.errors import ConfigError
from softprompt_registry.language_models.on_transformers import OnTransformers, TransformersConfig
from softprompt_registry.language_models.on_vllm import OnVllm, VllmConfig
from softprompt_registry.language_models.openai_compatible import OpenAICompatible
from softprompt_registry.language_models.openai_settings import OpenAICompatibleConfig
from softprompt_registry.language_models.protocol import LanguageModel


@settings
class LanguageModelConfig:
    engine: Literal["openai", "vllm", "transformers"] = "openai"
    """`openai`: any server that speaks OpenAI's API; `vllm`, `transformers`: a model in this process."""
    model: str = ""
    """The server's name for the model; in this process `packaged:NAME`, a folder, or a Hub name with `@revision`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the engine, such as `base_url` and `max_concurrency`, or `tensor_parallel_size`; `timeout_s` of engine
    openai is 300 here."""


@contextmanager
def open_language_model(config: LanguageModelConfig) -> Iterator[LanguageModel]:
    """The language model for the length of the block.

    Raises:
        ConfigError: no model is named, or an option is unknown to its engine.
        LanguageModelError: it cannot be reached or loaded.
    """
    settings = engine_config(config)
    model: LanguageModel
    if isinstance(settings, VllmConfig):
        model = OnVllm(settings)
    elif isinstance(settings, TransformersConfig):
        model = OnTransformers(settings)
    else:
        model = OpenAICompatible(settings)
    try:
        yield model
    finally:
        model.close()


def engine_config(config: LanguageModelConfig) -> OpenAICompatibleConfig | VllmConfig | TransformersConfig:
    """The settings of the engine itself, checked; nothing is connected or loaded.

    Raises:
        ConfigError: no model is named, or an option is unknown to its engine or cannot work.
    """
    if not config.model:
        raise ConfigError(
            f"opening a language model with engine {config.engine!r}: no model is named; expected the setting `model`. "
            "Name one, and for a server of your own `options.base_url` too."
        )
    if "model" in config.options:
        raise ConfigError("opening a language model: `model` stands in its options; it belongs beside them.")
    settings = {**config.options, "model": config.model}
    where = f"the options of engine {config.engine!r}"
    if config.engine == "vllm":
        return build_config(VllmConfig, settings, where)
    if config.engine == "transformers":
        return build_config(TransformersConfig, settings, where)
    # An answer is not streamed: what a small server writes for minutes is one silence.
    return build_config(OpenAICompatibleConfig, {"timeout_s": 300.0, **settings}, where)
