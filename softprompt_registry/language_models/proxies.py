"""Proxies in the environment: which one a request to a server goes through, and what is said of one that cannot be used."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from softprompt_registry.errors import LanguageModelError

if TYPE_CHECKING:
    import openai


def proxy_variable(address: str) -> str | None:
    """The environment variable with the proxy to a server; None where a request goes straight to it."""
    url = urlsplit(address.partition(" ")[0])
    if proxy_bypass(url.netloc.rpartition("@")[2]):
        return None
    proxies = getproxies()
    for scheme in (url.scheme, "all"):
        if proxies.get(scheme):
            name = f"{scheme}_proxy"
            return next((known for known in (name, name.upper()) if known in os.environ), "the system's settings")
    return None


def http_client(model: str, address: str, event_hooks: dict[str, list[Any]]) -> openai.DefaultHttpxClient:
    """The provider's HTTP client, with the proxies of the environment.

    Raises:
        LanguageModelError: the proxy to the server, or the file with certificates, cannot be used.
    """
    import openai

    try:
        return openai.DefaultHttpxClient(event_hooks=event_hooks)
    except OSError as error:
        raise LanguageModelError(
            f"connecting to model {model!r}: the certificates in SSL_CERT_FILE or SSL_CERT_DIR cannot be read "
            f"({error.strerror or type(error).__name__}); expected a PEM file or a folder of such files.",
            retryable=False,
            hint="Correct the variable, or unset it.",
        ) from error
    # ImportError without the package for SOCKS, ValueError or the library's own for an address.
    except Exception as error:
        variable = proxy_variable(address)
        if variable is None:  # the client prepares all proxies, also one that no request to this server goes through
            return openai.DefaultHttpxClient(event_hooks=event_hooks, trust_env=False)
        # Neither its text nor its address: it may hold a password.
        found = (
            "is one for SOCKS, which needs the package socksio" if isinstance(error, ImportError) else "cannot be used"
        )
        what = "install socksio, " if isinstance(error, ImportError) else ""
        raise LanguageModelError(
            f"connecting to model {model!r}: the proxy in {variable} {found}; expected an address such as "
            "'http://host:3128' or 'socks5://host:1080'.",
            retryable=False,
            hint=f"Correct it, {what}or name {urlsplit(address).hostname!r} in NO_PROXY to go without a proxy.",
        ) from None
