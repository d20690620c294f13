"""The page of one trial, the part of it that changes, and its spec as a file."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import yaml
from fastapi import APIRouter, Request
from markupsafe import Markup
from starlette.responses import HTMLResponse, Response

from api import diagnostics
from api.bars import bytes_bar, curve_picture, measured_bytes, predicted_bytes
from api.comparison import standing_of
from api.context import Context, ContextOf, Now, StudyName, TrialNumber
from api.differences import differences
from api.pages import page
from api.pictures import tying_picture
from api.schemas import TrialOut, parameters_by_class
from api.standings import VerdictOut
from api.timeline import AttemptLane, attempt_lanes
from api.trials import artifact_of, describe
from api.verdicts import get_verdict
from orchestrator import seeds, store
from orchestrator.activity import list_trial_events
from orchestrator.errors import CaddieError
from orchestrator.lifecycle import OPEN_RUNS, OPEN_TRIALS, TrialState
from orchestrator.logs import Logged, last_lines, list_lines
from orchestrator.standing import Standing, ranked, spread_of
from orchestrator.study import Study, Trial
from worker.report import LogLine
from worker.shape import FieldError
from worker.spec import TrialSpec

SHOWN_EVENTS = 200
SHOWN_LINES = 300

router = APIRouter(include_in_schema=False)


@router.get("/studies/{study}/trials/{number}")
def show_trial(request: Request, study: StudyName, number: TrialNumber, context: ContextOf, now: Now) -> HTMLResponse:
    """A trial: how it shares, its curves, bytes, attempts and spec, and what can be done with it."""
    facts = _facts(study, number, context, now)
    with context.database.read() as session:
        # The ends before the lines: what is said meanwhile comes in the stream, rather than never.
        ends = last_lines(session, facts["trial_id"])
        logged = list_lines(session, facts["trial_id"], tail=SHOWN_LINES)
    return page(request, "trial.html", base_url=request.base_url, **facts, **_log(logged, ends, facts["lanes"]))


@router.get("/studies/{study}/trials/{number}/live")
def show_trial_live(
    request: Request, study: StudyName, number: TrialNumber, context: ContextOf, now: Now
) -> HTMLResponse:
    """The part of a trial's page that changes."""
    return page(request, "trial_live.html", base_url=request.base_url, **_facts(study, number, context, now))


@router.get("/studies/{study}/trials/{number}/spec.yaml")
def download_spec(study: StudyName, number: TrialNumber, context: ContextOf) -> Response:
    """The trial's exact spec, as `python -m worker` and `caddie submit` read it."""
    with context.database.read() as session:
        spec = store.get_trial(session, store.get_study(session, study).id, number).spec
    headers = {"Content-Disposition": f'attachment; filename="{spec_name(study, number)}"'}
    return Response(spec_yaml(spec), media_type="application/yaml", headers=headers)


def spec_name(study: str, number: int) -> str:
    """What the file with a trial's spec is called."""
    return f"{study}-{number}.yaml"


def spec_yaml(spec: TrialSpec) -> str:
    """Every field of a spec, in its order."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _facts(name: str, number: int, context: Context, now: datetime) -> dict[str, Any]:
    with context.database.read() as session:
        study = store.get_study(session, name)
        trial = store.get_trial(session, study.id, number)
        described = describe(session, study.name, trial, context)
        artifact = artifact_of(trial, store.list_attempts(session, trial.id))
        events = list_trial_events(session, study.id, number, 0, SHOWN_EVENTS)
        standings = seeds.list_standings(session, study.id, 2)
    leader, rival = _leaders(standings, trial)
    standing = standing_of(described)
    interval, pooled = standing.interval(spread_of(standings))
    return {
        "study": study, "trial": described, "trial_id": trial.id, "live": trial.state in OPEN_TRIALS,
        "leads": leader == number, "sample": standing.sample, "interval": interval, "pooled": pooled,
        "over": standing.over,
        "rival": rival, "artifact": artifact, "events": events[::-1],
        "waits": any(run.state in OPEN_RUNS for run in described.runs), "lanes": attempt_lanes(described.runs, now),
        "verdict": _verdict(study, described, context), "spec_yaml": spec_yaml(trial.spec),
        "spec_name": spec_name(study.name, number), "differs": differences(study.definition.base, trial.spec),
        **_sharing(described), **_bytes(study, described),
    }  # fmt: skip


def _leaders(standings: Sequence[Standing], trial: Trial) -> tuple[int | None, int | None]:
    """The numbers of the study's best trial, and of the best that is not this one."""
    best = [one.number for one in ranked(standings) if one.sample is not None]
    return next(iter(best), None), next((number for number in best if number != trial.number), None)


def _verdict(study: Study, trial: TrialOut, context: Context) -> VerdictOut | None:
    """Whether the trial sets a record, once it has seeds beyond its own, and there is another to be held against."""
    if trial.state is not TrialState.COMPLETE or sum(run.rung == 0 for run in trial.runs) < 2:
        return None
    try:
        return get_verdict(study.name, trial.number, context.database)
    except (CaddieError, FieldError):
        return None


def _log(logged: Sequence[Logged], ends: Mapping[int, int], lanes: Sequence[AttemptLane]) -> dict[str, Any]:
    """The end of what its attempts said, attempt by attempt, and the cursor after all that they said."""
    names = {lane.attempt.id: f"seed {lane.run.seed}, attempt {lane.attempt.number}" for lane in lanes}
    log: dict[int, tuple[str, list[LogLine]]] = {}
    for one in logged:
        log.setdefault(one.attempt_id, (names.get(one.attempt_id, ""), []))[1].append(one.said)
    read = {**ends, **{attempt_id: lines[-1].number for attempt_id, (_, lines) in log.items()}}
    cursor = ",".join(f"{attempt_id}:{number}" for attempt_id, number in sorted(read.items()))
    return {"log": log, "log_cursor": cursor}


def _sharing(trial: TrialOut) -> dict[str, Any]:
    """What the pictures and tables of how layers share show."""
    sharing, shown = trial.spec.sharing, trial.result.diagnostics if trial.result else {}
    gammas, influence = shown.get("gammas") or {}, shown.get("block_influence", ())
    picture = tying_picture(sharing, unet_skips=trial.spec.model.unet_skips, gammas=gammas, influence=influence)
    late = sharing.tying.from_fraction if len(sharing.layers_at(0.0)) < sharing.virtual_layers else 0
    return {
        "picture": Markup(picture), "late": late, "influence": bool(influence),
        "widest_gate": max((gate for gates in gammas.values() for gate in gates), default=None),
        "tables": diagnostics.tables(shown), "layers": diagnostics.layers(sharing.tying_map, shown),
    }  # fmt: skip


def _bytes(study: Study, trial: TrialOut) -> dict[str, Any]:
    """What the bytes' bar and curve show: measured, or predicted with its interval."""
    result, predicted = trial.result, trial.prediction
    by_class = (
        measured_bytes(result)
        if result
        else predicted_bytes(trial.spec, predicted.artifact_bytes, predicted.code_bytes)
    )
    interval = None if result else (predicted.artifact_bytes_low, predicted.artifact_bytes_high)
    sizes = result.diagnostics.get("bytes_curve", ()) if result else ()
    points = [(point["artifact_bytes"], point["val_bpb"]) for point in sizes]
    return {
        "bytes_by_class": by_class, "bar": Markup(bytes_bar(by_class, study.definition.cap_bytes, interval)),
        "curve": Markup(curve_picture(points)) if len(points) > 1 else None,
        "parameters_by_class": parameters_by_class(trial.spec),
    }  # fmt: skip
