"""The versions v1 to v10, each a value: what differs between two of them is the text between the parentheses.

Constants: scripts v1 to v10, read in their source; "ours" where said.  Steps are the script's own (`epoch` of them in one of
its epochs); `paced` moves a recipe to another clock.  With its own model, batches and `optimizer.zero_grad()`, a recipe
takes the script's decisions rank for rank.
"""

from __future__ import annotations

from dataclasses import replace

from ..adapt import Recipe
from ..control import Bidirectional, ByLayer
from ..estimate import SpectralShare, StableRankPower
from ..history.control import Jump, LossAware, Ramp, Step, Velocity
from ..history.estimate import GradientNorm, LargestGroup, NumberOfGroups
from ..history.grouping import Grouping
from ..history.op import FormsW, OwnBackward
from ..history.resize import SvdFull, SvdRandom
from ..init import Gaussian, Normal
from ..state import Reset, Stale

# v1 to v6: an MLP of two hidden layers on Fashion-MNIST, 60,000 pictures in batches of 128: 469 steps per epoch, Adam 1e-3.
# v1's default mode is "baseline", plain training; "coarse-to-fine" has 0.7 for two epochs, then 0.85 for two
v1 = Recipe("v1", rank=None, gradient=Grouping(mode="grouped", threshold=0.9, order="index", every=1, epoch=469), epoch=469,
            about="rows of a gradient that agree are averaged, every step")
# v2's default mode: 0.75 in the first 0.3 of the epochs, 0.9 up to 0.7, then none; batches 0, 10, 20, ... of an epoch
v2 = replace(v1, name="v2", gradient=Grouping(mode="coarse-to-fine", threshold=0.9, order="norm", every=10, epoch=469,
                                              stages=((0.3, 0.75), (0.7, 0.9))),
             about="the same, strongest rows leading, every tenth step, less and less")

# On the first batch of an epoch, between backward and the optimizer's step.  Initial rank 64, here and in all that follow
v3 = Recipe("v3", rank=64, init=Normal(std=0.02), estimate=LargestGroup(threshold=0.9), control=Jump(min_rank=16),
            resize=SvdFull(eps=0.0), state=Stale(), every=469, offset=1, epoch=469, when="before", cap="min",
            where=("fc2", "blocks.*"),                              # in a GPT: all of its blocks (ours), here and below
            about="first adaptive rank: the size of the largest group of agreeing rows")
v4 = replace(v3, name="v4", control=Jump(min_rank=8), resize=SvdRandom(oversample=8, power=1), when="after",
             about="v3 with a randomised SVD, after the optimizer's step")
v5 = replace(v4, name="v5", when="before", where=("fc1", "fc2", "blocks.*"),
             about="v4 on several layers, before the optimizer's step")
v5_1 = replace(v5, name="v5.1", warmup=469,
               estimate=ByLayer((("fc1", LargestGroup(threshold=0.92)), ("*", LargestGroup(threshold=0.9)))),
               control=ByLayer((("fc1", Ramp(a=0.85, ramp=0.4, min_rank=16, warmup=5 * 469)), ("*", Ramp(a=0.8, ramp=0.5)))),
               about="a warm-up, and smoothed moves")
v6 = replace(v5_1, name="v6", op=OwnBackward(),
             about="v5.1 with a backward pass of its own")

# v7 to v8: a transformer of 3 blocks on 600 characters of Hamlet; epochs of 200 steps in v7 and v7.1, of 1 in v7.2 and v7.3,
# of 10 in v7.4 and v7.5, of 20 in v8.  Every projection is adapted, of which v7.2 to v9 never use attn_o
v7 = Recipe("v7", rank=None, epoch=200,
            about="a dense transformer, to compare with")
v7_1 = replace(v6, name="v7.1", estimate=LargestGroup(threshold=0.9), control=Ramp(a=0.8, ramp=0.5, max_rank=None),
               every=200, warmup=3 * 200, epoch=200, where=("*",),
               about="v6 in every projection of a transformer")
v7_2 = replace(v7_1, name="v7.2", init=Gaussian(), estimate=GradientNorm(), control=Velocity(rate=0.05, every=2, max_rank=256),
               resize=SvdFull(eps=0.0, split="left"), op=None, every=1, offset=0, warmup=0, epoch=1, when="after",
               about="rank from the gradient's norm, with velocity")
v7_3 = replace(v7_2, name="v7.3", op=FormsW(),
               about="v7.2 with a forward that forms W")
v7_4 = replace(v7_2, name="v7.4", estimate=NumberOfGroups(threshold=0.85),
               control=Velocity(rate=0.2, every=1, max_rank=None, snap=True),
               resize=SvdFull(eps=0.0), state=Reset(everything=True, always=True), every=10, warmup=2 * 10, epoch=10,
               about="the signal turned round: the number of groups")
v7_5 = replace(v7_4, name="v7.5", estimate=SpectralShare(share=0.9, power=1), state=Reset(everything=True),
               every=3 * 10, warmup=4 * 10,
               about="ranks that hold 90 % of the nuclear norm")
v8 = replace(v7_5, name="v8", estimate=SpectralShare(share=0.95), control=Step(max_step=4),
             every=3 * 20, warmup=3 * 20, epoch=20,
             about="ranks that hold 95 % of the energy, four at a time")
# v9: epochs of 50 steps; decides at the end of every second one from the fourth on, with that epoch's validation loss known
v9 = replace(v8, name="v9", estimate=SpectralShare(share=0.98), control=LossAware(), state=Stale(),
             every=2 * 50, warmup=3 * 50, epoch=50, when="validated",
             about="98 % of the energy, and growth while the loss gets worse")

# v10: epochs of 200 steps.  As published, three settings beside the recipe count too: --no-causal; --embed-std 1, since its
# embeddings start as torch's do; and replace(v10, when="validated"), since its log has the validation loss before the
# epoch's resize, as those of v7.4 to v9 have.  None of the scripts' ways out when an SVD fails, N(0, 0.02) factors, is
# kept: we stop.
v10 = Recipe("v10", rank=64, init=Gaussian(), estimate=StableRankPower(iters=5), control=Bidirectional(),
             resize=SvdFull(eps=1e-8), state=Reset(everything=True), every=200, epoch=200, cap="min",
             about="1.5 times the stable rank, smoothed, with a dead band")
