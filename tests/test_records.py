"""Runs made elsewhere, imported: they stand beside a study's own, and are refused where they contradict themselves."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from claims import Results

from api.client import ApiError, Caddie
from api.program import program
from orchestrator.database import Database
from worker.inventory import count_parameters
from worker.recipes import load_recipe
from worker.spec import override, parse_spec

STUDY: dict[str, Any] = {
    "name": "sweep", "recipe": "laptop", "cap_bytes": 1_000_000, "space": {"sharing.lora.rank": {"choice": [0, 2, 4]}},
}  # fmt: skip


@pytest.fixture
def url(database: Database, serve: Callable[..., str]) -> str:
    return serve(database, dashboard=False)


@pytest.fixture
def caddie(url: str) -> Iterator[Caddie]:
    with Caddie(url) as client:
        client.create_study(STUDY)
        yield client


@pytest.fixture
def made(trial_result: Results) -> Callable[..., dict[str, Any]]:
    """A spec of the laptop recipe at this LoRA rank with a result of its own; keywords replace the result's fields."""

    def build(rank: int, **fields: Any) -> dict[str, Any]:
        spec = parse_spec(override(load_recipe("laptop"), {"sharing.lora.rank": rank}))
        parameters = count_parameters(spec.model, spec.sharing)
        result = trial_result(**{"parameters": parameters, **fields})
        return {"spec": spec.model_dump(mode="json"), "result": result.model_dump(mode="json")}

    return build


def test_an_imported_run_stands_on_the_leaderboard_and_costs_nothing(
    caddie: Caddie, made: Callable[..., dict[str, Any]]
) -> None:
    trial = caddie.import_result("sweep", **made(2, val_bpb=2.2))
    caddie.import_result("sweep", **made(4, val_bpb=2.1, model_bytes=2_000_000, artifact_bytes=2_040_000))
    assert (trial.origin, trial.state, trial.params) == ("imported", "complete", {"sharing.lora.rank": 2})
    assert [(row.number, row.rank) for row in caddie.leaderboard("sweep").rows] == [(0, 1), (1, None)]
    assert caddie.ledger("sweep").total.seconds == 0
    assert caddie.study("sweep").proposed == 0


def test_a_run_whose_training_was_stopped_is_imported_as_pruned(
    caddie: Caddie, made: Callable[..., dict[str, Any]]
) -> None:
    assert caddie.import_result("sweep", **made(2, stopped=True)).state == "pruned"
    assert caddie.leaderboard("sweep").rows == []


def test_importing_again_under_one_key_adds_nothing(caddie: Caddie, made: Callable[..., dict[str, Any]]) -> None:
    first = caddie.import_result("sweep", **made(2), idempotency_key="once")
    assert caddie.import_result("sweep", **made(2), idempotency_key="once") == first
    with pytest.raises(ApiError, match="that of trial 0") as refused:
        caddie.import_result("sweep", **made(2), idempotency_key="another")
    assert refused.value.problem.existing == "/v1/studies/sweep/trials/0"
    other_spec = made(2)
    other_spec["spec"]["optimizer"]["matrix_lr"] = 0.011
    for other in (made(2, val_bpb=1.0), made(4, val_bpb=2.3), other_spec):
        with pytest.raises(ApiError, match="Idempotency-Key: was used for trial 0, which has another") as refused:
            caddie.import_result("sweep", **other, idempotency_key="once")
        assert refused.value.status == 409
    assert len(caddie.trials("sweep")) == 1


@pytest.mark.parametrize("field", ["parameters", "artifact_bytes"])
def test_a_result_that_cannot_be_the_specs_is_refused(
    field: str, caddie: Caddie, made: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(ApiError, match=f"result.{field}"):
        caddie.import_result("sweep", **made(2, **{field: 7}))
    assert caddie.trials("sweep") == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("val_bpb", -5.0), ("val_bpb_prequant", 0.0), ("val_loss", 0.0), ("val_loss", 1e308), ("model_bytes", 10**30),
        ("code_bytes", -1), ("steps", 0), ("tokens", 10**30), ("train_seconds", -1.0), ("step_seconds", 1e300),
        ("bytes_by_class", {"mlp": 10**40}),
    ],
)  # fmt: skip
def test_a_result_that_nobody_can_have_is_refused(
    field: str, value: Any, caddie: Caddie, made: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(ApiError, match=f"result.{field}") as refused:
        caddie.import_result("sweep", **made(2, **{field: value}))
    assert refused.value.status == 422
    assert caddie.trials("sweep") == []


def test_the_command_line_imports_files_once(
    caddie: Caddie, url: str, made: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    whole, lines, wrong = (tmp_path / name for name in ("whole.json", "lines.jsonl", "wrong.json"))
    whole.write_text(json.dumps(made(0), indent=2))
    lines.write_text("\n".join(json.dumps(made(rank)) for rank in (2, 4)) + "\n")
    wrong.write_text(json.dumps([made(0)]))

    def run(*files: Path) -> subprocess.CompletedProcess[str]:
        words = program("api.cli", "import", "sweep", *map(str, files))
        environment = {**os.environ, "CADDIE_URL": url}
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)

    for _ in range(2):
        done = run(whole, lines)
        assert done.returncode == 0, done.stderr
        assert [line.rpartition(":")[2] for line in done.stdout.splitlines()] == [
            f" trial {number} is complete" for number in range(3)
        ]
    assert len(caddie.trials("sweep")) == 3
    refused = run(lines, wrong)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "wrong.json" in refused.stderr
