"""What the shell offers where one presses Tab: names from the server, if it answers at once, and a spec's paths."""

import json
import os
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from typing import Any
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

import typer

from orchestrator.settings import Settings
from worker.recipes import recipe_names
from worker.spec import TrialSpec

PATIENCE_SECONDS = 1.0
STATES = {"cancel": ("queued", "running"), "retry": ("failed", "cancelled"), "artifact": ("complete",)}
"""What the commands of these names can be about; the others are about any trial."""


def study_names(incomplete: str = "") -> list[str]:
    """The studies of the server; none where it does not answer."""
    return [study["name"] for study in _items("/v1/studies") if study["name"].startswith(incomplete)]


def trial_numbers(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """The numbers of the study's trials, each with what became of it."""
    study, states = context.params.get("study"), STATES.get(str(context.info_name), ())
    path = f"/v1/studies/{quote(str(study), safe='')}/trials?{urlencode([('state', state) for state in states])}"
    found = [(str(trial["number"]), _outcome(trial)) for trial in _items(path)]
    return [(number, outcome) for number, outcome in found if number.startswith(incomplete)]


def recipes(incomplete: str) -> list[str]:
    """Recipes by name. Where none is meant, the shell offers files."""
    return [name for name in recipe_names() if name.startswith(incomplete)]


def spec_settings(incomplete: str) -> list[str]:
    """The start of a `--set PATH=VALUE`, for every path of a spec."""
    return [f"{path}=" for path in spec_paths() if path.startswith(incomplete)]


def spec_paths() -> list[str]:
    """The dotted path of every value of a spec, as its schema has them."""
    schema = TrialSpec.model_json_schema()
    return list(_paths(schema, schema["$defs"], ""))


def _paths(schema: Mapping[str, Any], shared: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, field in schema.get("properties", {}).items():
        inner = [
            shared[part["$ref"].rpartition("/")[2]]
            for part in (field, *field.get("anyOf", []), *field.get("allOf", []))
            if "$ref" in part
        ]
        parts = [part for part in inner if "properties" in part]
        for part in parts:
            yield from _paths(part, shared, f"{prefix}{name}.")
        if not parts:
            yield prefix + name


def _items(path: str) -> list[dict[str, Any]]:
    """A page of a list, as long as they get; nothing for any reason, because the shell has no place for one."""
    try:
        settings = Settings.read(os.environ)
        headers = {"Authorization": f"Bearer {settings.token}"} if settings.token else {}
        request = Request(f"{settings.url}{path}{'&' if '?' in path else '?'}limit=500", headers=headers)
        with urlopen(request, timeout=PATIENCE_SECONDS) as answer:
            items: list[dict[str, Any]] = json.load(answer)["items"]
            return items
    except (OSError, HTTPException, ValueError, KeyError):
        return []


def _outcome(trial: Mapping[str, Any]) -> str:
    return trial["state"] if trial["val_bpb"] is None else f"{trial['state']}, {trial['val_bpb']:.4f} BPB"
