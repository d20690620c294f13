"""Artifacts: bytes that give the same model back, and nothing at all where one bit is wrong."""

import hashlib
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.artifact import ArtifactError, Packed, load, pack
from worker.codec import codec
from worker.model import Model, initialise
from worker.quantize import dequantise_rows, quantise_rows
from worker.shape import ModelConfig
from worker.sharing import LoraConfig, SharingConfig, TyingConfig, tensor_inventory
from worker.spec import QuantisationConfig

SMALL = QuantisationConfig(half_below=600, level=3)


def make_model(seed: int = 5, **sharing: object) -> Model:
    config = ModelConfig(
        vocab_size=64, width=32, heads=4, kv_heads=2, bigram_buckets=40, bigram_width=16, smear_gate=True
    )
    defaults = {"virtual_layers": 6, "unique_blocks": 3, "lora": LoraConfig(rank=2), "scales": "layer"}
    model = Model(config, SharingConfig.model_validate(defaults | sharing))
    initialise(model, seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def packed() -> Packed:
    return pack(make_model(), SMALL)


@pytest.mark.parametrize("name", ["zstd", "zlib"])
@given(data=st.binary(min_size=1, max_size=2000), level=st.integers(1, 9))
def test_codecs_give_back_every_byte(name: str, data: bytes, level: int) -> None:
    compressed = codec(name).compress(data, level)
    assert codec(name).expand(compressed, len(data)) == data
    for wrong in (len(data) - 1, len(data) + 1):
        with pytest.raises(ValueError, match="bytes"):
            codec(name).expand(compressed, wrong)


@pytest.mark.parametrize("name", ["zstd", "zlib"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-3], lambda data: data + b"x", lambda data: b"", lambda data: b"no" * 9]
)
def test_codecs_refuse_what_they_did_not_write(name: str, damage) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=name):
        codec(name).expand(damage(codec(name).compress(bytes(range(200)), 5)), 200)


def test_an_unknown_codec_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="codec is 'lzma': must be one of zlib, zstd"):
        codec("lzma")


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("codec_name", ["zstd", "zlib"])
def test_a_loaded_model_holds_exactly_what_was_stored(bits: int, codec_name: str) -> None:
    model = make_model()
    loaded = load(pack(model, QuantisationConfig(bits=bits, codec=codec_name, level=5, half_below=600)).data)
    assert (loaded.config, loaded.sharing) == (model.config, model.sharing)
    state, restored = model.state_dict(), loaded.state_dict()
    quantised = 0
    for tensor in tensor_inventory(model.config, model.sharing):
        original, stored = state[tensor.name], restored[tensor.name]
        if len(tensor.shape) == 2 and tensor.elements > 600:
            quantised += 1
            expected = dequantise_rows(quantise_rows(original, bits))
        else:
            expected = original.half().float()
        assert torch.equal(stored, expected), tensor.name
        assert stored.dtype == torch.float32
    assert 3 < quantised < len(state)


def test_packing_is_repeatable_and_a_loaded_model_packs_to_the_same_bytes(packed: Packed) -> None:
    assert pack(make_model(), SMALL).data == packed.data
    assert pack(load(packed.data), SMALL).data == packed.data
    assert hashlib.sha256(packed.data).hexdigest() == packed.sha256


def test_tied_layers_are_stored_once_and_stay_one_tensor(packed: Packed) -> None:
    once = load(packed.data)
    assert len({id(block) for block in once.blocks}) == 3
    deeper = pack(make_model(virtual_layers=12, lora=LoraConfig(), scales="block"), SMALL)
    shallow = pack(make_model(virtual_layers=3, lora=LoraConfig(), scales="block"), SMALL)
    skips = 2 * 32 * (6 - 1)  # fp16 skip weights are all that nine more applications of the same blocks add
    for name, size in deeper.bytes_by_class.items():
        assert size - shallow.bytes_by_class[name] == (skips if name == "control" else 0)


