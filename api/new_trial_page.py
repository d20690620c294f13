"""The page on which a person makes a trial: the spec as a form, what it would weigh and take, and its submission.

Everything about it happens here, so that it works without a script; the script only asks again as one types.
"""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from markupsafe import Markup
from sqlalchemy.orm import Session
from starlette.responses import HTMLResponse, RedirectResponse, Response

from api.bars import bytes_bar
from api.bodies import TrialIn
from api.context import LARGEST_ID, Context, ContextOf, DatabaseOf, StudyName, WriterOf
from api.fields import REST, Field, overrides_of, placed, sections, texts_of
from api.forms import FormOf
from api.pages import page
from api.pictures import tying_picture
from api.preview import preview
from api.submission import submit
from orchestrator import seeds, store
from orchestrator.calibration import Calibration
from orchestrator.errors import CaddieError, Conflict, NotFound
from orchestrator.standing import ranked
from orchestrator.study import Study, Trial
from worker.recipes import load_recipe, recipe_names
from worker.spec import InvalidSpec, Problem, TrialSpec, parse_spec

LEADERS = 5
KEY = re.compile(r"[\x21-\x7e]{1,255}")
OPEN = frozenset({"sharing", REST})
"""The sections that are open from the start."""
SEARCHED = "searched"

router = APIRouter(include_in_schema=False)

Start = Annotated[
    str,
    Query(
        pattern=r"^(base|trial/\d{1,10}|[a-z0-9-]{1,64}/(full|tiny))$",
        description="What the form starts from: base, trial/3, or a recipe and its size, such as ebls/tiny.",
    ),
]


@dataclass(frozen=True)
class Draft:
    """A form as far as it is filled in: what it started from, and the spec that it says, or what is wrong with it."""

    study: Study
    start: str
    begin: TrialSpec
    texts: Mapping[str, str]
    changes: dict[str, Any]
    spec: TrialSpec | None
    problems: tuple[Problem, ...] = ()

    @classmethod
    def of(cls, session: Session, name: str, start: str, form: Mapping[str, str]) -> "Draft":
        """What the form says. Raises NotFound where there is nothing to start from."""
        study = store.get_study(session, name)
        begin = _begin(session, study, start)
        texts = texts_of(begin) | {path: text for path, text in form.items() if "." in path or path == "seed"}
        changes = overrides_of(begin, texts)
        try:
            spec = TrialIn(spec=begin.model_dump(mode="json"), overrides=changes).build(study.definition)
        except InvalidSpec as error:
            return cls(study, start, begin, texts, changes, None, error.problems)
        return cls(study, start, begin, texts, changes, spec)


async def _start(start: Start = "base") -> str:
    return start


def _draft(study: StudyName, form: FormOf, start: Annotated[str, Depends(_start)], database: DatabaseOf) -> Draft:
    with database.read() as session:
        return Draft.of(session, study, start, form)


StartOf = Annotated[str, Depends(_start)]
DraftOf = Annotated[Draft, Depends(_draft)]


@router.get("/studies/{study}/new")
def show_form(request: Request, study: StudyName, start: StartOf, context: ContextOf) -> HTMLResponse:
    """The form, filled in with what it starts from."""
    with context.database.read() as session:
        draft = Draft.of(session, study, start, {})
    return _show(request, context, draft)


@router.post("/studies/{study}/new/preview", openapi_extra={"x-role": "viewer"})
def show_preview(request: Request, draft: DraftOf, context: ContextOf) -> HTMLResponse:
    """What the form's trial would be, as a part of the page, and what is wrong with it."""
    return page(request, "new_trial_live.html", **_preview_facts(context, draft))


@router.post("/studies/{study}/new")
def submit_form(request: Request, draft: DraftOf, form: FormOf, context: ContextOf, writer: WriterOf) -> Response:
    """Submit the form's trial and go on to its page. Or show the form again: with what is wrong at each field, or with
    what it would be where that was all that was asked."""
    if draft.spec is None:
        return _show(request, context, draft, status=422)
    if "preview" in form:
        return _show(request, context, draft)
    key = form.get("key", "")
    try:
        submitted = submit(
            writer, draft.study, draft.spec,
            key=key if KEY.fullmatch(key) else None, allow_duplicate="allow_duplicate" in form,
        )  # fmt: skip
    except CaddieError as error:
        return _show(request, context, draft, error, status=409)
    return RedirectResponse(f"/studies/{draft.study.name}/trials/{submitted.trial.number}", 303)


