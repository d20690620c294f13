"""From `start` to a trial's first measurement, on cold and on warm gangs, against a bare call of a Ray actor.

Run: .venv/bin/python benchmarks/gangs.py [--trials 50]
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import ray

from orchestrator.launcher import Assignment
from orchestrator.ray_launcher import RayLauncher
from worker.recipes import load_recipe
from worker.spec import GangConfig, override, parse_spec

TESTS = Path(__file__).parents[1] / "tests"  # whose trainer `count` measures one step and returns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=50)
    trials = parser.parse_args().trials
    with tempfile.TemporaryDirectory() as data_root:
        launcher = RayLauncher(None, Path(data_root), 3, "trainers:run", import_path=[TESTS, Path(__file__).parent])
        try:
            began = time.perf_counter()
            launcher.free(GangConfig())
            print(f"a local Ray connects in {time.perf_counter() - began:.1f} s")
            for ranks in (1, 2):
                first = [
                    first_measurement(launcher, ranks, attempt) for attempt in range(100 * ranks, 100 * ranks + trials)
                ]
                print(f"{ranks} ranks: cold {first[0]:.2f} s, warm median {median(first[1:]) * 1000:.1f} ms")
            print(f"floor: a call of an actor, median {median(bare_calls(trials)) * 1000:.1f} ms")
        finally:
            launcher.close()


def first_measurement(launcher: RayLauncher, ranks: int, attempt: int) -> float:
    changes = {"data.dataset": "count", "budget": {"steps": 1}, "gang.ranks": ranks, "seed": attempt}
    spec = parse_spec(override(load_recipe("laptop"), changes))
    began = time.perf_counter()
    offer = launcher.offer(spec.gang)
    assert offer is not None, "the gang before it is released"
    launcher.start(Assignment(attempt, spec), offer.gang)
    while not launcher.poll({attempt: 0})[attempt].measurements:
        pass
    took = time.perf_counter() - began
    while launcher.poll({attempt: 0})[attempt].ending is None:
        pass
    launcher.release(attempt)
    return took


def bare_calls(count: int) -> list[float]:
    @ray.remote(num_cpus=0)
    class Echo:
        def echo(self) -> int:
            return 1

    echo: Any = Echo.remote()
    ray.get(echo.echo.remote())
    times = []
    for _ in range(count):
        began = time.perf_counter()
        ray.get(echo.echo.remote())
        times.append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    sys.exit(main())
