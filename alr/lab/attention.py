"""Where does attention look?  Maps read off a GPT's own q and k.

    maps = attention_maps(model, tokens)                # {"blocks.0.attn": (B, H, T, T), ...}

Dims: B sequences, T tokens, H heads, D head size, E = H D.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..causal import evaluating
from .model import Attention


def attention_maps(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Where every attention layer of a GPT looks: {layer's name: (B, H, T, T)}, by forward hooks on its q and k.

    Entry [b, h, t, s] is the weight that position t gives to token s; rows sum to 1.  tokens (B, T).  In eval mode; the
    model is left in the mode it was in.  ValueError when it holds no `alr.lab.model.Attention`.
    """
    layers = {name: mod for name, mod in model.named_modules() if isinstance(mod, Attention)}
    if not layers:
        raise ValueError("attention_maps: no alr.lab.model.Attention in the model, whose q and k could be read.")
    out, handles = {}, []
    for name, layer in layers.items():
        for part in ("q", "k"):
            def keep(module, inputs, output, key=(name, part)):
                out[key] = output.detach().float()                                          # (B, T, E)
            handles.append(getattr(layer, part).register_forward_hook(keep))
    try:
        with evaluating(model):
            model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _weights(out[name, "q"], out[name, "k"], layer) for name, layer in layers.items()}


def _weights(q: Tensor, k: Tensor, layer: Attention) -> Tensor:
    """softmax(q k^T / sqrt(D)) as the layer's own attention has it.  (B, T, E), (B, T, E) -> (B, H, T, T)."""
    q, k = (x.unflatten(-1, (layer.n_heads, -1)).transpose(1, 2) for x in (q, k))           # (B, H, T, D)
    scores = q @ k.mT / q.shape[-1] ** 0.5                                                  # (B, H, T, T)
    if layer.causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)   # (T, T)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(-1)
