"""Text to shards: documents become a dataset, tokenizer and all; and the demo corpus, which every Python brings.

Torch-free. A corpus is built under a temporary name and renamed when it is whole, and its manifest entry, written last,
is what makes it exist; builders of one data root take turns.
"""

import fcntl
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from worker.documents import demo_documents, order0_bits_per_byte, passages, read_documents, size_of, split_documents
from worker.shape import FieldError
from worker.shards import (
    TOKENS_PER_SHARD,
    DataError,
    Dataset,
    Split,
    open_dataset,
    open_stream,
    read_manifest,
    shard_name,
    write_shard,
)
from worker.tokenizer import byte_table, load_tokenizer, open_table, require_its_own

DEMO_DATASET = "stdlib_sp1024"
Say = Callable[[str], None]

TOKENIZER = "tokenizer.model"
"""Of a dataset of ours, in its folder."""

_WORKPLACE = ".building-"
_SPLITS: dict[Split, str] = {"val": "validation", "train": "training"}
_VOCAB_SIZE = 1024
_SMALLEST_VOCABULARY, _LARGEST_VOCABULARY = 261, 2**16
_ENCODED_AT_ONCE = 1_000
_PROGRESS_SECONDS = 5.0
_TOKENIZER_SAMPLE_BYTES = 2_000_000
_DEMO_PASSAGE_BYTES = 1_000


@dataclass(frozen=True)
class CorpusPlan:
    """How documents become a dataset: its name, its shards' prefix, the vocabulary, and the share held out."""

    dataset: str
    prefix: str
    vocab_size: int | None = None
    """None for as many pieces as the tokenizer has; for 1024 where one is trained."""
    tokenizer: Path | None = None
    """A SentencePiece model. None to train one on the documents."""
    validation_share: float = 0.02
    """Of the bytes: documents are taken whole until it is reached."""
    passage_bytes: int | None = None
    """Documents are cut into passages of about this many bytes, which are then documents: where they are so long that a
    small model's step would see only one of them. Cut after the split: nothing of a held-out document is trained on."""


def build_demo(root: Path, say: Say = lambda message: None) -> None:
    """Put the demo corpus, `stdlib_sp1024`, into the data root: the standard library's documentation and sources of the
    Python that runs this. Does nothing where it is there whole; builds a damaged one again. Raises DataError."""
    if _has_demo(root):
        return  # without the lock: a data root that is there may well be read-only
    plan = CorpusPlan(DEMO_DATASET, "stdlib", passage_bytes=_DEMO_PASSAGE_BYTES)
    with turn(root, say) as folder:
        if not _has_demo(root, say):  # nor since the lock was asked for
            build(root, folder, plan, demo_documents(), say)


def build_text(root: Path, plan: CorpusPlan, path: Path, say: Say = lambda message: None) -> int:
    """Add the documents of a text file to the data root as a new dataset; how many pieces its tokenizer has.

    Raises DataError and FieldError as read_documents and build do, and FieldError where the data root has a folder of
    that name, damaged or not: what trials were scored on must not become other text under the same name.
    """
    documents = read_documents(path)
    with turn(root, say) as folder:
        here = root / "datasets" / plan.dataset
        if here.exists():
            raise FieldError("name", plan.dataset, f"must be a new one; to build this one again, remove {here} first")
        return build(root, folder, plan, documents, say)


def has_dataset(root: Path, name: str) -> bool:
    """Whether the data root's manifest lists the dataset. It may still be damaged: open_whole says."""
    if not (root / "manifest.json").exists():
        return False
    return any(entry.get("name") == name for entry in read_manifest(root)["datasets"])


def open_whole(root: Path, name: str) -> Dataset:
    """The dataset, its files there with the sizes that they should have, and its tokenizer the one that made its
    tokens. Raises DataError where they are not."""
    dataset = open_dataset(root, name)
    table = open_table(dataset.tokenizer)
    stream = open_stream(dataset.val, len(table.base))
    stream.check()
    require_its_own(dataset, stream, table)
    return dataset


