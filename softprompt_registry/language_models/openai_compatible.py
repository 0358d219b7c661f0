"""Any server that speaks OpenAI's API: OpenAI itself, `vllm serve`, llama.cpp, a gateway.

Importing this module loads no client.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from softprompt_registry.errors import LanguageModelError
from softprompt_registry.language_models.adaptations import Adaptations, remedy
from softprompt_registry.language_models.http_limits import OpenSockets, joined_until
from softprompt_registry.language_models.openai_settings import OpenAICompatibleConfig
from softprompt_registry.language_models.protocol import (
    Completion,
    CompletionRequest,
    Finished,
    joined_prompt,
    messages_of,
)
from softprompt_registry.language_models.provider_failures import FailureReader, retry_after_s
from softprompt_registry.language_models.proxies import http_client, proxy_variable
from softprompt_registry.language_models.replies import CONTENT_FILTER, ONLY_THOUGHTS, BadReply, read_answer, read_reply

if TYPE_CHECKING:
    import openai

_Answering = Future[Completion | LanguageModelError]
_log = logging.getLogger(__name__)

_DEADLINE_GRACE_S = 0.25  # lets a try that is cut off by the deadline report what it saw


class OpenAICompatible:
    """Asks a server that speaks OpenAI's API: OpenAI itself, `vllm serve`, llama.cpp, a gateway.

    One pool of `max_concurrency` threads lives as long as the object, so the bound also holds for batches that are
    sent from several threads. Close it, or use it in a `with` statement.
    """

    def __init__(self, config: OpenAICompatibleConfig, *, jitter: random.Random | None = None) -> None:
        self.config = config
        self.name = config.model
        self.identity = config.identity
        key = _key_from_environment(config)
        # Only waiting times come from here, and programs that share a server should not wait in step: no fixed seed.
        self._jitter = jitter or random.Random()
        self._served: set[str] = set()
        self._sockets = OpenSockets()
        self._client = _client(config, key, self._sockets)
        server = urlsplit(str(self._client.base_url)).netloc.rpartition("@")[2]
        self._failures = FailureReader(config, server, key, proxy_variable(config.address))
        self._adaptations = Adaptations(config)
        self._threads = ThreadPoolExecutor(config.max_concurrency, thread_name_prefix="language-model")
        self._closing = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop what is queued, cut what is in flight, and free threads and sockets. A second call does nothing."""
        self._closing.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._sockets.cut()  # else the threads would wait for a silent server as long as timeout_s
        self._threads.shutdown(wait=True)
        self._client.close()

    def complete(self, requests: Sequence[CompletionRequest]) -> list[Completion | LanguageModelError]:
        deadline = time.monotonic() + self.config.deadline_s
        futures = [self._threads.submit(self._complete_one, request, deadline) for request in requests]
        try:
            # Each try knows the deadline too, but a server that sends a byte now and then outlasts any timeout.
            wait(futures, timeout=self.config.deadline_s + _DEADLINE_GRACE_S)
            return [future.result() if future.done() else self._failures.deadline_error(None) for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def stream(self, requests: Iterable[CompletionRequest]) -> Iterator[Finished]:
        """Results as they finish; `deadline_s` counts for each request from its start, not for the whole stream."""
        done: SimpleQueue[_Answering] = SimpleQueue()
        in_flight: dict[_Answering, int] = {}
        waiting = iter(enumerate(requests))
        try:
            while True:
                # Twice as many as threads: none of them waits for the caller to take a result.
                while len(in_flight) < 2 * self.config.max_concurrency and (drawn := next(waiting, None)):
                    index, request = drawn
                    future = self._threads.submit(self._complete_streamed, request)
                    in_flight[future] = index
                    future.add_done_callback(done.put)
                if not in_flight:
                    return
                future = done.get()
                yield Finished(in_flight.pop(future), future.result())
        finally:
            for future in in_flight:
                future.cancel()

    def _complete_streamed(self, request: CompletionRequest) -> Completion | LanguageModelError:
        return self._complete_one(request, time.monotonic() + self.config.deadline_s)

    def _complete_one(self, request: CompletionRequest, deadline: float) -> Completion | LanguageModelError:
        config = self.config
        backoff_s = config.initial_backoff_s
        last: LanguageModelError | None = None
        attempt = 1
        while time.monotonic() < deadline:
            with self._adaptations.settings(deadline - time.monotonic()) as settings:
                tried = self._try(request, settings, attempt, deadline)
                if self._adapt(request, settings, tried):
                    continue  # it is another request, so no try of this one is used up
            if isinstance(tried, Completion):
                return tried
            failure, last = tried
            if not last.retryable or attempt == config.max_attempts:
                return last
            wait_s = max(retry_after_s(failure), self._jitter.uniform(0, backoff_s))
            if time.monotonic() + wait_s >= deadline:
                break  # the wait would end too late: say so now
            _log.info("waiting %.1f s before the next try: %s", wait_s, last)
            if self._closing.wait(wait_s):
                return last
            backoff_s = min(2 * backoff_s, config.max_backoff_s)
            attempt += 1
        return self._failures.deadline_error(last)

    def _try(
        self, request: CompletionRequest, settings: OpenAICompatibleConfig, attempt: int, deadline: float
    ) -> Completion | tuple[Exception, LanguageModelError]:
        """The answer, or the failure as the client raised it and as it is reported."""
        import openai

        started = time.monotonic()
        timeout_s = min(settings.timeout_s, deadline - started)
        try:
            reply = read_reply(self._send(request, settings, timeout_s, deadline), settings.endpoint)
        except (openai.OpenAIError, BadReply, UnicodeEncodeError) as failure:
            if getattr(failure, "code", None) == CONTENT_FILTER:  # Azure says so with status 400
                return Completion("", 0, 0, time.monotonic() - started, CONTENT_FILTER, attempt)
            return failure, self._failures.explain(failure, attempt, timeout_s)
        self._notice_model(reply.model)
        if settings.send_stop:
            text, finish_reason, raw = read_answer(reply.text, reply.finish_reason)
        else:
            text, finish_reason, raw = read_answer(reply.text.lstrip(), reply.finish_reason, request.stop)
        return Completion(
            text=self._failures.masked(text),
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
            latency_s=time.monotonic() - started,
            finish_reason=finish_reason and self._failures.masked(finish_reason),
            attempts=attempt,
            raw=raw and self._failures.masked(raw),
            adapted=self._adaptations.of(settings),
        )

    def _adapt(
        self,
        request: CompletionRequest,
        settings: OpenAICompatibleConfig,
        tried: Completion | tuple[Exception, LanguageModelError],
    ) -> bool:
        """Whether the server should be asked again, since from now on it is asked in a way that suits it."""
        import openai

        if isinstance(tried, Completion):
            if tried.finish_reason != ONLY_THOUGHTS or not (settings.send_stop and request.stop):
                return False
            return self._adaptations.learn("send_stop", False, "it stopped within the model's thoughts.")
        failure, error = tried
        if not isinstance(failure, openai.APIStatusError) or failure.status_code in (401, 403, 404, 408, 429):
            return False
        found = remedy(failure, request, settings)
        return found is not None and self._adaptations.learn(*found, str(error).removesuffix(f" {error.hint}"))

    def _notice_model(self, served: str | None) -> None:
        """Say once if the server names another model than the one that was asked; names with a date behind are the same."""
        if served is None or served in self._served or served.startswith(self.config.model):
            return
        self._served.add(served)
        _log.warning("the server was asked for model %r and says that %r answers", self.config.model, served[:100])

    def _send(
        self, request: CompletionRequest, config: OpenAICompatibleConfig, timeout_s: float, deadline: float
    ) -> bytes:
        """The body of the server's reply.

        The raw body is read here instead of the client's objects: the client does not check a reply, and a damaged
        one would only show as an AttributeError later.
        """
        import openai

        arguments: dict[str, Any] = {"model": config.model, "timeout": timeout_s}
        if config.send_temperature:
            arguments["temperature"] = request.temperature
        if request.stop and config.send_stop:
            arguments["stop"] = list(request.stop)
        if request.presence_penalty:
            arguments["presence_penalty"] = request.presence_penalty
        if request.seed is not None:
            arguments["seed"] = request.seed
        if request.json_schema is not None and config.structured_output != "none":
            arguments["extra_body"] = {"response_format": _response_format(request.json_schema, config)}
        if config.endpoint == "completions":
            opening = self._client.completions.with_streaming_response.create(
                prompt=joined_prompt(request), max_tokens=request.max_tokens, **arguments
            )
        else:
            arguments[config.max_tokens_parameter] = request.max_tokens
            opening = self._client.chat.completions.with_streaming_response.create(
                messages=messages_of(request, takes_system=config.send_system), **arguments
            )
        with opening as reply:
            try:
                return joined_until(reply.iter_bytes(), deadline)
            except Exception as error:  # of the HTTP library; which one depends on the version of openai
                timed_out = "Timeout" in type(error).__name__
                failure = openai.APITimeoutError if timed_out else openai.APIConnectionError
                raise failure(request=reply.http_request) from error


def _client(config: OpenAICompatibleConfig, key: str, sockets: OpenSockets) -> openai.OpenAI:
    """The provider's own client, without its retries."""
    import openai

    settings: dict[str, Any] = {
        "api_key": key,
        "max_retries": 0,
        "timeout": config.timeout_s,
        "http_client": http_client(config.model, config.address, {"request": [sockets.watch]}),
    }
    if config.api_version is None or config.base_url is None:
        return openai.OpenAI(base_url=config.base_url, **settings)
    if urlsplit(config.base_url).path.strip("/"):
        return openai.AzureOpenAI(api_version=config.api_version, base_url=config.base_url, **settings)
    # The client adds /openai to such an address.
    return openai.AzureOpenAI(api_version=config.api_version, azure_endpoint=config.base_url, **settings)


def _response_format(json_schema: str, config: OpenAICompatibleConfig) -> dict[str, Any]:
    if config.structured_output == "json_object":
        return {"type": "json_object"}
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": json.loads(json_schema), "strict": True},
    }


def _key_from_environment(config: OpenAICompatibleConfig) -> str:
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise LanguageModelError(
            f"connecting to model {config.model!r}: the environment variable {config.api_key_env} is not set.",
            retryable=False,
            hint=f"Set {config.api_key_env} to your key; for a local server that needs none, to any value.",
        )
    if not all("!" <= character <= "~" for character in key):  # else the client's own error would show it
        raise LanguageModelError(
            f"connecting to model {config.model!r}: the key in the environment variable {config.api_key_env} has "
            "spaces or characters outside ASCII.",
            retryable=False,
            hint=f"Set {config.api_key_env} again, to the key alone.",
        )
    return key
