"""What several commands take, how they reach the API, and how they print what it answers."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, TypeVar

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.text import Text

from api.client import Caddie
from api.completion import recipes, spec_settings, study_names, trial_numbers
from api.tables import Grid, plain
from orchestrator.settings import Settings

StudyName = Annotated[str, typer.Argument(help="The study's name.", autocompletion=study_names)]
TrialNumber = Annotated[int, typer.Argument(help="The trial's number.", min=0, autocompletion=trial_numbers)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Replace one field; repeatable.", autocompletion=spec_settings
    ),
]  # fmt: skip
RecipeSize = Annotated[
    str, typer.Option("--size", metavar="full|tiny", help="The recipe's: as published, or tiny, for one CPU core.")
]
SpecName = Annotated[str, typer.Argument(help="A recipe's name or a spec file (YAML or JSON).", autocompletion=recipes)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
AsJsonLines = Annotated[bool, typer.Option("--json", help="Print JSON for scripts, one object a line.")]


Line = TypeVar("Line", bound=BaseModel)


def connect() -> Caddie:
    """A client of the API that CADDIE_URL names, with CADDIE_TOKEN."""
    settings = Settings.read(os.environ)
    return Caddie(settings.url, token=settings.token or "")


def answer(value: BaseModel | Sequence[BaseModel], as_json: bool, *parts: Grid | str) -> None:
    """Print what the API answered: as one JSON document, or the parts of it as a person reads them."""
    if as_json:
        many = [one.model_dump(mode="json") for one in value] if isinstance(value, Sequence) else None
        print(json.dumps(many, indent=2) if isinstance(value, Sequence) else value.model_dump_json(indent=2))
    else:
        show(*parts)


def show(*parts: Grid | str, console: Console | None = None) -> None:
    """Print tables and lines: fitted and coloured on a terminal, and as they are anywhere else."""
    screen = console or Console(highlight=False)
    for number, part in enumerate(parts):
        if number and isinstance(part, Grid) and part.title:
            print(file=screen.file)
        if not screen.is_terminal:
            lines = part.lines() if isinstance(part, Grid) else map(plain, part.split("\n"))
            print(*lines, sep="\n", file=screen.file, flush=True)  # a child may write next, and a reader may follow
        else:
            screen.print(part if isinstance(part, Grid) else Text("\n".join(map(plain, part.split("\n")))))


def print_lines(values: Iterable[Line], as_json: bool, line: Callable[[Line], str]) -> None:
    """Print each value as it comes: as JSON, or as one line that a person reads."""
    for value in values:
        print(value.model_dump_json() if as_json else plain(line(value)), flush=True)


def remark(text: str) -> None:
    """Say on stderr what is no part of the output."""
    print(f"caddie: {plain(text)}", file=sys.stderr)
