"""The API as a client meets it: over HTTP, on both databases. Every answer must be declared in the OpenAPI document."""

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from claims import Results
from sqlalchemy import event, func, select, update

from api.app import openapi_text
from orchestrator import leases
from orchestrator.artifacts import ArtifactStore
from orchestrator.database import Database
from orchestrator.lifecycle import Outcome
from orchestrator.study import Artifact, AttemptResult, Claim
from orchestrator.tables import ArtifactRow, Base
from worker.recipes import load_recipe, recipe_names
from worker.spec import GangConfig, override, parse_spec

TTL = timedelta(minutes=5)
GOLDEN = Path(__file__).with_name("openapi.json")
STUDY: dict[str, Any] = {
    "name": "sweep",
    "recipe": "laptop",
    "space": {
        "sharing.lora.rank": {"choice": [0, 2, 4]},
        "sharing.unique_blocks": {"low": 1, "high": 6},
        "sharing.tying": {"choice": ["cycle", "sequence"]},
    },
    "cap_bytes": 1_000_000,
}
TOO_LARGE = {"overrides": {"model.width": 960, "sharing.unique_blocks": 6, "sharing.tying": "sequence"}}


class Declared:
    """Checks that every answer is one that the OpenAPI document declares for its route, in the media type it says."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.routes = [(path.split("/"), operations) for path, operations in document["paths"].items()]

    def __call__(self, answer: httpx.Response) -> None:
        media = answer.headers.get("content-type", "").partition(";")[0]
        if answer.status_code >= 400:
            assert media == "application/problem+json", answer.url
        declared = self._responses(answer.request)
        if declared is not None:
            assert str(answer.status_code) in declared, (
                f"{answer.request.method} {answer.url} said {answer.status_code}"
            )
            assert media in declared[str(answer.status_code)].get("content", {media: {}})

    def _responses(self, request: httpx.Request) -> dict[str, Any] | None:
        parts = request.url.raw_path.decode().partition("?")[0].split("/")
        for route, operations in self.routes:
            same = len(route) == len(parts) and all(a == b or a[:1] == "{" for a, b in zip(route, parts, strict=True))
            if same and request.method.lower() in operations:
                found: dict[str, Any] = operations[request.method.lower()]["responses"]
                return found
        return None


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


@pytest.fixture(scope="session")
def declared() -> Declared:
    return Declared(json.loads(openapi_text()))


@pytest.fixture
def http(
    database: Database, serve: Callable[..., str], artifacts: ArtifactStore, declared: Declared
) -> Iterator[httpx.Client]:
    url = serve(database, artifacts=artifacts.root, dashboard=False)
    with httpx.Client(base_url=url, timeout=30, event_hooks={"response": [declared]}) as client:
        yield client


@pytest.fixture
def study(http: httpx.Client) -> str:
    assert http.post("/v1/studies", json=STUDY).status_code == 201
    return "/v1/studies/sweep"


@pytest.fixture
def finish(database: Database, artifacts: ArtifactStore, trial_result: Results, now: datetime) -> Callable[..., Claim]:
    """Claims the first queued run and ends it in success, with an artifact; keywords replace the result's fields."""

    def run(**fields: Any) -> Claim:
        with database.write() as session:
            claim = leases.claim(session, GangConfig(), "host", now, TTL)
            assert claim is not None
        model = f"model of trial {claim.trial_number}".encode()
        result = trial_result(model_bytes=len(model), artifact_sha256=hashlib.sha256(model).hexdigest(), **fields)
        with database.write() as session:
            ended = AttemptResult(Outcome.SUCCEEDED, result=result, artifact=artifacts.put(model))
            leases.finish(session, claim.lease, ended, now)
        return claim

    return run


def rows(database: Database) -> dict[str, int]:
    """How many rows each table has."""
    with database.read() as session:
        return {t.name: session.scalar(select(func.count()).select_from(t)) or 0 for t in Base.metadata.sorted_tables}


