"""What somebody who means harm sends, and what comes of it: nothing."""

import ast
import asyncio
import json
import re
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from claims import NewStudies, NewTrials, Results
from deadline import wait_for
from fastapi.routing import iter_route_contexts

from api.admission import Door
from api.app import create_app
from api.limits import BODY_BYTES, MAX_DEPTH, require_shallow
from api.problems import Refusal, problem_of
from api.server import MOST_OF_ADDRESS
from orchestrator import leases, store
from orchestrator.access import Role
from orchestrator.database import Database
from orchestrator.lifecycle import Cause, Outcome
from orchestrator.study import AttemptResult
from orchestrator.tokens import create_token, digest

ROOT = Path(__file__).parents[1]
ONE_KEY = {"Idempotency-Key": "one"}
STUDY = {"name": "sweep", "recipe": "laptop"}
HOSTILE = """<img src=x onerror=alert(1)>"'</script><script>alert(2)</script>{{7*7}}"""


def raw(url: str, request: bytes, seconds: float = 10.0) -> bytes:
    """What comes back for these very bytes, until the server closes the connection."""
    parts = urlsplit(url)
    with socket.create_connection((str(parts.hostname), parts.port or 80), timeout=seconds) as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


def get(url: str, target: str) -> bytes:
    host = urlsplit(url).netloc
    return raw(url, f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())


@pytest.fixture
def url(database: Database, serve: Callable[..., str], tmp_path: Path) -> str:
    return serve(database, artifacts=tmp_path / "artifacts", dashboard=False)


only_sqlite = pytest.mark.parametrize("backend", ["sqlite"])


# Bodies


@only_sqlite
def test_a_body_too_large_is_refused_whether_it_says_so_or_not(url: str) -> None:
    said = httpx.post(f"{url}/v1/studies", content=b"x" * (BODY_BYTES + 1))
    assert (said.status_code, said.json()["type"]) == (413, "urn:caddie:problem:too-large")

    def pieces() -> Iterator[bytes]:
        for _ in range(BODY_BYTES // 65536 + 2):
            yield b"x" * 65536

    with suppress(httpx.WriteError):  # where the server had said so, and gone, before the last piece was sent
        assert httpx.post(f"{url}/v1/studies", content=pieces()).status_code == 413
    assert httpx.get(f"{url}/v1/studies").json()["items"] == []


@only_sqlite
@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b'{"a":' * 50_000, b"[" * 40 + b"]" * 40, json.dumps(STUDY).encode("utf-16")],
    ids=["lists", "objects", "closed", "utf-16"],
)
def test_a_body_that_nests_deep_is_refused_before_it_is_parsed(url: str, body: bytes) -> None:
    answer = httpx.post(f"{url}/v1/studies", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["type"]) == (400, "urn:caddie:problem:malformed-body")


def test_the_depth_of_a_body_is_that_of_its_brackets_outside_of_texts() -> None:
    deepest = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    require_shallow(b"[" + b",".join([b"{}"] * 1000) + b"]")
    require_shallow(deepest)
    require_shallow(b'["' + b"[" * 1000 + b'", "\\"' + b"{" * 1000 + b'"]')
    for deep in (b"[" + deepest + b"]", b'["\\\\", ' + deepest + b"]", b'{"a\\"": [' + deepest + b"]}"):
        with pytest.raises(Refusal, match="levels"):
            require_shallow(deep)


@only_sqlite
@pytest.mark.parametrize("path", ["/sign-in", "/healthz", "/assets/caddie.css"])
def test_where_nobody_is_asked_who_they_are_a_body_is_small(url: str, path: str) -> None:
    answer = httpx.post(f"{url}{path}", content=b"[" + b"[]," * 10_000 + b"[]]")
    assert (answer.status_code, answer.json()["type"]) == (413, "urn:caddie:problem:too-large")


@only_sqlite
@pytest.mark.parametrize(
    "body",
    [
        json.dumps(STUDY | {f"k{number}": 0 for number in range(2000)}).encode(),
        json.dumps(STUDY | {"overrides": {f"k{number}": 0 for number in range(2000)}}).encode(),
        json.dumps(STUDY | {f"k{number}": 0 for number in range(140_000)}).encode(),
        b'{"a": [' + b",".join([b'{"a":1,"a":1}'] * 2000) + b"]}",
        b'{"a": [' + b",".join([b'"\\u0000"'] * 200_000) + b"]}",
    ],
    ids=["keys", "overrides", "140,000 keys", "twice", "NUL"],
)
def test_a_body_full_of_problems_is_answered_with_the_first_of_them(url: str, body: bytes) -> None:
    answer = httpx.post(f"{url}/v1/studies", content=body, headers={"Content-Type": "application/json"}, timeout=30)
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:caddie:problem:invalid-input")
    assert 1 <= len(answer.json()["problems"]) <= 50 and len(answer.content) < 20_000


