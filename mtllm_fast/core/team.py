"""The processes that ``torchrun`` or ``accelerate launch`` started to share one job."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

# A process may be done long before another: waiting for it is no sign of a dead one, which the launcher looks after.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Team:
    """This process among ``size``. Process 0 decides and merges, the others work.

    Attributes:
        rank: number of this process.
        size: how many there are; 1 without a launcher.
        local_rank: number on this machine, which is that of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def own_gpu(self) -> str | None:
        """The GPU that this process of a team has to itself, or None: alone, or no GPU."""
        import torch

        return f"cuda:{self.local_rank}" if self.size > 1 and torch.cuda.is_available() else None

    def share(self, value: Any) -> Any:
        """Process 0's value, in every process; waits for process 0."""
        if self.size == 1:
            return value
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box)
        return box[0]

    def wait(self) -> None:
        """Until every process has come here."""
        if self.size > 1:
            from torch import distributed

            distributed.barrier()


def join_team() -> Team:
    """The team that the launcher's variables ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` speak of.

    Processes talk by gloo, over the network alone: nothing is put on a GPU.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Team()
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=_PATIENCE)
    return Team(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
