"""Tying maps by pattern, and the arithmetic of what sharing costs."""

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from worker.shape import ModelConfig
from worker.sharing import (
    LoraConfig,
    SharingConfig,
    TensorClass,
    TyingConfig,
    canonical_map,
    count_parameters,
    tensor_inventory,
)
from worker.spec import problems_of

MODEL = ModelConfig(vocab_size=64, width=32, heads=4, kv_heads=2)


def tied(layers: int, blocks: int, **tying: object) -> SharingConfig:
    return SharingConfig(virtual_layers=layers, unique_blocks=blocks, tying=TyingConfig.model_validate(tying))


@pytest.mark.parametrize(
    ("tying", "expected"),
    [
        ({"pattern": "cycle"}, "012012"),
        ({"pattern": "sequence"}, "001122"),
        ({"pattern": "palindrome"}, "012210"),
        ({"pattern": "loop", "start": 1, "end": 1, "passes": 4}, "011112"),
        ({"pattern": "loop", "start": 0, "end": 2, "passes": 2}, "012012"),
        ({"pattern": "tail"}, "012222"),
        ({"pattern": "tail", "after": 1}, "011112"),
        ({"pattern": "tail", "after": 2}, "000012"),
        ({"pattern": "explicit", "map": [2, 0, 1, 1, 0, 2]}, "012210"),
    ],
)
def test_a_pattern_gives_its_map(tying: dict[str, object], expected: str) -> None:
    assert "".join(map(str, tied(6, 3, **tying).tying_map)) == expected


def test_patterns_hold_where_layers_are_no_multiple_of_blocks() -> None:
    assert tied(7, 3, pattern="cycle").tying_map == (0, 1, 2, 0, 1, 2, 0)
    assert tied(7, 3, pattern="sequence").tying_map == (0, 0, 0, 1, 1, 2, 2)
    assert tied(8, 3, pattern="palindrome").tying_map == (0, 1, 2, 2, 1, 0, 0, 1)
    assert tied(6, 4, pattern="loop", start=1, end=2, passes=2).tying_map == (0, 1, 2, 1, 2, 3)


def test_a_bare_name_or_list_stands_for_the_whole_tying() -> None:
    assert SharingConfig.model_validate({"virtual_layers": 4, "unique_blocks": 2, "tying": "palindrome"}) == tied(
        4, 2, pattern="palindrome"
    )
    assert SharingConfig.model_validate({"virtual_layers": 4, "unique_blocks": 2, "tying": [0, 1, 1, 0]}) == tied(
        4, 2, pattern="explicit", map=[0, 1, 1, 0]
    )


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.data())
def test_every_map_uses_every_block_and_is_numbered_by_first_use(shape: tuple[int, int], data: st.DataObject) -> None:
    layers, blocks = shape
    sharing = tied(layers, blocks, pattern=data.draw(st.sampled_from(("cycle", "sequence", "palindrome", "tail"))))
    assert len(sharing.tying_map) == layers
    assert set(sharing.tying_map) == set(range(blocks))
    first_uses = [sharing.tying_map.index(block) for block in range(blocks)]
    assert first_uses == sorted(first_uses)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=10), st.permutations(range(10)))
def test_renaming_blocks_gives_the_same_canonical_map(blocks: list[int], names: list[int]) -> None:
    assert canonical_map(blocks) == canonical_map(names[block] for block in blocks)
    assert canonical_map(canonical_map(blocks)) == canonical_map(blocks)


