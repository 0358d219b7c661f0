"""The vocabulary tokens that lie nearest to each soft token: a negative control.

Nearest tokens of a soft prompt say little about what it does (prompt waywardness, cited in section 2 of the paper); a
translator that is not better than this has learned nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.verbalization.verbalizer import Candidate, VerbalizationConfig


class NearestTokensProposer:
    """One candidate: for each soft token the word with the highest cosine in the input embedding matrix."""

    name = "nearest_tokens"

    def __init__(self, base_model: BaseModel) -> None:
        self.base_model = base_model

    def propose(self, soft_prompts: Sequence[SoftPrompt], config: VerbalizationConfig) -> list[list[Candidate]]:
        import torch

        # Without the rows behind the last token, with which many models pad the matrix.
        known = self.base_model.input_embeddings[: len(self.base_model.tokenizer)]
        vocabulary = torch.nn.functional.normalize(known.float(), dim=1)  # (tokens, D)
        proposals = []
        for soft_prompt in soft_prompts:
            soft = torch.nn.functional.normalize(soft_prompt.embeddings.to(vocabulary.device), dim=1)  # (K, D)
            nearest = (soft @ vocabulary.T).argmax(dim=1).tolist()
            words = [self.base_model.decode([token]).strip() for token in nearest]
            proposals.append([Candidate(", ".join(word for word in words if word), self.name)])
        return proposals
