"""Equality to the bit, for the tests of stopping, of kills and of going on."""

import torch


def same(a, b) -> bool:
    """Are two nests of tensors and plain values equal to the bit?"""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
