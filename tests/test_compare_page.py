"""The page that holds trials of a study side by side."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from browser import Browser
from sweep import FAILED, OVER, QUEUED, RUNNING, Sweep

from api.differences import side_by_side
from orchestrator.lifecycle import Outcome
from orchestrator.study import AttemptResult
from worker.recipes import load_recipe
from worker.spec import override, parse_spec

READ_CSV = "import('/assets/tables.js').then((it) => it.csv(document.querySelector(arguments[0]))).then(arguments[1])"


@pytest.mark.browser
def test_what_differs_comes_first_and_curves_lie_over_each_other(
    browser: Browser, sweep: Sweep, url: str, screenshots: Path
) -> None:
    browser.show(f"{url}/studies/demo/compare?trials=2,8,{RUNNING}")
    browser.until("document.getElementById('chart').dataset.curves == '2'")
    assert browser.texts("main h2")[:2] == ["What differs", "What came of it"]
    differing = "section[aria-labelledby=differ-title] > .scroll"
    assert browser.texts(f"{differing} th code") == [
        "sharing.unique_blocks", "sharing.tying.pattern", "sharing.lora.rank"
    ]  # fmt: skip
    assert browser.texts(f"{differing} td.other") == ["5", "sequence", "sequence", "4"]
    assert browser.count("svg.tying") == browser.count("svg.bytes-bar") == 3
    assert browser.count("svg.bytes-bar .whisker") == 1
    copied = browser.driver.execute_async_script(READ_CSV, f"{differing} table").splitlines()
    assert copied[0] == f",Trial 2,Trial 8,Trial {RUNNING}"
    assert copied[3] == "sharing.lora.rank,8,4,8"
    browser.driver.find_element("css selector", "#across [value=seconds]").click()
    browser.until("document.querySelector('#chart .xtitle').textContent == 'seconds of training'")
    assert browser.driver.current_url.endswith("&x=seconds")  # to be shared
    browser.picture(screenshots / "compare.png")
    sweep.measure(sweep.running, 1, 6)
    browser.until("document.getElementById('chart').dataset.curves == '3'")
    sweep.end(sweep.running, AttemptResult(Outcome.STOPPED, "told to stop"))
    browser.until("document.querySelectorAll('#live .state.running').length == 0")
    assert browser.complaints() == []
    assert browser.hosts() == {urlsplit(url).netloc}


@pytest.mark.browser
def test_the_comparison_fits_a_phone_and_the_dark(browser: Browser, url: str, screenshots: Path) -> None:
    browser.show(f"{url}/studies/demo/compare?trials=0,1,2,{FAILED},{QUEUED}", width=375, dark=True)
    browser.until("document.getElementById('chart').dataset.curves == '3'")
    assert browser.until("document.documentElement.scrollWidth") == 375
    browser.picture(screenshots / "compare-phone-dark.png")
    assert browser.complaints() == []


def test_the_best_is_marked_among_those_that_have_a_result(url: str) -> None:
    text = httpx.get(f"{url}/studies/demo/compare", params={"trials": ["1", str(QUEUED), str(OVER)]}).text
    rows = dict(re.findall(r'<tr><th scope="row">([^<]+)</th>(.*?)</tr>', text, re.S))
    assert [bool(re.search("best", cell)) for cell in rows["BPB before quantisation"].split("</td>")[:3]].count(
        True
    ) == 1
    assert "best" in rows["Artifact bytes"].split("</td>")[0]
    assert ">–" in rows["Artifact bytes"].split("</td>")[1]
    assert "best" not in rows["Parameters"]
    # Only what is within the caps has a mean.
    assert ">–" in rows["BPB, mean of seeds within the caps"].split("</td>")[2]


def test_numbers_that_are_no_two_to_five_trials_are_refused_with_what_would_be_right(url: str) -> None:
    for trials in ("1", "1,1", "1,2,3,4,5,6", "1,x", "1,-2", "1,2.5", "1,١", "<b>,2"):
        answer = httpx.get(f"{url}/studies/demo/compare", params={"trials": trials}, headers={"Accept": "text/html"})
        assert answer.status_code == 422
        assert "2 to 5 different trials" in answer.text
        assert "<b>" not in answer.text


def test_a_trial_that_is_not_there_cannot_be_compared(url: str) -> None:
    for trials in ("1,99", "1,9999999999"):
        answer = httpx.get(f"{url}/studies/demo/compare", params={"trials": trials}, headers={"Accept": "text/html"})
        assert answer.status_code == 404


def test_without_numbers_the_page_asks_for_them(url: str) -> None:
    answer = httpx.get(f"{url}/studies/demo/compare")
    assert answer.status_code == 200
    assert '<input id="trials"' in answer.text


def test_every_path_of_every_spec_has_a_line_and_absent_parts_have_nothing_there() -> None:
    plain = load_recipe("laptop")
    specs = [parse_spec(override(plain, changes)) for changes in ({}, {"evaluation.ttt": {"epochs": 2}}, {"seed": 5})]
    lines = {line.path: line for line in side_by_side(specs)}
    differing = [path for path, line in lines.items() if line.differs]
    assert "seed" in differing
    assert lines["evaluation.ttt.epochs"].values == (None, 2, None)
    assert not lines["model.width"].differs
