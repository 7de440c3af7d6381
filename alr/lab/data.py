"""Corpora -> token ids -> batches.  Seeded, resumable, fingerprinted; nothing here has heard of models or ranks.

Dims: B sequences in a batch, T tokens in a sequence (the block), N tokens in a split.

    text = corpus("pydoc", vocab_size=4096)                        # or "wikitext-2", "tinyshakespeare", "any/file.txt"
    x, y = Batches(text.train, block=256, batch=32, seed=0)[step]  # (B, T), (B, T)
    for x, y, n in blocks(text.valid, block=256, batch=32): ...    # every target of the split once

The vocabulary is made from the training split alone: `<unk>` is id 0, then by frequency, ties in alphabetical order.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat

import torch
from torch import Tensor

from . import sources
from .sources import SPLITS

UNK = "<unk>"
IGNORE = -100                               # torch's ignore_index
WORDS = re.compile(rf"{UNK}|\w+|[^\w\s]")   # a word or one punctuation mark; `<unk>` stays whole


@dataclass(frozen=True, eq=False)
class Corpus:
    """Three splits of token ids and what they came from; `corpus()` makes it."""

    name: str
    level: str                                      # "word" or "char"
    spaced: bool                                    # words are what stands between white space (WikiText's own tokens)
    vocab: tuple[str, ...] = field(repr=False)
    train: Tensor = field(repr=False)               # (N,) int64, as are valid and test; test may be empty
    valid: Tensor = field(repr=False)
    test: Tensor = field(repr=False)
    tokens: dict[str, int]                          # per split
    types: dict[str, int]                           # per split: distinct tokens, before the vocabulary limit
    bytes: dict[str, int]                           # per split: UTF-8 bytes of the text the tokens were taken from
    fingerprint: str                                # first 16 hex digits of a sha256 over vocabulary and ids

    unk = 0                                         # the id of <unk>

    @cached_property
    def _index(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.vocab)}

    def encode(self, text: str) -> Tensor:
        """Text -> ids (N,) int64; what the vocabulary lacks becomes `<unk>`."""
        return _ids(tokenize(text, self.level, self.spaced), self._index)

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """Ids -> text; words are joined by a space.  ValueError for an id that is not in the vocabulary (-100, say)."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if wrong := [i for i in ids if not 0 <= i < len(self.vocab)]:
            raise ValueError(f"decode: id {wrong[0]} is not in {self.name}'s vocabulary, 0 to {len(self.vocab) - 1}.")
        return (" " if self.level == "word" else "").join(self.vocab[i] for i in ids)

    def bits_per_byte(self, nats: float, split: str = "valid") -> float:
        """Nats per token -> bits per byte of the split's raw text: nats * tokens / (bytes * ln 2).

        Comparable over tokenisations of the same text as far as the text can be had back from the tokens.  At the word
        level it cannot: `<unk>` stands for many words and white space is lost, so the figure is too low by what it
        would cost to spell these, and only runs with the same fingerprint may be compared.
        """
        if not self.bytes[split]:
            raise ValueError(f"bits_per_byte: the {split} split of {self.name} is empty.")
        return nats * self.tokens[split] / (self.bytes[split] * math.log(2))

    def describe(self) -> dict:
        """Plain values for the first line of a log; `unknown` is the share of each split that reads `<unk>`."""
        unknown = {s: round((getattr(self, s) == self.unk).mean(dtype=torch.float64).item(), 6)
                   for s in SPLITS if self.tokens[s]}
        return {"name": self.name, "level": self.level, "vocab": len(self.vocab), "fingerprint": self.fingerprint,
                "tokens": dict(self.tokens), "types": dict(self.types), "bytes": dict(self.bytes), "unknown": unknown}


def corpus(name: str | os.PathLike, *, data_dir: str | os.PathLike | None = None, level: str | None = None,
           vocab_size: int | None = None, seed: int = 0, download: bool = True) -> Corpus:
    """A corpus by name, or any UTF-8 text file by its path.

    pydoc            what comes with every CPython: the language reference and the docstrings of the standard library.
                     Words and punctuation.  About 90/5/5 by document, dealt by `seed`.
    wikitext-2       white-space tokens, official splits (Merity et al. 2016).
    tinyshakespeare  characters.  The first 90 % train, the last 10 % are validation as in nanoGPT; test is empty.
    shakespeare      the same text with a test split: 85 % train, 5 % test, the last 10 % validation as above.
    a path           words and punctuation (white-space tokens where the name ends in .tokens).  `x.train.y` takes
                     `x.valid.y` and `x.test.y` beside it; a split without a file is cut from the end of x, 5 % each.

    Files are looked for in data_dir, $ALR_DATA and `cache_dir()`, then (download=True) fetched into the last; the two
    named corpora are checked against their known counts or hash wherever they come from.
    A bare `wiki.train.tokens` that is not in the working directory is wikitext-2.
    level: "word", "char" or "space" (what stands between white space, also in a plain .txt) instead of the corpus's own.
    vocab_size: at most this many entries, `<unk>` among them.

    FileNotFoundError: a file is missing and cannot be had.  ValueError: an unknown name, a file that is empty, binary,
    too short for three splits or not what it should be, a level or vocab_size that makes no sense.
    """
    name = os.fspath(name)
    if level not in (None, "word", "char", "space"):
        raise ValueError(f"corpus: level {level!r} is unknown; write 'word', 'char' or 'space', or leave it out.")
    if vocab_size is not None and vocab_size < 2:
        raise ValueError(f"corpus: vocab_size {vocab_size}; it counts {UNK} too and must be at least 2.")
    name, split, own, spaced = sources.texts(name, data_dir, seed, download)
    if level == "space":
        level, spaced = "word", True
    return _build(name, split, level or own, spaced, vocab_size)