def build(root: Path, folder: Path, plan: CorpusPlan, documents: Sequence[str], say: Say = lambda message: None) -> int:
    """Add documents to the data root as a dataset, replacing one of the same name; how many pieces its tokenizer has.
    That lies in the dataset's own folder, where no other dataset's can replace it.

    For a builder whose turn it is, in the folder that came with it: see turn. Raises DataError and FieldError, leaving
    the data root as it was, for documents whose bytes the tokens could not stand for, and for a tokenizer that shards
    cannot be made with.
    """
    held_out, kept = split_documents(documents, plan.validation_share)
    validation, training = passages(held_out, plan.passage_bytes), passages(kept, plan.passage_bytes)
    if not validation or not training:
        raise DataError(f"dataset {plan.dataset!r} needs documents for both splits; {len(documents)} were given")
    say(f"{plan.dataset}: {len(documents):,} documents, {size_of(documents) / 1e6:.1f} MB")
    whole = folder / plan.dataset
    whole.mkdir()
    processor = _take_tokenizer(plan, training, whole / TOKENIZER, say)
    say(f"{plan.dataset}: writing shards")
    pieces = int(processor.get_piece_size())
    stats: dict[str, Any] = {"python": sys.version.split()[0]}
    stats |= {"vocab_size": pieces, "tokenizer_given": plan.tokenizer is not None}
    stats |= _write_split(whole, plan, "val", validation, processor, say)
    stats |= _write_split(whole, plan, "train", training, processor, say)
    _publish(root, whole, stats)
    say(f"{plan.dataset}: {stats['tokens_train']:,} training and {stats['tokens_val']:,} validation tokens")
    return pieces


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> bytes:
    """A SentencePiece model trained on a sample of the documents.

    The challenge's settings, but for those that change the text (NFKC, collapsed spaces), so that tokens stand for
    exactly the bytes they came from; and runs of spaces may be one piece, since source code is full of them.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_sample(documents)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=True,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            max_sentence_length=2**30,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).rpartition("] ")[2]  # what comes before it is a place in SentencePiece's source
        raise DataError(f"no tokenizer of {vocab_size} pieces can be trained on this text: {reason}") from None
    return model.getvalue()


def encode_documents(
    processor: Any, documents: Sequence[str], done: Callable[[int], None] = lambda count: None
) -> tuple[NDArray[np.uint16], list[str]]:
    """Documents as tokens, each its BOS and then its text, and that text: as the tokenizer normalises it.

    `done` is told now and then how many are. Raises DataError for a document whose tokens the metric would count as
    other bytes than that text has.
    """
    table, pieces, texts = byte_table(processor), [], []
    for first in range(0, len(documents), _ENCODED_AT_ONCE):
        encoded = processor.encode(list(documents[first : first + _ENCODED_AT_ONCE]))
        for ids, text in zip(encoded, processor.decode(encoded), strict=True):
            tokens = np.array([processor.bos_id(), *ids], dtype=np.int64)
            size, cost = len(text.encode()), int(table.cost(tokens[:-1], tokens[1:]).sum())
            if cost != size:
                raise DataError(f"the document {text[:40]!r}… has {size} bytes, but its tokens count {cost}")
            pieces.append(tokens.astype(np.uint16))
            texts.append(text)
        done(len(texts))
    return np.concatenate(pieces), texts


def merge_manifest(root: Path, dataset: dict[str, Any], tokenizer: Path) -> None:
    """Add a dataset and its tokenizer, a file below its folder, to the data root's manifest. Replaces the dataset's
    earlier entries, and no others."""
    path = root / "manifest.json"
    manifest: dict[str, Any] = read_manifest(root) if path.exists() else {"datasets": [], "tokenizers": []}
    own = {"name": f"{dataset['name']}/tokenizer", "model_path": tokenizer.relative_to(root).as_posix()}
    for key, entry in (("datasets", dataset | {"tokenizer_name": own["name"]}), ("tokenizers", own)):
        others = [known for known in manifest[key] if known.get("name") != entry["name"]]
        manifest[key] = sorted([*others, entry], key=lambda known: str(known.get("name")))
    temporary = root / ".manifest.json"  # one writer at a time: see turn
    temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


@contextmanager
def turn(root: Path, say: Say = lambda message: None) -> Iterator[Path]:
    """Hold the data root's lock, with a folder in it to work in. Nothing is left of the folder afterwards, nor of what
    an interrupted builder left behind. Raises DataError where the data root cannot be written, also meanwhile."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another program that builds or fetches a dataset in {root}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            for leftover in root.glob(f"{_WORKPLACE}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix=_WORKPLACE, dir=root))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        file = "" if error.filename is None else f" ({error.filename})"  # a disk that is full names none
        raise DataError(f"data root {root} cannot be written: {error.strerror}{file}") from None


