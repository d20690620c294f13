"""Random points of a study that does not exist yet, with what each would be and cost."""

import random
from dataclasses import dataclass, field
from typing import Any

from orchestrator.feasibility import Predictor, judge
from orchestrator.fill import NothingFits, fill_to
from orchestrator.points import Domain, Fill, value_at
from orchestrator.study import NewStudy, Prediction, Verdict
from worker.spec import GangConfig, InvalidSpec, TrialSpec


@dataclass(frozen=True)
class Sample:
    """A point. It has no spec where that would be invalid, or where nothing to fill with fits."""

    params: dict[str, Any]
    spec: TrialSpec | None
    prediction: Prediction | None
    verdict: Verdict | None
    """None where the point is no valid spec."""
    reason: str | None
    filled: dict[str, Any] = field(default_factory=dict)
    """The path that was left to fill, with the value it got."""


@dataclass(frozen=True)
class Samples:
    """Points drawn, and of how many: at the most, infinite in a continuous space."""

    drawn: tuple[Sample, ...]
    points: float


def draw_samples(study: NewStudy, count: int) -> Samples:
    """So many points drawn evenly by the study's seed, for its shapes of gang in turn, before any trial has taught the
    predictor: what a first proposal knows."""
    domain, predictor, rng = Domain(study.base, study.space), Predictor(), random.Random(study.seed)
    fill = fill_to(predictor, study, domain.fill.probability) if domain.fill is not None else None
    shapes = study.shapes
    points = (domain.random(rng) for _ in range(count))
    turns = (shapes[place % len(shapes)] for place in range(count))
    drawn = (_sample(study, domain, predictor, fill, *each) for each in zip(points, turns, strict=True))
    return Samples(tuple(drawn), domain.count)


def _sample(
    study: NewStudy, domain: Domain, predictor: Predictor, fill: Fill | None, point: dict[str, Any], gang: GangConfig
) -> Sample:
    try:
        spec = domain.spec(point, gang, fill)
    except NothingFits as error:
        return Sample(point, None, None, "cannot_fit", str(error))
    except InvalidSpec as error:
        return Sample(point, None, None, None, str(error))
    prediction = predictor.predict(spec)
    path = domain.fill_path
    filled = {} if path is None else {path: value_at(spec, path)}
    return Sample(point, spec, prediction, *judge(prediction, study, spec), filled)
