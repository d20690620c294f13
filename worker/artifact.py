"""The artifact: a trained model as bytes, and back. Read without pickle; nothing is built from a damaged file.

    8 bytes   magic
    4 + 4     format version and header length, little-endian
    header    JSON: model, sharing, and how the payload was written
    payload   every tensor of worker.sharing.tensor_inventory once, compressed
    32 bytes  SHA-256 of everything before

The payload before compression: first the symbols of all quantised matrices, one a byte (packing six bits into bytes
costs more than it saves once a byte codec follows), grouped by tensor class, each matrix by its columns: rows are alike
once divided by their scales, columns are not (2% of a trained laptop recipe). Then all fp16 values, scales and tensors
kept in half precision, low bytes first, high bytes after. Names, shapes and order follow from the header's model and
sharing, so no table of tensors is paid for and none can contradict them.
"""

import hashlib
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from torch import Tensor

from worker.codec import codec
from worker.model import Model
from worker.quantize import Rows, dequantise_rows, largest_symbol, quantise_rows, to_half
from worker.shape import Frozen, ModelConfig
from worker.sharing import SharingConfig, TensorClass, TensorShape, tensor_inventory
from worker.spec import QuantisationConfig, problems_of

MAGIC = b"CADDIE\r\n"
VERSION = 1
_PREFIX = struct.Struct("<8sII")
_DIGEST_BYTES = 32


class ArtifactError(ValueError):
    """Bytes that are no artifact of this version, whole and undamaged. Nothing was loaded."""


@dataclass(frozen=True)
class Packed:
    """A model as an artifact. `bytes_by_class` counts stored bytes before compression, scales included."""

    data: bytes
    sha256: str
    bytes_by_class: dict[str, int]


def pack(model: Model, quantisation: QuantisationConfig) -> Packed:
    """The model as an artifact. Raises ValueError, naming the tensor, where a value cannot be stored."""
    inventory = tensor_inventory(model.config, model.sharing)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    assert set(state) == {tensor.name for tensor in inventory}, "the model is not what its config says"
    symbols: list[bytes] = []
    halves: list[Tensor] = []
    for tensor in _stored_order(inventory, quantisation.half_below):
        try:
            if is_quantised(tensor, quantisation.half_below):
                rows = quantise_rows(state[tensor.name], quantisation.bits)
                symbols.append(_symbol_bytes(rows, quantisation.bits))
                halves.append(rows.scales)
            else:
                halves.append(to_half(state[tensor.name]))
        except ValueError as error:
            raise ValueError(f"tensor {tensor.name} {error}") from None
    content = b"".join(symbols) + _shuffled(halves)
    payload = codec(quantisation.codec).compress(content, quantisation.level)
    header = _header_bytes(model, quantisation)
    body = _PREFIX.pack(MAGIC, VERSION, len(header)) + header + payload
    data = body + hashlib.sha256(body).digest()
    return Packed(data, hashlib.sha256(data).hexdigest(), _bytes_by_class(inventory, quantisation.half_below))


def load(data: bytes) -> Model:
    """The model that an artifact holds, on the CPU, each tied tensor once. Raises ArtifactError, building nothing."""
    header, payload = _opened(data)
    inventory = tensor_inventory(header.model, header.sharing)
    symbols = sum(tensor.elements for tensor in inventory if is_quantised(tensor, header.half_below))
    halves = sum(_half_values(tensor, header.half_below) for tensor in inventory)
    try:
        content = codec(header.codec).expand(payload, symbols + 2 * halves)
    except ValueError as error:
        raise ArtifactError(f"the artifact's payload cannot be read: {error}") from None
    model = Model(header.model, header.sharing)
    model.load_state_dict(_tensors(content, symbols, inventory, header))
    return model


def is_quantised(tensor: TensorShape, half_below: int) -> bool:
    """Whether a tensor is stored as small integers: matrices with more than `half_below` values are."""
    return len(tensor.shape) == 2 and tensor.elements > half_below


class _Header(Frozen):
    model: ModelConfig
    sharing: SharingConfig
    bits: int = Field(ge=4, le=8)
    half_below: int = Field(ge=0)
    codec: str


def _header_bytes(model: Model, quantisation: QuantisationConfig) -> bytes:
    header = _Header(
        model=model.config,
        sharing=model.sharing,
        bits=quantisation.bits,
        half_below=quantisation.half_below,
        codec=quantisation.codec,
    )
    return header.model_dump_json().encode()


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
        return _Header.model_validate_json(header)
    except ValidationError as error:
        problems = "; ".join(str(problem) for problem in problems_of(error))
        raise ArtifactError(f"the artifact's header cannot be read: {problems}") from None


def _stored_order(inventory: tuple[TensorShape, ...], half_below: int) -> list[TensorShape]:
    """Quantised matrices grouped by class, then the rest. Within a group tensors of one name lie together."""
    classes = list(TensorClass)

    def place(tensor: TensorShape) -> tuple[bool, int, str]:
        return not is_quantised(tensor, half_below), classes.index(tensor.tensor_class), _role(tensor.name)

    return sorted(inventory, key=place)


def _role(name: str) -> str:
    """A tensor's name without its block's number: blocks.3.mlp.up -> mlp.up."""
    return ".".join(name.split(".")[2:]) if name.startswith("blocks.") else name


def _half_values(tensor: TensorShape, half_below: int) -> int:
    return tensor.shape[0] if is_quantised(tensor, half_below) else tensor.elements


def _bytes_by_class(inventory: tuple[TensorShape, ...], half_below: int) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for tensor in inventory:
        symbols = tensor.elements if is_quantised(tensor, half_below) else 0
        stored = symbols + 2 * _half_values(tensor, half_below)
        sizes[tensor.tensor_class.value] = sizes.get(tensor.tensor_class.value, 0) + stored
    return sizes


def _symbol_bytes(rows: Rows, bits: int) -> bytes:
    return (rows.symbols.T.numpy() + largest_symbol(bits)).astype(np.uint8).tobytes()


def _shuffled(halves: list[Tensor]) -> bytes:
    """fp16 values as all their low bytes, then all their high bytes: the high ones, sign and exponent, repeat."""
    values = torch.cat([half.reshape(-1) for half in halves]).numpy().astype("<f2")
    return values.view(np.uint8).reshape(-1, 2).T.tobytes()


def _tensors(content: bytes, symbols: int, inventory: tuple[TensorShape, ...], header: _Header) -> dict[str, Tensor]:
    """The state dict: every tensor in fp32, cut from the payload in the order in which `pack` laid them down."""
    quantised = np.frombuffer(content, dtype=np.uint8, count=symbols)
    shuffled = np.frombuffer(content, dtype=np.uint8, offset=symbols)
    halves: NDArray[Any] = np.ascontiguousarray(shuffled.reshape(2, -1).T).view("<f2").reshape(-1)
    state: dict[str, Tensor] = {}
    symbol_at = half_at = 0
    for tensor in _stored_order(inventory, header.half_below):
        count = _half_values(tensor, header.half_below)
        values = torch.from_numpy(halves[half_at : half_at + count].astype(np.float16))
        half_at += count
        if is_quantised(tensor, header.half_below):
            raised = quantised[symbol_at : symbol_at + tensor.elements].astype(np.int16)
            signed = torch.from_numpy((raised - largest_symbol(header.bits)).astype(np.int8))
            symbol_at += tensor.elements
            state[tensor.name] = dequantise_rows(Rows(signed.view(tensor.shape[::-1]).T, values))
        else:
            state[tensor.name] = values.float().view(tensor.shape)
    return state
