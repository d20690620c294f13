"""Commands that say what came of a study's trials."""

from typing import Annotated

import typer

from api.arguments import numbers_of
from api.options import AsJson, StudyName, TrialNumber, answer, connect
from api.terminal_results import leaderboard_notes, leaderboard_table, ledger_tables, verdict_lines
from api.terminal_trials import comparison_table


def leaderboard(
    study: StudyName,
    limit: Annotated[int, typer.Option("--limit", "-n", help="How many at the most.", min=1, max=500)] = 100,
    as_json: AsJson = False,
) -> None:
    """The study's complete trials by the mean of their seeds, best first."""
    with connect() as caddie:
        board = caddie.leaderboard(study, limit)
    answer(board, as_json, leaderboard_table(board.rows, f"Leaderboard of {study}"), *leaderboard_notes(board))


def verdict(
    study: StudyName,
    number: TrialNumber,
    against: Annotated[int | None, typer.Option(help="Another trial; else the best other one.")] = None,
    losses: Annotated[
        str, typer.Option(metavar="2.1,2.2,...", help="Or a record's losses from elsewhere, in nats per token.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Whether a trial sets a record by the challenge's rule, and what is missing; exit 1 while it does not."""
    with connect() as caddie:
        found = caddie.verdict(study, number, against=against, losses=numbers_of("--losses", losses))
    answer(found, as_json, *verdict_lines(found))
    if not found.record:
        raise typer.Exit(1)


def ledger(
    study: StudyName,
    number: Annotated[int | None, typer.Argument(help="A trial's number, for what that cost.")] = None,
    as_json: AsJson = False,
) -> None:
    """What attempts of a study, or of one trial, have cost: by phase, and by the gangs and trials that cost most."""
    with connect() as caddie:
        found = caddie.ledger(study, number)
    answer(found, as_json, *ledger_tables(found))


def compare(
    study: StudyName,
    numbers: Annotated[list[int], typer.Argument(help="Two to five trials.", min=0)],
    as_json: AsJson = False,
) -> None:
    """Trials side by side: what differs between their specs, and what came of it."""
    if not 2 <= len(numbers) <= 5:
        raise typer.BadParameter("give two to five trials", param_hint="NUMBERS")
    with connect() as caddie:
        trials = [caddie.trial(study, number) for number in numbers]
    answer(trials, as_json, comparison_table(trials))
