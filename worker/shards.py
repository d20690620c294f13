"""Token shards in the challenge's format, and the data root that holds them. Torch-free; shards are memory-mapped."""

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Split = Literal["train", "val"]

MAGIC = 20240520
VERSION = 1
HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
TOKENS_PER_SHARD = 100_000_000
LARGEST_SHARD = 2**31 - 1


class DataError(ValueError):
    """Data that cannot be used: which file or dataset, what was found there, and what would be right."""


@dataclass(frozen=True)
class Shard:
    """One shard whose header and size have been checked."""

    path: Path
    tokens: int
    changed_ns: int
    """When the file last changed: shards that are equal are one file with one content."""

    def mapped(self) -> NDArray[np.uint16]:
        """The token ids, (tokens,), paged in from the file as they are touched."""
        return np.memmap(self.path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(self.tokens,))


@dataclass(frozen=True)
class Dataset:
    """One dataset of a data root. `stats` is what the manifest says of it: of ours also val_bytes, the UTF-8 bytes of
    the validation text as its tokenizer normalises it, val_order0_bits_per_byte, what a coder of single byte
    frequencies needs for them, vocab_size, its tokenizer's pieces, and tokenizer_given, whether that was not trained
    on the text; a dataset of an earlier release lacks the last two."""

    name: str
    train: tuple[Shard, ...]
    val: tuple[Shard, ...]
    tokenizer: Path
    stats: dict[str, Any]


def open_dataset(root: Path, name: str) -> Dataset:
    """The dataset `name` of the data root, its shards checked. Raises DataError.

    A data root is laid out as the challenge's: manifest.json, datasets/<name>/<prefix>_{train,val}_<number>.bin, and
    each tokenizer where the manifest says. The validation split must be whole, since a score on part of it compares
    with nothing; of the training split any first few shards will do, as the challenge's own download has it.
    """
    manifest = read_manifest(root)
    entry = _entry(manifest["datasets"], name)
    folder = root / "datasets" / name
    if entry is None:
        listed = ", ".join(sorted(str(known.get("name")) for known in manifest["datasets"])) or "nothing"
        there = f", though {folder} is there" if folder.is_dir() else ""
        raise DataError(f"{root / 'manifest.json'} does not list it{there}; it lists {listed}")
    stats = stats_of(root, entry)
    train, val = _shards(folder, "train"), _shards(folder, "val")
    if len(val) != stats.get("files_val", len(val)):
        raise DataError(f"{folder} holds {len(val)} validation shards; manifest.json says {stats['files_val']}")
    return Dataset(name, train, val, _tokenizer(root, manifest, entry), stats)


def stats_of(root: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """What the data root's manifest says of a dataset beyond its name. Raises DataError where a count that is read is
    no count."""
    where, stats = f"{root / 'manifest.json'} gives dataset {entry.get('name')!r}", entry.get("stats", {})
    if not isinstance(stats, dict):
        raise DataError(f"{where} the stats {stats!r}; they must be an object")
    for key in {"files_train", "files_val", "val_bytes"} & stats.keys():
        if type(stats[key]) is not int or stats[key] < 0:  # a bool is an int to isinstance
            raise DataError(f"{where} the {key} {stats[key]!r}; it must be a whole number")
    return stats


def read_manifest(root: Path) -> dict[str, list[dict[str, Any]]]:
    """The data root's manifest: its lists of datasets and tokenizers. Raises DataError."""
    path = root / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing: build or fetch a dataset first, or name another data root") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {error}") from None
    lists = manifest if isinstance(manifest, dict) else {}
    for key in ("datasets", "tokenizers"):
        entries = lists.get(key)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{path} has no list of objects under {key!r}")
    return lists


