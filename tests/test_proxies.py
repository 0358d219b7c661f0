"""Proxies in the environment, with a real one: this server answers requests for any host that are sent to it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from llm_server import LlmServer, Reply

from softprompt_registry.errors import LanguageModelError
from softprompt_registry.language_models.openai_compatible import OpenAICompatible
from softprompt_registry.language_models.openai_settings import OpenAICompatibleConfig
from softprompt_registry.language_models.protocol import Completion, CompletionRequest

ELSEWHERE = "http://model.invalid/v1"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch, llm_server: LlmServer) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def ask(base_url: str) -> Completion | LanguageModelError:
    with OpenAICompatible(OpenAICompatibleConfig("tiny", base_url, max_attempts=1)) as model:
        [result] = model.complete([CompletionRequest("hello")])
    return result


@pytest.mark.supports("target LLMs", "HTTP proxies of the environment, `NO_PROXY`", "used")
@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_of_the_environment_is_used(llm_server: LlmServer, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, llm_server.url.removesuffix("/v1"))
    answer = ask(ELSEWHERE)
    assert isinstance(answer, Completion) and answer.text == "HELLO"
    assert llm_server.received[0].path == "http://model.invalid/v1/chat/completions"


@pytest.mark.parametrize(
    "environment",
    [
        {"ALL_PROXY": "socks5://127.0.0.1:1", "NO_PROXY": "localhost,127.0.0.1"},
        {"ALL_PROXY": "socks://127.0.0.1:1", "no_proxy": "127.0.0.1"},
        {"HTTPS_PROXY": "socks5h://127.0.0.1:1"},  # of another scheme than the server's address
        {"HTTP_PROXY": "http://127.0.0.1:1", "NO_PROXY": "*"},
    ],
)
def test_a_proxy_that_is_not_on_the_way_does_no_harm(
    llm_server: LlmServer, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    """Bug: the client prepares every proxy, and ended in a traceback about one that it would not have used."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert isinstance(ask(llm_server.url), Completion)


@pytest.mark.supports(
    "target LLMs",
    "SOCKS proxies without `socksio`, malformed proxy addresses",
    "refused; the variable is named, never its address",
)
@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("socks5://me:hunter2@127.0.0.1:1", "is one for SOCKS, which needs the package socksio"),
        ("socks://me:hunter2@127.0.0.1:1", "cannot be used"),
        ("http://me:hunter2@host:port", "cannot be used"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, address: str, words: str) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)  # as where it is not installed
    monkeypatch.setenv("ALL_PROXY", address)
    with pytest.raises(LanguageModelError, match=f"model 'tiny': the proxy in ALL_PROXY {words}; expected") as caught:
        ask(ELSEWHERE)
    assert "name 'model.invalid' in NO_PROXY to go without" in str(caught.value)
    assert "hunter2" not in str(caught.value) and caught.value.__cause__ is None


def test_certificates_that_cannot_be_read_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").touch()
    for name in ("empty.pem", "none.pem"):
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / name))
        with pytest.raises(
            LanguageModelError, match=r"certificates in SSL_CERT_FILE or SSL_CERT_DIR cannot be read \("
        ):
            ask(ELSEWHERE)


def test_a_proxy_that_fails_is_named(llm_server: LlmServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert "goes through the proxy in HTTP_PROXY; NO_PROXY can exempt the server" in str(ask(llm_server.url))
    monkeypatch.setenv("HTTP_PROXY", llm_server.url.removesuffix("/v1"))
    llm_server.replies = [Reply(407)]
    assert "HTTP 407" in str(error := ask(ELSEWHERE)) and "through the proxy in HTTP_PROXY" in str(error)
