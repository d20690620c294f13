"""A trial's page, in a real browser on a study in the middle of a sweep."""

import re
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from browser import Browser
from sweep import FAILED, INFEASIBLE, QUEUED, RUNNING, Sweep

from api.bars import bytes_bar, curve_picture, predicted_bytes
from api.diagnostics import tables
from api.pictures import Loop, block_colour, loops, tying_picture
from api.schemas import RunOut
from api.timeline import attempt_lanes
from api.trial_page import SHOWN_LINES
from orchestrator import seeds, store
from orchestrator.lifecycle import Cause, Outcome, RunState
from orchestrator.logs import add_lines
from orchestrator.study import Attempt, AttemptResult, Run
from worker.recipes import read_yaml
from worker.report import LogLine
from worker.sharing import SharingConfig
from worker.spec import BudgetConfig, GangConfig, parse_spec


@pytest.mark.browser
def test_a_trials_page_draws_its_tying_map_and_its_curve_grows(
    browser: Browser, sweep: Sweep, url: str, screenshots: Path
) -> None:
    sweep.measure(sweep.running, 1, 8)
    browser.show(f"{url}/studies/demo/trials/{RUNNING}")
    browser.until("document.getElementById('chart').dataset.points == '8'")
    assert browser.texts("svg.tying text.block") == list("001122")
    assert browser.count("svg.tying path.skip") == 3
    assert browser.count("svg.tying .gate") == 0
    browser.driver.execute_script("window.notReloaded = true")
    sweep.measure(sweep.running, 1, 20)  # the first eight again: delivered twice, drawn once
    browser.until("document.getElementById('chart').dataset.points == '20'")
    browser.picture(screenshots / "trial-running.png")
    sweep.finish(sweep.running)
    browser.until("document.querySelector('.title .state').textContent == 'complete'")
    browser.until("document.getElementById('chart').dataset.points == '30'")
    assert browser.count("svg.tying .gate") == 18  # two paths' gates, and influence
    assert browser.texts(".timeline .state.succeeded") == ["succeeded"]
    assert browser.until("window.notReloaded")
    browser.until("document.getElementById('link').textContent == 'ended'")
    with sweep.database.read() as session:
        result = store.get_trial(session, sweep.study.id, RUNNING).result
    assert result is not None
    finals = [f"{result.val_bpb:.4f} from the artifact", f"{result.val_bpb_prequant:.4f} before quantisation"]
    browser.until("document.querySelectorAll('#chart .annotation-text').length == 2")
    assert browser.texts("#chart .annotation-text") == finals
    assert "BPB on the first 16,384 validation tokens. Lines across: the final scores, on all of them." in " ".join(
        browser.texts("[aria-labelledby=curve-title] .note")
    )
    browser.picture(screenshots / "trial.png")
    assert browser.complaints() == []
    assert browser.hosts() == {urlsplit(url).netloc}


@pytest.mark.browser
def test_every_line_has_a_name_and_no_two_seeds_look_alike(browser: Browser, sweep: Sweep, url: str) -> None:
    sweep.measure(sweep.running, 1, 3)  # before the first validation
    browser.show(f"{url}/studies/demo/trials/{RUNNING}")
    browser.until("[...document.querySelectorAll('#chart .legendtext')].some((one) => one.textContent == 'seed 1337')")
    looks = "new Set([...Array(20).keys()].map((n) => it.inks()[n % 5] + it.dash(n))).size"
    assert browser.later(f"import('/assets/curves.js').then((it) => {looks})") == 20


def test_a_reason_says_its_cause_once(sweep: Sweep, url: str) -> None:
    sweep.end(sweep.running, AttemptResult(Outcome.FAILED, "Diverged: training diverged", cause=Cause.DIVERGED))
    text = httpx.get(f"{url}/studies/demo/trials/{RUNNING}").text
    assert '<p class="reason">Diverged: training diverged</p>' in text
    assert '<p class="reason">diverged: ArithmeticError' in httpx.get(f"{url}/studies/demo/trials/{FAILED}").text


