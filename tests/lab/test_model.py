"""Laws of `alr.lab.model`: the past does not see the future, attention is over time, parameters are what is there."""

import pytest
import torch

from alr import factorize_, low_rank_layers
from alr.lab.model import GPT, MLPLM, GPTConfig, MLPConfig, block_linears, count_parameters

C, T = 31, 12


def gpt(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**dict(vocab_size=C, block_size=T, n_layers=2, n_heads=4, d_model=32, d_ff=64), **changes}))


def mlp(**changes):
    torch.manual_seed(0)
    return MLPLM(MLPConfig(**{**dict(vocab_size=C, block_size=4, d_embed=8, d_hidden=24), **changes}))


def tokens(batch=3, length=T):
    return torch.randint(C, (batch, length), generator=torch.Generator().manual_seed(1))            # (B, T)


def changed_at(model, t):
    """Which positions' logits move when token t changes: a set."""
    a = tokens()                                                                                    # (B, T)
    b = a.clone()
    b[:, t] = (b[:, t] + 1) % C
    with torch.no_grad():
        differ = (model.eval()(a) != model(b)).any(-1).any(0)                                       # (T,)
    return set(differ.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("model", [gpt(), gpt(tied=True), factorize_(gpt(), 5, block_linears), mlp(),
                                   factorize_(mlp(), 5, block_linears)])
def test_the_past_does_not_see_the_future(model):
    for t in range(T):
        moved = changed_at(model, t)
        assert t in moved and min(moved) == t


def test_attention_is_over_time_and_without_the_mask_over_all_of_it():
    for t in (0, 5, T - 1):
        assert changed_at(gpt(), t) == set(range(t, T))             # every later token sees it: not over heads (v7)
        assert changed_at(gpt(causal=False), t) == set(range(T))    # and so does every earlier one (v7 to v10)


def test_attention_equals_its_formula():
    model = gpt(n_layers=1)
    attn, x = model.blocks[0].attn, torch.randn(2, T, 32)                                           # (B, T, E)
    heads = []
    for h in range(4):
        q, k, v = (f(x)[:, :, 8 * h:8 * h + 8] for f in (attn.q, attn.k, attn.v))                   # (B, T, D)
        score = q @ k.mT / 8 ** 0.5                                                                 # (B, T, T)
        score = score.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        heads.append(score.softmax(-1) @ v)                                                         # (B, T, D)
    torch.testing.assert_close(attn(x), attn.o(torch.cat(heads, -1)))


def test_the_mlp_sees_exactly_its_window():
    for t in range(T):
        assert changed_at(mlp(), t) == set(range(t, min(t + 4, T)))
    model, x = mlp(), tokens()
    for t in range(3, T):                                           # one window at a time gives the same
        torch.testing.assert_close(model(x)[:, t], model(x[:, t - 3:t + 1])[:, -1])


@pytest.mark.parametrize("model", [gpt(dropout=0.5), mlp()])
def test_generate_follows_the_model_token_by_token(model):
    prompt = tokens(2, 5)
    slow = prompt
    for _ in range(15):                                             # runs past the block: the window slides
        with torch.no_grad():
            slow = torch.cat((slow, model.eval()(slow[:, -model.config.block_size:])[:, -1:].argmax(-1)), 1)
    model.train()
    before = torch.get_rng_state()
    assert torch.equal(model.generate(prompt, 15, temperature=0), slow)
    assert torch.equal(model.generate(prompt, 15, top_k=1, generator=torch.Generator()), slow)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert model.generate(prompt, 0).equal(prompt)


def test_generate_draws_what_the_model_predicts():
    model, prompt = gpt(), tokens(1, 3)
    many = prompt.expand(4000, -1)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        p = (model(prompt)[0, -1] / 0.5).softmax(-1)                                                # (C,)
    new = model.generate(many, 1, temperature=0.5, generator=draw)[:, -1]
    # three standard errors for each of 31 shares would fail one run in twelve; five, one in 60,000
    share = torch.bincount(new, minlength=C) / 4000
    assert ((share - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt()).all()
    best = set(p.topk(3).indices.tolist())
    assert set(model.generate(many, 1, top_k=3, generator=draw)[:, -1].tolist()) == best


def test_generated_tokens_can_be_trained_on():
    model = gpt()
    model(model.generate(tokens(), 2)[:, :T]).sum().backward()
    assert model.wte.weight.grad is not None


@pytest.mark.parametrize("kwargs", [dict(n=-1), dict(n=1, temperature=-1.0), dict(n=1, top_k=0)])
def test_generate_refuses(kwargs):
    with pytest.raises(ValueError, match="generate: "):
        gpt().generate(tokens(), **kwargs)
    with pytest.raises(ValueError, match=r"wanted \(B, T\)"):
        gpt().generate(torch.zeros(2, 0, dtype=torch.long), 3)


def test_dropout_is_for_training_only():
    model, x = gpt(dropout=0.2), tokens()
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_parameters_are_recounted_split_and_counted_once():
    d, ff, layers = 32, 64, 2
    model = gpt()
    count = count_parameters(model)
    assert count == {"blocks": layers * (4 * d * d + 2 * d * ff + 4 * d) + 2 * d, "embedding": (C + T) * d,
                     "head": C * d, "total": sum(p.numel() for p in model.parameters())}
    factorize_(model, 3, block_linears)
    less = count_parameters(model)
    assert less["blocks"] == layers * (3 * (4 * 2 * d + 2 * (d + ff)) + 4 * d) + 2 * d
    assert (less["embedding"], less["head"]) == (count["embedding"], count["head"])
    tied = count_parameters(gpt(tied=True))
    assert tied == count | {"head": 0, "total": count["total"] - C * d}
    assert count_parameters(mlp()) == {"blocks": 32 * 24 + 24 * 24, "embedding": C * 8, "head": C * 24,
                                       "total": 32 * 24 + 24 * 24 + C * 8 + C * 24}


def test_names_and_where():
    assert list(low_rank_layers(factorize_(gpt(tied=True), 3, block_linears))) == [
        f"blocks.{i}.{name}" for i in range(2)
        for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")]
    assert list(low_rank_layers(factorize_(mlp(), 3, block_linears))) == ["fc1", "fc2"]
    with pytest.raises(ValueError, match="shares its weight with 'wte'"):
        factorize_(gpt(tied=True), 3)


@pytest.mark.parametrize("model", [gpt(), mlp()])
def test_starts_as_said(model):
    loss = torch.nn.functional.cross_entropy(model(tokens(64)).flatten(0, 1), tokens(64).flatten())
    assert abs(loss.item() - torch.tensor(float(C)).log()) < 0.3
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            assert 0.017 < module.weight.std() < 0.023
        if isinstance(module, torch.nn.Linear):
            assert module.bias is None
            assert 0.85 < module.weight.var() * 3 * module.in_features < 1.15


def test_errors_say_what_came_and_what_was_wanted():
    with pytest.raises(ValueError, match="d_model 32 is not divisible by n_heads 5"):
        gpt(n_heads=5)
    with pytest.raises(ValueError, match="n_layers is 0; it must be at least 1"):
        gpt(n_layers=0)
    with pytest.raises(ValueError, match=r"dropout is 1.0; it must be in \[0, 1\)"):
        gpt(dropout=1.0)
    with pytest.raises(ValueError, match="13 tokens in a sequence; the model was made for at most 12"):
        gpt()(tokens(1, 13))
