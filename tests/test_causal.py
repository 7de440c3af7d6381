"""Laws of `alr.causal`: what looks ahead is caught and told where, what does not passes, nothing passes by default."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import alr
from alr.causal import assert_causal
from alr.lab.attention import attention_maps
from alr.lab.model import GPT, MLPLM, GPTConfig, MLPConfig, block_linears

C, T = 31, 12


def gpt(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**dict(vocab_size=C, block_size=T, n_layers=2, n_heads=4, d_model=32, d_ff=64), **changes}))


def mlp():
    torch.manual_seed(0)
    return MLPLM(MLPConfig(vocab_size=C, block_size=4, d_embed=8, d_hidden=24))


class Ahead(nn.Module):
    """Position t sees token t + offset and no other: one too far ahead when offset is 1."""

    def __init__(self, offset):
        super().__init__()
        self.embed, self.offset = nn.Embedding(C, C), offset

    def forward(self, x):
        ahead, back = max(self.offset, 0), max(-self.offset, 0)
        y = F.pad(self.embed(x), (0, 0, back, ahead))                                       # (B, back + T + ahead, C)
        return y[:, ahead:ahead + x.shape[1]]                                               # (B, T, C)


@pytest.mark.parametrize("model", [gpt(), gpt(tied=True, dropout=0.5), mlp(), alr.factorize_(gpt(), 5, block_linears),
                                   alr.recipes.v10.prepare(gpt(), block_linears)])
def test_a_causal_model_passes_at_every_length(model):
    for length in (2, 3, T):
        assert alr.assert_causal(model, length=length) is None
    assert_causal(model)


@pytest.mark.parametrize("recipe", ["v10", "uniform", "dense"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_model_without_a_mask_is_caught_before_any_training(recipe, seed):
    model = alr.recipes.get(recipe).prepare(gpt(causal=False), block_linears)
    with pytest.raises(AssertionError, match=r"token t = 1 .* position 0, the earliest 0,.*11 of 11.*no position is closed"):
        assert_causal(model, seed=seed)


def test_one_layer_without_a_mask_is_enough():
    model = gpt(n_layers=3)
    model.blocks[1].attn.causal = False
    with pytest.raises(AssertionError, match="sees the future"):
        assert_causal(model)


def test_an_offset_is_told_by_how_much():
    assert_causal(Ahead(0), length=8)
    assert_causal(Ahead(-1), length=8)                              # looks back only
    with pytest.raises(AssertionError, match="token t = 1 changes logits at position 0, .*only the next token"):
        assert_causal(Ahead(1), length=8)
    with pytest.raises(AssertionError, match="token t = 3 changes logits at position 0, .*up to 3 tokens ahead"):
        assert_causal(Ahead(3), length=8)


def test_a_long_sequence_is_tried_at_sixteen_places_from_the_second_to_the_last_token():
    seen = []
    def model(x):
        seen.append(x.clone())
        return F.one_hot(x, C).float()
    assert_causal(model, vocab_size=C, length=100)
    places = [(x != seen[0]).nonzero()[:, 1].tolist() for x in seen[1:]]
    assert len(places) == 16 and all(len(p) == 1 for p in places)
    assert places[0] == [1] and places[-1] == [99]


def test_a_leak_from_the_last_token_alone_is_found():
    def model(x):
        return F.one_hot(x, C).float() + F.one_hot(x[:, -1:], C)
    with pytest.raises(AssertionError, match="token t = 63 changes logits at positions 0 to 62, .*1 of 16 tokens"):
        assert_causal(model, vocab_size=C, length=64)


def test_any_function_will_do_and_a_wrapper_for_what_gives_no_logits():
    model = gpt()
    class Output:
        def __init__(self, logits):
            self.logits = logits
    def wrapped(x):
        return Output(model(x))
    with pytest.raises(ValueError, match=r"the model gave Output .*lambda x: model\(x\).logits"):
        assert_causal(wrapped, vocab_size=C, length=T)
    assert_causal(lambda x: wrapped(x).logits, vocab_size=C, length=T)
    with pytest.raises(ValueError, match=r"logits of shape \(1, 1, 31\) for tokens \(1, 8\)"):
        assert_causal(lambda x: model(x)[:, -1:], vocab_size=C, length=8)      # nanoGPT's forward without targets
    with pytest.raises(ValueError, match="say vocab_size"):
        assert_causal(lambda x: model(x))


def test_nothing_passes_by_not_looking():
    with pytest.raises(ValueError, match="does not look at its input"):
        assert_causal(lambda x: torch.zeros(*x.shape, C), vocab_size=C)
    with pytest.raises(ValueError, match="length 1"):
        assert_causal(gpt(), length=1)


def test_modes_are_left_as_they_were():
    model = gpt(dropout=0.5).train()
    model.blocks[0].eval()
    modes = [mod.training for mod in model.modules()]
    assert_causal(model)
    attention_maps(model, torch.zeros(1, T, dtype=torch.long))
    assert [mod.training for mod in model.modules()] == modes and len(set(modes)) == 2


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rank", [None, 5])
def test_the_maps_are_what_the_layers_attend_with(causal, rank):
    model = gpt(causal=causal)
    if rank:
        alr.factorize_(model, rank, block_linears)
    x = torch.randint(C, (3, T), generator=torch.Generator().manual_seed(1))                # (B, T)
    seen = {}
    hooks = [model.blocks[i].attn.register_forward_hook(lambda m, a, y, i=i: seen.update({i: (a[0], y)})) for i in (0, 1)]
    maps = attention_maps(model, x)
    assert list(maps) == ["blocks.0.attn", "blocks.1.attn"] and len(hooks) == 2
    for i, weights in enumerate(maps.values()):
        assert weights.shape == (3, 4, T, T)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, T))
        assert bool(weights.triu(1).any()) is not causal
        attn, (given, out) = model.blocks[i].attn, seen[i]
        v = attn.v(given).view(3, T, 4, -1).transpose(1, 2)                                 # (B, H, T, D)
        torch.testing.assert_close(attn.o((weights @ v).transpose(1, 2).reshape(3, T, -1)), out)
    assert not model.blocks[0].attn.q._forward_hooks, "no hook stays behind"


def test_maps_of_a_model_without_attention():
    with pytest.raises(ValueError, match="no alr.lab.model.Attention"):
        attention_maps(mlp(), torch.zeros(1, T, dtype=torch.long))
