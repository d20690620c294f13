"""Text to shards: every byte is counted, builders do not disturb each other, and a failed build leaves nothing."""

import json
import multiprocessing
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.corpus import (
    DEMO_DATASET,
    CorpusPlan,
    build_corpus,
    build_demo,
    demo_documents,
    encode_documents,
    order0_bits_per_byte,
    passages,
    split_documents,
)
from worker.fineweb import fetch
from worker.shards import DataError, TokenStream, open_dataset
from worker.tokenizer import byte_table, load_tokenizer

TEXTS = [topics[name] for name in sorted(topics)[:6]]


def decoded_documents(root: Path, name: str) -> list[str]:
    """The validation documents of a dataset, from its tokens alone."""
    dataset = open_dataset(root, name)
    processor = load_tokenizer(dataset.tokenizer)
    stream = TokenStream(dataset.val, processor.get_piece_size())
    tokens = stream.read(0, len(stream))
    starts = [*np.flatnonzero(tokens == processor.bos_id()).tolist(), len(tokens)]
    return [processor.decode(tokens[a + 1 : b].tolist()) for a, b in pairwise(starts)]


def test_the_demo_corpus_counts_every_byte_of_its_text(data_root: Path) -> None:
    dataset = open_dataset(data_root, DEMO_DATASET)
    held_out, _ = split_documents(demo_documents(), 0.02)
    expected = passages(held_out, 1_000)
    assert decoded_documents(data_root, DEMO_DATASET) == expected
    text_bytes = sum(len(text.encode()) for text in expected)
    table = byte_table(load_tokenizer(dataset.tokenizer, 1024))
    stream = TokenStream(dataset.val, 1024)
    tokens = stream.read(0, len(stream))
    assert int(table.cost(tokens[:-1], tokens[1:]).sum()) == text_bytes == dataset.stats["val_bytes"]
    assert dataset.stats["val_order0_bits_per_byte"] == pytest.approx(order0_bits_per_byte(expected))
    assert 4.0 < dataset.stats["val_order0_bits_per_byte"] < 5.5


def test_the_demo_corpus_holds_out_whole_documents() -> None:
    documents = demo_documents()
    held_out, kept = split_documents(documents, 0.02)
    assert sorted(held_out + kept) == sorted(documents)
    assert set(held_out).isdisjoint(kept)
    share = sum(len(text.encode()) for text in held_out) / sum(len(text.encode()) for text in documents)
    assert 0.02 <= share < 0.06
    assert split_documents(documents[::-1], 0.02) == (held_out, kept)


def test_a_second_build_does_nothing(tmp_path: Path) -> None:
    root = tmp_path / "data"
    build_corpus(root, CorpusPlan(DEMO_DATASET, "stdlib", vocab_size=400), TEXTS)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.name != ".lock"}
    said: list[str] = []
    build_demo(root, said.append)
    assert said == []
    assert before == {path: path.stat().st_mtime_ns for path in before}


def build_here(root: Path) -> None:
    build_corpus(root, CorpusPlan("toy_sp400", "toy", vocab_size=400), TEXTS)


def test_two_builders_at_once_leave_one_whole_dataset(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    builders = [context.Process(target=build_here, args=(tmp_path,)) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
    assert [builder.exitcode for builder in builders] == [0, 0]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"manifest.json", "datasets", "tokenizers", ".lock"}
    assert [entry["name"] for entry in json.loads((tmp_path / "manifest.json").read_text())["datasets"]] == [
        "toy_sp400"
    ]
    assert decoded_documents(tmp_path, "toy_sp400")


def test_equal_documents_give_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_here(tmp_path / name)
    first = sorted(path for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(first) == 5
    for path in first:
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (["only one document " * 100], "needs documents for both splits; 1 were given"),
        ([*TEXTS, "a \u2581 mark"], "but its tokens count"),
        (["tiny", "text"], "no tokenizer of 400 pieces can be trained"),
    ],
)
def test_a_failed_build_leaves_the_data_root_as_it_was(tmp_path: Path, documents: list[str], message: str) -> None:
    build_here(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match=message):
        build_corpus(tmp_path, CorpusPlan("other_sp400", "other", vocab_size=400), documents)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", "datasets", "tokenizers", ".lock"}


def test_what_an_interrupted_builder_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".building-abc").mkdir()
    (tmp_path / ".building-abc" / "half").write_bytes(b"half a shard")
    build_here(tmp_path)
    assert not (tmp_path / ".building-abc").exists()


@settings(max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\0")), min_size=1))
def test_any_text_is_counted_to_the_byte(small_data_root: Path, texts: list[str]) -> None:
    processor = load_tokenizer(open_dataset(small_data_root, "topics_sp512").tokenizer)
    documents = [text.lstrip() for text in texts]
    tokens, counted = encode_documents(processor, documents)
    assert counted == sum(len(text.encode()) for text in documents)
    assert int((tokens == processor.bos_id()).sum()) == len(documents)


@given(st.lists(st.text("ab \n", max_size=60)), st.integers(1, 20))
def test_passages_keep_every_line(documents: list[str], size: int) -> None:
    cut = passages(documents, size)
    assert sorted("".join("".join(cut).split())) == sorted("".join("".join(documents).split()))
    assert all(passage == passage.lstrip() and passage for passage in cut)
    assert cut == passages(documents[::-1], size)


def test_order0_entropy_is_that_of_the_byte_frequencies() -> None:
    assert order0_bits_per_byte(["aabb", "ccdd"]) == pytest.approx(2.0)
    assert order0_bits_per_byte(["aaab"]) == pytest.approx(0.811278, abs=1e-6)
    assert order0_bits_per_byte(["é"]) == pytest.approx(1.0)  # two different bytes


def test_a_fetch_without_a_network_says_so_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.fineweb.constants.ENDPOINT", "http://127.0.0.1:9")  # a port that nobody listens on
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    expected = r"^cannot reach http://127\.0\.0\.1:9, where willdepueoai/parameter-golf is published: .*refused"
    with pytest.raises(DataError, match=expected) as caught:
        fetch(tmp_path / "data", "sp1024", 1)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variant", "shards", "message"), [("sp7", 1, "variant is 'sp7'"), ("sp1024", 0, "at least 1")]
)
def test_a_fetch_of_nothing_known_is_refused(tmp_path: Path, variant: str, shards: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fetch(tmp_path / "data", variant, shards)
    assert list(tmp_path.iterdir()) == []
