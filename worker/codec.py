"""The codecs an artifact may be written with. Bit-exact, and without dependence on the clock or the machine."""

import lzma
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import brotli
import numpy as np
import zstandard
from constriction import stream
from numpy.typing import NDArray

from worker.packing import LEVELS

Group = NDArray[np.uint8]  # (values,): bytes that are alike, such as the symbols of one matrix

_SEAL = np.array([0xCADD1E00], np.uint32)  # what ans starts from and must come back to: an empty coder decodes for ever


class Codec(Protocol):
    """One codec. `expand` is given the sizes that must come out; it makes at most that much, and raises ValueError for
    less, for more, and for bytes that the codec never wrote."""

    def compress(self, groups: Sequence[Group], level: int) -> bytes: ...

    def expand(self, data: bytes, sizes: Sequence[int]) -> list[Group]: ...


def codec(name: str) -> Codec:
    """The codec of this name. Raises ValueError."""
    if name not in _CODECS:
        raise ValueError(f"codec is {name!r}: must be one of {', '.join(sorted(_CODECS))}")
    return _CODECS[name]


def compress(groups: Sequence[Group], name: str, level: int) -> tuple[str, bytes]:
    """The codec used and what it makes of the groups; auto takes the smallest of all codecs at their best levels."""
    if name != "auto":
        return name, codec(name).compress(groups, level)
    tried = {each: codec(each).compress(groups, LEVELS[each][2] if each in LEVELS else 0) for each in sorted(_CODECS)}
    smallest = min(tried, key=lambda each: len(tried[each]))
    return smallest, tried[smallest]


def entropy_bits(counts: NDArray[Any]) -> float:
    """What an ideal code by these counts spends on the values counted, together."""
    used = counts[counts > 0].astype(np.float64)
    return float(used.sum() * np.log2(used.sum()) - (used * np.log2(used)).sum()) if used.size else 0.0


@dataclass(frozen=True)
class _ByteCodec:
    """A byte compressor: the groups are one string to it."""

    compress_bytes: Callable[[bytes, int], bytes]
    expand_bytes: Callable[[bytes, int], bytes]

    def compress(self, groups: Sequence[Group], level: int) -> bytes:
        return self.compress_bytes(b"".join(group.tobytes() for group in groups), level)

    def expand(self, data: bytes, sizes: Sequence[int]) -> list[Group]:
        size = sum(sizes)
        expanded = self.expand_bytes(data, size)
        if len(expanded) != size:
            raise ValueError(f"expands to {len(expanded)} bytes; {size} are needed")
        return _split(np.frombuffer(expanded, np.uint8), sizes)


class _AnsCodec:
    """Asymmetric numeral systems (Duda, 2013) over tables of frequencies: within 0.2% of the groups' own entropy.

    Neighbouring groups share a table where one more would cost more than it saves; such groups are a run. The data are
    the runs, each as how many groups it has, its first and last symbol and a byte of frequency for every symbol from
    first to last, then the coder's words. A run whose first symbol is above its last has all 256 alike, and no table.
    """

    def compress(self, groups: Sequence[Group], level: int) -> bytes:
        filled = [group for group in groups if group.size]
        runs = _runs([np.bincount(group, minlength=256) for group in filled])
        coder, start = stream.stack.AnsCoder(_SEAL), len(filled)
        for run in reversed(runs):  # the coder is a stack: what is read first is written last
            symbols = np.concatenate(filled[start - run.groups : start])
            coder.encode_reverse(symbols.astype(np.int32) - run.first, run.model())
            start -= run.groups
        words: bytes = coder.get_compressed().astype("<u4").tobytes()
        return b"".join(run.encoded() for run in runs) + words

    def expand(self, data: bytes, sizes: Sequence[int]) -> list[Group]:
        filled = [size for size in sizes if size]
        runs, at = _read_runs(data, len(filled))
        if (len(data) - at) % 4:
            raise ValueError("not whole words of the ans codec")
        coder = stream.stack.AnsCoder(np.frombuffer(data, "<u4", offset=at).astype(np.uint32))
        expanded, start = np.zeros(sum(sizes), np.uint8), 0
        for run, groups in zip(runs, _split(filled, [run.groups for run in runs]), strict=True):
            size = sum(groups)
            expanded[start : start + size] = coder.decode(run.model(), size) + run.first
            start += size
        if not np.array_equal(coder.get_compressed(), _SEAL):
            raise ValueError(f"not {sum(sizes)} symbols of the ans codec, whole and undamaged")
        return _split(expanded, sizes)


@dataclass(frozen=True)
class _Run:
    """Groups that share a table. Its values are square roots of frequencies, the steps that lose least entropy."""

    groups: int
    first: int
    table: Group  # (last - first + 1,), 255 the most frequent; empty where all 256 symbols are alike

    def model(self) -> Any:
        frequencies = self.table.astype(np.float64) ** 2 if self.table.size else np.ones(256)
        padded = np.append(frequencies, 0.0)  # two symbols are the fewest it takes
        return stream.model.Categorical(padded, perfect=False)

    def encoded(self) -> bytes:
        span = (self.first, self.first + self.table.size - 1) if self.table.size else (1, 0)
        return bytes((self.groups, *span)) + self.table.tobytes()


