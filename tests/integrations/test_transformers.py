"""Hugging Face models and their Trainer, built from configs; nothing is downloaded."""

import copy
import warnings
from dataclasses import replace

import pytest
import safetensors.torch as safetensors
import torch

import alr

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")

from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from alr.integrations.transformers import AdaptRanks, load_  # noqa: E402
from alr.observe import Observer  # noqa: E402

RECIPE = replace(alr.recipes.alr, every=6, control=replace(alr.recipes.alr.control, min_rank=1))
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else \
    "gradient_checkpointing"
NO_HEAD = lambda name: "head" not in name and "classifier" not in name      # noqa: E731


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(tied=False, seed=0, layers=2, **kw):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
                                        num_attention_heads=4,
                                        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, **kw))


def gpt2(seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0,
                                      embd_pdrop=0.0,
                                      attn_pdrop=0.0, bos_token_id=0, eos_token_id=0))


def vit(seed=0):
    torch.manual_seed(seed)
    return ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                                               image_size=16, patch_size=4, num_labels=3))


def bert(seed=0):
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                                    intermediate_size=64, max_position_embeddings=32, num_labels=3,
                                                    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def texts(n=96, length=16):
    """Sequences that count upwards from anywhere: learnable, and the same at every call."""
    g = torch.Generator().manual_seed(1)
    rows = (torch.randint(40, (n, 1), generator=g) + torch.arange(length)) % 40
    return [{"input_ids": row, "labels": row} for row in rows]


def quiet_factorize_(model, rank, **kw):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="factorize_")
        return alr.factorize_(model, rank, **kw)


def arguments(folder, **kw):
    kw = {"max_steps": 24, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "logging_steps": 6, "save_strategy": "no",
          "report_to": [], "disable_tqdm": True, "seed": 0, "use_cpu": True, **kw}
    return TrainingArguments(output_dir=str(folder), **kw)


def trainer(folder, model, callbacks, optimizer=None, **kw):
    return Trainer(model=model, args=arguments(folder, **kw), train_dataset=texts(), eval_dataset=texts(8), callbacks=callbacks,
                   optimizers=(optimizer, None))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------ models

def test_llama_in_and_out():
    model, ids = llama(), torch.arange(12)[None]
    alr.factorize_(model, rank=0.9, where=NO_HEAD)
    assert len(alr.low_rank_layers(model)) == 14
    logits, text = model(ids).logits, model.generate(ids, max_new_tokens=6, do_sample=False)
    alr.densify_(model)
    torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=1e-4)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), text)


def test_a_tied_head_is_refused_and_can_be_left_out():
    model = llama(tied=True)
    with pytest.raises(ValueError, match="'lm_head' shares its weight with 'model.embed_tokens'"):
        alr.factorize_(model, rank=4)
    alr.factorize_(model, rank=4, where=NO_HEAD)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_gpt2s_conv1d_goes_in_and_comes_back():
    model, ids = gpt2(), torch.arange(12)[None]
    before = model(ids).logits
    kinds = {name: (type(mod), mod.weight.shape) for name, mod in model.named_modules() if type(mod).__name__ == "Conv1D"}
    assert len(kinds) == 8
    quiet_factorize_(model, rank=lambda name, mod: min(mod.weight.shape), where=NO_HEAD)     # full rank: nothing is lost
    assert set(alr.low_rank_layers(model)) == set(kinds)
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-4)
    quiet_factorize_(other := gpt2(seed=1), rank=3, where=NO_HEAD)
    other.load_state_dict(model.state_dict())
    assert same(model, other) and torch.equal(model.eval()(ids).logits, other.eval()(ids).logits)
    text = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    alr.densify_(model)
    assert {name: (type(mod), mod.weight.shape) for name, mod in model.named_modules()
            if type(mod).__name__ == "Conv1D"} == kinds
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-4)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0), text)


