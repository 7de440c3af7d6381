"""Where text comes from: files by name or path, and the text that every CPython brings.  Splits of str; no tokens here.

A file is found in data_dir, $ALR_DATA or `cache_dir()`, else downloaded and checked, else the error says what to put where.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import sys
import sysconfig
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "valid", "test")
VERSION = 1                                 # of the rules by which pydoc is read; part of its cache's name
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
HELD = "shakespeare"                        # tinyshakespeare with a test split
NAMES = ("pydoc", *SOURCES, HELD)


def texts(name: str, data_dir: str | os.PathLike | None, seed: int, download: bool) -> tuple[str, dict[str, str], str, bool]:
    """(name, {split: text}, level, whether words are what stands between white space) of a corpus or a file."""
    if name == WIKITEXT and not Path(name).exists():
        name = "wikitext-2"
    if name == "pydoc":
        return name, _deal(pydoc_documents(), seed), "word", False
    if name == HELD:
        text = _find_source("tinyshakespeare", _folders(data_dir), download)
        cut = int(0.85 / 0.9 * len(text["train"]))                  # ours: the last 5 % of the whole that trained
        return name, {"train": text["train"][:cut], "valid": text["valid"], "test": text["train"][cut:]}, "char", False
    if name in SOURCES:
        return name, _find_source(name, _folders(data_dir), download), SOURCES[name].level, name == "wikitext-2"
    path = _find_file(name, _folders(data_dir))
    return path.name, _file_splits(path), "word", path.suffix == ".tokens"


# ---- files: where they are, what they must be ----

def cache_dir() -> Path:
    """`data/cache` of the checkout this file stands in; elsewhere (pip install) the user's cache folder."""
    root = Path(__file__).resolve().parents[2]
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
    places += [Path(env), Path(__file__).resolve().parents[2] / env] if env else []
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
    tops = [p for p in lib.iterdir() if p.name.removesuffix(".py") in sys.stdlib_module_names]       # not site-packages
    files = [p.relative_to(lib) for top in tops for p in (top.rglob("*.py") if top.is_dir() else [top])]
    files = sorted((p for p in files if not {"test", "tests", "idle_test"} & set(p.parts)), key=lambda p: p.parts)
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
        warnings.warn(f"corpus: cannot write {path} ({error}); pydoc is read anew each time, which takes seconds.",
                      stacklevel=2)
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
