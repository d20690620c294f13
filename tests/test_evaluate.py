"""Bits per byte: the bytes are those of the text, and the sum is the one the challenge takes."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.corpus import train_tokenizer
from worker.evaluate import Validation, evaluate, open_validation, share
from worker.model import Model, initialise
from worker.shape import FieldError, ModelConfig
from worker.shards import DataError, Dataset, Tokens, TokenStream, open_dataset, write_shard
from worker.sharing import SharingConfig
from worker.tokenizer import ByteTable, byte_table, load_tokenizer, open_table
from worker.world import World

ALONE = World(0, 1, torch.device("cpu"))
SHARING = SharingConfig(virtual_layers=2, unique_blocks=1)


def make_model(vocab_size: int = 512) -> Model:
    model = Model(ModelConfig(vocab_size=vocab_size, width=16, heads=2, kv_heads=1, embedding_init_std=0.5), SHARING)
    initialise(model, 3)
    return model


@pytest.fixture(scope="module")
def validation(small_data_root: Path) -> Validation:
    return open_validation(open_dataset(small_data_root, "topics_sp512"), 512, 32, 7)


def counted(path: Path, texts: list[str]) -> list[tuple[int, str]]:
    """For each text the bytes that its tokens count after a BOS, and the text that they decode to."""
    processor = load_tokenizer(path)
    table = byte_table(processor)
    results = []
    for ids in processor.encode(texts):
        tokens = np.array([processor.bos_id(), *ids])
        results.append((int(table.cost(tokens[:-1], tokens[1:]).sum()), processor.decode(ids)))
    return results


def test_the_challenges_tokenizer_counts_the_bytes_of_its_text(shared: Path) -> None:
    lines = (shared / "data" / "fineweb_100_docs.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    results = counted(shared / "data" / "fineweb_1024_bpe.model", texts)
    assert [count for count, _ in results] == [len(decoded.encode()) for _, decoded in results]
    # Before there are tokens its NFKC and its collapsing of spaces change the size of 17 documents, 30 bytes in all; in
    # the others a line end becomes a space, an ellipsis three dots: a byte for a byte.
    sizes = [len(text.encode()) for text in texts]
    assert sum(count == size for (count, _), size in zip(results, sizes, strict=True)) == 83
    assert sum(count for count, _ in results) == 790_465
    assert sum(sizes) == 790_495


def test_a_space_counts_unless_a_document_starts_with_it(shared: Path) -> None:
    processor = load_tokenizer(shared / "data" / "fineweb_1024_bpe.model", 1024)
    table = byte_table(processor)
    the, bos, byte = processor.piece_to_id("\u2581the"), processor.bos_id(), processor.piece_to_id("<0xE2>")
    assert table.cost(np.array([byte, bos, the]), np.array([the, the, bos])).tolist() == [4, 3, 0]
    assert table.cost(np.array([bos, the]), np.array([byte, byte])).tolist() == [1, 1]


def test_a_model_that_knows_nothing_scores_the_vocabularys_entropy(validation: Validation) -> None:
    model = make_model()
    with torch.no_grad():
        model.embedding.weight.zero_()
    score = evaluate(model, validation, ALONE)
    assert score.tokens == (len(validation.stream) - 1) // 32 * 32
    assert score.loss == pytest.approx(math.log(512), rel=1e-6)
    assert score.bpb == pytest.approx(9 * score.tokens / score.bytes, rel=1e-6)


def test_the_score_is_the_sum_over_windows_that_each_start_without_context(validation: Validation) -> None:
    model = make_model()
    tokens = validation.stream.read(0, len(validation.stream))
    loss, text_bytes, count = 0.0, 0, 0
    model.requires_grad_(False)
    for start in range(0, len(tokens) - 32, 32):
        window = torch.from_numpy(tokens[start : start + 33])
        loss += float(model.token_losses(window[None, :-1], window[None, 1:]).double().sum())
        text_bytes += int(validation.table.cost(tokens[start : start + 32], tokens[start + 1 : start + 33]).sum())
        count += 32
    score = evaluate(model, validation, ALONE)
    assert (score.tokens, score.bytes) == (count, text_bytes)
    assert score.loss == pytest.approx(loss / count, rel=1e-9)
    assert score.bpb == pytest.approx(loss / math.log(2) / text_bytes, rel=1e-9)


def test_scoring_changes_nothing_and_repeats(validation: Validation) -> None:
    model = make_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert evaluate(model, validation, ALONE) == evaluate(model, validation, ALONE)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_limited_score_takes_windows_from_all_over_the_split() -> None:
    validation = counting(64 * 10 + 1, 64)
    score = evaluate(make_model(64), validation, ALONE, token_limit=64 * 4 + 63)
    assert score.tokens == score.bytes == 64 * 4
    assert isinstance(validation.stream, FakeStream)
    assert validation.stream.starts == [0, 64 * 2, 64 * 5, 64 * 7]
    assert evaluate(make_model(64), validation, ALONE, token_limit=1).tokens == 64


class FakeStream(TokenStream):
    """So many tokens 0, 1, 2, … that remembers where it was read."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.starts: list[int] = []

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, count: int) -> Tokens:
        self.starts.append(start)
        return np.arange(start, start + count) % 64


