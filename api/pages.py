"""The pages: rendered here, kept live by a little script that follows the event streams."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from sqlalchemy.orm import Session
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.staticfiles import StaticFiles

from api import diagnostics
from api.context import Context, ContextOf, Now, StudyName, TrialNumber
from api.pictures import bytes_bar, curve_picture, tying_picture, tying_strip
from api.refusals import ProblemDetails
from api.schemas import TrialSummary, parameters_by_class
from api.studies import describe, leaderboard
from api.trials import artifact_of
from api.trials import describe as describe_trial
from orchestrator import store
from orchestrator.activity import latest_events, list_activity
from orchestrator.arms import arms
from orchestrator.ledger import ledger
from orchestrator.lifecycle import OPEN_TRIALS, TrialState
from orchestrator.stopping import regret
from orchestrator.study import Event, Study, Trial
from worker.spec import parse_spec
from worker.tying import TyingMap

HERE = Path(__file__).parent
SHOWN = 100
SHOWN_EVENTS = 12
# Plotly sets styles from its script; nothing else needs more than our own files.
CONTENT_POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}  # fmt: skip
# The order in which trials pass through states, and in which the progress bar stacks them.
STACK = (
    TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.QUEUED, TrialState.FAILED,
    TrialState.CANCELLED, TrialState.INFEASIBLE,
)  # fmt: skip

router = APIRouter(include_in_schema=False)


@router.get("/")
def show_studies(request: Request, context: ContextOf, now: Now) -> HTMLResponse:
    """Every study, latest first."""
    with context.database.read() as session:
        listed = reversed(store.list_studies(session))
        studies = [describe(session, study, now, context.accounts) for study in listed]
        seen = _last_id(latest_events(session, None, 1))
    return page(request, "studies.html", studies=studies, seen=seen)


@router.get("/docs")
def show_docs(request: Request) -> HTMLResponse:
    """What the API answers, from its own OpenAPI document."""
    by_tag: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
    for path, operations in request.app.openapi()["paths"].items():
        for method, operation in operations.items():
            by_tag.setdefault(operation["tags"][0], []).append((method.upper(), path, operation))
    return page(request, "docs.html", by_tag=by_tag)


@router.get("/studies/{study}")
def show_study(request: Request, study: StudyName, context: ContextOf, now: Now) -> HTMLResponse:
    """A study: progress, chart, leaderboard, costs, and what its other trials are doing."""
    with context.database.read() as session:
        return page(request, "study.html", **_study_facts(session, store.get_study(session, study), context, now))


@router.get("/studies/{study}/live")
def show_study_live(request: Request, study: StudyName, context: ContextOf, now: Now) -> HTMLResponse:
    """The part of a study's page that changes."""
    with context.database.read() as session:
        return page(request, "study_live.html", **_study_facts(session, store.get_study(session, study), context, now))


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


def page(request: Request, template: str, status: int = 200, **facts: Any) -> HTMLResponse:
    """A template rendered, under the policy that our pages load nothing but our own files."""
    templates: Environment = request.app.state.templates
    return HTMLResponse(templates.get_template(template).render(**facts), status, headers=HEADERS)


def wants_page(request: Request) -> bool:
    """Whether an error should be shown to a person."""
    ours = not request.url.path.startswith(("/v1/", "/api/", "/static/", "/assets/"))
    return ours and "text/html" in request.headers.get("accept", "")


def error_page(request: Request, details: ProblemDetails) -> Response:
    """The problem as a page."""
    return page(request, "error.html", details.status, problem=details)


def load_templates() -> Environment:
    """The templates, which escape what they show and refuse a name that they were not given."""
    templates = Environment(loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined)
    templates.trim_blocks = templates.lstrip_blocks = True
    templates.filters |= {"bytes": readable_bytes, "count": "{:,}".format, "bpb": "{:.4f}".format}
    templates.globals |= {
        "strip": _strip,
    }
    return templates


def mount_assets(app: FastAPI) -> None:
    """Serve our style and scripts, and plotly's bundle out of its Python package, below /assets."""
    found = find_spec("plotly")  # finding does not load it
    assert found is not None and found.origin is not None, "plotly is a dependency"
    bundle = Path(found.origin).parent / "package_data" / "plotly.min.js"

    @app.get("/assets/plotly.min.js", include_in_schema=False)
    async def get_plotly() -> FileResponse:
        return FileResponse(bundle, media_type="text/javascript", headers={"Cache-Control": "max-age=86400"})

    app.mount("/assets", GZipMiddleware(StaticFiles(directory=HERE / "static"), minimum_size=1000))


