"""The settings of a server that speaks OpenAI's API."""

from __future__ import annotations

import os
import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import PositiveFloat, PositiveInt

from softprompt_registry.config import Name, settings
from softprompt_registry.language_models.protocol import PriceConfig


@settings
class OpenAICompatibleConfig(PriceConfig):
    model: Name
    """The model's name as the server knows it."""
    base_url: str | None = None
    """Where the API starts, usually ending in /v1. None: `OPENAI_BASE_URL` if set, else OpenAI itself."""
    api_version: str | None = None
    """Azure OpenAI's `api-version`, such as 2024-10-21; `base_url` is then the resource's address, `model` the name of the
    deployment, and the key goes into the header `api-key`. None: not Azure, or its newer address that ends in /openai/v1."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. The key itself is never a setting."""
    endpoint: Literal["chat", "completions"] = "chat"
    """`chat` sends messages; `completions` sends plain text, for base models."""
    send_system: bool = True
    """False for models that refuse the system role, such as Gemma's; the system text then stands before the user's, with an
    empty line between. This setting and the next three change by themselves, for the run, where the server says that it
    refuses the other way; each answer's record says so."""
    max_tokens_parameter: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the chat endpoint calls the limit; OpenAI's reasoning models only take `max_completion_tokens`."""
    send_temperature: bool = True
    """False for models that refuse a temperature, such as OpenAI's reasoning models."""
    send_stop: bool = True
    """False for models that refuse stop strings, such as OpenAI's newer reasoning models, and for those that stop within
    their thoughts; the answer is then cut at the first of them after it has come."""
    structured_output: Literal["json_schema", "json_object", "none"] = "json_schema"
    """How an answer's JSON schema is asked for: as the schema, as "some JSON", or only by the prompt's own words."""
    timeout_s: PositiveFloat = 60.0
    """Longest silence of the server within one try, in seconds."""
    deadline_s: PositiveFloat = 600.0
    """Time for a whole batch with all its tries, in seconds; what is not answered then comes back as an error."""
    max_attempts: PositiveInt = 5
    """Tries per request, the first included."""
    max_concurrency: PositiveInt = 8
    """Requests in flight at the same time."""
    initial_backoff_s: PositiveFloat = 0.5
    """Upper end of the random wait after the first failed try, in seconds; it doubles with each further one."""
    max_backoff_s: PositiveFloat = 30.0
    """Where the doubling stops, in seconds. A longer `Retry-After` of the server is still obeyed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.api_key_env):
            # Not quoted: people paste the key itself here.
            raise ValueError(
                "api_key_env is no name of an environment variable, expected capital letters, digits and _, for instance "
                "'OPENAI_API_KEY'. If it is the key itself, put it into the environment"
            )
        if self.base_url is not None:
            _check_base_url(self.base_url)
        if self.api_version is not None and (not self.api_version.strip() or self.base_url is None):
            raise ValueError(
                f"api_version is {self.api_version!r} and base_url {self.base_url!r}, expected both for Azure OpenAI, such "
                "as '2024-10-21' and 'https://my-resource.openai.azure.com'"
            )
        if self.initial_backoff_s > self.max_backoff_s:
            raise ValueError(
                f"initial_backoff_s ({self.initial_backoff_s!r}) is above max_backoff_s ({self.max_backoff_s!r})"
            )

    @property
    def identity(self) -> str:
        """See `LanguageModel.identity`. The server is no part of it: one's own server may move to another port."""
        asked = f"{self.model} {self.endpoint} {self.structured_output} {self.send_temperature}"
        return asked + ("" if self.send_stop else " no stop") + ("" if self.send_system else " no system")

    @property
    def address(self) -> str:
        """Where the API starts, the environment looked up; with Azure's `api_version`, since that changes what is there."""
        url = self.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        return url.rstrip("/") + (f" {self.api_version}" if self.api_version else "")


def _check_base_url(base_url: str) -> None:
    """Refuse what the client cannot use, and what would put a secret into recorded settings. Quotes no secret."""
    try:
        url = urlsplit(base_url)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("base_url is not a usable address, expected one like 'http://127.0.0.1:8000/v1'")
    if url.username is not None or url.password is not None or url.query or url.fragment:
        raise ValueError(
            f"base_url for host {url.hostname!r} carries credentials, a query or a fragment, expected scheme, host and path "
            "only. Put the key into the environment"
        )
