"""How soon `caddie up` answers, how soon it can train, and what it holds while idle, against a bare `ray.init()`.

Run: .venv/bin/python benchmarks/up.py [--runs 5]
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import httpx
import psutil

UP_MEMORY = "up: idle memory (PSS), MB"
BARE_MEMORY = "bare ray.init(): memory (PSS), MB"
BARE = """
import ray, sys
ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 1024**2, log_to_driver=False)
print("ready", flush=True)
sys.stdin.read()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    figures: dict[str, list[float]] = {}
    for _ in range(runs):
        measured = {**measure_up(), **measure_bare()}
        measured["up above bare ray.init(), MB"] = measured[UP_MEMORY] - measured[BARE_MEMORY]
        for name, value in measured.items():
            figures.setdefault(name, []).append(value)
    for name, values in figures.items():
        print(f"{name:<34} median {median(values):8.2f}   from {min(values):.2f} to {max(values):.2f}")


def measure_up() -> dict[str, float]:
    """Seconds to the first answer and to a ready orchestrator; the idle tree's memory in MB."""
    with tempfile.TemporaryDirectory() as home, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        environment = os.environ | {"CADDIE_HOME": home, "CADDIE_PORT": str(port), "CADDIE_RANKS": "2"}
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "api.cli", "up"], env=environment, stdout=subprocess.DEVNULL)
        answered = until(lambda: answers(port)) - began
        log = Path(home) / "orchestrator.log"
        ready = until(lambda: log.exists() and "is ready" in log.read_text()) - began
        time.sleep(3)  # idle
        memory = pss(process.pid)
        process.send_signal(signal.SIGINT)
        process.wait()
    return {"up: first answer, s": answered, "up: ready to train, s": ready, UP_MEMORY: memory}


def measure_bare() -> dict[str, float]:
    """Seconds to a ready bare Ray, and its memory in MB."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", BARE],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=os.environ | {"RAY_AUTH_MODE": "disabled"}, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    ready = time.monotonic() - began
    time.sleep(3)
    memory = pss(process.pid)
    process.stdin.close()
    process.wait()
    return {"bare ray.init(): ready, s": ready, BARE_MEMORY: memory}


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    except httpx.TransportError:
        return False


def until(condition: Callable[[], bool]) -> float:
    while not condition():
        time.sleep(0.02)
    return time.monotonic()


def pss(root: int) -> float:
    """Proportional set size of a process and everything below it, in MB."""
    family = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    return sum(process.memory_full_info().pss for process in family) / 1e6


if __name__ == "__main__":
    main()