# Clients that take their time


@only_sqlite
def test_a_client_that_trickles_is_cut_off(database: Database, serve: Callable[..., str]) -> None:
    url = serve(database, dashboard=False, door=Door(patience_seconds=0.5))
    host = urlsplit(url).netloc.encode()
    head = b"POST /v1/studies HTTP/1.1\r\nHost: " + host + b"\r\nContent-Type: application/json\r\n"
    began = time.monotonic()
    assert raw(url, b"GET /v1/me HTT") == b""
    assert b" 408 " in raw(url, head + b"Content-Length: 100\r\n\r\n{").partition(b"\r\n")[0]
    assert b" 408 " in raw(url, head + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n").partition(b"\r\n")[0]
    # An answer that did not wait for the body is the end of the connection too.
    early = raw(url, b"GET /v1/nothing HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 100\r\n\r\n{")
    assert b" 403 " in early.partition(b"\r\n")[0]
    assert time.monotonic() - began < 15
    assert httpx.get(f"{url}/v1/me").status_code == 200


def slow_reader(url: str, target: str) -> socket.socket:
    """A connection that has asked for this, with little room for what comes."""
    parts = urlsplit(url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect((str(parts.hostname), parts.port or 80))
    connection.sendall(f"GET {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode())
    return connection


def received_bytes(connection: socket.socket, pause_seconds: float = 0.0) -> int:
    """How much comes until the server ends the connection, to one who reads with pauses for the first while."""
    size, began = 0, time.monotonic()
    with suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            size += len(piece)
            time.sleep(pause_seconds if time.monotonic() - began < 2 else 0.0)
    return size


@only_sqlite
def test_a_client_that_does_not_read_is_cut_off_and_a_slow_one_is_not(
    database: Database, serve: Callable[..., str]
) -> None:
    url = serve(database, dashboard=False, door=Door(patience_seconds=0.5))
    bundle = len(httpx.get(f"{url}/assets/plotly.min.js").content)
    stuck, slow = (slow_reader(url, "/assets/plotly.min.js") for _ in range(2))
    with stuck, slow:
        assert received_bytes(slow, pause_seconds=0.2) > bundle  # while the other reads nothing for over 2 s
        assert 0 < received_bytes(stuck) < bundle


@only_sqlite
def test_one_address_does_not_take_all_connections(url: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    parts = urlsplit(url)
    with ExitStack() as opened:
        for _ in range(MOST_OF_ADDRESS):
            opened.enter_context(socket.create_connection((str(parts.hostname), parts.port or 80)))
        refused = httpx.get(f"{url}/healthz")
        assert (refused.status_code, refused.json()["type"]) == (503, "urn:caddie:problem:not-ready")
        assert refused.headers["content-type"] == "application/problem+json" and refused.headers["retry-after"] == "1"
        other = httpx.Client(base_url=url, transport=httpx.HTTPTransport(local_address="127.0.0.2"))
        with other:
            assert other.get("/healthz").status_code == 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    wait_for(
        lambda: httpx.get(f"{url}/healthz").status_code == 200, "the closed connections to count no more", seconds=10
    )


def test_who_asks_too_often_is_told_when_to_come_again(database: Database, serve: Callable[..., str]) -> None:
    url = serve(database, dashboard=False, door=Door(requests_per_second=5))
    with httpx.Client(base_url=url) as client:
        answers = [client.get("/v1/me") for _ in range(40)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert answers[0].status_code == 200 and refused
        assert refused[0].json()["type"] == "urn:caddie:problem:too-many-requests"
        assert int(refused[0].headers["retry-after"]) >= 1
        assert client.get("/healthz").status_code == 200


def test_open_paths_take_so_many_requests_of_one_address(database: Database, serve: Callable[..., str]) -> None:
    url = serve(database, dashboard=False, door=Door(requests_per_second=5))
    with httpx.Client(base_url=url) as client:
        assert {client.get("/healthz").status_code for _ in range(40)} == {200, 429}


@only_sqlite
def test_wrong_tokens_keep_nobody_out_who_has_a_right_one(database: Database, serve: Callable[..., str]) -> None:
    environment = "e" * 32
    url = serve(database, dashboard=False, door=Door(loopback=False, admin_sha256=digest(environment)))
    with database.write() as session:
        _, right = create_token(session, "anna", Role.VIEWER, datetime.now().astimezone())
    with httpx.Client(base_url=url) as client:
        for number in range(60):
            client.get("/v1/me", headers={"Authorization": f"Bearer wrong{number}"})
        for shown in (right, environment):
            assert client.get("/v1/me", headers={"Authorization": f"Bearer {shown}"}).status_code == 200
        # What reads like a token is looked up and refused as what it is, however often it comes.
        for number in range(60):
            made_up = f"caddie_{number}_{'x' * 43}"
            assert client.get("/v1/me", headers={"Authorization": f"Bearer {made_up}"}).status_code == 401


@only_sqlite
def test_wrong_tokens_from_one_address_soon_wait(database: Database, serve: Callable[..., str]) -> None:
    url = serve(database, dashboard=False, door=Door(loopback=False))
    with database.write() as session:
        _, right = create_token(session, "anna", Role.VIEWER, datetime.now().astimezone())
    with httpx.Client(base_url=url) as client:
        known = {"Authorization": f"Bearer {right}"}
        assert client.get("/v1/me", headers=known).status_code == 200
        tried = [client.get("/v1/me", headers={"Authorization": f"Bearer wrong{n}"}).status_code for n in range(60)]
        assert set(tried) == {401, 429}
        shown = [client.post("/sign-in", data={"token": f"guess{n}"}).status_code for n in range(60)]
        assert set(shown) == {401, 429}


# Paths


@only_sqlite
@pytest.mark.parametrize(
    "target",
    [
        "/assets/../../../../../../etc/passwd", "/assets/..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/assets/%2e%2e/%2e%2e/app.py", "/assets//etc/passwd", "/assets/..\\..\\app.py", "/assets/%00", "/%00",
        "/v1/studies/..%2f..%2fetc", "/v1/studies/%00", "/v1/studies/a%0d%0aSet-Cookie:%20x=1", "//etc/passwd",
        "/v1/studies/sweep/trials/..%2f..%2f0/artifact", "/v1/studies/%ff%fe", "/studies/%3Cscript%3E",
    ],
)  # fmt: skip
def test_a_path_leads_to_no_file_and_no_header(url: str, target: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    answer = get(url, target)
    status = int(answer.split(b" ", 2)[1])
    assert 400 <= status < 500
    head = answer.partition(b"\r\n\r\n")[0].lower()
    assert b"set-cookie" not in head and b"root:" not in answer and b"create_app" not in answer
    assert not [record for record in caplog.records if re.search(r"[\r\n\x00]", record.getMessage().strip())]


@only_sqlite
def test_a_path_with_a_control_character_is_none_and_opens_no_stream(url: str) -> None:
    for target in ("/v1/events%0A", "/v1/studies%0a", "/healthz%0A", "/studies%7f", "/%01"):
        answer = httpx.get(f"{url}{target}")
        assert (answer.status_code, answer.json()["type"]) == (404, "urn:caddie:problem:not-found"), target


@only_sqlite
@pytest.mark.parametrize("host", ["[::1", "\xff", "a b", "", "[localhost]"])
def test_a_host_that_is_no_hosts_name_is_refused(url: str, host: str) -> None:
    answer = raw(url, b"GET /v1/me HTTP/1.1\r\nHost: " + host.encode("latin-1") + b"\r\nConnection: close\r\n\r\n")
    assert answer.split(b" ", 2)[1] in (b"400", b"403"), answer


# Text


@pytest.fixture
def hostile(
    database: Database, new_study: NewStudies, new_trial: NewTrials, trial_result: Results, now: datetime
) -> None:
    """A study in which every text that comes from somewhere else is hostile."""
    with database.write() as session:
        study = store.create_study(session, new_study("sweep"), now)
        for _ in range(2):
            store.add_trial(session, study.id, new_trial(), now)
        store.add_trial(session, study.id, new_trial(verdict="cannot_fit", reason=HOSTILE), now)
    result = trial_result(
        bytes_by_class={HOSTILE: 60_000},
        diagnostics={HOSTILE: {HOSTILE: 1.0}, "codec": HOSTILE, "scores": {HOSTILE: 1.0}, "averages": {HOSTILE: 2.0}},
    )
    ends = (
        AttemptResult(Outcome.SUCCEEDED, result=result),
        AttemptResult(Outcome.FAILED, cause=Cause.BAD_INPUT, reason=HOSTILE),
    )
    for end in ends:
        with database.write() as session:
            claim = leases.claim(session, study.definition.shapes[0], HOSTILE, now, timedelta(minutes=5))
            assert claim is not None
            leases.finish(session, claim.lease, end, now)


def test_no_page_shows_a_text_as_anything_else(url: str, hostile: None) -> None:
    with httpx.Client(base_url=url, headers={"Accept": "text/html"}, timeout=60) as client:
        for number in (0, 1):
            trial = f"/v1/studies/sweep/trials/{number}"
            assert client.post(f"{trial}/notes", json={"text": HOSTILE}).status_code == 201
            assert client.put(f"{trial}/tags", json={"tags": [HOSTILE]}).status_code == 422
        escaped = 0
        for path in pages():
            for trial in ("0", "1", "2"):
                answer = client.get(path.replace("{study}", "sweep").replace("{number}", trial) + "?trials=0,1")
                assert answer.status_code < 500, path
                assert "<img src=x" not in answer.text and "<script>alert" not in answer.text, path
                assert "{{7" not in answer.text or "{{7*7}}" in answer.text, path
                escaped += "&lt;img src=x" in answer.text
                if "text/html" in answer.headers.get("content-type", ""):
                    require_policy(answer)
        assert escaped > 2, "the hostile text is on the pages, as text"


def pages() -> list[str]:
    """The paths of all pages and of their live parts."""
    app = create_app(Database("sqlite://"), dashboard=False)
    routes = iter_route_contexts(list(app.router.routes))
    found = [str(route.path) for route in routes if "GET" in (route.methods or ()) and _is_page(str(route.path))]
    assert {"/", "/studies/{study}", "/studies/{study}/trials/{number}", "/sign-in"} <= set(found)
    return found


def _is_page(path: str) -> bool:
    return not path.startswith(("/v1/", "/assets", "/healthz", "/readyz", "/metrics"))


def require_policy(answer: httpx.Response) -> None:
    """A page runs our own scripts alone, none of them written into it, and asks no other host for anything."""
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert "script-src" not in policy or "unsafe" not in policy.partition("script-src")[2].partition(";")[0]
    page = Tags()
    page.feed(answer.text)
    for tag, attributes in page.found:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert tag != "script" or attributes.get("src") or attributes.get("type") == "application/json", attributes
        for name in ("src", "href", "action"):
            assert not re.match(r"\s*(?:[a-z]+:|//)", attributes.get(name) or ""), (tag, attributes)


class Tags(HTMLParser):
    """The tags of a page as a browser sees them, with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


# Submitting


@pytest.mark.parametrize("requests", [200, pytest.param(10_000, marks=pytest.mark.soak)])
def test_many_submissions_under_one_key_are_one_trial(url: str, database: Database, requests: int) -> None:
    assert httpx.post(f"{url}/v1/studies", json=STUDY).status_code == 201

    async def submit_all() -> list[int]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

            async def submit() -> int:
                while True:
                    with suppress(httpx.TransportError):  # as a client does: that is what the key is for
                        answer = await client.post("/v1/studies/sweep/trials", json={"params": {}}, headers=ONE_KEY)
                        if answer.status_code not in (429, 503):
                            return answer.status_code
                        await asyncio.sleep(float(answer.headers["retry-after"]))

            return await asyncio.gather(*(submit() for _ in range(requests)))

    answers = asyncio.run(submit_all())
    assert answers.count(201) <= 1  # none where its answer was lost
    assert answers.count(200) == requests - answers.count(201)
    with database.read() as session:
        assert len(store.list_trials(session, store.get_study(session, "sweep").id)) == 1


# What comes over the network is never run


def test_nothing_is_unpickled_or_evaluated() -> None:
    for path in (path for package in ("api", "orchestrator", "worker") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules = {name.partition(".")[0] for name in names}
            assert not modules & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "yaml.unsafe_load", "yaml.full_load"), path
                if called in ("torch.load", "np.load", "numpy.load"):
                    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    safe = given.get("weights_only") == "True" or given.get("allow_pickle", "False") == "False"
                    assert safe and ("torch" not in called or "weights_only" in given), path


# A database that is away


@only_sqlite
def test_without_a_database_everything_but_the_health_says_come_again(
    empty_database_url: str, serve: Callable[..., str]
) -> None:
    database = Database(empty_database_url)
    url = serve(database, dashboard=False)
    for path in ("/v1/studies", "/", "/v1/me"):
        answer = httpx.get(f"{url}{path}")
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:caddie:problem:not-ready")
        assert answer.headers["retry-after"] == "1"
    assert httpx.get(f"{url}/healthz").status_code == 200
    database.close()


def test_an_error_of_the_database_is_no_error_of_ours() -> None:
    from sqlalchemy.exc import OperationalError

    details = problem_of(OperationalError("SELECT secret", {}, Exception("password=secret")))
    assert details.status == 503 and "secret" not in details.detail
