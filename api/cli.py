"""`caddie`: the command line. A command about one study is `caddie study VERB STUDY`, one about one trial `caddie trial
VERB STUDY NUMBER`; what one does daily has a short form besides.

Exits 0 when done, 2 for bad input, 1 for other failures, 130 (by Typer) after Ctrl-C: a failure is one line on stderr.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import typer
from pydantic import ValidationError
from typer.exceptions import TyperException

from api import cli_live, cli_processes, cli_results, cli_studies, cli_submission, cli_tokens, cli_trials
from api.client import ApiError, ClientError, Unreachable
from api.completion import study_names
from api.options import remark
from worker.shape import FieldError
from worker.spec import InvalidSpec, problems_of

ALL, SUBMIT, FOLLOW, RESULTS = "Studies and trials", "Trials to run", "What happens", "What came of it"
ACCESS, MACHINE = "Who may", "This machine"
COMMANDS: Mapping[str, tuple[str, Callable[..., None]]] = {
    "up": (MACHINE, cli_processes.up),
    "demo": (MACHINE, cli_processes.demo),
    "doctor": (MACHINE, cli_processes.doctor),
    "migrate": (MACHINE, cli_processes.migrate),
    "api": (MACHINE, cli_processes.api),
    "orchestrator": (MACHINE, cli_processes.orchestrator),
    "work": (MACHINE, cli_processes.work),
    "recipes": (SUBMIT, cli_submission.recipes),
    "preview": (SUBMIT, cli_submission.preview),
    "submit": (SUBMIT, cli_submission.submit),
    "import": (SUBMIT, cli_submission.import_results),
    "cancel": (SUBMIT, cli_trials.cancel),
    "watch": (FOLLOW, cli_live.watch),
    "events": (FOLLOW, cli_live.events),
    "cluster": (FOLLOW, cli_live.cluster),
    "leaderboard": (RESULTS, cli_results.leaderboard),
    "compare": (RESULTS, cli_results.compare),
    "verdict": (RESULTS, cli_results.verdict),
    "ledger": (RESULTS, cli_results.ledger),
    "me": (ACCESS, cli_tokens.me),
    "audit": (ACCESS, cli_tokens.audit),
}

app = typer.Typer(
    help="Search how layers share weights. `caddie up` starts everything on this machine; `caddie demo` shows a sweep.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for _name, (_panel, _command) in COMMANDS.items():
    app.command(_name, rich_help_panel=_panel)(_command)
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
app.command("data", rich_help_panel=MACHINE, context_settings=PASSED_ON)(cli_processes.data)
app.add_typer(cli_studies.app, name="study", rich_help_panel=ALL)
app.add_typer(cli_trials.app, name="trial", rich_help_panel=ALL)
app.add_typer(cli_tokens.app, name="token", rich_help_panel=ALL)


def main() -> None:
    """The console script."""
    try:
        code: Any = app(prog_name="caddie", standalone_mode=False)  # what it exits with; nothing where it just ends
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output, such as `head`, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except TyperException as error:
        _explain(error)
    except (InvalidSpec, FieldError) as error:
        _fail(str(error), 2)
    except ValidationError as error:
        _fail("; ".join(str(problem) for problem in problems_of(error)), 2)
    except ApiError as error:
        _fail(f"{error}{_nearest(error)}", 2 if error.status < 500 else 1)
    except Unreachable as error:
        _fail(f"{error}; is `caddie up` running?", 1)
    except (ClientError, OSError) as error:  # a folder that cannot be made or written to, say
        _fail(str(error), 1)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _explain(error: TyperException) -> None:
    """What is wrong with the words of a command. One without any has printed its help."""
    message, context = error.format_message().replace(": Value error, ", ": "), getattr(error, "ctx", None)
    if not message.strip():
        sys.exit(error.exit_code)
    help_at = f" ({context.command_path} --help says more)" if context else ""
    wrong = error.__cause__  # Typer itself does not always say which value it was
    value = repr(wrong.errors()[0]["input"]) if isinstance(wrong, ValidationError) else ""
    got = f", got {value}" if value not in message else ""
    _fail(f"{message.rstrip('.')}{got}{help_at}", error.exit_code)


def _nearest(error: ApiError) -> str:
    """The study that was perhaps meant, where there is none of the name that was given."""
    wrong = re.fullmatch(r"no study '(.*)'", str(error)) if error.status == 404 else None
    near = get_close_matches(wrong[1], study_names(), 1) if wrong else []
    return f"; did you mean {near[0]}?" if near else ""


def _fail(message: str, code: int) -> None:
    remark(" ".join(message.split()))
    sys.exit(code)


if __name__ == "__main__":
    main()
