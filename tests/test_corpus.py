"""Corpora: their texts and tokens, and errors for bad names."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsq_core.corpus.docstrings import is_held_out, iter_docstrings, stdlib_docstrings
from lsq_core.corpus.registry import BUILT_IN_CORPORA, Corpus, corpus_identity, load_corpus
from lsq_core.corpus.tokens import build_calibration_blocks, build_token_stream
from lsq_core.errors import InputError, LsqError

ROOT = Path(__file__).resolve().parents[1]
WIKITEXT = ROOT.parent / "shared" / "corpus" / "wikitext-2" / "test.txt"
LONG = "A sentence that is long enough to count as text. " * 5


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "data" / "demo_model")


def make_corpus(*texts: str) -> Corpus:
    return Corpus("mine", "calibration", texts, "made up")


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- Docstrings ----------------------------------------------------------------------------


def test_stdlib_docstrings_split_by_hash():
    held_out, kept = stdlib_docstrings(True), stdlib_docstrings(False)
    for text in held_out:
        assert hashlib.sha256(text.encode()).digest()[0] < 32
    for text in kept:
        assert hashlib.sha256(text.encode()).digest()[0] >= 32
    assert len(set(held_out + kept)) == len(held_out) + len(kept) > 1000
    assert min(map(len, held_out + kept)) > 200
    assert 0.08 < len(held_out) / len(held_out + kept) < 0.18


@pytest.mark.skipif(
    platform.python_version() != "3.11.7", reason="the figures are those of Python 3.11.7"
)
def test_stdlib_held_out_tokens_match_demo_training(tokenizer):
    texts = stdlib_docstrings(True)
    assert len(texts) == 319
    assert sum(len(text.encode()) for text in texts) == 163_491
    stream = build_token_stream(load_corpus("stdlib", "evaluation"), tokenizer)
    assert stream.ids.shape == (51_770,)
    assert stream.sha256.startswith("c2ec56598232")


def test_load_corpus_stdlib_source():
    corpus = load_corpus("stdlib", "evaluation")
    assert corpus.texts == tuple(stdlib_docstrings(True))
    assert corpus.source == (
        f"standard library docstrings of Python {platform.python_version()}, held out"
    )
    assert load_corpus("stdlib", "calibration").texts == tuple(stdlib_docstrings(False))


def docstring(text: str) -> str:
    return f'"""{text}"""\n'


def test_docstrings_under_order(tmp_path):
    (tmp_path / "b.py").write_text(docstring(LONG + "b module"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.py").write_text(
        docstring(LONG + "module")
        + "class A:\n"
        + f"    {docstring(LONG + 'class')}"
        + "    def method(self):\n"
        + f"        {docstring(LONG + 'method')}"
        + "try:\n    if True:\n        async def f():\n"
        + f"            {docstring(LONG + 'nested')}"
        + "finally:\n    pass\n"
        + f"def last():\n    {docstring(LONG + 'last')}"
    )
    ends = [text.removeprefix(LONG) for text in iter_docstrings(tmp_path)]
    assert ends == ["module", "class", "method", "nested", "last", "b module"]


def test_docstrings_under_cleans_before_length_check(tmp_path):
    (tmp_path / "just_enough.py").write_text(docstring("x" * 201))
    (tmp_path / "too_short.py").write_text(docstring("x" * 200))
    (tmp_path / "indented.py").write_text(
        f"def f():\n    {docstring('First.' + chr(10) + '    second ' + LONG)}"
    )
    assert list(iter_docstrings(tmp_path)) == ["First.\nsecond " + LONG, "x" * 201]


def test_docstrings_under_skips_tests_packages_broken_files(tmp_path):
    for name in ("test", "tests", "site-packages", "dist-packages"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "module.py").write_text(docstring(LONG + name))
    (tmp_path / "test_it.py").write_text(docstring(LONG + "test file"))
    (tmp_path / "broken.py").write_text(docstring(LONG) + "def (:\n")
    (tmp_path / "null.py").write_bytes(b"\0")
    (tmp_path / "undecodable.py").write_bytes(b'"""' + b"\xff" * 300 + b'"""\n')
    (tmp_path / "surrogate.py").write_text(docstring(LONG + "\\ud800"))
    (tmp_path / "latin.py").write_bytes(
        b'# -*- coding: latin-1 -*-\n"""' + LONG.encode() + b'\xe9"""\n'
    )
    assert list(iter_docstrings(tmp_path)) == [LONG + "é"]
    everything = list(iter_docstrings(tmp_path, skip=()))
    assert {LONG + name for name in ("test", "tests", "site-packages", "test file")} < set(
        everything
    )


def test_is_held_out_fraction():
    assert sum(is_held_out(f"text {i}") for i in range(8000)) == pytest.approx(1000, rel=0.1)
    assert is_held_out("same") == is_held_out("same")


# --- Local files ---------------------------------------------------------------------------


def test_load_corpus_file_whole_or_by_line(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffone\r\n\r\n  two é\r\n".encode())
    evaluation = load_corpus(str(path), "evaluation")
    assert evaluation.texts == ("one\n\n  two é\n",)
    assert evaluation.name == str(path)
    assert evaluation.source == (
        f"text file mine.txt, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    )
    assert load_corpus(str(path), "calibration").texts == ("one", "  two é")


def test_corpus_identity_changes_with_content(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("one")
    first = corpus_identity(str(path))
    path.write_text("two")
    assert first != corpus_identity(str(path)) == f"sha256:{hashlib.sha256(b'two').hexdigest()}"
    assert corpus_identity("stdlib") == f"stdlib:{platform.python_version()}"
    assert corpus_identity("wikitext2") == "wikitext2@main"


def test_load_corpus_built_in_name_precedes_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("stdlib").write_text("a file")
    assert len(load_corpus("stdlib", "evaluation").texts) > 100
    assert load_corpus("./stdlib", "evaluation").texts == ("a file",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"\xff\xfe\x80", "not UTF-8"),
        (b"a\0b", "binary"),
    ],
)
def test_load_corpus_file_without_text_raises(tmp_path, content, message):
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_corpus(str(path), "evaluation")
    assert str(path) in str(error.value)


def test_load_corpus_folder_raises(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        load_corpus(str(tmp_path), "calibration")


@pytest.mark.parametrize("name", ["wikitex2", "", "no/such/file.txt", "x" * 5000, "a\0b"])
def test_corpus_unknown_name_lists_built_in(name):
    for lookup in (corpus_identity, lambda name: load_corpus(name, "evaluation")):
        with pytest.raises(InputError) as error:
            lookup(name)
        assert all(known in str(error.value) for known in BUILT_IN_CORPORA)


@pytest.mark.parametrize("name", ["hf:", "hf:one", "hf:a/b/c", "hf:a/b:", "hf:a/b@", "hf:a/b#"])
def test_load_corpus_malformed_dataset_name_raises(name):
    with pytest.raises(InputError, match=r"hf:org/name\[:config\]"):
        load_corpus(name, "evaluation")


def test_load_corpus_invalid_part_or_count_raises(tmp_path):
    with pytest.raises(InputError, match="calibration or evaluation"):
        load_corpus("stdlib", "test")
    with pytest.raises(InputError, match="1 or more"):
        load_corpus("stdlib", "evaluation", max_texts=0)


def test_load_corpus_max_texts(tmp_path):
    first = load_corpus("stdlib", "evaluation", max_texts=3)
    assert first.texts == tuple(stdlib_docstrings(True)[:3])


# --- The hub, without a network ------------------------------------------------------------

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch):
    """Replace network access; the datasets themselves are real ``datasets`` objects.

    ``hub.splits`` holds the columns of each split, ``hub.requests`` records the requests.
    """
    import datasets
    import huggingface_hub

    state = SimpleNamespace(splits={}, requests=[])

    def load_dataset(path, config=None, *, split, revision=None, data_files=None):
        state.requests.append((path, config, revision, split))
        return datasets.Dataset.from_dict(state.splits[split])

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha=SHA)
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: "a file")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: list(state.splits))
    return state


def test_load_corpus_wikitext_splits(hub):
    hub.splits = {"validation": {"text": ["", "v"]}, "test": {"text": ["", " = T = \n", "t"]}}
    assert load_corpus("wikitext2", "calibration").texts == ("", "v")
    corpus = load_corpus("wikitext2", "evaluation")
    assert corpus.texts == ("", " = T = \n", "t")
    assert corpus.source == "Salesforce/wikitext@0123456789ab wikitext-2-raw-v1 test"
    url = "hf://datasets/Salesforce/wikitext"
    assert hub.requests[-1] == (url, "wikitext-2-raw-v1", SHA, "test")


def test_load_corpus_c4_split_at_1100_texts(hub):
    texts = [f"text {i}" for i in range(1500)]
    hub.splits = {"validation": {"text": texts}}
    assert load_corpus("c4", "evaluation").texts == tuple(texts[:1100])
    calibration = load_corpus("c4", "calibration")
    assert calibration.texts == ("",) * 1100 + tuple(texts[1100:])
    assert "(calibration part)" in calibration.source
    assert load_corpus("c4", "calibration", max_texts=2).texts[-3:] == ("", *texts[1100:1102])


@pytest.mark.parametrize(("name", "split"), [("pileval", "validation"), ("bos", "train")])
def test_load_corpus_single_split_divided_by_hash(hub, name, split):
    texts = [f"text {i}" for i in range(200)]
    hub.splits = {split: {"meta": ["m"] * 200, "text": texts}}
    evaluation = load_corpus(name, "evaluation").texts
    calibration = load_corpus(name, "calibration").texts
    assert evaluation == tuple(text for text in texts if is_held_out(text))
    assert 0 < len(evaluation) < 100
    assert [kept or text for kept, text in zip(calibration, texts, strict=True)] == texts
    assert set(calibration) == {"", *texts} - set(evaluation)


@pytest.mark.parametrize(
    ("splits", "calibration", "evaluation"),
    [
        (["train", "validation", "test"], "validation", "test"),
        (["train", "test"], "train", "test"),
        (["train", "validation"], "train", "validation"),
    ],
)
def test_load_corpus_hub_dataset_split_choice(hub, splits, calibration, evaluation):
    hub.splits = {split: {"text": [split]} for split in splits}
    assert load_corpus("hf:org/name", "calibration").texts == (calibration,)
    assert load_corpus("hf:org/name", "evaluation").texts == (evaluation,)


def test_load_corpus_passes_config_revision_and_split(hub):
    hub.splits = {"dev": {"content": [f"text {i}" for i in range(50)]}}
    corpus = load_corpus("hf:org/na.me:con-fig@v1#dev", "evaluation")
    assert hub.requests == [("hf://datasets/org/na.me", "con-fig", SHA, "dev")]
    assert corpus.source == "org/na.me@0123456789ab con-fig dev (evaluation part)"


def test_load_corpus_text_column_found_or_columns_named(hub):
    hub.splits = {"train": {"id": [1]}, "test": {"id": [1, 2], "line": ["a", None]}}
    assert load_corpus("hf:org/name", "evaluation").texts == ("a", "")
    hub.splits = {"test": {"question": ["q"], "answer": ["a"]}}
    with pytest.raises(InputError, match="question, answer"):
        load_corpus("hf:org/name#test", "evaluation")


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (ValueError("Compression type zstd not supported"), "zstandard"),
        (
            ValueError('Unknown split "x" of:\na, b.'),
            r'no such part \(Unknown split "x" of: a, b\)',
        ),
        (ConnectionError("boom"), r"could not be downloaded \(ConnectionError: boom\)"),
        (OSError(errno.ENOSPC, "No space left on device", "/cache"), "disk is full"),
    ],
)
def test_load_corpus_read_error_translated(hub, monkeypatch, cause, message):
    import datasets

    def load_dataset(*_, **__):
        raise cause

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(LsqError, match=message) as error:
        load_corpus("pileval", "calibration")
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is cause


@pytest.mark.parametrize("kind", [TypeError, AttributeError, KeyError, ZeroDivisionError])
@pytest.mark.parametrize("step", ["load_dataset", "_text_column", "_choose_splits"])
def test_load_corpus_programming_error_propagates(hub, monkeypatch, kind, step):
    """The exception keeps its type at every step of loading."""

    def defect(*_, **__):
        raise kind("a defect")

    module = "datasets" if step == "load_dataset" else "lsq_core.corpus.hub"
    monkeypatch.setattr(f"{module}.{step}", defect)
    hub.splits = {"test": {"text": ["a"]}}
    with pytest.raises(kind, match="a defect"):
        load_corpus("hf:org/name", "evaluation")


def test_calibration_blocks_long_lines_raises(tokenizer, tmp_path):
    """There is enough text, but its only line is too long to be used."""
    path = tmp_path / "long.txt"
    path.write_text("Return the item of the list. " * 400, "utf8")
    with pytest.raises(InputError, match=r"1 of its lines .* 512 tokens") as error:
        build_calibration_blocks(load_corpus(str(path), "calibration"), tokenizer, block_tokens=64)
    assert "longer text" not in str(error.value)


class HubReplies(BaseHTTPRequestHandler):
    """Reply that ``org/gone`` does not exist, and that other datasets lack the revision."""

    def do_GET(self):
        missing = "RepoNotFound" if "gone" in self.path else "RevisionNotFound"
        self.send_response(404)
        self.send_header("X-Error-Code", missing)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub_server(monkeypatch):
    from huggingface_hub import constants

    server = HTTPServer(("127.0.0.1", 0), HubReplies)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "message"),
    [("hf:org/gone", "does not exist"), ("hf:org/name@v9", "'v9'")],
)
def test_load_corpus_missing_dataset_or_revision_raises(hub_server, name, message):
    with pytest.raises(InputError, match=message) as error:
        load_corpus(name, "evaluation")
    assert "stdlib" in str(error.value)
    assert error.value.__cause__ is not None


SCRIPT = """
from lsq_core.corpus.registry import load_corpus
from lsq_core.errors import LsqError
for name in ("wikitext2", "c4", "hf:org/name"):
    try:
        load_corpus(name, "evaluation")
    except LsqError as error:
        print(error.exit_code, type(error.__cause__).__name__, error)
