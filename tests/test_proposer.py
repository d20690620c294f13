"""Proposals: legal, new, reproducible, and honest about when there are none left."""

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import inf, prod
from typing import Any

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from searches import NOW, ONE, as_trial, make_study, must, search

from orchestrator.feasibility import judge, predict
from orchestrator.lifecycle import TrialState
from orchestrator.proposer import SAMPLES, UNIFORM_SAMPLES, Proposed, Proposer
from orchestrator.space import apply
from orchestrator.study import CAP_BYTES, NewTrial, Prediction, Study, Trial
from worker.recipes import load_recipe
from worker.spec import GangConfig, parse_spec

TWO = GangConfig(ranks=2)
SMALL: dict[str, Any] = {
    "sharing.lora.rank": {"choice": [0, 2]},
    "sharing.unique_blocks": {"low": 1, "high": 3},
    "sharing.tying": {"choice": ["cycle", "sequence", {"pattern": "tail", "after": 1}]},
}
WIDE: dict[str, Any] = {
    "sharing.lora.rank": {"low": 0, "high": 16},
    "sharing.unique_blocks": {"low": 1, "high": 8},
    "sharing.tying": {"choice": ["cycle", "sequence", "palindrome", [0, 1, 2, 2, 1, 0], [0, 0, 1, 1, 2, 2]]},
    "optimizer.matrix_lr": {"low": 0.005, "high": 0.2, "log": True},
    "schedule.warmdown_fraction": {"low": 0.1, "high": 0.8, "step": 0.1},
}


def submitted(number: int, study: Study, params: dict[str, Any], val_bpb: float, **changes: Any) -> Trial:
    """A finished explicit trial: the base under `params`, with other fields changed too."""
    paths = {name.replace("__", "."): value for name, value in changes.items()}
    spec = apply(study.definition.base, {**params, **paths})
    prediction = predict(spec)
    new = NewTrial(spec, params, "submitted", prediction, judge(prediction, study.definition, spec)[0])
    return as_trial(number, new, TrialState.COMPLETE, val_bpb)


def by_learning_rate(new: NewTrial) -> float:
    return 1 + abs(float(new.params["optimizer.matrix_lr"]) - 0.03) * 10


@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**31 - 1),
    sampler=st.sampled_from(["caddie", "tpe", "random"]),
    space=st.sampled_from([SMALL, WIDE]),
    states=st.lists(st.sampled_from(list(TrialState)), min_size=15, max_size=15),
)
def test_every_proposal_is_legal_new_and_reproducible(
    seed: int, sampler: str, space: dict[str, Any], states: list[TrialState]
) -> None:
    study, noise = make_study(space, sampler, seed), random.Random(seed)
    proposer, history = Proposer(study), list[Trial]()
    for number, state in enumerate(states):
        gang = (ONE, TWO)[number % 2]
        proposed = proposer.propose(history, gang)
        assert proposed == Proposer(study).propose(history, gang), "what a proposer keeps is only a cache"
        if proposed.trial is None:
            assert space is SMALL
            break
        new = proposed.trial
        assert proposed.reason is None
        assert new.spec == parse_spec(new.spec.model_dump(mode="json"))
        assert new.spec == apply({**study.definition.base, "gang": gang.model_dump()}, new.params)
        assert set(new.params) == set(space)
        assert all(study.definition.space[path].contains(value) for path, value in new.params.items())
        assert new.spec.canonical_hash not in {trial.spec_hash for trial in history}
        assert new.verdict != "cannot_fit"
        scored = state in (TrialState.COMPLETE, TrialState.PRUNED)
        history.append(as_trial(number, new, state, noise.random() if scored else None))
        changed = noise.randrange(len(history))  # open trials move on while others are proposed
        if history[changed].state is TrialState.QUEUED:
            history[changed] = replace(history[changed], state=TrialState.RUNNING, started_at=NOW)


NUMBERS = st.one_of(
    st.integers(0, 100), st.integers(0, 10**31), st.floats(0, 1), st.floats(0, allow_infinity=False),
    st.sampled_from([0.01, 0.02, 0.25, 1e-9, 5e-324, 10**12]),
)  # fmt: skip
RANGES = st.builds(
    lambda ends, step, log: {"low": min(ends), "high": max(ends), "step": None if log else step, "log": log},
    st.tuples(NUMBERS, NUMBERS), st.none() | NUMBERS, st.booleans(),
)  # fmt: skip
WHOLE = ("budget.steps", "budget.tokens", "sharing.lora.rank", "quantisation.half_below", "model.bigram_width")
REAL = ("optimizer.matrix_lr", "optimizer.gradient_clip", "optimizer.adam_epsilon", "sharing.lora.penalty")


