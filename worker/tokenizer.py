"""A SentencePiece tokenizer, and what each of its tokens costs in bytes of text. Torch-free."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from worker.shape import FieldError
from worker.shards import DataError, Dataset, Tokens, TokenStream

SPACE = "\u2581"  # how SentencePiece writes a space

_COUNTED_AT_ONCE = 2**20


@dataclass(frozen=True, eq=False)
class ByteTable:
    """Bytes of text behind each token id, as the challenge counts them. Three arrays over the vocabulary.

    A token costs `base` bytes, and one more for the space in front of a word (`leads`) unless the token before it is a
    `boundary`: a control, unknown or unused piece, such as the one that starts a document. Boundaries cost nothing.
    """

    base: NDArray[np.int64]
    leads: NDArray[np.bool_]
    boundary: NDArray[np.bool_]

    def cost(self, before: Tokens, tokens: Tokens) -> Tokens:
        """Bytes of each of `tokens`, given the token before each. Any one shape for all three."""
        costs: Tokens = self.base[tokens] + (self.leads[tokens] & ~self.boundary[before])
        return costs


def load_tokenizer(path: Path, vocab_size: int | None = None) -> Any:
    """The SentencePieceProcessor stored at `path`.

    Raises DataError where the file is none or could not count a lone space as one byte, and FieldError where it has
    not the `vocab_size` pieces that the model has.
    """
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path} is no SentencePiece model: {str(error).splitlines()[0]}") from None
    pieces = processor.get_piece_size()
    if vocab_size is not None and pieces != vocab_size:
        raise FieldError("model.vocab_size", vocab_size, f"must be {pieces}, the vocabulary of the tokenizer {path}")
    if processor.is_unknown(processor.piece_to_id(SPACE)):
        raise DataError(f"{path} has no piece for a lone space, so a space would count as three bytes")
    return processor


def byte_table(processor: Any) -> ByteTable:
    """The bytes of every piece of a SentencePieceProcessor. A space inside a piece is one byte too; the challenge's
    tokenizers have none."""
    size = processor.get_piece_size()
    base = np.zeros(size, dtype=np.int64)
    leads = np.zeros(size, dtype=np.bool_)
    boundary = np.ones(size, dtype=np.bool_)
    for token in range(size):
        if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            continue
        piece = processor.id_to_piece(token)
        boundary[token] = False
        leads[token] = piece.startswith(SPACE)
        text = piece.removeprefix(SPACE).replace(SPACE, " ")
        base[token] = 1 if processor.is_byte(token) else len(text.encode())
    return ByteTable(base, leads, boundary)


def require_its_own(dataset: Dataset, stream: TokenStream, table: ByteTable) -> None:
    """Raises DataError where the dataset's tokenizer did not make its tokens: where these count other bytes than the
    manifest has from whoever made them. Only datasets of ours say how many. Reads all of `stream`, the validation
    split, the first time."""
    said = dataset.stats.get("val_bytes")
    if said is not None and (counted := _text_bytes(stream, table)) != said:
        raise DataError(
            f"with the tokenizer {dataset.tokenizer} its validation tokens count {counted:,} bytes; manifest.json says "
            f"{said:,}: another tokenizer or other text made them"
        )


def open_table(path: Path, vocab_size: int | None = None) -> ByteTable:
    """The bytes of every piece of the tokenizer at `path`, which stay at hand. Raises as load_tokenizer does."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return _table(path, vocab_size, (stat.st_size, stat.st_ctime_ns))


@lru_cache(maxsize=2)
def _table(path: Path, vocab_size: int | None, found: tuple[int, int]) -> ByteTable:
    """`found`, the file's size and when it last changed, tells its contents apart."""
    return byte_table(load_tokenizer(path, vocab_size))


@lru_cache(maxsize=2)
def _text_bytes(stream: TokenStream, table: ByteTable) -> int:
    """What the stream's tokens cost after its first one, which starts a document."""
    total, last = 0, len(stream) - 1
    for start in range(0, last, _COUNTED_AT_ONCE):
        tokens = stream.read(start, min(_COUNTED_AT_ONCE, last - start) + 1)
        total += int(table.cost(tokens[:-1], tokens[1:]).sum())
    return total
