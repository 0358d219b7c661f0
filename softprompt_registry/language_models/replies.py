"""What a language model sends back, read with care: a server's body, which the client does not check, and any engine's text,
which may hold the model's thoughts beside its answer."""

from __future__ import annotations

import json
import re
from typing import Any, Literal, NamedTuple

CONTENT_FILTER = "content_filter"
"""Finish reason of an answer that the provider withheld."""
REFUSAL = "refusal"
"""Finish reason that we give an answer which is a refusal; servers say `stop` then."""
CUT = "length"
"""Finish reason of an answer that ran on to the length limit."""
ONLY_THOUGHTS = "only_thoughts"
"""Finish reason that we give an answer which ended, though not at the length limit, before anything but thoughts was said."""


# --- A server's body ---


class BadReply(Exception):
    """A reply with status 200 that holds no answer.

    `was_answered`: the model did answer, in a form that cannot be read; a new try would cost as much and come out the same.
    """

    def __init__(self, found: str, *, was_answered: bool = False) -> None:
        super().__init__(found)
        self.was_answered = was_answered


class Reply(NamedTuple):
    text: str
    """With the thoughts that the server sent apart from the answer, in `<think>` tags before it."""
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    model: str | None
    """That answered, by the server's own name."""


def read_reply(content: bytes, endpoint: Literal["chat", "completions"]) -> Reply:
    """The answer in a reply's body. A null content (a refusal, a filtered answer, thoughts alone) is the answer "".

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
        # Some gateways report a failure behind them with status 200, also by an empty list: nothing was generated.
        raise BadReply(f"no choices; {provider_message(body['error'])}" if body.get("error") else "no choices")
    choice = choices[0]
    finish_reason = choice.get("finish_reason")
    holder, field = (choice, "text") if endpoint == "completions" else (choice.get("message"), "content")
    if not isinstance(holder, dict):
        raise BadReply("the first choice has no message", was_answered=True)
    thoughts = "".join(_thoughts_of(holder.get(name)) for name in ("reasoning_content", "reasoning"))
    # Where thoughts took the whole answer, some servers leave its field out.
    if field not in holder and not (thoughts or "refusal" in holder or finish_reason == CUT):
        raise BadReply(f"the first choice has no {field}", was_answered=True)
    text, within = _parts_of(holder.get(field), field)
    thoughts = thoughts or within
    if not text and holder.get("refusal") and finish_reason != CONTENT_FILTER:
        finish_reason = REFUSAL
    if thoughts:
        text = f"<think>{thoughts}</think>{text}"
    usage, model = body.get("usage"), body.get("model")
    return Reply(
        # JSON may hold lone surrogates, which nothing can write that takes UTF-8.
        text=text.encode("utf-8", "replace").decode("utf-8"),
        finish_reason=None if finish_reason is None else str(finish_reason),
        prompt_tokens=_token_count(usage, "prompt_tokens"),
        completion_tokens=_token_count(usage, "completion_tokens"),
        model=model if isinstance(model, str) else None,
    )


def _parts_of(content: Any, field: str) -> tuple[str, str]:
    """Answer and thoughts of a content: a text, null, or a list of parts, of which unknown types count as neither."""
    if content is None or isinstance(content, str):
        return content or "", ""
    if not isinstance(content, list) or not all(isinstance(part, (str, dict)) for part in content):
        raise BadReply(f"{field} is a {type(content).__name__} instead of a string", was_answered=True)
    text = thoughts = ""
    for part in content:
        if isinstance(part, str):
            text += part
        elif part.get("type", "text") in ("text", "output_text") and isinstance(part.get("text"), str):
            text += part["text"]
        else:
            thoughts += _thoughts_of(part.get("thinking") or part.get("reasoning"))
    return text, thoughts


def _thoughts_of(value: Any) -> str:
    """Thoughts as a text or as a list of text parts; "" of anything else."""
    if isinstance(value, list):
        return "".join(_thoughts_of(part.get("text") if isinstance(part, dict) else part) for part in value)
    return value if isinstance(value, str) else ""


def provider_message(body: object) -> str:
    """The sentence in an error body, whose place differs: OpenAI and vLLM say `message`, FastAPI says `detail`."""
    if isinstance(body, list) and body:  # Google's servers
        body = body[0]
    if isinstance(body, dict):
        inner = body.get("message") or body.get("detail") or body.get("error") or body
        return provider_message(inner) if inner is not body else str(body)
    return "" if body is None else str(body)


def _token_count(usage: object, field: str) -> int:
    """0 when the server does not say: several local servers report no usage."""
    count = usage.get(field) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count >= 0 else 0


# --- A model's text ---

_BLOCK = re.compile(r"<(think|thinking|thought)>.*?</\1>|\[THINK\].*?\[/THINK\]", re.DOTALL)
ENDS = ("</think>", "[/THINK]")
"""Alone, they end thoughts as well: many chat templates put the opening tag into the prompt."""
_NEVER_ENDED = re.compile(r"\s*(?:<(?:think|thinking|thought)>|\[THINK\])")
_CHANNELS = re.compile(r"\s*(?:<\|start\|>\w*)?<\|channel\|>|analysis.*assistantfinal", re.DOTALL)
"""The channels of gpt-oss; without its special tokens where an engine leaves those out of the text."""
_FINAL_CHANNEL = re.compile(
    r".*(?:<\|channel\|>\s*final[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>|assistantfinal)(.*?)(?:<\|\w+\|>|\Z)",
    re.DOTALL,
)


class Answered(NamedTuple):
    text: str
    finish_reason: str | None
    raw: str | None
    """With the thoughts; None if there are none."""


def read_answer(raw: str, finish_reason: str | None, stop: tuple[str, ...] = ()) -> Answered:
    """The answer in what a model wrote: without its thoughts, and up to the first stop string.

    Thoughts that were cut off are followed by no answer, so that the text is "" then. `finish_reason` says why.

    Args:
        stop: strings that the model was not stopped at while it wrote.
    """
    answer = without_thoughts(raw)
    text, stopped = cut_at_stop(answer, stop)
    if stopped:
        finish_reason = "stop"
    if answer == raw:
        return Answered(text, finish_reason, None)
    if not text.strip() and finish_reason not in (CUT, CONTENT_FILTER, REFUSAL):
        finish_reason = ONLY_THOUGHTS
    return Answered(text, finish_reason, raw)


def without_thoughts(text: str) -> str:
    """A model's text without its thoughts and the white space behind them; a text without thoughts as it is."""
    if _CHANNELS.match(text):
        final = _FINAL_CHANNEL.match(text)
        return final[1].strip() if final else ""
    answer = _BLOCK.sub("", text)
    for end in ENDS:
        answer = answer.rpartition(end)[2]
    if _NEVER_ENDED.match(answer):
        return ""
    return text if answer == text else answer.lstrip()


def cut_at_stop(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    places = [place for place in (text.find(word) for word in stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)
