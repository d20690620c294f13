"""Further seeds: who earns them, how they are added and run, and where that leaves a trial."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import pytest
from claims import NewStudies, NewTrials, Results

from orchestrator import leases, seeds, store
from orchestrator.artifacts import ArtifactStore
from orchestrator.curves import list_curves, list_measurements
from orchestrator.database import Database
from orchestrator.errors import IllegalMove
from orchestrator.leases import claim, finish
from orchestrator.lifecycle import Cause, Outcome, RunState, StudyState, TrialState
from orchestrator.local_launcher import LocalLauncher
from orchestrator.loop import Loop
from orchestrator.replicates import contenders_needed, earned
from orchestrator.standing import Standing, ranked, spread_of
from orchestrator.study import AttemptResult, NewTrial, ReplicationConfig, Study, Trial
from orchestrator.supply import Supply
from worker.recipes import load_recipe
from worker.report import Measurement
from worker.spec import GangConfig, override

TTL = timedelta(seconds=60)
TERMS = ReplicationConfig(seeds=(1, 2, 3, 4), chance=0.1)
OWN = 1337
GANG = GangConfig()


def standing(number: int, *bpb: float, over: int = 0, waits: bool = False) -> Standing:
    by_seed = dict(zip((OWN, *TERMS.seeds), bpb, strict=False))
    return Standing(
        number + 100, number, OWN, bpb[0] if bpb else 2.0, by_seed, over, frozenset(by_seed or (OWN,)), waits
    )


def due(
    standings: list[Standing], terms: ReplicationConfig = TERMS, idle: bool = False, needed: int = 1
) -> dict[int, int]:
    return {one.trial_id - 100: one.seed for one in earned(standings, terms, idle, needed)}


# Who earns a seed


def test_a_close_challenger_earns_a_seed_and_a_hopeless_one_does_not() -> None:
    leads, close, hopeless = standing(0, 2.0, 2.001, 1.999), standing(1, 2.0008), standing(2, 2.1)
    assert due([leads, close, hopeless]) == {1: 1}


def test_the_incumbent_earns_seeds_while_a_rival_has_as_many() -> None:
    assert due([standing(0, 2.0, 2.0005), standing(1, 2.0008, 2.0007), standing(2, 2.1)]) == {0: 2, 1: 2}
    assert due([standing(0, 2.0, 2.0005, 1.9995), standing(1, 2.0008)]) == {1: 1}


def test_the_first_incumbents_seeds_show_how_much_seeds_differ() -> None:
    assert due([standing(0, 2.0), standing(1, 2.3)]) == {0: 1}
    assert due([standing(0, 2.0, 2.001), standing(1, 2.3)]) == {0: 2}
    assert due([standing(0, 2.0, 2.001, 2.002), standing(1, 2.3)]) == {}


def test_no_trial_earns_a_seed_before_a_few_have_finished_unless_nothing_else_is_left() -> None:
    few = [standing(0, 2.0), standing(1, 2.3), standing(2, over=1), standing(3, 2.4)]
    assert due(few, needed=4) == {}
    assert due(few, needed=4, idle=True) == {0: 1}
    assert due([*few, standing(4, 2.5)], needed=4) == {0: 1}
    assert [contenders_needed(most) for most in (0, 40, 100, 5000)] == [4, 4, 10, 20]


def test_seeds_that_failed_are_replaced_by_the_same_others_for_all_but_not_for_ever() -> None:
    seen = (2.0, 2.001, 1.999, 2.0, 2.0)
    for failed, taken, seed in ((1, (), 0), (2, (0,), 5), (9, (0, 5), None), (0, (), None)):
        stands = replace(standing(0, *seen), failed=failed, taken=frozenset((OWN, *TERMS.seeds, *taken)))
        assert due([stands], idle=True) == ({} if seed is None else {0: seed})


def test_where_seeds_differ_more_more_trials_may_still_be_better() -> None:
    """On a small model an SD of 0.02: what the field's would rule out is within luck."""
    assert due([standing(0, 2.0, 2.02, 1.98), standing(1, 2.02)]) == {1: 1}
    assert due([standing(0, 2.0, 2.002, 1.998), standing(1, 2.02)]) == {}


def test_once_nothing_else_is_left_the_incumbent_earns_all_its_seeds() -> None:
    rest = [standing(0, 2.0, 2.001, 1.999), standing(1, 2.3)]
    assert due(rest) == {}
    assert due(rest, idle=True) == {0: 3}
    assert due([standing(0, 2.0, 2.001, 1.999, 2.0, 2.0), standing(1, 2.3)], idle=True) == {}


