"""A loaded base model: joining soft tokens and text, logits, scores, continuations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from softprompt_registry.base_models.decoding import JoinedBatch, RowDecoder, at_least_float32
from softprompt_registry.base_models.prefixes import Prefixes, PrefixRows, prefixes_in
from softprompt_registry.base_models.reference import BaseModelRef
from softprompt_registry.errors import BaseModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEQUENCE_LAYOUT = "[soft tokens][BOS][text][EOS]"
LAYOUT_WITHOUT_BOS = "[soft tokens][text][EOS]"
_POSITIONS_BY_COLUMN = ("mpt", "gpt_neo")
"""Model types that count distances in columns, padding included, whatever `position_ids` say."""


@dataclass(frozen=True)
class TargetScores:
    """Teacher-forced scores of target texts."""

    log_likelihood: torch.Tensor
    """(B,) float32, or float64 of a model in float64: sum over target tokens, in nats."""
    num_tokens: torch.Tensor
    """(B,) int64: target tokens per row, the end token included when it was a target."""


class BaseModel:
    """A frozen causal LLM with its tokenizer. Build with `load_base_model`.

    Raises:
        BaseModelError: the model reads more of a token than its embedding, so that soft tokens would lack something.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ref: BaseModelRef) -> None:
        import torch

        # transformers' own annotations do not cover what its models do; from here on they are taken on trust.
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.ref = ref
        model.requires_grad_(False)
        model.eval()
        _forget_generation_settings(self.model)
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with torch.no_grad():
            logits = self.model(input_ids=ids, use_cache=False).logits
            self._require_embeddings_alone(ids, logits)
            self._plain_head = self._has_plain_head(ids, logits)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def max_positions(self) -> int:
        """The longest sequence, soft tokens included, that the model was made for."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30))

    @property
    def decoder(self) -> Any:
        """The part that turns embeddings into hidden states: the model without its head, and without what reads images."""
        return self.model.get_decoder()

    @property
    def input_embeddings(self) -> torch.Tensor:
        """(V, D): what the model reads for each token. Of most models the embedding matrix; Gemma's is scaled."""
        import torch

        table = self.model.get_input_embeddings()
        weight: torch.Tensor = table.weight.detach()
        if type(table) is torch.nn.Embedding:
            return weight
        with torch.no_grad():
            scaled: torch.Tensor = table(torch.arange(len(weight), device=weight.device))
        return scaled

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(…, D): what the model reads for token ids, in its dtype and on its device.

        Args:
            ids: (…) int64, on the CPU.

        Raises:
            BaseModelError: an id beyond the embedding matrix, as some tokenizers have for added tokens.
        """
        table = self.model.get_input_embeddings()
        if ids.numel() and int(ids.max()) >= len(table.weight):
            beyond = int(ids.max())
            raise BaseModelError(
                f"reading a text with base model {self.ref}: its tokenizer gives the token "
                f"{self.tokenizer.convert_ids_to_tokens(beyond)!r} the id {beyond}, expected ids below {len(table.weight)}, "
                "the rows of its embedding matrix. Leave that token out of the text, or use a tokenizer that fits the model."
            )
        embeds: torch.Tensor = table(ids.to(self.device))
        return embeds

    def tokenize(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """Token ids of `text` alone, without BOS or EOS: the layout adds them by id, whatever the tokenizer does.

        Args:
            special_tokens: read the names of special tokens in the text (`</s>`) as these tokens. Otherwise they are text, so
                that no input can end its row.
        """
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special_tokens)[
            "input_ids"
        ]
        return ids

    def names_special_tokens(self, text: str) -> bool:
        """Whether a text holds the name of a special token, as templates in a chat format do."""
        return any(name in text for name in self._special_tokens)

    @cached_property
    def _special_tokens(self) -> list[str]:
        return list(self.tokenizer.all_special_tokens)

    @property
    def bos(self) -> list[int]:
        """The BOS id as a list; empty for a tokenizer without one."""
        return [] if self.tokenizer.bos_token_id is None else [int(self.tokenizer.bos_token_id)]

    @property
    def eos_id(self) -> int:
        """The tokenizer's end token, which every target ends with."""
        return int(self.tokenizer.eos_token_id)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """All tokens that end a generated text, `eos_id` first: a chat model names more, such as the end of a turn.

        The config's count only where the generation config names none, as in transformers: they may be a class's default.
        """
        configs = (self.model.generation_config, self.model.config)
        named: Any = next((ids for config in configs if (ids := getattr(config, "eos_token_id", None)) is not None), [])
        return tuple(dict.fromkeys([self.eos_id, *([named] if isinstance(named, int) else named)]))

    def until_end(self, ids: Sequence[int], *, keep_end: bool = False) -> list[int]:
        """Generated ids up to the first end token; padding behind it goes, and the end token too unless `keep_end`."""
        ends = self.end_ids
        place = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        return list(ids[: place + keep_end])

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text of `ids`, without special tokens.

        Args:
            after: what they were written behind. Alone, many tokenizers drop the space that a text begins with.
        """
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        if after:
            before, whole = self.decode(after), self.decode([*after, *ids])
            # Where a character is spread over both, neither text begins the other.
            return whole.removeprefix(before) if whole.startswith(before) else text
        return text

    def prefixes(self, soft_prompts: torch.Tensor, lead: Sequence[int] = ()) -> Prefixes | None:
        """What the model computes for soft prompts and the first text tokens, to be shared by all rows that begin with them.

        Args:
            soft_prompts: (G, K, D); gradients flow back to them.
            lead: L token ids with which the text of every row begins (`shared_lead`).
        Returns:
            None for a model that keeps other things than all keys and values (sliding windows, recurrent layers), or that
            would count padding between prefix and text as distance: its rows take the soft prompts themselves.
        """
        import torch

        if self.model.config.model_type in _POSITIONS_BY_COLUMN:
            return None
        embeds = soft_prompts.to(self.dtype)
        if lead:
            first = self.embed(torch.tensor(lead))  # (L, D)
            embeds = torch.cat([embeds, first.expand(len(embeds), -1, -1)], dim=1)  # (G, K + L, D)
        output = self.decoder(inputs_embeds=embeds, use_cache=True)
        return prefixes_in(getattr(output, "past_key_values", None), tuple(lead))

    def join(
        self,
        soft_prompts: torch.Tensor | PrefixRows | None,
        token_ids: Sequence[Sequence[int]],
        *,
        pad_side: Literal["left", "right"],
    ) -> JoinedBatch:
        """Put soft tokens before text. The one place where the two meet.

        Args:
            soft_prompts: (B, K, D); or which of some `prefixes` each row begins with, for the same numbers in less time; or
                None for text alone.
            token_ids: B rows of ids, BOS already in place.
            pad_side: `right` for teacher forcing, `left` to generate, so that the last column is the last token.
        """
        import torch

        if isinstance(soft_prompts, PrefixRows):
            token_ids = soft_prompts.after_lead(token_ids)
        lengths = torch.tensor([len(ids) for ids in token_ids], device=self.device)
        longest = max(len(ids) for ids in token_ids)
        padded = torch.zeros(len(token_ids), longest, dtype=torch.long)  # (B, T)
        for row, ids in enumerate(token_ids):
            padded[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        embeds = self.embed(padded)  # (B, T, D)
        num_soft = 0
        if isinstance(soft_prompts, torch.Tensor):
            num_soft = soft_prompts.shape[1]
            embeds = torch.cat([soft_prompts.to(embeds), embeds], dim=1)  # (B, K + T, D)
        total = num_soft + longest
        columns = torch.arange(total, device=self.device)
        if pad_side == "right":
            mask = columns < (num_soft + lengths)[:, None]  # (B, N)
        else:
            shift = (longest - lengths)[:, None]  # (B, 1): real tokens move right by this much
            mask = columns >= shift
            source = (columns - shift).clamp(min=0)  # (B, N)
            embeds = embeds.gather(1, source[:, :, None].expand(-1, -1, embeds.shape[2]))
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        if not isinstance(soft_prompts, PrefixRows):
            return JoinedBatch(embeds, mask.long(), positions)
        num_before = soft_prompts.prefixes.num_tokens
        mask = torch.cat([mask.new_ones(len(lengths), num_before), mask], dim=1)  # (B, K + T)
        return JoinedBatch(embeds, mask.long(), num_before + positions, soft_prompts.cache())

    def logits_at(self, joined: JoinedBatch, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Next-token logits at chosen positions only.

        The vocabulary projection costs more than several layers, so hidden states are first gathered into one
        contiguous matrix; slicing (B, n, D) instead takes a slow path of the matrix product.

        Args:
            rows, columns: (M,) int64 positions in `joined.inputs_embeds`.
        Returns:
            (M, V) float32, or float64 of a model in float64.
        """
        call = {
            "inputs_embeds": joined.inputs_embeds,
            "attention_mask": joined.attention_mask,
            "position_ids": joined.position_ids,
            "use_cache": False,
        }
        if joined.cache is not None:
            call |= {"past_key_values": joined.cache, "use_cache": True}
        if not self._plain_head:
            return at_least_float32(self.model(**call).logits[rows, columns])
        hidden = self.decoder(**call).last_hidden_state[rows, columns]  # (M, D), contiguous
        return at_least_float32(self.model.get_output_embeddings()(hidden))

    def score_targets(
        self,
        soft_prompts: torch.Tensor | PrefixRows | None,
        prompt_ids: Sequence[Sequence[int]],
        target_ids: Sequence[Sequence[int]],
    ) -> TargetScores:
        """Log-likelihood of each target after its prompt; differentiable in `soft_prompts`.

        Args:
            soft_prompts: see `join`.
            prompt_ids: B rows, BOS first.
            target_ids: B rows, not empty; EOS last where it is a target.
        """
        import torch

        joined = self.join(
            soft_prompts, [[*p, *t] for p, t in zip(prompt_ids, target_ids, strict=True)], pad_side="right"
        )
        # Where the text begins: after the soft tokens, or before column 0 if its first tokens are not among the columns.
        start = joined.inputs_embeds.shape[1] - max(
            len(p) + len(t) for p, t in zip(prompt_ids, target_ids, strict=True)
        )
        rows: list[int] = []
        columns: list[int] = []
        targets: list[int] = []
        for row, (prompt, target) in enumerate(zip(prompt_ids, target_ids, strict=True)):
            # The token at column c is predicted from column c - 1.
            first = start + len(prompt) - 1
            assert first >= 0, "nothing stands before the target"
            rows += [row] * len(target)
            columns += range(first, first + len(target))
            targets += target
        row_index = torch.tensor(rows, device=self.device)
        logits = self.logits_at(joined, row_index, torch.tensor(columns, device=self.device))  # (M, V)
        chosen = torch.tensor(targets, device=self.device)
        token_log_likelihood = -torch.nn.functional.cross_entropy(logits, chosen, reduction="none")  # (M,)
        zeros = token_log_likelihood.new_zeros(len(prompt_ids))
        return TargetScores(
            zeros.index_add(0, row_index, token_log_likelihood),
            torch.tensor([len(target) for target in target_ids], device=self.device),
        )

    def generate(
        self,
        soft_prompts: torch.Tensor | PrefixRows | None,
        prompt_ids: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        keep_end: bool = False,
    ) -> list[list[int]]:
        """Continue each row until one of `end_ids` or the length cap; greedy at temperature 0.

        Args:
            keep_end: give the end token too, in rows that came to one.
        Returns:
            B lists of new token ids, without padding. Sampling depends on `seed` and on the batch, not on
            torch's global random state, which is left as it was.
        """
        import torch

        joined = self.join(soft_prompts, prompt_ids, pad_side="left")
        if joined.cache is not None:
            if temperature > 0:
                raise ValueError("rows that share a prefix are continued greedily only")
            return RowDecoder(self, joined).greedy(max_new_tokens, keep_end=keep_end)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 0.95}
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            output = self.model.generate(
                inputs_embeds=joined.inputs_embeds,
                attention_mask=joined.attention_mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=self.eos_id,
                eos_token_id=list(self.end_ids),
                **sampling,
            )
        rows: list[list[int]] = output.tolist()
        return [self.until_end(row, keep_end=keep_end) for row in rows]

    def _require_embeddings_alone(self, ids: torch.Tensor, by_id: torch.Tensor) -> None:
        """Refuse a model such as Falcon-H1 or Gemma 3n, measured on one token: it scales embeddings where it is given ids
        alone, or looks up more under an id."""
        by_embedding = self.model(inputs_embeds=self.model.get_input_embeddings()(ids), use_cache=False).logits
        if not bool((by_id - by_embedding).abs().max() <= 0.01 * by_id.abs().max()):
            raise BaseModelError(
                f"loading base model {self.ref}: from a token's id it computes something else than from its embedding (its "
                f"model type is {self.model.config.model_type!r}); expected the same, since soft tokens have no ids. Use "
                "another base model."
            )

    def _has_plain_head(self, ids: torch.Tensor, logits: torch.Tensor) -> bool:
        """Whether the logits are `lm_head(hidden)` and nothing else, measured on one token.

        Some models scale or cap them, each under settings of its own; those take the full forward pass.
        """
        import torch

        if self.decoder is self.model:  # without a body of its own under its head it is asked as a whole
            return False
        projected = self.model.get_output_embeddings()(self.decoder(input_ids=ids, use_cache=False).last_hidden_state)
        if projected.shape != logits.shape:
            return False
        difference = (projected - logits).abs().max() / logits.abs().max()
        return bool(difference <= torch.finfo(logits.dtype).eps)


def _forget_generation_settings(model: Any) -> None:
    """Keep only the special tokens of a checkpoint's generation settings: the others (penalties, suppressed tokens, least
    lengths) must not bend what is measured."""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    if own is not None:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        model.generation_config = GenerationConfig(**{name: getattr(own, name) for name in names})
