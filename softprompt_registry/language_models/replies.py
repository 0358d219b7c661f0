"""What a server that speaks OpenAI's API sends back, read with care: the client does not check a reply."""

from __future__ import annotations

import json
from typing import Literal, NamedTuple

CONTENT_FILTER = "content_filter"
"""Finish reason of an answer that the provider held back."""
REFUSAL = "refusal"
"""Finish reason that we give an answer which is a refusal; servers say `stop` then."""


class BadReply(Exception):
    """A reply with status 200 that holds no answer."""


class Reply(NamedTuple):
    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    model: str | None
    """That answered, by the server's own name."""


def read_reply(content: bytes, endpoint: Literal["chat", "completions"]) -> Reply:
    """The answer in a reply's body. A null content (a refusal, a filtered answer) is the answer "".

    Raises:
        BadReply: there is no answer in it.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        # `from None`: the decoder's error would carry the whole body along.
        raise BadReply(f"{len(content)} bytes that are not JSON") from None
    if not isinstance(body, dict):
        raise BadReply(f"a JSON {type(body).__name__} instead of an object")
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        # Some gateways report a failure behind them with status 200.
        raise BadReply(f"no choices; {provider_message(body['error'])}" if body.get("error") else "no choices")
    choice = choices[0]
    holder, field = (choice, "text") if endpoint == "completions" else (choice.get("message"), "content")
    if not isinstance(holder, dict) or (field not in holder and "refusal" not in holder):
        raise BadReply(f"the first choice has no {field}")
    text = holder.get(field)
    if text is not None and not isinstance(text, str):
        raise BadReply(f"{field} is a {type(text).__name__} instead of a string")
    finish_reason = choice.get("finish_reason")
    if not text and holder.get("refusal") and finish_reason != CONTENT_FILTER:
        finish_reason = REFUSAL
    usage, model = body.get("usage"), body.get("model")
    return Reply(
        # JSON may hold lone surrogates, which nothing can write that takes UTF-8.
        text=(text or "").encode("utf-8", "replace").decode("utf-8"),
        finish_reason=None if finish_reason is None else str(finish_reason),
        prompt_tokens=_token_count(usage, "prompt_tokens"),
        completion_tokens=_token_count(usage, "completion_tokens"),
        model=model if isinstance(model, str) else None,
    )


def provider_message(body: object) -> str:
    """The sentence in an error body, whose place differs: OpenAI and vLLM say `message`, FastAPI says `detail`."""
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or body
    return "" if body is None else str(body)


def _token_count(usage: object, field: str) -> int:
    """0 when the server does not say: several local servers report no usage."""
    count = usage.get(field) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count >= 0 else 0
