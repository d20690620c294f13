"""Recipes: named specs from the literature, one YAML file each."""

from importlib.resources import files
from typing import Any

import yaml

from worker.spec import InvalidSpec, Problem


def recipe_names() -> tuple[str, ...]:
    """The names of all recipes, sorted."""
    return tuple(
        sorted(entry.name.removesuffix(".yaml") for entry in files(__name__).iterdir() if entry.name.endswith(".yaml"))
    )


def load_recipe(name: str) -> dict[str, Any]:
    """A recipe's plain data, ready for overrides and parse_spec. Raises InvalidSpec for a name that does not exist."""
    if name not in recipe_names():
        raise InvalidSpec((Problem("recipe", name, f"must be one of {', '.join(recipe_names())}"),))
    data: dict[str, Any] = yaml.safe_load((files(__name__) / f"{name}.yaml").read_text())
    return data
