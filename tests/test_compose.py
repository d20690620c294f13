"""docker-compose.yml and Dockerfile name only what exists: commands, options, settings, paths, volumes."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from api.app import create_app
from orchestrator.database import Database
from orchestrator.settings import Settings

ROOT = Path(__file__).parents[1]
OURS = ("api", "migrate", "orchestrator")
SECRETS = {
    "POSTGRES_PASSWORD": "a-secret",
    "RAY_AUTH_TOKEN": "a-token",
    "CADDIE_ADMIN_TOKEN": "an-admins-token-of-32-characters-",
}


def filled(text: str) -> str:
    """A value as Compose would pass it: ${NAME:?why} taken from .env, $$ a literal dollar."""
    named = re.sub(r"\$\{(\w+)(?::\?[^}]*)?\}", lambda match: SECRETS[match[1]], text)
    return named.replace("$$", "$")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return data


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = compose["services"]
    return found


def commands(services: dict[str, Any], program: str) -> list[list[str]]:
    """The commands and health checks that call a program, those inside a shell line included."""
    lines = []
    for service in services.values():
        for words in (service.get("command", []), service.get("healthcheck", {}).get("test", ["CMD"])[1:]):
            if words[:2] == ["sh", "-c"]:
                lines += [shlex.split(filled(part)) for part in words[2].split("&&")]
            else:
                lines.append(list(words))
    plain = [line[1:] if line[:1] == ["exec"] else line for line in lines]
    return [line for line in plain if line[:1] == [program]]


def test_the_services_are_those_of_the_design(services: dict[str, Any]) -> None:
    assert set(services) == {"postgres", "migrate", "api", "orchestrator", "ray-head", "ray-worker"}


def test_every_caddie_command_exists(services: dict[str, Any]) -> None:
    called = commands(services, "caddie")
    assert {line[1] for line in called} == set(OURS)
    for line in called:
        script = "import sys; from api.cli import main; sys.argv[0] = 'caddie'; main()"
        run = subprocess.run([sys.executable, "-c", script, *line[1:], "--help"], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


def test_every_ray_option_exists(services: dict[str, Any]) -> None:
    called = commands(services, "ray")
    assert [line[1] for line in called].count("start") == 3
    for command in {line[1] for line in called}:
        ray = [str(Path(sys.executable).with_name("ray")), command, "--help"]
        shown = subprocess.run(ray, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
        assert shown.returncode == 0, shown.stderr
        known = set(re.findall(r"--[a-z-]+", shown.stdout))
        options = {word.partition("=")[0] for line in called if line[1] == command for word in line[2:]}
        assert options <= known


@pytest.mark.parametrize("name", OURS)
def test_the_environment_of_a_service_is_valid_settings(services: dict[str, Any], name: str) -> None:
    environment = {key: filled(str(value)) for key, value in services[name]["environment"].items()}
    settings = Settings.read({"HOME": "/nowhere", **environment})
    assert settings.database_url.startswith("postgresql")
    assert SECRETS["POSTGRES_PASSWORD"] in settings.database_url
    if name == "orchestrator":
        assert (settings.launcher, settings.ray_address) == ("ray", "ray-head:6379")


def test_compose_waits_for_the_grace_that_running_attempts_have(services: dict[str, Any]) -> None:
    service = services["orchestrator"]
    settings = Settings.read({"HOME": "/nowhere", **{k: filled(str(v)) for k, v in service["environment"].items()}})
    assert float(service["stop_grace_period"].removesuffix("s")) >= settings.grace_seconds + 15


def test_the_api_is_published_where_it_listens(services: dict[str, Any]) -> None:
    api = services["api"]
    settings = Settings.read({"HOME": "/nowhere", **{k: filled(v) for k, v in api["environment"].items()}})
    assert settings.host == "0.0.0.0"
    assert settings.admin_token == SECRETS["CADDIE_ADMIN_TOKEN"]  # else it would refuse to start
    assert api["ports"] == [f"127.0.0.1:{settings.port}:{settings.port}"]
    assert f":{settings.port}/" in " ".join(api["healthcheck"]["test"])


def test_the_health_check_asks_a_path_of_the_api(services: dict[str, Any], tmp_path: Path) -> None:
    asked = re.findall(r"http://[^/]+(/[^\"]*)", " ".join(services["api"]["healthcheck"]["test"]))
    database = Database(f"sqlite:///{tmp_path / 'caddie.db'}")
    paths = create_app(database, artifacts=tmp_path).openapi()["paths"]
    database.close()
    assert len(asked) == 1
    assert "get" in paths[asked[0]]


def test_what_one_service_waits_for_another_says(services: dict[str, Any]) -> None:
    for service in services.values():
        for name, needed in service.get("depends_on", {}).items():
            if needed["condition"] == "service_healthy":
                assert services[name]["healthcheck"]["test"]
            else:
                assert (needed["condition"], services[name]["restart"]) == ("service_completed_successfully", "no")


def test_volumes_are_declared_and_mounted_where_the_settings_say(compose: dict[str, Any]) -> None:
    services = compose["services"]
    mounts = {name: [v.split(":") for v in service.get("volumes", [])] for name, service in services.items()}
    assert {volume for found in mounts.values() for volume, _ in found} == set(compose["volumes"])
    for name in ("api", "orchestrator"):
        environment = services[name]["environment"]
        assert ["artifacts", environment["CADDIE_ARTIFACTS"]] in mounts[name]
    told = services["orchestrator"]["environment"]["CADDIE_DATA"]
    assert ["data", told] in mounts["ray-worker"]


def test_all_of_ray_shares_one_image_and_one_token(services: dict[str, Any]) -> None:
    members = [services[name] for name in ("orchestrator", "ray-head", "ray-worker")]
    assert len({member["image"] for member in members}) == 1
    assert len({member["environment"]["RAY_AUTH_TOKEN"] for member in members}) == 1
    assert {member["environment"]["RAY_AUTH_MODE"] for member in members} == {"token"}


def test_only_ray_workers_hold_gpus(services: dict[str, Any]) -> None:
    holding = {name for name, service in services.items() if "gpu" in yaml.safe_dump(service.get("deploy", {}))}
    assert holding == {"ray-worker"}


def test_the_dockerfile_copies_what_exists_and_what_the_context_holds() -> None:
    text = (ROOT / "Dockerfile").read_text()
    copied = {word for line in re.findall(r"^COPY (.+)$", text, re.M) for word in line.split()[:-1]} - {"."}
    context = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied <= context
    assert {"api", "migrations", "orchestrator", "worker", "README.md"} <= context
    assert not [name for name in context if not (ROOT / name).exists()]


def test_the_dockerfile_makes_the_folders_that_the_services_mount(services: dict[str, Any]) -> None:
    made = re.findall(r"/var/lib/caddie\S*", (ROOT / "Dockerfile").read_text())
    mounted = {v.split(":")[1] for name in (*OURS, "ray-worker") for v in services[name].get("volumes", [])}
    assert mounted <= set(made)
