"""Speed as ratios in one run: `make bench`.  Each pair is a group; the reference is the scripts' way or the dense layer.

Not collected by `make test`: machines are noisy.  Read the ratio of medians within a group, never across machines.
"""

import pytest
import torch

from alr import LowRankLinear, low_rank_layers, recipes
from alr.estimate import stable_rank, stable_rank_power
from alr.factor import svd_core, svd_full
from alr.lab.model import GPT, GPTConfig
from alr.optim import PairOptimizer, pairs
from alr.tangent import Tangent


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


STEP = ["forward + backward", "AdamW on the factors", "pair optimizer on the factors", "tangent step on the factors",
        "rank check of all 36 layers (repaired)",
        "worths of all 36 layers (alr)"]


@pytest.mark.parametrize("what", STEP)
def bench_step(benchmark, what):
    """The seed's model: 6 blocks, d 512, FFN 2048, block 256, batch 32, 33,277 words (here batch 4: a step in seconds)."""
    benchmark.group = "the seed's model at rank 64, batch 4 instead of 32"
    torch.manual_seed(0)
    model = recipes.repaired.prepare(GPT(GPTConfig(vocab_size=33_277)), where=lambda name: name != "head")
    x, factors = torch.randint(33_277, (4, 256)), [p for pair in pairs(model) for p in pair]
    layers = list(low_rank_layers(model).values())

    def step():
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()

    step()
    for layer in layers:                                            # as hooks would leave them before a decision
        layer.hidden, layer.felt = layer.V.detach() @ layer.V.detach().mT, layer.U.detach().mT @ layer.U.detach()
    work = dict(zip(STEP, [step, torch.optim.AdamW(factors, fused=True).step, PairOptimizer(pairs(model)).step,
                           PairOptimizer(pairs(model), rule=Tangent()).step,
                           lambda: [recipes.repaired.estimate(layer) for layer in layers],
                           lambda: [recipes.alr.estimate(layer) for layer in layers]]))[what]
    benchmark.pedantic(work, rounds=3 if what == STEP[0] else 10, warmup_rounds=1)
