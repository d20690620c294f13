"""When an attempt has been silent, or has run, for too long. Time is an argument."""

from datetime import datetime, timedelta

import pytest

from orchestrator.launcher import Ending, Update
from orchestrator.lifecycle import Cause, Outcome
from orchestrator.watch import LOOK_SECONDS, Watch
from worker.spec import LimitsConfig

LIMITS = LimitsConfig(patience_seconds=40, silence_seconds=100, attempt_seconds=None)


def looks(now: datetime, limits: LimitsConfig, *said: tuple[float, str, int]) -> list[Ending | None]:
    """What each look finds, by the seconds since the first, the phase and the beats then."""
    watch = Watch(limits, now)
    return [
        watch.look(Update(phase, (), None, beats), now + timedelta(seconds=seconds)) for seconds, phase, beats in said
    ]


def test_training_without_a_beat_for_the_patience_is_a_hang(now: datetime) -> None:
    *before, last = looks(now, LIMITS, (0, "train", 3), (20, "train", 3), (39, "train", 3), (40, "train", 3))
    assert before == [None] * 3
    assert last == Ending(Outcome.FAILED, "no progress for 40 s in phase train", cause=Cause.HANG)


def test_a_beat_or_a_new_phase_ends_a_silence(now: datetime) -> None:
    said = [(0.0, "train", 3), (25, "train", 3), (35, "train", 4), (60, "train", 4), (70, "pack", 4), (95, "pack", 4)]
    assert looks(now, LIMITS, *said) == [None] * 6


@pytest.mark.parametrize("phase", ["start", "data", "evaluate", "pack"])
def test_phases_that_say_nothing_have_a_patience_of_their_own(now: datetime, phase: str) -> None:
    *before, last = looks(now, LIMITS, *((seconds, phase, 2) for seconds in (0, 25, 50, 75, 99, 100)))
    assert before == [None] * 5
    assert last == Ending(Outcome.FAILED, f"no progress for 100 s in phase {phase}", cause=Cause.HANG)


def test_time_in_which_nobody_looked_is_no_silence(now: datetime) -> None:
    limits = LimitsConfig(patience_seconds=2 * LOOK_SECONDS)
    hours = 8 * 3600.0
    found = looks(now, limits, (0, "train", 3), (hours, "train", 3), (hours + 1, "train", 3), (2 * hours, "train", 3))
    assert [ending is None for ending in found] == [True, True, True, False]


def test_an_attempt_taken_over_has_run_since_it_began_and_been_silent_since_the_first_look(now: datetime) -> None:
    later, limits = now + timedelta(hours=2), LIMITS.model_copy(update={"attempt_seconds": 7201.0})
    watch, update = Watch(limits, now), Update("train", (), None, 7)
    assert watch.look(update, later) is None
    ending = watch.look(update, later + timedelta(seconds=1))
    assert ending is not None and ending.cause is Cause.LIMIT


def test_a_clock_set_back_is_no_silence_and_ends_none(now: datetime) -> None:
    said = [(0.0, "train", 3), (25, "train", 3), (-3600, "train", 3), (-3590, "train", 3), (-3585, "train", 3)]
    assert [ending is None for ending in looks(now, LIMITS, *said)] == [True, True, True, True, False]


def test_an_attempt_that_goes_on_for_longer_than_its_limit_ends(now: datetime) -> None:
    limits = LimitsConfig(attempt_seconds=90)
    *before, last = looks(now, limits, *((seconds, "train", int(seconds)) for seconds in (1, 60, 89, 90)))
    assert before == [None] * 3
    assert last == Ending(Outcome.FAILED, "not finished after 90 s", cause=Cause.LIMIT)


def test_an_attempt_that_waits_for_another_has_not_begun(now: datetime) -> None:
    watch = Watch(LIMITS.model_copy(update={"attempt_seconds": 50.0}), now)
    for seconds in range(0, 500, 25):
        assert watch.look(Update("queue", (), None, 0), now + timedelta(seconds=seconds)) is None
    for seconds, ended in ((480, False), (520, False), (526, True)):
        update = Update("train", (), None, seconds, {"queue": 475.5})
        assert (watch.look(update, now + timedelta(seconds=seconds)) is not None) == ended
