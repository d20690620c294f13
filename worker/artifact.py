"""The artifact: a trained model as bytes, and back. Read without pickle; nothing is built from a damaged file.

    8 bytes   magic
    4 + 4     format version and header length, little-endian
    header    JSON: model, sharing, and how the payload was written; fields at their defaults are left out
    payload   every tensor of worker.inventory.tensor_inventory once, compressed
    32 bytes  SHA-256 of everything before

The payload before compression: first the symbols of all quantised matrices, one a byte (packing six bits into bytes
costs more than it saves once a codec follows), sorted by tensor class, each matrix by its columns: rows are alike once
divided by their scales, columns are not (2% of a trained laptop recipe). Then all fp16 values, scales and tensors kept
in half precision, low bytes first, high bytes after. Each matrix is a group to the codec, and so are low and high
bytes. Names, shapes and order follow from the header's model and sharing, so no table of tensors is paid for and none
can contradict them.
"""

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from torch import Tensor

from worker.codec import Group, codec, compress, entropy_bits
from worker.inventory import TensorClass, TensorShape, is_quantised, require_compatible, tensor_inventory
from worker.model import Model
from worker.packing import QuantisationConfig
from worker.quantize import Rows, dequantise_rows, quantise, to_half
from worker.shape import FieldError, Frozen, ModelConfig
from worker.sharing import SharingConfig
from worker.spec import problems_of

MAGIC = b"CADDIE\r\n"
VERSION = 2  # counts up with the layout, and with any default of a header's field: what is left out must stay known
LARGEST_CONTENT = 1 << 28  # bytes before compression: what a header may ask the reader to make room for
_PREFIX = struct.Struct("<8sII")
_DIGEST_BYTES = 32
_ZERO = np.uint8(0x80)  # the byte of symbol 0: bytes rise with symbols


class ArtifactError(ValueError):
    """Bytes that are no artifact of this version, whole and undamaged. Nothing was loaded."""


@dataclass(frozen=True)
class Packed:
    """A model as an artifact."""

    data: bytes
    sha256: str
    codec: str
    """The codec used, where the spec may have said auto."""
    bytes_by_class: dict[str, int]
    """All of `data`: a payload is shared out by what an ideal code spends on each class's symbols, scales and halves;
    the rest, with the digest, is the header's."""


@dataclass(frozen=True)
class Content:
    """What an artifact holds: all there is to know of its model, rounded, on the host.

    A codec loses nothing, so what the content scores is what the artifact will, before there is one.
    """

    model: ModelConfig
    sharing: SharingConfig
    half_below: int
    groups: tuple[Group, ...]
    """The payload before compression, in the order that it is laid down."""

    def tensors(self) -> dict[str, Tensor]:
        """The model's state dict, every tensor in fp32."""
        halves: NDArray[Any] = np.stack(self.groups[-2:], axis=1).reshape(-1).view("<f2").astype(np.float16)
        symbols = iter(self.groups)
        state: dict[str, Tensor] = {}
        at = 0
        for tensor in _stored_order(self.model, self.sharing, self.half_below):
            count = _half_values(tensor, self.half_below)
            values = torch.from_numpy(halves[at : at + count])
            at += count
            if is_quantised(tensor, self.half_below):
                signed = torch.from_numpy((next(symbols) ^ _ZERO).view(np.int8))
                state[tensor.name] = dequantise_rows(Rows(signed.view(tensor.shape[::-1]).T, values))
            else:
                state[tensor.name] = values.float().view(tensor.shape)
        return state

    def build(self) -> Model:
        """A new model that holds it, on the CPU, each tied tensor once."""
        model = Model(self.model, self.sharing)
        model.load_state_dict(self.tensors())
        return model


def pack(model: Model, quantisation: QuantisationConfig, rows: Mapping[str, Rows] | None = None) -> Packed:
    """The model as an artifact: `content_of` it, written."""
    return write(content_of(model, quantisation, rows), quantisation)


def load(data: bytes) -> Model:
    """The model that an artifact holds, on the CPU, each tied tensor once. Raises ArtifactError, building nothing."""
    return read(data).build()


def content_of(model: Model, quantisation: QuantisationConfig, rows: Mapping[str, Rows] | None = None) -> Content:
    """What the model's artifact will hold, with `rows`, by tensor name, for what `quantise` would give.

    Raises ValueError, naming the tensor, where a value cannot be stored.
    """
    stored = _stored_order(model.config, model.sharing, quantisation.half_below)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    assert set(state) == {tensor.name for tensor in stored}, "the model is not what its config says"
    given = dict(rows or {})
    groups: list[Group] = []
    halves: list[Tensor] = []
    for tensor in stored:
        try:
            if is_quantised(tensor, quantisation.half_below):
                matrix = given.pop(tensor.name, None) or quantise(state[tensor.name], tensor.tensor_class, quantisation)
                groups.append(_symbol_bytes(matrix, tensor))
                halves.append(to_half(matrix.scales.cpu()))
            else:
                halves.append(to_half(state[tensor.name]))
        except ValueError as error:
            raise ValueError(f"tensor {tensor.name} {error}") from None
    assert not given, f"rows of tensors that are not quantised: {sorted(given)}"
    return Content(model.config, model.sharing, quantisation.half_below, (*groups, *_shuffled(halves)))


