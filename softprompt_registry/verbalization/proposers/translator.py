"""Candidates from a trained translator: the greedy text, sampled ones, beams, and texts with given beginnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.errors import ConfigError
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.translators.translator import SoftPromptReader, TextModel
from softprompt_registry.verbalization.repeated_labels import dedupe_list
from softprompt_registry.verbalization.verbalizer import Candidate, VerbalizationConfig, distinct

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Way:
    """How one candidate of each soft prompt is written."""

    name: str
    prefill: str
    temperature: float
    seed: int
    prefill_counts: bool = False
    """Whether the score counts the prefill as if it had been written."""


class TranslatorProposer:
    """Reads soft prompts with a translator; prompts of the same K share a batch.

    The candidates of a soft prompt, in order:

    - `translator:greedy`, and `num_candidates - 1` of `translator:sampled`, all beginning with the settings' prefill;
    - `translator:prefill`: for each of `prefills` as many, greedy and sampled (paper, appendix A.12);
    - `translator:beam`: the different ones among the `num_beams` texts that a beam search finds, best first.

    A label list that names labels more than once is given without the repetitions and, where the length cap ended it, without
    its last label, which may be half a word (`dedupe_list`); the list as it was written is no candidate. All other texts are
    given as they are written, and so are all texts for generation tasks: a translator writes no label lists for those.

    A score is the mean log-likelihood per token of the text as it was written, repetitions included, and EOS, in nats, under
    the translator. The settings' prefill is given to all texts and not scored. A beginning among `prefills` is scored as part
    of its text: otherwise a text would rank above another because its beginning was free.

    Raises:
        ConfigError: fewer than two beams, a blank prefill, or a prefill in the settings besides `prefills`.
    """

    name = "translator"

    def __init__(
        self,
        translator: SoftPromptReader,
        rows_per_batch: int = 16,
        *,
        prefills: Sequence[str] = (),
        num_beams: int | None = None,
    ) -> None:
        """
        Args:
            rows_per_batch: texts that are written together.
            prefills: beginnings that each make candidates of their own.
            num_beams: width of the beam search, and how many of its texts become candidates; None for no such search.
        """
        if num_beams is not None and num_beams < 2:
            raise ConfigError(
                f"setting up the proposer {self.name!r}: num_beams is {num_beams}; expected 2 or more. One beam is the "
                "greedy text, which is always among the candidates: leave num_beams out."
            )
        if any(not prefill.strip() for prefill in prefills):
            raise ConfigError(
                f"setting up the proposer {self.name!r}: the prefills are {list(prefills)!r}; expected none that is blank. "
                "Texts without a prefill are always among the candidates."
            )
        self.translator = translator
        self.rows_per_batch = rows_per_batch
        self.prefills = tuple(prefills)
        self.num_beams = num_beams

    def propose(self, soft_prompts: Sequence[SoftPrompt], config: VerbalizationConfig) -> list[list[Candidate]]:
        if config.prefill and self.prefills:
            raise ConfigError(
                f"writing candidates by {self.name!r}: found the prefill {config.prefill!r} in the settings, which all texts "
                f"would begin with, and {len(self.prefills)} prefills of their own candidates; expected one or the other. "
                "Leave one of them out."
            )
        proposals: list[list[Candidate]] = [[] for _ in soft_prompts]
        for rows in _batches(soft_prompts, self.rows_per_batch):
            batch = [soft_prompts[row] for row in rows]
            with self.translator.soft_tokens(batch) as soft:
                for way in self._ways(config):
                    written = self._write(batch, soft, way, config.max_new_tokens)
                    for row, candidate in zip(rows, written, strict=True):
                        proposals[row].append(candidate)
        if self.num_beams is not None:
            for rows in _batches(soft_prompts, max(self.rows_per_batch // self.num_beams, 1)):
                batch = [soft_prompts[row] for row in rows]
                with self.translator.soft_tokens(batch) as soft:
                    for row, candidates in zip(rows, self._beams(batch, soft, self.num_beams, config), strict=True):
                        proposals[row] += candidates
        return proposals

    def _ways(self, config: VerbalizationConfig) -> Iterator[_Way]:
        for prefill in ("", *self.prefills):
            for number in range(config.num_candidates):
                name = "prefill" if prefill else "greedy" if number == 0 else "sampled"
                yield _Way(
                    f"{self.name}:{name}",
                    prefill or config.prefill,
                    temperature=0.0 if number == 0 else config.temperature,
                    seed=config.seed + number,
                    prefill_counts=bool(prefill),
                )

    def _write(
        self, soft_prompts: Sequence[SoftPrompt], soft: torch.Tensor, way: _Way, max_new_tokens: int
    ) -> list[Candidate]:
        """One candidate for each of B soft prompts, which the base model reads as soft: (B, K, D)."""
        base = self.translator.base_model
        beginning = base.tokenize(way.prefill) if way.prefill else []
        rows = base.generate(
            soft,
            [base.bos + beginning] * len(soft),
            max_new_tokens=max_new_tokens,
            temperature=way.temperature,
            seed=way.seed,
        )
        if way.prefill_counts:
            scores = mean_log_likelihoods(base, soft, base.bos, [beginning + row for row in rows])
        else:
            scores = mean_log_likelihoods(base, soft, base.bos + beginning, rows)
        return [
            Candidate(self._text(soft_prompt, way.prefill, row, max_new_tokens), way.name, score, prefill=way.prefill)
            for soft_prompt, row, score in zip(soft_prompts, rows, scores, strict=True)
        ]

    def _beams(
        self, soft_prompts: Sequence[SoftPrompt], soft: torch.Tensor, num_beams: int, config: VerbalizationConfig
    ) -> list[list[Candidate]]:
        """At most `num_beams` different candidates, best first, for each of B soft prompts, read as soft: (B, K, D)."""
        base = self.translator.base_model
        if not isinstance(base, BaseModel):
            raise ConfigError(
                f"writing candidates by {self.name!r}: found {num_beams} beams for a translator that does not run in "
                "transformers, expected none. Leave num_beams out, or load the translator in transformers."
            )
        head = base.bos + (base.tokenize(config.prefill) if config.prefill else [])
        cap = config.max_new_tokens
        found = beam_search(base, soft, head, num_beams=num_beams, max_new_tokens=cap)
        flat = [row for rows in found for row in rows]
        scores = mean_log_likelihoods(base, soft.repeat_interleave(num_beams, dim=0), head, flat)
        best_first = []
        for number, (soft_prompt, rows) in enumerate(zip(soft_prompts, found, strict=True)):
            own = scores[number * num_beams : (number + 1) * num_beams]
            # Sorted before doubles go: of two lists that are one without their repetitions the likelier stays.
            scored = sorted(zip(own, rows, strict=True), key=lambda item: item[0], reverse=True)
            texts = [(self._text(soft_prompt, config.prefill, row, cap), score) for score, row in scored]
            name = f"{self.name}:beam"
            found_texts = [Candidate(text, name, score, prefill=config.prefill) for text, score in texts]
            best_first.append(distinct(found_texts))
        return best_first

    def _text(self, soft_prompt: SoftPrompt, prefill: str, row: Sequence[int], max_new_tokens: int) -> str:
        """A candidate's text from the token ids that follow the prefill."""
        base = self.translator.base_model
        text = (prefill + base.decode(row, after=base.tokenize(prefill) if prefill else ())).strip()
        if soft_prompt.record.kind == "generation":
            return text
        return dedupe_list(text, prefill=prefill.strip(), cut=len(row) >= max_new_tokens)


