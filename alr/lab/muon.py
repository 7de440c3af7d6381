"""Muon for the dense opponents, in float32: torch's works out its steps in bfloat16, which most CPUs do slowly.

Dims: b matrices of one shape, m out_features, n in_features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..factor import exact
from ..rules import orthogonalize, shape_scale


class Muon(torch.optim.Muon):
    """torch.optim.Muon with the same settings and state, its orthogonal factor found in float32, shape by shape.

    On a CPU without bfloat16 units torch's steps can cost more than all the rest of a small model's training.  Where torch's
    rounds to bfloat16 the two differ by that rounding and by nothing else.
    """

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One step of all matrices that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes: dict[tuple, list] = {}
            for p in group["params"]:
                if p.grad is not None and p.numel():                # a layer of rank 0 has nothing to move
                    shapes.setdefault((*p.shape, p.dtype, p.device), []).append(p)
            for (m, n, _, device), ps in shapes.items():
                grads, averages = [p.grad for p in ps], [self.average(p) for p in ps]
                torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
                X = torch.stack(torch._foreach_lerp(grads, averages, group["momentum"]) if group["nesterov"] else averages)
                lr = group["lr"] * shape_scale(group["adjust_lr_fn"] or "original", m, n)
                with exact(device):                                 # (b, m, n)
                    Z = orthogonalize(X, group["ns_steps"]) if m >= n else orthogonalize(X.mT, group["ns_steps"]).mT
                torch._foreach_mul_(ps, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(ps, list(Z.unbind()), alpha=-lr)
        return loss

    def average(self, p: torch.Tensor) -> torch.Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)     # (m, n)
        return state["momentum_buffer"]
