import hashlib
from pathlib import Path

import pytest

from orchestrator.artifacts import ArtifactStore, DamagedArtifact
from orchestrator.study import Artifact


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def test_what_is_put_is_got_back_under_its_digest(artifacts: ArtifactStore) -> None:
    artifact = artifacts.put(b"weights")
    assert artifact.sha256 == hashlib.sha256(b"weights").hexdigest()
    assert artifact.bytes == len(b"weights")
    assert artifacts.get(artifact) == b"weights"


def test_putting_the_same_bytes_twice_keeps_one_file(artifacts: ArtifactStore) -> None:
    assert artifacts.put(b"weights") == artifacts.put(b"weights")
    assert len([path for path in artifacts.root.rglob("*") if path.is_file()]) == 1


@pytest.mark.parametrize("damaged", [b"wei", b"weightz"], ids=["short", "changed"])
def test_a_damaged_file_is_replaced_when_its_bytes_are_put_again(artifacts: ArtifactStore, damaged: bytes) -> None:
    path = artifacts.path(artifacts.put(b"weights"))
    path.write_bytes(damaged)
    assert artifacts.get(artifacts.put(b"weights")) == b"weights"


def test_a_damaged_or_missing_file_is_refused(artifacts: ArtifactStore) -> None:
    artifact = artifacts.put(b"weights")
    artifacts.path(artifact).write_bytes(b"weightz")
    with pytest.raises(DamagedArtifact, match="does not have the SHA-256"):
        artifacts.get(artifact)
    artifacts.path(artifact).unlink()
    with pytest.raises(DamagedArtifact, match="missing"):
        artifacts.get(artifact)


@pytest.mark.parametrize("uri", ["../../etc/passwd", "sha256/ab/../../../x", "/etc/passwd", "file:///etc/passwd", ""])
def test_a_uri_never_leaves_the_folder(artifacts: ArtifactStore, uri: str) -> None:
    with pytest.raises(DamagedArtifact, match="not of the form"):
        artifacts.path(Artifact(uri, 1, "00"))
