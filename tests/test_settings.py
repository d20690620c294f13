from pathlib import Path

import pytest

from orchestrator.settings import KNOWN, Settings
from worker.shape import FieldError


def test_everything_lies_in_the_home_unless_said_otherwise(tmp_path: Path) -> None:
    settings = Settings.read({"CADDIE_HOME": str(tmp_path)})
    assert settings.database_url == f"sqlite:///{tmp_path}/caddie.db"
    assert (settings.artifacts, settings.data) == (tmp_path / "artifacts", tmp_path / "data")
    moved = Settings.read(
        {"CADDIE_HOME": str(tmp_path), "CADDIE_ARTIFACTS": "/a", "CADDIE_DATABASE_URL": "postgresql://h/d"}
    )
    assert (moved.artifacts, moved.database_url) == (Path("/a"), "postgresql://h/d")


def test_the_command_line_looks_for_the_api_where_it_listens() -> None:
    assert Settings.read({"CADDIE_PORT": "9000"}).url == "http://127.0.0.1:9000"
    assert Settings.read({"CADDIE_HOST": "0.0.0.0", "CADDIE_PORT": "9000"}).url == "http://127.0.0.1:9000"
    assert Settings.read({"CADDIE_URL": "http://caddie:1"}).url == "http://caddie:1"
    for wrong in ("foo", "caddie:1", "http://", "ftp://caddie"):
        with pytest.raises(FieldError, match="CADDIE_URL"):
            Settings.read({"CADDIE_URL": wrong})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("CADDIE_PROT", "9000", "is not a setting"),
        ("CADDIE_PORT", "http", "a whole number from 1 to 65535"),
        ("CADDIE_PORT", "70000", "a whole number from 1 to 65535"),
        ("CADDIE_RANKS", "0", "a whole number from 1"),
        ("CADDIE_LEASE_SECONDS", "-3", "a number from 1"),
        ("CADDIE_GRACE_SECONDS", "90000", "a number from 0 to 86400"),
        ("CADDIE_GPU_HOUR_DOLLARS", "2,5", "a number from 0"),
        ("CADDIE_LAUNCHER", "slurm", "must be ray or local"),
        ("CADDIE_REQUESTS_PER_SECOND", "0", "a whole number from 1"),
    ],
)
def test_a_wrong_variable_is_named_with_its_value_and_what_would_be_right(name: str, value: str, says: str) -> None:
    with pytest.raises(FieldError, match=says) as error:
        Settings.read({name: value})
    assert (error.value.path, error.value.value) == (name, value)


def test_every_known_variable_is_read() -> None:
    numbers = {"CADDIE_PORT": "1", "CADDIE_RANKS": "1", "CADDIE_LEASE_SECONDS": "1", "CADDIE_LAUNCHER": "local"}
    numbers |= {"CADDIE_REQUESTS_PER_SECOND": "1", "CADDIE_ADMIN_TOKEN": "x" * 32}
    numbers |= {"CADDIE_GPU_HOUR_DOLLARS": "1", "CADDIE_GRACE_SECONDS": "1", "CADDIE_URL": "http://caddie"}
    default = Settings.read({})
    for name in KNOWN:
        assert Settings.read({name: numbers.get(name, "/elsewhere")}) != default, name


def test_a_guessable_admin_token_is_refused_and_never_shown() -> None:
    with pytest.raises(FieldError, match="at least 32 characters") as error:
        Settings.read({"CADDIE_ADMIN_TOKEN": "hunter2"})
    assert "hunter2" not in str(error.value)
    assert "x" * 32 not in repr(Settings.read({"CADDIE_ADMIN_TOKEN": "x" * 32, "CADDIE_TOKEN": "x" * 32}))
