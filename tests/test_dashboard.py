"""Optuna's dashboard over our tables: live, read-only, below our own paths."""

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import httpx
import psutil
import pytest
from claims import NewStudies, NewTrials

from orchestrator import leases, store
from orchestrator.database import Database
from orchestrator.lifecycle import Outcome
from orchestrator.study import AttemptResult

TTL = timedelta(minutes=5)


@pytest.fixture
def http(
    database: Database,
    serve: Callable[..., str],
    new_study: NewStudies,
    new_trial: NewTrials,
    trial_result: Callable[..., Any],
    now: datetime,
) -> Iterator[httpx.Client]:
    """A server over a study with a complete trial, an infeasible one and a queued one."""
    with database.write() as session:
        study = store.create_study(session, new_study(), now)
        store.add_trial(session, study.id, new_trial(params={"sharing.lora.rank": 4}), now)
    with database.write() as session:
        claim = leases.claim(session, study.definition.shapes[0], "host", now, TTL)
        assert claim is not None
        leases.finish(session, claim.lease, AttemptResult(Outcome.SUCCEEDED, result=trial_result(val_bpb=2.25)), now)
        store.add_trial(session, study.id, new_trial(verdict="cannot_fit", reason="too large"), now)
        store.add_trial(session, study.id, new_trial(), now)
    with httpx.Client(base_url=serve(database), timeout=60) as client:
        yield client


def test_the_dashboard_shows_our_studies_and_writes_nothing(
    http: httpx.Client, database: Database, new_study: NewStudies, new_trial: NewTrials, now: datetime
) -> None:
    page = http.get("/dashboard")
    assert page.status_code == 200
    assert "/static/bundle.js" in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]  # it shares our cookie's origin
    assert http.get("/static/bundle.js").status_code == 200
    assert http.head("/dashboard").status_code == 200

    listed = http.get("/api/studies").json()["study_summaries"]
    assert [study["study_name"] for study in listed] == ["sharing"]
    address = f"/api/studies/{listed[0]['study_id']}"
    seen = http.get(address).json()
    assert [(trial["number"], trial["values"]) for trial in seen["best_trials"]] == [(0, [2.25])]
    assert len(seen["trials"]) == 3

    # No second copy: what happens after the dashboard was built is there at the next look.
    with database.write() as session:
        later = store.create_study(session, new_study("later"), now)
        store.add_trial(session, later.id, new_trial(), now)
    assert [study["study_name"] for study in http.get("/api/studies").json()["study_summaries"]] == ["sharing", "later"]
    assert [trial["state"] for trial in http.get(f"/api/studies/{later.id}").json()["trials"]] == ["Waiting"]

    for method, path in (
        ("POST", "/api/studies"),
        ("DELETE", address),
        ("POST", f"{address}/rename"),
        ("PUT", "/dashboard"),
    ):
        refused = http.request(method, path, json={"study_name": "stolen", "directions": ["minimize"]})
        assert refused.status_code == 405
        assert refused.headers["allow"] == "GET, HEAD"
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.json()["type"] == "urn:caddie:problem:method-not-allowed"
    with database.read() as session:
        assert [study.name for study in store.list_studies(session)] == ["sharing", "later"]


def test_the_dashboards_process_is_another_and_is_started_again(http: httpx.Client) -> None:
    def running() -> list[psutil.Process]:
        children = psutil.Process().children()
        return [child for child in children if "api.dashboard_process" in child.cmdline()]

    assert running() == []  # nobody asked yet
    assert http.get("/dashboard").status_code == 200
    (first,) = running()
    first.kill()
    assert http.get("/api/studies").json()["study_summaries"][0]["study_name"] == "sharing"
    assert [child.pid for child in running() if child.pid != first.pid] != []


def test_our_own_paths_win_over_the_dashboards(http: httpx.Client) -> None:
    assert "Studies" in http.get("/").text
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/nothing/here").headers["content-type"] == "application/problem+json"


def test_a_client_that_accepts_no_encoding_gets_the_icon(http: httpx.Client) -> None:
    request = http.build_request("GET", "/favicon.ico")
    del request.headers["accept-encoding"]
    assert http.send(request).status_code == 200
    bundle = http.build_request("GET", "/static/bundle.js")
    del bundle.headers["accept-encoding"]
    answer = http.send(bundle)
    assert answer.status_code == 200
    assert "content-encoding" not in answer.headers


def test_without_the_dashboard_its_paths_are_unknown(database: Database, serve: Callable[..., str]) -> None:
    assert httpx.get(f"{serve(database, dashboard=False)}/dashboard").status_code == 404
