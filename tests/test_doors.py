"""The doors: tokens, the sign-in of a browser, and what a server refuses to start without."""

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import httpx
import pytest
from deadline import wait_for

from api.admission import Door
from api.client import ApiError, Caddie
from api.limits import MAX_STREAMS_EACH
from api.sign_in import own_path
from api.up import require_door
from orchestrator.access import Role
from orchestrator.audit import list_audits
from orchestrator.database import Database
from orchestrator.errors import Conflict, NotFound
from orchestrator.journal import Journal
from orchestrator.settings import Settings
from orchestrator.sign_ins import MOST_SIGN_INS, find_sign_in, open_sign_in
from orchestrator.tables import SignInRow, TokenRow
from orchestrator.tokens import create_token, digest, find_token, has_tokens, list_tokens, note_use, revoke_token
from worker.shape import FieldError

ADMIN = "0123456789abcdef0123456789abcdef"
GONE_SECONDS = 5.0  # a second is promised; this machine may be busy


@pytest.fixture
def url(database: Database, serve: Callable[..., str]) -> str:
    """A server with a shut door, of which CADDIE_ADMIN_TOKEN is known."""
    return serve(database, dashboard=False, door=Door(admin_sha256=digest(ADMIN)))


@pytest.fixture
def admin(url: str) -> Iterator[Caddie]:
    with Caddie(url, token=ADMIN) as caddie:
        yield caddie


