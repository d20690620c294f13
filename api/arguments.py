"""What the command line is given: specs, files and values, read. All raise InvalidSpec, naming what is wrong."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from worker.recipes import load_recipe, read_mapping, read_yaml, recipe_names, require_full
from worker.spec import InvalidSpec, Problem


def read_spec(name: str, size: str) -> dict[str, Any]:
    """A recipe by its name, in this size, or a spec file by its path."""
    if name in recipe_names():
        return load_recipe(name, size)
    if not Path(name).is_file():
        raise InvalidSpec((Problem("spec", name, f"is neither a file nor a recipe ({', '.join(recipe_names())})"),))
    require_full(size)
    return read_mapping(Path(name))


def read_results(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every spec with its result in a file: one JSON value, or one a line."""
    try:
        text = path.read_text(encoding="utf-8")
        try:
            values = [json.loads(text)]
        except ValueError:
            values = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InvalidSpec((Problem("file", str(path), " ".join(str(error).split())),)) from None
    for number, value in enumerate(values, 1):
        parts = [value.get("spec"), value.get("result")] if isinstance(value, dict) else []
        if not parts or not all(isinstance(part, dict) for part in parts):
            message = f"value {number} must be an object with a spec and a result"
            raise InvalidSpec((Problem("file", str(path), message),))
        yield value["spec"], value["result"]


def read_bodies(path: Path) -> list[dict[str, Any]]:
    """The trials that a file has, as the API takes them: a list in YAML or JSON, or JSON one a line; - is stdin.

    Each is a mapping that may have spec, recipe, size, params, overrides and allow_duplicate.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.strip()]
        by_line = len(lines) > 1 and all(line.lstrip().startswith("{") for line in lines)
        found = [json.loads(line) for line in lines] if by_line else read_yaml(text)
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise InvalidSpec((Problem("file", str(path), " ".join(str(error).split())),)) from None
    if not isinstance(found, list) or not found or not all(isinstance(body, dict) for body in found):
        raise InvalidSpec((Problem("file", str(path), "must hold a list of trials, each a mapping"),))
    return found


def limit_of(name: str, text: str) -> float | None:
    """A number, or none where the limit is to be lifted."""
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise InvalidSpec((Problem(f"--{name.replace('_', '-')}", text, "must be a number, or none"),)) from None


def numbers_of(option: str, text: str) -> list[float]:
    """Numbers with commas between."""
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise InvalidSpec((Problem(option, text, "must be numbers with commas between"),)) from None
