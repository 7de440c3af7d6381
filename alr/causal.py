"""Does the past see the future?  A test for any language model.

    alr.assert_causal(model)                            # raises if a logit depends on a token that comes later

Dims: B sequences, T tokens, C vocabulary size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

POSITIONS = 16                          # at most this many tokens are changed, one at a time (ours)


@contextlib.contextmanager
def evaluating(model) -> Iterator[None]:
    """Dropout off and no gradients; every module is left in the mode it was in.  A plain function has no mode."""
    modes = {mod: mod.training for mod in model.modules()} if isinstance(model, nn.Module) else {}
    try:
        if modes:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for mod, training in modes.items():
            mod.training = training


def _vocabulary(model) -> int:
    """config.vocab_size, or the number of rows of the first embedding.  ValueError when there is neither."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is None and isinstance(model, nn.Module):
        size = next((mod.num_embeddings for mod in model.modules() if isinstance(mod, nn.Embedding)), None)
    if size is None:
        raise ValueError("assert_causal: the model has neither config.vocab_size nor an nn.Embedding to read the "
                         "vocabulary from; say vocab_size=...")
    return size


def assert_causal(model: Callable[[Tensor], Tensor], vocab_size: int | None = None, length: int | None = None,
                  device: torch.device | str | None = None, tolerance: float = 1e-6, seed: int = 0) -> None:
    """AssertionError if any logit changes with a token that comes after it.  Trained or not, in milliseconds.

    model: anything that maps token ids (B, T) to logits (B, T, C); wrap what does not, e.g. `lambda x: hf(x).logits`, or
    `lambda x: net(x.T).transpose(0, 1)` for time-first ones.  Token t is exchanged for several t (all of them up to length
    17, else sixteen spread over the sequence); the logits before t must stay what they were, to `tolerance` of the
    largest logit (both passes have the same shape, so rounding is the same too; 1e-6 is ours).

    vocab_size: config.vocab_size, or the first embedding's rows.  length: 16, or config.block_size if that is less; give
    the full block where attention is windowed or sparse.  device: the first parameter's.  An nn.Module is put in eval
    mode for the test and left as it was.

    ValueError for what cannot be tested: a vocabulary of 1, a length below 2, logits of another shape, logits that do not
    depend on the tokens at all.  A branch that starts at zero (an attention output of zeros, say) hides a leak until it
    has been trained: test such a model after some steps as well.
    """
    vocab_size = _vocabulary(model) if vocab_size is None else vocab_size
    if length is None:
        length = min(16, getattr(getattr(model, "config", None), "block_size", 16))
    if vocab_size < 2 or length < 2:
        raise ValueError(f"assert_causal: vocab_size {vocab_size}, length {length}; wanted at least 2 of both.")
    if device is None:
        device = next((p.device for p in model.parameters()), "cpu") if isinstance(model, nn.Module) else "cpu"
    draw = torch.Generator("cpu").manual_seed(seed)                      # on the CPU: the same tokens for every device
    tokens = torch.randint(vocab_size, (1, length), generator=draw, device="cpu")                         # (1, T)
    shifts = torch.randint(1, vocab_size, (length,), generator=draw, device="cpu").tolist()               # never to itself
    count = min(POSITIONS, length - 1)
    places = sorted({1 + round(i * (length - 2) / max(1, count - 1)) for i in range(count)})    # 1 to T - 1

    def logits(ids):
        out = model(ids.to(device))
        if not isinstance(out, Tensor) or out.shape[:2] != ids.shape or out.dim() != 3:
            came = f"logits of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"assert_causal: the model gave {came} for tokens (1, {length}); wanted a tensor (B, T, C) = "
                             f"(1, {length}, {vocab_size}). Wrap it: assert_causal(lambda x: model(x).logits, "
                             "vocab_size=...).")
        return out[0].float()                                                               # (T, C)

    leaks, moved = {}, False
    with evaluating(model):
        before = logits(tokens)                                                             # (T, C)
        size = before.abs().max().item()
        for t in places:
            changed = tokens.clone()
            changed[0, t] = (changed[0, t] + shifts[t]) % vocab_size
            change = (logits(changed) - before).abs().amax(-1)                              # (T,)
            seen = (change[:t] > tolerance * size).nonzero()[:, 0].tolist()
            moved |= bool((change[t:] > 0).any())
            if seen:
                leaks[t] = (seen, change[:t].max().item())
    if not leaks and not moved:
        raise ValueError(f"assert_causal: no logit at all changed with tokens {places[0]} to {places[-1]}; a model that "
                         "does not look at its input passes any such test.")
    if leaks:
        t, (seen, most) = next(iter(leaks.items()))
        ahead = {place - position for place, (found, _) in leaks.items() for position in found}
        hint = ("only the next token is seen: the mask, or the shift of the targets, is off by one" if ahead == {1} else
                "no position is closed: is there a mask at all?" if all(len(s) == p for p, (s, _) in leaks.items()) else
                f"it sees up to {max(ahead)} tokens ahead")
        raise AssertionError(
            f"the model sees the future. Changing token t = {t} changes logits at {_spell(seen)}, the earliest {seen[0]}, "
            f"by up to {most:.2g} (largest logit {size:.2g}); logits before t must not depend on token t. "
            f"The same for {len(leaks)} of {len(places)} tokens tried; {hint}")


def _spell(positions: list[int]) -> str:
    if len(positions) == 1:
        return f"position {positions[0]}"
    whole = positions == list(range(positions[0], positions[-1] + 1))
    return f"positions {positions[0]} to {positions[-1]}" if whole else f"{len(positions)} earlier positions"
