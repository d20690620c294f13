"""Commands that say what is to run: recipes, previews, submissions, and results from elsewhere."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from api.arguments import read_bodies, read_results, read_spec
from api.completion import recipes as recipe_names
from api.options import AsJson, Overrides, RecipeSize, SpecName, StudyName, answer, connect
from api.previews import PreviewOut
from api.schemas import TrialOut
from api.terminal import preview_lines, recipes_table
from api.terminal_trials import trial_lines, trials_table
from orchestrator.study import CAP_BYTES
from worker.recipes import overrides_of, require_full
from worker.spec import InvalidSpec, Problem, override, parse_spec

ELSEWHERE: Mapping[frozenset[str], str] = {
    frozenset(
        {"name", "space", "base", "max_trials"}
    ): "a study, which caddie study preview and caddie study create take",
    frozenset({"spec", "recipe", "params", "overrides"}): "a submission, which caddie submit --batch takes, in a list",
}
"""What else a file may hold, by keys of which no spec has any."""


def recipes(as_json: AsJson = False) -> None:
    """Named specs from the literature, to start from."""
    with connect() as caddie:
        found = caddie.recipes()
    answer(found, as_json, recipes_table(found))


def preview(
    spec: SpecName,
    overrides: Overrides = None,
    size: RecipeSize = "full",
    cap_bytes: Annotated[int, typer.Option(help="The byte cap to judge by.", min=1)] = CAP_BYTES,
    as_json: AsJson = False,
) -> None:
    """What a spec would cost, without running it or needing a server: parameters, tying map, bytes, verdict."""
    from orchestrator.caps import Caps  # NumPy comes with these, and no other command needs it
    from orchestrator.feasibility import judge, predict, shares

    parsed = parse_spec(override(_spec(spec, size), overrides_of(overrides)))
    prediction = predict(parsed)
    found = PreviewOut.of(parsed, prediction, cap_bytes, *judge(prediction, Caps(cap_bytes), parsed), shares(parsed))
    answer(found, as_json, *preview_lines(spec, found))


def submit(
    study: StudyName,
    spec: Annotated[
        str | None,
        typer.Argument(
            help="A recipe's name or a spec file; none means the study's base.", autocompletion=recipe_names
        ),
    ] = None,
    overrides: Overrides = None,
    size: RecipeSize = "full",
    batch: Annotated[
        Path | None,
        typer.Option(
            "--batch", metavar="FILE", help="Submit all of a file's trials or none: a list, or one a line (- is stdin)."
        ),
    ] = None,
    key: Annotated[
        str | None, typer.Option("--key", help="Idempotency key: a retry with it returns the same trial.")
    ] = None,
    allow_duplicate: Annotated[
        bool, typer.Option(help="Where the study has this spec: run its trial at this seed, or at the next, too.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it ends; exit 1 unless it completes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit one trial to a study, or a file of them."""
    with connect() as caddie:
        if batch is None:
            body = _body(spec, overrides, size, allow_duplicate)
            submitted = caddie.submit(study, body, idempotency_key=key)
            runs = [(submitted.number, submitted.run_id)]
        else:
            batched = caddie.submit_batch(study, _bodies(batch, spec, overrides, allow_duplicate), idempotency_key=key)
            runs = [(trial.number, trial.run_id) for trial in batched]
        ended = [caddie.wait(study, *run) for run in runs] if wait else []
    if batch is None:
        trial = ended[0] if wait else submitted
        answer(trial, as_json, *trial_lines(trial))
    else:
        trials = ended or batched
        answer(trials, as_json, trials_table(trials))
    if wait and not all(map(_succeeded, ended, (run_id for _, run_id in runs))):
        raise typer.Exit(1)


def import_results(
    study: StudyName,
    files: Annotated[
        list[Path],
        typer.Argument(help="JSON with spec and result, as `caddie trial --json` prints; or lines of it."),
    ],
    as_json: AsJson = False,
) -> None:
    """Bring trials that were trained elsewhere into a study, with their results. Again adds nothing twice."""
    found = [(path, spec, result) for path in files for spec, result in read_results(path)]
    imported = []
    with connect() as caddie:
        for path, spec, result in found:
            key = hashlib.sha256(json.dumps([spec, result], sort_keys=True).encode()).hexdigest()
            imported.append(caddie.import_result(study, spec, result, idempotency_key=key))
            if not as_json:
                answer(imported[-1], False, f"{path}: trial {imported[-1].number} is {imported[-1].state}")
    if as_json:
        answer(imported, True)


def _body(spec: str | None, overrides: list[str] | None, size: str, allow_duplicate: bool) -> dict[str, Any]:
    changes = overrides_of(overrides)
    if spec is not None:
        return {"spec": override(_spec(spec, size), changes), "allow_duplicate": allow_duplicate}
    require_full(size)
    return {"params": {}, "overrides": changes, "allow_duplicate": allow_duplicate}


def _spec(name: str, size: str) -> dict[str, Any]:
    """As read_spec. Raises InvalidSpec, and says who takes it, where the file holds a study or a submission instead."""
    found = read_spec(name, size)
    for keys, what in ELSEWHERE.items():
        if not keys.isdisjoint(found) and not found.keys() & {"model", "sharing"}:
            raise InvalidSpec((Problem("file", name, f"holds {what}"),))
    return found


def _bodies(file: Path, spec: str | None, overrides: list[str] | None, allow_duplicate: bool) -> list[dict[str, Any]]:
    if spec is not None or overrides:
        raise typer.BadParameter("says what each trial is: give no spec and no --set", param_hint="--batch")
    return [{"allow_duplicate": allow_duplicate, **body} for body in read_bodies(file)]


def _succeeded(trial: TrialOut, run_id: int | None) -> bool:
    return any(run.id == run_id and run.state == "succeeded" for run in trial.runs)
