"""What the orchestrator's loop costs beside many gangs: one tick's length, and its CPU for each gang.

The gangs are simulated: each reports a measurement a second and never ends. All else is real: the loop, Optuna's
proposals, leases and measurements in SQLite. The loop is pinned to one core.

Run: .venv/bin/python benchmarks/ticks.py [--gangs 64] [--seconds 30]
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median

from orchestrator import store
from orchestrator.artifacts import ArtifactStore
from orchestrator.database import Database
from orchestrator.launcher import Assignment, Offer, Update
from orchestrator.loop import Loop
from orchestrator.study import NewStudy
from worker.recipes import load_recipe
from worker.report import Measurement
from worker.spec import GangConfig, override

TICK_SECONDS = 0.2


class SimulatedGangs:
    """A Launcher whose gangs train for ever, without a process."""

    def __init__(self, gangs: int) -> None:
        self._gangs = gangs
        self._began: dict[int, float] = {}

    def free(self, gang: GangConfig) -> int:
        return self._gangs - len(self._began)

    def capacity(self, gang: GangConfig) -> int:
        return self._gangs

    def offer(self, gang: GangConfig) -> Offer | None:
        return Offer(f"simulated-{len(self._began)}", behind=False) if self.free(gang) else None

    def reserve(self, gang: GangConfig | None) -> None:
        pass

    def want(self, gangs: Mapping[GangConfig, int]) -> None:
        pass

    def start(self, assignment: Assignment, gang: str) -> str:
        self._began[assignment.attempt_id] = time.monotonic()
        return gang

    def adopt(self, attempt_id: int, gang: str) -> bool:
        return False

    def reap(self) -> int:
        return 0

    def poll(self, cursors: Mapping[int, int]) -> dict[int, Update]:
        return {attempt_id: self._poll(attempt_id, after) for attempt_id, after in cursors.items()}

    def _poll(self, attempt_id: int, after: int) -> Update:
        steps = int(time.monotonic() - self._began[attempt_id])
        metrics = {"train_loss": 3.0, "lr_multiplier": 1.0, "fraction": 0.5}
        said = [
            Measurement(number=number, step=number, elapsed_seconds=number, metrics=metrics)
            for number in range(after + 1, steps + 1)
        ]
        return Update("train", tuple(said), None, steps)

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def stop(self, attempt_id: int) -> None:
        pass

    def artifact(self, attempt_id: int) -> bytes:
        raise KeyError(attempt_id)

    def release(self, attempt_id: int) -> None:
        self._began.pop(attempt_id, None)

    def leave(self) -> None:
        pass

    def close(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gangs", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {0})
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        database = Database(f"sqlite:///{folder / 'caddie.db'}")
        database.migrate()
        space = {
            "optimizer.matrix_lr": {"low": 0.01, "high": 0.1, "log": True},
            "model.qk_gain": {"low": 1.0, "high": 5},
        }
        new = {"name": "ticks", "base": override(load_recipe("laptop"), {}), "space": space, "cap_bytes": 16_000_000}
        with database.write() as session:
            store.create_study(session, NewStudy.model_validate({**new, "max_trials": 10_000}), datetime.now(UTC))
        launcher = SimulatedGangs(options.gangs)
        loop = Loop(database, launcher, ArtifactStore(folder / "artifacts"), "benchmark", timedelta(seconds=30))
        loop.tick(datetime.now(UTC))  # all gangs start
        ticks, cpu, began = [], time.process_time(), time.perf_counter()
        while time.perf_counter() - began < options.seconds:
            before = time.perf_counter()
            loop.tick(datetime.now(UTC))
            ticks.append(time.perf_counter() - before)
            launcher.wait(TICK_SECONDS)
        share = (time.process_time() - cpu) / (time.perf_counter() - began)
        database.close()
    ticks.sort()
    print(f"{options.gangs} gangs, {len(ticks)} ticks: median {1000 * median(ticks):.0f} ms, ", end="")
    print(
        f"99th of a hundred {1000 * ticks[int(len(ticks) * 0.99)]:.0f} ms, longest {1000 * ticks[-1]:.0f} ms; ", end=""
    )
    print(f"{100 * share:.0f}% of a core, {100 * share / options.gangs:.2f}% for each gang")


if __name__ == "__main__":
    sys.exit(main())
