"""Optuna's view: our tables as its studies, live, read-only, and never with an infeasible trial as best."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from fractions import Fraction
from io import BytesIO
from typing import Any
from wsgiref.util import setup_testing_defaults

import httpx
import optuna
import pytest
from claims import NewStudies, NewTrials, Results
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState as OptunaState
from optuna_dashboard import wsgi
from pydantic import ValidationError
from searches import as_trial, make_study, must
from sqlalchemy import event

from orchestrator import leases, store
from orchestrator.database import Database
from orchestrator.lifecycle import Cause, Outcome, TrialState
from orchestrator.optuna_view import (
    DashboardView,
    ReadOnlyError,
    StudyView,
    distribution_of,
    distributions_of,
    frozen_trial,
    is_feasible,
)
from orchestrator.points import Domain
from orchestrator.proposer import Proposer
from orchestrator.space import Parameter, as_category
from orchestrator.study import AttemptResult, Claim, Study
from worker.report import Measurement
from worker.spec import GangConfig, override, parse_spec

TTL = timedelta(minutes=5)
OVER = 16_000_001


@dataclass
class Sweep:
    """A study in a database, and the moves of its trials."""

    database: Database
    study: Study
    new_trial: NewTrials
    trial_result: Results
    now: datetime

    def add(self, **fields: Any) -> int:
        with self.database.write() as session:
            trial = store.add_trial(session, self.study.id, self.new_trial(**fields), self.now)
        assert trial is not None
        return trial.number

    def claim(self) -> Claim:
        with self.database.write() as session:
            claim = leases.claim(session, GangConfig(), "host", self.now, TTL)
        assert claim is not None
        return claim

    def measure(self, claim: Claim, number: int, step: int, val_bpb: float) -> None:
        metrics = {"val_bpb": val_bpb, "train_loss": 3.0}
        said = Measurement(number=number, step=step, elapsed_seconds=1.0, metrics=metrics)
        with self.database.write() as session:
            leases.record(session, claim.lease, "train", [said], self.now, TTL)

    def finish(self, claim: Claim, outcome: Outcome = Outcome.SUCCEEDED, **result: Any) -> None:
        scored = outcome in (Outcome.SUCCEEDED, Outcome.STOPPED)
        cause = Cause.DIVERGED if outcome is Outcome.FAILED else None
        ended = AttemptResult(outcome, "", self.trial_result(**result) if scored else None, cause=cause)
        with self.database.write() as session:
            leases.finish(session, claim.lease, ended, self.now + timedelta(minutes=1))

    def complete(self, val_bpb: float, artifact_bytes: int = 120_000, **fields: Any) -> int:
        number = self.add(**fields)
        self.finish(self.claim(), val_bpb=val_bpb, artifact_bytes=artifact_bytes)
        return number

    def load(self) -> optuna.Study:
        return optuna.load_study(study_name=self.study.name, storage=StudyView(self.database))


@pytest.fixture
def sweep(
    database: Database, new_study: NewStudies, new_trial: NewTrials, trial_result: Results, now: datetime
) -> Sweep:
    space = {
        "sharing.lora.rank": {"choice": [0, 2, 4, 8]},
        "sharing.unique_blocks": {"low": 1, "high": 6},
        "sharing.tying": {"choice": ["cycle", [0, 0, 1, 1, 2, 2]]},
    }
    with database.write() as session:
        study = store.create_study(session, new_study(space=space), now)
    return Sweep(database, study, new_trial, trial_result, now)


@pytest.fixture
def every_state(sweep: Sweep) -> Sweep:
    """Trials 0 to 6: complete, pruned, failed, infeasible, cancelled, running, queued."""
    params = {"sharing.lora.rank": 4, "sharing.unique_blocks": 3, "sharing.tying": [0, 0, 1, 1, 2, 2]}
    sweep.complete(2.25, params=params)
    sweep.add(params={**params, "sharing.lora.rank": 2})
    pruned = sweep.claim()
    sweep.measure(pruned, 1, 40, 3.1)
    sweep.finish(pruned, Outcome.STOPPED, val_bpb=3.0, steps=50, stopped=True)
    sweep.add()
    sweep.finish(sweep.claim(), Outcome.FAILED)
    sweep.add(verdict="cannot_fit", reason="too large", origin="submitted")
    cancelled = sweep.add()
    with sweep.database.write() as session:
        store.cancel_trial(session, sweep.study.id, cancelled, sweep.now)
    sweep.add(params=params)
    sweep.measure(sweep.claim(), 1, 30, 2.9)
    sweep.add()
    return sweep


def test_a_loaded_study_has_our_trials_with_their_values_states_and_parameters(every_state: Sweep) -> None:
    loaded = every_state.load()
    with every_state.database.read() as session:
        ours = store.list_trials(session, every_state.study.id)
    expected = {
        "complete": OptunaState.COMPLETE, "pruned": OptunaState.PRUNED, "failed": OptunaState.FAIL,
        "infeasible": OptunaState.PRUNED, "cancelled": OptunaState.FAIL, "running": OptunaState.RUNNING,
        "queued": OptunaState.WAITING,
    }  # fmt: skip
    assert [trial.state.value for trial in ours] == list(expected)
    for trial, frozen in zip(ours, loaded.trials, strict=True):
        assert (frozen.number, frozen._trial_id) == (trial.number, trial.id)
        assert frozen.state is expected[trial.state.value]
        assert frozen.params == {path: as_category(value) for path, value in trial.params.items()}
        assert set(frozen.distributions) == set(frozen.params)
        assert frozen.user_attrs["state"] == trial.state.value
        assert frozen.user_attrs["tying_map"] == list(trial.spec.sharing.tying_map)
        assert frozen.user_attrs["parameters"] == trial.prediction.parameters
    assert loaded.trials[0].value == loaded.best_value == 2.25
    assert loaded.best_params["sharing.tying"] == "[0, 0, 1, 1, 2, 2]"
    assert loaded.trials[0].user_attrs["artifact_bytes"] == 120_000
    assert loaded.trials[0].user_attrs["val_bpb_prequant"] == 2.4
    assert loaded.direction is optuna.study.StudyDirection.MINIMIZE
    assert loaded.metric_names == ["val_bpb"]
    assert loaded.user_attrs["cap_bytes"] == every_state.study.definition.cap_bytes


def test_a_loaded_study_agrees_with_what_the_api_answers(every_state: Sweep, serve: Callable[..., str]) -> None:
    address = f"{serve(every_state.database)}/v1/studies/{every_state.study.name}"
    answers = httpx.get(f"{address}/trials").json()["items"]
    loaded = every_state.load()
    states = {
        "complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL", "infeasible": "PRUNED", "cancelled": "FAIL",
        "running": "RUNNING", "queued": "WAITING",
    }  # fmt: skip
    assert [answer["state"] for answer in answers] == list(states)
    assert [trial.number for trial in loaded.trials] == [answer["number"] for answer in answers]
    for answer, trial in zip(answers, loaded.trials, strict=True):
        assert trial.state.name == states[answer["state"]]
        assert trial.value == (answer["val_bpb"] if answer["state"] == "complete" else None)
        assert trial.params == {path: as_category(value) for path, value in answer["params"].items()}
        assert trial.user_attrs.get("val_bpb") == answer["val_bpb"]
        assert trial.user_attrs.get("artifact_bytes") == answer["artifact_bytes"]
        assert trial.user_attrs["tying_map"] == answer["tying_map"]
    assert answers[0]["params"]["sharing.tying"] == [0, 0, 1, 1, 2, 2]
    first = httpx.get(f"{address}/leaderboard").json()["rows"][0]
    assert (loaded.best_trial.number, loaded.best_value) == (first["number"], first["val_bpb"]) == (0, 2.25)


def test_every_trial_is_one_that_optuna_would_accept(every_state: Sweep) -> None:
    copy = optuna.create_study()
    copy.add_trials(every_state.load().trials)
    assert len(copy.trials) == 7


def test_intermediate_values_are_the_bpb_by_step_of_the_latest_attempt(sweep: Sweep) -> None:
    sweep.add()
    first = sweep.claim()
    sweep.measure(first, 1, 30, 3.3)
    sweep.measure(first, 2, 60, 3.1)
    sweep.finish(first, Outcome.PREEMPTED)
    second = sweep.claim()
    sweep.measure(second, 1, 30, 3.2)
    view = StudyView(sweep.database)
    assert view.get_all_trials(sweep.study.id)[0].intermediate_values == {30: 3.2}
    sweep.measure(second, 2, 60, 3.0)
    assert view.get_all_trials(sweep.study.id)[0].intermediate_values == {30: 3.2, 60: 3.0}
    sweep.finish(second)
    assert view.get_all_trials(sweep.study.id)[0].intermediate_values == {30: 3.2, 60: 3.0}


def test_the_best_trial_is_never_over_the_cap(sweep: Sweep) -> None:
    sweep.complete(1.1, OVER)
    with pytest.raises(ValueError, match="none fits"):
        _ = sweep.load().best_trial
    sweep.complete(2.5)
    sweep.complete(2.4)
    sweep.complete(1.2, OVER)
    loaded = sweep.load()
    assert (loaded.best_trial.number, loaded.best_value) == (2, 2.4)
    assert [trial.number for trial in loaded.best_trials] == [2]


def test_constraints_stand_under_both_keys(every_state: Sweep) -> None:
    every_state.finish(every_state.claim(), artifact_bytes=OVER)
    trials = every_state.load().trials
    over, fits = trials[6].system_attrs, trials[0].system_attrs
    assert over["constraints:artifact_bytes"] == over["constraints"][0] == 1.0
    kept = {"artifact_bytes": 120_000.0 - every_state.study.definition.cap_bytes, "train_seconds": -591.07}
    kept["evaluate_seconds"] = -599.0
    assert fits == {**{f"constraints:{name}": value for name, value in kept.items()}, "constraints": [*kept.values()]}
    assert trials[0].constraints.items() >= kept.items()
    assert [trials[number].constraints for number in (2, 4, 5)] == [{}] * 3


def test_an_infeasible_trial_violates_its_constraint_by_its_predicted_bytes(
    database: Database, new_study: NewStudies, new_trial: NewTrials, now: datetime
) -> None:
    with database.write() as session:
        study = store.create_study(session, new_study(cap_bytes=100_000), now)
        store.add_trial(session, study.id, new_trial(verdict="cannot_fit", reason="too large"), now)
    (trial,) = optuna.load_study(study_name=study.name, storage=StudyView(database)).trials
    assert trial.constraints["artifact_bytes"] == new_trial().prediction.artifact_bytes - 100_000 > 0
    assert trial.user_attrs["reason"] == "too large"


@pytest.mark.parametrize(
    ("seconds", "target", "violated"),
    [
        ({"train_seconds": 900.0, "train_seconds_low": 800.0, "train_seconds_high": 1000.0}, None, {"train_seconds"}),
        ({"evaluate_seconds": 9e3, "evaluate_seconds_low": 601.0, "evaluate_seconds_high": 1e4}, None,
         {"evaluate_seconds"}),
        ({"train_seconds": 900.0, "train_seconds_low": 500.0, "train_seconds_high": 1000.0}, 50_000,
         {"artifact_bytes"}),
        ({}, None, {"verdict"}),
    ],
)  # fmt: skip
def test_a_trial_refused_for_seconds_or_a_target_is_infeasible_to_every_sampler(
    seconds: dict[str, Any], target: int | None, violated: set[str]
) -> None:
    study = make_study({"sharing.lora.rank": {"choice": [0, 2]}})
    new = must(Proposer(study).propose([], GangConfig()))
    spec = parse_spec(override(new.spec.model_dump(mode="json"), {"quantisation.target_bytes": target}))
    refused = replace(new, spec=spec, prediction=replace(new.prediction, **seconds), verdict="cannot_fit")
    distributions = distributions_of(Domain(study.definition.base, study.definition.space))
    frozen = frozen_trial(as_trial(0, refused, TrialState.INFEASIBLE), distributions, study.definition, {})
    by_name = {name: over for name, over in frozen.constraints.items() if not name.isdigit()}  # the list has indices
    assert {name for name, over in by_name.items() if over > 0} == violated
    assert not is_feasible(frozen)


def test_times_are_naive_and_local_as_optuna_has_them(every_state: Sweep) -> None:
    trials = every_state.load().trials
    local = every_state.now.astimezone().replace(tzinfo=None)
    assert trials[0].datetime_start == local
    assert trials[0].datetime_complete == local + timedelta(minutes=1)
    assert trials[5].datetime_complete is None
    assert trials[6].datetime_start is None


def test_finished_trials_are_read_once(sweep: Sweep) -> None:
    for number in range(5):
        sweep.complete(2.0 + number)
    view, statements = StudyView(sweep.database), list[str]()
    first = view.get_all_trials(sweep.study.id)

    def count(*arguments: Any) -> None:
        statements.append(arguments[2])

    event.listen(sweep.database.engine, "before_cursor_execute", count)
    again = view.get_all_trials(sweep.study.id)
    event.remove(sweep.database.engine, "before_cursor_execute", count)
    assert again == first
    assert len(first) == 5
    assert statements
    assert not [statement for statement in statements if "trials.spec," in statement or "measurements" in statement]
    sweep.complete(1.5)
    assert [trial.value for trial in view.get_all_trials(sweep.study.id)] == [2.0, 3.0, 4.0, 5.0, 6.0, 1.5]


def test_what_optuna_is_given_can_be_changed_without_changing_the_view(sweep: Sweep) -> None:
    sweep.complete(2.0)
    view = StudyView(sweep.database)
    view.get_all_trials(sweep.study.id)[0].params["stolen"] = 1
    assert "stolen" not in view.get_all_trials(sweep.study.id)[0].params


def test_trials_are_found_by_id_and_filtered_by_state(every_state: Sweep) -> None:
    view, study_id = StudyView(every_state.database), every_state.study.id
    trials = view.get_all_trials(study_id)
    assert StudyView(every_state.database).get_trial(trials[3]._trial_id) == trials[3]
    assert view.get_trial(trials[5]._trial_id) == trials[5]
    assert view.get_trial_id_from_study_id_trial_number(study_id, 2) == trials[2]._trial_id
    assert view.get_n_trials(study_id) == 7
    assert view.get_n_trials(study_id, OptunaState.PRUNED) == 2
    assert [trial.number for trial in view.get_all_trials(study_id, states=(OptunaState.WAITING,))] == [6]


def test_what_does_not_exist_is_a_key_error(sweep: Sweep) -> None:
    view = StudyView(sweep.database)
    for ask in (
        lambda: view.get_study_id_from_name("none"),
        lambda: view.get_study_name_from_id(99),
        lambda: view.get_study_directions(99),
        lambda: view.get_all_trials(99),
        lambda: view.get_trial(99),
    ):
        with pytest.raises(KeyError):
            ask()


def test_every_write_is_refused_and_changes_nothing(every_state: Sweep) -> None:
    view, study_id = StudyView(every_state.database), every_state.study.id
    before = view.get_all_trials(study_id)
    running = before[5]._trial_id
    loaded = every_state.load()
    for write in (
        lambda: optuna.create_study(study_name="new", storage=view),
        lambda: optuna.delete_study(study_name=every_state.study.name, storage=view),
        lambda: loaded.set_user_attr("key", 1),
        lambda: view.set_study_system_attr(study_id, "study:metric_names", ["other"]),
        lambda: loaded.add_trial(optuna.trial.create_trial(value=1.0)),
        lambda: loaded.tell(5, 1.0),
        lambda: view.create_new_trial(study_id),
        lambda: view.set_trial_param(running, "x", 1.0, FloatDistribution(0, 1)),
        lambda: view.set_trial_intermediate_value(running, 1, 1.0),
        lambda: view.set_trial_user_attr(running, "key", 1),
        lambda: view.set_trial_system_attr(running, "key", 1),
    ):
        with pytest.raises(ReadOnlyError, match="read-only"):
            write()
    assert StudyView(every_state.database).get_all_trials(study_id) == before


def test_a_parameter_is_the_distribution_that_samples_its_values() -> None:
    for parameter, expected in (
        (Parameter(choice=(0, "a", None, [1, 2])), CategoricalDistribution((0, "a", None, "[1, 2]"))),
        (Parameter(low=1, high=8), IntDistribution(1, 8)),
        (Parameter(low=1, high=8, log=True), IntDistribution(1, 8, log=True)),
        (Parameter(low=48, high=100, step=16), IntDistribution(48, 96, step=16)),
        (Parameter(low=0.1, high=1), FloatDistribution(0.1, 1.0)),
        (Parameter(low=0.001, high=0.1, log=True), FloatDistribution(0.001, 0.1, log=True)),
        (Parameter(low=0.1, high=0.95, step=0.2), FloatDistribution(0.1, 0.9, step=0.2)),
        (Parameter(low=0.01, high=1, step=0.02), FloatDistribution(0.01, 0.99, step=0.02)),
        (Parameter(low=0.25, high=2, step=0.5), FloatDistribution(0.25, 1.75, step=0.5)),
        (Parameter(low=1, high=2, step=0.3), FloatDistribution(1.0, 1.9, step=0.3)),
    ):
        assert distribution_of(parameter) == expected


NUMBER = st.one_of(
    st.integers(-9, 9), st.integers(-(10**13), 10**13), st.sampled_from([0.01, 0.02, 0.1, 0.25, 0.5, 1e-5, 0.3]),
    st.decimals(-9, 9, places=3).map(float), st.floats(-1e13, 1e13),
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.filter_too_much])  # many a wild range is refused
@given(ends=st.tuples(NUMBER, NUMBER), step=st.none() | NUMBER.map(abs), log=st.booleans())
def test_every_accepted_parameter_has_a_distribution_of_exactly_its_values(
    ends: tuple[float, float], step: float | None, log: bool
) -> None:
    low, high = sorted(ends)
    try:
        parameter = Parameter(low=low, high=high, step=step, log=log)
    except ValidationError:
        reject()
    found = distribution_of(parameter)  # a warning of Optuna's, that it changed the range, is an error here
    assert isinstance(found, FloatDistribution | IntDistribution)
    assert isinstance(found, IntDistribution) == parameter.whole
    assert (found.low, found.log) == (low, log)
    if step is None:
        assert found.high == high
        return
    assert found.step == step
    steps = (Fraction(str(found.high)) - Fraction(str(low))) / Fraction(str(step))
    assert steps.denominator == 1
    assert Fraction(str(found.high)) <= Fraction(str(high)) < Fraction(str(found.high)) + Fraction(str(step))
    assert parameter.count == steps + 1


def get_json(database: Database, path: str) -> tuple[str, dict[str, Any]]:
    """The answer of Optuna's dashboard over the view, driven as the WSGI application that it is."""
    environ: dict[str, Any] = {"PATH_INFO": path, "HTTP_ACCEPT_ENCODING": "identity", "wsgi.input": BytesIO()}
    setup_testing_defaults(environ)
    status: list[str] = []

    def start_response(line: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        status.append(line)
        return lambda data: None

    body = b"".join(wsgi(DashboardView(database))(environ, start_response))
    return status[0], json.loads(body)


def test_optunas_dashboard_shows_the_study(every_state: Sweep) -> None:
    status, studies = get_json(every_state.database, "/api/studies")
    assert status == "200 OK"
    assert [study["study_name"] for study in studies["study_summaries"]] == [every_state.study.name]
    status, detail = get_json(every_state.database, f"/api/studies/{every_state.study.id}")
    assert status == "200 OK"
    states = ["Complete", "Pruned", "Fail", "Pruned", "Fail", "Running", "Waiting"]
    assert [trial["state"] for trial in detail["trials"]] == states
    assert [trial["number"] for trial in detail["best_trials"]] == [0]
    assert detail["best_trials"][0]["values"] == [2.25]
    assert detail["trials"][5]["intermediate_values"] == [{"step": 30, "value": 2.9}]
    assert detail["trials"][0]["constraints"][0] == 120_000.0 - every_state.study.definition.cap_bytes
    assert detail["objective_names"] == ["val_bpb"]
    assert {each["name"] for each in detail["union_search_space"]} == set(every_state.study.definition.space)


def test_a_trial_has_only_the_parameters_that_are_active_in_it(sweep: Sweep, new_study: NewStudies) -> None:
    rank, layers = "sharing.lora.rank", "sharing.virtual_layers"
    space = {
        "sharing.tying": {"families": ["cycle", "free"]},
        layers: {"low": 3, "high": 4},
        rank: {"choice": [2, 4], "when": "sharing.tying.family == free"},
    }
    with sweep.database.write() as session:
        sweep.study = store.create_study(session, new_study("wide", space=space), sweep.now)
    cycle = {"sharing.tying.family": "cycle", layers: 3}
    free = {**cycle, "sharing.tying.family": "free", "sharing.tying.free.1": 1, "sharing.tying.free.2": 0, rank: 2}
    for params in (cycle, free):
        sweep.complete(2.5, params=params)
    assert [trial.params for trial in sweep.load().trials] == [cycle, free]
    assert sweep.load().trials[1].distributions["sharing.tying.free.2"] == IntDistribution(0, 2)
    status, detail = get_json(sweep.database, f"/api/studies/{sweep.study.id}")
    assert (status, {each["name"] for each in detail["union_search_space"]}) == ("200 OK", set(free))
    assert {each["name"] for each in detail["intersection_search_space"]} == set(cycle)


def test_optunas_dashboard_has_no_best_trial_while_none_fits(sweep: Sweep) -> None:
    sweep.complete(1.1, OVER)
    status, detail = get_json(sweep.database, f"/api/studies/{sweep.study.id}")
    assert (status, detail["best_trials"]) == ("200 OK", [])
    assert [(trial["state"], trial["constraints"][0]) for trial in detail["trials"]] == [("Pruned", 1.0)]
    sweep.complete(2.5)
    _, detail = get_json(sweep.database, f"/api/studies/{sweep.study.id}")
    assert [trial["state"] for trial in detail["trials"]] == ["Complete", "Complete"]
    assert [trial["number"] for trial in detail["best_trials"]] == [1]