@settings(max_examples=40, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    space=st.dictionaries(st.sampled_from(WHOLE + REAL), RANGES, max_size=4),
    sampler=st.sampled_from(["tpe", "random"]),
    seed=st.integers(0, 9),
)
def test_every_space_that_a_study_accepts_can_be_searched(space: dict[str, Any], sampler: str, seed: int) -> None:
    try:
        study = make_study(space, sampler, seed, cap_bytes=10**18)
    except ValidationError:
        reject()
    proposer, history = Proposer(study), list[Trial]()
    while len(history) < 12 and (proposed := proposer.propose(history, ONE)).trial is not None:
        params = proposed.trial.params
        assert all(study.definition.space[path].contains(value) for path, value in params.items())
        history.append(as_trial(len(history), proposed.trial, TrialState.COMPLETE, 2.0 + len(history)))


def test_a_space_of_more_points_than_a_float_can_count_is_searched_where_it_is_continuous_too() -> None:
    wide = [
        *REAL, "optimizer.embedding_lr", "optimizer.scalar_lr", "optimizer.muon_weight_decay", "model.rope_base",
        "optimizer.adam_weight_decay", "model.qk_gain", "model.logit_softcap", "model.embedding_init_std",
    ]  # fmt: skip
    unit = [
        "optimizer.muon_momentum", "optimizer.muon_momentum_start", "optimizer.adam_beta1", "optimizer.adam_beta2",
        "schedule.min_multiplier", "schedule.warmdown_fraction",
    ]  # fmt: skip
    whole = ["budget.steps", "budget.tokens", "quantisation.half_below", "evaluation.validation_tokens"]
    space: dict[str, Any] = {path: {"low": 2, "high": 10**12, "step": 0.01} for path in wide}
    space |= {path: {"low": 0, "high": 0.9, "step": 1e-15} for path in unit}
    space |= {path: {"low": 2, "high": 10**12} for path in whole}
    space["sharing.lora.gate_init"] = {"low": -9, "high": 9, "step": 1e-13}
    study = make_study({**space, "budget.seconds": {"low": 0.5, "high": 1.0}}, cap_bytes=10**18)
    counts = [parameter.count for parameter in study.definition.space.values()]
    assert prod(int(count) for count in counts if count != inf) > sys.float_info.max
    must(Proposer(study).propose([], ONE))


def test_another_study_seed_searches_elsewhere() -> None:
    first, second = (search(make_study(WIDE, seed=seed), 3, by_learning_rate) for seed in (0, 1))
    assert [trial.params for trial in first] != [trial.params for trial in second]


@pytest.mark.parametrize("sampler", ["caddie", "tpe", "random"])
def test_a_small_space_is_searched_to_its_last_point_and_then_said_to_be_exhausted(sampler: str) -> None:
    study = make_study(SMALL, sampler)
    proposer, history = Proposer(study), list[Trial]()
    while (proposed := proposer.propose(history, (ONE, TWO)[len(history) % 2])).trial is not None:
        history.append(as_trial(len(history), proposed.trial, TrialState.COMPLETE, 1.5))
    points = set()
    for rank in (0, 2):
        for blocks in (1, 2, 3):
            for tying in SMALL["sharing.tying"]["choice"]:
                params = {"sharing.lora.rank": rank, "sharing.unique_blocks": blocks, "sharing.tying": tying}
                if not (blocks == 1 and isinstance(tying, dict)):  # `after` must leave a block to tie
                    points.add(apply(study.definition.base, params).canonical_hash)
    alike = [apply({**study.definition.base, "gang": ONE.model_dump()}, trial.params) for trial in history]
    assert {spec.canonical_hash for spec in alike} == points
    assert len(history) == len(points)
    assert proposed.reason is not None
    assert "no point left" in proposed.reason
    assert "16 points" in proposed.reason  # canonical ones: of one block each pattern is the same map
    assert "2 not a valid spec" in proposed.reason


