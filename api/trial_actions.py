"""What the buttons of a trial's page do: each is the API's own route, then the page again."""

import re
from typing import Any, TypeVar

from fastapi import APIRouter
from pydantic import BaseModel, ValidationError
from starlette.responses import RedirectResponse

from api.bodies import NoteIn, SeedsIn, TagsChange
from api.context import ContextOf, StudyName, TrialNumber, WriterOf
from api.forms import FormOf
from api.trials import (
    NoteId,
    RunId,
    add_seeds,
    add_trial_note,
    cancel_run,
    cancel_trial,
    change_trial_tags,
    delete_trial_note,
    retry_trial,
)
from worker.spec import InvalidSpec, problems_of

router = APIRouter(prefix="/studies/{study}/trials/{number}", include_in_schema=False)
Body = TypeVar("Body", bound=BaseModel)


@router.post("/cancel")
def cancel(study: StudyName, number: TrialNumber, context: ContextOf, writer: WriterOf) -> RedirectResponse:
    """End the trial."""
    cancel_trial(study, number, context, writer)
    return _back(study, number)


@router.post("/retry")
def retry(study: StudyName, number: TrialNumber, context: ContextOf, writer: WriterOf) -> RedirectResponse:
    """Queue the trial once more."""
    retry_trial(study, number, context, writer)
    return _back(study, number)


@router.post("/seeds")
def ask_for_seeds(
    study: StudyName, number: TrialNumber, form: FormOf, context: ContextOf, writer: WriterOf
) -> RedirectResponse:
    """Run the trial at the seeds of `seeds`, with commas or spaces between them, or at `count` of the study's own."""
    seeds = [_number(word) for word in _words(form.get("seeds", ""))]
    said: dict[str, Any] = {"seeds": seeds} if seeds else {"count": _number(form.get("count", ""))}
    add_seeds(study, number, _read(SeedsIn, said), context, writer)
    return _back(study, number)


@router.post("/runs/{run}/cancel")
def cancel_seed(
    study: StudyName, number: TrialNumber, run: RunId, context: ContextOf, writer: WriterOf
) -> RedirectResponse:
    """End one seed of a complete trial."""
    cancel_run(study, number, run, context, writer)
    return _back(study, number)


@router.post("/tags")
def change_tags(study: StudyName, number: TrialNumber, form: FormOf, writer: WriterOf) -> RedirectResponse:
    """Add the tags of `add`, with commas or spaces between them, and take away the one of `remove`."""
    said = {"add": _words(form.get("add", "")), "remove": _words(form.get("remove", ""))}
    change_trial_tags(study, number, _read(TagsChange, said), writer)
    return _back(study, number)


@router.post("/notes")
def write_note(study: StudyName, number: TrialNumber, form: FormOf, writer: WriterOf) -> RedirectResponse:
    """Add a note."""
    text = form.get("text", "").replace("\r\n", "\n").strip()
    add_trial_note(study, number, _read(NoteIn, {"text": text}), writer)
    return _back(study, number, "#notes")


@router.post("/notes/{note}/delete")
def remove_note(study: StudyName, number: TrialNumber, note: NoteId, writer: WriterOf) -> RedirectResponse:
    """Remove a note."""
    delete_trial_note(study, number, note, writer)
    return _back(study, number, "#notes")


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[\s,]+", text) if word]


def _read(body: type[Body], said: dict[str, Any]) -> Body:
    """What a form says, as the API's own body. Raises InvalidSpec."""
    try:
        return body.model_validate(said)
    except ValidationError as error:
        raise InvalidSpec(problems_of(error)) from None


def _back(study: str, number: int, place: str = "") -> RedirectResponse:
    return RedirectResponse(f"/studies/{study}/trials/{number}{place}", 303)


def _number(text: str) -> int | str:
    """What a form says, as the API would be sent it; text that is no number stays, and is refused by name."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else text
