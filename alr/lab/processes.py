"""One process or many: what torchrun starts.

    torchrun --nproc-per-node 2 -m alr.train ...

Every process holds the whole model and sees its share of each batch; gradients are averaged by `group.average_gradients`,
and `RankAdapter` lets rank 0 decide.  Rank 0 alone writes files.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor


class Workers:
    """The processes of this launch: `rank` is this one's number, `size` how many there are (1 without torchrun)."""

    def __init__(self):
        self.size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
        self.rank = int(os.environ["RANK"]) if self.size > 1 else 0
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank)) if self.size > 1 else None
        self._mine = False                              # did we open the process group?

    def start(self, device: torch.device) -> None:
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            self._mine = True

    def stop(self) -> None:
        if self._mine:
            dist.destroy_process_group()
            self._mine = False

    def share(self, x: Tensor) -> Tensor:
        """This process's rows of a batch: (B, T) -> (B / size, T)."""
        return x if self.size == 1 else x[self.rank::self.size]

    def total(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, value: object) -> list:
        """What each process holds, in the order of their numbers; plain values and tensors on the CPU."""
        if self.size == 1:
            return [value]
        found: list = [None] * self.size
        dist.all_gather_object(found, value)
        return found
