"""Samplers by name over every kind of space: legal, canonical, new, and reproducible from the history alone."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from searches import ONE, as_trial, make_study, must, search

from orchestrator.lesson import front
from orchestrator.lifecycle import TrialState
from orchestrator.memory import BEST, LATEST, Memory
from orchestrator.points import Domain
from orchestrator.proposer import WALKED, Proposed, Proposer
from orchestrator.samplers import POPULATION
from orchestrator.sequences import Grid, Halton, shuffled
from orchestrator.shares import draw_arms, successes
from orchestrator.study import NewTrial, Study, Suggestion, Trial
from worker.recipes import load_recipe
from worker.spec import GangConfig, parse_spec

SAMPLERS = ("caddie", "tpe", "nsga2", "random", "qmc", "grid")
FAMILIES: dict[str, Any] = {
    "sharing.tying": {"families": ["cycle", "tail", "core", "free"]},
    "sharing.unique_blocks": {"low": 1, "high": 4},
    "sharing.lora.rank": {"choice": [0, 2, 4]},
    "sharing.lora.gate_init": {"choice": [-3.0, -1.0], "when": "sharing.lora.rank > 0"},
}
FILLED: dict[str, Any] = {
    "sharing.unique_blocks": {"low": 1, "high": 6},
    "sharing.lora.rank": {"choice": [0, 2, 4, 8]},
    "model.width": {"fill": {"low": 24, "high": 192, "step": 6}},
}
WIDTHS: dict[str, Any] = {
    "sharing.unique_blocks": {"low": 1, "high": 6},
    "sharing.lora.rank": {"choice": [0, 2, 4, 8]},
    "model.width": {"low": 48, "high": 192, "step": 6},
    "optimizer.matrix_lr": {"low": 0.01, "high": 0.1, "log": True},
}
CONDITIONAL: dict[str, Any] = {  # on a size that grows; and on four ranks some tokens make no whole batch
    "model.width": {"choice": [96, 192, 288]},
    "sharing.lora.rank": {"choice": [1, 2, 8], "when": "model.width < 200"},
    "sharing.lora.gate_init": {"choice": [-3.0, -1.0], "when": "model.width > 200"},
    "data.batch_tokens": {"choice": [768, 1024, 1536]},
    "sharing.unique_blocks": {"low": 2, "high": 4},
}
SHOWN = {
    "gammas": {"attention": [0.02] * 6, "mlp": [0.3] * 6}, "block_influence": [0.1] * 6,
    "contraction": {"changes": [0.1]},
}  # fmt: skip
STATES = [
    TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED, TrialState.RUNNING,
    TrialState.INFEASIBLE,
]  # fmt: skip
FOUR = GangConfig(ranks=4)


def by_size(new: NewTrial) -> float:
    return 3 - new.prediction.parameters / 1e6


@settings(max_examples=18, suppress_health_check=[HealthCheck.too_slow])
@given(
    sampler=st.sampled_from(SAMPLERS),
    space=st.sampled_from([FAMILIES, FILLED, CONDITIONAL]),
    seed=st.integers(0, 99),
    several=st.booleans(),
    states=st.lists(st.sampled_from(STATES), min_size=9, max_size=9),
    promoted=st.integers(5, 9),
)
def test_every_proposal_is_legal_canonical_new_and_follows_from_the_history(
    sampler: str, space: dict[str, Any], seed: int, several: bool, states: list[TrialState], promoted: int
) -> None:
    objectives = ("val_bpb", "artifact_bytes") if several else ("val_bpb",)
    study = make_study(space, sampler, seed, cap_bytes=300_000, objectives=objectives)
    domain, proposer, history = Domain(study.definition.base, study.definition.space), Proposer(study), list[Trial]()
    for number, state in enumerate(states):
        if number == promoted:
            history = [reopened(trial) if trial.state is TrialState.PRUNED else trial for trial in history]
        gang = (FOUR, ONE)[number % 2]
        proposed, anew = proposer.propose(history, gang), Proposer(study).propose(history, gang)
        assert (proposed.trial, proposed.reason) == (anew.trial, anew.reason), "what a proposer keeps is only a cache"
        new = must(proposed)
        assert new.spec == parse_spec(new.spec.model_dump(mode="json"))
        assert domain.canonical(new.params) == new.params
        assert domain.point(new.spec) == new.params
        assert new.spec.canonical_hash not in {trial.spec_hash for trial in history}
        assert new.verdict != "cannot_fit"
        assert new.suggestion is not None
        scored = state in (TrialState.COMPLETE, TrialState.PRUNED)
        history.append(as_trial(number, new, state, by_size(new) if scored else None, SHOWN))


def reopened(trial: Trial) -> Trial:
    """As promotion makes it."""
    return replace(trial, state=TrialState.QUEUED, result=None, feasible=None, finished_at=None)


def test_what_one_shape_of_gang_cannot_train_is_proposed_to_another() -> None:
    study = make_study(CONDITIONAL, "caddie", cap_bytes=2_000_000)
    proposer, history = Proposer(study), list[Trial]()
    for number in range(10):
        gang = (FOUR, ONE)[number % 2]
        proposed = proposer.propose(history, gang)
        assert proposed == Proposer(study).propose(history, gang)
        new = must(proposed)
        assert Domain(study.definition.base, study.definition.space).point(new.spec) == new.params
        history.append(as_trial(number, new, TrialState.COMPLETE, by_size(new), SHOWN))


def test_a_trial_is_promoted_while_another_ends_and_what_was_given_up_is_proposed_again() -> None:
    study = make_study({"sharing.lora.rank": {"choice": [0, 1, 2, 4]}}, "caddie", cap_train_seconds=20)
    first = must(Proposer(study).propose([], ONE))
    second = must(Proposer(study).propose([as_trial(0, first)], ONE))
    slow, proposer = paced(as_trial(0, first, TrialState.PRUNED, 2.5), 30, 30.0), Proposer(study)
    given_up = proposer.propose([slow, as_trial(1, second)], ONE)
    assert given_up.reason is not None
    assert "2 certain to train for longer than the cap of 20 s" in given_up.reason
    assert "bytes" not in given_up.reason
    history = [reopened(slow), paced(as_trial(1, second, TrialState.COMPLETE, 2.5), 120, 2.0)]
    assert must(proposer.propose(history, ONE)) == must(Proposer(study).propose(history, ONE))


def paced(trial: Trial, steps: int, seconds: float) -> Trial:
    assert trial.result is not None
    timed = {"steps": steps, "train_seconds": seconds, "step_seconds": seconds / steps}
    return replace(trial, result=trial.result.model_copy(update=timed))


def test_what_misses_the_target_of_its_own_spec_is_not_said_to_miss_the_cap() -> None:
    base = {**load_recipe("laptop"), "quantisation": {"half_below": 4096, "target_bytes": 60_000}}
    study = make_study({"sharing.lora.rank": {"choice": [2, 4]}}, "random", base=base)
    reason = Proposer(study).propose([], ONE).reason
    assert reason is not None and "2 certain not to fit their quantisation.target_bytes" in reason


@pytest.mark.parametrize("objectives", [("val_bpb",), ("val_bpb", "artifact_bytes")])
def test_gp_learns_where_scores_are_good(objectives: tuple[str, ...]) -> None:
    study = make_study({"model.width": {"low": 48, "high": 192, "step": 6}}, "gp", objectives=objectives)
    history = search(study, 12, by_size)
    if len(objectives) == 1:
        assert sum(trial.params["model.width"] > 150 for trial in history) > 3, "of 12 drawn evenly there would be 3"
    assert Proposer(study).propose(history, ONE) == Proposer(study).propose(history, ONE)


def test_nsga2_makes_children_of_the_best_so_far() -> None:
    study = make_study(WIDTHS, "nsga2")
    history = search(study, POPULATION + 15, by_size)
    before, after = ([by_size_of(trial) for trial in part] for part in (history[:POPULATION], history[POPULATION:]))
    assert sum(after) / len(after) < sum(before) / len(before)


def by_size_of(trial: Trial) -> float:
    assert trial.result is not None
    return trial.result.val_bpb


def test_a_grid_is_walked_to_its_last_point_however_often_the_proposer_is_made_anew() -> None:
    study = make_study({"sharing.lora.rank": {"choice": [0, 2, 4]}, "model.width": {"choice": [48, 96]}}, "grid")
    history = list[Trial]()
    while (proposed := Proposer(study).propose(history, ONE)).trial is not None:
        assert proposed.refused == 0, "what was walked over is not drawn again"
        history.append(as_trial(len(history), proposed.trial, TrialState.COMPLETE, 2.0))
    assert len({str(trial.params) for trial in history}) == 6
    assert proposed.reason is not None and "no point left" in proposed.reason


def test_a_grid_refuses_a_range_without_steps_before_the_study_exists() -> None:
    with pytest.raises(ValidationError, match=r"space\.optimizer\.matrix_lr.*needs a step"):
        make_study({"optimizer.matrix_lr": {"low": 0.01, "high": 0.1}}, "grid")


def test_halton_points_are_spread_more_evenly_than_random_ones() -> None:
    unit = {"low": 1.0, "high": 2.0}
    study = make_study({"optimizer.matrix_lr": unit, "optimizer.scalar_lr": unit}, "qmc")
    domain = Domain(study.definition.base, study.definition.space)
    points = [Halton(domain, 7).at(position) for position in range(64)]
    cells = Counter((int(8 * (p["optimizer.matrix_lr"] - 1)), int(4 * (p["optimizer.scalar_lr"] - 1))) for p in points)
    assert max(cells.values()) <= 4, "64 points over 32 cells"
    assert points != [Halton(domain, 8).at(position) for position in range(64)]


def test_a_grid_of_many_points_is_walked_without_making_them_all() -> None:
    study = make_study(
        {"model.width": {"low": 16, "high": 16_384}, "sharing.lora.rank": {"low": 0, "high": 4096}}, "grid"
    )
    grid = Grid(Domain(study.definition.base, study.definition.space), 0)
    widths = sorted(point["model.width"] for position in range(5000, 5100) if (point := grid.at(position)) is not None)
    assert widths[20] < 16_384 / 3 < 2 * 16_384 / 3 < widths[80], "a stretch of it is from all over the grid"


@pytest.mark.parametrize("size", [1, 2, 3, 64, 1000])
def test_a_shuffle_by_position_comes_to_every_number_once(size: int) -> None:
    order = [shuffled(position, size, "grid 7") for position in range(size)]
    assert sorted(order) == list(range(size))
    if size > 3:
        assert order != [shuffled(position, size, "grid 8") for position in range(size)] != sorted(order)


def test_a_large_grid_is_walked_on_though_its_first_values_cannot_fit() -> None:
    space = {
        "model.width": {"choice": [960, 864, 192]}, "optimizer.matrix_lr": {"low": 0.01, "high": 0.2, "step": 0.001},
        "sharing.unique_blocks": {"low": 1, "high": 6}, "sharing.lora.rank": {"choice": [0, 1, 2, 4]},
    }  # fmt: skip
    study = make_study(space, "grid", cap_bytes=500_000)
    told = [trial.suggestion for trial in search(study, 5, by_size)]
    assert {each.arm for each in told if each is not None} == {"grid"}


@pytest.mark.parametrize("sampler", ["grid", "qmc"])
def test_a_walk_goes_on_behind_what_it_was_refused_in_vain(sampler: str) -> None:
    """Ten of so many numbers of heads divide the width, and none of these is among the first that are walked over."""
    study = make_study({"model.heads": {"low": 1, "high": 4000}}, sampler, seed=1)
    new = must(Proposer(study).propose([], ONE))
    assert new.suggestion is not None and new.suggestion.arm == "rest"
    memory = memory_of(study, [as_trial(0, new)])
    assert memory.position == new.suggestion.position == WALKED - 1


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("space", [FAMILIES, WIDTHS], ids=["conditional", "continuous"])
def test_a_space_where_nothing_fits_says_so_after_a_bounded_number_of_samples(
    sampler: str, space: dict[str, Any]
) -> None:
    if sampler == "grid":
        space = {path: each for path, each in space.items() if path != "optimizer.matrix_lr"}
    study = make_study(space, sampler, cap_bytes=60_000)
    proposer = Proposer(study)
    proposed = proposer.propose([], ONE)
    assert proposed.trial is None
    assert 0 < proposed.refused < 6000
    assert proposed.reason is not None
    assert "certain not to fit the cap of 60,000 bytes" in proposed.reason
    assert proposer.propose([], ONE) == Proposed(None, 0, proposed.reason)


def test_a_space_to_fill_where_nothing_fits_says_so_too() -> None:
    proposed = Proposer(make_study(FILLED, "caddie", cap_bytes=60_000)).propose([], ONE)
    assert proposed.trial is None
    assert proposed.reason is not None and "with no value of model.width that fits the caps" in proposed.reason


# What trials teach


def test_a_promoted_trial_is_open_again_and_its_next_score_replaces_the_last() -> None:
    study = make_study(WIDTHS, "caddie")
    history, proposer = search(study, 9, by_size), Proposer(study)
    stopped = replace(history[4], state=TrialState.PRUNED)
    queued = replace(history[4], state=TrialState.QUEUED, finished_at=None)
    better = replace(history[4], result=_scored(history[4], 1.0))
    for state in (stopped, queued, history[4], better):
        changed = [*history[:4], state, *history[5:]]
        assert proposer.propose(changed, ONE) == Proposer(study).propose(changed, ONE)


def _scored(trial: Trial, val_bpb: float) -> Any:
    assert trial.result is not None
    return trial.result.model_copy(update={"val_bpb": val_bpb})


def test_an_imported_trial_teaches_as_a_submitted_one() -> None:
    study = make_study(WIDTHS, "tpe")
    history = search(study, 15, by_size)
    taught = [[replace(history[0], origin=origin), *history[1:]] for origin in ("submitted", "imported")]
    first, second = (memory_of(study, each) for each in taught)
    assert [lesson.number for lesson in first.selected()] == [lesson.number for lesson in second.selected()]
    assert [lesson.values for lesson in first.selected()] == [lesson.values for lesson in second.selected()]


def memory_of(study: Study, history: Sequence[Trial]) -> Memory:
    memory = Memory(study, Domain(study.definition.base, study.definition.space))
    memory.learn(history)
    return memory


def test_samplers_see_the_best_the_latest_and_all_open_trials_of_a_long_history() -> None:
    study = make_study(WIDTHS, "random")
    first = must(Proposer(study).propose([], ONE))
    count = 2 * (BEST + LATEST)
    history = [as_trial(number, first, TrialState.COMPLETE, 2 + number / count) for number in range(count)]
    history[BEST + 7] = replace(history[BEST + 7], state=TrialState.RUNNING, result=None, finished_at=None)
    seen = [lesson.number for lesson in memory_of(study, history).selected()]
    assert seen == [*range(BEST), BEST + 7, *range(count - LATEST, count)]


def test_the_front_of_two_objectives_has_what_nothing_surpasses() -> None:
    study = make_study(WIDTHS, "caddie", objectives=("val_bpb", "artifact_bytes"))
    lessons = memory_of(study, search(study, 8, by_size)).latest("scored", 8)
    best = front(lessons)
    for lesson in lessons:
        surpassed = any(
            all(x <= y for x, y in zip(other.values, lesson.values, strict=True)) and other.values != lesson.values
            for other in lessons
        )
        assert surpassed or lesson.values in [each.values for each in best]


# The mix


def test_caddie_finds_the_best_of_a_space_sooner_than_random() -> None:
    def trials_to(sampler: str, seed: int) -> int:
        study = make_study(WIDTHS, sampler, seed, cap_bytes=160_000)
        history = search(study, 14, by_rank)
        return min(range(14), key=lambda number: by_size_of(history[number]))

    def by_rank(new: NewTrial) -> float:
        return 3 - new.prediction.parameters / 1e6 + abs(new.spec.sharing.lora.rank - 4) / 50

    scores = {name: [_best(name, seed, by_rank) for seed in range(3)] for name in ("caddie", "random")}
    assert sum(scores["caddie"]) < sum(scores["random"])


def _best(sampler: str, seed: int, score: Callable[[NewTrial], float]) -> float:
    study = make_study(WIDTHS, sampler, seed, cap_bytes=160_000)
    return min(by_size_of(trial) for trial in search(study, 14, score))


def test_every_proposal_of_the_mix_names_the_arm_that_it_came_from() -> None:
    study = make_study(WIDTHS, "caddie")
    arms = {trial.suggestion.arm for trial in search(study, 25, by_size) if trial.suggestion is not None}
    assert "surrogate" in arms
    assert arms <= {"recipe", "surrogate", "exploit", "guided", "tpe", "random"}


def test_sharings_of_recipes_that_are_points_are_proposed_first() -> None:
    base = load_recipe("prism-wo", "tiny")
    space = {
        "sharing.unique_blocks": {"choice": [1, 2, 11]}, "sharing.tying": {"choice": ["split", "cycle", "sequence"]},
        "sharing.adapters": {"choice": [False, True]}, "model.width": {"choice": [32, 64]},
    }  # fmt: skip
    study = make_study(space, "caddie", base=base)
    history = search(study, 4, by_size)
    told = [trial.suggestion for trial in history if trial.suggestion is not None]
    assert [each.arm for each in told[:2]] == ["recipe", "recipe"]
    assert all(each.rule is not None and load_recipe(each.rule) for each in told if each.arm == "recipe")


def test_an_arm_that_does_well_is_drawn_more_often_and_none_dies() -> None:
    study = make_study(WIDTHS, "random")
    history = list[Trial]()
    for number, trial in enumerate(search(study, 60, by_size)):
        arm = "good" if number % 2 else "bad"
        score = 2.0 - number / 100 if arm == "good" else 2.5
        history.append(replace(trial, suggestion=Suggestion(arm=arm), result=_scored(trial, score)))
    lessons = memory_of(study, history).latest("scored", 100)
    counts = successes(lessons)
    assert counts["good"][0] > 20 and counts["bad"][0] < 3
    priors = {"good": (1.0, 1.0), "bad": (1.0, 1.0)}
    first = Counter(draw_arms(priors, lessons, random.Random(seed))[0] for seed in range(400))
    assert first["good"] > 350
    assert first["bad"] > 0


def test_an_arm_whose_trials_are_stopped_is_drawn_less() -> None:
    study = make_study(WIDTHS, "caddie")
    history = search(study, 30, by_size)
    told = Suggestion(arm="surrogate")
    scored = [replace(trial, suggestion=Suggestion(arm="recipe")) for trial in history[:6]]
    stopped = [replace(trial, suggestion=told, state=TrialState.PRUNED) for trial in history[6:]]
    cancelled = [replace(trial, suggestion=told, state=TrialState.CANCELLED) for trial in history[6:]]

    def drawn(rest: list[Trial]) -> int:
        firsts = Counter[str]()
        for last in range(20):
            new = must(Proposer(study).propose([*scored, *rest[: len(rest) - last]], ONE))
            assert new.suggestion is not None
            firsts[new.suggestion.arm] += 1
        return firsts["surrogate"]

    assert drawn(stopped) < drawn(cancelled) / 2


def test_two_objectives_are_both_pursued_by_the_mix() -> None:
    study = make_study(WIDTHS, "caddie", objectives=("val_bpb", "artifact_bytes"))
    history = search(study, 20, by_size)
    weights = sorted(trial.result.artifact_bytes for trial in history if trial.result is not None)
    assert weights[0] < weights[-1] / 2, "small models are asked for as well as large ones"
