"""What holds of every page."""

import random
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import httpx
import pytest
from browser import Browser
from sweep import FAILED, INFEASIBLE, OVER, QUEUED, TTL, result_of

from api.context import Writer
from api.submission import submit
from orchestrator import leases, store
from orchestrator.database import Database
from orchestrator.lifecycle import Cause, Outcome
from orchestrator.study import AttemptResult, NewStudy
from worker.recipes import load_recipe
from worker.spec import override, parse_spec


@pytest.mark.browser
def test_the_pages_fit_a_phone_and_the_dark(browser: Browser, url: str, screenshots: Path) -> None:
    for name, path in (
        ("studies", "/"), ("study", "/studies/demo"), ("trial", "/studies/demo/trials/2"), ("docs", "/docs"),
    ):  # fmt: skip
        browser.show(url + path, width=390, dark=True)
        browser.until("document.querySelector('#link:not([hidden])') !== null || location.pathname == '/docs'")
        assert browser.until("document.documentElement.scrollWidth") == 390
        paper = browser.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert max(int(part) for part in paper.removeprefix("rgb(").removesuffix(")").split(",")) < 64
        browser.picture(screenshots / f"{name}-phone-dark.png")
    assert browser.complaints() == []


def test_every_page_is_whole_without_a_script(url: str) -> None:
    with httpx.Client(base_url=url, headers={"Accept": "text/html"}) as http:
        pages = {
            path: http.get(path) for path in ("/", "/studies/demo", *(f"/studies/demo/trials/{n}" for n in range(14)))
        }
    for page in pages.values():
        assert page.status_code == 200
        assert "script-src" not in page.headers["content-security-policy"]
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert "<script>" not in page.text
    with httpx.Client(base_url=url) as http:
        listed = http.get("/docs").text
        assert all(path in listed for path in http.get("/v1/openapi.json").json()["paths"])
    assert pages["/studies/demo"].text.count("<svg") >= 14
    assert "over cap" in pages["/studies/demo"].text
    assert "None: it was refused before any GPU second" in pages[f"/studies/demo/trials/{INFEASIBLE}"].text
    assert "it waits for a gang" in pages[f"/studies/demo/trials/{QUEUED}"].text
    assert "loss is nan at step 31" in pages[f"/studies/demo/trials/{FAILED}"].text
    assert "102.7 % of the cap" in pages[f"/studies/demo/trials/{OVER}"].text


def test_the_pages_show_what_attempts_cost_and_ran_on(
    small_database: Database, serve: Callable[..., str], now: datetime
) -> None:
    gang = {"ranks": 4, "device": "gpu"}
    new = NewStudy.model_validate({"name": "demo", "base": override(load_recipe("laptop"), {"gang": gang})})
    with small_database.write() as session:
        study = store.create_study(session, new, now)
    url = serve(small_database, dashboard=False, gpu_hour_dollars=3.0)
    assert "GPU-hour" not in httpx.get(f"{url}/studies/demo").text
    spec, queued = parse_spec(new.base), now
    submit(Writer(small_database, "local", now), study, spec)
    slow = "step 0.125 s, 14% slower than the 0.11 s of 5 attempts on 4 × NVIDIA H100, and the limit is 10%"
    result = result_of(spec, random.Random(7))
    ends = (
        AttemptResult(Outcome.FAILED, "rank 3 exited with status 1", cause=Cause.CRASH),
        AttemptResult(Outcome.VOID, slow, result.model_copy(update={"step_seconds": 0.125})),
        AttemptResult(Outcome.SUCCEEDED, "done", result),
    )
    for ended in ends:
        claimed, finished = queued + timedelta(seconds=20), queued + timedelta(seconds=620)
        with small_database.write() as session:
            claim = leases.claim(session, spec.gang, "host-1", claimed, TTL)
            assert claim is not None
            leases.renew(session, claim.lease, claimed, TTL, gang="4 gpu ranks, gang 3", phase="train")
            leases.finish(session, claim.lease, ended, finished)
        queued = finished
    text = httpx.get(f"{url}/studies/demo").text
    rows = {
        re.sub("<.*?>", "", name): re.findall(r">([\d,.]+)</td>", cells)
        for name, cells in re.findall(r'<th scope="row">(.*?)</th>((?:<td class="n">[\d,.]+</td>)+)', text)
    }
    each = ["600.0", "2,400.0", "2.00"]
    assert rows == {
        "queue": ["60.0", "0.0", "0.00"], "train": each, "wasted": ["1,200.0", "4,800.0", "4.00"], "of it void": each,
        "total": ["1,860.0", "7,200.0", "6.00"], "4 gpu ranks, gang 3": ["1,800.0", "7,200.0", "6.00"],
        "0": ["1,860.0", "7,200.0", "6.00"],
    }  # fmt: skip
    assert "3 attempts, a GPU-hour at $3.00" in text
    shown = httpx.get(f"{url}/studies/demo/trials/0").text
    assert re.search(r"failed</span> <span class=\"note\">crash</span>", shown)
    assert slow in shown
    assert shown.count("AMD EPYC 9V74") == 2
    for cell in ("125.0", "90.0", "2,400.0", "2.00"):
        assert f'<td class="n">{cell}</td>' in shown


def test_a_page_that_is_not_there_says_so_to_a_person(url: str) -> None:
    for path in ("/nothing", "/studies/nothing", "/studies/demo/trials/99"):
        answer = httpx.get(url + path, headers={"Accept": "text/html"})
        assert answer.status_code == 404
        assert answer.headers["content-type"].startswith("text/html")
        assert "There is no such thing" in answer.text


def test_what_a_user_wrote_is_shown_as_text(small_database: Database, serve: Callable[..., str], now: datetime) -> None:
    space = {"sharing.lora.rank": {"choice": [0, 2]}}
    new = NewStudy.model_validate({"name": "demo", "base": load_recipe("laptop"), "space": space})
    with small_database.write() as session:
        study = store.create_study(session, new, now)
    submit(Writer(small_database, "local", now), study, parse_spec(new.base))
    with small_database.write() as session:
        claim = leases.claim(session, parse_spec(new.base).gang, "<script>alert(1)</script>", now, TTL)
        assert claim is not None
        ended = AttemptResult(Outcome.FAILED, "<img src=x onerror=alert(2)>", cause=Cause.DIVERGED)
        leases.finish(session, claim.lease, ended, now)
    url = serve(small_database, dashboard=False)
    for path in ("/studies/demo", "/studies/demo/trials/0"):
        text = httpx.get(url + path).text
        assert "<script>alert" not in text
        assert "<img src=x" not in text
        assert "&lt;img src=x onerror=alert(2)&gt;" in text