def _strip(tying_map: TyingMap) -> Markup:
    return Markup(tying_strip(tying_map))


def readable_bytes(size: float) -> str:
    """Bytes with a unit that a person reads: 815 B, 93.4 kB, 15.82 MB."""
    if size < 1000:
        return f"{size:.0f} B"
    return f"{size / 1000:.1f} kB" if size < 1_000_000 else f"{size / 1_000_000:.2f} MB"


def _study_facts(session: Session, study: Study, context: Context, now: datetime) -> dict[str, Any]:
    # Before the rest: what happens while we read comes again in the stream, rather than never.
    events = latest_events(session, study.id, SHOWN_EVENTS)
    described = describe(session, study, now, context.accounts)
    planned = max(described.max_trials - described.proposed, 0)
    # What is in state s, with how many there are: lists are cut, counts are not.
    listed = {
        state: [TrialSummary.of(trial) for trial in store.list_trials(session, study.id, states=(state,), limit=SHOWN)]
        for state in STACK
        if state is not TrialState.COMPLETE
    }
    board = leaderboard(session, study, SHOWN)
    return {
        "study": described,
        "stopping": regret(session, study) if study.definition.stopping else None,
        "board": board,
        "rows": [row.model_dump(mode="json") for row in board.rows],  # for the chart, so that it is there at once
        "activity": {one.trial: one for one in list_activity(session, study.id)},
        "listed": listed,
        "stack": [(state.value, described.counts.get(state, 0)) for state in STACK],
        "planned": planned,
        "arms": arms(session, study.id),
        "costs": ledger(session, study.id, context.gpu_hour_dollars, now),
        "gpu_hour_dollars": context.gpu_hour_dollars,
        "total": sum(described.counts.values()) + planned,
        "events": events,
        "seen": _last_id(events),
    }


def _trial_facts(session: Session, name: str, number: int, context: Context) -> dict[str, Any]:
    study = store.get_study(session, name)
    trial = store.get_trial(session, study.id, number)
    described = describe_trial(session, study.name, trial, context)
    result, spec = described.result, described.spec
    shown = result.diagnostics if result else {}
    gammas, influence = shown.get("gammas"), shown.get("block_influence", ())
    picture = tying_picture(spec.sharing, unet_skips=spec.model.unet_skips, gammas=gammas, influence=influence)
    points = [(point["artifact_bytes"], point["val_bpb"]) for point in shown.get("bytes_curve", ())]
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
        "bytes_by_class": (by_class := _bytes_by_class(trial)),
        "bar": Markup(bytes_bar(by_class, study.definition.cap_bytes)),
        "parameters_by_class": parameters_by_class(spec),
        "artifact": artifact_of(trial, store.list_attempts(session, trial.id)),
        "spec_json": spec.model_dump_json(indent=2),
        "differs": _differences(study.definition.base, spec.model_dump(mode="json", exclude_none=True)),
    }


def _bytes_by_class(trial: Trial) -> dict[str, float]:
    """The artifact's bytes by tensor class, and code: measured, or predicted.

    A prediction's are shared out by how many values a class has.
    """
    if trial.result is not None:
        measured = {name: float(size) for name, size in trial.result.bytes_by_class.items()}
        return measured | {"code": float(trial.result.code_bytes)}
    counts = parameters_by_class(trial.spec)
    code_bytes = trial.prediction.code_bytes
    a_value = (trial.prediction.artifact_bytes - code_bytes) / sum(counts.values())
    return {name.value: count * a_value for name, count in counts.items()} | {"code": float(code_bytes)}


def _last_id(events: Sequence[Event]) -> int:
    return events[0].id if events else 0


def _differences(base: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """Where a trial's spec is not the study's base: path -> the trial's value."""
    whole = parse_spec(base).model_dump(mode="json", exclude_none=True)
    before, after = dict(_leaves(whole)), dict(_leaves(spec))
    return {path: value for path, value in after.items() if before.get(path) != value}


def _leaves(data: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
