"""Any server that speaks OpenAI's API: OpenAI itself, `vllm serve`, llama.cpp, a gateway.

Importing this module loads no client.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self
from urllib.parse import urlsplit

from softprompt_registry.errors import ConfigError, LanguageModelError
from softprompt_registry.language_models.http_limits import OpenSockets, joined_until
from softprompt_registry.language_models.protocol import Completion, CompletionRequest, Finished, Prices

if TYPE_CHECKING:
    import openai
    from openai.types.chat import ChatCompletionMessageParam

_Answering = Future[Completion | LanguageModelError]
_log = logging.getLogger(__name__)

_MAX_PROVIDER_MESSAGE = 200  # characters
_DEADLINE_GRACE_S = 0.25  # lets a try that is cut off by the deadline report what it saw


@dataclass(frozen=True)
class OpenAICompatibleConfig:
    model: str
    """The model's name as the server knows it."""
    base_url: str | None = None
    """Where the API starts, usually ending in /v1. None: `OPENAI_BASE_URL` if set, else OpenAI itself."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. The key itself is never a setting."""
    endpoint: Literal["chat", "completions"] = "chat"
    """`chat` sends messages; `completions` sends plain text, for base models."""
    max_tokens_parameter: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the chat endpoint calls the limit; OpenAI's reasoning models only take `max_completion_tokens`."""
    send_temperature: bool = True
    """False for models that refuse a temperature, such as OpenAI's reasoning models."""
    structured_output: Literal["json_schema", "json_object", "none"] = "json_schema"
    """How an answer's JSON schema is asked for: as the schema, as "some JSON", or only by the prompt's own words."""
    timeout_s: float = 60.0
    """Longest silence of the server within one try, in seconds."""
    deadline_s: float = 600.0
    """Time for a whole batch with all its tries, in seconds; what is not answered then comes back as an error."""
    max_attempts: int = 5
    """Tries per request, the first included."""
    max_concurrency: int = 8
    """Requests in flight at the same time."""
    initial_backoff_s: float = 0.5
    """Upper end of the random wait after the first failed try, in seconds; it doubles with each further one."""
    max_backoff_s: float = 30.0
    """Where the doubling stops, in seconds. A longer `Retry-After` of the server is still obeyed."""
    price_per_million_prompt_tokens: float | None = None
    """In any currency. None: unknown, and so is the cost."""
    price_per_million_completion_tokens: float | None = None
    """In the same currency. Set both prices or none."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("reading the language model's settings: model is empty; name a model of the server.")
        if not self.api_key_env:
            raise ConfigError(
                "reading the language model's settings: api_key_env is empty; name the environment variable that "
                "holds the key, for instance 'OPENAI_API_KEY'."
            )
        if self.base_url is not None:
            _check_base_url(self.base_url)
        for name, choices in {
            "endpoint": ("chat", "completions"),
            "max_tokens_parameter": ("max_tokens", "max_completion_tokens"),
            "structured_output": ("json_schema", "json_object", "none"),
        }.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(
                    f"reading the language model's settings: {name} is {value!r}; choose one of {list(choices)}."
                )
        for name in ("timeout_s", "deadline_s", "initial_backoff_s", "max_backoff_s"):
            seconds = getattr(self, name)
            if not (seconds > 0 and math.isfinite(seconds)):
                raise ConfigError(
                    f"reading the language model's settings: {name} is {seconds!r}; it must be a number of seconds "
                    "above 0."
                )
        for name in ("max_attempts", "max_concurrency"):
            count = getattr(self, name)
            if count < 1:
                raise ConfigError(f"reading the language model's settings: {name} is {count!r}; it must be 1 or more.")
        if self.initial_backoff_s > self.max_backoff_s:
            raise ConfigError(
                f"reading the language model's settings: initial_backoff_s ({self.initial_backoff_s!r}) is above "
                f"max_backoff_s ({self.max_backoff_s!r}); lower the first or raise the second."
            )
        prices = (self.price_per_million_prompt_tokens, self.price_per_million_completion_tokens)
        if (prices[0] is None) != (prices[1] is None):
            raise ConfigError(
                f"reading the language model's settings: only one of the two prices is set {prices!r}; set both "
                "price_per_million_prompt_tokens and price_per_million_completion_tokens, or none."
            )
        if any(price is not None and not (price >= 0 and math.isfinite(price)) for price in prices):
            raise ConfigError(
                f"reading the language model's settings: the prices per million tokens are {prices!r}; they must be "
                "numbers from 0 up."
            )

    @property
    def prices(self) -> Prices | None:
        if self.price_per_million_prompt_tokens is None or self.price_per_million_completion_tokens is None:
            return None
        return Prices(self.price_per_million_prompt_tokens, self.price_per_million_completion_tokens)


def _check_base_url(base_url: str) -> None:
    """Refuse what the client cannot use, and what would put a secret into recorded settings. Quotes no secret."""
    try:
        url = urlsplit(base_url)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(
            "reading the language model's settings: base_url is not a usable address; it must look like "
            "'http://127.0.0.1:8000/v1'."
        )
    if url.username is not None or url.password is not None or url.query or url.fragment:
        raise ConfigError(
            f"reading the language model's settings: base_url for host {url.hostname!r} carries credentials, a query "
            "or a fragment; give scheme, host and path only, and put the key into the environment."
        )


class OpenAICompatible:
    """Asks a server that speaks OpenAI's API: OpenAI itself, `vllm serve`, llama.cpp, a gateway.

    One pool of `max_concurrency` threads lives as long as the object, so the bound also holds for batches that are
    sent from several threads. Close it, or use it in a `with` statement.
    """

    def __init__(self, config: OpenAICompatibleConfig, *, jitter: random.Random | None = None) -> None:
        import openai

        self.config = config
        self.name = config.model
        self.identity = f"{config.model} {config.endpoint} {config.structured_output} {config.send_temperature}"
        key = _key_from_environment(config)
        self._secret = _secret_pattern(key)
        # Only waiting times come from here, and programs that share a server should not wait in step: no fixed seed.
        self._jitter = jitter or random.Random()
        self._sockets = OpenSockets()
        self._client = openai.OpenAI(
            api_key=key,
            base_url=config.base_url,
            max_retries=0,
            timeout=config.timeout_s,
            http_client=openai.DefaultHttpxClient(event_hooks={"request": [self._sockets.watch]}),
        )
        self._server = urlsplit(str(self._client.base_url)).netloc.rpartition("@")[2]
        self._threads = ThreadPoolExecutor(config.max_concurrency, thread_name_prefix="language-model")
        self._closing = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
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
            return [future.result() if future.done() else self._deadline_error(None) for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def stream(self, requests: Iterable[CompletionRequest]) -> Iterator[Finished]:
        """Results as they finish; `deadline_s` counts for each request from its start, not for the whole stream."""
        done: SimpleQueue[tuple[int, _Answering]] = SimpleQueue()
        in_flight: set[_Answering] = set()
        waiting = iter(enumerate(requests))
        try:
            while True:
                # Twice as many as threads: none of them waits for the caller to take a result.
                while len(in_flight) < 2 * self.config.max_concurrency and (drawn := next(waiting, None)):
                    index, request = drawn
                    future = self._threads.submit(self._complete_streamed, request)
                    in_flight.add(future)
                    future.add_done_callback(partial(_put, done, index))
                if not in_flight:
                    return
                index, future = done.get()
                in_flight.remove(future)
                yield Finished(index, future.result())
        finally:
            for future in in_flight:
                future.cancel()

    def _complete_streamed(self, request: CompletionRequest) -> Completion | LanguageModelError:
        return self._complete_one(request, time.monotonic() + self.config.deadline_s)

    def _complete_one(self, request: CompletionRequest, deadline: float) -> Completion | LanguageModelError:
        import openai

        config = self.config
        backoff_s = config.initial_backoff_s
        last: LanguageModelError | None = None
        for attempt in range(1, config.max_attempts + 1):
            started = time.monotonic()
            if started >= deadline:
                break
            timeout_s = min(config.timeout_s, deadline - started)
            try:
                reply = _read_reply(self._send(request, timeout_s, deadline), config.endpoint)
            except (openai.OpenAIError, _BadReply, UnicodeEncodeError) as failure:
                wait_s = max(_retry_after_s(failure), self._jitter.uniform(0, backoff_s))
                last = self._explain(failure, attempt, timeout_s)
            else:
                return Completion(
                    text=reply.text,
                    prompt_tokens=reply.prompt_tokens,
                    completion_tokens=reply.completion_tokens,
                    latency_s=time.monotonic() - started,
                    finish_reason=reply.finish_reason,
                    attempts=attempt,
                )
            if not last.retryable:
                return last
            if time.monotonic() >= deadline:
                break
            if attempt == config.max_attempts:
                return last
            if time.monotonic() + wait_s >= deadline:
                break  # the wait would end too late: say so now
            _log.info("waiting %.1f s before the next try: %s", wait_s, last)
            if self._closing.wait(wait_s):
                return last
            backoff_s = min(2 * backoff_s, config.max_backoff_s)
        return self._deadline_error(last)

    def _send(self, request: CompletionRequest, timeout_s: float, deadline: float) -> bytes:
        """The body of the server's reply.

        The raw body is read here instead of the client's objects: the client does not check a reply, and a damaged
        one would only show as an AttributeError later.
        """
        import openai

        config = self.config
        arguments: dict[str, Any] = {"model": config.model, "timeout": timeout_s}
        if config.send_temperature:
            arguments["temperature"] = request.temperature
        if request.stop:
            arguments["stop"] = list(request.stop)
        if request.presence_penalty:
            arguments["presence_penalty"] = request.presence_penalty
        if request.seed is not None:
            arguments["seed"] = request.seed
        if request.json_schema is not None and config.structured_output != "none":
            arguments["extra_body"] = {"response_format": _response_format(request.json_schema, config)}
        if config.endpoint == "completions":
            prompt = request.prompt if request.system is None else f"{request.system}\n\n{request.prompt}"
            opening = self._client.completions.with_streaming_response.create(
                prompt=prompt, max_tokens=request.max_tokens, **arguments
            )
        else:
            arguments[config.max_tokens_parameter] = request.max_tokens
            opening = self._client.chat.completions.with_streaming_response.create(
                messages=_messages(request), **arguments
            )
        with opening as reply:
            try:
                return joined_until(reply.iter_bytes(), deadline)
            except Exception as error:  # of the HTTP library; which one depends on the version of openai
                timed_out = "Timeout" in type(error).__name__
                failure = openai.APITimeoutError if timed_out else openai.APIConnectionError
                raise failure(request=reply.http_request) from error

    # --- Errors ---

    def _explain(
        self, failure: openai.OpenAIError | _BadReply | UnicodeEncodeError, attempt: int, timeout_s: float
    ) -> LanguageModelError:
        """The one place where a provider's failure becomes ours: what was found, is a new try of use, what to do."""
        import openai

        config = self.config
        retryable = False
        if isinstance(failure, openai.APIStatusError):
            status = failure.status_code
            found = f"HTTP {status} {self._quote(_provider_message(failure.body))}".rstrip()
            if status == 429 and failure.code == "insufficient_quota":
                hint = "The account's quota is used up, which waiting does not help: check its plan and billing."
            elif status == 429:
                retryable = True
                hint = "Lower max_concurrency, or raise max_attempts, max_backoff_s and deadline_s."
            elif status >= 500 or status == 408:
                retryable = True
                hint = "The server is in trouble: read its log if it is yours, else try again later."
            elif status == 401:
                hint = f"Check the key in the environment variable {config.api_key_env}."
            elif status == 403:
                hint = (
                    f"The key in the environment variable {config.api_key_env} may not use this model: ask for access "
                    "or choose another model."
                )
            elif status == 404:
                hint = (
                    f"Check the model name {config.model!r}, that base_url ends where the API starts (usually in /v1), "
                    f"and that the model serves the {config.endpoint!r} endpoint."
                )
            elif status in (400, 422):
                hint = (
                    "Check the prompt's length, max_tokens and stop against the model's limits; a model that refuses "
                    "max_tokens or temperature needs max_tokens_parameter='max_completion_tokens' or "
                    "send_temperature=False."
                )
            else:
                hint = "The same request will fail again: check base_url and the request."
        elif isinstance(failure, openai.APITimeoutError):
            retryable = True
            found = f"no reply within {timeout_s:.3g} s"
            hint = "Raise timeout_s, or lower max_tokens or max_concurrency."
        elif isinstance(failure, openai.APIConnectionError):
            retryable = True
            found = f"the connection failed {self._quote(str(failure.__cause__ or failure))}".rstrip()
            hint = "Check that the server runs, that base_url is right and that the network lets you through."
        elif isinstance(failure, _BadReply):
            retryable = True
            found = f"an unusable reply {self._quote(str(failure))}"
            hint = "Check that base_url leads to an OpenAI-compatible API, and read the server's log if it is yours."
        elif isinstance(failure, UnicodeEncodeError):
            found = f"a request that is not valid Unicode {self._quote(failure.reason)}"
            hint = "Remove the lone surrogates from prompt, system and stop."
        else:
            found = f"{type(failure).__name__} {self._quote(str(failure))}".rstrip()
            hint = "The client refused the request: check the settings and the installed version of openai."
        tries = "1 try" if attempt == 1 else f"{attempt} tries"
        error = LanguageModelError(
            f"asking model {config.model!r} at {self._server!r} ({tries}): found {found}.",
            retryable=retryable,
            about_request=isinstance(failure, UnicodeEncodeError)
            or getattr(failure, "status_code", None) in (400, 413, 422),
            hint=hint,
        )
        error.__cause__ = self._without_secrets(failure)
        return error

    def _deadline_error(self, last: LanguageModelError | None) -> LanguageModelError:
        before = "" if last is None else f" Last failure: {last}"
        error = LanguageModelError(
            f"deadline of {self.config.deadline_s:g} s reached before model {self.name!r} at {self._server!r} "
            f"answered.{before}",
            retryable=True,
            hint="Raise deadline_s or max_concurrency, or send smaller batches.",
        )
        error.__cause__ = last
        return error

    def _quote(self, text: str) -> str:
        """A provider's words in brackets: one short line, with the key masked before the cut could split it."""
        printable = "".join(character if character.isprintable() else " " for character in text)
        line = " ".join(self._secret.sub("***", printable).split())
        if len(line) > _MAX_PROVIDER_MESSAGE:
            line = line[: _MAX_PROVIDER_MESSAGE - 1] + "…"
        return f"({line})" if line else ""

    def _without_secrets(self, failure: Exception) -> Exception | None:
        """The failure, fit to be kept as a cause: without request headers and the frames that saw the key.

        None when its own text repeats the key.
        """
        response = getattr(failure, "response", None)
        body = "" if response is None else response.text
        if self._secret.search(f"{failure} {failure!r} {getattr(failure, 'body', '')} {body}"):
            return None
        if response is not None:
            for reply in (response, *response.history):
                reply.request.headers.clear()
        if (request := getattr(failure, "request", None)) is not None:
            request.headers.clear()
        failure.__cause__ = failure.__context__ = None
        return failure.with_traceback(None)


