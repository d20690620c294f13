"""Guided proposals: what a trained model shows of its sharing, as points of the space that say what suggested them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from searches import NOW, ONE, as_trial, make_study, must

from orchestrator.gate import Gate
from orchestrator.guided import guided
from orchestrator.lifecycle import TrialState
from orchestrator.memory import Memory
from orchestrator.points import Domain
from orchestrator.proposer import Proposer
from orchestrator.study import NewTrial, Study, Suggestion, Trial
from worker.spec import TrialSpec, override, parse_spec

FREE: dict[str, Any] = {
    "sharing.tying": {"families": ["free"]},
    "sharing.lora.rank": {"choice": [0, 4]},
    "model.width": {"low": 48, "high": 192, "step": 6},
}
CLOSED = {"gammas": {"attention": [0.02] * 6, "mlp": [0.03] * 6}}


def trained(study: Study, changes: Mapping[str, Any], diagnostics: Mapping[str, Any]) -> Trial:
    """The base under these changes, finished as trial 0 of the study, and what it showed."""
    domain = Domain(study.definition.base, study.definition.space)
    spec = parse_spec(override(study.definition.base, changes))
    point = domain.point(spec)
    assert point is not None
    some = must(Proposer(make_study(study.definition.space, "random")).propose([], ONE))
    return as_trial(0, replace(some, spec=spec, params=point), TrialState.COMPLETE, 2.0, diagnostics)


def proposals(study: Study, history: list[Trial]) -> list[tuple[TrialSpec, Suggestion]]:
    memory = Memory(study, Domain(study.definition.base, study.definition.space))
    memory.learn(history)
    gate = Gate(memory, ONE)
    made = [(gate.spec(point), suggestion) for point, suggestion in guided(gate, memory.best(3), memory.followed)]
    return [(spec, suggestion) for spec, suggestion in made if spec is not None]


TIED = {"sharing.tying": [0, 1, 2, 0, 1, 2], "sharing.unique_blocks": 3, "model.width": 60}


def test_closed_gates_propose_the_same_spec_without_lora_and_with_the_bytes_spent_on_width() -> None:
    study = make_study(FREE, cap_bytes=250_000)
    ((spec, suggestion),) = proposals(study, [trained(study, TIED, CLOSED)])
    assert spec.sharing.lora.rank == 0
    assert spec.sharing.tying_map == (0, 1, 2, 0, 1, 2)
    assert spec.model.width > 60
    assert (suggestion.arm, suggestion.rule, suggestion.parent) == ("guided", "drop_lora", 0)
    assert suggestion.why is not None
    assert "attention 0.020 and mlp 0.030, from 0.119" in suggestion.why
    assert f"model.width {spec.model.width}" in suggestion.why


def test_one_closed_path_goes_alone_where_paths_are_in_the_space() -> None:
    space = {**FREE, "sharing.lora.paths": {"choice": [["attention", "mlp"], ["attention"], ["mlp"]]}}
    shown = {"gammas": {"attention": [0.02] * 6, "mlp": [0.3] * 6}}
    study = make_study(space, cap_bytes=250_000)
    ((spec, suggestion),) = proposals(study, [trained(study, TIED, shown)])
    assert spec.sharing.lora.paths == ("mlp",)
    assert suggestion.rule == "drop_lora_path"


def test_open_gates_propose_nothing() -> None:
    study = make_study(FREE)
    assert proposals(study, [trained(study, TIED, {"gammas": {"attention": [0.12] * 6, "mlp": [0.2] * 6}})]) == []


def test_neighbouring_layers_of_least_influence_share_a_block() -> None:
    study = make_study(FREE, cap_bytes=250_000)
    untied = {"sharing.tying": list(range(6)), "sharing.unique_blocks": 6, "model.width": 48}
    shown = {"block_influence": [0.3, 0.2, 0.04, 0.03, 0.1, 0.2]}
    ((spec, suggestion),) = proposals(study, [trained(study, untied, shown)])
    assert spec.sharing.tying_map == (0, 1, 2, 2, 3, 4)
    assert spec.model.width > 48
    assert suggestion.rule == "tie_least_influential"
    assert suggestion.why is not None and "layers 2 and 3 of trial 0" in suggestion.why and "0.070" in suggestion.why


@pytest.mark.parametrize(
    ("change", "passes", "rule"), [(0.1, 3, "loop_once_more"), (0.9, 1, "loop_once_less"), (0.5, 0, "")]
)
def test_loops_that_settle_run_once_more_and_those_that_do_not_once_less(change: float, passes: int, rule: str) -> None:
    space = {**FREE, "sharing.virtual_layers": {"choice": [4, 6, 8]}}
    study = make_study(space)
    looped = {"sharing.tying": [0, 1, 2, 1, 2, 3], "sharing.unique_blocks": 4, "model.width": 60}
    made = proposals(study, [trained(study, looped, {"contraction": {"changes": [0.6, change]}})])
    if not rule:
        assert made == []
        return
    ((spec, suggestion),) = made
    assert spec.sharing.tying_map == (0, *(1, 2) * passes, 3)
    assert suggestion.rule == rule


def test_what_is_no_point_of_the_space_is_not_proposed() -> None:
    space = {"sharing.lora.rank": {"choice": [2, 4]}, "model.width": {"choice": [60]}}
    study = make_study(space)
    shown = {**CLOSED, "block_influence": [0.1] * 6, "contraction": {"changes": [0.1]}}
    assert proposals(study, [trained(study, {"model.width": 60}, shown)]) == []


@pytest.mark.parametrize("shown", [
    {"gammas": {"q": ["x"]}}, {"gammas": {"q": [0.0] * 6}}, {"gammas": [1]}, {"gammas": {"mlp": 0.0}},
    {"gammas": {"attention": [0.02] * 5}}, {"gammas": {"attention": [0.02] * 5 + [None]}},
    {"gammas": {"attention": [0.02] * 5 + [float("-inf")]}}, {"gammas": {"attention": [-(10**400)] * 6}},
    {"contraction": [1]}, {"contraction": {"changes": ["a"]}}, {"contraction": {"changes": 0.1}},
    {"contraction": {"changes": [0.1, float("nan")]}}, {"contraction": None},
    {"block_influence": 5}, {"block_influence": [0.1] * 7}, {"block_influence": [0.1] * 5 + ["a"]},
    {"block_influence": [0.1] * 5 + [None]}, {"block_influence": {str(layer): 0.1 for layer in range(6)}},
])  # fmt: skip
def test_diagnostics_of_another_shape_suggest_nothing(shown: dict[str, Any]) -> None:
    study = make_study({**FREE, "sharing.virtual_layers": {"choice": [4, 6, 8]}})
    looped = {"sharing.tying": [0, 1, 2, 1, 2, 3], "sharing.unique_blocks": 4, "model.width": 60}
    assert proposals(study, [trained(study, looped, shown)]) == []


def test_bytes_are_spent_on_a_point_and_not_on_what_undoes_the_finding() -> None:
    def space(condition: str) -> dict[str, Any]:
        return {
            "sharing.tying": {"families": ["free"]}, "model.width": {"choice": [60, 120, 192]},
            "sharing.lora.rank": {"choice": [0, 4], "when": condition},
            "sharing.lora.gate_init": {"choice": [-2.0, -1.0], "when": "model.width > 100"},
        }  # fmt: skip

    ((kept, _),) = proposals(
        study := make_study(space("model.width < 200"), cap_bytes=500_000), [trained(study, TIED, CLOSED)]
    )
    assert kept.model.width > 60
    assert Domain(study.definition.base, study.definition.space).point(kept) is not None
    ((narrow, told),) = proposals(
        study := make_study(space("model.width < 100"), cap_bytes=500_000), [trained(study, TIED, CLOSED)]
    )
    assert (narrow.model.width, narrow.sharing.lora.rank) == (60, 0), "wider, it would have the rank of the base"
    assert told.why is not None and "freed" not in told.why


def test_a_rule_is_followed_once_for_each_trial() -> None:
    study = make_study(FREE, cap_bytes=250_000)
    parent = trained(study, TIED, CLOSED)
    ((spec, suggestion),) = proposals(study, [parent])
    new = NewTrial(spec, {}, "proposed", parent.prediction, "fits", suggestion=suggestion)
    follower = replace(as_trial(1, new), params=dict(parent.params))
    assert proposals(study, [parent, follower]) == []
    assert follower.created_at == NOW
