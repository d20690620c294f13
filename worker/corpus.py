"""Text to shards: a tokenizer trained on documents, their token shards, and the demo corpus that every Python brings.

Torch-free. A corpus is built under a temporary name and renamed when it is whole, and its manifest entry, written last,
is what makes it exist; builders of one data root take turns.
"""

import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from worker.shards import TOKENS_PER_SHARD, DataError, Split, open_dataset, read_manifest, shard_name, write_shard
from worker.tokenizer import SPACE, byte_table, load_tokenizer

DEMO_DATASET = "stdlib_sp1024"
Say = Callable[[str], None]

_TOKENIZER_SAMPLE_BYTES = 2_000_000
_DEMO_PASSAGE_BYTES = 1_000
_DEMO_SKIPS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
    | {"pydoc_data", "encodings", "__pycache__"}  # topics are documents of their own; encodings are tables of numbers
)


@dataclass(frozen=True)
class CorpusPlan:
    """How documents become a dataset: its name, its files' prefix, the vocabulary, and the share held out."""

    dataset: str
    prefix: str
    vocab_size: int = 1024
    validation_share: float = 0.02
    """Of the bytes: documents are taken whole until it is reached."""
    passage_bytes: int | None = None
    """Documents are cut into passages of about this many bytes, which are then documents: where they are so long that a
    small model's step would see only one of them. Cut after the split: nothing of a held-out document is trained on."""


def build_demo(root: Path, say: Say = lambda message: None) -> None:
    """Put the demo corpus, `stdlib_sp1024`, into the data root: the standard library's documentation and sources of the
    Python that runs this. Does nothing where it is there already. Raises DataError."""
    if has_dataset(root, DEMO_DATASET):
        return  # without the lock: a data root that is there may well be read-only
    with turn(root):
        if not has_dataset(root, DEMO_DATASET):  # nor since the lock was asked for
            build(root, CorpusPlan(DEMO_DATASET, "stdlib", passage_bytes=_DEMO_PASSAGE_BYTES), demo_documents(), say)


def has_dataset(root: Path, name: str) -> bool:
    """Whether the data root's manifest lists the dataset. It may still be damaged: open_dataset says."""
    if not (root / "manifest.json").exists():
        return False
    return any(entry.get("name") == name for entry in read_manifest(root)["datasets"])


def build_corpus(root: Path, plan: CorpusPlan, documents: Sequence[str], say: Say = lambda message: None) -> None:
    """Add documents to the data root as a dataset with a tokenizer of its own, replacing one of the same name.

    Raises DataError, leaving the data root as it was, for documents whose bytes the tokens could not stand for.
    """
    with turn(root):
        build(root, plan, documents, say)


def demo_documents() -> list[str]:
    """The standard library's help topics and module sources, in an order that depends on the Python version alone."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = [topics[name] for name in sorted(topics)]
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
        parts = path.relative_to(library).parts
        if _DEMO_SKIPS.isdisjoint(parts) and not path.name.startswith("_sysconfigdata"):
            sources.append(_text(path.read_bytes()))
    return [text for text in sources if text and SPACE not in text]


def build(root: Path, plan: CorpusPlan, documents: Sequence[str], say: Say) -> None:
    """As build_corpus, by a builder whose turn it is."""
    total = sum(len(text.encode()) for text in documents)
    held_out, kept = split_documents(documents, plan.validation_share)
    validation, training = passages(held_out, plan.passage_bytes), passages(kept, plan.passage_bytes)
    if not validation or not training:
        raise DataError(f"dataset {plan.dataset!r} needs documents for both splits; {len(documents)} were given")
    folder = Path(tempfile.mkdtemp(prefix=".building-", dir=root))
    try:
        say(f"{plan.dataset}: {len(documents)} documents, {total / 1e6:.1f} MB; training a tokenizer")
        tokenizer = folder / f"{plan.prefix}_{plan.vocab_size}_bpe.model"
        tokenizer.write_bytes(train_tokenizer(training, plan.vocab_size))
        shards = folder / "shards"
        shards.mkdir()
        say(f"{plan.dataset}: writing shards")
        stats: dict[str, Any] = {}
        for split, texts in (("val", validation), ("train", training)):
            stats |= _write_split(shards, plan.prefix, "val" if split == "val" else "train", texts, tokenizer)
        stats["val_order0_bits_per_byte"] = order0_bits_per_byte(validation)
        stats["python"] = sys.version.split()[0]
        _publish(root, plan.dataset, tokenizer, shards, stats)
        say(f"{plan.dataset}: {stats['tokens_train']:,} training and {stats['tokens_val']:,} validation tokens")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def split_documents(documents: Sequence[str], validation_share: float) -> tuple[list[str], list[str]]:
    """(validation, training) documents. Shuffled by their own digests, so that the order given does not matter; the
    first of them, up to the share of bytes, are validation."""
    shuffled = sorted(documents, key=_digest)
    wanted = validation_share * sum(len(text.encode()) for text in shuffled)
    taken, held = 0, 0.0
    while taken < len(shuffled) and held < wanted:
        held += len(shuffled[taken].encode())
        taken += 1
    return shuffled[:taken], shuffled[taken:]


def passages(documents: Sequence[str], size: int | None) -> list[str]:
    """Documents cut at line ends into passages of at least `size` bytes (but each document's last), shuffled by their
    digests. The documents themselves where the size is None. Space in front of a passage is dropped: see _text."""
    if size is None:
        return list(documents)
    cut: list[str] = []
    for text in documents:
        lines: list[str] = []
        held = 0
        for line in text.splitlines(keepends=True):
            lines.append(line)
            held += len(line.encode())
            if held >= size:
                cut.append("".join(lines))
                lines, held = [], 0
        cut.append("".join(lines))
    return sorted((passage.lstrip() for passage in cut if passage.strip()), key=_digest)


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
        raise DataError(f"no tokenizer of {vocab_size} pieces can be trained on this text: {error}") from None
    return model.getvalue()


def encode_documents(processor: Any, documents: Sequence[str]) -> tuple[NDArray[np.uint16], int]:
    """Documents as tokens, each its BOS and then its text, and the bytes of text they stand for as the metric counts.

    Raises DataError for a document whose tokens would count other bytes than its text has.
    """
    table = byte_table(processor)
    pieces, counted = [], 0
    for text, ids in zip(documents, processor.encode(list(documents)), strict=True):
        tokens = np.array([processor.bos_id(), *ids], dtype=np.int64)
        size, cost = len(text.encode()), int(table.cost(tokens[:-1], tokens[1:]).sum())
        if cost != size:
            raise DataError(f"the document {text[:40]!r}… has {size} bytes, but its tokens count {cost}")
        counted += cost
        pieces.append(tokens.astype(np.uint16))
    return np.concatenate(pieces), counted


def order0_bits_per_byte(documents: Sequence[str]) -> float:
    """The entropy of the documents' bytes, each coded by its frequency: what a model without context would score."""
    counts: Counter[int] = Counter()
    for text in documents:
        counts.update(text.encode())
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())