@pytest.mark.parametrize(
    ("sharing", "field", "value", "says"),
    [
        ({"unique_blocks": 3, "tying": [0, 2, 2, 0]}, "tying.map", [0, 2, 2, 0], "skips block 1"),
        ({"unique_blocks": 2, "tying": [0, 1, 2, 0]}, "tying.map", [0, 1, 2, 0], "names block 2"),
        ({"unique_blocks": 2, "tying": [0, 1, 0]}, "tying.map", [0, 1, 0], "gives 3 layers; virtual_layers says 4"),
        ({"unique_blocks": 5}, "unique_blocks", 5, "at most virtual_layers, 4"),
        ({"tying": "palindrome", "lora": {"rank": -1}}, "lora.rank", -1, "greater"),
        ({"unique_blocks": 3, "tying": {"pattern": "loop", "start": 0, "end": 1}}, "tying.passes", None, "needs it"),
        ({"unique_blocks": 3, "tying": {"pattern": "cycle", "passes": 2}}, "tying.passes", 2, "does not take it"),
        (
            {"unique_blocks": 3, "tying": {"pattern": "loop", "start": 2, "end": 1, "passes": 2}},
            "tying.start", 2, "at most tying.end, 1",
        ),
        (
            {"unique_blocks": 3, "tying": {"pattern": "loop", "start": 0, "end": 3, "passes": 2}},
            "tying.end", 3, "below unique_blocks, 3",
        ),
        (
            {"unique_blocks": 3, "tying": {"pattern": "loop", "start": 0, "end": 2, "passes": 2}},
            "tying.pattern", "loop", "gives 6 layers; virtual_layers says 4",
        ),
        ({"unique_blocks": 2, "tying": {"pattern": "tail", "after": 2}}, "tying.after", 2, "below unique_blocks, 2"),
        ({"lora": {"rank": 2, "paths": []}}, "lora.paths", [], "attention, mlp or both"),
        ({"lora": {"paths": ["mlp", "mlp"]}}, "lora.paths", ["mlp", "mlp"], "each path once"),
    ],
)  # fmt: skip
def test_an_impossible_sharing_names_field_value_and_what_is_right(
    sharing: dict[str, object], field: str, value: object, says: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        SharingConfig.model_validate({"virtual_layers": 4, "unique_blocks": 2, **sharing})
    (problem,) = problems_of(refused.value)
    assert (problem.field, problem.value) == (field, value)
    assert says in problem.message


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_parameters_follow_the_published_formula_of_ebls(blocks: int, rank: int) -> None:
    layers, d, kv, h = 5, 32, 16, 64
    sharing = SharingConfig(
        virtual_layers=layers, unique_blocks=blocks, lora=LoraConfig(rank=rank), scales="layer", mixes="layer"
    )
    shared = blocks * (2 * d * d + 2 * kv * d + 2 * d * h + 4)
    owned = layers * (2 * d + 2 * d + (4 * d * rank + 2 if rank else 0))
    assert count_parameters(MODEL, sharing) == 64 * d + shared + owned + (layers // 2) * d


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.integers(0, 4))
def test_one_more_block_costs_what_its_own_tensors_hold(shape: tuple[int, int], rank: int) -> None:
    layers, blocks = shape
    sharing = SharingConfig(virtual_layers=layers + 1, unique_blocks=blocks, lora=LoraConfig(rank=rank))
    more = sharing.model_copy(update={"unique_blocks": blocks + 1})
    own = sum(t.elements for t in tensor_inventory(MODEL, sharing) if t.name.startswith("blocks.0."))
    assert count_parameters(MODEL, more) - count_parameters(MODEL, sharing) == own + 4 * MODEL.width


def test_the_inventory_names_each_tensor_once_with_its_class() -> None:
    sharing = SharingConfig(virtual_layers=4, unique_blocks=2, lora=LoraConfig(rank=2, paths=("mlp",)))
    model = MODEL.model_copy(update={"bigram_buckets": 10, "smear_gate": True})
    inventory = {tensor.name: tensor for tensor in tensor_inventory(model, sharing)}
    assert len(inventory) == len(tensor_inventory(model, sharing))
    assert all(tensor.elements == prod(tensor.shape) for tensor in inventory.values())
    assert inventory["lora.mlp.down"].shape == (4, 32, 2)
    assert "lora.attention.down" not in inventory
    assert {tensor.tensor_class for tensor in inventory.values()} == set(TensorClass)
