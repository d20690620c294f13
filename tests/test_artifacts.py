import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from orchestrator.artifacts import PARTIAL, ArtifactStore, DamagedArtifact
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


def test_an_abandoned_file_is_removed_and_one_put_again_is_not(artifacts: ArtifactStore) -> None:
    artifact = artifacts.put(b"weights")
    os.utime(artifacts.path(artifact), (0, 0))
    (abandoned,) = artifacts.files()
    later = datetime.fromtimestamp(1, UTC)
    assert (abandoned.uri, abandoned.bytes, abandoned.whole) == (artifact.uri, len(b"weights"), True)
    artifacts.put(b"weights")  # by another attempt, whose row is on the way
    assert not artifacts.remove(abandoned, later)
    assert artifacts.get(artifact) == b"weights"
    os.utime(artifacts.path(artifact), (0, 0))
    assert artifacts.remove(abandoned, later)
    assert artifacts.remove(abandoned, later)
    assert list(artifacts.files()) == []


def test_only_what_was_put_is_listed_whole_or_not(artifacts: ArtifactStore) -> None:
    assert list(artifacts.files()) == []
    artifact = artifacts.put(b"weights")
    folder = artifacts.path(artifact).parent
    (folder / f"{PARTIAL}x").write_bytes(b"wei")
    (folder / "notes.txt").write_text("not ours")
    (artifacts.root / "notes.txt").write_text("not ours")
    assert {(file.uri, file.bytes, file.whole) for file in artifacts.files()} == {
        (artifact.uri, 7, True),
        (f"{folder.relative_to(artifacts.root).as_posix()}/{PARTIAL}x", 3, False),
    }


def test_a_check_finds_what_reading_would(artifacts: ArtifactStore) -> None:
    artifact = artifacts.put(b"weights")
    artifacts.check(artifact)
    artifacts.path(artifact).write_bytes(b"weightz")
    with pytest.raises(DamagedArtifact, match="does not have the SHA-256"):
        artifacts.check(artifact)
    artifacts.path(artifact).unlink()
    with pytest.raises(DamagedArtifact, match="missing"):
        artifacts.check(artifact)
