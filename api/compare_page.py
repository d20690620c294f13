"""Trials of one study side by side: what differs first, what came of it, and who is best at what."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from markupsafe import Markup
from sqlalchemy.orm import Session
from starlette.responses import HTMLResponse

from api.bars import bytes_bar, measured_bytes, predicted_bytes
from api.context import LARGEST_ID, Context, ContextOf, StudyName
from api.differences import side_by_side
from api.pages import page, readable_bytes
from api.pictures import tying_picture
from api.schemas import TrialOut
from api.trials import describe
from orchestrator import seeds, store
from orchestrator.activity import latest_events
from orchestrator.errors import NotFound
from orchestrator.lifecycle import OPEN_RUNS, OPEN_TRIALS
from orchestrator.standing import Standing, ranked, spread_of
from orchestrator.statistics import Spread
from orchestrator.study import Study
from worker.shape import FieldError

FEWEST, MOST = 2, 5
LEADERS = 8

router = APIRouter(include_in_schema=False)

Numbers = Annotated[tuple[str, ...], Query(description="Numbers of trials, with commas or each on its own.")]


@router.get("/studies/{study}/compare")
def show_comparison(request: Request, study: StudyName, context: ContextOf, trials: Numbers = ()) -> HTMLResponse:
    """Two to five trials side by side; without any, which there are to choose from."""
    numbers = _numbers(trials)
    with context.database.read() as session:
        found = store.get_study(session, study)
        standings = seeds.list_standings(session, found.id, LEADERS)
        leaders = [one.number for one in ranked(standings)[:LEADERS]]
        if not numbers:
            return page(request, "compare.html", study=found, numbers=(), leaders=leaders)
        facts = _facts(session, found, numbers, standings, context)
    return page(request, "compare.html", study=found, numbers=numbers, leaders=leaders, **facts)


def _numbers(said: Sequence[str]) -> tuple[int, ...]:
    """The trials that the address names, each once. Raises FieldError, NotFound."""
    text = ",".join(said).replace(" ", "").strip(",")
    if not text:
        return ()
    numbers = tuple(dict.fromkeys(text.split(",")))
    if not all(re.fullmatch(r"[0-9]{1,10}", number) for number in numbers) or not FEWEST <= len(numbers) <= MOST:
        message = f"must be the numbers of {FEWEST} to {MOST} different trials with commas, such as 1,2,3"
        raise FieldError("query.trials", text[:100], message)
    beyond = next((number for number in numbers if int(number) > LARGEST_ID), None)
    if beyond is not None:
        raise NotFound("trial", beyond)
    return tuple(int(number) for number in numbers)


@dataclass(frozen=True)
class Side:
    """One of the trials: what is shown of it above the tables."""

    trial: TrialOut
    open: bool
    picture: Markup
    bar: Markup
    bytes_by_class: dict[str, float]


@dataclass(frozen=True)
class Result:
    """A number of each trial, as text, and as it is for CSV; `best` are the places of the best of them."""

    name: str
    texts: tuple[str, ...]
    values: tuple[float | None, ...]
    best: frozenset[int] = frozenset()


def _facts(
    session: Session, study: Study, numbers: Sequence[int], standings: Sequence[Standing], context: Context
) -> dict[str, Any]:
    seen = next((event.id for event in latest_events(session, study.id, 1)), 0)
    trials = [store.get_trial(session, study.id, number) for number in numbers]
    described = [describe(session, study.name, trial, context) for trial in trials]
    sides = [_side(study, one) for one in described]
    lines = side_by_side([one.spec for one in described])
    spread = spread_of(standings)  # trials of one seed have no part in it
    return {
        "sides": sides, "seen": seen, "cap_bytes": study.definition.cap_bytes,
        "differing": [line for line in lines if line.differs],
        "same": [line for line in lines if not line.differs],
        "results": _results(described, [_standing(one) for one in described], spread),
        "classes": _classes(sides),
    }  # fmt: skip


def _side(study: Study, trial: TrialOut) -> Side:
    sharing, result, predicted = trial.spec.sharing, trial.result, trial.prediction
    shown = result.diagnostics if result else {}
    picture = tying_picture(
        sharing, unet_skips=trial.spec.model.unet_skips, gammas=shown.get("gammas"),
        influence=shown.get("block_influence", ()),
    )  # fmt: skip
    if result:
        by_class, interval = measured_bytes(result), None
    else:
        by_class = predicted_bytes(trial.spec, predicted.artifact_bytes, predicted.code_bytes)
        interval = (predicted.artifact_bytes_low, predicted.artifact_bytes_high)
    bar = Markup(bytes_bar(by_class, study.definition.cap_bytes, interval))
    return Side(trial, _is_open(trial), Markup(picture), bar, by_class)


def _is_open(trial: TrialOut) -> bool:
    """Whether there is more to come of it: further seeds run while it is complete."""
    return trial.state in OPEN_TRIALS or any(run.state in OPEN_RUNS for run in trial.runs)


def _standing(trial: TrialOut) -> Standing:
    """Where the trial stands by its own runs: whatever its state, as far as they have scores."""
    scored = [(run.seed, run.scores) for run in trial.runs if run.rung == 0 and run.state == "succeeded" and run.scores]
    return Standing(
        0, trial.number, trial.seed, trial.val_bpb or 0.0, {seed: s.val_bpb for seed, s in scored if s.feasible},
        over=sum(not s.feasible for _, s in scored), taken=frozenset(), waits=False,
    )  # fmt: skip


def _results(trials: Sequence[TrialOut], standings: Sequence[Standing], spread: Spread | None) -> list[Result]:
    """What came of each, a line a number. Less is better, but of what is merely large."""
    means = [one.sample.mean if one.sample else None for one in standings]
    costs = [[attempt.cost for run in trial.runs for attempt in run.attempts] for trial in trials]
    spans = [one.interval(spread)[0] for one in standings]
    words = tuple(f"{span.low:.4f} to {span.high:.4f}" if span else "–" for span in spans)
    return [
        _line("BPB, mean of seeds within the caps", means, _bpb, better=True),
        Result("95 % interval", words, (None,) * len(words)),
        _line("Seeds", [len(one.bpb) for one in standings], _whole),
        _line("BPB of its first seed", [trial.val_bpb for trial in trials], _bpb, better=True),
        _line("BPB before quantisation", [trial.val_bpb_prequant for trial in trials], _bpb, better=True),
        _line("Artifact", [trial.artifact_bytes for trial in trials], readable_bytes, better=True),
        _line("Artifact, predicted", [trial.predicted_artifact_bytes for trial in trials], readable_bytes),
        _line("Parameters", [trial.parameters for trial in trials], _whole),
        _line("Steps", [trial.result.steps if trial.result else None for trial in trials], _whole),
        _line("Training", [trial.train_seconds for trial in trials], _seconds, better=True),
        _line("Step, median", [1000 * t.result.step_seconds if t.result else None for t in trials], _milliseconds,
              better=True),
        _line("Evaluation", [t.result.evaluate_seconds if t.result else None for t in trials], _seconds, better=True),
        _line("GPU-seconds, all attempts", [sum(cost.gpu_seconds for cost in of) for of in costs], "{:,.1f}".format),
        _line("Dollars, all attempts", [sum(cost.dollars for cost in of) for of in costs], "{:,.2f}".format),
    ]  # fmt: skip


def _line(name: str, values: Sequence[float | None], text: Callable[[float], str], *, better: bool = False) -> Result:
    """One number of each trial; where less of it is better, the least are the best, unless they are all alike."""
    known = [value for value in values if value is not None]
    tells = better and len(known) > 1 and min(known) != max(known)
    best = frozenset(place for place, value in enumerate(values) if tells and value == min(known))
    return Result(name, tuple("–" if value is None else text(value) for value in values), tuple(values), best)


def _classes(sides: Sequence[Side]) -> list[Result]:
    """Bytes by tensor class."""
    names = dict.fromkeys(name for side in sides for name in side.bytes_by_class)
    return [
        _line(name.replace("_", " "), [side.bytes_by_class.get(name) for side in sides], readable_bytes)
        for name in names
    ]


def _bpb(value: float) -> str:
    return f"{value:.4f}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _seconds(value: float) -> str:
    return f"{value:,.1f} s"


def _milliseconds(value: float) -> str:
    return f"{value:,.1f} ms"
