"""Lightning, under both of its names."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import alr

warnings.filterwarnings("ignore", module="lightning|pytorch_lightning")
pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from alr.integrations.lightning import AdaptRanks  # noqa: E402

RECIPE = replace(alr.recipes.alr, every=6, control=replace(alr.recipes.alr.control, min_rank=1))


@pytest.fixture(autouse=True)
def quiet():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(num_workers|ModelCheckpoint|does not have many "
                                                  "workers|log_every_n_steps|litlogger).*")
        yield
    torch.set_num_threads(before)


def data(n=96, batch=8):
    x = torch.randn(n, 32, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x[:, :8].argmax(1)), batch_size=batch)


def module(package=pl, optimizer="pairs", manual=False, every=1):
    class Net(package.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = alr.factorize_(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
                                                    nn.Linear(32, 8)), 0.9)
            self.automatic_optimization = not manual

        def training_step(self, batch, i):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            if manual:
                self.manual_backward(loss)
                if (i + 1) % every == 0:
                    for o in [self.optimizers()] if not isinstance(self.optimizers(), list) else self.optimizers():
                        o.step()
                        o.zero_grad()
            return loss

        def configure_optimizers(self):
            if optimizer == "pairs":
                return alr.PairOptimizer(self)
            if optimizer == "adamw":
                return torch.optim.AdamW(self.parameters(), 3e-3)
            mine = {id(p) for layer in alr.low_rank_layers(self).values() for p in (layer.U, layer.V)}
            return [alr.PairOptimizer([(layer.U, layer.V) for layer in alr.low_rank_layers(self).values()]),
                    torch.optim.AdamW([p for p in self.parameters() if id(p) not in mine], 3e-3)]
    return Net()


def trainer(folder, callbacks, package=pl, **kw):
    kw = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
          "enable_checkpointing": False, **kw}
    return package.Trainer(default_root_dir=folder, callbacks=callbacks, **kw)


def loss_of(net):
    return sum(F.cross_entropy(net.net(x), y).item() for x, y in data()) / len(data())


@pytest.mark.parametrize("optimizer", ["adamw", "pairs"])
@pytest.mark.parametrize("kw, steps", [({}, 24), ({"accumulate_grad_batches": 4, "max_epochs": 8}, 24),
                                       ({"precision": "bf16-mixed", "gradient_clip_val": 0.5}, 24)],
                         ids=["plain", "accumulation", "bf16 and clipping"])
def test_automatic_optimization(optimizer, kw, steps, tmp_path):
    net, callback = module(optimizer=optimizer), AdaptRanks(RECIPE)
    first = loss_of(net)
    fit = trainer(tmp_path, [callback], **kw)
    fit.fit(net, data())
    assert callback.adapter.steps == steps == fit.global_step and callback.adapter.total_steps == steps
    assert callback.events and {event.step for event in callback.events} <= {6, 12, 18}
    held = {id(p) for o in callback.adapter.optimizers for group in o.param_groups for p in group["params"]}
    assert {id(p) for p in net.parameters()} == held
    assert loss_of(net) < first


@pytest.mark.parametrize("optimizer", ["pairs", "both"])
@pytest.mark.parametrize("every", [1, 3])
def test_manual_optimization(optimizer, every, tmp_path):
    """Two optimizers take one step together; micro-batches are none."""
    net, callback = module(optimizer=optimizer, manual=True, every=every), AdaptRanks(RECIPE, total_steps=24)
    trainer(tmp_path, [callback], max_epochs=2 * every).fit(net, data())
    assert callback.adapter.steps == 24 and {event.step for event in callback.events} <= {6, 12, 18} and callback.events


@pytest.mark.parametrize("optimizer", ["adamw", "pairs"])
def test_resuming_is_not_stopping(optimizer, tmp_path):
    def run(ckpt=None, save_at=None, **kw):
        net, callback = module(optimizer=optimizer), AdaptRanks(RECIPE)
        fit = trainer(tmp_path, [callback], max_epochs=4, **kw)
        if save_at:
            class Save(pl.Callback):
                def on_train_epoch_end(self, trainer, pl_module):
                    if trainer.current_epoch + 1 == save_at:
                        trainer.save_checkpoint(tmp_path / "half.ckpt")
            fit.callbacks.append(Save())
        fit.fit(net, data(n=80), ckpt_path=ckpt)                    # 10 steps an epoch: the checkpoint falls into a window
        return net, callback
    whole, told = run(save_at=1)
    again, retold = run(ckpt=tmp_path / "half.ckpt")
    assert told.events == retold.events and told.adapter.ranks == retold.adapter.ranks and told.events
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_same_trainer_fits_once_more(tmp_path):
    net, callback = module(), AdaptRanks(RECIPE, total_steps=24)
    fit = trainer(tmp_path, [callback], max_epochs=1)
    fit.fit(net, data())
    events, fit.fit_loop.max_epochs = list(callback.events), 2
    fit.fit(net, data())
    assert callback.adapter.steps == 24 and callback.events[:len(events)] == events and len(callback.events) > len(events)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_lightnings_averages_follow(kind, tmp_path):
    average = (pl.callbacks.EMAWeightAveraging(decay=0.8) if kind == "ema" else
               pl.callbacks.StochasticWeightAveraging(3e-3, swa_epoch_start=1))
    for order in ([0, 1], [1, 0]):
        net, callback = module(), AdaptRanks(RECIPE)
        first = loss_of(net)
        trainer(tmp_path, [[callback, average][i] for i in order], max_epochs=4).fit(net, data())
        assert callback.events and loss_of(net) < first             # it ends with the averaged weights
        average = type(average)(decay=0.8) if kind == "ema" else type(average)(3e-3, swa_epoch_start=1)


def test_the_logger_hears_of_changes(tmp_path):
    lines = []

    class Lines(pl.loggers.Logger):
        name, version = "lines", 0

        def log_hyperparams(self, *args, **kw):
            pass

        def log_metrics(self, metrics, step=None):
            lines.append((step, metrics))
    callback = AdaptRanks(RECIPE)
    trainer(tmp_path, [callback], logger=Lines()).fit(module(), data())
    told = {step: line["low_rank_parameters"] for step, line in lines if "low_rank_parameters" in line}
    assert set(told) == {event.step for event in callback.events}
    assert list(told.values()) == sorted(told.values(), reverse=True)


def test_the_other_name(tmp_path):
    other = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")
    net, callback = module(other), AdaptRanks(RECIPE)
    trainer(tmp_path, [callback], other).fit(net, data())
    assert callback.adapter.steps == 24 and callback.events


def test_what_the_callback_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"not known in manual optimization; write AdaptRanks\(recipe, total_steps=...\)"):
        trainer(tmp_path, [AdaptRanks(RECIPE)]).fit(module(manual=True), data())
    with pytest.raises(ValueError, match=r"not known \(max_epochs=-1\)"):
        trainer(tmp_path, [AdaptRanks(RECIPE)], max_epochs=-1).fit(module(), data())
    fit = trainer(tmp_path, [])
    fit.fit(module(), data())
    fit.save_checkpoint(tmp_path / "bare.ckpt")
    with pytest.raises(ValueError, match="the checkpoint holds no state of AdaptRanks"):
        trainer(tmp_path, [AdaptRanks(RECIPE)], max_epochs=3).fit(module(), data(), ckpt_path=tmp_path / "bare.ckpt")

    class Two:                                                      # this machine has no two devices
        world_size, strategy = 2, pl.strategies.SingleDeviceStrategy()
    with pytest.raises(ValueError, match="runs 2 processes.*average_gradients"):
        AdaptRanks(RECIPE).on_train_start(Two, module())
