"""Recipes: named specs from the literature, one YAML file each; and how what a person typed is read."""

import math
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from worker.recipes.tiny import tiny
from worker.spec import InvalidSpec, Problem

Size = Literal["full", "tiny"]


def recipe_names() -> tuple[str, ...]:
    """The names of all recipes, sorted."""
    return tuple(
        sorted(entry.name.removesuffix(".yaml") for entry in files(__name__).iterdir() if entry.name.endswith(".yaml"))
    )


def load_recipe(name: str, size: str = "full") -> dict[str, Any]:
    """A recipe's plain data, ready for overrides and parse_spec: as published, or tiny, for one CPU core.

    Raises InvalidSpec for a name or a size that does not exist.
    """
    if name not in recipe_names():
        raise InvalidSpec((Problem("recipe", name, f"must be one of {', '.join(recipe_names())}"),))
    if size not in get_args(Size):
        raise InvalidSpec((Problem("size", size, f"must be one of {', '.join(get_args(Size))}"),))
    data: dict[str, Any] = yaml.safe_load((files(__name__) / f"{name}.yaml").read_text())
    return tiny(data) if size == "tiny" else data


def require_full(size: str) -> None:
    """Raises InvalidSpec where a size was asked for and there is no recipe that it could be the size of."""
    if size != "full":
        raise InvalidSpec((Problem("size", size, "needs a recipe: a spec says its own sizes"),))


def read_mapping(path: Path) -> dict[str, Any]:
    """What a file of YAML or JSON holds. Raises InvalidSpec."""
    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidSpec((Problem("file", str(path), _said(error)),)) from None
    if not isinstance(data, dict):
        raise InvalidSpec((Problem("file", str(path), "must hold a mapping"),))
    return data


def overrides_of(pairs: Sequence[str] | None) -> dict[str, Any]:
    """Values by path, of PATH=VALUE each, the value in YAML. Raises InvalidSpec."""
    changes: dict[str, Any] = {}
    for pair in pairs or ():
        path, equals, text = pair.partition("=")
        if not equals or not path:
            raise InvalidSpec((Problem("--set", pair, "must be PATH=VALUE, such as sharing.lora.rank=4"),))
        try:
            changes[path] = read_yaml(text, path)
        except yaml.YAMLError as error:
            raise InvalidSpec((Problem(path, text, _said(error)),)) from None
    return changes


def read_yaml(text: str, place: str = "") -> Any:
    """What YAML says, in JSON's types; a date is text. Raises yaml.YAMLError where it is none, or gives a key twice.

    Raises InvalidSpec for what JSON cannot say, naming its path below `place`.
    """
    try:
        data = yaml.load(text, _Loader)  # a SafeLoader
        problems = tuple(_beyond_json(data, place))
    except RecursionError:
        raise InvalidSpec((Problem(place or "file", text[:80], "is nested too deeply, or in itself"),)) from None
    if problems:
        raise InvalidSpec(problems)
    return data


def _said(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"is no YAML: {error.problem} in line {error.problem_mark.line + 1}"
    said = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
    return f"{'is no YAML' if isinstance(error, yaml.YAMLError) else 'cannot be read'}: {said}"


class _Loader(yaml.SafeLoader):
    """YAML without timestamps, since a dataset may be named 2024-01-01, and with no key twice, which loses a value."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        firsts: dict[tuple[str, str], yaml.ScalarNode] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                first = firsts.setdefault((key.tag, key.value), key)
                if first is not key:
                    message = f"the key {key.value!r} of line {first.start_mark.line + 1} is given again"
                    raise yaml.MarkedYAMLError(problem=message, problem_mark=key.start_mark)
        return node

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        return "tag:yaml.org,2002:str" if tag == "tag:yaml.org,2002:timestamp" else tag


def _beyond_json(data: Any, path: str) -> Iterator[Problem]:
    if isinstance(data, dict):
        for key, value in data.items():
            if not isinstance(key, str):
                yield Problem(path or "file", key, "is a key, and must be text: put it in quotes")
            yield from _beyond_json(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, list):
        for place, value in enumerate(data):
            yield from _beyond_json(value, f"{path}.{place}" if path else str(place))
    elif isinstance(data, float) and not math.isfinite(data):
        yield Problem(path or "file", data, "must be a finite number")
    elif not isinstance(data, str | int | float | None):
        yield Problem(
            path or "file", data, f"is a {type(data).__name__}, which JSON cannot say: must be text or a number"
        )
