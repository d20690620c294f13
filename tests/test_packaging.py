"""pyproject.toml and requirements.lock say what the tree needs: no package, data file or dependency is forgotten."""

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGES = ("api", "migrations", "orchestrator", "worker")
DISTRIBUTIONS = {"yaml": "pyyaml"}  # where the name that one imports is not the name that one installs


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_every_package_is_listed(pyproject: dict[str, Any]) -> None:
    found = {path.parent.relative_to(ROOT) for top in PACKAGES for path in (ROOT / top).rglob("*.py")}
    assert set(pyproject["tool"]["setuptools"]["packages"]) == {".".join(path.parts) for path in found}


def test_every_file_that_is_no_module_is_packaged(pyproject: dict[str, Any]) -> None:
    packaged = {
        path
        for package, patterns in pyproject["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    files = {path for top in PACKAGES for path in (ROOT / top).rglob("*") if path.is_file()}
    assert {path for path in files if path.suffix not in (".py", ".pyc")} <= packaged


def test_every_imported_distribution_is_a_dependency(pyproject: dict[str, Any]) -> None:
    declared = {canonical(Requirement(text).name) for text in pyproject["project"]["dependencies"]}
    imported: dict[str, str] = {}
    for path in (path for top in PACKAGES for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0]: str(path) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported[node.module.partition(".")[0]] = str(path)
    foreign = {name: where for name, where in imported.items() if name not in {*sys.stdlib_module_names, *PACKAGES}}
    missing = {
        name: where for name, where in foreign.items() if canonical(DISTRIBUTIONS.get(name, name)) not in declared
    }
    assert not missing


def test_the_lock_pins_every_dependency_inside_its_range(pyproject: dict[str, Any], pins: dict[str, str]) -> None:
    project = pyproject["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    locked = {canonical(name): version for name, version in pins.items()}
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        if requirement.name != project["name"]:
            assert canonical(requirement.name) in locked, f"{requirement.name} is not in requirements.lock"
            assert locked[canonical(requirement.name)] in requirement.specifier, str(requirement)


def test_the_lock_holds_plain_pins_and_torch_as_published(pins: dict[str, str]) -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert pins["torch"] == "2.13.0"
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines if not line.startswith("#"))
    assert not {name for name in pins if name.startswith(("nvidia", "triton", "caddie"))}
