"""How often each arm of a mix is drawn: as often as its proposals have done well in this study."""

import random
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence

from orchestrator.lesson import Lesson

FLOOR = 0.03  # of the proposals: what every arm keeps
GOOD = 0.1  # the best share of the trials before it that a success is among
COMPARED = 5  # trials before it that there must be


def draw_arms(priors: Mapping[str, tuple[float, float]], lessons: Sequence[Lesson], rng: random.Random) -> list[str]:
    """The arms, the one to ask first in front: by a draw of each one's rate of success (Thompson, 1933).

    `priors` are the successes and failures that each arm starts with. Once in a while any arm comes first.
    """
    counts = successes(lessons)
    drawn = {
        arm: rng.betavariate(good + counts.get(arm, (0, 0))[0], bad + counts.get(arm, (0, 0))[1])
        for arm, (good, bad) in priors.items()
    }
    order = sorted(drawn, key=lambda arm: -drawn[arm])
    if rng.random() < FLOOR * len(order):
        first = rng.choice(order)
        order = [first, *(arm for arm in order if arm != first)]
    return order


def successes(lessons: Sequence[Lesson]) -> dict[str, tuple[int, int]]:
    """By arm, how many of its trials were among the best tenth of those before them, and how many were not.

    The lessons are in the order of their numbers. One that was stopped was not, until it is promoted and does better;
    one before which there is too little to compare with is not counted.
    """
    counts: dict[str, tuple[int, int]] = {}
    before: list[float] = []
    for lesson in lessons:
        if lesson.kind not in ("scored", "stopped"):
            continue
        suggestion, scored = lesson.trial.suggestion, lesson.feasible
        if suggestion is not None and len(before) >= COMPARED:
            rank = bisect_left(before, lesson.values[0])
            good, bad = counts.get(suggestion.arm, (0, 0))
            success = scored and rank <= GOOD * len(before)
            counts[suggestion.arm] = (good + success, bad + (not success))
        if scored:
            insort(before, lesson.values[0])
    return counts
