"""Commands that show what happens while it does."""

from typing import Annotated

import typer
from rich.console import Console

from api.completion import study_names
from api.options import AsJson, AsJsonLines, StudyName, answer, connect, print_lines
from api.terminal_studies import cluster_parts
from api.terminal_trials import event_line
from api.watch import came_to_nothing, watch_study


def watch(study: StudyName) -> None:
    """Follow a study until it ends: progress, cost, gangs, leaders. Exits 1 where nothing came of it."""
    with connect() as caddie:
        ended = watch_study(Console(highlight=False), caddie, study)
    if came_to_nothing(ended):
        raise typer.Exit(1)


def events(
    study: Annotated[str | None, typer.Argument(help="A study; none means all.", autocompletion=study_names)] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C.")] = False,
    after: Annotated[int, typer.Option(metavar="ID", help="Only events with higher ids.", min=0)] = 0,
    as_json: AsJsonLines = False,
) -> None:
    """State changes, oldest first: of a study, or of everything."""
    with connect() as caddie:
        print_lines(caddie.events(study, after, follow=follow), as_json, event_line)


def cluster(
    hours: Annotated[float, typer.Option(help="The length of the window that ends now.", max=168)] = 1.0,
    as_json: AsJson = False,
) -> None:
    """What each gang does, how much of the last hours it was idle, and what waits."""
    with connect() as caddie:
        found = caddie.cluster(hours)
    answer(found, as_json, *cluster_parts(found))