def _has_demo(root: Path, say: Say = lambda message: None) -> bool:
    """Whether the data root has the demo corpus and it can be used. Says why not where it is listed."""
    if not has_dataset(root, DEMO_DATASET):
        return False
    try:
        open_whole(root, DEMO_DATASET)
    except DataError as error:
        say(f"{DEMO_DATASET} cannot be used, and is built again: {error}")
        return False
    return True


def _publish(root: Path, whole: Path, stats: dict[str, Any]) -> None:
    """Move a finished dataset to its place; the manifest last."""
    place = root / "datasets" / whole.name
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        place.rename(whole.parent / "replaced by it")
    whole.rename(place)
    merge_manifest(root, {"name": place.name, "stats": stats}, place / TOKENIZER)
    open_whole(root, place.name)


def _take_tokenizer(plan: CorpusPlan, documents: Sequence[str], path: Path, say: Say) -> Any:
    """Have the plan's tokenizer at `path`, and its processor. Raises DataError and FieldError."""
    source = plan.tokenizer or path
    if plan.tokenizer is None:
        vocab_size = _VOCAB_SIZE if plan.vocab_size is None else plan.vocab_size
        if not _SMALLEST_VOCABULARY <= vocab_size <= _LARGEST_VOCABULARY:
            right = f"must be from {_SMALLEST_VOCABULARY} (each byte is one) to {_LARGEST_VOCABULARY} (of 16 bits)"
            raise FieldError("vocab_size", vocab_size, right)
        say(f"{plan.dataset}: training a tokenizer of {vocab_size:,} pieces")
        path.write_bytes(train_tokenizer(documents, vocab_size))
    processor = load_tokenizer(source)
    pieces = processor.get_piece_size()
    if plan.vocab_size not in (None, pieces):
        raise FieldError("vocab_size", plan.vocab_size, f"must be {pieces}, the pieces of the tokenizer {source}")
    if pieces > _LARGEST_VOCABULARY:
        raise DataError(f"{source} has {pieces:,} pieces; a shard's tokens have 16 bits, for {_LARGEST_VOCABULARY:,}")
    if processor.bos_id() < 0:
        raise DataError(f"{source} has no piece for the start of a document (bos)")
    if source != path:
        shutil.copyfile(source, path)
    return processor


def _write_split(
    folder: Path, plan: CorpusPlan, split: Split, documents: Sequence[str], processor: Any, say: Say
) -> dict[str, Any]:
    """Write a split's shards; what the manifest says of it."""
    said = time.monotonic()

    def done(count: int) -> None:
        nonlocal said
        if time.monotonic() - said > _PROGRESS_SECONDS:
            said = time.monotonic()
            say(f"{plan.dataset}: {count:,} of {len(documents):,} {_SPLITS[split]} documents are tokens")

    tokens, texts = encode_documents(processor, documents, done)
    if changed := sum(text != document for text, document in zip(texts, documents, strict=True)):
        say(
            f"{plan.dataset}: the tokenizer's normalisation changes {changed:,} of {len(texts):,} {_SPLITS[split]} "
            f"documents, and their {size_of(documents):,} bytes into the {size_of(texts):,} that count"
        )
    starts = range(0, len(tokens), TOKENS_PER_SHARD)
    for number, start in enumerate(starts):
        write_shard(folder / shard_name(plan.prefix, split, number), tokens[start : start + TOKENS_PER_SHARD])
    stats = {"files": len(starts), "tokens": len(tokens), "docs": len(texts)}
    order0 = {"val_order0_bits_per_byte": order0_bits_per_byte(texts)} if split == "val" else {}
    return {f"{key}_{split}": count for key, count in stats.items()} | {f"{split}_bytes": size_of(texts)} | order0


def _sample(documents: Sequence[str]) -> list[str]:
    """Every n-th document, n such that the sample has about the size that is enough for a small vocabulary."""
    return list(documents[:: max(1, size_of(documents) // _TOKENIZER_SAMPLE_BYTES)])
