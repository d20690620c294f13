"""A study's page, in a real browser on a study in the middle of a sweep."""

from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import Browser
from sweep import Sweep, result_of

from orchestrator.lifecycle import Outcome
from orchestrator.study import AttemptResult


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

    browser.driver.execute_script("window.notReloaded = true")
    sweep.measure(sweep.running, 1, 15)
    browser.until("document.querySelector('[data-trial=\"11\"] progress').value == 0.5")
    assert browser.texts("[data-trial='11'] [data-score]")[0].startswith("step 60 · loss ")
    result = result_of(sweep.running.spec, sweep.chance).model_copy(update={"val_bpb": 2.3})
    sweep.end(sweep.running, AttemptResult(Outcome.SUCCEEDED, result=result))
    browser.until("document.querySelector('.facts .hero').textContent == '2.3000'")
    browser.until("document.querySelectorAll('#chart .scatterlayer .point').length == 11")
    assert browser.texts(".board td.strong")[0] == "2.3000"
    assert browser.until("window.notReloaded")
    assert browser.complaints() == []
    assert browser.hosts() == {urlsplit(url).netloc}
