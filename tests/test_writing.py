"""Writing: an artifact that does not hold what was scored is never handed on."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from worker.artifact import Content, content_of, load, pack, write
from worker.model import Model, initialise
from worker.packing import QuantisationConfig
from worker.shape import ModelConfig
from worker.sharing import SharingConfig
from worker.writing import Miswritten, begin, verify

SMALL = QuantisationConfig(half_below=600, level=3)


def make_model() -> Model:
    config = ModelConfig(vocab_size=64, width=32, heads=4, kv_heads=2)
    model = Model(config, SharingConfig(virtual_layers=4, unique_blocks=2, scales="layer"))
    initialise(model, 5)
    return model


@pytest.fixture(scope="module")
def content() -> Content:
    return content_of(make_model(), SMALL)


def changed(content: Content, group: int, bits: int) -> Content:
    """The content with some bits of a group's first byte turned over."""
    groups = [each.copy() for each in content.groups]
    groups[group][0] ^= bits
    return replace(content, groups=tuple(groups))


@pytest.mark.parametrize("codec", ["ans", "auto", "brotli", "lzma", "zlib", "zstd"])
def test_what_an_artifact_holds_is_known_before_it_is_written(content: Content, codec: str) -> None:
    quantisation = QuantisationConfig(half_below=600, codec=codec)
    written = begin(content, quantisation).result()
    assert written.packed == pack(make_model(), quantisation)
    assert written.seconds > 0
    state, restored = content.build().state_dict(), load(written.packed.data).state_dict()
    assert state.keys() == restored.keys() and all(torch.equal(state[name], restored[name]) for name in state)


def test_a_content_is_no_part_of_its_model() -> None:
    model = make_model()
    content = content_of(model, SMALL)
    before = [group.copy() for group in content.groups]
    built = content.build()
    with torch.no_grad():
        for parameter in [*model.parameters(), *built.parameters()]:
            parameter.fill_(3.0)
    assert all(np.array_equal(*pair) for pair in zip(content.groups, before, strict=True))


def test_one_wrong_symbol_is_found_and_its_tensor_named(content: Content) -> None:
    verify(write(content, SMALL).data, content)
    with pytest.raises(Miswritten, match=r"^tensor embedding\.weight, read back .* is not what was scored"):
        verify(write(changed(content, 0, 1), SMALL).data, content)


def test_a_sign_of_zero_is_a_difference() -> None:
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    content = content_of(model, SMALL)
    assert not content.groups[-1].any()
    with pytest.raises(Miswritten, match="is not what was scored"):
        verify(write(changed(content, -1, 0x80), SMALL).data, content)


def test_bytes_that_are_no_artifact_or_another_models_are_found(content: Content) -> None:
    data = write(content, SMALL).data
    with pytest.raises(Miswritten, match="cannot be read back: the artifact is damaged or cut short"):
        verify(data[:-1] + bytes([data[-1] ^ 1]), content)
    deeper = content.sharing.model_copy(update={"mixes": "layer"})
    with pytest.raises(Miswritten, match="tells of another model"):
        verify(data, replace(content, sharing=deeper))


def test_an_error_of_the_codec_comes_out_of_the_future(content: Content) -> None:
    unknown = SMALL.model_copy(update={"codec": "lz4"})
    with pytest.raises(ValueError, match="codec is 'lz4'"):
        begin(content, unknown).result()