# ---- text -> tokens -> ids ----

def tokenize(text: str, level: str = "word", spaced: bool = False) -> list[str] | str:
    """Characters (a str is their sequence), what stands between white space, or words and single punctuation marks."""
    return text if level == "char" else text.split() if spaced else WORDS.findall(text)


def _ids(tokens: Iterable[str], index: Mapping[str, int]) -> Tensor:
    return torch.tensor(list(map(index.get, tokens, repeat(Corpus.unk))), dtype=torch.int64, device="cpu")    # (N,)


def _build(name: str, texts: Mapping[str, str], level: str, spaced: bool, vocab_size: int | None) -> Corpus:
    tokens = {s: tokenize(texts[s], level, spaced) for s in SPLITS}
    sizes = {s: len(tokens[s]) for s in SPLITS}
    if min(sizes["train"], sizes["valid"]) < 2 or sizes["test"] == 1:
        raise ValueError(f"corpus: {name} has {sum(sizes.values())} {level} tokens, split into " + ", ".join(
            f"{sizes[s]} {s}" for s in SPLITS) + "; a split needs at least 2 (a single file about 40 tokens).")
    count = Counter(tokens["train"])
    count.pop(UNK, None)
    known = sorted(count, key=lambda token: (-count[token], token))
    vocab = (UNK, *known[:None if vocab_size is None else vocab_size - 1])
    index = {token: i for i, token in enumerate(vocab)}
    ids = {s: _ids(tokens[s], index) for s in SPLITS}               # (N,) each
    digest = hashlib.sha256(json.dumps([vocab, sizes]).encode())
    for s in SPLITS:
        digest.update(ids[s].numpy().astype("<i4").tobytes())
    return Corpus(name, level, spaced, vocab, **ids, tokens=sizes, types={s: len(set(tokens[s])) for s in SPLITS},
                  bytes={s: len(texts[s].encode()) for s in SPLITS}, fingerprint=digest.hexdigest()[:16])


# ---- batches ----

class Batches:
    """Random windows of a split: batches[step] -> x (B, T), y (B, T), where y is x one token on.

    Stateless: step s gives the same windows whoever asks and whatever was asked before, so a resumed run sees what an
    unbroken one does.  Drawn with replacement by a generator of its own, seeded from (seed, step); torch's global one
    is neither read nor moved.  There is no end: any step >= 0 will do.  ValueError: the split is shorter than T + 1.
    """

    def __init__(self, tokens: Tensor, block: int, batch: int, seed: int = 0):
        _check_sizes("Batches", tokens, block, batch)
        if len(tokens) < block + 1:
            raise ValueError(f"Batches: a block of {block} needs {block + 1} tokens and the split has {len(tokens)}; "
                             f"a block of at most {len(tokens) - 1} would fit.")
        self.tokens, self.block, self.batch, self.seed = tokens, block, batch, seed

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        if step < 0:
            raise IndexError(f"Batches: step {step}; steps count from 0.")
        digest = hashlib.sha256(f"{self.seed} {step}".encode()).digest()
        draw = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))     # the same on every device
        start = torch.randint(len(self.tokens) - self.block, (self.batch, 1), generator=draw, device="cpu")     # (B, 1)
        window = self.tokens[(start + torch.arange(self.block + 1, device="cpu")).to(self.tokens.device)]       # (B, T + 1)
        return window[:, :-1], window[:, 1:]                        # (B, T), (B, T)


def blocks(tokens: Tensor, block: int, batch: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Walk a split in order: x (b, T), y (b, T), n targets, b <= batch; each of the N - 1 targets exactly once.

    Blocks do not overlap: the first target of each is predicted from one token, so a loss over them is a little above
    that of a sliding window.  The last block is filled up with x = 0, y = -100 (torch's ignore_index), which n does not
    count.  ValueError: fewer than 2 tokens.
    """
    _check_sizes("blocks", tokens, block, batch)
    if len(tokens) < 2:
        raise ValueError(f"blocks: the split has {len(tokens)} tokens; there is a target from 2 on.")
    return _walk(tokens, block, batch)


def _walk(tokens: Tensor, block: int, batch: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    for at in range(0, len(tokens) - 1, block * batch):
        n = min(block * batch, len(tokens) - 1 - at)
        rows = -(-n // block)
        x, y = tokens.new_zeros(rows * block), tokens.new_full((rows * block,), IGNORE)            # (b T,), (b T,)
        x[:n], y[:n] = tokens[at:at + n], tokens[at + 1:at + n + 1]
        yield x.view(rows, block), y.view(rows, block), n           # (b, T), (b, T)


def _check_sizes(who: str, tokens: Tensor, block: int, batch: int) -> None:
    if tokens.dim() != 1:
        raise ValueError(f"{who}: tokens of shape {tuple(tokens.shape)}; a split is one line of ids, (N,).")
    if block < 1 or batch < 1:
        raise ValueError(f"{who}: block {block}, batch {batch}; both must be at least 1.")