def _begin(session: Session, study: Study, start: str) -> TrialSpec:
    if start == "base":
        return parse_spec(study.definition.base)
    name, _, which = start.rpartition("/")
    if name == "trial":
        number = int(which)
        if number > LARGEST_ID:
            raise NotFound("trial", number)
        return store.get_trial(session, study.id, number).spec
    if name not in recipe_names():
        raise NotFound("recipe", name)
    return parse_spec(load_recipe(name, which))


def _show(
    request: Request, context: Context, draft: Draft, refused: CaddieError | None = None, status: int = 200
) -> HTMLResponse:
    with context.database.read() as session:
        leaders = [one.number for one in ranked(seeds.list_standings(session, draft.study.id, LEADERS))[:LEADERS]]
    return page(
        request, "new_trial.html", status, **_preview_facts(context, draft), refused=refused,
        conflict=refused if isinstance(refused, Conflict) else None, sections=_sections(draft),
        recipes=recipe_names(), leaders=leaders, key=secrets.token_urlsafe(16),
    )  # fmt: skip


def _preview_facts(context: Context, draft: Draft) -> dict[str, Any]:
    spec, study = draft.spec, draft.study
    before = texts_of(draft.begin)
    facts: dict[str, Any] = {
        "draft": draft, "study": study, "shown": None, "problems": placed(draft.problems),
        "changes": [(path, before.get(path, ""), draft.texts[path]) for path in draft.changes],
    }  # fmt: skip
    if spec is None:
        return facts
    with context.database.read() as session:
        calibration = context.calibrations.read(session, study.id)
        twin = store.find_trial(session, study.id, spec_hash=spec.canonical_hash)
    return facts | _shown(study, spec, calibration, twin)


def _shown(study: Study, spec: TrialSpec, calibration: Calibration, twin: Trial | None) -> dict[str, Any]:
    shown = preview(spec, study.definition, calibration.predict, calibration.shares)
    prediction = shown.prediction
    by_class = {name.value: float(size.expected) for name, size in shown.bytes_by_class.items() if size.expected}
    by_class["code"] = float(prediction.code_bytes)
    interval = (prediction.artifact_bytes_low, prediction.artifact_bytes_high)
    return {
        "shown": shown, "twin": twin, "by_class": by_class,
        "bar": Markup(bytes_bar(by_class, study.definition.cap_bytes, interval)),
        "picture": Markup(tying_picture(spec.sharing, unet_skips=spec.model.unet_skips)),
    }  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A field as the page shows it."""

    field: Field
    label: str
    text: str
    start: str
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Group:
    """Rows under a title. A group with a problem, or a change, is open."""

    name: str
    title: str
    help: str
    rows: tuple[Row, ...]
    open: bool


def _sections(draft: Draft) -> list[Group]:
    """The form's groups: what the study searches first, then the parts of a spec without it."""
    problems, starts = placed(draft.problems), texts_of(draft.begin)
    searched: list[Row] = []
    groups = []
    for section in sections():
        rows: list[Row] = []
        for field in section.fields:
            path = field.path
            mine = any(path == one or path.startswith(f"{one}.") for one in draft.study.definition.space)
            label = path if mine else path.removeprefix(f"{section.name}.")
            row = Row(
                field, label.replace("_", " ").replace(".", " · "), draft.texts[path], starts[path],
                tuple(problems.get(path, ())),
            )  # fmt: skip
            (searched if mine else rows).append(row)
        if rows:
            title = "Seed" if section.name == REST else section.name.capitalize()
            groups.append(Group(section.name, title, section.help, tuple(rows), _is_open(section.name, rows)))
    if searched:
        words = "The paths that the study’s own proposals vary."
        groups.insert(0, Group(SEARCHED, "What the study searches", words, tuple(searched), True))
    return groups


def _is_open(name: str, rows: list[Row]) -> bool:
    return name in OPEN or any(row.problems or row.text != row.start for row in rows)
