"""Commands about trials: `caddie trial VERB STUDY NUMBER`, of which `show` need not be said."""

import sys
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from api.client import Wanted
from api.options import AsJson, AsJsonLines, StudyName, TrialNumber, answer, connect, print_lines, remark, show
from api.schemas import TagsOut, TrialOut
from api.terminal_trials import event_line, log_line, measurements_table, note_lines, trial_parts, trials_table
from orchestrator.lifecycle import TrialState
from orchestrator.study import Origin, Verdict


class Trials(TyperGroup):
    """`caddie trial STUDY NUMBER` shows that trial: the first word is no verb, and the second is a number."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        words = [word for word in args if not word.startswith("-")]
        if len(words) == 2 and words[1].isdecimal() and words[0] not in self.commands:
            args = ["show", *args]
        try:
            return super().resolve_command(ctx, args)
        except TyperException as error:
            error.message += " caddie trial STUDY NUMBER shows a trial, caddie trial list STUDY all of them"
            raise


app = typer.Typer(
    cls=Trials, help="List, read and steer trials. `caddie trial STUDY NUMBER` shows one.", no_args_is_help=True
)

FIELDS = ("number", "val_bpb", "artifact_bytes", "created_at", "finished_at")
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until the trial ends.")]


@app.command("list")
def list_trials(
    study: StudyName,
    state: Annotated[list[TrialState] | None, typer.Option(help="Only of this state; repeatable.")] = None,
    origin: Annotated[
        list[str] | None, typer.Option(metavar="|".join(get_args(Origin)), help="Only of this origin; repeatable.")
    ] = None,
    verdict: Annotated[
        list[str] | None, typer.Option(metavar="|".join(get_args(Verdict)), help="Only of this verdict; repeatable.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Only with this tag; repeatable.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Only those that this arm proposed; repeatable.")] = None,
    sort: Annotated[
        str, typer.Option(help="Ascending, or with a minus descending.", metavar="[-]" + "|".join(FIELDS))
    ] = "number",
    limit: Annotated[int, typer.Option("--limit", "-n", help="How many at the most; 0 is all.", min=0)] = 100,
    as_json: AsJson = False,
) -> None:
    """A study's trials, a line each. Bytes with a question mark are predicted."""
    wanted: Wanted = {
        "state": state or (), "origin": cast(list[Origin], origin or []),
        "verdict": cast(list[Verdict], verdict or []), "tag": tag or (), "arm": arm or (),
        "sort": sort,
    }  # fmt: skip
    with connect() as caddie:
        found = caddie.iter_trials(study, **wanted)
        trials = [trial for _, trial in zip(range(limit or sys.maxsize), found, strict=False)]
        more = limit and next(found, None) is not None
    answer(trials, as_json, trials_table(trials))
    if more:
        remark(f"only the first {limit}; --limit 0 gives all")


@app.command("show")
def show_trial(study: StudyName, number: TrialNumber, as_json: AsJson = False) -> None:
    """One trial: what it is, what came of it, its runs, attempts, tags and notes."""
    with connect() as caddie:
        found = caddie.trial(study, number)
    answer(found, as_json, *trial_parts(found))


@app.command("cancel")
def cancel(
    study: StudyName,
    number: TrialNumber,
    run: Annotated[
        int | None, typer.Option(help="Only the run of this id, a further seed of a complete trial.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Cancel a queued or running trial, or one of its further seeds."""
    with connect() as caddie:
        if run is not None:
            caddie.cancel_run(study, number, run)
        _answer(caddie.trial(study, number) if run is not None else caddie.cancel(study, number), as_json)


@app.command("retry")
def retry(study: StudyName, number: TrialNumber, as_json: AsJson = False) -> None:
    """Queue a failed or cancelled trial again."""
    with connect() as caddie:
        _answer(caddie.retry(study, number), as_json)


@app.command("seeds")
def add_seeds(
    study: StudyName,
    number: TrialNumber,
    seeds: Annotated[list[int] | None, typer.Argument(help="The seeds; or give --count.", min=0)] = None,
    count: Annotated[int, typer.Option(help="So many, the next of the study's list.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Run a complete trial at further seeds."""
    if bool(seeds) == bool(count):
        raise typer.BadParameter("give either seeds or --count")
    with connect() as caddie:
        runs = caddie.add_seeds(study, number, seeds or (), count=count)
        trial = caddie.trial(study, number)
    answer(runs, as_json, *trial_parts(trial))


@app.command("tag")
def tag(
    study: StudyName,
    number: TrialNumber,
    tags: Annotated[list[str] | None, typer.Argument(help="Tags to add; none lists those there are.")] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", help="A tag to take away; repeatable.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tag a trial, to find it by `caddie trial list --tag`."""
    with connect() as caddie:
        changes = tags or remove
        found = (
            caddie.change_tags(study, number, add=tags or (), remove=remove or ())
            if changes
            else caddie.trial(study, number).tags
        )
    answer(TagsOut(tags=found), as_json, *found)


@app.command("note")
def note(
    study: StudyName,
    number: TrialNumber,
    text: Annotated[str | None, typer.Argument(help="What to note (- reads stdin); none lists the notes.")] = None,
    delete: Annotated[int | None, typer.Option("--delete", metavar="ID", help="Delete the note of this id.")] = None,
    as_json: AsJson = False,
) -> None:
    """Note something about a trial, or read what was noted."""
    with connect() as caddie:
        if delete is not None:
            caddie.delete_note(study, number, delete)
        if text is not None:
            caddie.add_note(study, number, sys.stdin.read() if text == "-" else text)
        notes = caddie.notes(study, number)
    answer(notes, as_json, *(line for note in notes for line in note_lines(note)))


@app.command("events")
def events(study: StudyName, number: TrialNumber, as_json: AsJsonLines = False) -> None:
    """What happened to a trial, from the first on."""
    with connect() as caddie:
        print_lines(caddie.trial_events(study, number), as_json, event_line)


@app.command("measurements")
def measurements(study: StudyName, number: TrialNumber, as_json: AsJson = False) -> None:
    """What a trial's attempts measured as they trained, a step a line."""
    with connect() as caddie:
        found = caddie.measurements(study, number)
    answer(found, as_json, measurements_table(found))


@app.command("logs")
def logs(
    study: StudyName,
    number: TrialNumber,
    follow: Follow = False,
    tail: Annotated[int | None, typer.Option("--tail", "-n", help="Only the last lines.", min=0, max=1000)] = None,
    attempt: Annotated[
        int | None, typer.Option(help="Only of the attempt of this id, which `caddie trial` shows.")
    ] = None,
    as_json: AsJsonLines = False,
) -> None:
    """What a trial's latest attempt has logged; with --follow, all of its attempts from the last lines on."""
    with connect() as caddie:
        if follow:
            print_lines(caddie.follow_logs(study, number, tail=100 if tail is None else tail), as_json, log_line)
        else:
            print_lines(caddie.logs(study, number, attempt=attempt, tail=tail), as_json, log_line)


@app.command("artifact")
def artifact(
    study: StudyName,
    number: TrialNumber,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file to write.")] = None,
) -> None:
    """Download the stored model; it is checked against its digest. A download that broke off is gone on with."""
    with connect() as caddie:
        file = caddie.save_artifact(study, number, out or Path(f"{study}-{number}.caddie"))
    show(f"{file}: {file.stat().st_size:,} bytes")


def _answer(trial: TrialOut, as_json: bool) -> None:
    answer(trial, as_json, *trial_parts(trial)[:3])
