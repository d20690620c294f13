"""Requests a second, with their latencies, of submitting and reading a trial, beside a bare handler and raw drivers.

Each server is one process, and the load another. In each round every server answers every load for some seconds, one
server after the other, so that whatever else the machine does falls on all alike: read the ratios.

Run: .venv/bin/python benchmarks/api/rates.py [--databases sqlite,postgresql] [--rounds 5] [--seconds 3]
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from stock import SPACE, fresh_url, stocked

HERE = Path(__file__).parent
KINDS = ("caddie", "fastapi", "drivers")
TRIALS = 1000  # complete ones, that the study has before anything is measured


@dataclass
class Figures:
    """What one server did under one load, a value a round."""

    rates: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Milliseconds of the server's own CPU a request, which other processes do not stretch."""

    def row(self) -> str:
        p50, p99 = median(self.p50), median(self.p99)
        return (
            f"{median(self.rates):7.0f} {min(self.rates):7.0f}–{max(self.rates):<7.0f} {1000 * p50:8.2f} "
            f"{1000 * p99:8.2f} {p99 / p50:7.1f} {1000 * median(self.cpu):8.2f}"
        )


def requests_of(kind: str, what: str, count: int, start: int) -> Iterator[dict[str, Any]]:
    """So many requests, no two alike."""
    rng = random.Random(start)
    for number in range(start, start + count):
        # within the study's space, as a program would send them
        params = {
            "optimizer.matrix_lr": round(0.005 + number * 1e-7, 9), "schedule.warmdown_fraction": 0.5,
            "model.width": rng.choice(range(48, 193, 6)), "sharing.lora.rank": rng.randrange(17),
            "sharing.unique_blocks": rng.randint(1, 6),
        }  # fmt: skip
        if what == "read":
            place = rng.randrange(TRIALS)
            path = f"/v1/studies/sweep/trials/{place}" if kind == "caddie" else f"/items/{place + 1}"
            yield {"method": "GET", "path": path}
        elif kind == "caddie":
            yield {
                "method": "POST", "path": "/v1/studies/sweep/trials", "body": {"overrides": params},
                "headers": {"Idempotency-Key": f"key-{number}"},
            }  # fmt: skip
        else:
            yield {"method": "POST", "path": "/items", "body": {"name": f"key-{number}", "params": params}}


@contextmanager
def server(kind: str, url: str) -> Iterator[tuple[int, psutil.Process]]:
    """A server in a process of its own: its port, and the process."""
    process = subprocess.Popen([sys.executable, HERE / "servers.py", kind, url], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline()), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def load(port: int, connections: int, seconds: float, requests: list[dict[str, Any]]) -> dict[str, Any]:
    lines = "\n".join(json.dumps(request) for request in requests)
    command = [sys.executable, str(HERE / "load.py"), str(port), str(connections), str(seconds)]
    told: dict[str, Any] = json.loads(
        subprocess.run(command, input=lines, capture_output=True, check=True, text=True).stdout
    )
    return told


def measure(database: str, folder: Path, options: argparse.Namespace) -> dict[tuple[str, int, str], Figures]:
    """Figures by what is asked, connections and server."""
    found: dict[tuple[str, int, str], Figures] = {}
    numbers = iter(range(0, 10**9, 100_000))
    kinds = options.servers.split(",")
    urls = {kind: fresh_url(database, folder, kind) for kind in kinds}
    for kind in kinds:
        if kind == "caddie":
            stocked(urls[kind], TRIALS, SPACE)
    for place in range(options.rounds + 1):  # the first warms up
        for what in ("submit", "read"):
            for connections in (1, 64):
                for kind in kinds:
                    with server(kind, urls[kind]) as (port, process):
                        if what == "read" and kind != "caddie" and place == 0:
                            load(port, 4, 60, list(requests_of(kind, "submit", TRIALS, next(numbers))))
                        start, most = next(numbers), int(options.seconds * 8000)
                        load(port, connections, 0.3, list(requests_of(kind, what, 300, start + 90_000)))
                        before = process.cpu_times()
                        told = load(port, connections, options.seconds, list(requests_of(kind, what, most, start)))
                        after = process.cpu_times()
                    expected = {"201"} if what == "submit" else {"200"}
                    assert set(told["statuses"]) == expected, told["statuses"]
                    if place:
                        latencies, figures = (
                            sorted(told["latencies"]),
                            found.setdefault((what, connections, kind), Figures()),
                        )
                        figures.rates.append(len(latencies) / told["seconds"])
                        figures.p50.append(latencies[len(latencies) // 2])
                        figures.p99.append(latencies[int(len(latencies) * 0.99)])
                        spent = after.user + after.system - before.user - before.system
                        figures.cpu.append(spent / len(latencies))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--databases", default="sqlite,postgresql")
    parser.add_argument("--servers", default=",".join(KINDS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    for database in options.databases.split(","):
        with tempfile.TemporaryDirectory() as folder:
            found = measure(database, Path(folder), options)
        heads = "   rate    from–to         p50 ms   p99 ms p99/p50   CPU ms  of fastapi"
        print(f"\n{database:<10} {'what':<7} {'conns':>5} {'server':<8} {heads}")
        for (what, connections, kind), figures in found.items():
            bare = found.get((what, connections, "fastapi"))
            ratio = median(a / b for a, b in zip(figures.rates, bare.rates, strict=True)) if bare else 0
            print(f"{'':<10} {what:<7} {connections:>5} {kind:<8} {figures.row()} {ratio:10.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
