"""What a program of Caddie reads from its environment, once, when it starts."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from worker.shape import FieldError

KNOWN = {
    "CADDIE_HOME": "folder of the embedded database, artifacts, data and logs (default ~/.caddie)",
    "CADDIE_DATABASE_URL": "sqlite:///… or postgresql://… (default: SQLite in the home)",
    "CADDIE_ARTIFACTS": "folder of artifacts (default: artifacts in the home)",
    "CADDIE_DATA": "folder of datasets and tokenizers, the same on every node (default: data in the home)",
    "CADDIE_HOST": "address that the API binds (default 127.0.0.1)",
    "CADDIE_PORT": "port that the API binds (default 8765)",
    "CADDIE_URL": "where the command line finds the API (default http://127.0.0.1:8765)",
    "CADDIE_TOKEN": "what the command line signs in with, where the API asks who calls",
    "CADDIE_ADMIN_TOKEN": "an admin's token that the API takes besides those in its database",
    "CADDIE_REQUESTS_PER_SECOND": "how much one token may ask of one API process (default 3000)",
    "CADDIE_LAUNCHER": "ray or local: what runs gangs (default ray)",
    "CADDIE_RAY_ADDRESS": "an existing Ray cluster to join; without it Ray starts on this machine",
    "CADDIE_RANKS": "ranks that may train side by side on this machine (default: its CPU cores)",
    "CADDIE_LEASE_SECONDS": "how long a silent orchestrator keeps its attempts, and its gangs wait for it (default 30)",
    "CADDIE_GRACE_SECONDS": "how long an orchestrator that got SIGTERM lets its attempts go on (default 10)",
    "CADDIE_GPU_HOUR_DOLLARS": "what the ledger reckons for one GPU for an hour (default 2.5)",
    "CADDIE_OWNER": "this orchestrator's name, its own, and the same after a restart (default: host and process)",
}

EXECUTOR = "executor:"
"""Begins the owner's name of attempts that are asked for and told over HTTP."""
GPU_HOUR_DOLLARS = 2.5  # a node of eight H100 costs about $20 an hour


@dataclass(frozen=True)
class Settings:
    """Every path absolute, every number checked."""

    home: Path
    database_url: str
    artifacts: Path
    data: Path
    host: str
    port: int
    url: str
    token: str | None = field(repr=False)
    admin_token: str | None = field(repr=False)
    requests_per_second: int
    launcher: Literal["ray", "local"]
    ray_address: str | None
    ranks: int
    lease_seconds: float
    grace_seconds: float
    gpu_hour_dollars: float
    owner: str

    @property
    def address(self) -> str:
        """Where an API with these settings answers on this machine. The command line may use another: `url`."""
        return _address(self.host, self.port)

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Settings":
        """Settings from CADDIE_* variables. Raises FieldError naming one that is unknown or has a wrong value."""
        for name in sorted(environment):
            if name.startswith("CADDIE_") and name not in KNOWN:
                raise FieldError(name, environment[name], f"is not a setting; there are {', '.join(KNOWN)}")
        home = Path(environment.get("CADDIE_HOME") or Path.home() / ".caddie").expanduser().absolute()
        launcher = environment.get("CADDIE_LAUNCHER", "ray")
        if launcher not in ("ray", "local"):
            raise FieldError("CADDIE_LAUNCHER", launcher, "must be ray or local")
        host = environment.get("CADDIE_HOST", "127.0.0.1")
        port = int(_number(environment, "CADDIE_PORT", 8765, 1, 65_535, whole=True))
        owner = environment.get("CADDIE_OWNER") or f"{socket.gethostname()}-{os.getpid()}"
        if owner.startswith(EXECUTOR):  # it would take over the attempts of executors, which only they can end
            raise FieldError("CADDIE_OWNER", owner, f"must not begin with {EXECUTOR}, as the names of executors do")
        return cls(
            home=home,
            database_url=environment.get("CADDIE_DATABASE_URL") or f"sqlite:///{home / 'caddie.db'}",
            artifacts=_path(environment, "CADDIE_ARTIFACTS", home / "artifacts"),
            data=_path(environment, "CADDIE_DATA", home / "data"),
            host=host,
            port=port,
            url=_url(environment, _address(host, port)),
            token=environment.get("CADDIE_TOKEN") or None,
            admin_token=_secret(environment, "CADDIE_ADMIN_TOKEN"),
            requests_per_second=int(_number(environment, "CADDIE_REQUESTS_PER_SECOND", 3000, 1, 1_000_000, whole=True)),
            launcher="ray" if launcher == "ray" else "local",
            ray_address=environment.get("CADDIE_RAY_ADDRESS") or None,
            ranks=int(_number(environment, "CADDIE_RANKS", os.cpu_count() or 1, 1, 4096, whole=True)),
            lease_seconds=_number(environment, "CADDIE_LEASE_SECONDS", 30, 1, 3600),
            grace_seconds=_number(environment, "CADDIE_GRACE_SECONDS", 10, 0, 86_400),
            gpu_hour_dollars=_number(environment, "CADDIE_GPU_HOUR_DOLLARS", GPU_HOUR_DOLLARS, 0, 1000),
            owner=owner,
        )


def _path(environment: Mapping[str, str], name: str, default: Path) -> Path:
    value = environment.get(name)
    return Path(value).expanduser().absolute() if value else default


def _address(host: str, port: int) -> str:
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


def _url(environment: Mapping[str, str], default: str) -> str:
    value = environment.get("CADDIE_URL")
    if value and not re.fullmatch(r"https?://[^\s/]\S*", value):
        raise FieldError("CADDIE_URL", value, "must be an address such as http://127.0.0.1:8765")
    return value or default


def _secret(environment: Mapping[str, str], name: str) -> str | None:
    value = environment.get(name) or None
    if value is not None and not re.fullmatch(r"[\x21-\x7e]{32,}", value):
        raise FieldError(name, "…", "must be at least 32 characters of ASCII without spaces: openssl rand -hex 32")
    return value


def _number(
    environment: Mapping[str, str], name: str, default: float, low: float, high: float, *, whole: bool = False
) -> float:
    text = environment.get(name)
    if not text:
        return default
    kind = "a whole number" if whole else "a number"
    if not re.fullmatch(r"\d+" if whole else r"\d+(\.\d+)?", text) or not low <= float(text) <= high:
        raise FieldError(name, text, f"must be {kind} from {low:g} to {high:g}")
    return float(text)
