"""Checkpoints of a translator's training."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from softprompt_registry.errors import ArtifactError
from softprompt_registry.storage import read_json, write_json


@dataclass
class TrainingState:
    """What a checkpoint holds."""

    epoch: int
    train_losses: list[float]
    validation_losses: list[float]
    best_loss: float = math.inf
    best_epoch: int = 0


class Checkpoint:
    """What is trained, optimizer moments and losses of the last whole epoch, as safetensors and JSON (no pickle)."""

    def __init__(self, folder: Path, key: str) -> None:
        """
        Args:
            key: digest of the training; a checkpoint of another one is not resumed.
        """
        self.folder = folder
        self.key = key

    def save(
        self, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, state: TrainingState
    ) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in parameters.items():
            moments = optimizer.state[parameter]
            tensors[f"weight/{name}"] = parameter.detach().contiguous()
            tensors |= {f"{moment}/{name}": moments[moment] for moment in ("exp_avg", "exp_avg_sq", "step")}
        # The number of the epoch is part of the file name: JSON and tensors can never be of two epochs.
        file = f"epoch-{state.epoch}.safetensors"
        save_file(tensors, self.folder / f".{file}")
        (self.folder / f".{file}").rename(self.folder / file)
        previous = [path for path in self.folder.glob("epoch-*.safetensors") if path.name != file]
        write_json(self.folder / "state.json", {"key": self.key, "file": file, **asdict(state)})
        for path in previous:
            path.unlink()

    def load(
        self, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> TrainingState | None:
        """Put the last checkpoint of the same training in place; None if there is none."""
        stored = {}
        if (self.folder / "state.json").is_file():
            stored = read_json(self.folder / "state.json", "a training checkpoint")
        if stored.pop("key", None) != self.key:
            (self.folder / "best.safetensors").unlink(missing_ok=True)
            return None
        tensors = _tensors_in(self.folder / stored.pop("file"))
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors[f"weight/{name}"])
            moments: dict[str, Any] = {m: tensors[f"{m}/{name}"] for m in ("exp_avg", "exp_avg_sq", "step")}
            device = parameter.device
            optimizer.state[parameter] = {m: value if m == "step" else value.to(device) for m, value in moments.items()}
        return TrainingState(**stored)

    def save_best(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        partial = self.folder / ".best.safetensors"
        save_file({name: parameter.detach().contiguous() for name, parameter in parameters.items()}, partial)
        partial.rename(self.folder / "best.safetensors")

    def load_best(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        path = self.folder / "best.safetensors"
        if not path.is_file():
            raise ArtifactError(f"finishing a translator: its best epoch {str(path)!r} is missing. Train it again.")
        for name, tensor in _tensors_in(path).items():
            parameters[name].data.copy_(tensor)


def _tensors_in(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint; the names of earlier ones hold that of the adapter."""
    return {re.sub(r"\.training_[0-9a-f]+\.", ".", name): tensor for name, tensor in load_file(path).items()}
