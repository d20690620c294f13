"""Every route of the application, by everyone: nobody, viewer, submitter, admin, revoked, expired."""

import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient

from api.app import create_app
from orchestrator.access import Role
from orchestrator.database import Database
from orchestrator.tokens import create_token, revoke_token

NOW = datetime.now(UTC)
OPEN = ("/healthz", "/readyz", "/sign-in", "/assets", "/assets/plotly.min.js")
DASHBOARD = ("/dashboard", "/favicon.ico", "/api/", "/static/", "/csv/")
VISITORS = ("nobody", "viewer", "submitter", "admin", "revoked", "expired")
REFUSED = (401, 403)


@pytest.fixture(scope="module")
def client(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The whole application over an empty database."""
    folder = tmp_path_factory.mktemp("permissions")
    shutil.copy(sqlite_template, folder / "caddie.db")
    database = Database(f"sqlite:///{folder / 'caddie.db'}")
    app = create_app(database, artifacts=folder)
    app.state.context.closing.set()  # streams end at once
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1), raise_server_exceptions=False) as client:
        yield client
    database.close()


@pytest.fixture(scope="module")
def tokens(client: TestClient) -> dict[str, str]:
    """A token of every visitor."""
    made = {}
    with client.app.state.context.database.write() as session:  # type: ignore[attr-defined]
        for role in Role:
            made[role.value] = create_token(session, role.value, role, NOW)[1]
        revoked, made["revoked"] = create_token(session, "revoked", Role.ADMIN, NOW)
        revoke_token(session, revoked.id, NOW)
        long_ago = NOW - timedelta(days=2)
        made["expired"] = create_token(session, "expired", Role.ADMIN, long_ago, long_ago + timedelta(days=1))[1]
    return made


def expected(visitor: str, path: str, method: str, own: str | None) -> int | None:
    """The status that a visitor is refused with, or None who is let in."""
    if path in OPEN:
        return None
    if visitor in ("nobody", "revoked", "expired"):
        return 401
    needed = Role(own) if own else Role.VIEWER if method in ("GET", "HEAD") else Role.SUBMITTER
    return None if Role(visitor).includes(needed) else 403


def test_every_route_lets_in_whom_it_should_and_nobody_else(client: TestClient, tokens: dict[str, str]) -> None:
    seen = set()
    for route in iter_route_contexts(list(client.app.router.routes)):  # type: ignore[attr-defined]
        assert route.path is not None
        own = (getattr(route, "openapi_extra", None) or {}).get("x-role")
        address = re.sub(r"{\w+}", "99", re.sub(r"{\w+:path}", "x", route.path))
        address = "/assets/caddie.css" if address == "/assets" else address
        for method in sorted(route.methods or {"GET", "POST", "DELETE"}):
            for visitor in VISITORS:
                allowed = expected(visitor, route.path, method, own) is None
                if allowed and address.startswith(DASHBOARD) and method in ("GET", "HEAD"):
                    continue  # it would load optuna
                headers = {"Authorization": f"Bearer {tokens[visitor]}"} if visitor in tokens else {}
                answer = client.request(method, address, headers=headers, follow_redirects=False)
                status = answer.status_code if answer.status_code in REFUSED else None
                if (route.path, method) == ("/sign-in", "POST"):
                    continue  # it answers 401 to a form without a token, whoever sends it
                assert status == expected(visitor, route.path, method, own), (method, route.path, visitor)
                if answer.status_code in REFUSED and method != "HEAD":
                    assert answer.headers["content-type"] == "application/problem+json"
                    assert ("www-authenticate" in answer.headers) == (answer.status_code == 401)
                seen.add((route.path, method))
    assert ("/v1/tokens", "POST") in seen and ("/dashboard", "GET") in seen and ("/", "GET") in seen
    assert len(seen) > 60


def test_a_path_that_does_not_exist_tells_nobody_so(client: TestClient, tokens: dict[str, str]) -> None:
    assert client.get("/v1/nothing").status_code == 401
    known = {"Authorization": f"Bearer {tokens['viewer']}"}
    for path in ("/v1/nothing", "/nothing", "/v1/studies/nothing"):
        answer = client.get(path, headers=known)
        assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
    wrong = client.put("/v1/studies", headers={"Authorization": f"Bearer {tokens['submitter']}"})
    assert (wrong.status_code, wrong.headers["content-type"]) == (405, "application/problem+json")


@pytest.mark.parametrize("path", ["/v1//tokens", "/V1/tokens", "/v1/tokens/", "/v1/./tokens", "/v1/%74okens"])
def test_another_spelling_of_an_admins_path_opens_it_to_no_viewer(
    client: TestClient, tokens: dict[str, str], path: str
) -> None:
    answer = client.get(path, headers={"Authorization": f"Bearer {tokens['viewer']}"})
    assert answer.status_code in (403, 404)
    assert "sha256" not in answer.text and '"items"' not in answer.text


def test_the_document_says_who_may_call_what(client: TestClient, tokens: dict[str, str]) -> None:
    document = client.get("/v1/openapi.json", headers={"Authorization": f"Bearer {tokens['viewer']}"}).json()
    roles = {(path, method): o.get("x-role") for path, of in document["paths"].items() for method, o in of.items()}
    assert roles["/v1/tokens", "get"] == roles["/v1/audit", "get"] == "admin"
    assert roles["/v1/studies", "get"] == roles["/v1/preview", "post"] == "viewer"
    assert roles["/v1/studies", "post"] == "submitter"
    assert roles["/healthz", "get"] is None
