"""Codecs: every one gives back every byte, refuses what it did not write, and ans comes within 0.2% of the entropy."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from worker.codec import Group, codec, compress, entropy_bits
from worker.packing import LEVELS

NAMES = ("ans", "brotli", "lzma", "zlib", "zstd")

values = st.one_of(st.integers(0, 255), st.integers(120, 136), st.just(128))
group_lists = st.lists(
    values.flatmap(lambda top: hnp.arrays(np.uint8, st.integers(0, 400), elements=st.integers(0, top))), max_size=6
)


def gaussian(count: int, deviation: float, seed: int = 0) -> Group:
    """Symbols of six bits as an artifact writes them."""
    normal = np.random.default_rng(seed).standard_normal(count)
    return (np.clip(np.round(deviation * normal), -31, 31) + 128).astype(np.uint8)


def entropy_bytes(groups: Sequence[Group]) -> float:
    return sum(entropy_bits(np.bincount(group)) for group in groups) / 8


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(groups=group_lists, level=st.integers(1, 9))
def test_every_codec_gives_back_every_byte(name: str, groups: list[Group], level: int) -> None:
    compressed = codec(name).compress(groups, level)
    expanded = codec(name).expand(compressed, [group.size for group in groups])
    assert [group.tolist() for group in expanded] == [group.tolist() for group in groups]
    assert codec(name).compress(groups, level) == compressed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", [-1, 1, -40, 1000])
@pytest.mark.parametrize("deviation", [0, 9])
def test_every_codec_refuses_other_sizes(name: str, change: int, deviation: int) -> None:
    groups = [gaussian(300, 0), gaussian(200, deviation)]
    with pytest.raises(ValueError, match=f"{name}|bytes"):
        codec(name).expand(codec(name).compress(groups, 5), [300, 200 + change])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-3], lambda data: data + b"x", lambda data: b"", lambda data: b"no" * 9, lambda data: data[4:]],
)
def test_every_codec_refuses_what_it_did_not_write(name: str, damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ValueError, match=name):
        codec(name).expand(damage(codec(name).compress([gaussian(300, 9)], 5)), [300])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255), cut=st.integers(0, 30))
def test_damage_that_no_digest_caught_ends_in_bytes_or_in_an_error(
    name: str, place: float, change: int, cut: int
) -> None:
    compressed = bytearray(codec(name).compress([gaussian(500, 9), gaussian(300, 2), gaussian(9, 0)], 5))
    compressed[int(place * len(compressed))] ^= change
    try:
        expanded = codec(name).expand(bytes(compressed[: len(compressed) - cut]), [500, 300, 9])
    except ValueError:
        return
    assert [group.size for group in expanded] == [500, 300, 9]


@pytest.mark.parametrize("deviation", [2.5, 9.0])
def test_ans_comes_within_two_thousandths_of_the_symbols_entropy(deviation: float) -> None:
    groups = [gaussian(200_000, deviation, seed) for seed in range(2)] + [gaussian(100_000, 2 * deviation)]
    size = len(codec("ans").compress(groups, 0))
    # A table takes a byte a symbol of its group's range, 128 at most here, whatever the group's length.
    assert entropy_bytes(groups) < size < 1.002 * entropy_bytes(groups)
    for name in ("lzma", "zlib", "zstd"):
        assert size < len(codec(name).compress(groups, 9)), name


def test_ans_stores_one_table_for_groups_that_are_alike_and_none_for_noise() -> None:
    alike = [gaussian(2_000, 9, seed) for seed in range(20)]
    whole = len(codec("ans").compress([np.concatenate(alike)], 0))
    assert len(codec("ans").compress(alike, 0)) - whole <= 4
    noise = np.random.default_rng(0).integers(0, 256, 4_000).astype(np.uint8)
    assert len(codec("ans").compress([noise], 0)) <= 4_000 + 3 + 4
    assert len(codec("ans").compress([gaussian(100_000, 0)], 0)) <= 8  # one symbol, over and over


def test_ans_keeps_symbols_that_occur_once_in_a_hundred_thousand() -> None:
    group = gaussian(100_000, 1)
    group[[7, 70_000]] = 0, 255
    (expanded,) = codec("ans").expand(codec("ans").compress([group], 0), [group.size])
    assert np.array_equal(expanded, group)


@pytest.mark.parametrize(
    ("group", "smallest"), [(gaussian(20_000, 9), "ans"), (np.tile(gaussian(50, 9), 400), "brotli")]
)
def test_auto_takes_the_smallest_and_names_it(group: Group, smallest: str) -> None:
    sizes = {name: len(codec(name).compress([group], LEVELS[name][2] if name in LEVELS else 0)) for name in NAMES}
    used, compressed = compress([group], "auto", 0)
    assert used == min(sizes, key=lambda name: sizes[name]) == smallest
    assert compressed == codec(used).compress([group], LEVELS[used][2] if used in LEVELS else 0)
    assert compress([group], "zlib", 6) == ("zlib", codec("zlib").compress([group], 6))


def test_an_unknown_codec_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="codec is 'lz4': must be one of ans, brotli, lzma, zlib, zstd"):
        codec("lz4")


def test_entropy_counts_the_bits_of_an_ideal_code() -> None:
    assert entropy_bits(np.array([4, 4, 0, 8])) == 24.0
    assert entropy_bits(np.array([0, 9])) == 0.0
    assert entropy_bits(np.zeros(3)) == 0.0