def write(content: Content, quantisation: QuantisationConfig) -> Packed:
    """The content as an artifact, by the quantisation's codec. Needs no device; codecs leave other threads running."""
    used, payload = compress(content.groups, quantisation.codec, quantisation.best_level)
    header = _header_bytes(content, used)
    body = _PREFIX.pack(MAGIC, VERSION, len(header)) + header + payload
    data = body + hashlib.sha256(body).digest()
    by_class = {**_bytes_by_class(content, len(payload)), "header": len(data) - len(payload)}
    return Packed(data, hashlib.sha256(data).hexdigest(), used, by_class)


def read(data: bytes) -> Content:
    """What an artifact holds. Raises ArtifactError."""
    header, payload = _opened(data)
    stored = _stored_order(header.model, header.sharing, header.half_below)
    symbols = [tensor.elements for tensor in stored if is_quantised(tensor, header.half_below)]
    halves = sum(_half_values(tensor, header.half_below) for tensor in stored)
    sizes = [*symbols, halves, halves]
    if sum(sizes) > LARGEST_CONTENT:
        raise ArtifactError(f"the artifact's header asks for {sum(sizes)} bytes of values; {LARGEST_CONTENT} are read")
    try:
        groups = codec(header.codec).expand(payload, sizes)
    except ValueError as error:
        raise ArtifactError(f"the artifact's payload cannot be read: {error}") from None
    return Content(header.model, header.sharing, header.half_below, tuple(groups))


class _Header(Frozen):
    model: ModelConfig
    sharing: SharingConfig
    codec: str
    half_below: int = Field(default=65_536, ge=0)


def _header_bytes(content: Content, used: str) -> bytes:
    header = _Header(model=content.model, sharing=content.sharing, codec=used, half_below=content.half_below)
    return header.model_dump_json(exclude_defaults=True).encode()


def _opened(data: bytes) -> tuple[_Header, bytes]:
    if len(data) < _PREFIX.size + _DIGEST_BYTES:
        raise ArtifactError(f"an artifact has at least {_PREFIX.size + _DIGEST_BYTES} bytes; this has {len(data)}")
    magic, version, length = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise ArtifactError(f"the bytes start with {magic!r}; an artifact starts with {MAGIC!r}")
    if version != VERSION:
        raise ArtifactError(f"the artifact has format version {version}; this code reads version {VERSION}")
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    found = hashlib.sha256(body).digest()
    if found != digest:
        raise ArtifactError(f"the artifact is damaged or cut short: SHA-256 {found.hex()}, not {digest.hex()}")
    return _parsed(body[_PREFIX.size : _PREFIX.size + length]), body[_PREFIX.size + length :]


def _parsed(header: bytes) -> _Header:
    try:
        parsed = _Header.model_validate_json(header)
        require_compatible(parsed.model, parsed.sharing)
    except ValidationError as error:
        # Without the values: of a header that is no JSON that would be all of it.
        problems = "; ".join(f"{problem.field}: {problem.message}" for problem in problems_of(error, whole="JSON"))
        raise ArtifactError(f"the artifact's header cannot be read: {problems}") from None
    except FieldError as error:
        raise ArtifactError(f"the artifact's header cannot be read: {error}") from None
    return parsed


def _stored_order(model: ModelConfig, sharing: SharingConfig, half_below: int) -> list[TensorShape]:
    """The inventory: quantised matrices by class, then the rest. Within a class tensors of one name lie together."""
    classes = list(TensorClass)

    def place(tensor: TensorShape) -> tuple[bool, int, str]:
        return not is_quantised(tensor, half_below), classes.index(tensor.tensor_class), _role(tensor.name)

    return sorted(tensor_inventory(model, sharing), key=place)


def _role(name: str) -> str:
    """A tensor's name without its block's number: blocks.3.mlp.up -> mlp.up."""
    return ".".join(name.split(".")[2:]) if name.startswith("blocks.") else name


def _half_values(tensor: TensorShape, half_below: int) -> int:
    return tensor.shape[0] if is_quantised(tensor, half_below) else tensor.elements


def _bytes_by_class(content: Content, payload_bytes: int) -> dict[str, int]:
    """The payload's bytes shared out over the classes, by an ideal code's bits for each group; they add up to all."""
    half_below, stored = content.half_below, _stored_order(content.model, content.sharing, content.half_below)
    bits = [entropy_bits(np.bincount(group)) for group in content.groups]
    half_bits = (bits[-2] + bits[-1]) / max(content.groups[-1].size, 1)
    symbol_bits = iter(bits)
    weights = {tensor.tensor_class.value: 0.0 for tensor in stored}
    for tensor in stored:
        own = next(symbol_bits) if is_quantised(tensor, half_below) else 0.0
        weights[tensor.tensor_class.value] += own + half_bits * _half_values(tensor, half_below)
    whole = sum(weights.values()) or 1.0
    ends = [round(payload_bytes * part / whole) for part in accumulate(weights.values())]
    ends[-1] = payload_bytes
    return {name: end - start for name, (start, end) in zip(weights, pairwise([0, *ends]), strict=True)}


def _symbol_bytes(rows: Rows, tensor: TensorShape) -> Group:
    assert tuple(rows.symbols.shape) == tensor.shape and rows.symbols.dtype == torch.int8, tensor.name
    return (np.ascontiguousarray(rows.symbols.cpu().numpy().T).view(np.uint8) ^ _ZERO).reshape(-1)


def _shuffled(halves: list[Tensor]) -> Sequence[Group]:
    """fp16 values as all their low bytes, and all their high bytes: the high ones, sign and exponent, repeat."""
    values = torch.cat([half.reshape(-1) for half in halves]).numpy().astype("<f2")
    return list(np.ascontiguousarray(values.view(np.uint8).reshape(-1, 2).T))