"""


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("HF_HUB_OFFLINE", "1", "HF_HUB_OFFLINE forbids"),
        ("HF_ENDPOINT", "http://127.0.0.1:1", "HF_HUB_OFFLINE=1"),
    ],
)
def test_load_corpus_offline_error_names_dataset_and_alternative(
    tmp_path, variable, value, message
):
    """Runs in a separate process because the libraries read these variables on import."""
    home = {"HF_HOME": str(tmp_path), "HF_DATASETS_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    clean = {key: text for key, text in os.environ.items() if "OFFLINE" not in key}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=clean | home | {variable: value},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    for line, name in zip(lines, ("Salesforce/wikitext", "allenai/c4", "org/name"), strict=True):
        assert line.startswith("1 ")
        assert name in line
        assert message in line
        assert "'stdlib'" in line
    assert "NoneType" not in done.stdout  # the cause is chained


# --- Calibration blocks --------------------------------------------------------------------


def reference_blocks(texts, tokenizer, samples, max_line_tokens, block_tokens, seed) -> np.ndarray:
    """Sample blocks as the SensiBoost authors' script does, step by step, with ``datasets``."""
    from datasets import Dataset

    drawn, kept = [], 0
    for row in Dataset.from_dict({"text": texts}).shuffle(seed=seed):
        ids = encode(tokenizer, row["text"].strip())
        if len(ids) > max_line_tokens or not ids:
            continue
        drawn += ids
        kept += 1
        if kept == samples:
            break
    blocks = len(drawn) // block_tokens
    return np.array(drawn[: blocks * block_tokens]).reshape(blocks, block_tokens)