def _runs(counts: Sequence[NDArray[Any]]) -> list[_Run]:
    """Neighbours joined, in order, wherever that saves bits."""
    joined: list[tuple[int, NDArray[Any]]] = []
    for count in counts:
        if joined and joined[-1][0] < 255:
            groups, before = joined[-1]
            if _bits(before + count) <= _bits(before) + _bits(count):
                joined[-1] = groups + 1, before + count
                continue
        joined.append((1, count))
    return [_run(groups, count) for groups, count in joined]


def _run(groups: int, count: NDArray[Any]) -> _Run:
    used = np.flatnonzero(count)
    first, last = int(used[0]), int(used[-1])
    if entropy_bits(count) + 8 * (last - first + 1) >= 8 * count.sum():
        return _Run(groups, 0, np.empty(0, np.uint8))
    shares = count[first : last + 1] / count.max()
    table = np.maximum(np.round(255 * np.sqrt(shares)), shares > 0)  # every symbol in use keeps a frequency
    return _Run(groups, first, table.astype(np.uint8))


def _bits(count: NDArray[Any]) -> float:
    """What a run of these counts costs, its table included."""
    used = np.flatnonzero(count)
    own_table = entropy_bits(count) + 8 * (int(used[-1]) - int(used[0]) + 1)
    return 24 + min(own_table, 8.0 * float(count.sum()))


def _read_runs(data: bytes, groups: int) -> tuple[list[_Run], int]:
    """The runs that make up so many groups, and where the coder's words start."""
    runs: list[_Run] = []
    at = 0
    while groups:
        header = data[at : at + 3]
        size = max(header[2] - header[1] + 1, 0) if len(header) == 3 else 0
        table = np.frombuffer(data[at + 3 : at + 3 + size], np.uint8)
        if len(header) < 3 or len(table) < size or not 1 <= header[0] <= groups or (size and not table.any()):
            raise ValueError(f"the ans codec has no table for its last {groups} groups")
        runs.append(_Run(header[0], header[1] if size else 0, table))
        groups -= header[0]
        at += 3 + size
    return runs, at


def _split(values: Any, sizes: Sequence[int]) -> list[Any]:
    """Values cut into consecutive parts of these sizes, which add up to all of them."""
    return [values[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]


def _zstd_compress(data: bytes, level: int) -> bytes:
    # The size is known to the reader and the digest guards the content: neither is paid for again in the frame.
    return zstandard.ZstdCompressor(level=level, write_content_size=False, write_checksum=False).compress(data)


def _zstd_expand(data: bytes, size: int) -> bytes:
    try:
        if zstandard.frame_content_size(data) not in (-1, size):  # -1: the frame does not say, as ours never do
            raise ValueError(f"a zstd frame of another size than the {size} bytes that are needed")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=max(size, 1), allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"not a zstd frame of {size} bytes: {error}") from None


def _zlib_expand(data: bytes, size: int) -> bytes:
    decompressor = zlib.decompressobj()
    try:
        expanded = decompressor.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"not a zlib stream: {error}") from None
    if decompressor.unconsumed_tail or decompressor.unused_data or not decompressor.eof:
        raise ValueError(f"not a zlib stream of {size} bytes")
    return expanded


def _brotli_compress(data: bytes, level: int) -> bytes:
    compressed: bytes = brotli.compress(data, quality=level, lgwin=24)
    return compressed


def _brotli_expand(data: bytes, size: int) -> bytes:
    decompressor = brotli.Decompressor()
    try:
        expanded: bytes = decompressor.process(data, output_buffer_limit=size + 1)
    except brotli.error as error:
        raise ValueError(f"not a brotli stream: {error}") from None
    if not decompressor.is_finished():
        raise ValueError(f"not a brotli stream of {size} bytes")
    return expanded


def _lzma_filters(size: int, level: int) -> list[dict[str, int]]:
    """A bare LZMA2 stream: the reader knows what the container of an xz file would tell it."""
    dictionary = min(max(size, 1 << 12), 1 << 26)
    return [{"id": lzma.FILTER_LZMA2, "preset": level | lzma.PRESET_EXTREME, "dict_size": dictionary}]


def _lzma_compress(data: bytes, level: int) -> bytes:
    return lzma.compress(data, lzma.FORMAT_RAW, filters=_lzma_filters(len(data), level))


def _lzma_expand(data: bytes, size: int) -> bytes:
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_lzma_filters(size, 9))
    try:
        expanded = decompressor.decompress(data, size + 1)
    except lzma.LZMAError as error:
        raise ValueError(f"not an lzma stream: {error}") from None
    if not decompressor.eof or decompressor.unused_data:
        raise ValueError(f"not an lzma stream of {size} bytes")
    return expanded


_CODECS: dict[str, Codec] = {
    "ans": _AnsCodec(),
    "brotli": _ByteCodec(_brotli_compress, _brotli_expand),
    "lzma": _ByteCodec(_lzma_compress, _lzma_expand),
    "zlib": _ByteCodec(zlib.compress, _zlib_expand),
    "zstd": _ByteCodec(_zstd_compress, _zstd_expand),
}
