"""A request as the tokens that a model in this process reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

from softprompt_registry.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from softprompt_registry.language_models.protocol import CompletionRequest


PromptFormat = Literal["chat", "plain"]


def require_format(tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, name: str) -> None:
    """Refuse to send chats to a model that has no template for them, before the first request."""
    if prompt_format == "chat" and _template_of(tokenizer) == "":
        raise ConfigError(
            f"opening language model {name!r}: its tokenizer has no chat template; expected one, since prompt_format is "
            "'chat'. Name a file with one in `options.chat_template`, or set `options.prompt_format` to 'plain' if it is a "
            "base model."
        )


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A tokenizer's chat template, "" without one; None for a tokenizer that formats chats by itself, as Mistral's."""
    if not hasattr(tokenizer, "chat_template"):
        return None
    return str(tokenizer.chat_template or "")


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, request: CompletionRequest, prompt_format: PromptFormat
) -> list[int]:
    """Token ids of a request up to where the answer begins.

    `chat`: in the tokenizer's chat template. `plain`: the BOS, the system text, an empty line and the prompt, as a
    completions endpoint gets them.
    """
    ids: list[int]
    if prompt_format == "chat":
        messages = [{"role": "user", "content": request.prompt}]
        if request.system is not None:
            messages.insert(0, {"role": "system", "content": request.system})
        ids = cast(
            list[int],
            tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False),
        )
        return list(ids)
    text = request.prompt if request.system is None else f"{request.system}\n\n{request.prompt}"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id), *ids]


def cut_at_stop(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    places = [place for place in (text.find(word) for word in stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)
