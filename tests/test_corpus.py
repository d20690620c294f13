"""Text to shards: every byte is counted, builders do not disturb each other, and a failed build leaves nothing."""

import json
import multiprocessing
import queue
import shlex
import shutil
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.__main__ import main
from worker.corpus import (
    DEMO_DATASET,
    CorpusPlan,
    build,
    build_demo,
    build_text,
    encode_documents,
    open_whole,
    turn,
)
from worker.documents import demo_documents, order0_bits_per_byte, passages, read_documents, split_documents
from worker.fineweb import command_for
from worker.shape import FieldError
from worker.shards import DataError, TokenStream, open_dataset
from worker.tokenizer import byte_table, load_tokenizer

TEXTS = [topics[name] for name in sorted(topics)[:6]]


def build_here(root: Path, name: str = "toy_sp400", documents: Sequence[str] = TEXTS) -> None:
    with turn(root) as folder:
        build(root, folder, CorpusPlan(name, "toy", vocab_size=400), documents)


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
    held_out, kept = split_documents([*documents, *documents], 0.02)
    assert sorted(held_out + kept) == sorted([*documents, *documents])
    assert set(held_out).isdisjoint(kept), "nor is a copy of one trained on"
    held_out, kept = split_documents(documents, 0.02)
    share = sum(len(text.encode()) for text in held_out) / sum(len(text.encode()) for text in documents)
    assert 0.02 <= share < 0.06
    assert split_documents(documents[::-1], 0.02) == (held_out, kept)


def test_a_second_build_does_nothing(tmp_path: Path) -> None:
    root = tmp_path / "data"
    build_here(root, DEMO_DATASET)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.name != ".lock"}
    said: list[str] = []
    build_demo(root, said.append)
    assert said == []
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_two_builders_at_once_leave_one_whole_dataset(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    builders = [context.Process(target=build_here, args=(tmp_path,)) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
    assert [builder.exitcode for builder in builders] == [0, 0]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"manifest.json", "datasets", ".lock"}
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
        ([*TEXTS, " a space that does not count"], "but its tokens count"),
        (["tiny", "text"], "no tokenizer of 400 pieces can be trained"),
    ],
)
def test_a_failed_build_leaves_the_data_root_as_it_was(tmp_path: Path, documents: list[str], message: str) -> None:
    build_here(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match=message):
        build_here(tmp_path, "other_sp400", documents)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", "datasets", ".lock"}


def test_what_an_interrupted_builder_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".building-abc").mkdir()
    (tmp_path / ".building-abc" / "half").write_bytes(b"half a shard")
    with turn(tmp_path) as folder:
        assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_builders_of_one_data_root_take_turns_and_say_that_they_wait(tmp_path: Path) -> None:
    said: queue.Queue[str] = queue.Queue()

    def second() -> None:
        with turn(tmp_path, said.put):
            said.put("its turn")

    waiting = threading.Thread(target=second)
    with turn(tmp_path):
        waiting.start()
        assert said.get(timeout=60) == f"waiting for another program that builds or fetches a dataset in {tmp_path}"
        assert said.empty()
    waiting.join(60)
    assert said.get(timeout=60) == "its turn"


def test_a_data_root_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"data root .*file cannot be written: File exists"), turn(tmp_path / "file"):
        pass
    with pytest.raises(DataError, match="cannot be written: No such file or directory"), turn(tmp_path) as folder:
        (folder / "no" / "shard").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot be written: No space left on device$"), turn(tmp_path):
        Path("/dev/full").write_bytes(b"a shard")


