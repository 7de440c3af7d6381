"""Corpora -> token ids -> batches.  Seeded, resumable, fingerprinted; nothing here has heard of models or ranks.

Dims: B sequences in a batch, T tokens in a sequence (the block), N tokens in a split.

    text = corpus("pydoc", vocab_size=4096)                        # or "wikitext-2", "tinyshakespeare", "any/file.txt"
    x, y = Batches(text.train, block=256, batch=32, seed=0)[step]  # (B, T), (B, T)
    for x, y, n in blocks(text.valid, block=256, batch=32): ...    # every target of the split once

The vocabulary is made from the training split alone: `<unk>` is id 0, then by frequency, ties in alphabetical order.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import platform
import re
import sys
import sysconfig
import tempfile
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Iterable, Iterator, Mapping

import torch
from torch import Tensor

SPLITS = ("train", "valid", "test")
UNK = "<unk>"
IGNORE = -100                               # torch's ignore_index
VERSION = 1                                 # of the rules by which pydoc is read; part of its cache's name
WORDS = re.compile(rf"{UNK}|\w+|[^\w\s]")   # a word or one punctuation mark; `<unk>` stays whole
RULER = re.compile(r"^ *[-=*+~^|][-=*+~^| ]{3,}$\n?", re.MULTILINE)      # "======", "+----+----+": layout, no language
LONG = 60                                   # characters; a paragraph this long is not in two splits of pydoc (ours)
WIKITEXT = "wiki.train.tokens"


@dataclass(frozen=True)
class Source:
    """A corpus that lives in files: its level, where it can be had, and for every file what it must be:
    a sha256, or (white-space tokens, types, bytes)."""

    level: str
    urls: tuple[str, ...]
    files: Mapping[str, str | tuple[int, int, int]]


SOURCES = {
    # Counts, not hashes: copies are about whose articles stand in another order.  No end-of-line token anywhere here.
    "wikitext-2": Source("word", (
        "https://wikitext.smerity.com/wikitext-2-v1.zip",
        "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-2-v1.zip"), {
        WIKITEXT: (2_051_910, 33_277, 10_797_148),
        "wiki.valid.tokens": (213_886, 13_776, 1_121_681),
        "wiki.test.tokens": (241_211, 14_142, 1_256_449)}),
    "tinyshakespeare": Source("char", (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",), {
        "input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}),
}
NAMES = ("pydoc", *SOURCES)


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
        unknown = {s: round((getattr(self, s) == self.unk).double().mean().item(), 6) for s in SPLITS if self.tokens[s]}
        return {"name": self.name, "level": self.level, "vocab": len(self.vocab), "fingerprint": self.fingerprint,
                "tokens": dict(self.tokens), "types": dict(self.types), "bytes": dict(self.bytes), "unknown": unknown}


def corpus(name: str | os.PathLike, *, data_dir: str | os.PathLike | None = None, level: str | None = None,
           vocab_size: int | None = None, seed: int = 0, download: bool = True) -> Corpus:
    """A corpus by name, or any UTF-8 text file by its path.

    pydoc            what comes with every CPython: the language reference and the docstrings of the standard library.
                     Words and punctuation.  About 90/5/5 by document, dealt by `seed`.
    wikitext-2       white-space tokens, official splits (Merity et al. 2016).
    tinyshakespeare  characters.  The first 90 % train, the last 10 % are validation as in nanoGPT; test is empty.
    a path           words and punctuation (white-space tokens where the name ends in .tokens).  `x.train.y` takes
                     `x.valid.y` and `x.test.y` beside it; a split without a file is cut from the end of x, 5 % each.

    Files are looked for in data_dir, $ALR_DATA and `cache_dir()`, then (download=True) fetched into the last; the two
    named corpora are checked against their known counts or hash wherever they come from.
    A bare `wiki.train.tokens` that is not in the working directory is wikitext-2.
    level: "word" or "char" instead of the corpus's own.  vocab_size: at most this many entries, `<unk>` among them.

    FileNotFoundError: a file is missing and cannot be had.  ValueError: an unknown name, a file that is empty, binary,
    too short for three splits or not what it should be, a level or vocab_size that makes no sense.
    """
    name = os.fspath(name)
    if level not in (None, "word", "char"):
        raise ValueError(f"corpus: level {level!r} is unknown; write 'word' or 'char', or leave it out.")
    if vocab_size is not None and vocab_size < 2:
        raise ValueError(f"corpus: vocab_size {vocab_size}; it counts {UNK} too and must be at least 2.")
    if name == WIKITEXT and not Path(name).exists():
        name = "wikitext-2"
    if name == "pydoc":
        return _build(name, _deal(pydoc_documents(), seed), level or "word", False, vocab_size)
    if name in SOURCES:
        texts = _find_source(name, _folders(data_dir), download)
        return _build(name, texts, level or SOURCES[name].level, name == "wikitext-2", vocab_size)
    path = _find_file(name, _folders(data_dir))
    return _build(path.name, _file_splits(path), level or "word", path.suffix == ".tokens", vocab_size)


# ---- text -> tokens -> ids ----

def tokenize(text: str, level: str = "word", spaced: bool = False) -> list[str] | str:
    """Characters (a str is their sequence), what stands between white space, or words and single punctuation marks."""
    return text if level == "char" else text.split() if spaced else WORDS.findall(text)


def _ids(tokens: Iterable[str], index: Mapping[str, int]) -> Tensor:
    return torch.tensor(list(map(index.get, tokens, repeat(Corpus.unk))), dtype=torch.int64)      # (N,)


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


# ---- files: where they are, what they must be ----

def cache_dir() -> Path:
    """`data/cache` of the checkout this file stands in; elsewhere (pip install) the user's cache folder."""
    root = Path(__file__).resolve().parents[1]
    if (root / "pyproject.toml").is_file():
        return root / "data" / "cache"
    import pooch
    return Path(pooch.os_cache("alr"))