@pytest.mark.parametrize("make", ["bert", "vit"])
def test_pooled_classifiers_are_measured_per_example(make):
    """A trunk over positions and a head over one of them: importance against the derivatives of every example's loss."""
    model = (bert if make == "bert" else vit)().double()
    quiet_factorize_(model, rank=0.9)
    g = torch.Generator().manual_seed(0)
    x = torch.randint(40, (6, 8), generator=g) if make == "bert" else torch.randn(6, 3, 16, 16, generator=g, dtype=torch.double)
    y = torch.randint(3, (6,), generator=g)
    model.eval()                                                    # no dropout
    layers = alr.low_rank_layers(model)
    observer = Observer(layers, ("importance",), steps=2)
    for _ in range(2):
        torch.nn.functional.cross_entropy(model(x).logits, y).backward()
        observer.commit()
    seen = observer.close()
    for name in list(layers)[::3]:
        layer, one = layers[name], seen[name]
        exact = torch.zeros(layer.rank, dtype=torch.double)
        for i in range(len(x)):
            U, = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x[i:i + 1]).logits, y[i:i + 1]), [layer.U])
            # d loss / d (scale of direction j) = <G, U a_j b_j V>, and <G V^T, U a_j b_j> = dU's inner product with U a_j b_j
            exact += torch.einsum("mr,ms,sj,jr->j", U, layer.U.detach(), one.A.double(), one.B.double()).square()
        exact /= 2 * len(x)
        torch.testing.assert_close(one.importance, exact, rtol=0.02, atol=1e-12)


def test_mixtrals_experts_are_named_when_they_are_not_taken():
    config = transformers.MixtralConfig(vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                        num_attention_heads=4,
                                        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)
    with pytest.warns(UserWarning, match=r"not taken, though they hold matrices: 1 MixtralExperts"):
        model = alr.factorize_(transformers.MixtralForCausalLM(config), rank=4, where=NO_HEAD)
    assert model(torch.arange(8)[None]).logits.isfinite().all()


# ------------------------------------------------------------------------------------------------ files

@pytest.mark.parametrize("make", [llama, lambda: llama(tied=True), gpt2, bert, vit],
                         ids=["llama", "tied", "gpt2", "bert", "vit"])
def test_a_folder_gives_the_model_back(make, tmp_path):
    model = make()
    quiet_factorize_(model, rank=lambda name, mod: 3 + len(name) % 4, where=NO_HEAD)
    model.save_pretrained(tmp_path)
    torch.manual_seed(7)
    fresh = load_(type(model)(model.config), tmp_path)
    assert same(model, fresh)
    if getattr(model.config, "tie_word_embeddings", False) and hasattr(model, "lm_head"):
        assert fresh.lm_head.weight is fresh.get_input_embeddings().weight
    low = quiet_factorize_(type(model)(model.config), rank=2, where=NO_HEAD)
    assert same(model, load_(low, tmp_path))


def test_a_folder_in_several_files(tmp_path):
    model = alr.factorize_(llama(), rank=4, where=NO_HEAD)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert same(model, load_(llama(seed=3), tmp_path))


def test_joined_experts_are_refused(tmp_path):
    config = transformers.MixtralConfig(vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                        num_attention_heads=4,
                                        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)
    quiet_factorize_(transformers.MixtralForCausalLM(config), 4, where=NO_HEAD).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"3 of the model are not saved.*torch.save\(model.state_dict\(\), file\)"):
        load_(transformers.MixtralForCausalLM(config), tmp_path)


def test_what_load_refuses(tmp_path):
    with pytest.raises(ValueError, match="holds no model.safetensors"):
        load_(llama(), tmp_path)
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dense model"):
        load_(llama(), tmp_path)
    alr.factorize_(llama(), rank=4, where=NO_HEAD).save_pretrained(tmp_path)
    deeper = LlamaForCausalLM(LlamaConfig(**{**llama().config.to_dict(), "num_hidden_layers": 3}))
    before = copy.deepcopy(deeper.state_dict())
    with pytest.raises(ValueError, match=r"of the model are not saved, the first is 'model.layers.2"):
        load_(deeper, tmp_path)
    assert deeper.state_dict().keys() == before.keys()
    assert all(torch.equal(deeper.state_dict()[key], x) for key, x in before.items())


