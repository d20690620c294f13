"""Which trials earn another seed: those whose chance to be better than the incumbent is still real."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, islice

from orchestrator.standing import Standing, ranked, spread_of
from orchestrator.statistics import Sample, Spread, chance_below
from orchestrator.study import ReplicationConfig

MEASURED_DEGREES = 2  # with fewer the study knows next to nothing of its own spread
FEWEST_TRIALS, MOST_TRIALS = 4, 20
MOST_REPLACED = 2  # what fails at more seeds than that would fail at others too


@dataclass(frozen=True)
class Replicate:
    """One more run of a complete trial."""

    trial_id: int
    seed: int
    why: str


def next_seed(seeds: Sequence[int], taken: frozenset[int]) -> int | None:
    """The first of the study's seeds at which the trial has no run; None where it has them all."""
    return next((seed for seed in seeds if seed not in taken), None)


def plan(seeds: Sequence[int], failed: int) -> tuple[int, ...]:
    """The study's seeds, and the same others for every trial in place of those that failed, which few may."""
    others = (seed for seed in count() if seed not in seeds)
    return (*seeds, *islice(others, min(failed, MOST_REPLACED)))


def contenders_needed(max_trials: int) -> int:
    """How many complete trials within all caps there must be before the best of them has had anyone to beat."""
    return max(FEWEST_TRIALS, min(max_trials // 10, MOST_TRIALS))


def earned(standings: Sequence[Standing], terms: ReplicationConfig, idle: bool, needed: int) -> list[Replicate]:
    """The seeds that are due now, one a trial at most. The incumbent has the best mean within all caps.

    Before as many trials as `needed` are complete none is, unless nothing else is left to do (`idle`): whoever
    finishes first is no contender yet, and the first trial that is declared has the largest share of a record's alpha.

    A rival, whose chance that its true mean is below the incumbent's exceeds the terms', earns its next seed. The
    incumbent earns one while a rival has as many as itself, while the study has not measured its own spread, and, once
    idle, until it has all of them, which is what a record's verdict asks for. Who has a run open, or missed a cap at
    any seed, earns none. A seed that failed is replaced.
    """
    able = ranked(standing for standing in standings if standing.bpb and not standing.over)
    if not able or (len(able) < needed and not idle):
        return []
    incumbent, *others = able
    measured = spread_of(standings)
    spread = (measured or Spread(0.0, 0)).with_prior()
    best = incumbent.sample
    assert best is not None
    rivals = _rivals(others, best, spread, terms.chance)
    due = [(rival, f"its chance to beat trial {incumbent.number} is {chance:.0%}") for rival, chance in rivals]
    if any(len(rival.bpb) >= best.count for rival, _ in rivals):
        due.append((incumbent, f"it leads, and has {len(rivals)} to beat"))
    elif measured is None or measured.degrees < MEASURED_DEGREES:
        due.append((incumbent, "it leads, and the study has to learn how much seeds differ"))
    elif idle:
        due.append((incumbent, "it leads, and a verdict takes all seeds"))
    wanted = [
        (standing, next_seed(plan(terms.seeds, standing.failed), standing.taken), why)
        for standing, why in due
        if not standing.waits
    ]
    return [Replicate(standing.trial_id, seed, why) for standing, seed, why in wanted if seed is not None]


def _rivals(others: Sequence[Standing], best: Sample, spread: Spread, threshold: float) -> list[tuple[Standing, float]]:
    """Those whose chance is above the threshold, and the chance. `others` are in the order of their means."""
    rivals = []
    for other in others:
        sample = other.sample
        assert sample is not None
        # One seed leaves the most room for luck: who is out with one is out, and so is everyone after.
        if chance_below(Sample(sample.mean, 0.0, 1), best, spread) <= threshold:
            break
        chance = chance_below(sample, best, spread)
        if chance > threshold:
            rivals.append((other, chance))
    return rivals
