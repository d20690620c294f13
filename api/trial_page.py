"""The page of one trial, and the part of it that changes."""

from typing import Any

from fastapi import APIRouter, Request
from markupsafe import Markup
from sqlalchemy.orm import Session
from starlette.responses import HTMLResponse

from api import diagnostics
from api.bars import bytes_bar, curve_picture, measured_bytes, predicted_bytes
from api.context import Context, ContextOf, StudyName, TrialNumber
from api.differences import differences
from api.pages import page
from api.pictures import tying_picture
from api.schemas import parameters_by_class
from api.trials import artifact_of, describe
from orchestrator import store
from orchestrator.lifecycle import OPEN_TRIALS

router = APIRouter(include_in_schema=False)


@router.get("/studies/{study}/trials/{number}")
def show_trial(request: Request, study: StudyName, number: TrialNumber, context: ContextOf) -> HTMLResponse:
    """A trial: its tying map, curve, bytes, attempts and spec."""
    with context.database.read() as session:
        return page(request, "trial.html", **_trial_facts(session, study, number, context))


@router.get("/studies/{study}/trials/{number}/live")
def show_trial_live(request: Request, study: StudyName, number: TrialNumber, context: ContextOf) -> HTMLResponse:
    """The part of a trial's page that changes."""
    with context.database.read() as session:
        return page(request, "trial_live.html", **_trial_facts(session, study, number, context))


def _trial_facts(session: Session, name: str, number: int, context: Context) -> dict[str, Any]:
    study = store.get_study(session, name)
    trial = store.get_trial(session, study.id, number)
    described = describe(session, study.name, trial, context)
    result, spec = described.result, described.spec
    shown = result.diagnostics if result else {}
    gammas, influence = shown.get("gammas"), shown.get("block_influence", ())
    picture = tying_picture(spec.sharing, unet_skips=spec.model.unet_skips, gammas=gammas, influence=influence)
    points = [(point["artifact_bytes"], point["val_bpb"]) for point in shown.get("bytes_curve", ())]
    predicted = trial.prediction
    by_class = (
        measured_bytes(result) if result else predicted_bytes(spec, predicted.artifact_bytes, predicted.code_bytes)
    )
    interval = None if result else (predicted.artifact_bytes_low, predicted.artifact_bytes_high)
    gates = [gate for of_path in (gammas or {}).values() for gate in of_path]
    return {
        "study": study,
        "trial": described,
        "live": trial.state in OPEN_TRIALS,
        "picture": Markup(picture),
        "late": spec.sharing.tying.from_fraction
        if len(spec.sharing.layers_at(0.0)) < spec.sharing.virtual_layers
        else 0,
        "tables": diagnostics.tables(shown),
        "curve": Markup(curve_picture(points)) if len(points) > 1 else None,
        "widest_gate": max(gates, default=None),
        "bytes_by_class": by_class,
        "bar": Markup(bytes_bar(by_class, study.definition.cap_bytes, interval)),
        "parameters_by_class": parameters_by_class(spec),
        "artifact": artifact_of(trial, store.list_attempts(session, trial.id)),
        "spec_json": spec.model_dump_json(indent=2),
        "differs": differences(study.definition.base, spec),
    }
