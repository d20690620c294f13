"""What open event streams cost: the server's memory, and how long requests take beside them.

Half of them follow one study, half everything, while a trial is submitted twice a second. Rounds with and without
streams alternate, on one server.

Run: .venv/bin/python benchmarks/api/streams.py [--streams 200] [--rounds 5] [--seconds 4]
"""

import argparse
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import httpx
import psutil
from rates import TRIALS, load, requests_of, server
from stock import SPACE, fresh_url, stocked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = fresh_url("sqlite", Path(folder), "streams")
        stocked(url, TRIALS, SPACE)
        with server("caddie", url) as (port, process):
            told = measure(port, process, options)
    for name, values in told.items():
        print(f"{name:<34} median {median(values):8.2f}   from {min(values):.2f} to {max(values):.2f}")
    return 0


def measure(port: int, process: psutil.Process, options: argparse.Namespace) -> dict[str, list[float]]:
    told: dict[str, list[float]] = {}
    stopping = threading.Event()
    submitter = threading.Thread(target=submit, args=(port, stopping))
    submitter.start()
    for place in range(options.rounds + 1):  # the first warms up
        for streams in (0, options.streams):
            before = process.memory_info().rss
            opened = [follow(port, number) for number in range(streams)]
            time.sleep(2)
            spent = process.cpu_times().user
            time.sleep(2)
            share = (process.cpu_times().user - spent) / 2
            reads = list(requests_of("caddie", "read", 8000, place))
            latencies = sorted(load(port, 1, options.seconds, reads)["latencies"])
            held = (process.memory_info().rss - before) / 1e6
            for stream in opened:
                stream.close()
            if place:
                found = {"p50, ms": 1000 * latencies[len(latencies) // 2], "CPU beside, % of a core": 100 * share}
                found["p99, ms"] = 1000 * latencies[int(len(latencies) * 0.99)]
                found["memory, MB"] = held
                for name, value in found.items():
                    told.setdefault(f"{streams} streams: {name}", []).append(value)
            time.sleep(1)
    stopping.set()
    submitter.join()
    return told


def submit(port: int, stopping: threading.Event) -> None:
    requests = requests_of("caddie", "submit", 100_000, 0)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        while not stopping.wait(0.5):
            request = next(requests)
            client.post(request["path"], json=request["body"]).raise_for_status()


def follow(port: int, number: int) -> socket.socket:
    """An open stream, after its first bytes."""
    stream = socket.create_connection(("127.0.0.1", port))
    path = "/v1/studies/sweep/events?after=3000" if number % 2 else "/v1/events?after=3000"
    stream.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert b" 200 " in stream.recv(4096)
    return stream


if __name__ == "__main__":
    sys.exit(main())
