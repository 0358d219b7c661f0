"""The base model guesses the instruction from training pairs: the baseline that shows whether the soft prompt was needed.

It never sees a soft prompt, only the pairs that it was tuned on (Honovich et al., 2022, call this instruction induction).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import PositiveInt

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.config import settings
from softprompt_registry.dod.prompt_files import PromptFile, read_prompt
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import ConfigError, DataError
from softprompt_registry.language_models.local_prompts import PromptFormat, prompt_ids
from softprompt_registry.language_models.protocol import CompletionRequest
from softprompt_registry.soft_prompts.encoding import choose_pairs, encode_inside
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.soft_prompts.token_budget import pieces, tokens_that_fit
from softprompt_registry.verbalization.verbalizer import Candidate, VerbalizationConfig

_OWN_FOLDER = Path(__file__).parent


@settings
class InductionConfig:
    """What the base model is shown. How many texts it writes, and how, is in `VerbalizationConfig`."""

    num_pairs: PositiveInt = 8
    """Training pairs in the prompt, in turn from each label. Those that do not fit are left out."""
    max_input_tokens: PositiveInt = 100
    """Longer inputs are cut there; outputs are not."""
    max_prompt_tokens: PositiveInt = 1024
    """Length cap of the whole prompt, pairs included; the base model's context may be shorter still."""
    answer_begins: str = "The instruction was:"
    """How the model's answer begins; what follows is the text."""
    prompts_folder: str | None = None
    """A folder with a changed copy of instruction_induction.txt, which has the place {pairs}; None takes the package's."""
    tokens_per_forward: PositiveInt | None = None
    """Padded tokens of a forward pass; None takes what fits."""
    seed: int = 0
    """Seed for the choice of pairs."""