def test_a_space_whose_smallest_point_is_over_the_cap_says_so() -> None:
    proposed = Proposer(make_study(SMALL, cap_bytes=100_000)).propose([], ONE)
    assert proposed.trial is None
    assert proposed.reason is not None
    assert "certain not to fit the cap of 100,000 bytes" in proposed.reason


def test_a_continuous_space_where_nothing_fits_is_given_up_after_a_bounded_number_of_samples() -> None:
    proposed = Proposer(make_study(WIDE, cap_bytes=100_000)).propose([], ONE)
    assert proposed.trial is None
    assert 0 < proposed.refused < SAMPLES + UNIFORM_SAMPLES
    assert proposed.reason is not None
    assert f"{SAMPLES + UNIFORM_SAMPLES} samples" in proposed.reason
    assert f"{proposed.refused} certain not to fit" in proposed.reason  # and the rest are not valid specs


def test_asking_again_without_news_refuses_nothing_more() -> None:
    proposer = Proposer(make_study(SMALL, cap_bytes=100_000))
    first, again = proposer.propose([], ONE), proposer.propose([], ONE)
    assert first.refused > 0
    assert again == Proposed(None, 0, first.reason)


def test_a_refused_point_counts_once_and_one_that_was_tried_never() -> None:
    proposer = Proposer(make_study(SMALL, cap_bytes=100_000))
    assert 0 < proposer.propose([], ONE).refused <= 18  # points of the space
    assert proposer.propose([], TWO).refused == 0
    proposer, history = Proposer(make_study(SMALL)), list[Trial]()
    while (proposed := proposer.propose(history, ONE)).trial is not None:
        assert proposed.refused == 0
        history.append(as_trial(len(history), proposed.trial))
    assert proposed.refused == 0 and "tried already" in str(proposed.reason)


def test_what_cannot_fit_is_never_proposed_and_what_may_fit_is() -> None:
    space = {"model.width": {"low": 48, "high": 384, "step": 24}}
    cap = predict(apply(load_recipe("laptop"), {"model.width": 192})).artifact_bytes
    study = make_study(space, "random", cap_bytes=cap)
    proposer, history = Proposer(study), list[Trial]()
    while (proposed := proposer.propose(history, ONE)).trial is not None:
        history.append(as_trial(len(history), proposed.trial))
    widths = {trial.params["model.width"]: trial.verdict for trial in history}
    assert widths[192] == "grey"
    assert widths[48] == "fits"
    assert 384 not in widths
    assert all((trial.reason is None) == (trial.verdict == "fits") for trial in history)


def test_values_that_are_lists_or_objects_come_back_as_they_stand_in_the_space() -> None:
    tyings = [[0, 1, 2, 2, 1, 0], {"pattern": "tail", "after": 1}]
    space = {**WIDE, "sharing.tying": {"choice": tyings}, "sharing.unique_blocks": {"choice": [3]}}
    history = search(make_study(space, "random"), 10, by_learning_rate)
    assert all(tying in [trial.params["sharing.tying"] for trial in history] for tying in tyings)


def test_stepped_values_carry_no_rounding_errors() -> None:
    history = search(make_study(WIDE, "random"), 25, by_learning_rate)
    values = {trial.params["schedule.warmdown_fraction"] for trial in history}
    assert len(values) > 4
    assert values <= {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8}


def test_equal_points_under_other_names_are_one_point() -> None:
    space = {"sharing.lora.rank": {"choice": [0]}, "sharing.lora.penalty": {"choice": [0.1, 0.2, 0.3]}}
    proposer = Proposer(make_study(space))
    first = must(proposer.propose([], ONE))
    proposed = proposer.propose([as_trial(0, first)], ONE)
    assert proposed.trial is None
    assert proposed.reason is not None
    assert "3 tried already" in proposed.reason


def test_tpe_learns_where_scores_are_good() -> None:
    tpe, uniform = (search(make_study(WIDE, name, seed=3), 45, by_learning_rate) for name in ("tpe", "random"))

    def late(history: list[Trial]) -> float:
        return sum(trial.result.val_bpb for trial in history[-20:] if trial.result is not None) / 20

    assert late(tpe) < late(uniform) - 0.05


def proposals(study: Study, histories: Sequence[list[Trial]]) -> list[dict[str, Any]]:
    return [must(Proposer(study).propose(history, ONE)).params for history in histories]