@pytest.mark.parametrize(
    ("samples", "max_line_tokens", "block_tokens", "seed"),
    [(128, 512, 512, 42), (40, 100, 64, 42), (10_000, 512, 512, 7)],
)
def test_calibration_blocks_match_reference_sampling(
    tokenizer, samples, max_line_tokens, block_tokens, seed
):
    corpus = load_corpus("stdlib", "calibration", max_texts=700)
    texts = [" \n" if i % 7 == 0 else f"  {text}\n" for i, text in enumerate(corpus.texts)]
    blocks = build_calibration_blocks(
        make_corpus(*texts),
        tokenizer,
        samples=samples,
        max_line_tokens=max_line_tokens,
        block_tokens=block_tokens,
        seed=seed,
    )
    expected = reference_blocks(texts, tokenizer, samples, max_line_tokens, block_tokens, seed)
    assert blocks.ids.dtype == np.int64
    assert len(blocks.ids) > 1
    np.testing.assert_array_equal(blocks.ids, expected)


def test_calibration_blocks_hash_and_source(tokenizer):
    corpus = load_corpus("stdlib", "calibration", max_texts=20)
    wide = build_calibration_blocks(corpus, tokenizer, block_tokens=64)
    again = build_calibration_blocks(corpus, tokenizer, block_tokens=64)
    narrow = build_calibration_blocks(corpus, tokenizer, block_tokens=32)
    shape = np.array(wide.ids.shape, dtype="<i8").tobytes()
    assert wide.sha256 == again.sha256
    assert wide.sha256 == hashlib.sha256(shape + wide.ids.astype("<i8").tobytes()).hexdigest()
    assert wide.sha256 != narrow.sha256
    assert (wide.corpus, wide.source) == ("stdlib", corpus.source)
    assert 0 not in wide.ids  # no end-of-text token between the samples


