"""The folder of a local Ray: its sockets and logs, gone with the process that owns it, or when the next one starts."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "caddie-ray-"


class RayFolder:
    """A folder, locked for as long as its owner lives. Its path is short: socket paths are limited to 107 bytes."""

    def __init__(self, parent: Path | None = None) -> None:
        """Make one, and remove those in the same parent (/tmp where there is one) that a killed owner left behind."""
        home = parent or Path("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir())
        for left in home.glob(f"{PREFIX}*"):
            _remove_if_left(left)
        self.path, self._lock = _make(home)
        while not os.fstat(self._lock).st_nlink:  # removed by another process, in the moment before it was locked
            os.close(self._lock)
            self.path, self._lock = _make(home)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _make(home: Path) -> tuple[Path, int]:
    """A new folder, and its lock: an open file that processes started later do not inherit."""
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=home))
    lock = os.open(path / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return path, lock


def _remove_if_left(folder: Path) -> None:
    """Remove a folder whose owner is dead. One that is just being made, or is another user's, is left alone."""
    try:
        lock = os.open(folder / "lock", os.O_RDWR)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:  # its owner lives
        pass
    finally:
        os.close(lock)
