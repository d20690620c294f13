"""Bits per byte: the bytes are those of the text, and the sum is the one the challenge takes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from worker.evaluate import Validation, evaluate, open_validation
from worker.model import Model, initialise
from worker.shape import FieldError, ModelConfig
from worker.shards import DataError, Dataset, TokenStream, open_dataset, write_shard
from worker.sharing import SharingConfig
from worker.tokenizer import ByteTable, byte_table, load_tokenizer
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
    stream = FakeStream(64 * 10 + 1)
    table = ByteTable(np.ones(64, np.int64), np.zeros(64, np.bool_), np.zeros(64, np.bool_))
    score = evaluate(make_model(64), Validation(stream, table, 64, 3), ALONE, token_limit=64 * 4 + 63)
    assert score.tokens == score.bytes == 64 * 4
    assert stream.starts == [0, 64 * 2, 64 * 5, 64 * 7]
    assert evaluate(make_model(64), Validation(stream, table, 64, 3), ALONE, token_limit=1).tokens == 64


class FakeStream(TokenStream):
    """So many tokens 0, 1, 2, … that remembers where it was read."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.starts: list[int] = []

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, count: int) -> np.ndarray:
        self.starts.append(start)
        return np.arange(start, start + count) % 64


def test_another_vocabulary_is_refused_with_both_sizes(small_data_root: Path) -> None:
    with pytest.raises(
        FieldError, match=r"model\.vocab_size is 1024: must be 512, the vocabulary of the tokenizer .*\.model"
    ):
        open_validation(open_dataset(small_data_root, "topics_sp512"), 1024, 32, 8)


def test_validation_text_shorter_than_a_window_is_refused(small_data_root: Path) -> None:
    dataset = open_dataset(small_data_root, "topics_sp512")
    tokens = sum(shard.tokens for shard in dataset.val)
    assert open_validation(dataset, 512, tokens - 1, 8).windows == 1
    with pytest.raises(
        FieldError, match=rf"data\.sequence_length is {tokens}: must be below the {tokens} validation tokens"
    ):
        open_validation(dataset, 512, tokens, 8)


def test_validation_tokens_outside_the_vocabulary_are_refused(small_data_root: Path, tmp_path: Path) -> None:
    dataset = open_dataset(small_data_root, "topics_sp512")
    shard = write_shard(tmp_path / "toy_val_000000.bin", [1, 511, 512])
    with pytest.raises(DataError, match=r"toy_val_000000\.bin holds token 512"):
        open_validation(Dataset(dataset.name, dataset.train, (shard,), dataset.tokenizer, {}), 512, 2, 8)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "toy.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"toy\.model is no SentencePiece model"):
        load_tokenizer(tmp_path / "toy.model", 512)