def test_calibration_blocks_line_at_limit_kept(tokenizer):
    text = "one two three four five six seven eight"
    count = len(encode(tokenizer, text))
    sizes = {"block_tokens": count}
    kept = build_calibration_blocks(make_corpus(text), tokenizer, max_line_tokens=count, **sizes)
    assert kept.ids.tolist() == [encode(tokenizer, text)]
    with pytest.raises(InputError, match="0 calibration tokens"):
        build_calibration_blocks(make_corpus(text), tokenizer, max_line_tokens=count - 1, **sizes)


def test_calibration_blocks_short_text_raises(tokenizer):
    text = "one two three"
    count = len(encode(tokenizer, text))
    with pytest.raises(InputError, match=rf"'mine' .* {count} calibration tokens .*512"):
        build_calibration_blocks(make_corpus(text), tokenizer)


@pytest.mark.parametrize("size", ["samples", "max_line_tokens", "block_tokens"])
def test_calibration_blocks_size_below_1_raises(tokenizer, size):
    with pytest.raises(InputError, match="sizes from 1 to"):
        build_calibration_blocks(make_corpus(LONG), tokenizer, **{size: 0})


# --- Evaluation streams --------------------------------------------------------------------


def test_token_stream_joins_texts_with_blank_line(tokenizer):
    stream = build_token_stream(make_corpus("one two", "", "three"), tokenizer)
    assert stream.ids.tolist() == encode(tokenizer, "one two\n\n\n\nthree")
    assert stream.ids.dtype == np.int64
    assert not stream.truncated
    assert stream.corpus == "mine"


