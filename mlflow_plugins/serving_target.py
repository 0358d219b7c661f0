"""The target LLM that a served hard prompt is used on, when a request asks for answers."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import fields

from mlflow_plugins.serving_requests import RequestRefused, ServingConfig
from mlflow_plugins.target_traces import record_target_call
from softprompt_registry.errors import LanguageModelError
from softprompt_registry.language_models.openai_compatible import OpenAICompatible
from softprompt_registry.language_models.openai_settings import OpenAICompatibleConfig
from softprompt_registry.language_models.protocol import Completion, CompletionRequest
from softprompt_registry.portability.templates import fill

TARGET_MODEL_VARIABLE = "SOFTPROMPT_TARGET_MODEL"
_TARGET_SETTINGS = [field.name[len("target_") :] for field in fields(ServingConfig) if field.name.startswith("target_")]


class TargetModel:
    """The target LLM, connected when it is first asked. One for all threads, so that its concurrency is bounded."""

    def __init__(self, config: ServingConfig) -> None:
        self._serving = config
        self._lock = threading.Lock()
        self._client: OpenAICompatible | None = None
        model = config.target_model or os.environ.get(TARGET_MODEL_VARIABLE)
        names = {field.name for field in fields(OpenAICompatibleConfig)} & {*_TARGET_SETTINGS}
        settings = {name: getattr(config, f"target_{name}") for name in names}
        self.config = model and OpenAICompatibleConfig(**{**settings, "model": model})

    def require(self) -> OpenAICompatibleConfig:
        """Raises `RequestRefused` where no target LLM is configured."""
        if not self.config:
            raise RequestRefused(
                f"answering inputs: this server has no target LLM; expected model_config target_model or the environment "
                f"variable {TARGET_MODEL_VARIABLE}. Ask its operator to set one, or send answer=false."
            )
        return self.config

    def ask(self, questions: Sequence[tuple[str, str]]) -> Sequence[Completion | LanguageModelError]:
        """One reply per (hard prompt, input)."""
        serving = self._serving
        requests = [
            CompletionRequest(
                fill(serving.prompt_template, {"hard_prompt": hard_prompt, "input": text}),
                system=serving.system_prompt,
                max_tokens=serving.target_max_tokens,
            )
            for hard_prompt, text in questions
        ]
        try:
            client = self._connected()
        except LanguageModelError as error:  # no key: the hard prompts are still worth sending
            return [error] * len(requests)
        replies = client.complete(requests)
        if serving.trace_target_calls:
            for (hard_prompt, _), request, reply in zip(questions, requests, replies, strict=True):
                record_target_call(
                    reply if isinstance(reply, Completion) else str(reply),
                    model=client.config.model,
                    hard_prompt=hard_prompt,
                    prompt=request.prompt,
                    prices=client.config.prices,
                )
        return replies

    def _connected(self) -> OpenAICompatible:
        with self._lock:
            if self._client is None:
                self._client = OpenAICompatible(self.require())
                weakref.finalize(self, self._client.close)
            return self._client
