"""What holds of every page."""

import csv
import io
import random
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from browser import Browser
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from sweep import FAILED, INFEASIBLE, OVER, QUEUED, TTL, Sweep, result_of

from api.context import Writer
from api.submission import submit
from orchestrator import leases, store
from orchestrator.database import Database
from orchestrator.lifecycle import Cause, Outcome
from orchestrator.study import AttemptResult, NewStudy
from worker.recipes import load_recipe
from worker.spec import override, parse_spec

STILL = ("docs", "error")
"""Pages that follow no stream."""


@pytest.mark.browser
def test_every_page_fits_a_phone_is_light_or_dark_and_asks_nobody_else(
    browser: Browser, sweep: Sweep, url: str, screenshots: Path
) -> None:
    claim = sweep.start({"sharing.lora.rank": 3})
    with sweep.database.write() as session:
        gang = "caddie-9dfab1-cpu16-ed14d361 of node-17.example"
        leases.renew(session, claim.lease, sweep.now, TTL, gang=gang, phase="train")
    sweep.end(claim, AttemptResult(Outcome.FAILED, "no /data/" + "a-folder/" * 9, cause=Cause.BAD_INPUT))
    for name, path in (
        ("studies", "/"), ("study", "/studies/demo"), ("trial", "/studies/demo/trials/2"), ("cluster", "/cluster"),
        ("docs", "/docs"), ("error", "/studies/nothing"),
    ):  # fmt: skip
        for mode, width, dark in (("light", 1280, False), ("dark", 1280, True), ("phone", 375, True)):
            browser.show(url + path, width=width, dark=dark)
            browser.until(f"document.querySelector('#link:not([hidden])') !== null || {str(name in STILL).lower()}")
            assert browser.until("document.documentElement.scrollWidth") == width, name
            parts = "[...document.querySelectorAll('.tables > div, .card li')]"
            cut = f"{parts}.filter((one) => one.scrollWidth > one.clientWidth).map((one) => one.textContent)"
            assert browser.driver.execute_script(f"return {cut}") == [], name
            paper = browser.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
            channels = [int(part) for part in paper.removeprefix("rgb(").removesuffix(")").split(",")]
            assert max(channels) < 64 if dark else min(channels) > 192
            browser.picture(screenshots / f"{name}-{mode}.png")
    assert [said for said in browser.complaints() if "/studies/nothing" not in said] == []  # a 404 is one, to Chromium
    assert browser.hosts() == {urlsplit(url).netloc}


@pytest.mark.browser
def test_the_keyboard_reaches_what_a_page_says_before_what_leads_elsewhere(browser: Browser, url: str) -> None:
    browser.show(f"{url}/studies/demo")
    keys = ActionChains(browser.driver)
    keys.send_keys(Keys.TAB).perform()
    focused = "document.activeElement"
    assert browser.until(f"{focused}.textContent") == "Skip to content"
    assert browser.until(f"{focused}.getBoundingClientRect().left") >= 0
    keys.send_keys(Keys.ENTER).perform()
    browser.until(f"{focused}.id == 'main'")
    # What scrolls can be reached, and every button and link of the page has words.
    scrolling = "[...document.querySelectorAll('.scroll')].every((one) => one.tabIndex == 0 && one.ariaLabel != '')"
    assert browser.until(scrolling)
    assert browser.until(
        "[...document.querySelectorAll('main :is(a, button, summary)')]"
        ".every((one) => one.textContent.trim() || one.getAttribute('aria-label') || one.closest('svg'))"
    )


@pytest.mark.browser
def test_a_copied_table_holds_whole_values_quoted_and_without_formulas(browser: Browser, url: str) -> None:
    browser.show(f"{url}/studies/demo")
    browser.allow_clipboard(url)
    browser.until("document.querySelector('#board button.copy') !== null")
    browser.driver.execute_script("document.querySelector('#board button.copy').click()")
    browser.until("document.querySelector('#board button.copy').textContent == 'Copied'")
    copied = list(csv.DictReader(io.StringIO(browser.later("navigator.clipboard.readText()"), newline="")))
    board = httpx.get(f"{url}/v1/studies/demo/leaderboard").json()["rows"]
    assert [row["Trial"] for row in copied] == [str(row["number"]) for row in board]
    assert [row["#"] for row in copied] == [str(row["rank"] or "") for row in board]
    assert [float(row["BPB"]) for row in copied] == [
        row["val_bpb"] if row["mean_bpb"] is None else row["mean_bpb"] for row in board
    ]
    assert [row["Artifact"] for row in copied] == [str(row["artifact_bytes"]) for row in board]
    assert copied[0]["Tying map"] == " ".join(str(block) for block in board[0]["tying_map"])
    written = browser.later(
        """import('/assets/tables.js').then(({ csv }) => {
          const table = document.createElement('table');
          for (const text of ['=1+1', '@x', '-1.5', '+cmd', 'a "b", c', '12,345', '–']) {
            table.insertRow().insertCell().textContent = text;
          }
          document.body.append(table);
          return csv(table);
        })"""
    )
    expected = ["'=1+1", "'@x", "-1.5", "'+cmd", 'a "b", c', "12345", ""]
    assert [row[0] if row else "" for row in csv.reader(io.StringIO(written, newline=""))] == expected


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
        listed = http.get("/docs").text.replace("<wbr>", "")
        assert all(path in listed for path in http.get("/v1/openapi.json").json()["paths"])
    assert re.findall('title="([^"]+)"></span>', pages["/"].text) == [
        "10 complete", "1 running", "1 queued", "1 failed", "1 infeasible", "24 to come",
    ]  # fmt: skip
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
        for name, cells in re.findall(r'<th scope="row">(.*?)</th>((?:<td class="n"[^>]*>[\d,.]+</td>)+)', text)
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