@given(
    unit=st.text(min_size=1, max_size=40).filter(str.strip),
    repeats=st.integers(1, 300),
    max_tokens=st.integers(2, 300),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_token_stream_truncated_is_prefix(tokenizer, unit, repeats, max_tokens):
    corpus = make_corpus("ab " + unit * repeats)
    whole = build_token_stream(corpus, tokenizer)
    part = build_token_stream(corpus, tokenizer, max_tokens)
    np.testing.assert_array_equal(part.ids, whole.ids[:max_tokens])
    assert part.truncated == (len(whole.ids) > max_tokens)


def test_token_stream_tokenizes_only_needed_prefix(tokenizer):
    class Counting:
        longest = 0

        def __call__(self, text, **options):
            self.longest = max(self.longest, len(text))
            return tokenizer(text, **options)

    counting = Counting()
    build_token_stream(make_corpus(LONG * 10_000), counting, max_tokens=100)
    assert counting.longest < 10_000


@pytest.mark.parametrize("max_tokens", [0, 1, -5])
def test_token_stream_max_tokens_below_2_raises(tokenizer, max_tokens):
    with pytest.raises(InputError, match="at least 2 tokens"):
        build_token_stream(make_corpus(LONG), tokenizer, max_tokens)


def test_token_stream_single_token_text_raises(tokenizer):
    with pytest.raises(InputError, match="gives 1 tokens"):
        build_token_stream(make_corpus("a"), tokenizer)


def test_token_stream_long_text_no_warning(capfd):
    from transformers import AutoTokenizer

    fresh = AutoTokenizer.from_pretrained(ROOT / "data" / "demo_model")  # it warns only once
    assert len(build_token_stream(make_corpus(LONG * 100), fresh).ids) > fresh.model_max_length
    assert "longer than" not in capfd.readouterr().err


@pytest.mark.skipif(not WIKITEXT.is_file(), reason="../shared/corpus/wikitext-2 is not here")
def test_wikitext_local_file_token_counts(tokenizer):
    stream = build_token_stream(load_corpus(str(WIKITEXT), "evaluation"), tokenizer)
    assert stream.ids.shape == (460_970,)
    part = build_token_stream(
        load_corpus(str(WIKITEXT), "evaluation"), tokenizer, max_tokens=20_000
    )
    np.testing.assert_array_equal(part.ids, stream.ids[:20_000])
    assert part.truncated
    blocks = build_calibration_blocks(load_corpus(str(WIKITEXT), "calibration"), tokenizer)
    assert blocks.ids.shape[1] == 512
