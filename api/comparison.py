"""What came of trials, side by side: a line a number, on the page that compares them and on the command line."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from api.schemas import TrialOut
from orchestrator.standing import Standing
from orchestrator.statistics import Spread


@dataclass(frozen=True)
class Result:
    """A number of each trial, as text, and as it is for CSV; `best` are the places of the best of them."""

    name: str
    texts: tuple[str, ...]
    values: tuple[float | None, ...]
    best: frozenset[int] = frozenset()


def standing_of(trial: TrialOut) -> Standing:
    """Where the trial stands by its own runs: whatever its state, as far as they have scores."""
    scored = [(run.seed, run.scores) for run in trial.runs if run.rung == 0 and run.state == "succeeded" and run.scores]
    return Standing(
        0, trial.number, trial.seed, trial.val_bpb or 0.0, {seed: s.val_bpb for seed, s in scored if s.feasible},
        over=sum(not s.feasible for _, s in scored), taken=frozenset(), waits=False,
    )  # fmt: skip


def results(trials: Sequence[TrialOut], spread: Spread | None) -> list[Result]:
    """What came of each, a line a number. Less is better, but of what is merely large."""
    standings = [standing_of(trial) for trial in trials]
    means = [one.sample.mean if one.sample else None for one in standings]
    costs = [[attempt.cost for run in trial.runs for attempt in run.attempts] for trial in trials]
    spans = [one.interval(spread)[0] for one in standings]
    words = tuple(f"{span.low:.4f} to {span.high:.4f}" if span else "–" for span in spans)
    return [
        line_of("BPB, mean of seeds within the caps", means, _bpb, better=True),
        Result("95 % interval", words, (None,) * len(words)),
        line_of("Seeds", [len(one.bpb) for one in standings], _whole),
        line_of("BPB of its first seed", [trial.val_bpb for trial in trials], _bpb, better=True),
        line_of("BPB before quantisation", [trial.val_bpb_prequant for trial in trials], _bpb, better=True),
        line_of("Artifact bytes", [trial.artifact_bytes for trial in trials], _whole, better=True),
        line_of("Artifact bytes, predicted", [trial.predicted_artifact_bytes for trial in trials], _whole),
        line_of("Parameters", [trial.parameters for trial in trials], _whole),
        line_of("Steps", [trial.result.steps if trial.result else None for trial in trials], _whole),
        line_of("Training", [trial.train_seconds for trial in trials], _seconds, better=True),
        line_of("Step, median", [1000 * t.result.step_seconds if t.result else None for t in trials], _milliseconds,
              better=True),
        line_of("Evaluation", [t.result.evaluate_seconds if t.result else None for t in trials], _seconds, better=True),
        line_of("GPU-seconds, all attempts", [sum(cost.gpu_seconds for cost in of) for of in costs], "{:,.1f}".format),
        line_of("Dollars, all attempts", [sum(cost.dollars for cost in of) for of in costs], "{:,.2f}".format),
    ]  # fmt: skip


def line_of(name: str, values: Sequence[float | None], text: Callable[[float], str], *, better: bool = False) -> Result:
    """One number of each trial; where less of it is better, the least are the best, unless they are all alike."""
    known = [value for value in values if value is not None]
    tells = better and len(known) > 1 and min(known) != max(known)
    best = frozenset(place for place, value in enumerate(values) if tells and value == min(known))
    return Result(name, tuple("–" if value is None else text(value) for value in values), tuple(values), best)


def _bpb(value: float) -> str:
    return f"{value:.4f}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _seconds(value: float) -> str:
    return f"{value:,.1f} s"


def _milliseconds(value: float) -> str:
    return f"{value:,.1f} ms"