def test_why_an_earlier_attempt_ended_is_said_of_that_attempt_alone(sweep: Sweep, url: str) -> None:
    sweep.end(sweep.running, AttemptResult(Outcome.PREEMPTED, "its host was stopped"))
    said = '<p class="reason">its host was stopped</p>'
    text = httpx.get(f"{url}/studies/demo/trials/{RUNNING}").text
    assert text.count(said) == 1
    assert text.index(said) > text.index('id="attempts-title"')
    assert said not in httpx.get(f"{url}/studies/demo").text


def test_a_trials_page_shows_what_its_diagnostics_say(url: str) -> None:
    finished, waiting = (httpx.get(f"{url}/studies/demo/trials/{number}").text for number in (2, QUEUED))
    for title in ("Scores", "Averages", "Lost to quantisation", "Spread of scales", "Extra recurrence"):
        assert f"<h3>{title}</h3>" in finished
        assert title not in waiting
    assert re.search(r"value embedding</th><td[^>]*>-0.0001<", finished)
    assert re.search(r">1</th><td[^>]*>0.4321</td><td[^>]*>\d\.\d{4}<", finished)
    assert re.search(r">2</th><td[^>]*>–</td><td[^>]*>–<", finished)
    assert finished.count("Block Influence = 0.") == 6
    assert "Block Influence" not in waiting
    assert finished.count("<circle") == 3
    assert "<circle" not in waiting
    assert re.search(r"header 30\d B", finished)


def test_a_loss_that_rounds_to_nothing_has_no_sign() -> None:
    (table,) = tables({"quantisation_loss": {"embedding": -0.00003, "mlp": -0.0001}})
    assert table.rows == (("embedding", ("0.0000",)), ("mlp", ("-0.0001",)))


def test_layers_of_a_late_tying_are_pale_until_they_run() -> None:
    late = {"pattern": "loop", "start": 1, "end": 2, "passes": 2, "from_fraction": 0.35}
    sharing = SharingConfig.model_validate({"virtual_layers": 6, "unique_blocks": 4, "tying": late})
    picture = tying_picture(sharing, unet_skips=True)
    assert re.findall(r'class="late"><title>(.*?)</title>', picture) == [
        "layer 3 applies block 1, from 35% of the budget on", "layer 4 applies block 2, from 35% of the budget on",
    ]  # fmt: skip
    assert picture.count('class="skip"') == 3
    whole = SharingConfig.model_validate({"virtual_layers": 6, "unique_blocks": 3})
    assert "35%" not in tying_picture(whole, unet_skips=True)
    assert "late" not in tying_picture(whole, unet_skips=True)


def test_a_curve_of_one_size_or_one_score_is_drawn_too() -> None:
    for points in ([(100, 1.5), (100, 1.4)], [(100, 1.5), (200, 1.5)]):
        assert curve_picture(points).count("<circle") == 2


def test_a_loop_is_where_the_same_blocks_run_again_at_once() -> None:
    assert list(loops((0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4))) == [Loop(1, 3, 3)]
    assert list(loops((0, 1, 2, 0, 1, 2))) == [Loop(0, 3, 2)]
    assert list(loops((0, 0, 1, 1, 1))) == [Loop(0, 1, 2), Loop(2, 1, 3)]
    assert list(loops((0, 1, 2, 1, 0))) == []


def test_a_picture_ties_each_layer_to_the_next_that_applies_its_block() -> None:
    sharing = SharingConfig.model_validate({"virtual_layers": 6, "unique_blocks": 3})
    picture = tying_picture(sharing, unet_skips=False)
    assert re.findall(r'class="tie".*?<title>(.*?)</title>', picture) == [
        "layer 3 applies block 0 again", "layer 4 applies block 1 again", "layer 5 applies block 2 again",
    ]  # fmt: skip
    assert ">3 layers ×2</text>" in picture
    untied = SharingConfig.model_validate({"virtual_layers": 6, "unique_blocks": 6})
    assert "again" not in tying_picture(untied, unet_skips=False)


