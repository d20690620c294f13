"""What the API answers of configurations that have not run: their parameters, bytes, seconds and verdicts."""

from collections.abc import Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from api.schemas import PredictionOut, parameters_by_class
from orchestrator.study import Prediction, Verdict
from worker.inventory import TensorClass
from worker.spec import TrialSpec
from worker.tying import TyingMap

if TYPE_CHECKING:  # SQLAlchemy and NumPy come with these, and clients read answers without them
    from orchestrator.sample import Sample, Samples


class BytesOut(BaseModel):
    """Expected, and the ends of a 90% interval."""

    expected: int
    low: int
    high: int


class PreviewOut(BaseModel):
    """What a spec would be and cost. `parameters_by_class` adds up to the prediction's parameters, `bytes_by_class`,
    but for rounding, to its artifact without code: each class has its share of the whole's interval."""

    spec: TrialSpec
    spec_hash: str
    tying_map: TyingMap
    prediction: PredictionOut
    parameters_by_class: dict[TensorClass, int]
    bytes_by_class: dict[TensorClass, BytesOut]
    cap_bytes: int
    verdict: Verdict
    reason: str | None

    @classmethod
    def of(
        cls,
        spec: TrialSpec,
        prediction: Prediction,
        cap_bytes: int,
        verdict: Verdict,
        reason: str | None,
        shares: Mapping[TensorClass, float],
    ) -> "PreviewOut":
        whole = (prediction.artifact_bytes, prediction.artifact_bytes_low, prediction.artifact_bytes_high)
        expected, low, high = (size - prediction.code_bytes for size in whole)
        by_class = {
            name: BytesOut(expected=round(share * expected), low=round(share * low), high=round(share * high))
            for name, share in shares.items()
        }
        return cls(
            spec=spec, spec_hash=spec.canonical_hash, tying_map=spec.sharing.tying_map,
            prediction=PredictionOut.of(prediction), parameters_by_class=parameters_by_class(spec),
            bytes_by_class=by_class, cap_bytes=cap_bytes, verdict=verdict, reason=reason,
        )  # fmt: skip


class SampleOut(BaseModel):
    """A random point of a study. One that is no valid spec has neither verdict nor prediction."""

    params: dict[str, Any]
    filled: dict[str, Any]
    """The path that was left to fill, with the value it got."""
    tying_map: TyingMap | None
    prediction: PredictionOut | None
    verdict: Verdict | None
    reason: str | None

    @classmethod
    def of(cls, sample: "Sample") -> "SampleOut":
        return cls(
            params=sample.params, filled=sample.filled, tying_map=sample.spec and sample.spec.sharing.tying_map,
            prediction=sample.prediction and PredictionOut.of(sample.prediction), verdict=sample.verdict,
            reason=sample.reason,
        )  # fmt: skip


class StudyPreviewOut(BaseModel):
    """Random points of a study that does not exist yet, and how many of them would be refused."""

    samples: list[SampleOut]
    invalid: int
    cannot_fit: int
    points: int | None
    """Of the space, at the most; none where it is continuous."""

    @classmethod
    def of(cls, samples: "Samples") -> "StudyPreviewOut":
        verdicts = [sample.verdict for sample in samples.drawn]
        return cls(
            samples=[SampleOut.of(sample) for sample in samples.drawn], invalid=verdicts.count(None),
            cannot_fit=verdicts.count("cannot_fit"), points=int(samples.points) if isfinite(samples.points) else None,
        )  # fmt: skip
