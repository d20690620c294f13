"""A study's page, in a real browser on a study in the middle of a sweep."""

import json
import random
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from math import inf
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from browser import Browser
from claims import NewStudies, NewTrials, Results
from crowds import crowd_of
from selenium.webdriver.common.keys import Keys
from sqlalchemy import update
from sweep import Sweep, result_of

from api.overview import BEST, MOST
from orchestrator import seeds, store
from orchestrator.access import Role
from orchestrator.audit import list_audits
from orchestrator.database import Database
from orchestrator.lifecycle import Outcome, StudyState
from orchestrator.study import AttemptResult
from orchestrator.tables import StudyRow
from orchestrator.tokens import create_token


@pytest.mark.browser
def test_a_studys_page_shows_the_sweep_and_stays_live(
    browser: Browser, sweep: Sweep, url: str, screenshots: Path
) -> None:
    browser.show(f"{url}/studies/demo")
    browser.until("document.querySelectorAll('#chart .scatterlayer .point').length == 10")
    browser.until("document.querySelector('#link.live') !== null")
    ranks = browser.texts(".board td.rank")
    assert ranks == [str(rank) for rank in range(1, 10)] + ["over cap"]
    scores = [float(text) for text in browser.texts(".board td.strong")]
    assert scores[:9] == sorted(scores[:9])
    assert browser.texts(".facts .hero") == [f"{scores[0]:.4f}"]
    assert browser.count(".board svg.strip rect") == 60
    assert browser.texts("#chart .annotation-text") == ["cap 600,000"]
    assert "over the cap of 600,000 bytes" in browser.texts("section[aria-labelledby=infeasible-title] .reason")[0]
    assert browser.texts("section[aria-labelledby=failed-title] .reason") == ["ArithmeticError: loss is nan at step 31"]
    browser.picture(screenshots / "study.png")

    browser.driver.execute_script(
        "window.notReloaded = true;"
        "document.querySelectorAll('#board [name=trials]').forEach((box, i) => i < 2 && box.click())"
    )
    chosen = browser.until("[...document.querySelectorAll('[name=trials]:checked')].map((box) => box.value)")
    sweep.measure(sweep.running, 1, 15)
    browser.until("document.querySelector('[data-trial=\"11\"] progress').value == 0.5")
    assert browser.texts("[data-trial='11'] [data-score]")[0].startswith("step 60 · loss ")
    assert browser.texts("#running > header .note") == ["BPB so far: on the first 16,384 validation tokens."]
    result = result_of(sweep.running.spec, sweep.chance).model_copy(update={"val_bpb": 2.3})
    sweep.end(sweep.running, AttemptResult(Outcome.SUCCEEDED, result=result))
    browser.until("document.querySelector('.facts .hero').textContent == '2.3000'")
    browser.until("document.querySelectorAll('#chart .scatterlayer .point').length == 11")
    assert browser.texts(".board td.strong")[0] == "2.3000"
    assert browser.until("window.notReloaded")
    # What the reader does outlives what comes in.
    still = browser.until("[...document.querySelectorAll('[name=trials]:checked')].map((box) => box.value)")
    assert sorted(still) == sorted(chosen)
    assert browser.texts("#compare button") == ["Compare 2"]
    browser.driver.execute_script("document.querySelector('#axis [value=gpu_seconds]').click()")
    assert browser.until("location.search") == "?axis=gpu_seconds"
    assert browser.texts("#course .xtitle") == ["GPU-seconds"]
    assert browser.complaints() == []
    assert browser.hosts() == {urlsplit(url).netloc}
    browser.show(f"{url}/studies/demo?axis=gpu_seconds")
    browser.until("document.querySelector('#axis [value=gpu_seconds]').ariaPressed == 'true'")
    few = (
        "const drawn = document.getElementById('drawn'); const said = JSON.parse(drawn.textContent);"
        "for (const name in said.course) said.course[name] = said.course[name].slice(0, 1);"
        "drawn.textContent = JSON.stringify({ ...said, trials: 3 });"
        "document.querySelector('#axis [value=trials]').click();"
        "return [...document.querySelectorAll('#course .xtick text')].map((tick) => tick.textContent)"
    )
    assert browser.driver.execute_script(few) == ["0", "1", "2", "3"]  # nobody finishes half a trial