def problem(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """The problem that an answer is, checked for what every problem has."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = answer.json()
    assert found["type"] == f"urn:caddie:problem:{kind}"
    assert found["status"] == status
    assert found["title"]
    assert found["detail"]
    return found


def test_the_openapi_document_is_the_golden_one() -> None:
    regenerate = "python -c 'from api.app import openapi_text; print(openapi_text(), end=\"\")' > tests/openapi.json"
    assert openapi_text() == GOLDEN.read_text(), f"if the change is meant: {regenerate}"


# Bad input: (what is sent to POST /v1/studies instead of STUDY, the field that the problem names)
BAD_STUDIES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"name": "Über"}, "name"),
    ({"name": "../etc"}, "name"),
    ({"name": "a\u0000b"}, "name"),
    ({"name": "\ud800"}, "name"),
    ({"nmae": "x"}, "nmae"),
    ({"recipe": "no-such"}, "recipe"),
    ({"recipe": None}, "base"),
    ({"size": "huge"}, "size"),
    ({"recipe": None, "base": {}, "size": "tiny"}, "size"),
    ({"base": {}}, "base"),
    ({"sampler": "annealing"}, "sampler"),
    ({"max_trials": -1}, "max_trials"),
    ({"cap_bytes": 0}, "cap_bytes"),
    ({"cap_bytes": 10**30}, "cap_bytes"),
    ({"overrides": {"model.heads": 7}}, "overrides.model.heads"),
    ({"overrides": {"sharing.tying": [0, 1, 1, 0, 1, 3]}}, "overrides.sharing.tying.map"),
    ({"overrides": {"sharing": "x", "sharing.lora.rank": 1}}, "overrides.sharing"),
    ({"overrides": {"sharing.tying.after": 1}}, "base.sharing.tying"),
    ({"space": {"model.width": {"low": 0, "high": 10**30}}}, "space.model.width.high"),
    ({"overrides": {"sharing.unique_blocks": 7}}, "overrides.sharing.unique_blocks"),
    ({"overrides": {"sharing.lora.rank": 97}}, "overrides.sharing.lora.rank"),
    ({"overrides": {"sharing.lora.rang": 1}}, "overrides.sharing.lora.rang"),
    ({"overrides": {"model.rope_base": float("nan")}}, "overrides.model.rope_base"),
    ({"overrides": {"data.dataset": "../../etc/passwd"}}, "overrides.data.dataset"),
    ({"space": {"sharing.lora.rank": {"low": 4, "high": 2}}}, "space.sharing.lora.rank.low"),
    ({"space": {"sharing.lora.rang": {"choice": [1]}}}, "space.sharing.lora.rang"),
    ({"space": {"model.width": {"choice": ["wide"]}}}, "space.model.width"),
    ({"space": {"model.width": {"from": 1}}}, "space.model.width.from"),
    ({"gangs": [{"ranks": 3}]}, "gangs.0.ranks"),
    ({"max_trials": True}, "max_trials"),
    ({"space": {"sharing.lora.rank": {"choice": [0, 999]}}}, "space.sharing.lora.rank"),
)


def test_a_study_that_cannot_be_is_refused_by_field_and_leaves_nothing(http: httpx.Client, database: Database) -> None:
    for change, field in BAD_STUDIES:
        body = {key: value for key, value in {**STUDY, **change}.items() if value is not None}
        answer = http.post("/v1/studies", content=json.dumps(body), headers={"Content-Type": "application/json"})
        found = problem(answer, 422, "invalid-input")
        assert field in [one["field"] for one in found["problems"]], change
        assert all(one["message"] for one in found["problems"]), change
    wholes: tuple[object, ...] = ([], "x")
    for whole in wholes:
        (found,) = problem(http.post("/v1/studies", json=whole), 422, "invalid-input")["problems"]
        assert found == {"field": "body", "value": whole, "message": "must be a mapping"}
    missing, unknown = problem(http.post("/v1/studies", json={"nam": {"a": [{}]}}), 422, "invalid-input")["problems"]
    assert missing == {"field": "name", "value": None, "message": "is missing"}
    assert unknown == {"field": "nam", "value": '{"a": [{}]}', "message": "is not a known key: did you mean name?"}
    assert not any(rows(database).values())


BAD_TRIALS: tuple[tuple[dict[str, Any], str, Any], ...] = (
    ({}, "spec", None),
    ({"spec": {}, "recipe": "laptop"}, "recipe", "laptop"),
    ({"recipe": "no-such"}, "recipe", "no-such"),
    ({"recipe": "ebls", "size": "huge"}, "size", "huge"),
    ({"spec": {}, "size": "tiny"}, "size", "tiny"),
    ({"spec": {"sharing": {"virtual_layers": 6, "unique_blocks": 9}}}, "spec.sharing.unique_blocks", 9),
    ({"spec": {"model": {"width": 100, "heads": 8}}}, "spec.model.heads", 8),
    ({"spec": {"sharing": {"tying": {"pattern": "cycle", "patern": 1}}}}, "spec.sharing.tying.patern", 1),
    ({"spec": {"data": {"sequence_length": -1}}}, "spec.data.sequence_length", -1),
    ({"params": {"model.width": 64}}, "params.model.width", 64),
    ({"params": {"sharing.lora.rank": 3}}, "params.sharing.lora.rank", 3),
    ({"params": {"sharing.unique_blocks": 2.5}}, "params.sharing.unique_blocks", 2.5),
    ({"overrides": {"sharing.lora.rank": -1}}, "overrides.sharing.lora.rank", -1),
    ({"overrides": {"seed": "\ud800"}}, "overrides.seed", "\\ud800"),
    ({"overrides": {"": 1}}, "overrides.", 1),
    ({"overrides": {"seed.x": 1}}, "seed", '{"x": 1}'),
    ({"overrides": {"seed": True}}, "overrides.seed", True),
    ({"overrides": {"model..width": 1}}, "overrides.model..width", 1),
    ({"spec": []}, "spec", []),
    ({"overrides": {"seed": 10**40}}, "overrides.seed", str(10**40)),
    ({"allow_duplicate": "perhaps", "recipe": "laptop"}, "allow_duplicate", "perhaps"),
)


def test_a_trial_that_cannot_be_is_refused_by_field_and_value_and_leaves_nothing(
    http: httpx.Client, database: Database, study: str
) -> None:
    before = rows(database)
    headers = {"Content-Type": "application/json", "Idempotency-Key": "k"}
    for body, field, value in BAD_TRIALS:
        answer = http.post(f"{study}/trials", content=json.dumps(body), headers=headers)
        found = problem(answer, 422, "invalid-input")
        assert (field, value) in [(one["field"], one["value"]) for one in found["problems"]], body
        assert rows(database) == before
    # The key is not used up by a refusal.
    assert http.post(f"{study}/trials", json={"overrides": {"seed": 5}}, headers=headers).status_code == 201


def test_a_body_that_is_not_json_is_malformed(http: httpx.Client, study: str, database: Database) -> None:
    before = rows(database)
    as_json = {"Content-Type": "application/json"}
    for path in ("/v1/studies", f"{study}/trials", "/v1/preview"):
        for text in ("{", "", "nonsense", '{"spec": ' + "[" * 100_000):
            answer = http.post(path, content=text, headers=as_json)
            assert answer.status_code in (400, 422)
            assert answer.status_code == 400 or not text
        assert problem(http.post(path, content="{'a': 1}", headers=as_json), 400, "malformed-body")[
            "detail"
        ].startswith("the body is not JSON")
        problem(http.post(path, content="a=1", headers={"Content-Type": "text/plain"}), 415, "unsupported-media-type")
    assert rows(database) == before


def test_what_does_not_exist_is_not_found(http: httpx.Client, study: str) -> None:
    for path in ("/v1/studies/none", "/v1/studies/none/leaderboard", f"{study}/trials/7", f"{study}/trials/7/artifact"):
        problem(http.get(path), 404, "not-found")
    for path in (
        "/v1/studies/a%00b",
        "/v1/studies/%ED%A0%80/trials",
        "/v1/studies/..%2F..",
        f"/v1/studies/{'x' * 500}",
    ):
        problem(http.get(path), 404, "not-found")
    for path in ("/v1/studies/none/pause", "/v1/studies/none/trials/0/cancel", f"{study}/trials/0/cancel"):
        problem(http.post(path), 404, "not-found")
    for path in ("/v1/studies/none/events", f"{study}/trials/7/measurements/stream", "/v1/nothing", "/studies/none"):
        problem(http.get(path), 404, "not-found")
    problem(http.post("/v1/preview", json={"study": "none", "recipe": "laptop"}), 404, "not-found")
    problem(http.post("/v1/studies/none/trials", json={"recipe": "laptop"}), 404, "not-found")
    assert problem(http.get(f"{study}/trials/7"), 404, "not-found")["detail"] == "no trial 7 in study sweep"
    refused = problem(http.delete(study), 405, "method-not-allowed")
    assert refused["detail"] == "DELETE is not among what this path takes: GET, PATCH"


def test_a_page_that_cannot_be_is_refused(http: httpx.Client, study: str) -> None:
    wrong = {
        f"{study}/trials": ("limit=0", "limit=501", "limit=x", "cursor=1", "state=done"),
        "/v1/studies": ("after=-2", f"after={2**31}", f"after={10**30}", "state=done"),
    }
    for path, query in ((path, query) for path, queries in wrong.items() for query in queries):
        found = problem(http.get(f"{path}?{query}"), 422, "invalid-input")
        assert found["problems"][0]["field"].startswith(f"query.{query.partition('=')[0]}"), query
    problem(http.get(f"{study}/trials/{10**30}"), 422, "invalid-input")


def test_a_study_is_created_read_and_listed_page_by_page(http: httpx.Client) -> None:
    for number in range(5):
        answer = http.post("/v1/studies", json={**STUDY, "name": f"s{number}"})
        assert answer.status_code == 201
        assert answer.headers["location"] == f"/v1/studies/s{number}"
        assert http.get(answer.headers["location"]).json() == answer.json()
    seen: list[str] = []
    after: int | None = -1
    while after is not None:
        page = http.get("/v1/studies", params={"limit": 2, "after": after}).json()
        assert len(page["items"]) <= 2
        seen += [item["name"] for item in page["items"]]
        after = page["next"]
    assert seen == ["s0", "s1", "s2", "s3", "s4"]
    found = problem(http.post("/v1/studies", json={**STUDY, "name": "s3"}), 409, "conflict")
    assert found["existing"] == "s3"
    assert found["problems"][0] == {"field": "name", "value": "s3", "message": "is taken by another study"}


def test_a_study_moves_only_along_its_moves(http: httpx.Client, study: str) -> None:
    assert http.post(f"{study}/pause").json()["state"] == "paused"
    assert "only one that is running can" in problem(http.post(f"{study}/pause"), 409, "illegal-move")["detail"]
    assert http.post(f"{study}/resume").json()["state"] == "running"
    queued = http.post(f"{study}/trials", json={"overrides": {"seed": 1}}).json()["number"]
    assert http.post(f"{study}/stop").json()["counts"] == {"cancelled": 1}
    assert http.get(f"{study}/trials/{queued}").json()["state"] == "cancelled"
    (wrong,) = problem(http.post(f"{study}/resume"), 409, "illegal-move")["problems"]
    allowed = "must be paused or complete to become running"
    assert wrong == {"field": "state", "value": "stopped", "message": allowed}
    problem(http.post(f"{study}/trials", json={"overrides": {"seed": 2}}), 409, "illegal-move")
    assert [one["name"] for one in http.get("/v1/studies?state=stopped&state=paused").json()["items"]] == ["sweep"]
    assert http.get("/v1/studies?state=running").json()["items"] == []


def test_a_trial_is_submitted_in_each_of_the_ways(http: httpx.Client, study: str) -> None:
    ways: tuple[dict[str, Any], ...] = (
        {"params": {"sharing.lora.rank": 2, "sharing.tying": "sequence"}},
        {"params": {"sharing.lora.rank": 0}, "overrides": {"budget.steps": 60}},
        {"overrides": {"sharing.lora.rank": 7}},
        {"spec": load_recipe("laptop"), "overrides": {"model.width": 48}},
        {"recipe": "laptop", "overrides": {"budget": {"seconds": 5}}},
    )
    trials = []
    for number, body in enumerate(ways):
        answer = http.post(f"{study}/trials", json=body)
        assert answer.status_code == 201, answer.text
        assert answer.headers["location"] == f"{study}/trials/{number}"
        trials.append(answer.json())
        found = http.get(answer.headers["location"]).json()
        assert {**found, "run_id": found["runs"][0]["id"]} == answer.json()
    assert [trial["number"] for trial in trials] == list(range(5))
    assert {trial["state"] for trial in trials} == {"queued"}
    assert trials[0]["params"] == {"sharing.lora.rank": 2, "sharing.unique_blocks": 3, "sharing.tying": "sequence"}
    assert trials[0]["tying_map"] == [0, 0, 1, 1, 2, 2]
    assert trials[1]["spec"]["budget"]["steps"] == 60
    assert "sharing.lora.rank" not in trials[2]["params"]
    assert trials[3]["spec"]["model"]["width"] == 48
    assert trials[4]["spec"]["budget"] == {"steps": None, "seconds": 5.0, "tokens": None}
    assert [run["state"] for run in trials[0]["runs"]] == ["queued"]
    pages = [http.get(f"{study}/trials", params={"limit": 3, "after": after}).json() for after in (-1, 2)]
    assert [[trial["number"] for trial in page["items"]] for page in pages] == [[0, 1, 2], [3, 4]]
    assert [page["next"] is None for page in pages] == [False, True]


def test_a_recipe_comes_as_published_or_tiny(http: httpx.Client, study: str) -> None:
    full = http.post("/v1/preview", json={"recipe": "ebls"}).json()
    assert full["prediction"]["parameters"] == 29_566_018
    changes = {"sharing.lora.rank": 4}
    tiny = {"recipe": "ebls", "size": "tiny", "overrides": changes}
    trial = http.post(f"{study}/trials", json=tiny).json()
    assert trial["tying_map"] == full["tying_map"]
    assert trial["spec"] == parse_spec(override(load_recipe("ebls", "tiny"), changes)).model_dump(mode="json")
    created = http.post("/v1/studies", json={"name": "tiny", **tiny})
    assert created.status_code == 201, created.text
    based = http.post("/v1/studies/tiny/trials", json={"params": {}}).json()
    assert based["spec"] == trial["spec"]


def test_a_trial_that_cannot_fit_is_kept_as_infeasible_and_never_runs(http: httpx.Client, study: str) -> None:
    answer = http.post(f"{study}/trials", json=TOO_LARGE)
    assert answer.status_code == 201
    trial = answer.json()
    assert trial["state"] == "infeasible"
    assert trial["verdict"] == "cannot_fit"
    assert trial["runs"] == []
    assert "1,000,000" in trial["reason"]
    assert trial["prediction"]["artifact_bytes_low"] > 1_000_000
    assert http.get(study).json()["counts"] == {"infeasible": 1}


def test_a_configuration_that_exists_is_a_conflict_unless_allowed(
    http: httpx.Client, study: str, database: Database
) -> None:
    first = {"overrides": {"sharing.tying": "cycle", "seed": 1}}
    assert http.post(f"{study}/trials", json=first).status_code == 201
    # The same sharing said otherwise, at another seed.
    same = {"overrides": {"sharing.tying": [2, 0, 1, 2, 0, 1], "seed": 2}}
    before = rows(database)
    found = problem(http.post(f"{study}/trials", json=same), 409, "conflict")
    assert found["existing"] == f"{study}/trials/0"
    assert rows(database) == before
    allowed = http.post(f"{study}/trials", json={**same, "allow_duplicate": True})
    assert allowed.status_code == 201
    assert allowed.json()["number"] == 1


def test_the_same_key_is_the_same_trial(http: httpx.Client, study: str) -> None:
    headers = {"Idempotency-Key": "retry-1"}
    body = {"overrides": {"sharing.lora.rank": 1}}
    first = http.post(f"{study}/trials", json=body, headers=headers)
    again = http.post(f"{study}/trials", json=body, headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert "idempotent-replay" not in first.headers
    assert again.headers["idempotent-replay"] == "true"
    assert again.json() == first.json()
    other = http.post(f"{study}/trials", json={"overrides": {"sharing.lora.rank": 2}}, headers=headers)
    assert problem(other, 409, "conflict")["existing"] == f"{study}/trials/0"
    for key in ("", "x" * 256, "with space"):
        refused = http.post(f"{study}/trials", json=body, headers={"Idempotency-Key": key})
        assert problem(refused, 422, "invalid-input")["problems"][0]["field"] == "header.Idempotency-Key"
    # It replays after the study was stopped too: the client asks what became of its request.
    http.post(f"{study}/stop")
    assert http.post(f"{study}/trials", json=body, headers=headers).json()["state"] == "cancelled"


@pytest.mark.parametrize("headers", [{"Idempotency-Key": "one"}, {}], ids=["one key", "no key"])
def test_many_submissions_at_once_of_one_configuration_make_one_trial(
    http: httpx.Client, study: str, database: Database, headers: dict[str, str]
) -> None:
    together = threading.Barrier(12)

    def send(_number: int) -> httpx.Response:
        together.wait()
        return http.post(f"{study}/trials", json={"overrides": {"sharing.lora.rank": 3}}, headers=headers)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(send, range(12)))
    others = 200 if headers else 409
    assert Counter(answer.status_code for answer in answers) == {201: 1, others: 11}
    assert len(http.get(f"{study}/trials").json()["items"]) == 1
    assert rows(database)["runs"] == 1
    assert rows(database)["events"] == 2


def test_nothing_is_said_to_be_done_before_it_is_committed(http: httpx.Client, study: str, database: Database) -> None:
    before = rows(database)

    def fail(_connection: object) -> None:
        raise OSError("no space left on device")

    event.listen(database.engine, "commit", fail)
    try:
        problem(httpx.post(f"{http.base_url}{study}/trials", json={"overrides": {"seed": 9}}), 500, "internal-error")
        problem(httpx.post(f"{http.base_url}{study}/pause"), 500, "internal-error")
    finally:
        event.remove(database.engine, "commit", fail)
    assert rows(database) == before
    assert http.get(study).json()["state"] == "running"


def test_a_finished_trial_shows_what_it_did_and_cannot_be_cancelled(
    http: httpx.Client, study: str, finish: Callable[..., Claim]
) -> None:
    http.post(f"{study}/trials", json={"overrides": {"sharing.lora.rank": 1}})
    http.post(f"{study}/trials", json={"overrides": {"sharing.lora.rank": 2}})
    finish(val_bpb=2.25, diagnostics={"gammas": {"mlp": [0.5] * 6}})
    trial = http.get(f"{study}/trials/0").json()
    assert trial["state"] == "complete"
    assert trial["result"]["val_bpb"] == trial["val_bpb"] == 2.25
    assert [attempt["outcome"] for run in trial["runs"] for attempt in run["attempts"]] == ["succeeded"]
    assert (
        "only one that is queued or running can"
        in problem(http.post(f"{study}/trials/0/cancel"), 409, "illegal-move")["detail"]
    )
    assert http.post(f"{study}/trials/1/cancel").json()["state"] == "cancelled"
    (wrong,) = problem(http.post(f"{study}/trials/1/cancel"), 409, "illegal-move")["problems"]
    assert wrong == {"field": "state", "value": "cancelled", "message": "must be queued or running to be cancelled"}


def test_a_trial_shows_what_each_of_its_attempts_cost_and_ran_on(
    http: httpx.Client, database: Database, study: str, trial_result: Results
) -> None:
    gpus = {"ranks": 4, "device": "gpu"}
    http.post(f"{study}/trials", json={"overrides": {"gang": gpus}})
    queued = datetime.fromisoformat(http.get(f"{study}/trials/0").json()["created_at"])
    hardware = {
        "device": "NVIDIA H100", "node": "node-1", "node_devices": 8, "ranks": 4, "clocks_mhz": [1980.0] * 4,
        "clock_limit_mhz": 1980.0, "torch": "2.13.0", "cuda": "13.0", "probe_seconds": [0.002] * 4,
        "probe_after_seconds": [0.002] * 4,
    }  # fmt: skip
    for outcome in (Outcome.VOID, Outcome.SUCCEEDED):
        claimed = queued + timedelta(seconds=100)
        with database.write() as session:
            claim = leases.claim(session, GangConfig.model_validate(gpus), "host", claimed, TTL)
            assert claim is not None
            leases.renew(session, claim.lease, claimed, TTL, gang="gang-1", phase="train")
            result = trial_result(hardware=hardware, step_seconds=0.125)
            queued = claimed + timedelta(seconds=360)
            leases.finish(session, claim.lease, AttemptResult(outcome, result=result), queued)
    (run,) = http.get(f"{study}/trials/0").json()["runs"]
    for attempt, ended in zip(run["attempts"], ("void", "succeeded"), strict=True):
        assert (attempt["outcome"], attempt["step_seconds"], attempt["hardware"]) == (ended, 0.125, hardware)
        assert attempt["phase_seconds"] == {"queue": 100, "train": 360}
        assert attempt["cost"] == {"seconds": 460, "gpu_seconds": 1440, "dollars": 1}
    found = http.get(f"{study}/trials/0/ledger").json()
    assert (found["study"], found["trial"], found["attempts"]) == ("sweep", 0, 2)
    assert found["void"] == found["wasted"] == {"seconds": 360, "gpu_seconds": 1440, "dollars": 1}
    assert found["total"] == {"seconds": 920, "gpu_seconds": 2880, "dollars": 2}
    problem(http.get(f"{study}/trials/1/ledger"), 404, "not-found")


def test_the_artifact_of_a_void_attempt_is_nobodys_model(
    http: httpx.Client, database: Database, study: str, artifacts: ArtifactStore,
    trial_result: Results, now: datetime,
) -> None:  # fmt: skip
    http.post(f"{study}/trials", json={"overrides": {"sharing.lora.rank": 1}})
    with database.write() as session:
        claim = leases.claim(session, GangConfig(), "host", now, TTL)
        assert claim is not None
        ended = AttemptResult(Outcome.VOID, "slow", trial_result(), artifacts.put(b"model"))
        leases.finish(session, claim.lease, ended, now)
    (run,) = http.get(f"{study}/trials/0").json()["runs"]
    assert run["attempts"][0]["artifact"]["bytes"] == 5
    problem(http.get(f"{study}/trials/0/artifact"), 404, "not-found")


def test_the_leaderboard_ranks_only_what_fits_the_cap(
    http: httpx.Client, study: str, finish: Callable[..., Claim]
) -> None:
    for rank in range(4):
        http.post(f"{study}/trials", json={"overrides": {"sharing.lora.rank": 10 + rank}})
    for bpb, size in ((2.5, 900_000), (2.1, 1_000_001), (2.4, 1_000_000), (2.3, 500_000)):
        finish(val_bpb=bpb, artifact_bytes=size)
    board = http.get(f"{study}/leaderboard").json()
    assert board["cap_bytes"] == 1_000_000
    assert [(row["rank"], row["number"], row["val_bpb"]) for row in board["rows"]] == [
        (1, 3, 2.3), (2, 2, 2.4), (3, 0, 2.5), (None, 1, 2.1),
    ]  # fmt: skip
    assert http.get(study).json()["best_bpb"] == 2.3
    assert len(http.get(f"{study}/leaderboard?limit=2").json()["rows"]) == 2


def test_an_artifact_is_downloaded_whole_or_in_part_with_its_digest(
    http: httpx.Client, study: str, finish: Callable[..., Claim], artifacts: ArtifactStore, database: Database
) -> None:
    http.post(f"{study}/trials", json={"overrides": {"sharing.lora.rank": 1}})
    problem(http.get(f"{study}/trials/0/artifact"), 404, "not-found")
    finish()
    path = f"{study}/trials/0/artifact"
    model = b"model of trial 0"
    whole = http.get(path)
    assert whole.content == model
    digest = base64.b64encode(hashlib.sha256(model).digest()).decode()
    assert whole.headers["repr-digest"] == f"sha-256=:{digest}:"
    part = httpx.get(f"{http.base_url}{path}", headers={"Range": "bytes=6-7"})
    assert (part.status_code, part.content) == (206, b"of")
    assert (part.headers["content-range"], part.headers["etag"]) == ("bytes 6-7/16", whole.headers["etag"])
    head = http.head(path)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "16")
    assert head.headers["repr-digest"] == whole.headers["repr-digest"]

    def ranged(range_: str, **headers: str) -> tuple[int, bytes]:
        answer = http.get(path, headers={"Range": range_, **headers})
        return answer.status_code, answer.content

    assert ranged("bytes=9-") == ranged("bytes=-7") == (206, b"trial 0")
    assert ranged("bytes=9-99", **{"If-Range": whole.headers["etag"]}) == (206, b"trial 0")
    for changed in ('"another"', "W/" + whole.headers["etag"]):
        assert ranged("bytes=9-", **{"If-Range": changed}) == (200, model)
        assert ranged("bytes=99-", **{"If-Range": changed}) == (200, model)
    for ignored in ("bytes=7-6", "pages=1-2", "bytes=0-1,3-4", "bytes=x", "bytes=" + "9" * 40 + "-"):
        assert ranged(ignored) == (200, model)
    for beyond in ("bytes=16-", "bytes=99-100", "bytes=-0"):
        refused = http.get(path, headers={"Range": beyond})
        problem(refused, 416, "range-not-satisfiable")
        assert refused.headers["content-range"] == "bytes */16"

    artifacts.path(
        Artifact(f"sha256/{(name := hashlib.sha256(model).hexdigest())[:2]}/{name}", len(model), name)
    ).unlink()
    problem(http.get(path), 410, "damaged-artifact")
    for uri in ("/etc/passwd", "file:///etc/passwd", "../../../../etc/passwd", "sha256/../../etc/passwd"):
        with database.write() as session:
            session.execute(update(ArtifactRow).values(uri=uri))
        problem(http.get(path), 410, "damaged-artifact")


def test_a_preview_predicts_and_stores_nothing(http: httpx.Client, study: str, database: Database) -> None:
    before = rows(database)
    for name in recipe_names():
        shown = http.post("/v1/preview", json={"recipe": name})
        assert shown.status_code == 200
        answer = shown.json()
        assert sum(answer["parameters_by_class"].values()) == answer["prediction"]["parameters"]
        low, high = answer["prediction"]["artifact_bytes_low"], answer["prediction"]["artifact_bytes_high"]
        assert low <= answer["prediction"]["artifact_bytes"] <= high
        assert answer["cap_bytes"] == 16_000_000
    inside = http.post("/v1/preview", json={"study": "sweep", "overrides": TOO_LARGE["overrides"]}).json()
    assert (inside["verdict"], inside["cap_bytes"]) == ("cannot_fit", 1_000_000)
    roomy = http.post("/v1/preview", json={"study": "sweep", "cap_bytes": 10**9, **TOO_LARGE}).json()
    assert (roomy["verdict"], roomy["reason"]) == ("fits", None)
    problem(http.post("/v1/preview", json={"params": {"sharing.lora.rank": 2}}), 422, "invalid-input")
    problem(http.post("/v1/preview", json={"overrides": {"seed": 1}}), 422, "invalid-input")
    for name in ("a\0b", "\ud800", "Sweep", "sweep\n", ""):
        content = json.dumps({"study": name, "recipe": "laptop"})
        refused = http.post("/v1/preview", content=content, headers={"Content-Type": "application/json"})
        assert problem(refused, 422, "invalid-input")["problems"][0]["field"] == "study", name
    assert rows(database) == before
    assert [recipe["name"] for recipe in http.get("/v1/recipes").json()["items"]] == list(recipe_names())


WIDE: dict[str, Any] = {
    "name": "wide",
    "recipe": "laptop",
    "space": {
        "sharing.tying": {"families": {"cycle": {}, "tail": {"after": {"low": 0, "high": 5}}, "free": {}, "split": {}}},
        "sharing.unique_blocks": {"low": 1, "high": 6},
        "sharing.lora.rank": {"choice": [2, 8], "when": "sharing.unique_blocks < 4"},
        "model.width": {"fill": {"low": 48, "high": 192, "step": 48}},
    },
}


def test_a_study_is_previewed_by_its_seed_and_nothing_is_stored(http: httpx.Client, database: Database) -> None:
    answer = http.post("/v1/studies/preview", json=WIDE)
    assert answer.status_code == 200, answer.text
    preview = answer.json()
    assert http.post("/v1/studies/preview", json=WIDE).json() == preview
    assert http.post("/v1/studies/preview", json={**WIDE, "seed": 1}).json() != preview
    samples = preview["samples"]
    assert len(samples) == 20
    assert preview["invalid"] == sum(sample["verdict"] is None for sample in samples) > 0
    assert preview["points"] >= 203
    for sample in samples:
        assert (sample["prediction"] is None) == (sample["tying_map"] is None) == (sample["verdict"] is None)
        assert sample["verdict"] is not None or sample["reason"]
    tight = http.post("/v1/studies/preview?samples=7", json={**WIDE, "cap_bytes": 60_000}).json()
    assert len(tight["samples"]) == 7
    assert tight["invalid"] + tight["cannot_fit"] == 7
    assert tight["cannot_fit"] > 0
    plain = http.post("/v1/studies/preview", json={"name": "plain", "recipe": "laptop"}).json()
    assert (plain["points"], plain["samples"][0]["params"]) == (1, {})
    for query in ("samples=0", "samples=1001"):
        problem(http.post(f"/v1/studies/preview?{query}", json=WIDE), 422, "invalid-input")
    refused = problem(http.post("/v1/studies/preview", json={**WIDE, "name": "Wide"}), 422, "invalid-input")
    assert [one["field"] for one in refused["problems"]] == ["name"]
    assert not any(rows(database).values())


def test_all_that_is_wrong_with_a_study_is_said_at_once(http: httpx.Client) -> None:
    space = {
        "sharing.lora.rank": {"low": 4, "high": 1},
        "model.breadth": {"choice": [1]},
        "model.width": {"choice": [48, 96], "when": "model.width < 48"},
    }
    body = {
        **WIDE,
        "name": "Wide",
        "space": space,
        "overrides": {"model.heads": 3},
        "gangs": [{"ranks": 1}, {"ranks": 3}],
    }
    found = problem(http.post("/v1/studies", json=body), 422, "invalid-input")
    fields = [one["field"] for one in found["problems"]]
    assert sorted(fields) == sorted([
        "name", "space.sharing.lora.rank.low", "gangs.1.ranks", "space.model.breadth", "space.model.width.when",
    ])  # fmt: skip
    body["overrides"] = {"model.heads": 5}
    found = problem(http.post("/v1/studies", json=body), 422, "invalid-input")
    assert "overrides.model.heads" in [one["field"] for one in found["problems"]]


def test_a_point_of_a_space_is_submitted_and_kept_in_the_one_way_to_write_it(http: httpx.Client) -> None:
    assert http.post("/v1/studies", json=WIDE).status_code == 201
    trials, family, rank = "/v1/studies/wide/trials", "sharing.tying.family", "sharing.lora.rank"
    cycle = {family: "cycle", "sharing.unique_blocks": 3, rank: 8}
    first = http.post(trials, json={"params": {**cycle, "model.width": 144}}).json()
    assert (first["params"], first["spec"]["model"]["width"], first["tying_map"]) == (cycle, 144, [0, 1, 2] * 2)
    letters = {f"sharing.tying.free.{layer}": letter for layer, letter in enumerate((1, 2, 0, 1, 2), 1)}
    again = http.post(trials, json={"params": {family: "free", **letters, rank: 8, "model.width": 144}})
    problem(again, 409, "conflict")  # the same map, and so the same configuration
    left_out = http.post(trials, json={"params": {family: "free", **letters, rank: 2}}).json()
    assert left_out["params"] == {**cycle, rank: 2}
    assert left_out["spec"]["model"]["width"] == 96  # the base's
    for params, field, said in (
        ({family: "loop"}, family, "must be one of 'cycle', 'tail', 'free', 'split'"),
        ({family: "free", "sharing.tying.free.9": 1}, "sharing.tying.free.9", "is not in the study's space"),
        ({family: "cycle", "sharing.tying.tail.after": 1}, "sharing.tying.tail.after", "another family"),
        ({family: "split", "sharing.unique_blocks": 2}, "sharing.unique_blocks", "the family split sets it"),
        ({"sharing.unique_blocks": 5, rank: 2}, rank, "it does when sharing.unique_blocks < 4"),
        ({"model.width": 50}, "model.width", "a whole number from 48 to 192 in steps of 48"),
        ({family: "tail"}, "sharing.tying.tail.after", "is missing"),
        ({family: "tail", "sharing.tying.tail.after": 4}, "sharing.tying.after", "must be below unique_blocks, 3"),
    ):
        found = problem(http.post(trials, json={"params": params}), 422, "invalid-input")["problems"]
        assert [one["field"] for one in found] == [f"params.{field}"], params
        assert said in found[0]["message"], params


def test_readiness_is_the_databases(http: httpx.Client, serve: Callable[..., str]) -> None:
    assert http.get("/healthz").json() == http.get("/readyz").json() == {"status": "ok"}
    away = Database("postgresql://nobody@127.0.0.1:1/none?connect_timeout=2")
    url = serve(away, dashboard=False)
    assert httpx.get(f"{url}/healthz").status_code == 200
    assert "does not answer" in problem(httpx.get(f"{url}/readyz"), 503, "not-ready")["detail"]
    away.close()


def test_a_database_that_is_not_migrated_is_not_ready(empty_database_url: str, serve: Callable[..., str]) -> None:
    database = Database(empty_database_url)
    answer = httpx.get(f"{serve(database, dashboard=False)}/readyz")
    assert "caddie migrate" in problem(answer, 503, "not-ready")["detail"]
    database.close()
