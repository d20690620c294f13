"""The pages, in a real browser on a study as it is in the middle of a sweep."""

import base64
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from api.context import Writer
from api.pictures import curve_picture, tying_picture
from api.schemas import parameters_by_class
from api.submission import submit
from orchestrator import leases, store
from orchestrator.artifacts import ArtifactStore
from orchestrator.database import Database
from orchestrator.lifecycle import Cause, Outcome
from orchestrator.study import AttemptResult, Claim, NewStudy, Study
from worker.inventory import tensor_inventory
from worker.recipes import load_recipe
from worker.report import Hardware, Measurement, TrialResult
from worker.sharing import SharingConfig
from worker.spec import TrialSpec, override, parse_spec

TTL = timedelta(minutes=5)
CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
BASE = {
    "model": {"vocab_size": 1024, "width": 96, "heads": 4, "kv_heads": 2, "mlp_multiple": 2},
    "sharing": {"virtual_layers": 6, "unique_blocks": 3, "lora": {"rank": 4}, "scales": "layer", "mixes": "layer"},
    "quantisation": {"bits": 6, "half_below": 4096},
}
CHANGES: tuple[dict[str, Any], ...] = (
    {"sharing.unique_blocks": 3, "sharing.tying": "cycle", "sharing.lora.rank": 4},
    {"sharing.unique_blocks": 2, "sharing.tying": "sequence", "sharing.lora.rank": 2},
    {"sharing.unique_blocks": 3, "sharing.tying": "palindrome", "sharing.lora.rank": 8},
    {"sharing.unique_blocks": 6, "sharing.tying": "sequence", "sharing.lora.rank": 0},
    {"sharing.unique_blocks": 1, "sharing.tying": "cycle", "sharing.lora.rank": 8},
    {"sharing.unique_blocks": 4, "sharing.tying": "tail", "sharing.lora.rank": 2},
    {"sharing.unique_blocks": 4, "sharing.tying": "cycle", "sharing.lora.rank": 0},
    {"sharing.unique_blocks": 2, "sharing.tying": "palindrome", "sharing.lora.rank": 4},
    {"sharing.unique_blocks": 5, "sharing.tying": "sequence", "sharing.lora.rank": 4},
)
HARDWARE = Hardware(
    device="AMD EPYC 9V74", node="node-1", node_devices=2, ranks=1, clocks_mhz=(2596.0,), clock_limit_mhz=None,
    torch="2.13.0+cpu", cuda=None, probe_seconds=(0.0004,), probe_after_seconds=(0.00035,),
)  # fmt: skip
OVER, FAILED, RUNNING, QUEUED, INFEASIBLE = 9, 10, 11, 12, 13


def result_of(spec: TrialSpec, chance: random.Random) -> TrialResult:
    """A result as this spec's training might give it: more parameters, fewer bits."""
    parameters = sum(tensor.elements for tensor in tensor_inventory(spec.model, spec.sharing))
    by_class = {name.value: int(count * 0.74) for name, count in parameters_by_class(spec).items()}
    before = 2.62 - 0.11 * (parameters / 300_000) ** 0.5 + chance.gauss(0, 0.008)
    by_class["header"] = int(parameters * 0.74) + 300 - sum(by_class.values())
    model_bytes, layers = sum(by_class.values()), spec.sharing.virtual_layers
    gammas = {path: [0.02 + 0.2 * chance.random() for _ in range(layers)] for path in spec.sharing.lora.paths}
    return TrialResult(
        val_bpb=before + 0.02 + 0.01 * chance.random(), val_bpb_prequant=before, val_loss=4.2, parameters=parameters,
        model_bytes=model_bytes, code_bytes=62_000, artifact_bytes=model_bytes + 62_000, artifact_sha256="0" * 64,
        steps=120, tokens=245_760, train_seconds=11 + 4 * chance.random(), evaluate_seconds=1.2, pack_seconds=0.4,
        step_seconds=0.09, stopped=False, bytes_by_class=by_class, hardware=HARDWARE,
        diagnostics={
            "gammas": gammas if spec.sharing.lora.rank else {},
            "block_influence": [0.05 + 0.1 * chance.random() for _ in range(layers)],
            "scale_spread": {"attention": 0.0312, "mix": 0.0456},
            "contraction": {"changes": [0.4321, None], "bpb": [before, before + 0.1, None]},
            "quantisation_loss": {"embedding": 0.0012, "value_embedding": -0.0001},
            "scores": {"plain": before + 0.02, "sliding": before - 0.03},
            "averages": {"last": before, "ema": before - 0.01},
            "bytes_curve": [{"artifact_bytes": 20_000 * n, "val_bpb": before - 0.1 * n} for n in range(1, 4)],
            "codec": "ans",
        },
    )  # fmt: skip


