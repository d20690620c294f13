"""Trials of one study side by side: what differs first, what came of it, and who is best at what."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from markupsafe import Markup
from sqlalchemy.orm import Session
from starlette.responses import HTMLResponse

from api.bars import bytes_bar, measured_bytes, predicted_bytes
from api.comparison import Result, line_of, results
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
        "results": results(described, spread),
        "classes": _classes(sides),
        "validation_tokens": {one.spec.evaluation.validation_tokens for one in described},
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


def _classes(sides: Sequence[Side]) -> list[Result]:
    """Bytes by tensor class."""
    names = dict.fromkeys(name for side in sides for name in side.bytes_by_class)
    return [
        line_of(name.replace("_", " "), [side.bytes_by_class.get(name) for side in sides], readable_bytes)
        for name in names
    ]
