"""The rules of CONTRIBUTING.md that a program can hold: what imports what, and how large things may grow."""

import ast
import fnmatch
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("api", "migrations", "orchestrator", "worker")
CONTRACT = (
    "worker.inventory",
    "worker.mailbox",
    "worker.packing",
    "worker.recipes",
    "worker.report",
    "worker.scoring",
    "worker.shape",
    "worker.sharing",
    "worker.source",
    "worker.spec",
    "worker.trainer",
    "worker.tying",
)
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
DRAWERS = {"utils", "util", "helpers", "common", "misc", "manager", "handler", "service"}


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def loaded_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after running the code."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_the_api_app_answers_without_torch_ray_and_optuna(tmp_path: Path) -> None:
    loaded = loaded_after(
        f"""
from pathlib import Path
from fastapi.testclient import TestClient
from api.app import create_app
from orchestrator.database import Database

database = Database("sqlite:///{tmp_path / "caddie.db"}")
database.migrate()
app = create_app(database, artifacts=Path("{tmp_path}"))
with TestClient(app, base_url="http://localhost", client=("127.0.0.1", 1)) as client:
    assert client.get("/readyz").status_code == 200
    assert client.get("/v1/studies").status_code == 200
"""
    )
    assert "fastapi" in loaded
    assert not loaded & {"torch", "ray", "optuna", "optuna_dashboard"}


def test_the_command_line_and_the_client_load_nothing_of_a_server() -> None:
    loaded = loaded_after("import api.cli")
    assert "typer" in loaded
    assert not loaded & {"torch", "ray", "optuna", "alembic", "fastapi", "numpy", "sqlalchemy", "starlette"}


def test_the_workers_contract_loads_without_torch() -> None:
    loaded = loaded_after("import " + ", ".join(CONTRACT))
    assert "pydantic" in loaded
    assert not loaded & {"torch", "numpy", "sqlalchemy", "ray", "optuna"}


def test_no_module_outside_the_worker_loads_torch() -> None:
    modules = [
        module.name
        for package in ("api", "orchestrator")
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}.")
        if not module.name.endswith("__main__")
    ]
    loaded = loaded_after("import " + ", ".join(modules))
    assert {"api", "orchestrator", "sqlalchemy"} <= loaded
    assert "torch" not in loaded


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_stays_short_and_so_do_its_functions(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines < MAX_FILE_LINES, f"{path} has {lines} lines: it wants to be two nouns"
    if "versions" not in path.parts:  # a revision is one list of operations
        long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(path) if f.end_lineno}
        assert not {name: count for name, count in long.items() if count >= MAX_FUNCTION_LINES}


def test_no_file_is_a_drawer() -> None:
    assert not [path for path in sources() if path.stem in DRAWERS]


@pytest.mark.parametrize("package", ["api", "orchestrator", "worker"])
def test_the_design_names_every_module_of_a_package_and_no_other(package: str) -> None:
    (row,) = (line for line in (ROOT / "DESIGN.md").read_text().splitlines() if line.startswith(f"| `{package}/` |"))
    named = re.findall(r"`([\w*]+)`", row)
    modules = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
    assert [name for name in named if not fnmatch.filter(modules, name)] == []
    assert [name for name in modules if not any(fnmatch.fnmatch(name, pattern) for pattern in named)] == []


def test_no_test_folder_hides_a_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