class Sweep:
    """A study as the loop would have written it: trials complete, over the cap, failed, running, queued, infeasible."""

    def __init__(self, database: Database, artifacts: Path, now: datetime) -> None:
        self.database, self.artifacts, self.now = database, ArtifactStore(artifacts), now
        self.chance = random.Random(7)
        space = {"sharing.lora.rank": {"choice": [0, 2, 4, 8]}, "sharing.unique_blocks": {"low": 1, "high": 6}}
        base = override(load_recipe("laptop"), BASE)
        new = NewStudy.model_validate(
            {"name": "demo", "base": base, "space": space, "max_trials": 24, "cap_bytes": 600_000}
        )
        with database.write() as session:
            self.study: Study = store.create_study(session, new, now)
        for changes in CHANGES:
            self.finish(self.start(changes))
        over = self.start({"sharing.unique_blocks": 6, "sharing.tying": "sequence", "sharing.lora.rank": 2})
        self.finish(over, artifact_bytes=616_200)
        failed = self.start({"sharing.unique_blocks": 3, "sharing.tying": "sequence", "sharing.lora.rank": 1})
        self.end(failed, AttemptResult(Outcome.FAILED, "ArithmeticError: loss is nan at step 31", cause=Cause.DIVERGED))
        self.running = self.start({"sharing.unique_blocks": 3, "sharing.tying": "sequence", "sharing.lora.rank": 8})
        self.submit({"sharing.unique_blocks": 2, "sharing.tying": "cycle", "sharing.lora.rank": 0})
        self.submit({"model.width": 512, "sharing.unique_blocks": 6, "sharing.tying": "sequence"})

    def submit(self, changes: dict[str, Any]) -> TrialSpec:
        self.now += timedelta(seconds=3)
        spec = parse_spec(override(self.study.definition.base, changes))
        submit(Writer(self.database, "local", self.now), self.study, spec)
        return spec

    def start(self, changes: dict[str, Any]) -> Claim:
        gang = self.submit(changes).gang
        with self.database.write() as session:
            claim = leases.claim(session, gang, "host-1", self.now, TTL)
            assert claim is not None
            leases.renew(session, claim.lease, self.now, TTL, gang="1 cpu rank, gang 3", phase="train")
        return claim

    def measure(self, claim: Claim, first: int, last: int) -> None:
        """The claim's messages numbered from `first` to `last`, four steps apart."""
        said = []
        for number in range(first, last + 1):
            step = number * 4
            loss = 6.93 * (1 - 0.45 * (1 - 0.97**step)) + self.chance.gauss(0, 0.05)
            metrics = {"train_loss": loss, "fraction": step / 120}
            if number % 6 == 0:
                metrics["val_bpb"] = loss * 0.68
            said.append(Measurement(number=number, step=step, elapsed_seconds=step * 0.09, metrics=metrics))
        with self.database.write() as session:
            leases.record(session, claim.lease, "train", said, self.now, TTL)

    def finish(self, claim: Claim, **fields: Any) -> None:
        self.measure(claim, 1, 30)
        result = result_of(claim.spec, self.chance).model_copy(update=fields)
        artifact = self.artifacts.put(self.chance.randbytes(result.model_bytes))
        result = result.model_copy(update={"artifact_sha256": artifact.sha256})
        self.end(claim, AttemptResult(Outcome.SUCCEEDED, result=result, artifact=artifact))

    def end(self, claim: Claim, ended: AttemptResult) -> None:
        self.now += timedelta(seconds=14)
        with self.database.write() as session:
            leases.finish(session, claim.lease, ended, self.now)


@pytest.fixture
def small_database(sqlite_template: Path, tmp_path: Path) -> Iterator[Database]:
    """SQLite alone: what the pages show does not depend on the database."""
    shutil.copy(sqlite_template, tmp_path / "caddie.db")
    database = Database(f"sqlite:///{tmp_path / 'caddie.db'}")
    yield database
    database.close()


@pytest.fixture
def sweep(small_database: Database, tmp_path: Path, now: datetime) -> Sweep:
    return Sweep(small_database, tmp_path / "artifacts", now)


@pytest.fixture
def url(sweep: Sweep, serve: Callable[..., str]) -> str:
    return serve(sweep.database, artifacts=sweep.artifacts.root, dashboard=False)


@pytest.fixture
def screenshots(pytestconfig: pytest.Config) -> Path:
    """Where pictures of the pages are left for a person to look at."""
    folder = Path(pytestconfig.rootpath / "build" / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Browser:
    """A headless Chromium that records what its pages ask for and complain about."""

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*FLAGS, f"--user-data-dir={profile}", "--hide-scrollbars", "--window-size=1280,900"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
        self.driver.set_page_load_timeout(60)

    def show(self, address: str, *, width: int = 1280, dark: bool = False) -> None:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.get(address)

    def until(self, script: str, *, seconds: float = 40) -> Any:
        """What the script returns, once that is true."""
        return WebDriverWait(self.driver, seconds, 0.1).until(lambda driver: driver.execute_script(f"return {script}"))

    def texts(self, selector: str) -> list[str]:
        # In one go: the page may swap its parts at any moment.
        script = "return [...document.querySelectorAll(arguments[0])].map((found) => found.textContent.trim())"
        found: list[str] = self.driver.execute_script(script, selector)
        return found

    def count(self, selector: str) -> int:
        return len(self.texts(selector))

    def picture(self, path: Path) -> None:
        taken = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
        path.write_bytes(base64.b64decode(taken["data"]))

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self._log("browser")]

    def hosts(self) -> set[str]:
        """Every host that something was asked of, other than data and blob URLs."""
        messages = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return {urlsplit(url).netloc for url in urls if urlsplit(url).scheme not in ("data", "blob", "chrome")}

    def _log(self, name: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self.driver.execute("getLog", {"type": name})["value"]
        return entries


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("no chromium and chromedriver on this machine")
    started = Browser(tmp_path / "profile")
    yield started
    started.driver.quit()


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
    assert browser.texts(".state.succeeded") == ["succeeded"]
    assert browser.until("window.notReloaded")
    browser.until("document.getElementById('link').textContent == 'ended'")
    browser.picture(screenshots / "trial.png")
    assert browser.complaints() == []
    assert browser.hosts() == {urlsplit(url).netloc}


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
