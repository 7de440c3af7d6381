"""Laws of `alr.lab.data`: what a corpus is, where it comes from, and that batches are a function of the step."""

import hashlib
import io
import itertools
import json
import math
import os
import re
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alr.lab import sources
from alr.lab.data import IGNORE, UNK, Batches, blocks, corpus, tokenize
from alr.lab.sources import NAMES, SPLITS, Source, pydoc_documents

DATA = Path(__file__).resolve().parents[2] / os.environ.get("ALR_DATA", "../shared/data")
needs = {name: pytest.mark.skipif(not (DATA / name).is_dir(), reason=f"{name} is not in $ALR_DATA or ../shared/data")
         for name in ("wikitext-2", "tinyshakespeare")}
laws = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = "the cat sat . the dog sat , and the cat saw the dog ! " * 20


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No test finds data by chance or reaches a network: empty cache, no $ALR_DATA, ports that nobody listens on."""
    monkeypatch.delenv("ALR_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(sources, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(sources, "SOURCES", {name: Source(s.level, ("http://127.0.0.1:9/x",), s.files)
                                          for name, s in sources.SOURCES.items()})


@pytest.fixture(scope="module")
def documents():
    return pydoc_documents()                        # seconds the first time, then from data/cache


@pytest.fixture
def pydoc(documents, monkeypatch):
    monkeypatch.setattr(sources, "pydoc_documents", lambda: documents)
    return corpus("pydoc")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ---- vocabulary and ids ----

words = st.lists(st.sampled_from("a b c dd ee ff g1 h_i ? !".split()), min_size=150, max_size=300)


@laws
@given(words, st.integers(2, 12))
def test_vocabulary_is_the_training_splits_by_frequency_then_alphabet(tmp_path, tokens, limit):
    path = write(tmp_path / "x.txt", " ".join(tokens))
    whole, small = corpus(path), corpus(path, vocab_size=limit)
    count = Counter(tokens[:whole.tokens["train"]])
    assert whole.vocab == (UNK, *sorted(count, key=lambda t: (-count[t], t)))
    assert small.vocab == whole.vocab[:limit]                                           # <unk> counts
    assert torch.equal(small.train, torch.where(whole.train < limit, whole.train, 0))   # the rest reads <unk>
    assert sum(whole.tokens.values()) == len(tokens)                                    # nothing lost at the cuts


@laws
@given(words, st.booleans())
def test_decode_then_encode_is_the_identity(tmp_path, tokens, spaced):
    text = corpus(write(tmp_path / ("x.tokens" if spaced else "x.txt"), " ".join(tokens) + f" {UNK} zz"))
    for split in (text.train, text.valid, text.test):
        assert torch.equal(text.encode(text.decode(split)), split)


def test_characters_come_back_as_they_were(tmp_path):
    raw = "Straße,\r\n\tnaïve – 𝕏!\n" * 30
    text = corpus(write(tmp_path / "x.txt", raw), level="char")
    assert "".join(text.decode(getattr(text, s)) for s in SPLITS) == raw                # splits are cuts, nothing else
    assert sum(text.bytes.values()) == len(raw.encode()) > sum(text.tokens.values()) == len(raw)
    assert text.encode("Ω").tolist() == [text.unk] and text.vocab[text.unk] == UNK


def test_a_word_only_seen_in_validation_is_unknown(tmp_path):
    write(tmp_path / "w.train.txt", "a b c d " * 9)
    write(tmp_path / "w.valid.txt", "a b new b")
    write(tmp_path / "w.test.txt", "new d")
    text = corpus(tmp_path / "w.train.txt")
    assert "new" not in text.vocab and text.decode(text.valid) == f"a b {UNK} b"
    assert text.types == {"train": 4, "valid": 3, "test": 2} and text.bytes["test"] == len("new d")
    assert text.describe()["unknown"] == {"train": 0, "valid": 0.25, "test": 0.5}


def test_unk_in_the_text_is_the_unknown_token_and_has_one_id(tmp_path):
    text = corpus(write(tmp_path / "x.txt", f"a {UNK} b. " * 50))
    assert text.vocab.count(UNK) == 1 and (text.train == text.unk).sum() == text.train.shape[0] // 4


def test_tokenizers():
    assert tokenize("Don't @-@ stop_it, 3.5 <unk>!") == ["Don", "'", "t", "@", "-", "@", "stop_it", ",", "3", ".", "5",
                                                         UNK, "!"]
    assert tokenize("Don't  @-@\nstop", spaced=True) == ["Don't", "@-@", "stop"]
    assert list(tokenize("a b", "char")) == ["a", " ", "b"]


def test_fingerprint_tells_texts_vocabularies_and_splits_apart(tmp_path):
    path = write(tmp_path / "x.train.txt", TEXT)
    same = write(tmp_path / "y.txt", TEXT)
    prints = [corpus(path).fingerprint, corpus(path, vocab_size=5).fingerprint, corpus(path, level="char").fingerprint]
    write(tmp_path / "x.valid.txt", TEXT)
    prints.append(corpus(path).fingerprint)
    assert len(set(prints)) == len(prints)
    assert corpus(same).fingerprint == prints[0]                    # the name is not part of it
    for other in (TEXT.replace("saw", "hid"), TEXT.replace("cat sat", "sat cat", 1)):   # same ids; same vocabulary
        assert corpus(write(tmp_path / "z.txt", other)).fingerprint != prints[0]
    json.dumps(corpus(path).describe())                             # goes into a log line as it is


def test_bits_per_byte_of_ascii_characters_is_bits_per_character(tmp_path):
    text = corpus(write(tmp_path / "x.txt", TEXT), level="char")
    assert text.bits_per_byte(3 * math.log(2)) == pytest.approx(3)
    text = corpus(tmp_path / "x.txt", level="word")                 # the same split, the same text: total nats decide
    assert text.bits_per_byte(1.0) * text.bytes["valid"] == pytest.approx(text.tokens["valid"] / math.log(2))


# ---- pydoc ----

def test_pydoc_is_large_dealt_by_document_and_leaks_no_paragraph(pydoc, documents):
    assert 350_000 < sum(pydoc.tokens.values()) < 650_000           # about 481,000 on CPython 3.11
    share = {s: pydoc.bytes[s] / sum(pydoc.bytes.values()) for s in SPLITS}
    assert share["train"] < 0.93 and 0.03 < share["valid"] < 0.06 and 0.03 < share["test"] < 0.06
    texts = sources._deal(documents, 0)
    seen = [{" ".join(p.split()) for p in re.split(r"\n\s*\n", texts[s]) if len(" ".join(p.split())) >= sources.LONG}
            for s in SPLITS]
    assert all(len(s) > 100 for s in seen)
    assert not any(a & b for a, b in itertools.combinations(seen, 2))
    names = [name for name, _ in documents]
    assert len(set(names)) == len(names) and not any("/test" in name or "idle_test" in name for name in names)
    assert {"topics/with", "json/__init__.py", "typing.py"} <= set(names)
    assert 0 < pydoc.describe()["unknown"]["valid"] < 0.1


@pytest.mark.parametrize("seed", range(5))
def test_documents_are_dealt_whole_and_no_large_one_is_held_out(seed):
    documents = [(f"d{i}", f"<{i}>" * 25) for i in range(400)] + [("large", "L" * 600), ("huge", "H" * 4000)]
    texts = sources._deal(documents, seed)
    dealt = {s: texts[s].split("\n\n") for s in SPLITS}
    assert sorted(itertools.chain(*dealt.values())) == sorted(text for _, text in documents)
    assert {"L" * 600, "H" * 4000} <= set(dealt["train"])           # 600 is more than a fifth of 5 %
    whole = sum(len(text) for _, text in documents)
    assert all(0.045 < sum(map(len, dealt[s])) / whole <= 0.05 for s in ("valid", "test"))
    assert sources._deal(documents[::-1], seed) == texts               # the order comes from the names and the seed


def test_pydoc_splits_follow_the_seed_alone(pydoc):
    assert corpus("pydoc").fingerprint == pydoc.fingerprint != corpus("pydoc", seed=1).fingerprint


def library(root):
    topics = {"b": "second topic", "a": "first\n=====\n\n    topic ---- 1\n+---+---+"}
    write(root / "pydoc_data/topics.py", f"# made by a tool\ntopics = {topics!r}\n")
    write(root / "json/__init__.py", '''"""Not run."""
raise SystemExit
if 1:
    def f():
        """of
        f"""
        class C:
            "of C"
    "no docstring"
''')
    for left_out in ("json/tests/a.py", "test/a.py", "site-packages/json.py", "not_of_the_library.py"):
        write(root / left_out, '"left out"')
    return root


def test_pydoc_reads_topics_then_docstrings_without_importing(tmp_path):
    assert pydoc_documents(library(tmp_path / "lib")) == [
        ("topics/a", "first\n\n    topic ---- 1"), ("topics/b", "second topic"),
        ("json/__init__.py", "Not run.\n\nof\nf\n\nof C")]


def test_pydoc_is_read_once_and_a_broken_cache_is_read_anew(tmp_path, monkeypatch):
    lib = library(tmp_path / "lib")
    first = pydoc_documents(lib)
    (cache,) = (tmp_path / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(sources.ast, "parse", None)                      # would fail if anything were parsed again
        assert pydoc_documents(lib) == first
    raw = cache.read_bytes()
    for broken in (b"", raw[:len(raw) // 2]):
        cache.write_bytes(broken)
        assert pydoc_documents(lib) == first and cache.read_bytes() == raw
    write(lib / "json/more.py", '"one more"')                       # another library, another cache
    assert pydoc_documents(lib)[-1] == ("json/more.py", "one more")


def test_a_write_that_is_cut_off_leaves_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "out/file", "old")
    monkeypatch.setattr(sources.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError):
        sources._write(path, b"new")
    assert [p.name for p in path.parent.iterdir()] == ["file"] and path.read_text() == "old"
    with pytest.warns(UserWarning, match="cannot write"):           # a cache that cannot be written is said, not needed
        assert pydoc_documents(library(tmp_path / "lib"))


def test_pydoc_without_a_library_says_what_to_install(tmp_path):
    with pytest.raises(FileNotFoundError, match="topics.py.*install"):
        pydoc_documents(tmp_path)


# ---- where files are found, and what they must be ----

RAWS = {f"toy.{s}.tokens": (f"{s} = {UNK} @-@ text \n" * 30).encode() for s in SPLITS}
TOY = {file: (150, 5, len(raw)) for file, raw in RAWS.items()}


@pytest.fixture
def server():
    """A web server on this machine; server.files maps a path to its bytes, server.asked counts."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            raw = self.server.files.get(self.path)
            self.send_response(404 if raw is None else 200)
            self.send_header("Content-Length", str(len(raw or b"")))
            self.end_headers()
            self.wfile.write(raw or b"")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked, server.url = {}, [], f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def toy(monkeypatch, server):
    monkeypatch.setitem(sources.SOURCES, "toy", Source("word", (server.url + "/gone", server.url + "/toy.zip"), TOY))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name, raw in RAWS.items():
            file.writestr(f"toy/{name}", raw)
    server.files["/toy.zip"] = packed.getvalue()
    return server