def test_a_trial_over_a_cap_at_any_seed_neither_leads_nor_earns() -> None:
    assert due([standing(0, over=1), standing(1, 1.9, 1.9, over=1), standing(2, 2.0)]) == {2: 1}
    assert due([standing(0, over=1)]) == {}
    assert due([]) == {}


def test_a_trial_earns_one_seed_at_a_time() -> None:
    assert due([standing(0, 2.0, 2.001, 1.999), standing(1, 2.0, waits=True)]) == {}


def test_a_threshold_of_a_half_asks_only_for_what_looks_better() -> None:
    terms = TERMS.model_copy(update={"chance": 0.5})
    assert due([standing(0, 2.0, 2.001, 1.999), standing(1, 2.0004)], terms) == {}


def test_seeds_come_in_the_order_of_the_list_whoever_earns_them() -> None:
    terms = TERMS.model_copy(update={"seeds": (OWN, 9, 8)})
    assert due([standing(0, 2.0), standing(1, 2.0003)], terms) == {0: 9, 1: 9}


# In SQL


@pytest.fixture
def study(database: Database, new_study: NewStudies, now: datetime) -> Study:
    with database.write() as session:
        return store.create_study(session, new_study(max_trials=20, replication=TERMS.model_dump()), now)


class Bench:
    """Runs that are claimed and ended by hand."""

    def __init__(self, database: Database, study: Study, now: datetime, results: Results) -> None:
        self.database, self.study, self.now, self.results = database, study, now, results

    def end(self, ended: AttemptResult | None = None, **fields: Any) -> int:
        """The trial whose run was first in line, and has ended: in success, where not said otherwise."""
        with self.database.write() as session:
            claimed = claim(session, GANG, "a", self.now, TTL)
            assert claimed is not None
            ended = ended or AttemptResult(Outcome.SUCCEEDED, result=self.results(**fields))
            finish(session, claimed.lease, ended, self.now)
        return claimed.trial_number

    def complete(self, new: NewTrial, **fields: Any) -> Trial:
        with self.database.write() as session:
            trial = store.add_trial(session, self.study.id, new, self.now)
        assert trial is not None and self.end(**fields) == trial.number
        return trial

    def add(self, trial: Trial, seed: int, origin: Any = "earned") -> bool:
        with self.database.write() as session:
            added = seeds.add_seed(session, self.study.id, trial.id, seed, self.now, origin=origin, why="because")
        return added is not None

    def standings(self) -> list[Standing]:
        with self.database.read() as session:
            return sorted(seeds.list_standings(session, self.study.id), key=lambda one: one.number)

    def states(self, trial: Trial) -> list[tuple[int, RunState]]:
        with self.database.read() as session:
            return [(run.seed, run.state) for run in store.list_runs(session, trial.id)]

    def state(self, trial: Trial) -> TrialState:
        with self.database.read() as session:
            return store.get_trial(session, self.study.id, trial.number).state

    def events(self) -> list[str]:
        with self.database.read() as session:
            return [event.message for event in store.list_events(session, study_id=self.study.id)]


@pytest.fixture
def bench(database: Database, study: Study, now: datetime, trial_result: Results) -> Bench:
    return Bench(database, study, now, trial_result)


def test_a_seed_is_added_once_and_runs_before_proposals_and_after_submissions(
    bench: Bench, new_trial: NewTrials
) -> None:
    trial = bench.complete(new_trial())
    assert bench.add(trial, 7) and not bench.add(trial, 7) and not bench.add(trial, trial.spec.seed)
    with bench.database.write() as session:
        store.add_trial(session, bench.study.id, new_trial(), bench.now)
        store.add_trial(session, bench.study.id, new_trial(origin="submitted"), bench.now)
        order = [claim(session, GANG, "a", bench.now, TTL) for _ in range(3)]
    assert [one and (one.trial_number, one.spec.seed) for one in order] == [(2, OWN), (0, 7), (1, OWN)]
    assert order[1] is not None and order[1].spec == trial.spec.model_copy(update={"seed": 7})


