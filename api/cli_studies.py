"""Commands about studies: `caddie study VERB STUDY`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from api.arguments import limit_of
from api.client import Caddie
from api.options import AsJson, Overrides, StudyName, answer, connect
from api.tables import Grid
from api.terminal import study_preview_lines
from api.terminal_studies import (
    activity_table,
    arms_tables,
    importance_parts,
    pareto_table,
    stopping_lines,
    studies_table,
    study_lines,
)
from orchestrator.lifecycle import StudyState
from worker.recipes import overrides_of, read_mapping

app = typer.Typer(help="Create, list, read and steer studies.", no_args_is_help=True)
Limit = Annotated[str | None, typer.Option(metavar="NUMBER|none", help="Of the study's budget.")]


@app.command("create")
def create_study(
    file: Annotated[
        Path, typer.Argument(help="A study file (YAML or JSON): name, recipe or base, space, max_trials, ...")
    ],
    as_json: AsJson = False,
) -> None:
    """Create a study from a file; it runs at once."""
    with connect() as caddie:
        study = caddie.create_study(read_mapping(file))
    answer(study, as_json, f"study {study.name} is {study.state}")


@app.command("preview")
def preview_study(
    file: Annotated[Path, typer.Argument(help="A study file, as `caddie study create` takes it.")],
    samples: Annotated[int, typer.Option(help="How many points to draw.", min=1, max=1000)] = 20,
    as_json: AsJson = False,
) -> None:
    """Random points of a study that does not exist yet, and how many would be refused. Needs no server."""
    from api.bodies import StudyIn  # what a server loads comes with these, and no other command needs it
    from api.previews import StudyPreviewOut
    from orchestrator.sample import draw_samples

    definition = StudyIn.model_validate(read_mapping(file)).definition()
    found = StudyPreviewOut.of(draw_samples(definition, samples))
    answer(found, as_json, *study_preview_lines(definition.name, found))


@app.command("list")
def list_studies(
    state: Annotated[list[StudyState] | None, typer.Option(help="Only of this state; repeatable.")] = None,
    archived: Annotated[bool, typer.Option("--archived", help="Those that were archived.")] = False,
    as_json: AsJson = False,
) -> None:
    """Studies in use, or those that were archived."""
    with connect() as caddie:
        studies = caddie.studies(state=state or (), archived=archived)
    answer(studies, as_json, studies_table(studies))


@app.command("show")
def show_study(study: StudyName, as_json: AsJson = False) -> None:
    """One study: its state, progress, best trial, budget and space."""
    with connect() as caddie:
        found = caddie.study(study)
    answer(found, as_json, *study_lines(found))


@app.command("update")
def update_study(
    study: StudyName,
    max_trials: Annotated[int | None, typer.Option(help="How many the search may propose.", min=0)] = None,
    gpu_hours: Limit = None,
    dollars: Limit = None,
    wall_hours: Limit = None,
    priority: Annotated[
        int | None, typer.Option(help="Studies of a higher one get free gangs first; 0 to begin with.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Change how far a study may go, and when its turn is. What is not named stays; `none` lifts a limit."""
    limits = {"gpu_hours": gpu_hours, "dollars": dollars, "wall_hours": wall_hours}
    spending = {name: limit_of(name, text) for name, text in limits.items() if text is not None}
    named = {"max_trials": max_trials, "priority": priority, "spending": spending or None}
    changes = {name: value for name, value in named.items() if value is not None}
    if not changes:
        raise typer.BadParameter("give --max-trials, --gpu-hours, --dollars, --wall-hours or --priority")
    with connect() as caddie:
        changed = caddie.change_study(study, changes)
    answer(changed, as_json, *study_lines(changed))


@app.command("clone")
def clone_study(
    study: StudyName,
    name: Annotated[str, typer.Argument(help="The new study's name.")],
    overrides: Overrides = None,
    file: Annotated[Path | None, typer.Option(help="What else is to differ, as in a study file: space, ...")] = None,
    as_json: AsJson = False,
) -> None:
    """Create a study like another one, without its trials; --set changes fields of its base."""
    changes = {} if file is None else read_mapping(file)
    with connect() as caddie:
        made = caddie.clone_study(study, {**changes, "name": name, "overrides": overrides_of(overrides)})
    answer(made, as_json, f"study {made.name} is {made.state}")


READS: dict[str, tuple[str, Callable[[Caddie, str], Any], Callable[[Any], Sequence[Grid | str]]]] = {
    "pareto": (
        "The trials that no other beats in both BPB and bytes.", Caddie.pareto, lambda found: [pareto_table(found)],
    ),
    "importance": (
        "Which parameters matter, and how the families of tying maps compare.", Caddie.importance, importance_parts,
    ),
    "arms": ("What proposed the study's trials, and what came of it.", Caddie.arms, arms_tables),
    "activity": ("What the study's gangs are doing now.", Caddie.activity, lambda found: [activity_table(found)]),
    "stopping": (
        "How often runs were stopped early, and how often that would have been a mistake.", Caddie.stopping,
        stopping_lines,
    ),
}  # fmt: skip


def _read(fetch: Callable[[Caddie, str], Any], parts: Callable[[Any], Sequence[Grid | str]]) -> Callable[..., None]:
    def command(study: StudyName, as_json: AsJson = False) -> None:
        with connect() as caddie:
            found = fetch(caddie, study)
        answer(found, as_json, *parts(found))

    return command


for _name, (_help, _fetch, _parts) in READS.items():
    app.command(_name, help=_help)(_read(_fetch, _parts))


MOVES = {
    "pause": "Start nothing more; what runs finishes.",
    "resume": "Let a paused study run on; what it paused for is tried again.",
    "stop": "End a study: queued trials are cancelled, what runs finishes.",
    "archive": "Put an ended study out of sight; nothing of it is lost.",
    "unarchive": "Put an archived study back among the others.",
}


def _steer(move: str) -> Callable[..., None]:
    def command(study: StudyName, as_json: AsJson = False) -> None:
        with connect() as caddie:
            moved = caddie.move_study(study, move)
        archived = ", and archived" if moved.archived_at else ""
        answer(moved, as_json, f"study {moved.name} is {moved.state}{archived}")

    return command


for _move, _meaning in MOVES.items():
    app.command(_move, help=_meaning)(_steer(_move))