@pytest.mark.browser
def test_a_study_is_paused_and_resumed_by_buttons_that_ask_first(browser: Browser, sweep: Sweep, url: str) -> None:
    for move, state in (("pause", "paused"), ("resume", "running")):
        browser.show(f"{url}/studies/demo")
        assert browser.count("details.confirm[open]") == 0
        browser.driver.find_element("css selector", f"details[data-key={move}] summary").send_keys(Keys.ENTER)
        browser.driver.find_element("css selector", f"details[data-key={move}] button").send_keys(Keys.ENTER)
        browser.until(f"document.querySelector('.title .state').textContent == '{state}'")
        assert browser.until("location.pathname") == "/studies/demo"
        with sweep.database.read() as session:
            assert store.get_study(session, "demo").state == state
            assert list_audits(session, limit=1)[0].action == f"study.{move}"
    assert browser.complaints() == []


@pytest.mark.browser
def test_a_further_seed_has_a_row_of_its_own_and_news_of_it_do_not_fetch_the_page(
    browser: Browser, sweep: Sweep, url: str
) -> None:
    with sweep.database.write() as session:
        trial = store.get_trial(session, sweep.study.id, 2)
        seeds.add_seed(session, sweep.study.id, trial.id, 42, sweep.now, origin="submitted", why="asked for")
    sweep.claim(trial.spec.gang)  # what was queued first
    browser.show(f"{url}/studies/demo")
    browser.until("document.querySelector('#link.live') !== null")
    claim = sweep.claim(trial.spec.gang)
    row = f"[data-attempt='{claim.lease.attempt_id}']"
    browser.until(f'document.querySelector("{row}") !== null')
    assert browser.texts(f"{row} .note") == ["seed 42 · 1 rank"]
    assert "2 running, 1 further seed, 0 queued" in " ".join(browser.texts(".facts .note"))
    fetched = "performance.getEntriesByType('resource').filter((one) => one.name.endsWith('/live')).length"
    browser.until(f"(window.before = {fetched}) > 0")
    for last in (3, 6, 9):
        sweep.measure(claim, 1, last)
        browser.until(f'document.querySelector("{row} progress").value == {last * 4 / 120}')
    assert browser.driver.execute_script(f"return {fetched} - window.before") <= 1
    assert browser.complaints() == []


def test_a_study_that_is_stopped_can_only_be_archived(url: str) -> None:
    page = {"Accept": "text/html"}
    stopped = httpx.post(f"{url}/studies/demo/state/stop", headers=page)
    assert (stopped.status_code, stopped.headers["location"]) == (303, "/studies/demo")
    offered = re.compile("/studies/demo/(?:state/[a-z]+|new)")
    assert offered.findall(httpx.get(f"{url}/studies/demo").text) == ["/studies/demo/state/archive"]
    again = httpx.post(f"{url}/studies/demo/state/resume", headers=page)
    assert again.status_code == 409
    assert again.headers["content-type"].startswith("text/html")
    assert httpx.post(f"{url}/studies/demo/state/delete").status_code == 422
    assert httpx.post(f"{url}/studies/demo/state/archive", headers=page).status_code == 303
    assert offered.findall(httpx.get(f"{url}/studies/demo").text) == ["/studies/demo/state/unarchive"]
    assert "/studies/demo" not in httpx.get(f"{url}/").text
    assert "/studies/demo" in httpx.get(f"{url}/?archived=true").text