def test_blocks_have_colours_of_their_own_and_digits_that_can_be_read_on_them() -> None:
    colours = [block_colour(block) for block in range(256)]
    assert len(set(colours)) == 256
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)


def test_a_predicted_bar_has_its_interval_and_its_classes_add_up(sweep: Sweep) -> None:
    with sweep.database.read() as session:
        waiting = store.get_trial(session, sweep.study.id, QUEUED)
    prediction, by_class = (
        waiting.prediction,
        predicted_bytes(waiting.spec, waiting.prediction.artifact_bytes, waiting.prediction.code_bytes),
    )
    assert sum(by_class.values()) == pytest.approx(prediction.artifact_bytes)
    assert {"embedding", "attention", "mlp", "control", "header", "code"} == set(by_class)
    ends = (prediction.artifact_bytes_low, prediction.artifact_bytes_high)
    assert f"{ends[0]:,} to {ends[1]:,} expected" in bytes_bar(by_class, 600_000, ends)
    assert "whisker" not in bytes_bar(by_class, 600_000)


@pytest.mark.browser
def test_a_log_is_there_at_once_and_goes_on(browser: Browser, sweep: Sweep, url: str) -> None:
    lease = sweep.running.lease.attempt_id
    log(sweep, lease, 1, 3)
    browser.show(f"{url}/studies/demo/trials/{RUNNING}", width=375)
    assert browser.texts("#log b") == ["seed 1337, attempt 1"]
    assert [line.split()[-1] for line in browser.texts("#log span")] == ["<b>1</b>", "<b>2</b>", "<b>3</b>"]
    browser.driver.execute_script("document.querySelector('[data-key=cancel]').open = true")
    assert browser.until("document.documentElement.scrollWidth") == 375
    left = "document.querySelector('[data-key=cancel] form').getBoundingClientRect().left"
    assert browser.driver.execute_script(f"return {left}") >= 0
    log(sweep, lease, 2, 5)
    browser.until("document.querySelectorAll('#log span').length == 5")
    assert browser.texts("#log b") == ["seed 1337, attempt 1"]
    assert browser.complaints() == []


@pytest.mark.browser
def test_a_further_seed_of_a_complete_trial_is_followed(browser: Browser, sweep: Sweep, url: str) -> None:
    browser.show(f"{url}/studies/demo/trials/2")
    browser.until("document.getElementById('chart').dataset.points == '30'")
    assert browser.texts(".timeline .lane-name b") == ["seed 1337"]
    with sweep.database.write() as session:
        trial = store.get_trial(session, sweep.study.id, 2)
        seeds.add_seed(session, sweep.study.id, trial.id, 42, sweep.now, origin="submitted", why="asked for")
    browser.show(f"{url}/studies/demo/trials/2?x=seconds")
    browser.until("document.getElementById('chart').dataset.points == '30'")
    claim = sweep.claim(trial.spec.gang)  # queued first: QUEUED's
    claim = sweep.claim(trial.spec.gang)
    assert (claim.trial_number, claim.spec.seed) == (2, 42)
    sweep.measure(claim, 1, 10)
    browser.until("document.getElementById('chart').dataset.points == '40'")
    assert "seed 42" in browser.texts("#chart .legendtext")
    browser.until("document.querySelectorAll('.timeline .lane-name b').length == 2")
    assert browser.texts(".timeline .lane-name b") == ["seed 1337", "seed 42"]
    assert browser.until("document.querySelector('#chart .xtitle').textContent") == "seconds of training"
    assert browser.complaints() == []


@pytest.mark.browser
def test_a_log_goes_on_where_it_was_when_its_page_comes_back(browser: Browser, sweep: Sweep, url: str) -> None:
    browser.show(f"{url}/studies/demo/trials/{RUNNING}")
    browser.until("document.querySelector('#link.live') !== null")
    log(sweep, sweep.running.lease.attempt_id, 1, 3)
    browser.until("document.querySelectorAll('#log span').length == 3")
    browser.driver.execute_script(
        "window.dispatchEvent(new PageTransitionEvent('pagehide'));"
        "window.dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))"
    )
    log(sweep, sweep.running.lease.attempt_id, 4, 5)
    browser.until("document.querySelectorAll('#log span').length >= 5")
    assert [line.split()[-1] for line in browser.texts("#log span")] == [f"<b>{n}</b>" for n in range(1, 6)]
    assert browser.complaints() == []


