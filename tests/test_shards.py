"""Token shards and data roots: what is written is read back, and what is damaged is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worker.data import Batches
from worker.shards import DataError, TokenStream, open_dataset, open_shard, shard_name, write_shard
from worker.spec import DataConfig
from worker.world import World

CPU = torch.device("cpu")


def make_root(root: Path, train: list[list[int]], val: list[list[int]], **stats: int) -> Path:
    """A data root with the dataset `toy`, whose tokenizer is a file that nobody reads."""
    folder = root / "datasets" / "toy"
    folder.mkdir(parents=True)
    (root / "tokenizers").mkdir()
    (root / "tokenizers" / "toy.model").write_bytes(b"toy")
    for split, shards in (("train", train), ("val", val)):
        for number, tokens in enumerate(shards):
            write_shard(folder / f"toy_{split}_{number:06d}.bin", tokens)
    dataset = {
        "name": "toy",
        "tokenizer_name": "t",
        "stats": {"files_train": len(train), "files_val": len(val), **stats},
    }
    manifest = {"datasets": [dataset], "tokenizers": [{"name": "t", "model_path": "tokenizers/toy.model"}]}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def test_a_shard_is_the_challenges_format(tmp_path: Path) -> None:
    path = tmp_path / shard_name("fineweb", "val", 3)
    write_shard(path, [1, 2, 65_535])
    header = np.frombuffer(path.read_bytes()[:1024], dtype="<i4")
    assert path.name == "fineweb_val_000003.bin"
    assert header[:3].tolist() == [20240520, 1, 3]
    assert not header[3:].any()
    assert path.read_bytes()[1024:] == b"\x01\x00\x02\x00\xff\xff"
    assert open_shard(path).mapped().tolist() == [1, 2, 65_535]


@pytest.mark.parametrize("tokens", [[], [-1], [65_536]])
def test_a_shard_that_16_bits_cannot_hold_is_not_written(tmp_path: Path, tokens: list[int]) -> None:
    with pytest.raises(DataError, match=r"toy\.bin would hold"):
        write_shard(tmp_path / "toy.bin", tokens)
    assert list(tmp_path.iterdir()) == []


def test_streams_wrap_and_cross_shards(tmp_path: Path) -> None:
    shards = [write_shard(tmp_path / f"{n}.bin", tokens) for n, tokens in enumerate([[0, 1, 2], [3], [4, 5]])]
    stream = TokenStream(shards, vocab_size=6)
    assert len(stream) == 6
    assert stream.read(2, 3).tolist() == [2, 3, 4]
    assert stream.read(4, 10).tolist() == [4, 5, 0, 1, 2, 3, 4, 5, 0, 1]
    assert stream.read(6 * 1_000_000_007 + 5, 2).tolist() == [5, 0]
    assert stream.read(0, 6).dtype == np.int64


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "has 0 bytes; a shard's header alone has 1024"),
        (lambda data: data[:1023], "has 1023 bytes; a shard's header alone has 1024"),
        (lambda data: data[:-1], "has 1033 bytes and says 5 tokens; that needs 1034 bytes"),
        (lambda data: data + b"\0\0", "has 1036 bytes and says 5 tokens; that needs 1034 bytes"),
        (lambda data: b"\1" + data[1:], "a token shard starts with 20240520"),
        (lambda data: data[:4] + b"\2" + data[5:], "is a shard of version 2; this code reads version 1"),
        (lambda data: data[:8] + b"\xff\xff\xff\xff" + data[12:], "says -1 tokens; that needs at least one token"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    root = make_root(tmp_path, [[0, 1, 2], [0, 1, 2, 3, 4]], [[0, 1]])
    path = root / "datasets" / "toy" / "toy_train_000001.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as caught:
        open_dataset(root, "toy")
    assert "toy_train_000001.bin" in str(caught.value)
    assert message in str(caught.value)


def test_a_missing_shard_is_refused_by_number(tmp_path: Path) -> None:
    root = make_root(tmp_path, [[0], [1], [2]], [[0, 1]])
    (root / "datasets" / "toy" / "toy_train_000001.bin").unlink()
    with pytest.raises(DataError, match="misses train shard 000001, though 000002 is there"):
        open_dataset(root, "toy")


def test_the_first_few_training_shards_are_a_dataset_but_validation_must_be_whole(tmp_path: Path) -> None:
    root = make_root(tmp_path, [[0], [1]], [[0, 1]], files_train=80)
    assert [shard.tokens for shard in open_dataset(root, "toy").train] == [1, 1]
    other = make_root(tmp_path / "other", [[0]], [[0, 1]], files_val=2)
    with pytest.raises(DataError, match=r"holds 1 validation shards; manifest\.json says 2"):
        open_dataset(other, "toy")


def test_byte_side_cars_are_no_shards(tmp_path: Path) -> None:
    root = make_root(tmp_path, [[0]], [[0, 1]])
    folder = root / "datasets" / "toy"
    shutil.copy(folder / "toy_val_000000.bin", folder / "toy_val_bytes_000000.bin")
    assert [shard.path.name for shard in open_dataset(root, "toy").val] == ["toy_val_000000.bin"]


def test_a_data_root_without_the_dataset_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json is missing: build or fetch"):
        open_dataset(tmp_path, "toy")
    root = make_root(tmp_path, [[0]], [[0, 1]])
    with pytest.raises(DataError, match=r"manifest\.json does not list it; it lists toy"):
        open_dataset(root, "other")
    (root / "datasets" / "other").mkdir()
    with pytest.raises(DataError, match=r"manifest\.json does not list it, though .*other is there; it lists toy"):
        open_dataset(root, "other")
    (root / "tokenizers" / "toy.model").unlink()
    with pytest.raises(DataError, match=r"toy\.model is missing: it is the tokenizer of dataset 'toy'"):
        open_dataset(root, "toy")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, '{"datasets": []}', '{"datasets": [3], "tokenizers": []}']
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json (is no JSON|has no list of objects)"):
        open_dataset(tmp_path, "toy")


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ([1], r"gives dataset 'toy' the stats \[1\]; they must be an object"),
        ({"files_val": "x"}, "the files_val 'x'; it must be a whole number"),
        ({"val_bytes": True}, "the val_bytes True; it must be a whole number"),
        ({"files_val": None}, "the files_val None; it must be a whole number"),
    ],
)
def test_stats_that_are_none_are_refused(tmp_path: Path, stats: object, message: str) -> None:
    root = make_root(tmp_path, [[0]], [[0, 1]])
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["datasets"][0]["stats"] = stats
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=rf"manifest\.json {message}" if "gives" in message else message):
        open_dataset(root, "toy")


def test_a_manifest_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(DataError, match=r"manifest\.json cannot be read: Is a directory"):
        open_dataset(tmp_path, "toy")


def test_a_token_outside_the_vocabulary_is_refused_with_its_file(tmp_path: Path) -> None:
    stream = TokenStream(
        [write_shard(tmp_path / "a.bin", [0, 7]), write_shard(tmp_path / "b.bin", [1, 8])], vocab_size=8
    )
    assert stream.read(0, 3).tolist() == [0, 7, 1]
    for touch in (lambda: stream.read(3, 1), stream.check):
        with pytest.raises(DataError, match=r"b\.bin holds token 8; ids must be below the vocabulary's size, 8"):
            touch()


@given(
    ranks=st.sampled_from([1, 2, 4, 8]),
    length=st.integers(2, 9),
    share=st.integers(1, 5),
    micro=st.integers(1, 6),
    step=st.integers(0, 40),
)
def test_the_global_batch_is_the_same_for_any_number_of_ranks(
    tmp_path_factory: pytest.TempPathFactory, ranks: int, length: int, share: int, micro: int, step: int
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    root = make_root(folder, [list(range(300)), list(range(300, 431))], [[0, 1]])
    sequences = 8 * share
    config = DataConfig(sequence_length=length, batch_tokens=sequences * length, micro_batch_sequences=micro)
    gathered = []
    for rank in range(ranks):
        batches = Batches(open_dataset(root, "toy"), config, 431, World(rank, ranks, CPU))
        for tokens, targets in batches.batch(step):
            assert 1 <= len(tokens) <= micro
            assert torch.equal(targets, (tokens + 1) % 431)
            gathered.append(tokens)
    start = step * sequences * length
    expected = (torch.arange(start, start + sequences * length) % 431).view(sequences, length)
    assert torch.equal(torch.cat(gathered), expected)
