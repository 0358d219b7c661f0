"""Long work in parts that are on the disk as soon as they are done: what proposers have written, what was verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.dod.task import Pair
from softprompt_registry.fingerprints import digest_of_json
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.storage import check_format_version, read_json, write_json
from softprompt_registry.verbalization.verbalizer import Candidate, Proposer, VerbalizationConfig
from softprompt_registry.verbalization.verification import Verification
from softprompt_registry.verbalization.verifier import Verifier, VerifierConfig

FORMAT_VERSION = 1


class KeptParts:
    """A folder with a file for each finished part, under the digest of all that the part was made from."""

    def __init__(self, folder: Path | None, origin: str) -> None:
        """
        Args:
            folder: None keeps nothing.
            origin: digest of what all parts are made from, such as base model and settings.
        """
        self._folder = folder
        self._origin = origin

    def get(self, part: Sequence[Any]) -> Any:
        """What was kept of a part; None if it is not done."""
        path = self._path(part)
        if path is None or not path.exists():
            return None
        what = f"a part of a stopped run in {str(path)!r}"
        record = read_json(path, what)
        check_format_version(record, FORMAT_VERSION, what)
        return record["value"]

    def put(self, part: Sequence[Any], value: Any) -> None:
        """Keep a part, whole or not at all."""
        path = self._path(part)
        if path is not None:
            write_json(path, {"format_version": FORMAT_VERSION, "value": value})

    def _path(self, part: Sequence[Any]) -> Path | None:
        return None if self._folder is None else self._folder / f"{digest_of_json([self._origin, *part])}.json"


class KeptProposer:
    """A proposer whose texts of the same soft prompts are written once."""

    def __init__(self, proposer: Proposer, kept: KeptParts) -> None:
        self.name = proposer.name
        self._proposer = proposer
        self._kept = kept

    def propose(self, soft_prompts: Sequence[SoftPrompt], config: VerbalizationConfig) -> list[list[Candidate]]:
        # Sampled texts depend on the prompts that share a batch, so all of them are one part.
        part = ["candidates", self.name, [prompt.id for prompt in soft_prompts], asdict(config)]
        found = self._kept.get(part)
        if found is not None:
            return [[Candidate(**entries) for entries in of_one] for of_one in found]
        written = self._proposer.propose(soft_prompts, config)
        self._kept.put(part, [[asdict(candidate) for candidate in of_one] for of_one in written])
        return written


class KeptVerifier(Verifier):
    """A verifier that scores the same texts on the same pairs once."""

    def __init__(self, base_model: BaseModel, config: VerifierConfig, kept: KeptParts) -> None:
        super().__init__(base_model, config)
        self._kept = kept

    def verify(
        self,
        soft_prompt: SoftPrompt,
        texts: Sequence[str],
        *,
        pairs: Sequence[Pair] = (),
        inputs: Sequence[str] = (),
        template: str | None = None,
        test_order: bool = False,
    ) -> Verification:
        items = [[(pair.input, pair.output) for pair in pairs], list(inputs), template]
        part = ["verification", soft_prompt.id, soft_prompt.record.template, list(texts), items, test_order]
        found = self._kept.get(part)
        if found is not None:
            return Verification.from_json(found)
        made = super().verify(soft_prompt, texts, pairs=pairs, inputs=inputs, template=template, test_order=test_order)
        self._kept.put(part, made.to_json())
        return made
