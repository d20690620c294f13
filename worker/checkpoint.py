"""Checkpoints: how training goes on, bit for bit, in an attempt after the one that was lost."""

import contextlib
import hashlib
import io
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import torch

from worker.course import Course
from worker.source import code_digest
from worker.spec import TrialSpec
from worker.world import World

KEPT_SECONDS = 7 * 86_400.0
"""How long a checkpoint that nobody went on from is kept: its attempts may all have failed."""
DIGEST_BYTES = 32

_log = logging.getLogger(__name__)


class Part(Protocol):
    """What has a state that training needs to go on: torch's own convention."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values. With several ranks, all of them ask for it, and it is equal on all of them."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Go on from a state, whose tensors are on the host."""
        ...


class Checkpoint:
    """The file that a spec's next attempt goes on from: a digest, then the parts' states.

    It appears whole under its name or not at all, whenever the writer is killed, and holds what every rank needs, so
    that ranks never disagree about it. Attempts of equal specs share it: their states are equal, and a file that
    another attempt has replaced or removed harms none. What cannot be read or written is logged and costs time alone.
    """

    def __init__(self, data_root: Path, spec: TrialSpec, every_seconds: float, world: World) -> None:
        self._every_seconds, self._world = every_seconds, world
        self._key = _key(spec)
        self._path = data_root / "checkpoints" / self._key

    def due(self, course: Course) -> bool:
        """Whether the last step passed a multiple of the time between two checkpoints, and more steps will follow.

        The same on every rank, since rank 0's seconds are those of all.
        """
        seconds, every = course.progress.seconds, self._every_seconds
        return course.fraction < 1 and seconds // every > (seconds - course.last_step_seconds) // every

    def resume(self, parts: Sequence[Part]) -> None:
        """Give every part, on every rank, its state of the last `write`. Without one that can be used they stay."""
        data = self._world.lead_bytes(self._read() if self._world.leads else b"")
        if not data:
            return
        states = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
        if self._world.leads:
            _log.info("training goes on from the checkpoint %s", self._path)

    def write(self, parts: Sequence[Part]) -> None:
        """Keep the parts' states, in place of those of the last time. All ranks take part."""
        states = [part.state_dict() for part in parts]
        if not self._world.leads:
            return
        data = io.BytesIO()
        torch.save(states, data)
        unfinished = self._path.with_name(f".{self._key}.{uuid4().hex}")
        try:
            unfinished.parent.mkdir(exist_ok=True)
            with unfinished.open("xb") as file:  # unsynced: a file that a power cut tears fails its digest
                file.write(self._digest(data.getbuffer()))
                file.write(data.getbuffer())
            unfinished.replace(self._path)
        except OSError as error:
            _log.warning("no checkpoint was written, training goes on: %s", error)
            _remove(unfinished)
        _remove_old(self._path.parent, time.time() - KEPT_SECONDS)

    def remove(self) -> None:
        """Leave nothing behind, neither of this attempt nor of those before it: there is a result."""
        for path in self._path.parent.glob(f"*{self._key}*"):
            _remove(path)

    def _read(self) -> bytes:
        """The states of the last `write`; nothing where there are none that can be used."""
        try:
            data = memoryview(self._path.read_bytes())
        except FileNotFoundError:
            return b""
        except OSError as error:
            _log.warning("the checkpoint cannot be read, training starts over: %s", error)
            return b""
        digest, states = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
        if digest != self._digest(states):
            _log.warning("the checkpoint %s is damaged or not this spec's, training starts over", self._path)
            return b""
        return bytes(states)

    def _digest(self, states: memoryview) -> bytes:
        digest = hashlib.sha256(self._key.encode())
        digest.update(states)
        return digest.digest()


def _key(spec: TrialSpec) -> str:
    """SHA-256 (hex), equal where training is equal bit for bit: the spec without its limits, this code, this torch."""
    plain = json.dumps(spec.model_dump(mode="json", exclude={"limits"}), sort_keys=True)
    return hashlib.sha256(f"{plain}\n{code_digest()}\n{torch.__version__}".encode()).hexdigest()


def _remove_old(folder: Path, before: float) -> None:
    """Remove the files of a folder that were last written before a time, in seconds since the epoch."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another attempt's, and removed by it
                if path.stat().st_mtime < before:
                    path.unlink()


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