def test_download_checks_keeps_and_is_done_once(toy, tmp_path):
    first = corpus("toy")
    assert toy.asked == ["/gone", "/toy.zip"]                       # the second address, after the first failed
    assert {p.name: p.read_bytes() for p in (tmp_path / "cache/toy").iterdir()} == RAWS
    assert corpus("toy", download=False).fingerprint == first.fingerprint and len(toy.asked) == 2


def test_a_download_that_is_not_the_corpus_is_refused_and_leaves_no_file(toy, tmp_path):
    whole = toy.files["/toy.zip"]
    for wrong in (b"<html>sign in</html>", whole[:len(whole) // 2], b""):
        toy.files["/toy.zip"] = wrong
        with pytest.raises(FileNotFoundError, match="toy.train.tokens, toy.valid.tokens, toy.test.tokens into"):
            corpus("toy")
        assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_wrong_sha256_is_refused(server, tmp_path, monkeypatch):
    raw = TEXT.encode()
    for digest, error in ((hashlib.sha256(raw).hexdigest(), None), ("0" * 64, "sha256")):
        monkeypatch.setitem(sources.SOURCES, "one", Source("char", (server.url + "/one",), {"one.txt": digest}))
        server.files["/one"] = raw
        if error:
            with pytest.raises(FileNotFoundError, match=error):
                sources._find_source("one", [tmp_path / "elsewhere"], True)
        else:
            assert sources._download("one", sources.cache_dir() / "one") == ""


def test_folders_are_searched_in_order(toy, tmp_path, monkeypatch):
    for folder in ("cache/toy", "env/toy", "given"):                # nested or flat
        for name, raw in RAWS.items():
            write(tmp_path / folder / name, raw)
    used = []
    monkeypatch.setattr(sources, "_check", lambda raw, expected, path: used.append(path.parent) or raw.decode())
    corpus("toy")
    monkeypatch.setenv("ALR_DATA", str(tmp_path / "env"))
    corpus("toy")
    corpus("toy", data_dir=tmp_path / "given")
    assert used[::3] == [tmp_path / "cache/toy", tmp_path / "env/toy", tmp_path / "given"] and not toy.asked


def test_a_damaged_or_incomplete_copy_is_refused(toy, tmp_path):
    for name, raw in RAWS.items():
        write(tmp_path / "toy" / name, raw)
    write(tmp_path / "toy/toy.valid.tokens", RAWS["toy.valid.tokens"].replace(b"valid", b"vali d", 1))
    with pytest.raises(ValueError, match="toy.valid.tokens has 151 tokens, 7 types, .* expected 150, 5"):
        corpus("toy", data_dir=tmp_path)
    (tmp_path / "toy/toy.test.tokens").unlink()
    with pytest.raises(FileNotFoundError, match="lacks toy.test.tokens"):
        corpus("toy", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["wikitext-2", "tinyshakespeare", "wiki.train.tokens"])
@pytest.mark.parametrize("download", [True, False])
def test_offline_the_error_says_what_to_put_where(name, download, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        corpus(name, download=download)
    named = "input.txt" if name == "tinyshakespeare" else "wiki.train.tokens, wiki.valid.tokens, wiki.test.tokens"
    assert f"Put {named} into {tmp_path / 'cache'}" in str(error.value) and "pydoc" in str(error.value)
    assert ("127.0.0.1" in str(error.value).split("Put")[0]) == download
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_file_uses_its_neighbours_and_is_cut_where_it_has_none(tmp_path):
    path = write(tmp_path / "wiki.train.tokens", "a b @-@ c " * 250)
    alone = corpus(path)
    assert sum(alone.tokens.values()) == 1000 and all(abs(alone.tokens[s] - 50) <= 2 for s in ("valid", "test"))
    write(tmp_path / "wiki.test.tokens", "a b")
    two = corpus(path).tokens
    assert two["test"] == 2 and two["train"] + two["valid"] == 1000 and abs(two["valid"] - 50) <= 2
    write(tmp_path / "wiki.valid.tokens", "a b c")
    both = corpus(path)
    assert both.tokens == {"train": 1000, "valid": 3, "test": 2} and "@-@" in both.vocab


def test_a_relative_file_is_looked_for_in_the_data_folder(tmp_path, monkeypatch):
    write(tmp_path / "deep/x.txt", TEXT)
    monkeypatch.setenv("ALR_DATA", str(tmp_path))
    assert corpus("deep/x.txt").fingerprint == corpus(tmp_path / "deep/x.txt").fingerprint


@needs["wikitext-2"]
def test_wikitext_2_is_the_official_one():
    small = corpus("wikitext-2", data_dir=DATA, vocab_size=4096, download=False)
    assert small.tokens == {"train": 2_051_910, "valid": 213_886, "test": 241_211}
    assert small.types == {"train": 33_277, "valid": 13_776, "test": 14_142}
    assert small.bytes == {"train": 10_797_148, "valid": 1_121_681, "test": 1_256_449}
    assert len(small.vocab) == 4096 and small.vocab[:3] == (UNK, "the", ",") and int(small.valid.max()) < 4096


@needs["wikitext-2"]
def test_the_seeds_file_name_is_wikitext_2(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALR_DATA", str(DATA))
    by_name, by_path = corpus("wiki.train.tokens"), corpus(DATA / "wikitext-2/wiki.train.tokens")
    assert by_name.name == "wikitext-2" and by_name.fingerprint == by_path.fingerprint
    assert len(by_name.vocab) == 33_277                             # <unk> is one of the official types


@needs["tinyshakespeare"]
def test_tinyshakespeare_is_cut_as_in_nanogpt():
    text = corpus("tinyshakespeare", data_dir=DATA, download=False)
    assert text.level == "char" and len(text.vocab) == 65 + 1
    assert text.tokens == {"train": 1_003_854, "valid": 111_540, "test": 0} and len(text.test) == 0
    assert text.decode(text.train[:14]) == "First Citizen:" and text.describe()["unknown"]["valid"] == 0


@needs["tinyshakespeare"]
def test_shakespeare_is_the_same_text_with_a_tail_of_its_training_part_held_out():
    whole, text = (corpus(name, data_dir=DATA, download=False) for name in ("tinyshakespeare", "shakespeare"))
    assert text.tokens == {"train": 948_084, "valid": 111_540, "test": 55_770}
    assert text.decode(text.train) + text.decode(text.test) == whole.decode(whole.train)
    assert text.decode(text.valid) == whole.decode(whole.valid)


# ---- bad input: one clear error each ----

@pytest.mark.parametrize("raw, says", [
    (b"", "is empty"), (b"\xef\xbb\xbf", "is empty"), (b" \n\t \n", "empty but for white space"),
    (b"\x89PNG\r\n\x1a\n\x00\x00", "not UTF-8 text: byte 0 is 0x89"), (b"abc\x00def", "byte 3 is 0x00"),
    ("naïve".encode("latin1"), "byte 2 is 0xef"), (b"word", "1 word tokens, split into"),
    (b"two words", "2 word tokens, split into")])
def test_bad_files(tmp_path, raw, says):
    path = write(tmp_path / "bad.txt", raw)
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        corpus(path)
    assert "bad.txt" in str(error.value)


def test_names_that_are_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.txt"):
        corpus(tmp_path / "nothing.txt")
    with pytest.raises(FileNotFoundError, match="data_dir .*none"):
        corpus("wikitext-2", data_dir=tmp_path / "none")
    with pytest.raises(ValueError, match="unknown name 'wikitext'.*" + ", ".join(NAMES)):
        corpus("wikitext")
    with pytest.raises(ValueError, match="is a folder"):
        corpus(tmp_path)
    with pytest.raises(ValueError, match="level 'words'"):
        corpus("pydoc", level="words")
    for size in (1, 0, -3):
        with pytest.raises(ValueError, match=f"vocab_size {size}"):
            corpus("pydoc", vocab_size=size)


def test_decode_refuses_what_is_no_id(tmp_path):
    text = corpus(write(tmp_path / "x.txt", TEXT))
    for wrong in (IGNORE, -1, len(text.vocab)):
        with pytest.raises(ValueError, match=f"id {wrong} "):
            text.decode(torch.tensor([1, wrong]))


# ---- batches ----

@laws
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 5), st.integers(0, 10 ** 9), st.integers(0, 2 ** 40))
def test_a_batch_is_windows_of_the_text_and_y_is_x_one_on(extra, block, batch, step, seed):
    x, y = Batches(torch.arange(block + extra), block, batch, seed)[step]       # token = position
    assert x.shape == y.shape == (batch, block) and x.dtype == torch.int64
    assert torch.equal(y, x + 1) and torch.equal(x - x[:, :1], torch.arange(block).expand(batch, block))


def test_every_window_is_drawn():
    starts = Counter(x for step in range(400) for x in Batches(torch.arange(7), 4, 2, 3)[step][0][:, 0].tolist())
    assert sorted(starts) == [0, 1, 2] and min(starts.values()) > 200           # 267 each on average


def test_batches_depend_on_seed_and_step_alone():
    tokens = torch.arange(10_000)
    unbroken = [Batches(tokens, 8, 4, 1)[step] for step in range(6)]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    resumed = Batches(tokens, 8, 4, 1)
    for step in (5, 3, 4):                                                      # any order, another global seed
        assert all(map(torch.equal, resumed[step], unbroken[step]))
    assert torch.equal(torch.get_rng_state(), before)
    assert len({tuple(x.flatten().tolist()) for x, _ in unbroken}) == 6
    assert not torch.equal(Batches(tokens, 8, 4, 2)[0][0], unbroken[0][0])


@laws
@given(st.integers(2, 200), st.integers(1, 30), st.integers(1, 6))
def test_blocks_give_every_target_once_in_order(length, block, batch):
    tokens = torch.randperm(length)
    seen_x, seen_y, total = [], [], 0
    for x, y, n in blocks(tokens, block, batch):
        assert x.shape == y.shape and x.shape[1] == block and 1 <= x.shape[0] <= batch
        kept = y != IGNORE
        assert n == kept.sum() > (x.shape[0] - 1) * block                       # only the last row is filled up
        seen_x.append(x[kept]), seen_y.append(y[kept])
        total += n
    assert torch.equal(torch.cat(seen_y), tokens[1:]) and torch.equal(torch.cat(seen_x), tokens[:-1])
    assert total == length - 1


def test_a_block_longer_than_the_text_is_refused():
    with pytest.raises(ValueError, match="a block of 256 needs 257 tokens and the split has 100; .* at most 99"):
        Batches(torch.arange(100), 256, 1)
    Batches(torch.arange(100), 99, 1)[0]
    for make in (Batches, blocks):
        nine, one, table = torch.arange(9), torch.arange(1), torch.zeros(3, 3)
        for wrong in ((nine, 0, 1), (nine, 2, 0), (table, 2, 1), (one, 1, 1)):
            with pytest.raises(ValueError, match=make.__name__):
                make(*wrong)
    with pytest.raises(IndexError, match="step -1"):
        Batches(torch.arange(9), 2, 1)[-1]


def test_white_space_tokens_of_a_plain_text_where_asked_for(tmp_path):
    path = write(tmp_path / "x.txt", "Don't stop , it's <unk> now . " * 40)
    words, spaced = corpus(path), corpus(path, level="space")
    assert "Don't" in spaced.vocab and "Don't" not in words.vocab and spaced.level == "word" and spaced.spaced
    same = corpus(write(tmp_path / "x.tokens", path.read_text(encoding="utf-8")))
    assert same.fingerprint == spaced.fingerprint and spaced.decode(spaced.encode("it's now")) == "it's now"