# ------------------------------------------------------------------------------------------------ the Trainer

@pytest.mark.parametrize("kw", [{}, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
                                {CHECKPOINTING: True, "max_grad_norm": 0.5}, {"bf16": True}],
                         ids=["plain", "accumulation", "checkpointing", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "pairs"])
def test_the_trainer_adapts(optimizer, kw, tmp_path):
    model = alr.factorize_(llama(layers=1), rank=0.9, where=NO_HEAD)
    callback = AdaptRanks(RECIPE)
    run = trainer(tmp_path, model, [callback], alr.PairOptimizer(model) if optimizer == "pairs" else None, **kw)
    first = run.evaluate()["eval_loss"]
    run.train()
    assert callback.adapter.steps == 24                             # optimizer steps, whatever a micro-batch is
    assert {event.step for event in callback.events} <= {6, 12, 18} and callback.events
    dense = sum(layer.out_features * layer.in_features for layer in alr.low_rank_layers(model).values())
    assert run.state.log_history[-2]["low_rank_parameters"] <= RECIPE.control.share * dense
    held = {id(p) for group in callback.adapter.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} == held
    assert run.evaluate()["eval_loss"] < first


def test_checkpointing_and_accumulation_leave_the_decisions_as_they_are(tmp_path):
    """Equal batches in another cut, and blocks computed twice: the same ranks."""
    ends = []
    for i, kw in enumerate(({}, {CHECKPOINTING: True}, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2})):
        model = alr.factorize_(llama(layers=1).double(), rank=0.9, where=NO_HEAD)
        callback = AdaptRanks(RECIPE)
        trainer(tmp_path / str(i), model, [callback], **kw).train()
        ends.append(callback.adapter.ranks)
    assert ends[0] == ends[1] == ends[2]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kw):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


# no window, a decision, in a window
@pytest.mark.parametrize("optimizer, stop", [("adamw", 7), ("pairs", 12), ("pairs", 16)])
def test_resuming_is_not_stopping(optimizer, stop, tmp_path):
    def run(folder, more=(), resume=None):
        model = alr.factorize_(llama(layers=1), rank=0.9, where=NO_HEAD)
        callback = AdaptRanks(RECIPE)
        t = trainer(folder, model, [callback, *more], alr.PairOptimizer(model) if optimizer == "pairs" else None)
        t.train(resume_from_checkpoint=resume)
        return model, callback
    whole, told = run(tmp_path / "whole")
    run(tmp_path / "parts", [StopAt(stop)])
    again, retold = run(tmp_path / "parts", resume=str(tmp_path / "parts" / f"checkpoint-{stop}"))
    assert same(whole, again) and told.events == retold.events and told.adapter.ranks == retold.adapter.ranks


def test_a_checkpoint_that_lies_elsewhere(tmp_path):
    def make(folder, **kw):
        model = alr.factorize_(llama(layers=1), rank=0.9, where=NO_HEAD)
        return trainer(folder, model, [AdaptRanks(RECIPE, **kw)], max_steps=12, save_strategy="steps", save_steps=8)
    make(tmp_path / "a").train()
    there = str(tmp_path / "a" / "checkpoint-8")
    with pytest.raises(ValueError, match=r"resume_from=FOLDER"):
        make(tmp_path / "b").train(resume_from_checkpoint=there)
    with pytest.raises(ValueError, match="is of step 12, and training goes on from step 8"):
        make(tmp_path / "b", resume_from=tmp_path / "a" / "checkpoint-12").train(resume_from_checkpoint=there)
    again = make(tmp_path / "b", resume_from=there)
    again.train(resume_from_checkpoint=there)
    assert again.state.global_step == 12