def _put(queue: SimpleQueue[tuple[int, _Answering]], index: int, future: _Answering) -> None:
    queue.put((index, future))


def _response_format(json_schema: str, config: OpenAICompatibleConfig) -> dict[str, Any]:
    if config.structured_output == "json_object":
        return {"type": "json_object"}
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": json.loads(json_schema), "strict": True},
    }


def _messages(request: CompletionRequest) -> list[ChatCompletionMessageParam]:
    user: list[ChatCompletionMessageParam] = [{"role": "user", "content": request.prompt}]
    return user if request.system is None else [{"role": "system", "content": request.system}, *user]


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


def _secret_pattern(key: str) -> re.Pattern[str]:
    """Finds the key in a text. A made-up key of a few letters counts only as a whole word, lest it hide all text."""
    pattern = re.escape(key)
    return re.compile(pattern if len(key) >= 8 else rf"(?<!\w){pattern}(?!\w)")


def _provider_message(body: object) -> str:
    """The sentence in an error body, whose place differs: OpenAI and vLLM say `message`, FastAPI says `detail`."""
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or body
    return "" if body is None else str(body)


def _retry_after_s(failure: Exception) -> float:
    """What the server asks to wait, given as seconds or as a date; 0 when it asks nothing that can be read."""
    response = getattr(failure, "response", None)
    value = "" if response is None else response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
            # The zone "-0000" gives a date without one; it means UTC.
            seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


