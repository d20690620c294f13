"""Tying maps by pattern, and the arithmetic of what sharing costs."""

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from worker.inventory import (
    TensorClass,
    TensorShape,
    count_parameters,
    is_quantised,
    require_compatible,
    tensor_inventory,
)
from worker.shape import ModelConfig
from worker.sharing import LoraConfig, SharingConfig
from worker.spec import problems_of
from worker.tying import TyingConfig, canonical_map

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
        ({"pattern": "loop", "start": 1, "end": 1, "passes": 4, "from_fraction": 0.35}, "011112"),
    ],
)
def test_a_pattern_gives_its_map(tying: dict[str, object], expected: str) -> None:
    assert "".join(map(str, tied(6, 3, **tying).tying_map)) == expected


def test_patterns_hold_where_layers_are_no_multiple_of_blocks() -> None:
    assert tied(7, 3, pattern="cycle").tying_map == (0, 1, 2, 0, 1, 2, 0)
    assert tied(7, 3, pattern="sequence").tying_map == (0, 0, 0, 1, 1, 2, 2)
    assert tied(8, 3, pattern="palindrome").tying_map == (0, 1, 2, 2, 1, 0, 0, 1)
    assert tied(6, 4, pattern="loop", start=1, end=2, passes=2).tying_map == (0, 1, 2, 1, 2, 3)
    assert tied(7, 2, pattern="split").tying_map == (0, 0, 0, 1, 1, 1, 1)


def test_before_its_fraction_a_late_tying_runs_the_first_layer_of_each_block() -> None:
    late = tied(8, 4, pattern="loop", start=1, end=2, passes=3, from_fraction=0.35)
    assert late.tying_map == (0, 1, 2, 1, 2, 1, 2, 3)
    assert late.layers_at(0.0) == late.layers_at(0.349) == (0, 1, 2, 7)
    assert late.layers_at(0.35) == late.layers_at(1.0) == tuple(range(8))
    assert tied(8, 4, pattern="cycle").layers_at(0.0) == tuple(range(8))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.floats(0, 1), st.floats(0, 1, exclude_max=True))
def test_at_any_time_the_layers_that_run_apply_every_block_in_order(
    blocks: list[int], fraction: float, late: float
) -> None:
    chosen = canonical_map(blocks)
    sharing = tied(len(chosen), max(chosen) + 1, pattern="explicit", map=chosen, from_fraction=late)
    running = sharing.layers_at(fraction)
    assert {chosen[layer] for layer in running} == set(chosen)
    assert list(running) == sorted(set(running))
    assert len(running) == (len(chosen) if fraction >= late else len(set(chosen)))


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
        ({"unique_blocks": 3, "tying": "split"}, "tying.pattern", "split", "skips block 2"),
        ({"unique_blocks": 1, "tying": "split"}, "tying.pattern", "split", "names block 1"),
        ({"unique_blocks": 2, "tying": [0, 1, -1, 0]}, "tying.map", [0, 1, -1, 0], "names block -1"),
        ({"tying": {"pattern": "cycle", "from_fraction": 1.0}}, "tying.from_fraction", 1.0, "less than 1"),
        (
            {"unique_blocks": 3, "tying": {"pattern": "loop", "start": 0, "end": 1, "passes": 10**9}},
            "tying.passes", 10**9, "less than or equal to 256",
        ),
        (
            {"repartition": {"mode": "fixed", "heads": False, "values": False}},
            "repartition.heads", False, "heads, values or both",
        ),
        ({"adapters": True, "scales": "layer"}, "adapters", True, "owned by blocks"),
        ({"adapters": True, "mixes": "layer"}, "adapters", True, "owned by blocks"),
        ({"adapters": True, "bounded_recurrence": 0.9}, "adapters", True, "bounded_recurrence does without"),
        ({"scales": "layer", "bounded_recurrence": 0.9}, "scales", "layer", "must be block"),
        ({"mixes": "layer", "bounded_recurrence": 0.9}, "mixes", "layer", "must be block"),
        ({"unused": ["skips", "skips"]}, "unused", ["skips", "skips"], "each group once"),
        ({"unused": ["block_scales"]}, "unused", ["block_scales"], "block_scales are in use"),
        ({"unused": ["layer_scales"], "scales": "layer"}, "unused", ["layer_scales"], "layer_scales are in use"),
        ({"unused": ["adapters"], "adapters": True}, "unused", ["adapters"], "adapters are in use"),
        (
            {"virtual_layers": 1, "unique_blocks": 1, "unused": ["skips"]},
            "unused", ["skips"], "one virtual layer has no skips",
        ),
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
    model = MODEL.model_copy(
        update={
            "bigram_buckets": 10, "smear_gate": True, "value_embedding_width": 6, "value_embedding_layers": (1, 2),
        }
    )  # fmt: skip
    inventory = {tensor.name: tensor for tensor in tensor_inventory(model, sharing)}
    assert len(inventory) == len(tensor_inventory(model, sharing))
    assert all(tensor.elements == prod(tensor.shape) for tensor in inventory.values())
    assert inventory["lora.mlp.down"].shape == (4, 32, 2)
    assert "lora.attention.down" not in inventory
    assert inventory["value_embedding.projection"].shape == (16, 6)
    assert {tensor.tensor_class for tensor in inventory.values()} == set(TensorClass)


