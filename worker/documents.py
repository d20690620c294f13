"""The text that datasets are made of: documents from a file or from this Python's own library, split, and measured."""

import hashlib
import json
import math
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

from worker.shards import DataError
from worker.tokenizer import SPACE

_DEMO_SKIPS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
    | {"pydoc_data", "encodings", "__pycache__"}  # topics are documents of their own; encodings are tables of numbers
)


def read_documents(path: Path) -> list[str]:
    """The documents of a text file in UTF-8: of JSON lines the `text` of each line's object, of any other each line.
    Space at their ends is dropped, and so are documents of nothing else. Raises DataError, naming the line."""
    documents, number = [], 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text and path.suffix in (".jsonl", ".ndjson", ".json"):
                    text = json.loads(text)["text"].strip()
                    text.encode()  # JSON can name halves of a character, which no UTF-8 has
                if text:
                    documents.append(text)
    except OSError as error:
        raise DataError(f"text {path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise DataError(f"text {path}, line {number} is no UTF-8: {error.reason}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DataError(f'text {path}, line {number} must be a JSON object such as {{"text": "…"}}') from None
    if not documents:
        raise DataError(f"text {path} holds no document")
    return documents


def demo_documents() -> list[str]:
    """The standard library's help topics and module sources, in an order that depends on the Python version alone."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = [topics[name] for name in sorted(topics)]
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
        parts = path.relative_to(library).parts
        if _DEMO_SKIPS.isdisjoint(parts) and not path.name.startswith("_sysconfigdata"):
            sources.append(_text(path.read_bytes()))
    return [text for text in sources if text and SPACE not in text]


def split_documents(documents: Sequence[str], validation_share: float) -> tuple[list[str], list[str]]:
    """(validation, training) documents. Shuffled by their own digests, so that the order given does not matter; the
    first of them, up to the share of bytes, are validation. Equal ones stay together."""
    shuffled = sorted(documents, key=_digest)
    wanted = validation_share * size_of(shuffled)
    taken, held = 0, 0.0
    while taken < len(shuffled) and (held < wanted or shuffled[taken] == shuffled[taken - 1]):
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


def size_of(documents: Sequence[str]) -> int:
    """Bytes in UTF-8."""
    return sum(len(text.encode()) for text in documents)


def order0_bits_per_byte(documents: Sequence[str]) -> float:
    """The entropy of the documents' bytes, each coded by its frequency: what a model without context would score."""
    counts: Counter[int] = Counter()
    for text in documents:
        counts.update(text.encode())
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _text(data: bytes) -> str:
    """A source file as text: its first word at the start, since the metric counts no space in front of it; empty where
    it is not UTF-8."""
    try:
        return data.decode().replace("\r\n", "\n").lstrip()
    except UnicodeDecodeError:
        return ""