def test_a_log_goes_on_after_the_attempts_that_its_end_no_longer_shows(sweep: Sweep, url: str) -> None:
    first = sweep.running.lease.attempt_id
    log(sweep, first, 1, 3)
    sweep.end(sweep.running, AttemptResult(Outcome.LOST, "its host is gone"))
    again = sweep.claim(sweep.running.spec.gang)
    assert again.trial_number == RUNNING
    second = again.lease.attempt_id
    log(sweep, second, 1, SHOWN_LINES + 5)
    text = httpx.get(f"{url}/studies/demo/trials/{RUNNING}").text
    assert re.search(rf'data-after="{first}:\d+,{second}:{SHOWN_LINES + 5}"', text)
    assert text.count("said &lt;b&gt;") == SHOWN_LINES


def log(sweep: Sweep, attempt_id: int, first: int, last: int) -> None:
    said = [LogLine(number=n, elapsed_seconds=n / 2, line=f"said <b>{n}</b>") for n in range(first, last + 1)]
    with sweep.database.write() as session:
        add_lines(session, attempt_id, said)


def test_buttons_do_what_the_api_does_and_lead_back(sweep: Sweep, url: str) -> None:
    page = f"/studies/demo/trials/{RUNNING}"
    with httpx.Client(base_url=url, headers={"Accept": "text/html"}) as http:
        for action, fields in (
            ("tags", {"add": "baseline, keep:this"}), ("tags", {"remove": "baseline"}),
            ("notes", {"text": "diverges\r\n<i>early</i>"}), ("cancel", {}),
        ):  # fmt: skip
            answer = http.post(f"{page}/{action}", data={"csrf": "", **fields})
            assert (answer.status_code, answer.headers["location"].split("#")[0]) == (303, page)
        shown = http.get(page).text
        assert re.findall(r'name="remove" value="([^"]+)"', shown) == ["keep:this"]
        assert "diverges\n&lt;i&gt;early&lt;/i&gt;" in shown
        assert '<span class="state cancelled">' in shown
        assert f"Trial {RUNNING} was cancelled" in re.sub(r"\s+", " ", shown)
        note = re.findall(r"/notes/(\d+)/delete", shown)[0]
        assert http.post(f"{page}/notes/{note}/delete", data={"csrf": ""}).status_code == 303
        assert "diverges" not in http.get(page).text
        again = http.post(f"{page}/cancel", data={"csrf": ""})
        assert again.status_code == 409
        assert "is cancelled and cannot" in again.text
        for action, fields in (("tags", {"add": "Not A Tag"}), ("notes", {"text": "  "})):
            assert http.post(f"{page}/{action}", data={"csrf": "", **fields}).status_code == 422


def test_the_spec_is_a_file_that_says_exactly_what_was_trained(sweep: Sweep, url: str) -> None:
    answer = httpx.get(f"{url}/studies/demo/trials/2/spec.yaml")
    with sweep.database.read() as session:
        trial = store.get_trial(session, sweep.study.id, 2)
    assert parse_spec(read_yaml(answer.text)) == trial.spec
    assert answer.headers["content-disposition"] == 'attachment; filename="demo-2.yaml"'
    shown = httpx.get(f"{url}/studies/demo/trials/2").text
    assert f"curl -fsS -o demo-2.yaml {url}/studies/demo/trials/2/spec.yaml\n" in shown
    assert "python -m worker demo-2.yaml --out demo-2\ncaddie submit demo demo-2.yaml --allow-duplicate<" in shown
    assert "train it again, at another seed." in shown
    assert "train it again, as another trial." in httpx.get(f"{url}/studies/demo/trials/{QUEUED}").text
    assert "caddie submit" not in httpx.get(f"{url}/studies/demo/trials/{INFEASIBLE}").text


