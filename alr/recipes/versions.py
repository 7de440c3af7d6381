"""The versions v1 to v10, each a value: what differs between two of them is the text between the parentheses.

Constants: scripts v1 to v10; "ours" where said.  Steps are the script's own (`epoch` of them in one of its epochs);
`paced` moves a recipe to another clock.
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

# v1 to v6: an MLP of two hidden layers on Fashion-MNIST, 60,000 pictures in batches of 128: 469 steps per epoch
v1 = Recipe("v1", rank=None, gradient=Grouping(mode="grouped", threshold=0.9, order="random", every=1), epoch=469,
            about="rows of a gradient that agree are averaged, every step")
v2 = replace(v1, name="v2", gradient=Grouping(mode="grouped", threshold=0.9, order="norm", every=10,
                                              stages=((0.3, 0.75), (0.7, 0.9))),
             about="the same, strongest rows leading, every tenth step")
v3 = Recipe("v3", rank=64, init=Normal(std=0.02), estimate=LargestGroup(threshold=0.9), control=Jump(min_rank=16),
            resize=SvdFull(eps=0.0), state=Stale(), every=469, offset=1, epoch=469, cap="min",
            where=("fc2", "blocks.*"),
            about="first adaptive rank: the size of the largest group of agreeing rows")                              # in a GPT: all of its blocks (ours), here and below
v4 = replace(v3, name="v4", resize=SvdRandom(oversample=8, power=1),
             about="v3 with a randomised SVD")
v5 = replace(v3, name="v5", control=Jump(min_rank=8), where=("fc1", "fc2", "blocks.*"),
             about="v3 on several layers")
v5_1 = replace(v5, name="v5.1", warmup=469,
               estimate=ByLayer((("fc1", LargestGroup(threshold=0.92)), ("*", LargestGroup(threshold=0.9)))),
               control=ByLayer((("fc1", Ramp(a=0.85, ramp=0.4, warmup=5 * 469)), ("*", Ramp(a=0.8, ramp=0.5)))),
               about="a warm-up, and smoothed moves")
v6 = replace(v5_1, name="v6", op=OwnBackward(),
             about="v5.1 with a backward pass of its own")

# v7: a transformer on 600 characters; 200 steps per epoch, but one in v7.2 and v7.3.  Initial ranks of v5 to v7.5 and
# inits of v7.4, v7.5 are not recorded: as before
v7 = Recipe("v7", rank=None, epoch=200,
            about="a dense transformer, to compare with")
v7_1 = replace(v6, name="v7.1", estimate=LargestGroup(threshold=0.9), control=Ramp(a=0.8, ramp=0.5),
               every=200, warmup=3 * 200, epoch=200,
               about="v6 in every projection of a transformer")
v7_2 = replace(v7_1, name="v7.2", estimate=GradientNorm(), control=Velocity(rate=0.05),
               resize=SvdFull(eps=0.0, split="left"), op=None, every=2, offset=0, warmup=0, epoch=1,
               about="rank from the gradient's norm, with velocity")
v7_3 = replace(v7_2, name="v7.3", op=FormsW(),
               about="v7.2 with a forward that forms W")
v7_4 = replace(v7_2, name="v7.4", estimate=NumberOfGroups(threshold=0.85), control=Velocity(rate=0.2),
               resize=SvdFull(eps=0.0), state=Reset(everything=True), every=200, epoch=200,
               about="the signal turned round: the number of groups")
v7_5 = replace(v7_4, name="v7.5", estimate=SpectralShare(share=0.9, power=1), every=3 * 200, warmup=4 * 200,
               about="ranks that hold 90 % of the nuclear norm")

# v8's steps per epoch are not recorded: as v9's.  Its init neither: its log has an energy of 63 to 74 per layer at its
# first update, at rank 64; Gaussian() gives 64, Normal(0.02) in these layers 0.2 to 0.7
v8 = replace(v7_5, name="v8", init=Gaussian(), estimate=SpectralShare(share=0.95), control=Step(max_step=4),
             every=3 * 50, warmup=4 * 50, epoch=50,
             about="ranks that hold 95 % of the energy, four at a time")
# v9 decides after the epoch's validation, from the fourth on (its log): on the first step that knows the loss
v9 = replace(v8, name="v9", estimate=SpectralShare(share=0.98), control=LossAware(), state=Stale(),
             every=2 * 50, offset=1, warmup=3 * 50,
             about="98 % of the energy, and growth while the loss gets worse")

v10 = Recipe("v10", rank=64, init=Gaussian(), estimate=StableRankPower(iters=5), control=Bidirectional(),
             resize=SvdFull(eps=1e-8), state=Reset(everything=True), every=200, epoch=200, cap="min",
             about="1.5 times the stable rank, smoothed, with a dead band")