@pytest.mark.parametrize(
    ("model", "sharing", "more"),
    [
        ({"activation": "swiglu"}, {}, 3 * (3 * 32 * 48 - 2 * 32 * 64)),
        ({"query_rank": 4}, {}, 3 * (2 * 4 * 32 - 32 * 32)),
        ({"attention_gate": True, "gate_inputs": 5}, {}, 3 * 4 * 5),
        ({"skip_gates": True}, {}, 2 * 32),
        ({"unet_skips": False}, {}, -2 * 32),
        ({"lanes_from": 2}, {"tying": "sequence"}, 3 * 6),
        ({"bigram_buckets": 8, "bigram_width": 6}, {}, 8 * 6 + 32 * 6),
        ({"bigram_buckets": 8, "bigram_width": 6, "bigram_hash": "xor"}, {}, 8 * 6 + 32 * 6 + 1),
        ({"smear_gate": True}, {}, 32),
        ({"smear_gate": True, "smear_place": "window", "gate_inputs": 5}, {}, 5 + 1),
        ({"value_embedding_width": 6, "value_embedding_layers": (1, 4)}, {}, 64 * 6 + 16 * 6 + 1 + 2),
        ({}, {"adapters": True}, 5 * (4 * 32 + 4)),
        ({}, {"repartition": {"mode": "fixed"}}, 0),
        ({}, {"repartition": {"mode": "blended"}}, 3 * (32 + 1)),
        ({}, {"repeat_embeddings": True}, 5 * 32),
        ({}, {"bounded_recurrence": 0.9}, 5 * 4 - 3 * 4 * 32),
        ({"unet_skips": False}, {"unused": ["skips"]}, 2 * 32),
        ({}, {"unused": ["layer_scales"]}, 5 * 4 * 32),
        ({}, {"unused": ["adapters"]}, 5 * (4 * 32 + 4)),
        ({}, {"adapters": True, "unused": ["layer_scales"]}, 5 * (4 * 32 + 4) + 5 * 4 * 32),
        ({}, {"scales": "layer", "mixes": "layer", "unused": ["block_scales"]}, 5 * 4 * 32),
    ],
)
def test_a_component_costs_what_its_source_counts(
    model: dict[str, object], sharing: dict[str, object], more: int
) -> None:
    plain = SharingConfig(virtual_layers=5, unique_blocks=3)
    with_it = SharingConfig.model_validate({"virtual_layers": 5, "unique_blocks": 3, **sharing})
    shape = ModelConfig.model_validate({**MODEL.model_dump(), **model})
    require_compatible(shape, with_it)
    assert count_parameters(shape, with_it) - count_parameters(MODEL, plain) == more


def test_only_large_matrices_that_are_no_control_are_quantised() -> None:
    shapes = (
        ((8, 9), TensorClass.MLP),
        ((8, 8), TensorClass.MLP),
        ((8, 9), TensorClass.CONTROL),
        ((72,), TensorClass.MLP),
    )
    assert [is_quantised(TensorShape("x", shape, name), 64) for shape, name in shapes] == [True, False, False, False]
    assert not is_quantised(TensorShape("lora.mlp.down", (2, 8, 9), TensorClass.LORA), 64)
