"""`caddie demo`: a small real sweep through `caddie up` and its REST API, on this machine's CPU."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from api.client import Caddie, Unreachable
from api.options import show
from api.program import environment_of, program
from api.schemas import StudyOut
from api.standings import LeaderboardRow
from api.terminal_results import leaderboard_notes, leaderboard_table
from api.watch import came_to_nothing, watch_study
from orchestrator.lifecycle import StudyState, TrialState
from orchestrator.settings import KNOWN, Settings

DEMO: dict[str, Any] = {
    "name": "demo",
    "recipe": "laptop",
    "space": {
        "sharing.lora.rank": {"choice": [0, 2, 4, 8]},
        "sharing.unique_blocks": {"low": 1, "high": 4},
        "sharing.tying": {"choice": ["cycle", "sequence", "palindrome"]},
    },
    "sampler": "tpe",  # Optuna proposes: the arms of our own would hardly leave it one of so few trials
    "seed": 7,
    "max_trials": 8,
    "cap_bytes": 450_000,
    "gangs": [{"ranks": 1}, {"ranks": 2}],
}
EXPLICIT: dict[str, dict[str, Any]] = {
    "demo-untied": {"sharing.unique_blocks": 6, "sharing.tying": "sequence", "sharing.lora.rank": 0},
    "demo-over-the-cap": {"model.width": 288, "sharing.unique_blocks": 6, "sharing.tying": "sequence"},
}
RANKS = 3  # one gang of two ranks beside one of one, on two cores
OBEYED = ("CADDIE_HOME", "CADDIE_PORT", "CADDIE_RANKS", "CADDIE_DATA", "CADDIE_LAUNCHER")
PATIENCE_SECONDS = 60.0
END_SECONDS = 60.0  # the API's 10 for open requests, the orchestrator's 20, and time to spare
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def run_demo(console: Console, demo: Mapping[str, Any] = DEMO) -> int:
    """Run or resume the demo in ./demo (or CADDIE_HOME), and leave nothing running; 1 where nothing came of its study.

    For a signal, 130 or SystemExit with 128 and its number. `demo` is a StudyIn whose cap no untied model fits.
    """
    settings, name = demo_settings(os.environ), demo["name"]
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _exit)
    show(f"Caddie demo in {settings.home}: how should six layers share weights?", console=console)
    try:
        with _caddie_up(settings) as server, Caddie(settings.url, token="") as caddie:
            _wait_ready(caddie, server)
            code = subprocess.call(program("worker", "data", "build"), env=environment_of(settings))
            if code:  # it has said why
                return code
            prepare(console, caddie, demo)
            dashboard = f"{settings.url}/dashboard"
            show(f"page       {settings.url}/studies/{name}", f"Optuna     {dashboard}", console=console)
            ended = watch_study(console, caddie, name)
            _report(console, settings, caddie, name)
            if came_to_nothing(ended):
                show("nothing came of it: mend that, and run it again to try again what failed", console=console)
                return 1
    except KeyboardInterrupt:
        show("stopped; finished trials are kept: run it again to go on", console=console)
        return 130
    return 0


def demo_settings(environment: Mapping[str, str]) -> Settings:
    """A demo's own settings: of the user's, which may be those of an installation in use, only what OBEYED names."""
    given = {name: value for name, value in environment.items() if name in OBEYED or name not in KNOWN}
    defaults = {"CADDIE_HOME": "demo", "CADDIE_RANKS": str(RANKS), "CADDIE_PORT": str(_free_port())}
    return Settings.read(defaults | given)


@contextmanager
def _caddie_up(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """A `caddie up` with these settings. Afterwards it has ended, and everything that it started."""
    settings.home.mkdir(parents=True, exist_ok=True)
    with (settings.home / "up.log").open("ab") as log:
        # In a session of its own: a Ctrl-C at the terminal reaches us alone, and we ask it once.
        server = subprocess.Popen(
            program("api.cli", "up"), env=environment_of(settings), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield server
    finally:
        server.terminate()
        try:
            server.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()  # its orchestrator and gangs end with it
            server.wait()


def _exit(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _free_port() -> int:
    """Caddie's own port where it is free, else any."""
    for port in (8765, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise RuntimeError("no port is free on 127.0.0.1")


def _wait_ready(caddie: Caddie, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            caddie.ready()
        except Unreachable:
            time.sleep(0.1)
        else:
            return
    raise Unreachable("the API did not answer: see up.log in the demo's folder")


def prepare(console: Console, caddie: Caddie, demo: Mapping[str, Any]) -> None:
    """Create the study and its two explicit trials; where they exist, nothing is added, and what failed is retried."""
    name, known = demo["name"], set[int]()
    study = next((study for study in caddie.studies() if study.name == name), None)
    if study is None:
        caddie.create_study(demo)
    else:
        show("resuming the study; remove the folder to start over", console=console)
        known = {trial.number for trial in caddie.trials(name)}
        _go_on(console, caddie, study)
    for key, overrides in EXPLICIT.items():
        trial = caddie.submit(name, {"overrides": overrides, "allow_duplicate": True}, idempotency_key=key)
        if trial.number not in known:
            show(f"submitted over REST as {key}: trial {trial.number} is {trial.state}", console=console)


def _go_on(console: Console, caddie: Caddie, study: StudyOut) -> None:
    """Resume the study where it paused, and retry its trials that failed; one that was stopped stays so."""
    if study.state is StudyState.STOPPED:
        return
    failed = caddie.trials(study.name, state=[TrialState.FAILED])
    for trial in failed:
        caddie.retry(study.name, trial.number)
    if failed:
        show(f"trying again what failed: {', '.join(f'trial {trial.number}' for trial in failed)}", console=console)
    if study.state is StudyState.PAUSED:
        caddie.move_study(study.name, "resume")


def _report(console: Console, settings: Settings, caddie: Caddie, name: str) -> None:
    board = caddie.leaderboard(name)
    table = leaderboard_table(board.rows, f"Leaderboard (cap {board.cap_bytes:,} bytes, code included)")
    refused = caddie.trials(name, state=[TrialState.INFEASIBLE])
    console.print()
    show(*([table] if board.rows else []), *leaderboard_notes(board), console=console)
    show(
        *(f"trial {trial.number} was refused before training: {trial.reason}" for trial in refused),
        _best(caddie, name, board.rows),
        f"database   {settings.database_url}",
        f"artifacts  {settings.artifacts}",
        console=console,
    )
    again = f"caddie up --home {shlex.quote(str(settings.home))} --port {settings.port}"
    show(
        f"picture    {_picture(settings, name)}",
        f"page       {settings.url}/studies/{name}, while this runs:\n           {again}",
        console=console,
    )


def _best(caddie: Caddie, name: str, rows: Sequence[LeaderboardRow]) -> str:
    first = next((row for row in rows if row.rank is not None), None)
    if first is None:
        return "no complete trial keeps the caps" if rows else "no trial is complete"
    result = caddie.trial(name, first.number).result
    assert result is not None, "a trial on the leaderboard has a result"
    order0 = result.diagnostics["order0_bpb"]
    share = f"{result.val_bpb / order0:.0%} of the {order0:.4f} that an order-0 byte coder of the same text needs"
    return f"best {result.val_bpb:.4f} BPB: {share}"


def _picture(settings: Settings, name: str) -> str:
    """Take a picture of the study's page with an installed Chromium; where it lies, or why there is none."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    page = f"{settings.url}/studies/{name}"
    if browser is None:
        return "none, because no Chromium is installed"
    picture = settings.home / "page.png"
    picture.unlink(missing_ok=True)
    # A browser that hangs, or that still writes to its profile, is no reason to fail.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [
                browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                "--window-size=1280,1800",
                "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
                f"--user-data-dir={profile}", f"--screenshot={picture}", page,
            ],
            check=False, capture_output=True, timeout=60,
        )  # fmt: skip
    return str(picture) if picture.exists() else f"none: {Path(browser).name} took none of {page}"