def mean_log_likelihoods(
    base_model: TextModel, soft: torch.Tensor, head: Sequence[int], texts: Sequence[Sequence[int]]
) -> list[float]:
    """Mean log-likelihood of each text and EOS after [soft tokens][head], in nats per token.

    EOS is the tokenizer's, which translators learn to write, whatever token ended the text: so all texts compare.

    Args:
        soft: (B, K, D)
        head: token ids that all texts follow, BOS first.
        texts: B rows of token ids, without EOS.
    """
    scores = base_model.score_targets(soft, [head] * len(texts), [[*text, base_model.eos_id] for text in texts])
    means: list[float] = (scores.log_likelihood / scores.num_tokens).tolist()
    return means


def beam_search(
    base_model: BaseModel, soft: torch.Tensor, head: Sequence[int], *, num_beams: int, max_new_tokens: int
) -> list[list[list[int]]]:
    """For each soft prompt the `num_beams` continuations of [soft tokens][head] that a beam search finds.

    Texts that have ended are compared by their log-likelihood per token. The search ends when no text that is still written
    is likelier per token than those found; transformers does it.

    Args:
        soft: (B, K, D)
        head: token ids, BOS first.
    Returns:
        B lists of `num_beams` rows of token ids, without head, end token and padding.
    """
    import torch

    joined = base_model.join(soft, [head] * len(soft), pad_side="left")
    with torch.no_grad():
        output = base_model.model.generate(
            inputs_embeds=joined.inputs_embeds,
            attention_mask=joined.attention_mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=base_model.eos_id,
            eos_token_id=list(base_model.end_ids),
            num_beams=num_beams,
            num_return_sequences=num_beams,
            do_sample=False,
            length_penalty=1.0,
            early_stopping=False,
        )
    rows: list[list[int]] = output.tolist()  # B * num_beams rows
    ended = [base_model.until_end(row) for row in rows]
    return [ended[start : start + num_beams] for start in range(0, len(ended), num_beams)]


def _batches(soft_prompts: Sequence[SoftPrompt], rows_per_batch: int) -> Iterator[list[int]]:
    """Places of soft prompts that share a batch: at most `rows_per_batch`, all of one K."""
    order = sorted(range(len(soft_prompts)), key=lambda row: soft_prompts[row].num_virtual_tokens)
    for start in range(0, len(order), rows_per_batch):
        piece = order[start : start + rows_per_batch]
        for size in sorted({soft_prompts[row].num_virtual_tokens for row in piece}):
            yield [row for row in piece if soft_prompts[row].num_virtual_tokens == size]