def test_a_study_that_is_complete_says_nothing_of_what_is_to_come(
    small_database: Database, serve: Callable[..., str], new_study: NewStudies, now: datetime
) -> None:
    with small_database.write() as session:
        study = store.create_study(session, new_study("demo").model_copy(update={"max_trials": 3}), now)
    url = serve(small_database, dashboard=False)
    going = httpx.get(f"{url}/studies/demo").text
    assert "3 to come" in going and "will appear here" in going
    with small_database.write() as session:
        session.execute(update(StudyRow).values(proposed=3))
        store.move_study(session, study.id, StudyState.COMPLETE, now, "all proposed trials are finished")
    text = httpx.get(f"{url}/studies/demo").text
    assert not re.search("to come</span>|will appear here|will make|yet", text)
    offered = re.findall("/studies/demo/(?:state/[a-z]+|new)", text)
    assert offered == ["/studies/demo/state/archive", "/studies/demo/new"]
    with small_database.write() as session:
        session.execute(update(StudyRow).values(proposed=2))
    assert "/state/resume" in httpx.get(f"{url}/studies/demo").text


def test_a_page_says_what_refusing_has_saved(url: str) -> None:
    text = httpx.get(f"{url}/studies/demo").text
    assert re.search(r'<th scope="row">refusing</th><td class="n">1</td>', text)
    assert "pruning" not in text


def test_a_viewer_is_offered_no_buttons_and_a_submitters_form_carries_its_token(sweep: Sweep, url: str) -> None:
    with sweep.database.write() as session:
        secrets = [
            create_token(session, role.value, role, datetime.now(UTC))[1] for role in (Role.VIEWER, Role.SUBMITTER)
        ]
    for secret, offered in zip(secrets, (False, True), strict=True):
        with httpx.Client(base_url=url, headers={"Accept": "text/html"}, follow_redirects=True) as http:
            http.post("/sign-in", data={"token": secret})
            text = http.get("/studies/demo").text
            assert "Leaderboard" in text
            assert ("/state/pause" in text) == ("/studies/demo/new" in text) == offered
            sent = {"csrf": re.findall(r'name="csrf" (?:value|content)="([^"]+)"', text)[0]}
            assert http.post("/studies/demo/state/pause").status_code == 403
            answer = http.post("/studies/demo/state/pause", data=sent)
            assert answer.status_code == (200 if offered else 403)
    with sweep.database.read() as session:
        assert store.get_study(session, "demo").state == "paused"
        assert list_audits(session, limit=1)[0].actor == "submitter"


def test_the_page_of_many_trials_is_small_and_waits_for_nothing(
    small_database: Database,
    serve: Callable[..., str],
    new_study: NewStudies,
    new_trial: NewTrials,
    trial_result: Results,
    now: datetime,
) -> None:
    chance = random.Random(5)
    rows: list[dict[str, Any]] = [
        {
            "val_bpb": 2 + chance.random(), "artifact_bytes": chance.randrange(10**5, 10**7), "feasible": n % 10 > 0,
            "finished_at": now + timedelta(seconds=n),
        }
        for n in range(1, 10_000)
    ]  # fmt: skip
    crowd_of(small_database, new_study("demo"), new_trial(), trial_result(), now, rows)
    url = serve(small_database, dashboard=False)
    first = httpx.get(f"{url}/studies/demo", timeout=60)
    assert first.status_code == 200
    assert len(first.content) < 1_000_000
    assert "Reckoning what 10,000 trials cost" in first.text
    deadline = time.monotonic() + 60
    while (drawn := drawn_of(httpx.get(f"{url}/studies/demo/live", timeout=60).text)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(drawn["fits"]["number"]) <= MOST + 10
    assert len(drawn["over"]["number"]) <= MOST // 5
    fit = [(row["val_bpb"], row["artifact_bytes"], n) for n, row in enumerate(rows, 1) if row["feasible"]]
    fit.append((trial_result().val_bpb, trial_result().artifact_bytes, 0))
    best = [number for _, _, number in sorted(fit)[:BEST]]
    assert set(best) <= set(drawn["fits"]["number"])
    lightest, edge = inf, []
    for _, size, number in sorted(fit):
        if size < lightest:
            lightest = size
            edge.append(number)
    assert drawn["front"]["number"] == edge[::-1]
    assert drawn["course"]["bpb"][-1] == min(fit)[0]
    assert drawn["trials"] == 10_000


def drawn_of(text: str) -> Any:
    """What the page's charts draw; None while it is reckoned."""
    return json.loads(re.findall(r'<script type="application/json" id="drawn"[^>]*>(.*?)</script>', text)[0])