def test_a_submitted_trial_teaches_exactly_when_it_is_a_point_of_the_space() -> None:
    study = make_study(WIDE)
    history, scores = search(study, 14, by_learning_rate), (0.5, 9.0)
    point = {
        "sharing.lora.rank": 3, "sharing.unique_blocks": 2, "sharing.tying": "cycle", "optimizer.matrix_lr": 0.0123,
        "schedule.warmdown_fraction": 0.3,
    }  # fmt: skip
    in_space = [[*history, submitted(14, study, point, score)] for score in scores]
    reseeded = [[*history, submitted(14, study, point, score, seed=5)] for score in scores]
    other_base = [[*history, submitted(14, study, point, score, data__batch_tokens=3072)] for score in scores]
    partly = {path: value for path, value in point.items() if path != "optimizer.matrix_lr"}
    other_value = [[*history, submitted(14, study, partly, score, optimizer__matrix_lr=0.9)] for score in scores]
    taught = [proposals(study, pair) for pair in (in_space, reseeded, other_base, other_value)]
    assert [first != second for first, second in taught] == [True, True, False, False]


def test_a_submitted_trial_is_not_proposed_again_though_its_params_are_not_in_the_space() -> None:
    space = {"sharing.unique_blocks": {"choice": [1, 2]}, "sharing.lora.rank": {"choice": [0]}}
    study = make_study(space)
    outside = submitted(0, study, {}, 1.5, sharing__unique_blocks=2, sharing__lora__rank=0, sharing__tying=[0, 1] * 3)
    assert must(Proposer(study).propose([outside], ONE)).params["sharing.unique_blocks"] == 1


def followed(study: Study, history: list[Trial], count: int) -> list[Trial]:
    """The next proposals while none of them has finished."""
    proposer, waiting = Proposer(study), list[Trial]()
    while len(waiting) < count:
        waiting.append(as_trial(len(history) + len(waiting), must(proposer.propose([*history, *waiting], ONE))))
    return waiting


def test_failed_and_cancelled_trials_teach_nothing_and_infeasible_ones_do() -> None:
    study = make_study(WIDE)
    history = search(study, 14, by_learning_rate)
    ended = [replace(trial, finished_at=NOW) for trial in followed(study, history, 8)]
    failed, cancelled, infeasible = proposals(
        study,
        [
            [*history, *(replace(trial, state=TrialState.FAILED) for trial in ended)],
            [*history, *(replace(trial, state=TrialState.CANCELLED) for trial in ended)],
            [*history, *(replace(trial, state=TrialState.INFEASIBLE, prediction=over(trial)) for trial in ended)],
        ],
    )
    assert failed == cancelled
    assert failed != infeasible


def over(trial: Trial) -> Prediction:
    return replace(trial.prediction, artifact_bytes=CAP_BYTES + 50_000)


def test_open_trials_repel_whether_queued_or_running() -> None:
    study = make_study(WIDE)
    history = search(study, 14, by_learning_rate)
    waiting = followed(study, history, 12)
    queued, running, failed = proposals(
        study,
        [
            [*history, *waiting],
            [*history, *(replace(trial, state=TrialState.RUNNING, started_at=NOW) for trial in waiting)],
            [*history, *(replace(trial, state=TrialState.FAILED, finished_at=NOW) for trial in waiting)],
        ],
    )
    assert queued == running
    assert queued != failed


def test_a_trial_over_the_cap_is_no_good_example() -> None:
    study = make_study(WIDE)
    history = search(study, 20, by_learning_rate)
    best = min(history, key=lambda trial: trial.result.val_bpb if trial.result else 9.0)
    assert best.result is not None
    heavier = replace(best, result=best.result.model_copy(update={"artifact_bytes": CAP_BYTES + 1}))
    changed = [heavier if trial is best else trial for trial in history]
    first, second = proposals(study, [history, changed])
    assert first != second


def test_a_history_that_does_not_continue_the_last_one_starts_afresh() -> None:
    study = make_study(WIDE)
    history = search(study, 16, by_learning_rate)
    proposer = Proposer(study)
    proposer.propose(history, ONE)
    assert proposer.propose(history[:12], ONE) == Proposer(study).propose(history[:12], ONE)
    assert proposer.propose(history, TWO) == Proposer(study).propose(history, TWO)