def test_a_trial_of_several_seeds_shows_their_mean_and_every_seeds_score(sweep: Sweep, url: str) -> None:
    one = httpx.get(f"{url}/studies/demo/trials/2").text
    assert "one seed" in one and "±" not in one
    with sweep.database.write() as session:
        trial = store.get_trial(session, sweep.study.id, 2)
        seeds.add_seed(session, sweep.study.id, trial.id, 42, sweep.now, origin="submitted", why="asked for")
    sweep.claim(trial.spec.gang)  # what was queued first
    assert trial.result is not None
    sweep.finish(sweep.claim(trial.spec.gang), val_bpb=trial.result.val_bpb + 0.02)
    shown = httpx.get(f"{url}/studies/demo/trials/2").text
    hero, note = re.findall(r'<dd class="hero"[^>]*>(.*?)</dd>\s*<dd class="note">(.*?)</dd>', shown)[0]
    assert hero == f"{trial.result.val_bpb + 0.01:.4f}"
    assert re.match(rf"± 0\.\d{{4}}, mean of 2 seeds; its own {trial.result.val_bpb:.4f}, ", note)
    cells = re.findall(r'succeeded</span></td><td class="n">([\d.]+)</td>', shown)
    assert cells == [f"{trial.result.val_bpb:.4f}", f"{trial.result.val_bpb + 0.02:.4f}"]


def test_attempts_lie_on_one_axis_as_long_as_the_longest(now: datetime) -> None:
    def attempt(number: int, outcome: Outcome | None, **seconds: float) -> Attempt:
        claimed = now + timedelta(minutes=number)
        ended = claimed + timedelta(seconds=9) if outcome else None
        return Attempt(
            number, 1, number, "host", "gang", "train", outcome, None, None, now, claimed, ended, seconds,
            step_seconds=None, hardware=None, artifact=None,
        )  # fmt: skip

    attempts = [attempt(1, Outcome.LOST, queue=60.0, train=5.0, start=15.0), attempt(2, None, queue=5.0, start=1.0)]
    run = Run(1, 1, 7, RunState.RUNNING, GangConfig(), 0, BudgetConfig(steps=1), None, None)
    first, second = attempt_lanes([RunOut.of(run, attempts, 2.5)], now + timedelta(minutes=2, seconds=41))
    assert (first.waited_seconds, first.seconds) == (60.0, 20.0)
    assert [(span.phase, round(span.share, 3)) for span in first.spans] == [("start", 36.585), ("train", 12.195)]
    assert [(span.phase, span.seconds) for span in second.spans] == [("start", 1.0), ("train", 40.0)]


def test_a_trial_is_retried_and_gets_seeds_from_its_page(sweep: Sweep, url: str) -> None:
    with httpx.Client(base_url=f"{url}/studies/demo/trials", headers={"Accept": "text/html"}) as http:
        assert "Retry trial" in http.get(f"/{FAILED}").text
        assert http.post(f"/{FAILED}/retry", data={"csrf": ""}).status_code == 303
        assert '<span class="state queued">' in http.get(f"/{FAILED}").text
        assert http.post("/2/seeds", data={"csrf": "", "count": "2", "seeds": ""}).status_code == 303
        assert http.post("/2/seeds", data={"csrf": "", "count": "1", "seeds": "2025, 8"}).status_code == 303
        shown = http.get("/2").text
        assert re.findall(r"Seed (\d+) is queued", shown) == ["42", "314", "2025", "8"]
        run = re.findall(r"/runs/(\d+)/cancel", shown)[0]
        assert http.post(f"/2/runs/{run}/cancel", data={"csrf": ""}).status_code == 303
        assert re.findall(r"Seed (\d+) is queued", http.get("/2").text) == ["314", "2025", "8"]
        for said in ({"count": "many"}, {"seeds": "x"}, {}):
            assert http.post("/2/seeds", data={"csrf": "", **said}).status_code == 422
        assert http.post(f"/{QUEUED}/seeds", data={"count": "1"}).status_code == 409