def test_two_orchestrators_that_decide_alike_add_one_run(bench: Bench, new_trial: NewTrials) -> None:
    trial = bench.complete(new_trial())
    together = Barrier(4)

    def add(_number: int) -> bool:
        together.wait()
        return bench.add(trial, 7)

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(add, range(4))) == 1
    assert [seed for seed, _ in bench.states(trial)] == [OWN, 7]


def test_a_further_seed_leaves_the_trial_and_its_result_as_they_are(bench: Bench, new_trial: NewTrials) -> None:
    trial = bench.complete(new_trial(), val_bpb=2.2)
    ends = (
        AttemptResult(Outcome.FAILED, "nan", cause=Cause.DIVERGED),
        AttemptResult(Outcome.SUCCEEDED, result=bench.results(val_bpb=2.4)),
        AttemptResult(Outcome.LOST, "gone"),
        AttemptResult(Outcome.SUCCEEDED, result=bench.results(val_bpb=2.0, artifact_bytes=99_000_000)),
    )
    for seed, ended in zip((1, 2, 3, 4), ends, strict=True):
        assert bench.add(trial, seed)
        bench.end(ended)
        if ended.outcome is Outcome.LOST:
            assert bench.states(trial)[-1] == (3, RunState.QUEUED)
            bench.end(val_bpb=2.3)
    with bench.database.read() as session:
        found = store.get_trial(session, bench.study.id, 0)
    assert found.state is TrialState.COMPLETE and found.result is not None
    assert (found.result.val_bpb, found.feasible, found.finished_at) == (2.2, True, bench.now)
    states = dict(bench.states(trial))
    assert states == {
        OWN: RunState.SUCCEEDED, 1: RunState.FAILED, 2: RunState.SUCCEEDED, 3: RunState.SUCCEEDED, 4: RunState.SUCCEEDED
    }  # fmt: skip
    (stands,) = bench.standings()
    assert (stands.bpb, stands.over, stands.waits) == ({OWN: 2.2, 2: 2.4, 3: 2.3}, 1, False)
    assert stands.unscreened_bpb == pytest.approx(2.35)
    assert "Trial 0 at seed 2 is succeeded: 2.4000 BPB in 120,000 bytes" in bench.events()
    assert "Trial 0 at seed 1 is failed: attempt failed, nan" in bench.events()


def test_a_further_seeds_curve_is_not_the_trials(bench: Bench, new_trial: NewTrials) -> None:
    trial = bench.complete(new_trial())
    bench.add(trial, 7)
    with bench.database.write() as session:
        claimed = claim(session, GANG, "a", bench.now, TTL)
        assert claimed is not None
        said = Measurement(number=1, step=5, elapsed_seconds=1.0, metrics={"val_bpb": 2.0})
        leases.record(session, claimed.lease, "train", [said], bench.now, TTL)
    with bench.database.read() as session:
        assert list_curves(session, bench.study.id, "val_bpb", [0]) == {}
        assert len(list_measurements(session, trial.id)) == 1


def test_trials_stand_by_the_mean_of_their_seeds_that_keep_the_caps(bench: Bench, new_trial: NewTrials) -> None:
    lucky = bench.complete(new_trial(), val_bpb=2.0)
    bench.complete(new_trial(), val_bpb=2.1)
    bench.complete(new_trial(), val_bpb=1.5, artifact_bytes=99_000_000)
    assert [one.number for one in ranked(bench.standings())] == [0, 1, 2]
    assert spread_of(bench.standings()) is None
    with bench.database.read() as session:
        assert [one.number for one in seeds.list_standings(session, bench.study.id, limit=1)] == [0]
    bench.add(lucky, 1)
    assert [one.waits for one in bench.standings()] == [True, False, False]
    bench.end(val_bpb=2.4)
    assert [one.number for one in ranked(bench.standings())] == [1, 0, 2]
    spread = spread_of(bench.standings())
    assert spread is not None and (round(spread.sd, 4), spread.degrees) == (0.2828, 1)


def test_a_paused_study_earns_no_seed_and_a_submitted_one_reopens_a_complete_one(
    bench: Bench, new_trial: NewTrials
) -> None:
    trial = bench.complete(new_trial())
    for state in (StudyState.PAUSED, StudyState.RUNNING, StudyState.COMPLETE):
        with bench.database.write() as session:
            store.move_study(session, bench.study.id, state, bench.now)
        if state is not StudyState.RUNNING:
            assert not bench.add(trial, 1)
    assert bench.add(trial, 1, origin="submitted")
    with bench.database.write() as session:
        assert store.get_study(session, bench.study.name).state is StudyState.RUNNING
        with pytest.raises(IllegalMove, match="open runs"):
            store.move_study(session, bench.study.id, StudyState.COMPLETE, bench.now)


