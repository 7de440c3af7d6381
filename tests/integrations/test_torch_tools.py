"""torch's own tools on factorised models: checkpoints of torch.distributed, parametrisations, pruning, quantisation."""

import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import alr


def net(rank, seed=0, d=24):
    torch.manual_seed(seed)
    return alr.factorize_(nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 8)), rank)


@pytest.mark.parametrize("start", ["dense", "other ranks"])
@pytest.mark.filterwarnings("ignore:torch.distributed:UserWarning")
def test_a_distributed_checkpoint_into_a_model_of_other_ranks(start, tmp_path):
    saved = net({"0": 5, "2": 3})
    dcp.save(saved.state_dict(), checkpoint_id=tmp_path)
    model = net(8, seed=1) if start == "other ranks" else nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8))
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    alr.factorize_like_(model, metadata.state_dict_metadata)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=tmp_path)
    model.load_state_dict(state)
    x = torch.randn(4, 24)
    assert [layer.rank for layer in alr.low_rank_layers(model).values()] == [5, 3] and torch.equal(model(x), saved(x))


@pytest.mark.filterwarnings("ignore:torch.distributed:UserWarning")
def test_a_distributed_checkpoint_of_model_and_optimizer(tmp_path):
    """Nested under a name of its own, as torch's examples save it; made with get_state_dict, trained on afterwards."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    def step(model, optimizer):
        model(torch.randn(16, 24, generator=torch.Generator().manual_seed(0))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = net({"0": 5, "2": 3})
    optimizer = torch.optim.AdamW(saved.parameters(), 1e-2)
    step(saved, optimizer)
    m, o = get_state_dict(saved, optimizer)
    dcp.save({"model": m, "optimizer": o}, checkpoint_id=tmp_path)
    step(saved, optimizer)

    metadata = dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    shapes = {key.removeprefix("model."): value for key, value in metadata.items() if key.startswith("model.")}
    model = alr.factorize_like_(net(8, seed=1), shapes)
    again = torch.optim.AdamW(model.parameters(), 1e-2)             # after the ranks are right
    m, o = get_state_dict(model, again)
    dcp.load({"model": m, "optimizer": o}, checkpoint_id=tmp_path)
    set_state_dict(model, again, model_state_dict=m, optim_state_dict=o)
    step(model, again)
    for a, b in zip(saved.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_computed_factors_are_refused():
    model = net(4)
    parametrizations.weight_norm(model[0], "V")
    with pytest.raises(ValueError, match="factors of '0' are computed .parametrised or pruned."):
        alr.RankAdapter(model, torch.optim.AdamW(model.parameters()), alr.recipes.uniform)
    model = net(4)
    prune.l1_unstructured(model[2], "U", amount=0.5)
    with pytest.raises(ValueError, match="factors of '2' are computed .parametrised or pruned."):
        alr.RankAdapter(model, torch.optim.AdamW(model.parameters()), alr.recipes.uniform)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_layers_whose_weight_is_computed_are_left_out_and_named():
    def check(first, rest=1):
        with pytest.warns(UserWarning, match="not taken, though they hold matrices: 1 "):
            model = alr.factorize_(nn.Sequential(first, nn.Linear(16, 4)), rank=2)
        assert list(alr.low_rank_layers(model)) == ["1"]
        assert model(torch.randn(3, 16)).shape == (3, 4)
    check(nn.utils.weight_norm(nn.Linear(16, 16)))
    check(parametrizations.weight_norm(nn.Linear(16, 16)))
    check(parametrizations.orthogonal(nn.Linear(16, 16)))
    pruned = nn.Linear(16, 16)
    prune.l1_unstructured(pruned, "weight", amount=0.5)
    check(pruned)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantiz.*:UserWarning")
def test_dynamic_quantisation_finds_layers_after_densify():
    """It knows nn.Linear alone: of a factorised model it quantises nothing, and says nothing."""
    from torch.ao.quantization import quantize_dynamic
    def quantised(model):
        return sum("quantized" in type(mod).__module__ for mod in model.modules() if type(mod).__name__ == "Linear")
    model = net(4)
    assert quantised(quantize_dynamic(model, {nn.Linear})) == 0
    assert quantised(quantize_dynamic(alr.densify_(model), {nn.Linear})) == 2


def test_parametrised_factors_train_and_export():
    """Without an adapter a factor may be parametrised; W is what the factors give."""
    model = net(4)
    parametrizations.orthogonal(model[0], "U")
    torch.testing.assert_close(model[0].U.mT @ model[0].U, torch.eye(4), atol=1e-5, rtol=1e-5)
    x = torch.randn(3, 24)
    y = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alr.densify_(model)
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)
    assert not parametrize.is_parametrized(model)
