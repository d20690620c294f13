"""A study of 10,000 trials, opened: its leaderboard, its page, and Optuna's dashboard beside Optuna's own storage.

Both dashboards read SQLite, the same trials with the same attributes. `first` is in a process that has not opened the
study before, `again` the median of those that follow more than the dashboard's own ten seconds of caching apart.

Run: .venv/bin/python benchmarks/api/large.py [--trials 10000] [--rounds 5]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from rates import server
from sqlalchemy import Engine, MetaData, insert
from stock import SPACE, fresh_url, stocked

APART_SECONDS = 11.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--databases", default="sqlite,postgresql")
    parser.add_argument("--serve", help="serve the dashboard over this URL of Optuna's own storage, and nothing else")
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve)
    for database in options.databases.split(","):
        with tempfile.TemporaryDirectory() as folder:
            url = fresh_url(database, Path(folder), "large")
            stocked(url, options.trials, SPACE)
            with server("caddie", url) as (port, _):
                pages(database, port, options.rounds)
            if database == "sqlite":
                dashboards(url, f"sqlite:///{folder}/optuna.db", options.rounds)
    return 0


def pages(database: str, port: int, rounds: int) -> None:
    paths = ("/v1/studies/sweep/leaderboard", "/v1/studies/sweep/leaderboard?limit=500", "/studies/sweep")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        for path in paths:
            times, size = [], 0
            for _ in range(rounds + 1):
                began = time.perf_counter()
                answer = client.get(path, headers={"accept": "text/html" if path == paths[2] else "application/json"})
                times.append(time.perf_counter() - began)
                size = len(answer.raise_for_status().content)
            told = f"first {1000 * times[0]:.0f} ms, then median {1000 * median(times[1:]):.0f} ms"
            print(f"{database:<10} {path:<40} {told}, {size / 1e6:.2f} MB", flush=True)


def dashboards(url: str, copy: str, rounds: int) -> None:
    copy_study(url, copy)
    opened: dict[str, list[list[float]]] = {"caddie": [], "optuna": []}
    for _ in range(rounds):
        with server("caddie", url) as (port, _), _client(port) as client:
            opened["caddie"].append(open_study(client))
        command = [sys.executable, __file__, "--serve", copy]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with _client(int(process.stdout.readline())) as client:
            opened["optuna"].append(open_study(client))
        process.terminate()
        process.wait()
    for name, values in opened.items():
        for place, what in enumerate(("page", "first", "again")):
            column = [each[place] for each in values]
            spread = f"{min(column):.2f} to {max(column):.2f}"
            print(f"dashboard  {name:<7} {what:<6} median {median(column):.2f} s, {spread}")
    for place, what in ((1, "first"), (2, "again")):
        ratios = [a[place] / b[place] for a, b in zip(opened["caddie"], opened["optuna"], strict=True)]
        print(f"dashboard  {what}: caddie / optuna, median {median(ratios):.2f}", flush=True)


def _client(port: int) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300)


def open_study(client: httpx.Client) -> list[float]:
    """Seconds to the page (which starts a process in Caddie's case), to the study's trials, and to these later on."""
    began = time.perf_counter()
    client.get("/dashboard").raise_for_status()
    page = time.perf_counter()
    study = client.get("/api/studies").json()["study_summaries"][0]["study_id"]
    first = client.get(f"/api/studies/{study}").raise_for_status()
    told = time.perf_counter()
    assert len(first.json()["trials"]) > 0
    time.sleep(APART_SECONDS)
    later = time.perf_counter()
    client.get(f"/api/studies/{study}").raise_for_status()
    return [page - began, told - page, time.perf_counter() - later]


def copy_study(url: str, copy: str) -> None:
    """The same trials in Optuna's own tables, row by row: its storage would take minutes to write them."""
    from optuna.storages import RDBStorage
    from optuna.study import StudyDirection

    from orchestrator.database import Database
    from orchestrator.optuna_view import StudyView

    trials = StudyView(Database(url)).get_all_trials(1, deepcopy=False)
    storage = RDBStorage(copy)
    study = storage.create_new_study([StudyDirection.MINIMIZE], "sweep")
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in (
        "trials", "trial_values", "trial_params", "trial_user_attributes", "trial_system_attributes",
    )}  # fmt: skip
    from optuna.distributions import distribution_to_json

    for place, trial in enumerate(trials, 1):
        rows["trials"].append({
            "trial_id": place, "number": trial.number, "study_id": study, "state": trial.state.name,
            "datetime_start": trial.datetime_start, "datetime_complete": trial.datetime_complete,
        })  # fmt: skip
        for objective, value in enumerate(trial.values or ()):
            rows["trial_values"].append(
                {"trial_id": place, "objective": objective, "value": value, "value_type": "FINITE"}
            )
        for name, value in trial.params.items():
            own = trial.distributions[name]
            rows["trial_params"].append({
                "trial_id": place, "param_name": name, "param_value": own.to_internal_repr(value),
                "distribution_json": distribution_to_json(own),
            })  # fmt: skip
        for table, attributes in (("user", trial.user_attrs), ("system", trial.system_attrs)):
            rows[f"trial_{table}_attributes"] += [
                {"trial_id": place, "key": key, "value_json": json.dumps(value)} for key, value in attributes.items()
            ]
    _insert(storage.engine, rows)


def _insert(engine: Engine, rows: dict[str, list[dict[str, Any]]]) -> None:
    tables = MetaData()
    tables.reflect(engine)
    with engine.begin() as connection:
        for name, added in rows.items():
            if added:
                connection.execute(insert(tables.tables[name]), added)


def serve(url: str) -> int:
    import socket

    import uvicorn
    from a2wsgi import WSGIMiddleware
    from optuna.storages import RDBStorage
    from optuna_dashboard import wsgi

    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    app: Any = WSGIMiddleware(wsgi(RDBStorage(url)), workers=4)  # type: ignore[arg-type]
    print(listener.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
