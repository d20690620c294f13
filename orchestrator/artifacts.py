"""Artifacts on disk, named by their own SHA-256: putting one twice is putting it once."""

import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from orchestrator.study import Artifact

URI = re.compile(r"sha256/[0-9a-f]{2}/[0-9a-f]{64}")
PARTIAL = ".partial-"  # begins the name of a file that is not whole yet


class DamagedArtifact(RuntimeError):
    """A stored file is missing, or is not what its digest says."""


@dataclass(frozen=True)
class StoredFile:
    """One file of the store. `uri` is relative to its root; `put_at` is when its bytes were last put."""

    uri: str
    bytes: int
    put_at: datetime
    whole: bool


@dataclass
class Incoming:
    """An artifact that arrives in pieces."""

    path: Path
    temporary: Path
    sha256: str
    file: IO[bytes]
    size: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def write(self, piece: bytes) -> None:
        self.file.write(piece)
        self.digest.update(piece)
        self.size += len(piece)

    def keep(self) -> Artifact | None:
        """Store what came, as `put` does; None where it does not have the digest that was announced."""
        if self.digest.hexdigest() != self.sha256:
            return None
        self.file.flush()
        os.fsync(self.file.fileno())
        os.replace(self.temporary, self.path)
        _sync_folder(self.path.parent)
        return _artifact(self.sha256, self.size)


class ArtifactStore:
    """Files below one folder. URIs are relative to it (`sha256/ab/ab12…`), so that the folder can move."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, data: bytes) -> Artifact:
        """Store bytes. Afterwards the whole file is on disk under its digest, or nothing is."""
        digest = hashlib.sha256(data).hexdigest()
        artifact = _artifact(digest, len(data))
        path = self.path(artifact)
        if _touch(path, digest):
            return artifact
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL)
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(handle, 0o644)  # the API may run as another user
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return artifact

    @contextmanager
    def receive(self, sha256: str) -> Iterator["Incoming"]:
        """Store what comes in pieces, if it has this digest once it is whole; else nothing is stored."""
        path = self.path(_artifact(sha256, 0))
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL)
        incoming = Incoming(path, Path(temporary), sha256, os.fdopen(handle, "wb"))
        try:
            os.fchmod(handle, 0o644)
            yield incoming
        finally:
            incoming.file.close()
            Path(temporary).unlink(missing_ok=True)

    def find(self, sha256: str, size: int) -> Artifact | None:
        """The artifact of this digest and so many bytes, if it is stored."""
        artifact = _artifact(sha256, size)
        try:
            return artifact if self.path(artifact).stat().st_size == size else None
        except (DamagedArtifact, FileNotFoundError):
            return None

    def get(self, artifact: Artifact) -> bytes:
        """The bytes, after checking their digest. Raises DamagedArtifact."""
        try:
            data = self.path(artifact).read_bytes()
        except FileNotFoundError:
            raise self._missing(artifact) from None
        _require_digest(artifact, hashlib.sha256(data).hexdigest())
        return data

    def check(self, artifact: Artifact) -> None:
        """Read the file, a piece at a time, and compare its digest. Raises DamagedArtifact, also for a read error."""
        try:
            with self.path(artifact).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise self._missing(artifact) from None
        except OSError as error:
            raise DamagedArtifact(f"artifact {artifact.uri} cannot be read: {error.strerror}") from None
        _require_digest(artifact, digest)

    def files(self) -> Iterator[StoredFile]:
        """What was put here, whole or not, by URI. Files of any other name are not the store's, and left out."""
        for path in sorted(self.root.glob(f"sha256/{'[0-9a-f]' * 2}/*")):
            uri = path.relative_to(self.root).as_posix()
            whole = URI.fullmatch(uri) is not None
            if not whole and not path.name.startswith(PARTIAL):
                continue
            try:
                found = path.stat()
            except FileNotFoundError:  # it has just become whole, or was removed
                continue
            if stat.S_ISREG(found.st_mode):
                yield StoredFile(uri, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC), whole)

    def remove(self, file: StoredFile, before: datetime) -> bool:
        """Delete a file, unless it was put again at `before` or later; whether it is gone.

        It is moved aside first. Whoever puts the same bytes meanwhile has either touched it by then, so that it is
        moved back, or no longer finds it, and writes it anew.
        """
        path = self.root / file.uri
        aside = path.with_name(f"{PARTIAL}{path.name.removeprefix(PARTIAL)}")
        try:
            os.replace(path, aside)
            if aside.stat().st_mtime >= before.timestamp():
                os.replace(aside, path)
                return False
            aside.unlink()
        except FileNotFoundError:
            pass
        return True

    def path(self, artifact: Artifact) -> Path:
        """Where the file lies. A URI that is not one of ours never leaves the folder: it raises DamagedArtifact."""
        if not URI.fullmatch(artifact.uri):
            raise DamagedArtifact(f"artifact URI {artifact.uri!r} is not of the form sha256/ab/ab12…")
        return self.root / artifact.uri

    def _missing(self, artifact: Artifact) -> DamagedArtifact:
        return DamagedArtifact(f"artifact {artifact.uri} is missing below {self.root}")


def _artifact(sha256: str, size: int) -> Artifact:
    return Artifact(f"sha256/{sha256[:2]}/{sha256}", size, sha256)


def _touch(path: Path, digest: str) -> bool:
    """Make a file that has this digest as new as one just put, so that no one takes it for abandoned."""
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            return False
        os.utime(path)
    except (FileNotFoundError, PermissionError):  # the second for another user's file, which can still be replaced
        return False
    return True


def _require_digest(artifact: Artifact, digest: str) -> None:
    if digest != artifact.sha256:
        raise DamagedArtifact(f"artifact {artifact.uri} does not have the SHA-256 it was stored under")


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder outlast a power cut, as the file's own contents do."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
