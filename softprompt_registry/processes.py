"""Several processes at one piece of work, as `accelerate launch` starts them: who does what, and sums over all of them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

SECONDS_FOR_MAIN = 30.0
"""How long a failed process waits for the launcher to end it because the main process failed too."""


@dataclass(frozen=True)
class Processes:
    """The processes that work together. By default there is this one alone, and nothing is waited for.

    All but `is_main` and `share_of` must be called by every process, in the same order. The main process alone writes.
    """

    count: int = 1
    index: int = 0
    """Rank of this process, from 0; the main process has 0."""
    device: str = "cpu"
    """Where tensors that are summed must lie."""

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def share_of(self, num_rows: int) -> range:
        """The rows of this process: neighbours, as many as any other process has, give or take one; maybe none."""
        return range(num_rows * self.index // self.count, num_rows * (self.index + 1) // self.count)

    def totals(self, *values: float) -> list[float]:
        """Each value summed over the processes, in float64; all get the same numbers."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sums)
        return [float(value) for value in sums.tolist()]

    def main_says(self, value: float) -> float:
        """The main process's `value`, whatever the others hand in."""
        return self.totals(value if self.is_main else 0.0)[0]

    def wait(self) -> None:
        """Go on when all are here."""
        self.totals(0.0)

    def add_up_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Put the sum over the processes, not their mean, in place of each gradient; a missing one counts as zeros."""
        if self.count == 1:
            return
        parameters = list(parameters)
        gradients = [torch.zeros_like(item) if item.grad is None else item.grad for item in parameters]
        # One message for all of them: an adapter has hundreds of small matrices.
        sums = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(sums)
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, total in zip(parameters, sums.split(sizes), strict=True):
            parameter.grad = total.view_as(parameter)


ALONE = Processes()


@contextlib.contextmanager
def launched_processes() -> Iterator[Processes]:
    """For the block, the processes that `accelerate launch` or `torchrun` started; `ALONE` where none did.

    From here on `cuda` is the GPU of this process. When the block fails in the main process, that error is the one to be
    shown, and the launcher ends the others. An error of another process is therefore delayed by `SECONDS_FOR_MAIN`:
    most are the main process's own or follow from its end; what is left after that time is raised, and ends the launch.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or "LOCAL_RANK" not in os.environ:
        yield ALONE
        return
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    try:
        yield Processes(state.num_processes, state.process_index, str(state.device))
    except Exception:
        if not state.is_main_process:
            time.sleep(SECONDS_FOR_MAIN)
        raise
    state.destroy_process_group()
