"""What the base model itself says of a soft prompt when hidden states of the prompt are patched into it: InSPEcT.

The training-free baseline of the paper (section 4.4). The layer pair decides how well it reads: choose it on training tasks
(`evaluation/layer_grid.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.reference import require_same_base
from softprompt_registry.errors import ConfigError
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.verbalization.patching import (
    LayerPair,
    PatchedRow,
    check_pairs,
    cut_description,
    read_examples,
    read_patched,
    source_states,
    target_prompt,
)
from softprompt_registry.verbalization.verbalizer import Candidate, VerbalizationConfig


class InspectProposer:
    """One greedy candidate for each soft prompt; soft prompts of the same K and kind share batches.

    Of the settings it takes `max_new_tokens`: there is no sampling, and a prefill would stand where the descriptions stand.

    Args:
        pair: the layer pair, or one for each kind of task: label lists and instructions may be read best at different ones.
        examples: example descriptions by kind of task, such as a layer grid's; our own for kinds that are missing.

    Raises:
        ConfigError: there is no pair for the kind of a soft prompt, or one has a layer that the base model lacks.
    """

    name = "inspect"

    def __init__(
        self,
        base_model: BaseModel,
        pair: LayerPair | Mapping[str, LayerPair],
        examples: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.base_model = base_model
        self.pair = pair
        self.examples = examples or {}
        check_pairs([pair] if isinstance(pair, LayerPair) else list(pair.values()), base_model.ref.num_layers)

    def propose(self, soft_prompts: Sequence[SoftPrompt], config: VerbalizationConfig) -> list[list[Candidate]]:
        import torch

        groups: dict[tuple[bool, int], list[int]] = {}
        for number, soft_prompt in enumerate(soft_prompts):
            require_same_base(
                "reading a soft prompt through patched layers",
                f"soft prompt {soft_prompt.record.task!r}",
                soft_prompt.record.base_model,
                "the loaded model",
                self.base_model.ref,
            )
            key = (soft_prompt.record.kind == "classification", soft_prompt.num_virtual_tokens)
            groups.setdefault(key, []).append(number)
        proposals: list[list[Candidate]] = [[] for _ in soft_prompts]
        for members in groups.values():
            kind = soft_prompts[members[0]].record.kind
            pair = self._pair_for(kind)
            examples = self.examples.get(kind) or read_examples(kind)
            stacked = torch.stack([soft_prompts[number].embeddings for number in members])  # (G, K, D)
            found = read_patched(
                self.base_model,
                source_states(self.base_model, stacked),
                [PatchedRow(place, pair) for place in range(len(members))],
                target_prompt(self.base_model, examples),
                max_new_tokens=config.max_new_tokens,
            )
            for number, ids in zip(members, found, strict=True):
                text = cut_description(self.base_model.decode(ids))
                proposals[number] = [Candidate(text, f"{self.name}:{pair.source},{pair.target}")]
        return proposals

    def _pair_for(self, kind: str) -> LayerPair:
        if isinstance(self.pair, LayerPair):
            return self.pair
        if kind not in self.pair:
            raise ConfigError(
                f"reading a soft prompt through patched layers: there is a layer pair for {list(self.pair)}, and none "
                f"for a task of kind {kind!r}. Choose one on training tasks of that kind."
            )
        return self.pair[kind]
