"""A Ray of our own within this process, for an orchestrator that is alone."""

import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from orchestrator.ray_folder import RayFolder
from orchestrator.ray_head import OBJECT_STORE_BYTES


def start_local(ranks: int, options: dict[str, Any]) -> RayFolder:
    """Start a Ray of our own on this machine, with the folder that is returned.

    Ray listens on every interface, and turns on the token that it asks of callers unless RAY_AUTH_MODE says otherwise.
    Given in the environment, that token is not written to the user's home.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it warns that this is on
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    folder = RayFolder()
    try:
        ray.init(
            "local",
            num_cpus=ranks,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(folder.path),
            **options,
        )
    except BaseException:
        folder.remove()
        raise
    return folder


@contextmanager
def own_sigterm() -> Iterator[None]:
    """Keep this program's answer to SIGTERM, which ray.init would replace by an exit of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Ray leaves signals alone in other threads
        return
    kept = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, kept)
