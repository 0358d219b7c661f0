"""A request as the tokens that a model in this process reads."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Literal, cast

from softprompt_registry.errors import ConfigError
from softprompt_registry.language_models.protocol import joined_prompt, messages_of
from softprompt_registry.language_models.replies import ENDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from softprompt_registry.language_models.protocol import CompletionRequest


PromptFormat = Literal["chat", "plain"]


SYSTEM_JOINED = "send_system=False"
"""What a completion says of a system text that stands in the user's, as a server's does."""


class LocalPrompts:
    """How a model in this process reads requests.

    Raises:
        ConfigError: it is sent chats, and its tokenizer has no template for them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, name: str) -> None:
        if prompt_format == "chat" and _template_of(tokenizer) == "":
            raise ConfigError(
                f"opening language model {name!r}: its tokenizer has no chat template; expected one, since prompt_format is "
                "'chat'. Name a file with one in `options.chat_template`, or set `options.prompt_format` to 'plain' if it is "
                "a base model."
            )
        self._tokenizer = tokenizer
        self._format = prompt_format
        self._joins_system = prompt_format == "chat" and not takes_system(tokenizer)
        self.identity = f"{prompt_format}{' no system' if self._joins_system else ''}"
        """Part of the model's identity."""
        self.writes_thoughts = prompt_format == "chat" and _writes_thoughts(tokenizer)
        """Whether a stop string may end the model's thoughts, which ends nothing."""

    def ids(self, request: CompletionRequest) -> list[int]:
        """Token ids of a request up to where the answer begins."""
        return prompt_ids(self._tokenizer, request, self._format)

    def opened_thoughts(self, ids: list[int]) -> str:
        """The tag that begins a model's thoughts, if the prompt ends with it and what is written begins in them; else ""."""
        return "<think>" if str(self._tokenizer.decode(ids[-8:])).rstrip().endswith("<think>") else ""

    def adapted(self, request: CompletionRequest) -> str | None:
        """See `Completion.adapted`."""
        return SYSTEM_JOINED if self._joins_system and request.system is not None else None


def takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its chat template writes a system text down. Some refuse it, as Gemma's does, and some silently drop it."""
    template = _template_of(tokenizer)
    return template is None or _writes_system(tokenizer, template)


@lru_cache(maxsize=8)
def _writes_system(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    from jinja2 import TemplateError

    mark = "Be brief."
    messages = [{"role": "system", "content": mark}, {"role": "user", "content": "Hi"}]
    try:
        return mark in str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError:
        return False


def _writes_thoughts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its chat template knows of thoughts, in which a stop string ends nothing."""
    template = _template_of(tokenizer) or ""
    return any(end in template for end in (*ENDS, "<|channel|>"))


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A tokenizer's chat template, "" without one; None for a tokenizer that formats chats by itself, as Mistral's."""
    if not hasattr(tokenizer, "chat_template"):
        return None
    return str(tokenizer.chat_template or "")


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, request: CompletionRequest, prompt_format: PromptFormat
) -> list[int]:
    """Token ids of a request up to where the answer begins.

    `chat`: in the tokenizer's chat template, the system text before the user's where it takes none. `plain`: the BOS, the
    system text, an empty line and the prompt, as a completions endpoint gets them.
    """
    ids: list[int]
    if prompt_format == "chat":
        messages = messages_of(request, takes_system=takes_system(tokenizer))
        ids = cast(
            list[int],
            tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False),
        )
        return list(ids)
    ids = tokenizer(joined_prompt(request), add_special_tokens=False)["input_ids"]
    return ids if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id), *ids]
