"""How good predictions are before a trial runs: draws bytes.png and seconds.png, and prints their table as Markdown.

From benchmarks/search/table.jsonl: in each of ORDERINGS random orders the predictor learns the first n rows as finished
trials and predicts HELD_OUT others. A row's training seconds are its steps times the CPU seconds of one.

Run: OMP_NUM_THREADS=1 .venv/bin/python benchmarks/search/calibration.py
"""

import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

from table import TABLE, spec_of

from orchestrator.feasibility import Predictor
from orchestrator.lifecycle import TrialState
from orchestrator.study import Prediction, Trial
from worker.report import TrialResult

LEARNED = (0, 1, 2, 5, 10, 20, 50, 100, 200)
SHOWN = 20  # learned before the predictions that are drawn one by one
ORDERINGS, HELD_OUT = 40, 60
What = Literal["bytes", "seconds"]
NOW = datetime(2026, 11, 23, tzinfo=UTC)


@dataclass(frozen=True)
class Outcome:
    """One prediction of a trial that was held out, and what came. Bytes are the model's: the code's are known."""

    expected: float
    low: float
    high: float
    actual: float

    @property
    def held(self) -> bool:
        return self.low <= self.actual <= self.high

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2 / self.expected

    @property
    def miss(self) -> float:
        return abs(self.actual / self.expected - 1)


def main() -> int:
    trials = [trial_of(number, json.loads(line)) for number, line in enumerate(TABLE.read_text().splitlines())]
    counts = [count for count in LEARNED if count + HELD_OUT <= len(trials)]
    print(f"{len(trials)} trials, {ORDERINGS} orders, {HELD_OUT} held out in each\n")
    for what in ("bytes", "seconds"):
        found = {count: outcomes(trials, count, what) for count in counts}
        found = {count: each for count, each in found.items() if each}
        print(markdown(what, found))
        draw(what, found)
    return 0


def trial_of(number: int, row: Mapping[str, Any]) -> Trial:
    """A row as the finished trial of a study."""
    spec, nothing = spec_of(row), Prediction(0, 0, 0, 0, 0)
    result = TrialResult(
        val_bpb=row["val_bpb"], val_bpb_prequant=row["val_bpb_prequant"], val_loss=0, parameters=row["parameters"],
        model_bytes=row["model_bytes"], code_bytes=0, artifact_bytes=row["model_bytes"], artifact_sha256="0" * 64,
        steps=row["steps"], tokens=0, train_seconds=row["steps"] * row["step_seconds"], evaluate_seconds=0,
        pack_seconds=0, step_seconds=row["step_seconds"], stopped=False, bytes_by_class=row["bytes_by_class"],
        diagnostics={},
    )  # fmt: skip
    return Trial(
        number + 1, 1, number, TrialState.COMPLETE, "proposed", spec, spec.canonical_hash, {}, nothing, "fits", None,
        result, NOW, NOW, NOW,
    )  # fmt: skip


def outcomes(trials: Sequence[Trial], learned: int, what: What) -> list[Outcome]:
    """Predictions of held-out trials by predictors that have learned so many others."""
    order, found = random.Random(learned), list[Outcome]()
    for _ in range(ORDERINGS):
        drawn = order.sample(trials, learned + HELD_OUT)
        predictor = Predictor.of(drawn[:learned])
        found += [each for trial in drawn[learned:] if (each := outcome(predictor, trial, what)) is not None]
    return found


def outcome(predictor: Predictor, trial: Trial, what: What) -> Outcome | None:
    """One prediction; None where the predictor makes none."""
    said, result = predictor.predict(trial.spec), trial.result
    assert result is not None
    if what == "bytes":
        low, expected, high = (
            each - said.code_bytes for each in (said.artifact_bytes_low, said.artifact_bytes, said.artifact_bytes_high)
        )
        return Outcome(expected, low, high, result.model_bytes)
    if said.train_seconds is None or said.train_seconds_low is None or said.train_seconds_high is None:
        return None
    return Outcome(said.train_seconds, said.train_seconds_low, said.train_seconds_high, result.train_seconds)


def markdown(what: What, found: Mapping[int, Sequence[Outcome]]) -> str:
    """The table of one prediction."""
    lines = [
        f"| {what}: trials learned | 90% interval holds | its half-width, mean | miss, median |",
        "|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {count} | {mean(each.held for each in held_out):.1%} | {mean(each.half_width for each in held_out):.2%} "
        f"| {median(each.miss for each in held_out):.2%} |"
        for count, held_out in found.items()
    ]
    return "\n".join(lines) + "\n"


def draw(what: What, found: Mapping[int, Sequence[Outcome]]) -> None:
    """Actual from predicted with intervals, and coverage and half-width by how many trials were learned."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (points, coverage, width) = pyplot.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    shown = found.get(SHOWN, ())[: 3 * HELD_OUT]
    unit, scale = ("kB", 1e-3) if what == "bytes" else ("s", 1.0)
    for each in shown:
        colour = "tab:blue" if each.held else "tab:red"
        ends = [100 * (end / each.expected - 1) for end in (each.low, each.high)]
        points.plot([each.expected * scale] * 2, ends, color=colour, linewidth=0.6, alpha=0.5)
        points.plot(each.expected * scale, 100 * (each.actual / each.expected - 1), ".", color=colour, markersize=4)
    points.axhline(0, color="black", linewidth=0.6)
    points.set(
        xlabel=f"predicted {'model bytes' if what == 'bytes' else 'training'}, {unit}",
        title=f"actual from predicted after {SHOWN} trials, %",
    )
    counts = [max(count, 0.7) for count in found]
    coverage.axhspan(85, 95, color="tab:green", alpha=0.15)
    coverage.plot(counts, [100 * mean(each.held for each in held_out) for held_out in found.values()], "o-")
    coverage.set(xscale="log", ylim=(50, 101), xlabel="trials learned", title="held by the 90% interval, %")
    width.plot(counts, [100 * mean(each.half_width for each in held_out) for held_out in found.values()], "o-")
    width.set(xscale="log", yscale="log", xlabel="trials learned", title="half-width of the interval, %")
    if what == "bytes":
        width.axhline(2, color="tab:green", linewidth=0.8)
    for axes in (coverage, width):
        axes.set_xticks(counts, [str(count) for count in found])
        axes.minorticks_off()
    figure.savefig(Path(__file__).with_name(f"{what}.png"), dpi=80)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