def test_documents_and_the_challenges_tokenizer_become_a_dataset_to_the_byte(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, tokenizer = shared / "data" / "fineweb_100_docs.jsonl", shared / "data" / "fineweb_1024_bpe.model"
    words = ["data", "build", "--data", str(tmp_path), "--name", "docs", "--text", str(text)]
    assert main([*words, "--tokenizer", str(tokenizer)]) == 0
    printed = capsys.readouterr()
    assert printed.out.endswith("train on it with data.dataset: docs and model.vocab_size: 1024\n")
    dataset, processor = open_whole(tmp_path, "docs"), load_tokenizer(tokenizer)
    normalised = processor.decode(processor.encode(read_documents(text)))
    held_out = decoded_documents(tmp_path, "docs")
    assert len(normalised) == 100 and set(held_out) < set(normalised)
    val_bytes, train_bytes = (dataset.stats[key] for key in ("val_bytes", "train_bytes"))
    assert val_bytes == sum(len(document.encode()) for document in held_out) == 16_943
    assert val_bytes + train_bytes == sum(len(document.encode()) for document in normalised) == 790_465
    assert "changes 3 of 3 validation documents, and their 16,957 bytes into the 16,943 that count" in printed.err
    assert "changes 94 of 97 training documents, and their 773,538 bytes into the 773,522 that count" in printed.err
    assert dataset.tokenizer.read_bytes() == tokenizer.read_bytes()


def test_datasets_of_ones_own_text_leave_each_other_alone(tmp_path: Path) -> None:
    root, lines = tmp_path / "root", tmp_path / "lines.txt"
    said: list[str] = []
    for name, text in (("first", TEXTS[0]), ("second", TEXTS[1])):
        lines.write_text(f"\ufeff{text}\r\n  a \u2581 mark\n")
        assert build_text(root, CorpusPlan(name, name, vocab_size=400), lines, said.append) == 400
        if name == "first":
            first = {path: path.read_bytes() for path in (root / "datasets").rglob("*") if path.is_file()}
    assert {path: path.read_bytes() for path in first} == first
    documents = [line.strip().replace("\u2581", " ") for line in f"{TEXTS[1]}\na \u2581 mark".split("\n")]
    assert set(decoded_documents(root, "second")) <= set(documents)
    assert any("the tokenizer's normalisation changes 1 of" in line for line in said)
    assert not (root / "tokenizers").exists()


def test_a_dataset_of_ones_own_is_built_again_only_once_its_folder_is_removed(tmp_path: Path) -> None:
    root, lines, quoted = tmp_path / "root", tmp_path / "lines.txt", shlex.quote(str(tmp_path / "root"))
    lines.write_text(TEXTS[0])
    command = f"caddie data build --data {quoted} --name own --text FILE"
    assert command_for(root, "own") == command
    build_text(root, CorpusPlan("own", "own", vocab_size=333), lines)
    here, manifest = root / "datasets" / "own", (root / "manifest.json").read_bytes()
    for gone in ("nothing", "datasets/own/own_train_000000.bin", "manifest.json"):
        (root / gone).unlink(missing_ok=True)
        with pytest.raises(FieldError, match=rf"name is 'own': must be a new one; .* remove {here} first"):
            build_text(root, CorpusPlan("own", "own", vocab_size=400), lines)
    assert command_for(root, "own") == f"{command} (remove {here} first)"
    (root / "manifest.json").write_bytes(manifest.replace(b"vocab_size", b"unsaid"))  # as an earlier release left it
    assert command_for(root, "own") == f"{command} --vocab-size N (remove {here} first)"
    (root / "manifest.json").write_bytes(manifest)
    assert command_for(root, "own") == f"{command} --vocab-size 333 (remove {here} first)"
    given = here.rename(tmp_path / "before") / "tokenizer.model"
    assert command_for(root, "own") == f"{command} --vocab-size 333"
    assert build_text(root, CorpusPlan("own", "own", tokenizer=given), lines) == 333
    assert open_whole(root, "own").stats["vocab_size"] == 333
    shutil.rmtree(here)
    assert command_for(root, "own") == f"{command} --tokenizer MODEL"


@pytest.mark.parametrize(
    ("vocab_size", "tokenizer", "message"),
    [
        (0, None, "vocab_size is 0: must be from 261 .* to 65536"),
        (400, "tokenizer.model", r"vocab_size is 400: must be 512, the pieces of the tokenizer .*tokenizer\.model"),
        (None, "gone.model", r"gone\.model is no SentencePiece model: .*No such file"),
    ],
)
def test_a_tokenizer_that_does_not_suit_is_refused(
    small_data_root: Path, tmp_path: Path, vocab_size: int | None, tokenizer: str | None, message: str
) -> None:
    given = open_dataset(small_data_root, "topics_sp512").tokenizer.with_name(tokenizer) if tokenizer else None
    with pytest.raises((DataError, FieldError), match=message), turn(tmp_path) as folder:
        build(tmp_path, folder, CorpusPlan("x", "x", vocab_size, given), TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": 3}', r'line 3 must be a JSON object such as \{"text": "…"\}'),
        ("a.jsonl", b'{"texts": "a"}', "line 1 must be a JSON object"),
        ("a.jsonl", b"[" * 100_000, "line 1 must be a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}', "line 2 is no UTF-8"),
        ("a.txt", b"a\n\xff", "line 2 is no UTF-8"),
        ("a.txt", b" \n\n", "holds no document"),
    ],
)
def test_text_that_cannot_be_read_is_refused_by_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"text .*{name}.* {message}"):
        read_documents(tmp_path / name)


@settings(max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\0")), min_size=1))
def test_any_text_is_counted_to_the_byte(small_data_root: Path, texts: list[str]) -> None:
    processor = load_tokenizer(open_dataset(small_data_root, "topics_sp512").tokenizer)
    documents = [text.lstrip() for text in texts]
    tokens, texts = encode_documents(processor, documents)
    assert texts == documents
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
