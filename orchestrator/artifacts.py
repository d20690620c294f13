"""Artifacts on disk, named by their own SHA-256: putting one twice is putting it once."""

import hashlib
import os
import re
import tempfile
from pathlib import Path

from orchestrator.study import Artifact


class DamagedArtifact(RuntimeError):
    """A stored file is missing, or is not what its digest says."""


class ArtifactStore:
    """Files below one folder. URIs are relative to it (`sha256/ab/ab12…`), so that the folder can move."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, data: bytes) -> Artifact:
        """Store bytes. Afterwards the whole file is on disk under its digest, or nothing is."""
        digest = hashlib.sha256(data).hexdigest()
        artifact = Artifact(f"sha256/{digest[:2]}/{digest}", len(data), digest)
        path = self.path(artifact)
        if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
            return artifact
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
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

    def get(self, artifact: Artifact) -> bytes:
        """The bytes, after checking their digest. Raises DamagedArtifact."""
        try:
            data = self.path(artifact).read_bytes()
        except FileNotFoundError:
            raise DamagedArtifact(f"artifact {artifact.uri} is missing below {self.root}") from None
        if hashlib.sha256(data).hexdigest() != artifact.sha256:
            raise DamagedArtifact(f"artifact {artifact.uri} does not have the SHA-256 it was stored under")
        return data

    def path(self, artifact: Artifact) -> Path:
        """Where the file lies. A URI that is not one of ours never leaves the folder: it raises DamagedArtifact."""
        if not re.fullmatch(r"sha256/[0-9a-f]{2}/[0-9a-f]{64}", artifact.uri):
            raise DamagedArtifact(f"artifact URI {artifact.uri!r} is not of the form sha256/ab/ab12…")
        return self.root / artifact.uri


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder outlast a power cut, as the file's own contents do."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
