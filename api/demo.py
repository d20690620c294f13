"""`caddie demo`: a small real sweep through `caddie up` and its REST API, on this machine's CPU."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from api.client import Caddie, Unreachable
from api.terminal import leaderboard_table, watch_study
from api.up import environment_of
from orchestrator.settings import Settings

STUDY = "demo"
DEMO = {
    "name": STUDY,
    "recipe": "laptop",
    "space": {
        "sharing.lora.rank": {"choice": [0, 2, 4, 8]},
        "sharing.unique_blocks": {"low": 1, "high": 4},
        "sharing.tying": {"choice": ["cycle", "sequence", "palindrome"]},
    },
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
PATIENCE_SECONDS = 60.0
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def run_demo(console: Console) -> int:
    """Run or resume the demo in ./demo (or CADDIE_HOME); 0 when the study is complete."""
    settings = _settings()
    console.print(f"[bold]Caddie demo[/bold] in {settings.home}: how should six layers share weights?")
    environment = environment_of(settings)
    settings.home.mkdir(parents=True, exist_ok=True)
    with (settings.home / "up.log").open("ab") as log:
        server = subprocess.Popen([sys.executable, "-m", "api.cli", "up"], env=environment, stdout=log, stderr=log)
    try:
        with Caddie(settings.url) as caddie:
            _wait_ready(caddie, server)
            console.print(f"page {settings.url}/studies/{STUDY}")
            console.print(f"Optuna's dashboard {settings.url}/dashboard")
            subprocess.run([sys.executable, "-m", "worker", "data", "build"], env=environment, check=True)
            _prepare(console, caddie)
            watch_study(console, caddie, STUDY)
            _report(console, settings, caddie)
    except KeyboardInterrupt:
        console.print("stopped; finished trials are kept: run it again to go on")
        return 130
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)
    return 0


def _settings() -> Settings:
    environment = {"CADDIE_HOME": "demo", "CADDIE_RANKS": str(RANKS), "CADDIE_PORT": str(_free_port()), **os.environ}
    return Settings.read(environment)


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


def _prepare(console: Console, caddie: Caddie) -> None:
    """Create the study and its two explicit trials; where they exist, nothing is added."""
    if STUDY in {study.name for study in caddie.studies()}:
        console.print("resuming the study; remove the folder to start over")
    else:
        caddie.create_study(DEMO)
    for key, overrides in EXPLICIT.items():
        trial = caddie.submit(STUDY, {"overrides": overrides, "allow_duplicate": True}, idempotency_key=key)
        console.print(f"submitted over REST as {key}: trial {trial.number} is {trial.state}")


def _report(console: Console, settings: Settings, caddie: Caddie) -> None:
    board = caddie.leaderboard(STUDY)
    console.print()
    console.print(leaderboard_table(board.rows, f"Leaderboard (cap {DEMO['cap_bytes']:,} bytes, code included)"))
    refused = [trial for trial in caddie.trials(STUDY) if trial.state == "infeasible"]
    for trial in refused:
        console.print(f"trial {trial.number} was refused before training: {trial.reason}")
    if board.rows:
        best = caddie.trial(STUDY, board.rows[0].number).result
        assert best is not None, "a trial on the leaderboard has a result"
        order0 = best.diagnostics["order0_bpb"]
        share = f"{best.val_bpb / order0:.0%} of the {order0:.4f} that an order-0 byte coder of the same text needs"
        console.print(f"best {best.val_bpb:.4f} BPB: {share}")
    console.print(f"database   {settings.database_url}")
    console.print(f"artifacts  {settings.artifacts}")
    console.print(f"page       {_picture(settings)}")


def _picture(settings: Settings) -> str:
    """Take a picture of the study's page with an installed Chromium; where it lies, or why there is none."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    page = f"{settings.url}/studies/{STUDY}"
    if browser is None:
        return f"no picture, because no Chromium is installed; `caddie up --home {settings.home}` serves {page}"
    picture = settings.home / "page.png"
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                "--window-size=1280,1800",
                "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
                f"--user-data-dir={profile}", f"--screenshot={picture}", page,
            ],
            check=False, capture_output=True, timeout=60,
        )  # fmt: skip
    return str(picture) if picture.exists() else f"no picture: {Path(browser).name} took none of {page}"
