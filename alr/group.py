"""Several processes, one model: what data-parallel training asks of a rank that changes.

Every process holds the whole model and sees its share of each batch.  Rank 0 (of the processes) decides about ranks (of
the layers); the others are told.  Where torch.distributed is not in use all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Group:
    """The processes that train one model together: torch's default group where one is open, or a given one.

    rank: this process's number.  size: how many there are.  Pickles as itself only where it is alone or the default one.
    """

    def __init__(self, group: Any = None):
        self.group = group

    @property
    def open(self) -> bool:
        return dist.is_available() and dist.is_initialized()

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group) if self.open else 1

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group) if self.open else 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over the processes, in place; one call per device and dtype."""
        if self.size > 1:
            for part in batches(tensors):
                flat = torch.cat([x.reshape(-1) for x in part])
                dist.all_reduce(flat, group=self.group)
                spread(flat, part)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Give all processes rank 0's tensors, in place; one call per device and dtype."""
        if self.size > 1:
            for part in batches(tensors):
                flat = torch.cat([x.reshape(-1) for x in part])
                dist.broadcast(flat, self.source, group=self.group)
                spread(flat, part)

    def say(self, value: Any, device: torch.device) -> Any:
        """Rank 0's plain value, on all processes."""
        if self.size == 1:
            return value
        said = [value if self.rank == 0 else None]
        dist.broadcast_object_list(said, self.source, group=self.group, device=device)
        return said[0]

    def agree(self, problem: Exception | None, device: torch.device) -> None:
        """Raise what stopped rank 0, on all processes; without it they would wait for rank 0 for ever."""
        if problem is not None and self.rank > 0:
            raise problem
        problem = self.say(None if problem is None else retold(problem), device) if self.size > 1 else problem
        if problem is not None:
            raise problem

    @property
    def source(self) -> int:
        """Rank 0 of the group, as the world counts it."""
        return 0 if self.group is None else dist.get_global_rank(self.group, 0)


def retold(error: Exception) -> Exception:
    """The error as another process can be told it: its type and its text."""
    try:
        return type(error)(str(error))
    except Exception:                                               # a type that wants more than a text
        return RuntimeError(f"{type(error).__name__}: {error}")


def batches(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors that can travel together: of one device and dtype, in the order in which they came."""
    by: dict[tuple, list[Tensor]] = {}
    for x in tensors:
        by.setdefault((x.device, x.dtype), []).append(x)
    return list(by.values())


def spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write a flat tensor back into those that it was made from."""
    for x, part in zip(tensors, flat.split([x.numel() for x in tensors])):
        x.copy_(part.reshape(x.shape))


@torch.no_grad()
def average_gradients(model: nn.Module, group: Any = None) -> None:
    """Replace every gradient by its mean over the processes, in place; call it after backward, on all of them.

    It takes the place of DistributedDataParallel, which holds on to Parameters and so cannot follow a rank that changes.
    A parameter that only some processes used counts as zero on the others; one that none used keeps no gradient.  The host
    waits for the device only on a process where some parameter has no gradient.
    Does nothing without an open process group.
    """
    group = Group(group)
    if group.size == 1:
        return
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        return
    here = [p.grad is not None for p in params]
    used = torch.ones(len(params), device=params[0].device, dtype=torch.float32)                # a copy of `here` would wait
    if not all(here):
        used.copy_(torch.tensor(here, dtype=torch.float32))
    group.sum([used])
    # where all are used here, all are used by somebody, and the host need not wait for the device to tell
    live = params if all(here) else [p for p, users in zip(params, used.tolist()) if users]
    if not live:
        return
    for p in live:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    group.sum([p.grad for p in live])
    torch._foreach_div_([p.grad for p in live], float(group.size))
