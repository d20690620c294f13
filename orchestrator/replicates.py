"""Which trials earn another seed: those whose chance to be better than the incumbent is still real."""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.standing import Standing, ranked, spread_of
from orchestrator.statistics import Sample, Spread, chance_below
from orchestrator.study import ReplicationConfig

MEASURED_DEGREES = 2  # with fewer the study knows next to nothing of its own spread


@dataclass(frozen=True)
class Replicate:
    """One more run of a complete trial."""

    trial_id: int
    seed: int
    why: str


def next_seed(seeds: Sequence[int], taken: frozenset[int]) -> int | None:
    """The first of the study's seeds at which the trial has no run; None where it has them all."""
    return next((seed for seed in seeds if seed not in taken), None)


def earned(standings: Sequence[Standing], terms: ReplicationConfig, idle: bool) -> list[Replicate]:
    """The seeds that are due now, one a trial at most. The incumbent has the best mean within all caps.

    A rival, whose chance that its true mean is below the incumbent's exceeds the terms', earns its next seed. The
    incumbent earns one while a rival has as many as itself, while the study has not measured its own spread, and, once
    nothing else is left to do (`idle`), until it has all of them, which is what a record's verdict asks for. Who has a
    run open, or missed a cap at any seed, earns none.
    """
    able = ranked(standing for standing in standings if standing.bpb and not standing.over)
    if not able:
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
    wanted = [(standing, next_seed(terms.seeds, standing.taken), why) for standing, why in due if not standing.waits]
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
