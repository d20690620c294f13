"""The cluster's page: lanes that grow as gangs work, in a real browser and without one."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from browser import Browser
from sweep import TTL, Sweep

from api.cluster_page import _marks
from orchestrator import leases
from orchestrator.database import Database
from orchestrator.lanes import Cluster


@pytest.fixture
def sweep(small_database: Database, tmp_path: Path) -> Sweep:
    """One of the last minutes: the page shows how long ago things were."""
    return Sweep(small_database, tmp_path / "artifacts", datetime.now(UTC) - timedelta(minutes=4))


@pytest.mark.browser
def test_lanes_show_what_gangs_do_and_grow(browser: Browser, sweep: Sweep, url: str, screenshots: Path) -> None:
    browser.show(f"{url}/cluster?minutes=5")
    browser.until("document.querySelector('#link.live') !== null")
    assert browser.texts(".lane-name b") == ["1 cpu rank, gang 3"]
    assert browser.texts(".lane-now .state") == ["train"]
    widths = "[...document.querySelectorAll('svg.lane rect.train')].map((one) => Number(one.getAttribute('width')))"
    assert min(browser.until(widths)) > 0
    assert browser.count("svg.lane rect.wasted") == 1
    assert browser.texts("[aria-labelledby=queue-title] tbody th") == ["demo"]
    assert browser.texts(".choice [aria-current]") == ["5 min"]
    browser.picture(screenshots / "cluster.png")
    browser.driver.execute_script("window.notReloaded = true")
    with sweep.database.write() as session:
        leases.renew(session, sweep.running.lease, datetime.now(UTC), TTL, phase="evaluate")
    browser.until("document.querySelector('.lane-now .state').textContent == 'evaluate'")
    assert browser.until("window.notReloaded")
    browser.driver.find_element("link text", "24 h").click()
    browser.until("location.search == '?minutes=1440'")
    assert browser.complaints() == []
    assert browser.hosts() == {urlsplit(url).netloc}


@pytest.mark.browser
def test_on_a_phone_the_axis_can_be_read_and_a_lane_without_pointing_at_it(
    browser: Browser, url: str, screenshots: Path
) -> None:
    browser.show(f"{url}/cluster?minutes=30", width=390)
    browser.driver.execute_script("document.querySelector('.latest').open = true")
    said = browser.texts(".latest li")
    assert len(said) == 5 and said[0].startswith("trial 11 of demo: train ")
    assert "(failed)" in said[1]
    assert browser.count(".latest li a[href='/studies/demo/trials/11']") == 1
    ends = browser.driver.execute_script(
        "return [...document.querySelectorAll('.axis span')].map((one) => one.getBoundingClientRect())"
        ".filter((one) => one.width).map((one) => [one.left, one.right])"
    )
    assert len(ends) > 2 and all(before[1] < after[0] for before, after in pairwise(ends))
    assert browser.driver.execute_script("return document.documentElement.scrollWidth") == 390
    browser.picture(screenshots / "cluster-phone.png")


def test_a_window_is_any_of_a_week(url: str) -> None:
    assert "seen in 90 min" in httpx.get(f"{url}/cluster?minutes=90").text
    for wrong in ("0", "10081", "x"):
        assert httpx.get(f"{url}/cluster?minutes={wrong}").status_code == 422


@pytest.mark.parametrize(
    ("minutes", "marks"),
    [
        (5, ["−5 min", "−4 min", "−3 min", "−2 min", "−1 min", "now"]),
        (90, ["−90 min", "−1 h", "−30 min", "now"]),
        (1440, ["−1 d", "−20 h", "−16 h", "−12 h", "−8 h", "−4 h", "now"]),
    ],
)
def test_the_axis_has_few_marks_at_whole_times(minutes: int, marks: list[str], now: datetime) -> None:
    cluster = Cluster(
        since=now - timedelta(minutes=minutes), until=now, lanes=(), lanes_left_out=0, attempts=0, truncated=False,
        joined_seconds=0.0, busy_seconds=0.0, idle_seconds=0.0, idle_share=None, ranks_in_use={}, queue=(),
    )  # fmt: skip
    found = list(_marks(cluster))
    assert [name for _, name in found] == marks
    assert found[-1][0] == 100
