"""`caddie`: the command line. Exits 0 when done, 2 for bad input, 1 for other failures: one line on stderr."""

import hashlib
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from sqlalchemy.exc import DBAPIError

from api.arguments import numbers_of, overrides_of, read_mapping, read_results, read_spec
from api.bodies import StudyIn
from api.client import ApiError, Caddie, Unreachable
from api.previews import PreviewOut, StudyPreviewOut
from api.program import environment_of, program
from api.terminal import (
    leaderboard_notes,
    leaderboard_table,
    ledger_tables,
    preview_lines,
    studies_table,
    study_preview_lines,
    trial_lines,
    verdict_lines,
    watch_study,
)
from api.token_commands import token_app
from orchestrator.caps import Caps
from orchestrator.feasibility import judge, predict
from orchestrator.sample import draw_samples
from orchestrator.settings import KNOWN, Settings
from orchestrator.study import CAP_BYTES
from worker.recipes import require_full
from worker.shape import FieldError
from worker.spec import InvalidSpec, override, parse_spec, problems_of

app = typer.Typer(
    help="Search how layers share weights. `caddie up` starts everything on this machine; `caddie demo` shows a sweep.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
study_app = typer.Typer(help="Create, list and steer studies.", no_args_is_help=True)
app.add_typer(study_app, name="study")
app.add_typer(token_app, name="token")

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Replace one field; repeatable.")
]
RecipeSize = Annotated[
    str, typer.Option("--size", metavar="full|tiny", help="The recipe's: as published, or tiny, for one CPU core.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
StudyName = Annotated[str, typer.Argument(help="The study's name.")]


def main() -> None:
    """The console script."""
    try:
        app(standalone_mode=True)
    except (InvalidSpec, FieldError) as error:
        _fail(str(error), 2)
    except ValidationError as error:
        _fail("; ".join(str(problem) for problem in problems_of(error)), 2)
    except ApiError as error:
        _fail(str(error), 2 if error.status < 500 else 1)
    except Unreachable as error:
        _fail(f"{error}; is `caddie up` running?", 1)
    except DBAPIError as error:  # a database that does not answer, or that refuses
        _fail(f"the database: {' '.join(str(error.orig).split())}", 1)
    except OSError as error:  # a folder that cannot be made or written to
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


@app.command()
def up(
    home: Annotated[Path | None, typer.Option(help=KNOWN["CADDIE_HOME"])] = None,
    port: Annotated[int | None, typer.Option(help=KNOWN["CADDIE_PORT"])] = None,
    ranks: Annotated[int | None, typer.Option(help=KNOWN["CADDIE_RANKS"])] = None,
    launcher: Annotated[str | None, typer.Option(help=KNOWN["CADDIE_LAUNCHER"])] = None,
) -> None:
    """Run the API, the loop, a local Ray and the database: one process tree, until Ctrl-C."""
    from api.up import up  # the server's imports take a second that no other command should pay

    flags = {"CADDIE_HOME": home, "CADDIE_PORT": port, "CADDIE_RANKS": ranks, "CADDIE_LAUNCHER": launcher}
    chosen = {name: str(value) for name, value in flags.items() if value is not None}
    settings = Settings.read({**os.environ, **chosen})
    up(settings, environment_of(settings))


@app.command()
def api() -> None:
    """Serve the API and pages alone, as docker-compose.yml does. Settings come from CADDIE_* variables."""
    from api.up import require_door, require_free_port, serve
    from orchestrator.database import Database

    settings = Settings.read(os.environ)
    require_free_port(settings)
    database = Database(settings.database_url)
    database.needs_migration()  # whether it answers at all: /readyz says whether the schema is ours
    require_door(settings, database, datetime.now(UTC))
    serve(settings, database)


@app.command()
def orchestrator() -> None:
    """Run the loop and its launcher alone, as docker-compose.yml does. Settings come from CADDIE_* variables."""
    environment = environment_of(Settings.read(os.environ))
    os.execve(sys.executable, program("orchestrator"), environment)  # not a child: signals must reach the loop


@app.command()
def migrate() -> None:
    """Bring the database to this version's schema. Safe to repeat, and by several at once."""
    from orchestrator.database import Database

    settings = Settings.read(os.environ)
    database = Database(settings.database_url)
    database.migrate()
    print(f"{database.url.render_as_string(hide_password=True)} is at this version's schema")


@app.command()
def doctor(
    clear: Annotated[bool, typer.Option("--clear", help="Clear what can be cleared without losing anything.")] = False,
    as_json: AsJson = False,
) -> None:
    """List what does not belong in the database, the artifacts or the Ray cluster; exit 1 while anything remains."""
    from api.doctor import run_doctor

    sys.exit(run_doctor(Settings.read(os.environ), clearing=clear, as_json=as_json))


@app.command()
def demo() -> None:
    """Run a small real sweep on this machine, show it live, and print its leaderboard. Again resumes it."""
    from api.demo import run_demo

    sys.exit(run_demo(Console()))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def data(context: typer.Context) -> None:
    """Build, fetch or list datasets: `caddie data build | fetch | list`."""
    command = program("worker", "data", *context.args)
    sys.exit(subprocess.call(command, env=environment_of(Settings.read(os.environ))))


@app.command()
def preview(
    spec: Annotated[str, typer.Argument(help="A recipe's name or a spec file (YAML or JSON).")],
    overrides: Overrides = None,
    size: RecipeSize = "full",
    cap_bytes: Annotated[int, typer.Option(help="The byte cap to judge by.", min=1)] = CAP_BYTES,
    as_json: AsJson = False,
) -> None:
    """What a spec would cost, without running it or needing a server: parameters, tying map, bytes, verdict."""
    parsed = parse_spec(override(read_spec(spec, size), overrides_of(overrides)))
    prediction = predict(parsed)
    answer = PreviewOut.of(parsed, prediction, cap_bytes, *judge(prediction, Caps(cap_bytes), parsed))
    print(answer.model_dump_json(indent=2) if as_json else "\n".join(preview_lines(spec, answer)))


@app.command()
def submit(
    study: StudyName,
    spec: Annotated[
        str | None, typer.Argument(help="A recipe's name or a spec file; none means the study's base.")
    ] = None,
    overrides: Overrides = None,
    size: RecipeSize = "full",
    key: Annotated[
        str | None, typer.Option("--key", help="Idempotency key: a retry with it returns the same trial.")
    ] = None,
    allow_duplicate: Annotated[
        bool, typer.Option(help="Where the study has this spec: run its trial at this seed, or at the next, too.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the trial; exit 1 unless it completes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit one trial to a study."""
    body: dict[str, Any] = {"overrides": overrides_of(overrides), "allow_duplicate": allow_duplicate}
    if spec is None:
        require_full(size)
        body["params"] = {}
    else:
        body["spec"] = override(read_spec(spec, size), body.pop("overrides"))
    with _client() as caddie:
        submitted = caddie.submit(study, body, idempotency_key=key)
        run_id = submitted.run_id
        trial = caddie.wait(study, submitted.number, run_id) if wait else submitted
        print(trial.model_dump_json(indent=2) if as_json else "\n".join(trial_lines(trial)))
    if wait and not any(run.id == run_id and run.state == "succeeded" for run in trial.runs):
        raise typer.Exit(1)


@app.command("import")
def import_results(
    study: StudyName,
    files: Annotated[
        list[Path],
        typer.Argument(help="JSON with spec and result, as `caddie trial --json` prints; or lines of it."),
    ],
) -> None:
    """Bring trials that were trained elsewhere into a study, with their results. Again adds nothing twice."""
    found = [(path, spec, result) for path in files for spec, result in read_results(path)]
    with _client() as caddie:
        for path, spec, result in found:
            key = hashlib.sha256(json.dumps([spec, result], sort_keys=True).encode()).hexdigest()
            trial = caddie.import_result(study, spec, result, idempotency_key=key)
            print(f"{path}: trial {trial.number} is {trial.state}")


@app.command()
def watch(study: StudyName) -> None:
    """Follow a study until it ends: progress, what runs, and the leaders so far."""
    with _client() as caddie:
        watch_study(Console(), caddie, study)


@app.command()
def leaderboard(study: StudyName, as_json: AsJson = False) -> None:
    """The study's complete trials by the mean of their seeds, best first."""
    with _client() as caddie:
        board = caddie.leaderboard(study)
    if as_json:
        print(board.model_dump_json(indent=2))
    else:
        Console().print(leaderboard_table(board.rows, f"Leaderboard of {study}"))
        print(*leaderboard_notes(board), sep="\n")


@app.command()
def verdict(
    study: StudyName,
    number: int,
    against: Annotated[int | None, typer.Option(help="Another trial; else the best other one.")] = None,
    losses: Annotated[
        str, typer.Option(metavar="2.1,2.2,...", help="Or a record's losses from elsewhere, in nats per token.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Whether a trial sets a record by the challenge's rule, and what is missing; exit 1 while it does not."""
    with _client() as caddie:
        found = caddie.verdict(study, number, against=against, losses=numbers_of("--losses", losses))
    print(found.model_dump_json(indent=2) if as_json else "\n".join(verdict_lines(found)))
    if not found.record:
        raise typer.Exit(1)


@app.command()
def ledger(
    study: StudyName,
    number: Annotated[int | None, typer.Argument(help="A trial's number, for what that cost.")] = None,
    as_json: AsJson = False,
) -> None:
    """What attempts of a study, or of one trial, have cost: by phase, and by the gangs and trials that cost most."""
    with _client() as caddie:
        found = caddie.ledger(study, number)
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        Console().print(*ledger_tables(found))


@app.command()
def trial(study: StudyName, number: int, as_json: AsJson = False) -> None:
    """One trial, with its attempts and result."""
    with _client() as caddie:
        found = caddie.trial(study, number)
    print(found.model_dump_json(indent=2) if as_json else "\n".join(trial_lines(found)))


@app.command()
def cancel(study: StudyName, number: int) -> None:
    """Cancel a queued or running trial."""
    with _client() as caddie:
        print("\n".join(trial_lines(caddie.cancel(study, number))))


@study_app.command("create")
def create_study(
    file: Annotated[
        Path, typer.Argument(help="A study file (YAML or JSON): name, recipe or base, space, max_trials, ...")
    ],
    as_json: AsJson = False,
) -> None:
    """Create a study from a file; it runs at once."""
    with _client() as caddie:
        study = caddie.create_study(read_mapping(file))
    print(study.model_dump_json(indent=2) if as_json else f"study {study.name} is {study.state}")


@study_app.command("preview")
def preview_study(
    file: Annotated[Path, typer.Argument(help="A study file, as `caddie study create` takes it.")],
    samples: Annotated[int, typer.Option(help="How many points to draw.", min=1, max=1000)] = 20,
    as_json: AsJson = False,
) -> None:
    """Random points of a study that does not exist yet, and how many would be refused. Needs no server."""
    definition = StudyIn.model_validate(read_mapping(file)).definition()
    answer = StudyPreviewOut.of(draw_samples(definition, samples))
    print(answer.model_dump_json(indent=2) if as_json else "\n".join(study_preview_lines(definition.name, answer)))


@study_app.command("list")
def list_studies(as_json: AsJson = False) -> None:
    """All studies."""
    with _client() as caddie:
        studies = caddie.studies()
    if as_json:
        print(json.dumps([study.model_dump(mode="json") for study in studies], indent=2))
    else:
        Console().print(studies_table(studies))


def _steer(move: str) -> None:
    def command(study: StudyName) -> None:
        with _client() as caddie:
            moved = caddie.move_study(study, move)
        print(f"study {moved.name} is {moved.state}")

    meaning = {
        "pause": "Start nothing more; what runs finishes.",
        "resume": "Let a paused study run on.",
        "stop": "End a study: queued trials are cancelled, what runs finishes.",
    }
    study_app.command(move, help=meaning[move])(command)


for _move in ("pause", "resume", "stop"):
    _steer(_move)


def _client() -> Caddie:
    return Caddie(Settings.read(os.environ).url)


def _fail(message: str, code: int) -> None:
    print(f"caddie: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