def counting(length: int, sequence_length: int) -> Validation:
    table = ByteTable(np.ones(64, np.int64), np.zeros(64, np.bool_), np.zeros(64, np.bool_))
    return Validation(FakeStream(length), table, sequence_length, 3)


@settings(max_examples=100)
@given(st.data(), st.integers(2, 20), st.integers(1, 80))
def test_every_stride_scores_each_target_once_with_context_enough(data: st.DataObject, length: int, more: int) -> None:
    validation, stride = counting(length + more, length), data.draw(st.integers(1, length))
    windows = validation.windows(stride)
    ends = [window.start + length for window in windows]
    targets = [target for window, end in zip(windows, ends, strict=True) for target in range(end - window.scored, end)]
    assert targets == list(range(validation.targets)) == list(range((length + more - 1) // length * length))
    assert windows[0] == (0, length)
    assert all(window.scored <= stride for window in windows[1:])
    for ranks in (1, 2, 4, 8):
        shares = [share(windows, World(rank, ranks, torch.device("cpu"))) for rank in range(ranks)]
        assert [window for mine in shares for window in mine] == windows


@settings(max_examples=50)
@given(st.data(), st.integers(2, 20), st.integers(20, 80), st.integers(2, 100))
def test_a_token_limit_is_kept_wherever_a_window_does(data: st.DataObject, length: int, more: int, limit: int) -> None:
    validation, stride = counting(length + more, length), data.draw(st.integers(1, length))
    every, windows = validation.windows(stride), validation.windows(stride, limit)
    assert set(windows) <= set(every)
    assert windows[0] == every[0]
    assert sum(window.scored for window in windows) <= max(limit, length)
    assert len(windows) == len(every) or sum(window.scored for window in windows) > limit - stride * 2


def test_a_stride_of_a_window_is_plain_scoring_bit_for_bit(validation: Validation) -> None:
    model = make_model()
    assert evaluate(model, validation, ALONE, stride=32) == evaluate(model, validation, ALONE)


@pytest.mark.parametrize("stride", [7, 16])
def test_sliding_windows_give_each_target_the_text_before_it(stride: int) -> None:
    validation = counting(32 * 8 + 5, 32)
    model, targets = make_model(64).requires_grad_(False), validation.targets
    tokens = torch.from_numpy(validation.stream.read(0, targets + 1))
    loss = model.token_losses(tokens[None, :32], tokens[None, 1:33]).double().sum()
    for first in range(32, targets, stride):
        end = min(first + stride, targets)
        losses = model.token_losses(tokens[None, end - 32 : end], tokens[None, end - 31 : end + 1])
        loss += losses[:, first - end :].double().sum()
    score, plain = evaluate(model, validation, ALONE, stride=stride), evaluate(model, validation, ALONE)
    assert (score.tokens, score.bytes) == (plain.tokens, plain.bytes)
    assert score.loss == pytest.approx(float(loss) / targets, rel=1e-6)


def test_more_context_makes_a_trained_model_no_worse(small_data_root: Path) -> None:
    dataset = open_dataset(small_data_root, "topics_sp512")
    model, text = make_model(), TokenStream(dataset.train, 512)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(60):
        tokens = torch.from_numpy(text.read(step * 512, 513))
        optimizer.zero_grad()
        model(tokens[:-1].view(16, 32), tokens[1:].view(16, 32)).backward()
        optimizer.step()
    validation = open_validation(dataset, 512, 32, 32)
    losses = [evaluate(model, validation, ALONE, stride=stride).loss for stride in (32, 16, 8)]
    assert losses[0] < 0.9 * math.log(512)
    assert losses == sorted(losses, reverse=True)


def test_another_vocabulary_is_refused_with_both_sizes(small_data_root: Path) -> None:
    with pytest.raises(
        FieldError, match=r"model\.vocab_size is 1024: must be 512, the vocabulary of the tokenizer .*\.model"
    ):
        open_validation(open_dataset(small_data_root, "topics_sp512"), 1024, 32, 8)


def test_another_tokenizer_of_the_same_size_is_refused(small_data_root: Path, tmp_path: Path) -> None:
    dataset = open_dataset(small_data_root, "topics_sp512")
    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer([topics[name] for name in sorted(topics)[12:16]], 512))
    with pytest.raises(
        DataError, match=r"other\.model its validation tokens count .* bytes; manifest\.json says 17,344"
    ):
        open_validation(replace(dataset, tokenizer=other), 512, 32, 8)


def test_validation_text_shorter_than_a_window_is_refused(small_data_root: Path) -> None:
    dataset = open_dataset(small_data_root, "topics_sp512")
    tokens = sum(shard.tokens for shard in dataset.val)
    assert open_validation(dataset, 512, tokens - 1, 8).windows() == [(0, tokens - 1)]
    with pytest.raises(
        FieldError, match=rf"data\.sequence_length is {tokens}: must be below the {tokens} validation tokens"
    ):
        open_validation(dataset, 512, tokens, 8)


def test_validation_tokens_outside_the_vocabulary_are_refused(small_data_root: Path, tmp_path: Path) -> None:
    dataset = open_dataset(small_data_root, "topics_sp512")
    shard = write_shard(tmp_path / "toy_val_000000.bin", [1, 511, 512])
    with pytest.raises(DataError, match=r"toy_val_000000\.bin holds token 512"):
        open_validation(Dataset(dataset.name, dataset.train, (shard,), dataset.tokenizer, {}), 512, 2, 8)


def test_what_was_opened_stays_open_until_its_files_change(small_data_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(small_data_root, root)

    def opened() -> Validation:
        return open_validation(open_dataset(root, "topics_sp512"), 512, 32, 7)

    first, again = opened(), opened()
    assert again.stream is first.stream and again.table is first.table
    (shard,), path = open_dataset(root, "topics_sp512").val, open_dataset(root, "topics_sp512").tokenizer
    write_shard(shard.path, range(100))
    with pytest.raises(DataError, match=r"its validation tokens count 96 bytes; manifest\.json says 17,344"):
        opened()
    manifest = json.loads((root / "manifest.json").read_text())
    del manifest["datasets"][0]["stats"]["val_bytes"]  # as the challenge's has none
    (root / "manifest.json").write_text(json.dumps(manifest))
    while write_shard(shard.path, range(100)).changed_ns == shard.changed_ns:
        pass  # until the file system's clock has ticked
    changed = opened()
    assert changed.stream.read(0, 100).tolist() == list(range(100))
    assert changed.table is first.table
    path.write_bytes(b"not a model")
    with pytest.raises(DataError, match="is no SentencePiece model"):
        opened()
    path.unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        open_table(path, 512)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "toy.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"toy\.model is no SentencePiece model"):
        load_tokenizer(tmp_path / "toy.model", 512)