def test_bytes_by_class_are_the_bytes_before_compression(packed: Packed) -> None:
    model = make_model()
    expected: dict[str, int] = {}
    for tensor in tensor_inventory(model.config, model.sharing):
        quantised = len(tensor.shape) == 2 and tensor.elements > 600
        size = tensor.elements + 2 * tensor.shape[0] if quantised else 2 * tensor.elements
        expected[tensor.tensor_class.value] = expected.get(tensor.tensor_class.value, 0) + size
    assert packed.bytes_by_class == expected


@settings(max_examples=150)
@given(place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_one_changed_byte_anywhere_is_refused(packed: Packed, place: float, change: int) -> None:
    data = bytearray(packed.data)
    data[int(place * len(data))] ^= change
    with pytest.raises(ArtifactError):
        load(bytes(data))


@settings(max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True))
def test_a_truncated_artifact_is_refused(packed: Packed, place: float) -> None:
    with pytest.raises(ArtifactError, match=r"damaged or cut short|has at least"):
        load(packed.data[: int(place * len(packed.data))])


def resealed(data: bytes, header: object | None = None, payload: bytes | None = None, version: int = 1) -> bytes:
    """An artifact with another header, payload or version and a digest that fits."""
    length = struct.unpack_from("<I", data, 12)[0]
    kept_header, kept_payload = data[16 : 16 + length], data[16 + length : -32]
    encoded = kept_header if header is None else json.dumps(header).encode()
    body = (
        data[:8] + struct.pack("<II", version, len(encoded)) + encoded + (kept_payload if payload is None else payload)
    )
    return body + hashlib.sha256(body).digest()


def header_of(data: bytes) -> dict[str, object]:
    return dict(json.loads(data[16 : 16 + struct.unpack_from("<I", data, 12)[0]]))


def test_a_newer_version_is_refused_by_its_number(packed: Packed) -> None:
    with pytest.raises(ArtifactError, match="format version 2; this code reads version 1"):
        load(resealed(packed.data, version=2))


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"width": 33}},
        {"model": None},
        {"sharing": {"unique_blocks": 9, "virtual_layers": 2}},
        {"bits": 3},
        {"codec": 7},
        {"extra": 1},
    ],
)
def test_a_header_that_says_no_model_is_refused(packed: Packed, change: dict[str, object]) -> None:
    with pytest.raises(ArtifactError, match="header cannot be read"):
        load(resealed(packed.data, header=header_of(packed.data) | change))


@pytest.mark.parametrize("header", [[], 3, "x", {}])
def test_a_header_that_is_no_object_is_refused(packed: Packed, header: object) -> None:
    with pytest.raises(ArtifactError, match="header cannot be read"):
        load(resealed(packed.data, header=header))


def test_a_codec_that_is_not_known_is_refused(packed: Packed) -> None:
    with pytest.raises(ArtifactError, match="codec is 'lzma': must be one of zlib, zstd"):
        load(resealed(packed.data, header=header_of(packed.data) | {"codec": "lzma"}))


def test_a_payload_of_another_size_is_refused(packed: Packed) -> None:
    with pytest.raises(ArtifactError, match="payload cannot be read"):
        load(resealed(packed.data, payload=codec("zstd").compress(b"too short", 3)))
    wider = SharingConfig(
        virtual_layers=6, unique_blocks=4, tying=TyingConfig(pattern="explicit", map=(0, 1, 2, 3, 0, 1))
    )
    with pytest.raises(ArtifactError, match="payload cannot be read"):
        load(resealed(packed.data, header=header_of(packed.data) | {"sharing": wider.model_dump(mode="json")}))


@pytest.mark.parametrize(
    ("name", "value"), [("mlp_scales", 1e6), ("blocks.1.mlp.up", float("nan")), ("embedding.weight", 1e9)]
)
def test_weights_that_cannot_be_stored_are_refused_by_name(name: str, value: float) -> None:
    model = make_model()
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = value
    with pytest.raises(ValueError, match=rf"^tensor {name} holds"):
        pack(model, SMALL)
