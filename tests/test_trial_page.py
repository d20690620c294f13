"""A trial's page, in a real browser on a study in the middle of a sweep."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from browser import Browser
from sweep import QUEUED, RUNNING, Sweep

from api.bars import bytes_bar, curve_picture, predicted_bytes
from api.pictures import Loop, block_colour, loops, tying_picture
from orchestrator import store
from worker.sharing import SharingConfig


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
    browser.picture(screenshots / "trial.png")
    assert browser.complaints() == []
    assert browser.hosts() == {urlsplit(url).netloc}


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