def _folders(data_dir: str | os.PathLike | None) -> list[Path]:
    """data_dir, $ALR_DATA (relative: to the working directory, then to the checkout), the cache."""
    if data_dir is not None and not Path(data_dir).is_dir():
        raise FileNotFoundError(f"corpus: data_dir {os.fspath(data_dir)!r} is not a folder.")
    env = os.environ.get("ALR_DATA")
    places = [Path(data_dir)] if data_dir is not None else []
    places += [Path(env), Path(__file__).resolve().parents[1] / env] if env else []
    return list(dict.fromkeys([*places, cache_dir()]))


def _read(path: Path) -> str:
    """UTF-8 text, line ends untouched.  ValueError: empty or binary."""
    return _decode(path.read_bytes(), path)


def _decode(raw: bytes, path: Path | str) -> str:
    try:
        text = raw.decode("utf-8-sig")                              # a byte-order mark is not text
        at = raw.find(b"\0")
    except UnicodeDecodeError as error:
        at = error.start
    if at >= 0:
        raise ValueError(f"corpus: {path} is not UTF-8 text: byte {at} is 0x{raw[at]:02x}. "
                         "If it is text, convert it: iconv -f LATIN1 -t UTF-8 old > new.")
    if not text.strip():
        raise ValueError(f"corpus: {path} is empty" + (" but for white space." if text else "."))
    return text


def _check(raw: bytes, expected: str | tuple[int, int, int], path: Path | str) -> str:
    """The bytes as text, once they are what the corpus's file must be; else ValueError."""
    text = _decode(raw, path)
    if isinstance(expected, str):
        if (found := hashlib.sha256(raw).hexdigest()) != expected:
            raise ValueError(f"corpus: {path} has the sha256 {found}, expected {expected}; remove it, or give its path"
                             " to use it as it is.")
        return text
    words = text.split()
    if (found := (len(words), len(set(words)), len(raw))) != expected:
        raise ValueError("corpus: {} has {:,} tokens, {:,} types, {:,} bytes, expected {:,}, {:,}, {:,}; "
                         "remove it, or give its path to use it as it is.".format(path, *found, *expected))
    return text