def open_shard(path: Path) -> Shard:
    """The shard at `path`, its header and size checked. Raises DataError."""
    try:
        stat = path.stat()  # before it is read: a file that changes meanwhile is another shard next time
        with path.open("rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES), dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    size = stat.st_size
    if len(header) < HEADER_BYTES:
        raise DataError(f"{path} has {size} bytes; a shard's header alone has {HEADER_BYTES}")
    magic, version, tokens = (int(word) for word in header.view("<i4")[:3])
    if magic != MAGIC:
        raise DataError(f"{path} starts with {magic}; a token shard starts with {MAGIC}")
    if version != VERSION:
        raise DataError(f"{path} is a shard of version {version}; this code reads version {VERSION}")
    if tokens < 1 or size != HEADER_BYTES + 2 * tokens:
        right = f"{HEADER_BYTES + 2 * tokens} bytes" if tokens > 0 else "at least one token"
        raise DataError(f"{path} has {size} bytes and says {tokens} tokens; that needs {right}")
    return Shard(path, tokens, stat.st_ctime_ns)


def write_shard(path: Path, tokens: Sequence[int] | NDArray[np.integer[Any]]) -> Shard:
    """Write token ids as one shard. Raises DataError for ids that 16 bits do not hold, and writes nothing then."""
    ids = np.asarray(tokens)
    if not 1 <= len(ids) <= LARGEST_SHARD:
        raise DataError(f"{path} would hold {len(ids)} tokens; a shard holds 1 to {LARGEST_SHARD}")
    least, largest = int(ids.min()), int(ids.max())
    if least < 0 or largest > 0xFFFF:
        raise DataError(f"{path} would hold token {largest if least >= 0 else least}; ids run from 0 to 65535")
    header = np.zeros(HEADER_WORDS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(ids)
    path.write_bytes(header.tobytes() + ids.astype("<u2").tobytes())
    return Shard(path, len(ids), path.stat().st_ctime_ns)


class TokenStream:
    """The tokens of several shards, one after another, wrapping round at the end."""

    def __init__(self, shards: Sequence[Shard], vocab_size: int) -> None:
        self.shards = tuple(shards)
        self.vocab_size = vocab_size
        self._maps = [shard.mapped() for shard in self.shards]
        self._ends = list(accumulate(shard.tokens for shard in self.shards))
        self._checked = False

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, count: int) -> Tokens:
        """`count` consecutive tokens from position `start` of the endless stream, (count,). Raises DataError for an
        id that the vocabulary does not have."""
        tokens = np.empty(count, dtype=np.int64)
        filled, position = 0, start % len(self)
        while filled < count:
            index = bisect_right(self._ends, position)
            shard = self._maps[index]
            begin = position - (self._ends[index] - len(shard))
            piece = shard[begin : begin + count - filled]
            self._check(piece, index)
            tokens[filled : filled + len(piece)] = piece
            filled += len(piece)
            position = (position + len(piece)) % len(self)
        return tokens

    def check(self) -> None:
        """Raises DataError unless every id of every shard is in the vocabulary. Reads them all, the first time."""
        if not self._checked:
            for index, shard in enumerate(self._maps):
                self._check(shard, index)
            self._checked = True

    def _check(self, piece: NDArray[np.uint16], index: int) -> None:
        largest = int(piece.max())
        if largest >= self.vocab_size:
            path = self.shards[index].path
            raise DataError(f"{path} holds token {largest}; ids must be below the vocabulary's size, {self.vocab_size}")


@lru_cache(maxsize=4)  # both splits of two datasets
def open_stream(shards: tuple[Shard, ...], vocab_size: int) -> TokenStream:
    """The shards as one stream, which stays open and checked for whoever asks for it next."""
    return TokenStream(shards, vocab_size)


def shard_name(prefix: str, split: Split, number: int) -> str:
    """A shard's file name, as the challenge writes it."""
    return f"{prefix}_{split}_{number:06d}.bin"


def _shards(folder: Path, split: Split) -> tuple[Shard, ...]:
    """Every shard of a split in order. The pattern leaves out byte side-cars such as fineweb_val_bytes_000000.bin."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise DataError(f"{folder} cannot be read, though manifest.json lists it: {error.strerror}") from None
    named = {name: re.fullmatch(rf".+_{split}_(\d{{6}})\.bin", name) for name in names}
    numbers = {int(match[1]): name for name, match in named.items() if match}
    if not numbers:
        raise DataError(f"{folder} holds no {split} shard, a file named <prefix>_{split}_000000.bin")
    missing = sorted(set(range(max(numbers) + 1)) - set(numbers))
    if missing:
        raise DataError(f"{folder} misses {split} shard {missing[0]:06d}, though {max(numbers):06d} is there")
    return tuple(open_shard(folder / numbers[number]) for number in sorted(numbers))


def _tokenizer(root: Path, manifest: dict[str, list[dict[str, Any]]], entry: dict[str, Any]) -> Path:
    name = str(entry.get("tokenizer_name"))
    tokenizer = _entry(manifest["tokenizers"], name)
    if tokenizer is None or not tokenizer.get("model_path"):
        raise DataError(f"{root / 'manifest.json'} gives no model_path for the tokenizer {name!r}")
    path = root / str(tokenizer["model_path"])
    if not path.is_file():
        raise DataError(f"{path} is missing: it is the tokenizer of dataset {entry['name']!r}")
    return path


def _entry(entries: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    return next((entry for entry in entries if entry.get("name") == name), None)