@contextmanager
def browser(url: str, token: str) -> Iterator[httpx.Client]:
    """A browser that has signed in."""
    with httpx.Client(base_url=url, timeout=30, headers={"Accept": "text/html"}) as client:
        answer = client.post("/sign-in", data={"token": token, "next": "/cluster"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/cluster"), answer.text
        yield client


def csrf_of(client: httpx.Client) -> str:
    """What a page gives its forms."""
    return client.get("/").text.partition('<meta name="csrf" content="')[2].partition('"')[0]


# Tokens


def test_a_token_is_found_by_its_text_alone_and_its_text_is_nowhere(database: Database, now: datetime) -> None:
    with database.write() as session:
        token, text = create_token(session, "anna", Role.VIEWER, now)
        other, other_text = create_token(session, "ben", Role.ADMIN, now)
    with database.read() as session:
        assert find_token(session, text) == token
        secret = text.split("_", 2)[2]
        swapped = f"caddie_{other.id}_{secret}"
        for wrong in (
            "",
            "caddie",
            swapped,
            text[:-1],
            f"{text} ",
            text.upper(),
            "caddie_999_" + "x" * 43,
            token.sha256,
        ):
            assert find_token(session, wrong) is None
        stored = [vars(row) for row in session.query(TokenRow)]
    assert secret not in str(stored) and other_text.split("_", 2)[2] not in str(stored)


def test_a_name_is_given_once_and_never_one_that_the_audit_needs(database: Database, now: datetime) -> None:
    with database.write() as session:
        token, _ = create_token(session, "anna", Role.VIEWER, now)
        revoke_token(session, token.id, now)
    with pytest.raises(Conflict, match="another token"), database.write() as session:
        create_token(session, "anna", Role.VIEWER, now)
    for name in ("local", "environment", "", "a b", "a\nb", "x" * 65):
        with pytest.raises(FieldError, match="name"), database.write() as session:
            create_token(session, name, Role.VIEWER, now)


def test_revoking_again_changes_nothing(database: Database, now: datetime) -> None:
    with database.write() as session:
        token, _ = create_token(session, "anna", Role.VIEWER, now)
        first = revoke_token(session, token.id, now)
        assert revoke_token(session, token.id, now + timedelta(days=1)) == first
        assert has_tokens(session)
        assert not first.is_usable(now)
        with pytest.raises(NotFound):
            revoke_token(session, 99, now)


def test_a_tokens_use_is_noted_once_a_minute(database: Database, now: datetime) -> None:
    with database.write() as session:
        token, _ = create_token(session, "anna", Role.VIEWER, now)
    for seconds, noted in ((0, 0), (59, 0), (60, 60), (61, 60)):
        with database.write() as session:
            note_use(session, token.id, now + timedelta(seconds=seconds))
            assert list_tokens(session)[0].last_used_at == now + timedelta(seconds=noted)


def test_a_sign_in_ends_after_its_week_and_is_then_cleared_away(database: Database, now: datetime) -> None:
    with database.write() as session:
        cookie = open_sign_in(session, "a" * 64, now)
        assert find_sign_in(session, cookie, now + timedelta(days=6)) == "a" * 64
        assert find_sign_in(session, cookie, now + timedelta(days=8)) is None
        assert find_sign_in(session, cookie[:-1] + "!", now) is None
        open_sign_in(session, "b" * 64, now + timedelta(days=8))
    with database.read() as session:
        assert [row.token_sha256 for row in session.query(SignInRow)] == ["b" * 64]


# Over HTTP


def test_a_token_is_made_used_listed_and_revoked_over_the_api(admin: Caddie, url: str, database: Database) -> None:
    made = admin.create_token({"name": "anna", "role": "viewer", "expires_in_days": 7})
    assert made.token.startswith(f"caddie_{made.id}_")
    with Caddie(url, token=made.token) as anna:
        assert (anna.me().name, anna.me().role) == ("anna", "viewer")
        assert anna.studies() == []
        with pytest.raises(ApiError, match="takes a role of submitter") as refused:
            anna.create_study({"name": "s", "recipe": "laptop"})
        assert refused.value.kind == "forbidden"
        wait_for(lambda: admin.tokens()[0].last_used_at is not None, "the use to be noted", GONE_SECONDS)
        assert made.token.split("_", 2)[2] not in admin.tokens()[0].model_dump_json()
        admin.revoke_token(made.id)

        def gone() -> bool:
            try:
                anna.me()
            except ApiError as error:
                return error.kind == "unauthenticated"
            return False

        wait_for(gone, "the revoked token to open nothing", GONE_SECONDS)
    done = [(audit.actor, audit.action, audit.subject) for audit in admin.audit()]
    subject = f"tokens/{made.id}"
    assert done == [("environment", "token.revoke", subject), ("environment", "token.create", subject)]


def test_the_audit_says_which_token_wrote_and_is_read_in_pages(admin: Caddie, url: str) -> None:
    made = admin.create_token({"name": "anna", "role": "submitter"})
    with Caddie(url, token=made.token) as anna:
        anna.create_study({"name": "sweep", "recipe": "laptop"})
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {ADMIN}"}) as http:
        first = http.get("/v1/audit?limit=1").json()
        assert [(a["actor"], a["subject"]) for a in first["items"]] == [("anna", "studies/sweep")]
        second = http.get(f"/v1/audit?limit=1&before={first['next']}").json()
        assert ([a["action"] for a in second["items"]], second["next"]) == (["token.create"], None)


def test_an_open_stream_ends_when_its_token_is_revoked(admin: Caddie, url: str) -> None:
    made = admin.create_token({"name": "anna", "role": "viewer"})
    headers = {"Authorization": f"Bearer {made.token}"}
    with httpx.stream("GET", f"{url}/v1/events", headers=headers, timeout=30) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith(":")
        admin.revoke_token(made.id)
        wait_for(
            lambda: httpx.get(f"{url}/v1/me", headers=headers).status_code == 401,
            "the token to be forgotten",
            GONE_SECONDS,
        )
        admin.create_study({"name": "secret", "recipe": "laptop"})  # news, which must not reach the stream
        assert "secret" not in "\n".join(lines)


def test_a_signed_in_browser_reads_and_writes_with_its_pages_token_only(admin: Caddie, url: str) -> None:
    made = admin.create_token({"name": "anna", "role": "submitter"})
    study = {"name": "sweep", "recipe": "laptop"}
    with browser(url, made.token) as client:
        assert "anna" in client.get("/").text
        csrf = csrf_of(client)
        assert len(csrf) == 64
        others = [{"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}]
        others += [{"Origin": "http://evil.example"}, {"Origin": "null"}]
        for forged in ({}, {"X-CSRF-Token": "0" * 64}, *({"X-CSRF-Token": csrf, **other} for other in others)):
            assert client.post("/v1/studies", json=study, headers=forged).status_code == 403, forged
        own = {"X-CSRF-Token": csrf, "Origin": url, "Sec-Fetch-Site": "same-origin"}
        assert client.post("/v1/studies", json=study, headers=own).status_code == 201
        assert client.post("/sign-out").status_code == 403
        assert client.post("/sign-out", data={"csrf": csrf}).headers["location"] == "/sign-in"
        assert "caddie_sign_in" not in client.cookies


def test_a_sign_out_and_a_revoked_token_end_a_sign_in(admin: Caddie, url: str) -> None:
    made = admin.create_token({"name": "anna", "role": "viewer"})
    with browser(url, made.token) as one, browser(url, made.token) as two:
        kept = dict(one.cookies)
        one.post("/sign-out", data={"csrf": csrf_of(one)})
        assert httpx.get(f"{url}/v1/me", cookies=kept).status_code == 401
        assert two.get("/v1/me").json()["name"] == "anna"
        admin.revoke_token(made.id)
        wait_for(lambda: two.get("/v1/me").status_code == 401, "the other sign-in to end with its token", GONE_SECONDS)


def test_of_a_tokens_sign_ins_the_latest_are_kept_and_none_once_it_is_revoked(
    database: Database, now: datetime
) -> None:
    with database.write() as session:
        token, _ = create_token(session, "anna", Role.VIEWER, now)
        other = open_sign_in(session, "b" * 64, now)
        cookies = [open_sign_in(session, token.sha256, now) for _ in range(MOST_SIGN_INS + 2)]
        known = [find_sign_in(session, cookie, now) is not None for cookie in cookies]
        assert known == [False] * 2 + [True] * MOST_SIGN_INS
        revoke_token(session, token.id, now)
        assert [row.token_sha256 for row in session.query(SignInRow)] == ["b" * 64]
        assert find_sign_in(session, other, now) == "b" * 64


@pytest.mark.parametrize("backend", ["sqlite"])
def test_who_signs_in_all_the_time_waits(url: str) -> None:
    with httpx.Client(base_url=url) as client:
        answers = [client.post("/sign-in", data={"token": ADMIN}).status_code for _ in range(40)]
    assert set(answers) == {303, 429}


@pytest.mark.parametrize("backend", ["sqlite"])
def test_a_form_that_cannot_be_read_and_an_origin_that_is_none_are_refused(url: str) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    with browser(url, ADMIN) as client:
        csrf = csrf_of(client)
        for body in (b"&".join([b"a=1"] * 1001), b"&".join([b"a=1"] * 1001) + b"&csrf=" + csrf.encode()):
            assert client.post("/sign-out", content=body, headers=form).status_code == 400
        for body in ("text=é".encode(), b"csrf=\xff", b"csrf=%ff", b"csrf=%f0%9f"):
            assert client.post("/sign-out", content=body, headers=form).status_code == 403, body
        for origin in (b"http://[", b"http://\xff", b"\xff"):
            assert (
                client.post("/sign-out", headers={b"Origin": origin, b"X-CSRF-Token": csrf.encode()}).status_code == 403
            )
        text = f"text=é&csrf={csrf}".encode()
        assert client.post("/sign-out", content=text, headers=form).status_code == 303


@pytest.mark.parametrize("backend", ["sqlite"])
def test_one_token_has_so_many_streams(url: str, admin: Caddie) -> None:
    made = admin.create_token({"name": "anna", "role": "viewer"})
    headers = {"Authorization": f"Bearer {made.token}"}
    with ExitStack() as open_streams, httpx.Client(base_url=url, headers=headers, timeout=30) as client:
        for _ in range(MAX_STREAMS_EACH):
            stream = open_streams.enter_context(client.stream("GET", "/v1/events"))
            assert stream.status_code == 200
        refused = client.get("/v1/events")
        assert refused.status_code == 429 and "anna has 50 streams open" in refused.json()["detail"]
        assert int(refused.headers["retry-after"]) >= 1
        with admin_stream(url) as other:
            assert other.status_code == 200
        stream.close()
        wait_for(lambda: opens(client), "the closed stream to count no more", GONE_SECONDS)


def opens(client: httpx.Client) -> bool:
    with client.stream("GET", "/v1/events") as stream:
        return stream.status_code == 200


def admin_stream(url: str) -> AbstractContextManager[httpx.Response]:
    return httpx.stream("GET", f"{url}/v1/events", headers={"Authorization": f"Bearer {ADMIN}"}, timeout=30)


def test_a_sign_in_holds_in_another_process_and_after_a_restart(
    admin: Caddie, url: str, database: Database, serve: Callable[..., str]
) -> None:
    other = serve(database, dashboard=False, door=Door(admin_sha256=digest(ADMIN)))
    without = serve(database, dashboard=False, door=Door(loopback=False))
    with browser(url, ADMIN) as client:
        cookies = dict(client.cookies)
    assert httpx.get(f"{other}/v1/me", cookies=cookies).json()["name"] == "environment"
    # The environment's token is worth something only where the environment has it.
    assert httpx.get(f"{without}/v1/me", cookies=cookies).status_code == 401


@pytest.mark.parametrize("backend", ["sqlite"])
def test_the_cookie_is_the_browsers_alone(url: str) -> None:
    answer = httpx.post(f"{url}/sign-in", data={"token": ADMIN})
    flags = answer.headers["set-cookie"].lower()
    assert "httponly" in flags and "samesite=lax" in flags and "path=/" in flags and "domain" not in flags
    assert "secure" not in flags
    assert ADMIN not in flags
    # As behind a proxy on this machine that speaks https.
    behind = {"X-Forwarded-Proto": "https"}
    flags = httpx.post(f"{url}/sign-in", data={"token": ADMIN}, headers=behind).headers["set-cookie"]
    assert flags.startswith("__Host-") and "Secure" in flags
    wrong = httpx.post(f"{url}/sign-in", data={"token": "wrong"})
    assert wrong.status_code == 401 and "set-cookie" not in wrong.headers
    assert "unknown, expired or revoked" in wrong.text


@pytest.mark.parametrize("backend", ["sqlite"])
def test_a_page_sends_who_is_not_known_to_the_sign_in_and_back(url: str) -> None:
    page = {"Accept": "text/html"}
    answer = httpx.get(f"{url}/studies/sweep?tab=1", headers=page)
    assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in?next=%2Fstudies%2Fsweep%3Ftab%3D1")
    form = httpx.get(url + answer.headers["location"], headers=page)
    assert form.status_code == 200 and 'value="/studies/sweep?tab=1"' in form.text
    assert "default-src 'self'" in form.headers["content-security-policy"]
    assert httpx.get(f"{url}/studies/sweep/live").status_code == 401


@pytest.mark.parametrize(
    "place",
    ["//evil.example", "https://evil.example", "/\\evil.example", "\\\\evil.example", "/\t/evil.example", "evil",
     "javascript:alert(1)", "", "//[", "http://[", "/a\r\nSet-Cookie: x=1", "///evil.example", "/\n/evil.example"],
)  # fmt: skip
def test_a_sign_in_leads_to_no_other_host(place: str) -> None:
    assert own_path(place) == "/"
    assert own_path("/studies/a?b=c#d") == "/studies/a?b=c#d"


# The open door


@pytest.mark.parametrize("backend", ["sqlite"])
def test_an_open_door_is_for_this_machine_and_shuts_with_the_first_token(
    database: Database, serve: Callable[..., str]
) -> None:
    url = serve(database, dashboard=False)
    port = url.rpartition(":")[2]
    study = {"name": "sweep", "recipe": "laptop"}
    assert httpx.get(f"{url}/v1/me").json() == {"name": "local", "role": "admin", "token_id": None}
    assert httpx.get(f"{url}/v1/me", headers={"Host": f"localhost:{port}"}).status_code == 200
    for refused in (
        {"Host": "evil.example"},
        {"Host": f"127.0.0.1.evil.example:{port}"},
        {"X-Forwarded-For": "10.1.2.3"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"X-Forwarded-Proto": "https"},
        {"Forwarded": "for=127.0.0.1"},
        {"Via": "1.1 proxy"},
        {"Host": "[::1"},
    ):
        assert httpx.get(f"{url}/v1/me", headers=refused).status_code == 403, refused
    for refused in (
        {"Origin": "http://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://localhost:1"},
    ):
        assert httpx.post(f"{url}/v1/studies", json=study, headers=refused).status_code == 403, refused
    assert httpx.post(f"{url}/v1/studies", json=study, headers={"Origin": url}).status_code == 201
    assert httpx.get(f"{url}/sign-in?next=/cluster").headers["location"] == "/cluster"
    with Caddie(url, token="") as local:
        with pytest.raises(ApiError, match="must be admin") as early:
            local.create_token({"name": "vera", "role": "viewer"})
        assert early.value.status == 422
        local.create_token({"name": "anna", "role": "admin"})
    wait_for(lambda: httpx.get(f"{url}/v1/me").status_code == 401, "the door to shut", GONE_SECONDS)
    assert "--role admin --local" in httpx.get(f"{url}/v1/me").json()["detail"]
    assert httpx.get(f"{url}/healthz").status_code == 200


def test_an_address_that_others_reach_needs_a_token(database: Database, database_url: str, now: datetime) -> None:
    def settings(**environment: str) -> Settings:
        return Settings.read({"CADDIE_DATABASE_URL": database_url, **environment})

    for host in ("127.0.0.1", "localhost", "::1"):
        require_door(settings(CADDIE_HOST=host), database, now)
    with pytest.raises(FieldError, match="caddie token create NAME --role admin --local, or set CADDIE_ADMIN_TOKEN"):
        require_door(settings(CADDIE_HOST="0.0.0.0"), database, now)
    require_door(settings(CADDIE_HOST="0.0.0.0", CADDIE_ADMIN_TOKEN=ADMIN), database, now)
    with database.write() as session:
        create_token(session, "anna", Role.ADMIN, now, now + timedelta(days=1))
    require_door(settings(CADDIE_HOST="0.0.0.0"), database, now)
    with pytest.raises(FieldError, match="other machines"):
        require_door(settings(CADDIE_HOST="0.0.0.0"), database, now + timedelta(days=2))


@pytest.mark.parametrize("backend", ["sqlite"])
def test_a_cluster_gets_its_first_token_without_a_server_and_starts_with_it(
    empty_database_url: str, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CADDIE_")} | {
        "CADDIE_HOME": str(tmp_path), "CADDIE_DATABASE_URL": empty_database_url,
    }  # fmt: skip

    def caddie(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "api.cli", *arguments]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=100)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    refused = caddie("api", CADDIE_HOST="0.0.0.0", CADDIE_PORT=port)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "caddie token create" in refused.stderr
    Database(empty_database_url).migrate()
    early = caddie("token", "create", "vera", "--role", "viewer", "--local")
    assert early.returncode == 2 and "must be admin" in early.stderr
    made = caddie("token", "create", "anna", "--role", "admin", "--local")
    assert made.returncode == 0, made.stderr
    database = Database(empty_database_url)
    with database.read() as session:
        found = find_token(session, made.stdout.strip())
        assert found is not None and (found.name, found.role) == ("anna", "admin")
        assert [audit.actor for audit in list_audits(session)] == ["local"]
    database.close()
    again = caddie("token", "create", "anna", "--role", "admin", "--local")
    assert again.returncode == 2 and "another token" in again.stderr


def test_an_entry_of_the_log_is_one_line_whatever_is_in_it() -> None:
    forged = "lost\n2026-03-01 api INFO all is well\x1b[2J"
    record = logging.LogRecord("api", logging.WARNING, "", 0, "attempt %s", (forged,), None)
    try:
        raise ValueError(forged)
    except ValueError:
        record.exc_info = sys.exc_info()
    first, *rest = Journal().format(record).split("\n")
    assert first.endswith("WARNING attempt lost\\n2026-03-01 api INFO all is well\\x1b[2J")
    assert rest and all(line.startswith("  ") for line in rest)
    assert "\x1b" not in "".join(rest)
