"""The byte codecs an artifact may be written with. Bit-exact, and without dependence on the clock or the machine."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import zstandard


@dataclass(frozen=True)
class Codec:
    """One codec. `expand` is given the size that must come out; it makes at most that much, and raises ValueError for
    less, for more, and for bytes that the codec never wrote."""

    compress: Callable[[bytes, int], bytes]
    expand: Callable[[bytes, int], bytes]


def codec(name: str) -> Codec:
    """The codec of this name. Raises ValueError."""
    if name not in _CODECS:
        raise ValueError(f"codec is {name!r}: must be one of {', '.join(sorted(_CODECS))}")
    return _CODECS[name]


def _zstd_compress(data: bytes, level: int) -> bytes:
    # The size is known to the reader and the digest guards the content: neither is paid for again in the frame.
    return zstandard.ZstdCompressor(level=level, write_content_size=False, write_checksum=False).compress(data)


def _zstd_expand(data: bytes, size: int) -> bytes:
    try:
        if zstandard.frame_content_size(data) not in (-1, size):  # -1: the frame does not say, as ours never do
            raise ValueError(f"a zstd frame of another size than the {size} bytes that are needed")
        expanded = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"not a zstd frame of {size} bytes: {error}") from None
    return _checked(expanded, size)


def _zlib_expand(data: bytes, size: int) -> bytes:
    decompressor = zlib.decompressobj()
    try:
        expanded = decompressor.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"not a zlib stream: {error}") from None
    if decompressor.unconsumed_tail or decompressor.unused_data or not decompressor.eof:
        raise ValueError(f"not a zlib stream of {size} bytes")
    return _checked(expanded, size)


def _checked(expanded: bytes, size: int) -> bytes:
    if len(expanded) != size:
        raise ValueError(f"expands to {len(expanded)} bytes; {size} are needed")
    return expanded


_CODECS = {
    "zstd": Codec(_zstd_compress, _zstd_expand),
    "zlib": Codec(zlib.compress, _zlib_expand),
}
