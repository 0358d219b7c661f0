"""A request as the tokens that a model in this process reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from softprompt_registry.language_models.protocol import CompletionRequest


def prompt_ids(tokenizer: PreTrainedTokenizerBase, request: CompletionRequest) -> list[int]:
    """Token ids of a request: in the tokenizer's chat template, up to where the answer begins, if it has one; else the
    system text, an empty line and the prompt after the BOS, as a completions endpoint gets them."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": request.prompt}]
        if request.system is not None:
            messages.insert(0, {"role": "system", "content": request.system})
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        bos: list[int] = []  # the template writes it
    else:
        text = request.prompt if request.system is None else f"{request.system}\n\n{request.prompt}"
        bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bos + ids


def cut_at_stop(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    places = [place for place in (text.find(word) for word in stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)