def test_a_model_whose_weights_have_other_names_in_its_files(tmp_path):
    """transformers renames ViT's in its files, and the Trainer itself logs that it found none of them and goes on."""
    g = torch.Generator().manual_seed(0)
    images = [{"pixel_values": torch.randn(3, 16, 16, generator=g), "labels": i % 3} for i in range(96)]
    def run(resume=None):
        model = quiet_factorize_(vit(), rank=0.9, where=NO_HEAD)
        callback = AdaptRanks(RECIPE)
        t = Trainer(model=model, args=arguments(tmp_path, save_strategy="steps", save_steps=16), train_dataset=images,
                    callbacks=[callback])
        t.train(resume_from_checkpoint=resume)
        return model, callback
    whole, told = run()
    again, retold = run(str(tmp_path / "checkpoint-16"))
    assert told.events and told.events == retold.events and same(whole, again)


def test_weights_that_did_not_come_back_are_noticed(tmp_path):
    model = alr.factorize_(llama(layers=1), rank=0.9, where=NO_HEAD)
    trainer(tmp_path, model, [AdaptRanks(RECIPE)], max_steps=8, save_strategy="steps", save_steps=8).train()
    file = tmp_path / "checkpoint-8" / "model.safetensors"
    safetensors.save_file({"x." + key: x for key, x in safetensors.load_file(file).items()}, file, {"format": "pt"})
    fresh = alr.factorize_(llama(layers=1, seed=5), rank=0.9, where=NO_HEAD)
    with pytest.raises(ValueError, match="hold weights of different names"):
        trainer(tmp_path, fresh, [AdaptRanks(RECIPE)]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    safetensors.save_file({key: 2 * x for key, x in model.state_dict().items()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="does not hold the weights that were saved"):
        trainer(tmp_path, fresh, [AdaptRanks(RECIPE)]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_the_best_model_may_be_a_wider_one(tmp_path):
    model = alr.factorize_(llama(layers=1), rank=0.9, where=NO_HEAD)
    run = trainer(tmp_path, model, [AdaptRanks(RECIPE)], save_strategy="steps", eval_strategy="steps", save_steps=4,
                  eval_steps=4,
                  load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)     # the worst: the first
    run.train()
    assert run.state.best_global_step == 4
    assert {layer.rank for layer in alr.low_rank_layers(model).values()} == \
        {layer.rank for layer in alr.low_rank_layers(alr.factorize_(llama(layers=1), rank=0.9, where=NO_HEAD)).values()}
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric)


def test_an_average_follows(tmp_path):
    model = alr.factorize_(llama(layers=1), rank=0.9, where=NO_HEAD)
    ema = torch.optim.swa_utils.AveragedModel(model)
    callback = AdaptRanks(RECIPE, averages=[ema])
    trainer(tmp_path, model, [callback]).train()
    assert callback.events and {n: x.rank for n, x in alr.low_rank_layers(ema.module).items()} == callback.adapter.ranks


def test_what_the_callback_refuses(tmp_path):
    with pytest.raises(TypeError, match="wanted a Recipe"):
        AdaptRanks("alr")
    with pytest.raises(ValueError, match="no LowRankLinear"):
        trainer(tmp_path, llama(layers=1), [AdaptRanks(RECIPE)]).train()
    model = llama(layers=1)
    optimizer = torch.optim.AdamW(model.parameters())
    alr.factorize_(model, rank=0.9, where=NO_HEAD)
    with pytest.raises(ValueError, match="no optimizer holds the factors"):
        trainer(tmp_path, model, [AdaptRanks(RECIPE)], optimizer).train()


def test_several_gpus_are_refused_by_name(tmp_path):
    from transformers.training_args import ParallelMode
    run = trainer(tmp_path, alr.factorize_(llama(layers=1), rank=0.9, where=NO_HEAD), [])
    class Two:                                                      # this machine has no two of them
        parallel_mode, world_size, n_gpu, deepspeed = ParallelMode.DISTRIBUTED, 2, 1, None
    with pytest.raises(ValueError, match=r"DISTRIBUTED mode on 2 processes.*average_gradients"):
        AdaptRanks(RECIPE).on_train_begin(Two, run.state, run.control, model=run.model, optimizer=None)
