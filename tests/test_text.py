"""Documents from every source, the split, and rows of tokens."""

import itertools
import json
import sys
import types

import datasets
import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from mistudio.errors import ModelError, TextError
from mistudio.lm import Document, LanguageModel, documents, is_held_out, pack, token_spans
from tiny_models import gpt2_tokenizer, tiny_gemma2, tiny_lm

LM = tiny_lm()


def texts(source, **options) -> list[str]:
    return [document.text for document in documents(str(source), **options)]


# Sources


def test_a_plain_file_is_one_document_or_what_the_separator_makes_of_it(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n \n\nthree---four\n\n")
    assert texts(file) == ["one\ntwo\n \n\nthree---four\n\n"]
    assert texts(file, separator="blank-line") == ["one\ntwo", "three---four"]
    assert texts(file, separator="---") == ["one\ntwo\n \n\nthree", "four\n\n"]
    assert [document.id for document in documents(str(file), separator="---")] == ["a.txt:0", "a.txt:1"]


def test_a_folder_is_its_files_in_order_and_recursively(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.md").write_text("last")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "second", "other": 1}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89")
    found = list(documents(str(tmp_path)))
    assert [(d.id, d.text) for d in found] == [("a.jsonl:1", "first"), ("a.jsonl:3", "second"), ("b/x.md:0", "last")]


def test_a_parquet_file_gives_the_column_asked_for(tmp_path):
    table = pyarrow.table({"story": ["one", None, " ", "two"], "n": [1, 2, 3, 4]})
    parquet.write_table(table, tmp_path / "a.parquet")
    found = list(documents(str(tmp_path / "a.parquet"), column="story"))
    assert [(d.id, d.text) for d in found] == [("a.parquet:0", "one"), ("a.parquet:3", "two")]


@pytest.fixture
def hub(monkeypatch) -> list[tuple]:
    """A hub with one data set, streamed; the calls made of it."""
    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        if name == "no/such":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist on the Hub\nor so")
        return datasets.IterableDataset.from_generator(lambda: iter([{"text": "one"}, {"text": "two"}]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("hf:roneneldan/TinyStories", ("roneneldan/TinyStories", None, "train", True)),
        ("hf:org/name:test", ("org/name", None, "test", True)),
        ("hf:org/name/en:test", ("org/name", "en", "test", True)),
        ("hf:name", ("name", None, "train", True)),
    ],
)
def test_a_data_set_is_streamed_by_name_configuration_and_split(hub, source, call):
    assert texts(source) == ["one", "two"]
    assert hub == [call]
    assert [document.id for document in documents(source)] == [f"{source}:0", f"{source}:1"]


def test_a_data_set_that_cannot_be_opened_is_an_error_in_one_line(hub):
    with pytest.raises(TextError, match=r"hf:no/such cannot be opened: Dataset 'no/such' doesn't exist on the Hub$"):
        documents("hf:no/such")


def test_stories_have_a_seed_and_no_end(monkeypatch):
    stories = types.ModuleType("mistudio.lm.stories")
    stories.stories = lambda seed: (Document(f"stories:{seed}:{n}", f"{seed} {n}") for n in itertools.count())
    monkeypatch.setitem(sys.modules, "mistudio.lm.stories", stories)
    assert [d.id for d in itertools.islice(documents("stories"), 2)] == ["stories:0:0", "stories:0:1"]
    assert next(documents("stories:7")).text == "7 0"
    with pytest.raises(TextError, match="as in stories:1"):
        documents("stories:x")


# Mistakes


@pytest.mark.parametrize("source", ["", "hf:"])
def test_a_source_without_a_name_is_refused(source):
    with pytest.raises(TextError, match="names no text"):
        next(documents(source))


def test_what_does_not_exist_is_an_error_at_once(tmp_path):
    with pytest.raises(TextError, match="no file or folder"):
        documents(str(tmp_path / "nothing.txt"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"x", r"the kinds are \.txt, \.md, \.jsonl, \.parquet"),
        ("a.txt", b"ok \xff", "byte 3 is 0xff"),
        ("a.txt", b" \n", "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'\xff\xfe{"\n', "line 1 is not JSON"),
        ("a.jsonl", b'{"story": "x", "n": 1}\n', "no column 'text'; it has story, n"),
        ("a.jsonl", b'{"text": 5}\n', "holds int, not text"),
        ("a.jsonl", b"[1]\n", "must be an object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: .* half a character"),
        ("a.jsonl", b"", "holds no text"),
        ("a.parquet", b"PAR1", "not a Parquet file"),
    ],
)
def test_a_file_that_holds_no_documents_is_an_error_that_says_what_it_holds(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=says):
        texts(tmp_path / name)


def test_a_column_a_parquet_file_lacks_is_an_error_listing_those_it_has(tmp_path):
    parquet.write_table(pyarrow.table({"story": ["one"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(TextError, match="no column 'text'; it has story, n"):
        texts(tmp_path / "a.parquet")


def test_a_folder_without_text_is_an_error_listing_what_it_has(tmp_path):
    with pytest.raises(TextError, match="it has no files"):
        documents(str(tmp_path))
    (tmp_path / "a.png").touch()
    with pytest.raises(TextError, match=r"it has \.png"):
        documents(str(tmp_path))


@pytest.mark.parametrize("options", [{"part": "test"}, {"held_out": 1.0}, {"part": "held_out", "held_out": 0.0}])
def test_a_split_that_cannot_be_is_an_error(tmp_path, options):
    with pytest.raises(TextError, match=r"the parts are|held out must"):
        documents(str(tmp_path), **options)


def test_an_empty_part_is_an_error_that_says_why(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    part = "train" if is_held_out("one", 0.5) else "held_out"
    with pytest.raises(TextError, match=f"None of the 1 documents .* into the {part} part.*blank-line"):
        texts(tmp_path / "a.txt", part=part, held_out=0.5)


# The split


def test_the_parts_divide_the_documents_by_their_text(tmp_path):
    lines = [f"story {n}" for n in range(2000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    train, held_out = (texts(tmp_path, part=part) for part in ("train", "held_out"))
    assert sorted(train + held_out) == sorted(lines)
    assert 150 < len(held_out) < 250
    assert all(is_held_out(text, 0.1) for text in held_out)
    assert set(held_out) < set(texts(tmp_path, part="held_out", held_out=0.2))


def test_the_split_is_the_same_for_ever():
    assert [n for n in range(40) if is_held_out(f"story {n}", 0.1)] == [12, 14, 17]


# Rows


@given(
    contents=st.lists(st.text(alphabet="the cat\nZ<>bos", max_size=60), min_size=1, max_size=70),
    context=st.integers(2, 16),
)
def test_rows_without_bos_are_the_stream_and_every_token_can_be_traced(contents, context):
    encoded = [LM.encode([text])[0] for text in contents]
    stream = [
        token
        for number, ids in enumerate([ids for ids in encoded if ids])
        for token in ([LM.eos_id] if number else []) + ids
    ]
    docs = [Document(str(n), text) for n, text in enumerate(contents)]
    if len(stream) < context - 1:
        with pytest.raises(TextError, match=f"{len(stream)} tokens"):
            list(pack(LM, docs, context))
        return
    rows = list(pack(LM, docs, context))
    assert all(row.tokens.shape == row.document.shape == row.offset.shape == (context,) for row in rows)
    assert all((row.tokens[0], row.document[0], row.offset[0]) == (LM.bos_id, -1, -1) for row in rows)
    assert all(row.tokens.dtype == row.document.dtype == row.offset.dtype == np.int32 for row in rows)
    body = np.concatenate([row.tokens[1:] for row in rows])
    assert len(stream) - len(body) < context - 1
    assert body.tolist() == stream[: len(body)]
    assert LM.bos_id not in body
    where = np.concatenate([np.stack([row.document, row.offset], axis=1)[1:] for row in rows])
    for token, (document, offset) in zip(body, where, strict=True):
        assert token == (encoded[document] + [LM.eos_id])[offset]


@given(text=st.text(max_size=40))
def test_the_spans_of_a_documents_tokens_cover_it_in_order(text):
    spans = token_spans(LM, text)
    assert len(spans) == len(LM.encode([text])[0])
    assert sorted({n for start, end in spans for n in range(start, end)}) == list(range(len(text)))
    assert spans == sorted(spans)


def test_spans_leave_out_the_tokens_that_packing_leaves_out():
    assert [("a<bos>b")[start:end] for start, end in token_spans(LM, "a<bos>b")] == ["a", "b"]
    lm = LanguageModel(tiny_gemma2(), gpt2_tokenizer(), name="tiny")
    text = "<|endoftext|>a<|endoftext|>b"
    assert [text[start:end] for start, end in token_spans(lm, text)] == ["a", "<|endoftext|>", "b"]


def test_a_row_is_yielded_as_soon_as_its_documents_are_read():
    endless = (Document(str(n), "the cat sat on a mat") for n in itertools.count())
    assert len(list(itertools.islice(pack(LM, endless, 64), 100))) == 100


@pytest.mark.parametrize("context", [1, 65])
def test_a_context_the_model_does_not_have_is_an_error(context):
    with pytest.raises(ModelError, match="2 to 64 tokens"):
        pack(LM, [], context)
