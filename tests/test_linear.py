"""Laws of `alr.linear`: the layer is x W^T + b, models go there and back, what cannot work says so."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import alr
from alr import LowRankLinear, densify_, factorize_, low_rank_layers
from alr.init import Gaussian, Normal, Spectral

close = torch.testing.assert_close


class Net(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.wte = nn.Embedding(50, 32)
        self.up, self.down, self.head = nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 50, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, x):
        return self.head(self.down(self.up(self.wte(x)).relu()))


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 3, 4), (0,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.double, torch.bfloat16])
def test_it_is_a_linear_layer(lead, bias, dtype):
    layer = LowRankLinear(12, 20, 5, bias=bias, dtype=dtype)
    x = torch.randn(*lead, 12, dtype=dtype)
    tol = {} if dtype != torch.bfloat16 else dict(atol=3e-2, rtol=3e-2)
    close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), **tol)
    assert layer(x).shape == (*lead, 20) and layer(x).dtype == dtype
    assert "rank=5" in repr(layer) and layer.rank == 5


def test_forward_never_forms_w():
    layer, seen = LowRankLinear(64, 64, 2), []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                seen.append(out.numel())
            return out

    with Spy():
        layer(torch.randn(3, 64))
    assert seen and max(seen) <= 3 * 64


def test_full_rank_is_the_dense_model_there_and_back():
    torch.manual_seed(0)
    dense = Net().double()
    x = torch.randint(50, (4, 7))
    model = factorize_(copy.deepcopy(dense), rank=32)
    assert list(low_rank_layers(model)) == ["up", "down", "head"]
    close(model(x), dense(x))
    back = densify_(model)
    assert not low_rank_layers(back) and type(back.up) is nn.Linear
    close(back(x), dense(x))
    assert {k: v.shape for k, v in back.state_dict().items()} == {k: v.shape for k, v in dense.state_dict().items()}


def test_only_layers_that_low_rank_makes_dearer_go_back():
    model = factorize_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 24)), {"0": 3, "1": 4, "2": 8})
    x = torch.randn(5, 8)
    y, size = model(x), sum(p.numel() for p in model.parameters())
    assert list(low_rank_layers(densify_(model, only_if_larger=True))) == ["0"]         # 48 < 64, 64 = 64, 256 > 192
    torch.testing.assert_close(model(x), y)
    assert sum(p.numel() for p in model.parameters()) == size - 64


def test_ranks_by_number_name_and_rule():
    assert [x.rank for x in low_rank_layers(factorize_(Net(), 4)).values()] == [4, 4, 4]
    model = factorize_(Net(), {"up": 3, "head": 7})
    assert {k: v.rank for k, v in low_rank_layers(model).items()} == {"up": 3, "head": 7} and type(model.down) is nn.Linear
    model = factorize_(Net(), lambda name, linear: linear.out_features // 8, where=lambda name: name != "head")
    assert {k: v.rank for k, v in low_rank_layers(model).items()} == {"up": 6, "down": 4}
    dense = Net().up.weight.numel()                                 # 48 x 32: break-even is 19
    for share in (0.1, 0.5, 1.0):
        low = low_rank_layers(factorize_(Net(), share))["up"]
        assert share * dense - 80 < low.U.numel() + low.V.numel() <= share * dense
    assert low_rank_layers(replace(alr.recipes.uniform, rank=0.25).prepare(Net()))["up"].rank == 4


def test_spectral_init_keeps_the_best_approximation_and_match_its_size():
    W = torch.randn(30, 20)
    U, V = Spectral()(W, 8)
    close((W - U @ V).norm(), torch.linalg.svdvals(W)[8:].norm())
    U, V = Spectral(match=True)(W, 8)
    close((U @ V).norm(), W.norm())


def test_script_inits_have_their_variances():
    torch.manual_seed(0)
    W = torch.empty(400, 300)
    U, V = Gaussian()(W, 200)
    close(U.var(), torch.tensor(1 / 400), rtol=0.03, atol=0)
    close(V.var(), torch.tensor(1 / 300), rtol=0.03, atol=0)
    U, V = Normal(0.02)(W, 200)
    close(torch.stack([U.std(), V.std()]), torch.tensor([0.02, 0.02]), rtol=0.03, atol=0)


def test_state_dict_of_other_ranks_resizes_the_layer():
    torch.manual_seed(0)
    saved, model = factorize_(Net(), {"up": 3, "down": 9, "head": 5}), factorize_(Net(), 6)
    model.load_state_dict(saved.state_dict())
    assert {k: v.rank for k, v in low_rank_layers(model).items()} == {"up": 3, "down": 9, "head": 5}
    x = torch.randint(50, (2, 5))
    assert torch.equal(model(x), saved(x))
    model(x).sum().backward()                                           # the new Parameters are leaves that train
    assert model.up.U.grad is not None
    wrong = saved.state_dict() | {"up.U": torch.zeros(47, 3)}
    with pytest.raises(RuntimeError, match="up.U"):
        model.load_state_dict(wrong)


def test_torch_transformer_layer_works_in_train_and_eval():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    x = torch.randn(2, 5, 16)
    expected = block(x)
    factorize_(block, 16, where=lambda name: name.startswith("linear"))
    close(block(x), expected, atol=1e-5, rtol=1e-4)
    with torch.inference_mode():
        close(block.eval()(x), expected, atol=1e-5, rtol=1e-4)          # torch's fast path reads .weight


@pytest.mark.parametrize("call, words", [
    (lambda: factorize_(Net(), 8, where=lambda n: "attn" in n),
     "no linear layer matched `where`. The model has 3, the first is 'up'"),
    (lambda: factorize_(nn.ReLU(), 8), "The model has none"),
    (lambda: factorize_(Net(tied=True), 8), "'head' shares its weight with 'wte'"),
    (lambda: factorize_(Net(), 0), r"rank 0 asked of up \(48 x 32\); it takes 1 to 32"),
    (lambda: factorize_(Net(), -3), "rank -3"), (lambda: factorize_(Net(), 33), "rank 33"),
    (lambda: factorize_(Net(), 64.0), "share 64 asked of up.*a rank as a whole number, 1 to 32"),
    (lambda: factorize_(Net(), {"upp": 3}), "'upp', which is no linear layer"),
    (lambda: factorize_(nn.Linear(3, 3), 2), "from_linear"),
    (lambda: factorize_(nn.DataParallel(Net()), 2), "wrapped in DataParallel"),
    (lambda: LowRankLinear(4, 4, 5), "rank 5"),
    (lambda: alr.recipes.get("v11"), "v11.*there are dense, uniform")])
def test_what_cannot_work_says_so(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_refused_model_is_untouched():
    model = Net()
    with pytest.raises(ValueError):
        factorize_(model, {"up": 4, "down": 400})
    assert not low_rank_layers(model)


def test_a_tied_head_can_be_left_out():
    model = factorize_(Net(tied=True), 8, where=lambda name: name != "head")
    assert list(low_rank_layers(model)) == ["up", "down"] and model.head.weight is model.wte.weight


def test_a_layer_in_two_places_does_not_go_back_by_half():
    model = factorize_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), rank=2)
    model.append(model[0])
    with pytest.raises(ValueError, match="densify_: '0' is the same module as '2'.*copy.deepcopy"):
        densify_(model)
    assert list(low_rank_layers(model)) == ["0", "1"] and model[2] is model[0]
    model[2] = copy.deepcopy(model[0])
    assert not low_rank_layers(densify_(model))
    tied = factorize_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), rank=2)
    tied[1].V = tied[0].V
    with pytest.raises(ValueError, match="densify_: '0' shares a factor with '1.V'"):
        densify_(tied)
    assert len(low_rank_layers(tied)) == 2


def test_a_block_in_two_places_goes_back_in_both():
    block = factorize_(nn.Sequential(nn.Linear(8, 8)), rank=2)
    model = nn.Sequential(block, nn.ReLU(), block)
    x = torch.randn(3, 8)
    y = model(x)
    close(densify_(model)(x), y)
    assert model[0] is model[2] and type(model[2][0]) is nn.Linear