def _find_source(name: str, folders: list[Path], download: bool) -> dict[str, str]:
    files = SOURCES[name].files
    places = [place for folder in folders for place in (folder / name, folder)]
    home = next((place for place in places if (place / next(iter(files))).is_file()), None)
    if home is None:
        why = _download(name, folders[-1] / name) if download else "download=False"
        if why:
            raise FileNotFoundError(
                f"corpus: {name} is not in {', '.join(map(str, folders))}, and was not downloaded ({why}). "
                f"Put {', '.join(files)} into {folders[-1] / name} (from {SOURCES[name].urls[0]}), or point $ALR_DATA "
                f"at a folder that holds {name}/; 'pydoc' needs no file.")
        home = folders[-1] / name
    if missing := [file for file in files if not (home / file).is_file()]:
        raise FileNotFoundError(f"corpus: {home} has {next(iter(files))} but lacks {', '.join(missing)}; put it there.")
    texts = [_check((home / file).read_bytes(), expected, home / file) for file, expected in files.items()]
    if name == "tinyshakespeare":
        cut = int(0.9 * len(texts[0]))                              # nanoGPT, data/shakespeare_char/prepare.py
        texts = [texts[0][:cut], texts[0][cut:], ""]
    return dict(zip(SPLITS, texts, strict=True))


def _download(name: str, home: Path) -> str:
    """Fetch and check the files of a corpus, then put them into `home`; what went wrong, or "".  Never half a file."""
    import pooch
    source, failures = SOURCES[name], []
    pooch.get_logger().setLevel("WARNING")
    for url in source.urls:
        try:
            home.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=home) as folder:
                got = Path(pooch.retrieve(url, known_hash=None, fname="got", path=folder,
                                          downloader=pooch.HTTPDownloader(progressbar=True, timeout=20)))
                if zipfile.is_zipfile(got):
                    with zipfile.ZipFile(got) as packed:
                        raws = {Path(member).name: packed.read(member) for member in packed.namelist()}
                else:
                    raws = {next(iter(source.files)): got.read_bytes()}
            for file, expected in source.files.items():
                _check(raws.get(file, b""), expected, f"{url}: {file}")
            for file in reversed(source.files):                     # the first last: where it is, all are
                _write(home / file, raws[file])
            return ""
        except (OSError, ValueError, zipfile.BadZipFile) as error:  # requests' errors are OSErrors
            failures.append(f"{url}: {type(error).__name__}: {str(error)[:200]}")
    return "; ".join(failures)