def test_stopping_a_study_cancels_the_seeds_that_wait_and_lets_none_back(bench: Bench, new_trial: NewTrials) -> None:
    trial = bench.complete(new_trial())
    assert bench.add(trial, 1) and bench.add(trial, 2)
    with bench.database.write() as session:
        claimed = claim(session, GANG, "a", bench.now, TTL)
        store.move_study(session, bench.study.id, StudyState.STOPPED, bench.now)
    assert dict(bench.states(trial)) == {OWN: RunState.SUCCEEDED, 1: RunState.RUNNING, 2: RunState.CANCELLED}
    assert claimed is not None
    with bench.database.write() as session:
        assert leases.expire(session, bench.now + TTL) == 1
    assert dict(bench.states(trial))[1] is RunState.CANCELLED
    assert bench.state(trial) is TrialState.COMPLETE
    with pytest.raises(IllegalMove):
        bench.add(trial, 3, origin="submitted")


def test_trials_are_declared_in_the_order_of_their_second_seeds(bench: Bench, new_trial: NewTrials) -> None:
    trials = [bench.complete(new_trial()) for _ in range(4)]
    for number, seed in ((2, 1), (0, 1), (2, 2), (3, 1)):
        bench.add(trials[number], seed)

    with bench.database.read() as session:
        assert seeds.list_declared(session, bench.study.id) == (2, 0, 3)


def test_the_supply_asks_for_earned_seeds_once_and_again_only_after_news(bench: Bench, new_trial: NewTrials) -> None:
    bench.complete(new_trial(), val_bpb=2.0)
    bench.complete(new_trial(), val_bpb=2.0001)
    bench.complete(new_trial(), val_bpb=2.5)
    supply = Supply(bench.database)
    assert not supply.replicate(bench.study, None, bench.now), "three are too few to know a contender"
    bench.complete(new_trial(), val_bpb=2.6)
    supply = Supply(bench.database)
    assert supply.replicate(bench.study, None, bench.now)
    assert not supply.replicate(bench.study, None, bench.now)
    assert not Supply(bench.database).replicate(bench.study, None, bench.now)  # another orchestrator, or after a crash
    with bench.database.read() as session:
        assert store.count_open_runs(session, bench.study.id) == 2
    bench.end(val_bpb=2.0002)
    bench.end(val_bpb=2.0003)
    assert supply.replicate(bench.study, None, bench.now)
    assert "Trial 1 runs at seed 1: its chance to beat trial 0 is 47%" in bench.events()
    assert len([message for message in bench.events() if "runs at seed" in message]) == 4


# In the loop


@pytest.fixture
def loop(database: Database, tmp_path: Path) -> Iterator[Loop]:
    launcher = LocalLauncher(tmp_path, tmp_path, 2, "trainers:run", import_path=[Path(__file__).parent])
    yield Loop(database, launcher, ArtifactStore(tmp_path / "artifacts"), "a", TTL)
    launcher.close()


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_study_ends_with_seeds_for_whom_it_may_still_be_and_with_all_for_its_incumbent(
    loop: Loop, database: Database, new_study: NewStudies, new_trial: NewTrials, now: datetime
) -> None:
    base = override(load_recipe("laptop"), {"data.dataset": "scores"})
    with database.write() as session:
        new = new_study(base=base, max_trials=0, replication={"seeds": [1, 2, 3], "chance": 0.1})
        study = store.create_study(session, new, now)
        for rate in (0.0200, 0.0203, 0.2):
            changes = {"data.dataset": "scores", "optimizer.matrix_lr": rate}
            store.add_trial(session, study.id, new_trial(changes, origin="submitted"), now)
    for tick in range(3000):
        loop.tick(now + timedelta(milliseconds=200) * tick)
        with database.read() as session:
            if store.get_study(session, study.name).state is StudyState.COMPLETE:
                break
        Event().wait(0.02)
    with database.read() as session:
        standings = ranked(seeds.list_standings(session, study.id))
    assert [set(one.bpb) for one in standings[::2]] == [{OWN, 1, 2, 3}, {OWN}]
    assert len(standings[1].bpb) > 1
    assert [one.number for one in standings] == [0, 1, 2]
    assert not any(one.waits for one in standings)