def merge_manifest(root: Path, dataset: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    """Add a dataset and its tokenizer to the data root's manifest, replacing entries of the same names."""
    path = root / "manifest.json"
    manifest: dict[str, Any] = read_manifest(root) if path.exists() else {"datasets": [], "tokenizers": []}
    for key, entry in (("datasets", dataset), ("tokenizers", tokenizer)):
        others = [known for known in manifest[key] if known.get("name") != entry["name"]]
        manifest[key] = sorted([*others, entry], key=lambda known: str(known.get("name")))
    temporary = root / f".manifest-{os.getpid()}.json"
    temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


@contextmanager
def turn(root: Path) -> Iterator[None]:
    """Hold the data root's lock. Whatever an interrupted builder left behind is gone afterwards."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".lock").open("w")
    except OSError as error:
        raise DataError(f"data root {root} cannot be written: {error.strerror}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in root.glob(".building-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def _publish(root: Path, name: str, tokenizer: Path, shards: Path, stats: dict[str, Any]) -> None:
    """Move a finished dataset to its place; the manifest last."""
    (root / "tokenizers").mkdir(exist_ok=True)
    (root / "datasets").mkdir(exist_ok=True)
    folder = root / "datasets" / name
    if folder.exists():
        folder.rename(shards.parent / "replaced")
    tokenizer.replace(root / "tokenizers" / tokenizer.name)
    shards.rename(folder)
    dataset = {"name": name, "tokenizer_name": tokenizer.stem, "stats": stats}
    merge_manifest(root, dataset, {"name": tokenizer.stem, "model_path": f"tokenizers/{tokenizer.name}"})
    open_dataset(root, name)


def _write_split(folder: Path, prefix: str, split: Split, documents: Sequence[str], tokenizer: Path) -> dict[str, Any]:
    tokens, counted = encode_documents(load_tokenizer(tokenizer), documents)
    starts = range(0, len(tokens), TOKENS_PER_SHARD)
    for number, start in enumerate(starts):
        write_shard(folder / shard_name(prefix, split, number), tokens[start : start + TOKENS_PER_SHARD])
    return {
        f"files_{split}": len(starts),
        f"tokens_{split}": len(tokens),
        f"docs_{split}": len(documents),
        f"{split}_bytes": counted,
    }


def _sample(documents: Sequence[str]) -> list[str]:
    """Every n-th document, n such that the sample has about the size that is enough for a small vocabulary."""
    total = sum(len(text.encode()) for text in documents)
    return list(documents[:: max(1, total // _TOKENIZER_SAMPLE_BYTES)])


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _text(data: bytes) -> str:
    """A source file as text: its first word at the start, since the metric counts no space in front of it; empty where
    it is not UTF-8."""
    try:
        return data.decode().replace("\r\n", "\n").lstrip()
    except UnicodeDecodeError:
        return ""