class _BadReply(Exception):
    """A reply with status 200 that holds no answer."""


class _Reply(NamedTuple):
    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int


def _read_reply(content: bytes, endpoint: Literal["chat", "completions"]) -> _Reply:
    """The answer in a reply's body. A null content (a refusal, a filtered answer) is the answer ""."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        # `from None`: the decoder's error would carry the whole body along.
        raise _BadReply(f"{len(content)} bytes that are not JSON") from None
    if not isinstance(body, dict):
        raise _BadReply(f"a JSON {type(body).__name__} instead of an object")
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        # Some gateways report a failure behind them with status 200.
        raise _BadReply(f"no choices; {_provider_message(body['error'])}" if body.get("error") else "no choices")
    choice = choices[0]
    holder, field = (choice, "text") if endpoint == "completions" else (choice.get("message"), "content")
    if not isinstance(holder, dict) or (field not in holder and "refusal" not in holder):
        raise _BadReply(f"the first choice has no {field}")
    text = holder.get(field)
    if text is not None and not isinstance(text, str):
        raise _BadReply(f"{field} is a {type(text).__name__} instead of a string")
    finish_reason = choice.get("finish_reason")
    usage = body.get("usage")
    return _Reply(
        text=text or "",
        finish_reason=None if finish_reason is None else str(finish_reason),
        prompt_tokens=_token_count(usage, "prompt_tokens"),
        completion_tokens=_token_count(usage, "completion_tokens"),
    )


def _token_count(usage: object, field: str) -> int:
    """0 when the server does not say: several local servers report no usage."""
    count = usage.get(field) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count >= 0 else 0
