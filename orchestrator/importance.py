"""Which parameters of a study matter, as far as its trials show: first-order shares of variance, and families compared.

For each parameter the complete trials are put in groups by its value (numbers of many values in groups of equal size),
and the share of the variance of their ranks by BPB that lies between the groups is its importance. That is the
correlation ratio of Kelley (1935), epsilon squared, on ranks as in the test of Kruskal and Wallis (1952): what groups
without any meaning would show is subtracted, and a diverged trial counts as one rank, not as its loss. A parameter that
only some trials have is judged among those alone, so that it takes no credit for what made it apply, and counts by its
share of all variance. What two parameters do only together is not seen, and two that the sampler moved together are
both given what either did: shares need not add up to 1.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import select
from sqlalchemy.orm import Session

from orchestrator.families import FAMILY, TYING
from orchestrator.lifecycle import TrialState
from orchestrator.tables import TRIALS

FEWEST = 10
"""Trials below which nothing is said of a parameter."""
LATEST = 10_000
"""Trials that are read at the most."""
GROUPS, GROUP_SIZE = 8, 5
"""Of a number with more values than GROUPS: so many groups at the most, of so many trials at the least."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ParameterImportance:
    """A parameter's share of the variance of ranks by BPB, from 0 to 1."""

    name: str
    importance: float | None
    """None where its values say nothing: all are one, or each is another."""
    trials: int
    """How many have it."""


@dataclass(frozen=True)
class FamilyScores:
    """What one family of tying maps has come to. Scores are of complete trials that keep every cap."""

    family: str
    trials: int
    """Complete ones, whether or not they keep the caps."""
    best_bpb: float | None
    median_bpb: float | None


@dataclass(frozen=True)
class Importance:
    """What a study's complete trials say of its space; the most important parameter and the best family first."""

    trials: int
    parameters: tuple[ParameterImportance, ...]
    families: tuple[FamilyScores, ...]


@dataclass(frozen=True)
class _Scored:
    params: Mapping[str, Any]
    val_bpb: float
    feasible: bool


def importance(session: Session, study_id: int) -> Importance:
    """Of the study's latest complete trials."""
    query = (
        select(TRIALS.c.params, TRIALS.c.val_bpb, TRIALS.c.feasible)
        .where(TRIALS.c.study_id == study_id, TRIALS.c.state == TrialState.COMPLETE)
        .order_by(TRIALS.c.number.desc()).limit(LATEST)
    )  # fmt: skip
    trials = [_Scored(*row) for row in session.execute(query)]
    return Importance(len(trials), tuple(_parameters(trials)), tuple(_families(trials)))


def _parameters(trials: Sequence[_Scored]) -> list[ParameterImportance]:
    if len(trials) < FEWEST:
        return []
    scores = np.array([trial.val_bpb for trial in trials])
    ranks = _ranks(scores)
    variance = float(((ranks - ranks.mean()) ** 2).sum())
    found = []
    for name in sorted({name for trial in trials for name in trial.params}):
        places = [place for place, trial in enumerate(trials) if name in trial.params]
        if len(places) < FEWEST:
            continue
        groups = _groups([trials[place].params[name] for place in places])
        explained = _explained(ranks[places], groups)
        share = None if explained is None else explained / variance if variance else 0.0
        found.append(ParameterImportance(name, share, len(places)))
    return sorted(found, key=lambda each: (each.importance is None, -(each.importance or 0.0), each.name))


def _explained(ranks: Floats, groups: npt.NDArray[np.intp]) -> float | None:
    """The sum of squares between groups, less what groups without any meaning would have; None: unknown."""
    sizes = np.bincount(groups)
    freedom = len(ranks) - len(sizes)
    if len(sizes) < 2 or freedom < 1:
        return None
    means = np.bincount(groups, ranks) / sizes
    between = float((sizes * (means - ranks.mean()) ** 2).sum())
    within = float(((ranks - means[groups]) ** 2).sum())
    return max(between - (len(sizes) - 1) * within / freedom, 0.0)


def _groups(values: Sequence[Any]) -> npt.NDArray[np.intp]:
    """The number of each value's group."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        numbers = np.array(values, dtype=np.float64)
        if len(np.unique(numbers)) > GROUPS:
            count = max(2, min(GROUPS, len(values) // GROUP_SIZE))
            edges = np.quantile(numbers, np.arange(1, count) / count)
            numbers = np.searchsorted(edges, numbers, side="right").astype(np.float64)
        return np.unique(numbers, return_inverse=True)[1]
    return np.unique([json.dumps(value, sort_keys=True) for value in values], return_inverse=True)[1]


def _ranks(scores: Floats) -> Floats:
    """From 0, equal scores with their mean rank."""
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last: Floats = np.cumsum(counts) - (counts + 1) / 2
    return last[places]


def _families(trials: Sequence[_Scored]) -> list[FamilyScores]:
    by_family: dict[str, list[_Scored]] = {}
    for trial in trials:
        family = _family(trial.params)
        if family is not None:
            by_family.setdefault(family, []).append(trial)
    found = []
    for family, members in by_family.items():
        scores = [trial.val_bpb for trial in members if trial.feasible]
        best, middle = (min(scores), median(scores)) if scores else (None, None)
        found.append(FamilyScores(family, len(members), best, middle))
    return sorted(found, key=lambda each: (each.best_bpb is None, each.best_bpb, each.family))


def _family(params: Mapping[str, Any]) -> str | None:
    """The family of tying maps that a point names; in a space that lists tyings one by one, the tying's pattern."""
    if FAMILY in params:
        return str(params[FAMILY])
    tying = params.get(TYING)
    if isinstance(tying, str):
        return tying
    if isinstance(tying, list):
        return "explicit"
    return str(tying.get("pattern", "cycle")) if isinstance(tying, dict) else None
