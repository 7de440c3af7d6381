"""Made-up logs with known numbers, in the shape that alr.train writes them.  No torch, no randomness."""

import json
from pathlib import Path

from alr.evidence.records import thin
from alr.lab.log import digest

ROLES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")


def log(arm="alr", seed=0, loss=4.5, epochs=6, per_epoch=20, log_every=2, blocks=2, drop=1.0, cost=10.0, lr=1e-3,
        start=64, shrink=4, tokens=(4, 16), **config):
    """The text lines of a finished log that ends at val_loss `loss`, falling to it by `drop` per epoch.

    Ranks start at `start` and lose `shrink` per epoch in every layer (start None: dense, no ranks); 1,000 block
    parameters and 10 per rank; every epoch takes `cost` seconds.
    """
    batch, block = tokens
    config = {"recipe": arm, "model": "gpt", "n_layers": blocks, "d_model": 16, "block_size": block,
              "batch_size": batch, "tied": False, "lr": lr, "steps_per_epoch": per_epoch, "epochs": epochs} | config
    layers = [f"blocks.{i}.{role}" for i in range(blocks) for role in ROLES]
    ranks = {name: start + i % 6 for i, name in enumerate(layers)} if start else {}

    def params():
        counts = {"blocks": 1000 + 10 * sum(ranks.values()), "embedding": 500, "head": 300}
        return counts | {"total": sum(counts.values())}

    out = [{"kind": "run", "name": arm, "recipe": f"Recipe({arm!r})", "config": config, "seed": seed,
            "params": params(), "commit": "0123456789abcdef", "dirty": False, "source": "beef", "alr": "0.1.0",
            "torch": "2.13.0", "python": "3.11.7", "device": "cpu", "processor": "a CPU",
            "threads": 1, "corpus": {"name": "toy", "fingerprint": "f00d", "tokens": {"train": 1000}},
            "command": "python -m alr.train", "started": "2026-01-01T00:00:00"}]
    step = 0
    for epoch in range(1, epochs + 1):
        for step in range((epoch - 1) * per_epoch + 1, epoch * per_epoch + 1):
            if step % log_every == 0:
                fresh = step - (epoch - 1) * per_epoch if epoch > 1 and ranks else 1000      # steps since a resize
                bump = 0.4 * 0.7 ** fresh if shrink else 0.0
                out.append({"kind": "step", "step": step, "loss": loss + drop * (epochs - epoch) + bump, "lr": lr,
                            "grad_norm": 1 + bump, "tokens_per_s": 1000.0})
        if epoch < epochs and shrink:
            for name, old in ranks.items():
                ranks[name] = old - shrink
                out.append({"kind": "resize", "step": step, "layer": name, "old": old, "new": old - shrink,
                            "target": (old - shrink) / 1.5, "error": 0.01})
        r = list(ranks.values())
        out.append({"kind": "epoch", "epoch": epoch, "step": step, "train_loss": loss + drop * (epochs - epoch) - 0.1,
                    "val_loss": loss + drop * (epochs - epoch), "rank_min": min(r, default=None),
                    "rank_max": max(r, default=None), "rank_avg": sum(r) / len(r) if r else None, "ranks": r,
                    "params_millions": params()["total"] / 1e6, "time_sec": cost})
    end = {"kind": "end", "step": step, "train_loss": loss - 0.1, "val_loss": loss, "val_ppl": 2.718281828 ** loss,
           "val_bpb": loss / 3, "test_loss": loss, "test_ppl": 2.718281828 ** loss, "test_bpb": loss / 3,
           "params": params(), "ranks": ranks, "shapes": {name: [6, 4] for name in ranks}, "resumed": [],
           "seconds": {"training": cost * epochs, "evaluation": 5.0, "adaptation": 1.0}, "tokens_per_s": 1000.0,
           "peak_memory_mb": 10.0}
    lines = [json.dumps(line) for line in out]
    return [*lines, json.dumps({**end, "digest": digest(lines)})]


def write(folder, lines, name=None):
    """Lines -> a record in that folder, thinned; the path."""
    config = json.loads(lines[0])["config"]
    path = Path(folder) / f"{name or config['recipe'] + '.seed' + str(json.loads(lines[0])['seed'])}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(thin(lines, every=1)) + "\n", encoding="utf-8")
    return path


def suite(folder, losses, **more):
    """{arm: [loss at seed 0, 1, ...]} -> a suite folder of small records."""
    for arm, values in losses.items():
        for seed, loss in enumerate(values):
            write(folder, log(arm, seed, loss, **{"epochs": 3, "blocks": 1, "per_epoch": 4, **more}))
    return Path(folder)
