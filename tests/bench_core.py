"""Speed as ratios in one run: `make bench`.  Each pair is a group; the reference is the scripts' way or the dense layer.

Not collected by `make test`: machines are noisy.  Read the ratio of medians within a group, never across machines.
"""

import pytest
import torch

from alr import LowRankLinear
from alr.estimate import stable_rank, stable_rank_power
from alr.factor import svd_core, svd_full


def factors(m, n, r):
    torch.manual_seed(0)
    return torch.randn(m, r) / m ** 0.5, torch.randn(r, n) / n ** 0.5


@pytest.mark.parametrize("way", ["full SVD of W (v10)", "core"])
@pytest.mark.parametrize("m, n, r, k", [(512, 512, 64, 60), (2048, 512, 64, 60), (4096, 4096, 256, 240)])
def bench_resize(benchmark, way, m, n, r, k):
    benchmark.group = f"resize {m}x{n}, r {r} -> {k}"
    U, V = factors(m, n, r)
    resize = svd_core if way == "core" else lambda U, V, k: svd_full(U, V, k, eps=1e-8)
    rounds = 1 if m == 4096 and way != "core" else 7
    benchmark.pedantic(resize, (U, V, k), rounds=rounds, warmup_rounds=0 if rounds == 1 else 2)


@pytest.mark.parametrize("way", ["form W, 5 power iterations (v10)", "two Gram matrices"])
@pytest.mark.parametrize("m, n, r", [(512, 512, 64), (2048, 512, 64)])
def bench_stable_rank(benchmark, way, m, n, r):
    benchmark.group = f"stable rank {m}x{n}, r {r}"
    U, V = factors(m, n, r)
    f = (lambda: stable_rank(U, V)) if way.startswith("two") else (lambda: stable_rank_power(U @ V, 5))
    benchmark.pedantic(f, rounds=200, warmup_rounds=20)


@pytest.mark.parametrize("way", ["dense", "low rank 64"])
@pytest.mark.parametrize("n, m", [(512, 2048), (512, 512)])
def bench_layer(benchmark, way, n, m):
    flops = 64 * (m + n) / (m * n)
    benchmark.group = f"forward + backward {n}->{m}, 2,048 tokens (FLOP ratio {1 / flops:.2f}x)"
    torch.manual_seed(0)
    layer = torch.nn.Linear(n, m, bias=False) if way == "dense" else LowRankLinear(n, m, 64, bias=False)
    x, g = torch.randn(2048, n, requires_grad=True), torch.randn(2048, m)

    def step():
        layer(x).backward(g)

    benchmark.pedantic(step, rounds=30, warmup_rounds=5)