def _write(path: Path, raw: bytes) -> None:
    """All of the file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(raw)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _find_file(name: str, folders: list[Path]) -> Path:
    path = next((p for p in (Path(name), *(folder / name for folder in folders)) if p.is_file()), None)
    if path is not None:
        return path
    if Path(name).is_dir():
        raise ValueError(f"corpus: {name} is a folder; give the path of a file in it, or the folder as data_dir.")
    if not Path(name).suffix and Path(name).name == name:
        raise ValueError(f"corpus: unknown name {name!r}; known are {', '.join(NAMES)}, "
                         "or write the path of a UTF-8 text file.")
    raise FileNotFoundError(f"corpus: no file {name!r} in {Path.cwd()} or {', '.join(map(str, folders))}. "
                            f"Give the path of a UTF-8 text file, or one of {', '.join(NAMES)}.")


def _file_splits(path: Path) -> dict[str, str]:
    texts = {"train": _read(path)}
    for split in SPLITS[1:]:
        neighbour = path.with_name(path.name.replace(".train.", f".{split}."))
        if neighbour != path and neighbour.is_file():
            texts[split] = _read(neighbour)
    whole = len(texts["train"])
    for split in ("test", "valid"):                                 # from the end: test is last
        if split not in texts:
            cut = max(len(texts["train"]) - round(0.05 * whole), 0)  # 5 %: ours
            if space := re.compile(r"\s").search(texts["train"], cut):
                cut = space.start()                                 # not inside a word
            texts["train"], texts[split] = texts["train"][:cut], texts["train"][cut:]
    return texts


# ---- pydoc: the text that comes with every CPython ----

def pydoc_documents(lib: Path | None = None) -> list[tuple[str, str]]:
    """(name, text) of every document, in a fixed order: the topics of `pydoc_data`, then the modules of the standard
    library, each with its docstrings in source order.  Tests and lines that only rule are left out.

    Sources are parsed, never imported.  The result is cached; the cache's name holds the version of Python, that of the
    rules, and a hash of the list of files, for distributions leave out different parts of the library.
    """
    lib = Path(lib or sysconfig.get_path("stdlib"))
    files = [p.relative_to(lib) for p in sorted(lib.rglob("*.py"), key=lambda p: p.relative_to(lib).parts)]
    files = [p for p in files if p.parts[0].removesuffix(".py") in sys.stdlib_module_names
             and not {"test", "tests", "idle_test", "site-packages", "dist-packages"} & set(p.parts)]
    topics = Path("pydoc_data", "topics.py")
    if topics not in files:
        raise FileNotFoundError(f"corpus: pydoc needs {lib / topics}, which this Python does not have; install the "
                                "full standard library (Debian: libpython3-stdlib), or give a text file.")
    listing = "\n".join(f"{p.as_posix()} {(lib / p).stat().st_size}" for p in files)
    key = hashlib.sha256(listing.encode()).hexdigest()[:12]
    path = cache_dir() / f"pydoc-{platform.python_version()}-v{VERSION}-{key}.json"
    try:
        return [(name, text) for name, text in json.loads(path.read_text("utf-8"))]
    except (FileNotFoundError, json.JSONDecodeError):               # none yet, or the disk lost half of it: read anew
        pass
    documents = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                             # invalid escapes in the library are not our affair
        tree = ast.parse((lib / topics).read_bytes())
        found = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
        documents += [(f"topics/{name}", text) for name, text in sorted(found.items())]
        for p in files:
            if p != topics:
                documents.append((p.as_posix(), "\n\n".join(_docstrings(ast.parse((lib / p).read_bytes())))))
    documents = [(name, text) for name, raw in documents if (text := RULER.sub("", raw).strip())]
    try:
        _write(path, json.dumps(documents, ensure_ascii=False).encode())
    except OSError as error:
        warnings.warn(f"corpus: cannot write {path} ({error}); pydoc is read anew each time, which takes seconds.")
    return documents


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        if text := ast.get_docstring(node):
            yield text
    for block in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, block, ()):
            yield from _docstrings(child)


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text)


def _deal(documents: list[tuple[str, str]], seed: int) -> dict[str, str]:
    """Documents in an order drawn by the seed; each goes to validation while that stays within 5 % of all characters,
    then to test within 5 %, else it trains.  One that would fill a fifth of such a split alone trains (ours).

    The language reference and some modules repeat each other, so a paragraph of LONG characters or more is left out of
    validation and test where an earlier split has it.
    """
    order = sorted(documents, key=lambda d: hashlib.sha256(f"{seed} {d[0]}".encode()).digest())
    room = 0.05 * sum(len(text) for _, text in documents)
    size, dealt = dict.fromkeys(SPLITS, 0), {s: [] for s in SPLITS}
    for _, text in order:
        free = (s for s in ("valid", "test") if size[s] + len(text) <= room and len(text) <= room / 5)
        split = next(free, "train")
        size[split] += len(text)
        dealt[split].append(text)
    seen: set[str] = set()
    for split in SPLITS:
        keys = [[(" ".join(p.split()), p) for p in _paragraphs(text)] for text in dealt[split]]
        if split != "train":
            dealt[split] = ["\n\n".join(p for key, p in doc if key not in seen) for doc in keys]
        seen |= {key for doc in keys for key, _ in doc if len(key) >= LONG}
    return {s: "\n\n".join(filter(None, dealt[s])) for s in SPLITS}


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
        draw = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        start = torch.randint(len(self.tokens) - self.block, (self.batch, 1), generator=draw)      # (B, 1)
        window = self.tokens[(start + torch.arange(self.block + 1)).to(self.tokens.device)]        # (B, T + 1)
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