class InstructionInductionProposer:
    """The greedy text, then sampled ones, from the pairs of each soft prompt's task.

    The prompt is put into the tokenizer's chat template where it has one. Without one the model is taken for one that only
    continues a text: then the text ends with its first line. A score is the mean log-likelihood per token of the text, in
    nats, under the base model that has read the pairs; it cannot be compared with that of a translator.

    Raises:
        DataError: a soft prompt's task is unknown or has no training pairs.
        ConfigError: the prompt file is missing or has no place {pairs}, or not one pair fits into the prompt.
    """

    name = "instruction_induction"

    def __init__(
        self, base_model: BaseModel, tasks: Mapping[str, Task], settings: InductionConfig | None = None
    ) -> None:
        """
        Args:
            tasks: by the name of the task in a soft prompt's record.
        """
        self.base_model = base_model
        self.tasks = tasks
        self.settings = settings or InductionConfig()
        self._prompt = _read_prompt(self.settings.prompts_folder)
        tokenizer = base_model.tokenizer
        # A tokenizer without the attribute formats chats by itself.
        chats = not hasattr(tokenizer, "chat_template") or bool(tokenizer.chat_template)
        self.prompt_format: PromptFormat = "chat" if chats else "plain"

    def propose(self, soft_prompts: Sequence[SoftPrompt], config: VerbalizationConfig) -> list[list[Candidate]]:
        base = self.base_model
        prompts = [self.prompt_of(prompt.record.task, config) for prompt in soft_prompts]
        if not prompts:
            return []
        proposals: list[list[Candidate]] = [[] for _ in soft_prompts]
        tokens = self.settings.tokens_per_forward or tokens_that_fit(base, 1)
        longest = config.max_new_tokens
        for rows in pieces(range(len(prompts)), lambda row: len(prompts[row]) + longest, tokens):
            heads = [prompts[row] for row in rows]
            for number in range(config.num_candidates):
                written = base.generate(
                    None,
                    heads,
                    max_new_tokens=longest,
                    temperature=0.0 if number == 0 else config.temperature,
                    seed=config.seed + number,
                )
                name = f"{self.name}:{'greedy' if number == 0 else 'sampled'}"
                for row, candidate in zip(rows, self._candidates(heads, written, name, config.prefill), strict=True):
                    proposals[row] += candidate
        return proposals

    def prompt_of(self, task_name: str, config: VerbalizationConfig) -> list[int]:
        """Token ids of what the base model reads for a task, up to where its text begins, or continues the prefill."""
        task = self.tasks.get(task_name)
        pairs = [] if task is None else choose_pairs(task, "train", self.settings.num_pairs, self.settings.seed)
        if not pairs:
            found = "it is not among the tasks handed in" if task is None else "it has no training pairs"
            raise DataError(
                f"guessing the instruction of task {task_name!r}: {found}; expected pairs to guess from. Hand in the tasks "
                "that the soft prompts were tuned on."
            )
        limit = min(self.settings.max_prompt_tokens, self.base_model.max_positions - config.max_new_tokens)
        shown: list[str] = []
        ids: list[int] = []
        for pair in pairs:
            tried = self._ids([*shown, self._pair_text(pair)], config.prefill)
            if len(tried) <= limit:
                shown.append(self._pair_text(pair))
                ids = tried
        if not ids:
            raise ConfigError(
                f"guessing the instruction of task {task_name!r}: not one of its {len(pairs)} pairs fits into a prompt of "
                f"{limit} tokens, with {config.max_new_tokens} kept for the text. Raise max_prompt_tokens, or lower "
                "max_input_tokens or max_new_tokens."
            )
        return ids

    def _pair_text(self, pair: Pair) -> str:
        tokens = self.base_model.tokenize(pair.input)
        text = pair.input
        if len(tokens) > self.settings.max_input_tokens:
            # The cut may go through a character, of which a replacement sign is left.
            text = self.base_model.decode(tokens[: self.settings.max_input_tokens]).rstrip("\ufffd")
        return f"Input: {text.strip()}\nOutput: {pair.output}"

    def _ids(self, pairs: Sequence[str], prefill: str) -> list[int]:
        request = CompletionRequest(self._prompt.fill({"pairs": "\n\n".join(pairs)}), system=self._prompt.system)
        head = prompt_ids(self.base_model.tokenizer, request, self.prompt_format)
        begun = self.settings.answer_begins + (f" {prefill}" if prefill else "")
        if self.prompt_format == "chat":
            return head + self.base_model.tokenize(begun)
        return head + encode_inside(self.base_model, f"\n\n{begun}")

    def _candidates(
        self, heads: Sequence[Sequence[int]], written: Sequence[Sequence[int]], name: str, prefill: str
    ) -> list[list[Candidate]]:
        """One candidate for each row; none where nothing was written."""
        import torch

        base = self.base_model
        kept = [list(row) if self.prompt_format == "chat" else first_line(base, row, prefill) for row in written]
        rows = [row for row, ids in enumerate(kept) if ids]
        candidates: list[list[Candidate]] = [[] for _ in kept]
        if rows:
            with torch.no_grad():
                scores = base.score_targets(None, [heads[row] for row in rows], [kept[row] for row in rows])
            for row, score in zip(rows, (scores.log_likelihood / scores.num_tokens).tolist(), strict=True):
                text = (prefill + base.decode(kept[row], after=base.tokenize(prefill) if prefill else ())).strip()
                if self.prompt_format == "plain":
                    text = text.partition("\n")[0]
                text = _unquoted(text.strip())
                candidates[row] = [Candidate(text, name, score)] if text else []
        return candidates


def first_line(base_model: BaseModel, ids: Sequence[int], begun: str = "") -> list[int]:
    """The tokens up to the line break that ends the first line with anything in it, that break included; else all.

    Args:
        begun: what stands before the tokens in that line.
    """
    for end in range(1, len(ids) + 1):
        if "\n" in (begun + base_model.decode(ids[:end])).lstrip():
            return list(ids[:end])
    return list(ids)


def _unquoted(text: str) -> str:
    """The text without quotation marks around all of it."""
    inner = text[1:-1]
    around = len(text) > 2 and text[0] + text[-1] in ('""', "“”", "''")
    return inner.strip() if around and not any(mark in inner for mark in '"“”') else text


def _read_prompt(folder: str | None) -> PromptFile:
    name = "instruction_induction"
    if folder is not None and Path(folder).is_dir() and not (Path(folder) / f"{name}.txt").is_file():
        raise ConfigError(
            f"reading the prompt of instruction induction: there is no {name}.txt in {folder!r}. Copy the package's file "
            "there and change it, or leave prompts_folder out."
        )
    return read_prompt(name, folder or str(_OWN_FOLDER), ("pairs",))
