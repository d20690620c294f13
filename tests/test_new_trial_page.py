"""The page that makes a trial: with a script in a real browser, and without one."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from browser import Browser
from hypothesis import given
from hypothesis import strategies as st
from selenium.webdriver.common.keys import Keys
from sweep import INFEASIBLE, QUEUED, Sweep

from api.fields import all_fields, overrides_of, placed, texts_of
from orchestrator import store
from orchestrator.access import Role
from orchestrator.tokens import create_token
from worker.recipes import load_recipe, recipe_names
from worker.spec import InvalidSpec, Problem, TrialSpec, override, parse_spec

NEXT = INFEASIBLE + 1
TINY = parse_spec(load_recipe("ebls", "tiny"))


def typed(browser: Browser, path: str, text: str) -> None:
    field = browser.driver.find_element("id", path)
    browser.driver.execute_script("const part = arguments[0].closest('details'); if (part) part.open = true", field)
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(text)


@pytest.mark.browser
def test_a_new_trial_is_shown_as_one_types_and_submitted_once(
    browser: Browser, sweep: Sweep, url: str, screenshots: Path
) -> None:
    browser.show(f"{url}/studies/demo/new")
    browser.until("document.getElementById('verdict').textContent == 'fits'")
    assert browser.count("#preview svg.tying rect[fill]") == 6
    assert "trial 0" in browser.texts("#preview .twin")[0]
    typed(browser, "sharing.virtual_layers", "8")
    browser.until("document.querySelectorAll('#preview svg.tying rect[fill]').length == 8")
    assert browser.texts("#preview .changes code") == ["sharing.virtual_layers"]
    assert browser.texts("[data-section=sharing] [data-changed-count]") == ["1 changed"]
    typed(browser, "sharing.unique_blocks", "9")
    browser.until("document.getElementById('verdict').textContent == 'not valid'")
    wrong = "document.getElementById('error:sharing.unique_blocks').textContent"
    assert browser.until(wrong) == "must be at most virtual_layers, 8"
    assert browser.driver.switch_to.active_element.get_attribute("id") == "sharing.unique_blocks"
    typed(browser, "sharing.unique_blocks", "4")
    browser.until("document.getElementById('verdict').textContent == 'fits'")
    assert browser.driver.execute_script(f"return {wrong}") == ""
    typed(browser, "find", "class sigmas")
    shown = "[...document.querySelectorAll('.field')].filter((field) => field.offsetParent).length"
    browser.until(f"{shown} == 5", seconds=5)
    typed(browser, "find", Keys.DELETE)
    browser.picture(screenshots / "new-trial.png")
    browser.driver.find_element("id", "sharing.virtual_layers").send_keys(Keys.ENTER)  # which starts nothing
    assert browser.driver.current_url.endswith("/new")
    browser.driver.find_element("css selector", "button.primary").send_keys(Keys.ENTER)
    browser.until(f"location.pathname == '/studies/demo/trials/{NEXT}'")
    with sweep.database.read() as session:
        made = store.get_trial(session, sweep.study.id, NEXT)
    assert made.spec.sharing.tying_map == (0, 1, 2, 3, 0, 1, 2, 3)
    assert made.origin == "submitted"
    assert browser.complaints() == []
    assert browser.hosts() == {urlsplit(url).netloc}


@pytest.mark.browser
def test_the_form_fits_a_phone_and_the_dark(browser: Browser, url: str, screenshots: Path) -> None:
    browser.show(f"{url}/studies/demo/new?start=late-loop-3-5/tiny", width=375, dark=True)
    browser.driver.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert browser.until("document.documentElement.scrollWidth") == 375
    button = browser.until("document.querySelector('button.primary').getBoundingClientRect().toJSON()")
    assert button["bottom"] <= 900  # always within reach
    browser.picture(screenshots / "new-trial-phone-dark.png")
    assert browser.complaints() == []


def post(url: str, path: str = "/studies/demo/new", **fields: str) -> httpx.Response:
    return httpx.post(f"{url}{path}", data={"csrf": "", **{k.replace("__", "."): v for k, v in fields.items()}})


def test_without_a_script_the_form_submits_and_says_at_each_field_what_is_wrong(sweep: Sweep, url: str) -> None:
    wrong = post(url, model__width="many", sharing__lora__rank="-1")
    assert wrong.status_code == 422
    for path in ("model.width", "sharing.lora.rank"):
        assert re.search(rf'id="error:{path}">[^<]*Input should be', wrong.text)
    assert 'name="model.width" value="many"' in wrong.text
    shown = post(url, model__width="112", preview="true")
    assert shown.status_code == 200
    assert "<code>model.width</code></a></dt><dd><s>96</s> 112" in shown.text
    key = re.findall(r'name="key" value="(\S+)"', shown.text)[0]
    for _ in range(2):
        made = post(url, model__width="112", key=key)
        assert (made.status_code, made.headers["location"]) == (303, f"/studies/demo/trials/{NEXT}")
    again = post(url, model__width="112")
    assert again.status_code == 409
    assert f'<a href="/studies/demo/trials/{NEXT}">Look at it</a>' in again.text
    assert post(url, model__width="112", allow_duplicate="true").headers["location"].endswith(f"/{NEXT + 1}")
    with sweep.database.read() as session:
        assert store.get_trial(session, sweep.study.id, NEXT).spec.model.width == 112


def test_a_form_starts_from_the_base_a_recipe_or_a_trial(url: str) -> None:
    with httpx.Client(base_url=f"{url}/studies/demo", headers={"Accept": "text/html"}) as http:
        for start, rank in (("base", "4"), ("trial/2", "8"), ("ebls/full", "8"), ("naive-baseline/tiny", "0")):
            shown = http.get("/new", params={"start": start})
            assert shown.status_code == 200
            assert f'name="sharing.lora.rank" value="{rank}"' in shown.text
        for start in ("trial/99", "nothing/full", "trial/99999999999999"):
            assert http.get("/new", params={"start": start}).status_code in (404, 422)
        assert http.get("/new", params={"start": "../../etc/passwd"}).status_code == 422
        assert http.post("/new", json={}).status_code == 415
        assert http.post("/new", data={f"f{n}": "" for n in range(501)}).status_code == 400


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_what_is_shown_and_not_changed_overrides_nothing(size: str) -> None:
    for name in recipe_names():
        spec = parse_spec(load_recipe(name, size))
        assert overrides_of(spec, texts_of(spec)) == {}


def test_a_part_can_be_added_changed_and_left_out() -> None:
    added = overrides_of(TINY, {"evaluation.ttt": "true", "evaluation.ttt.lr": "0.01", "evaluation.ttt.epochs": "1"})
    assert added == {"evaluation.ttt": {}, "evaluation.ttt.lr": 0.01}
    spec = parse_spec(override(TINY.model_dump(mode="json"), added))
    assert overrides_of(spec, texts_of(spec) | {"evaluation.ttt.lr": "0.02"}) == {"evaluation.ttt.lr": 0.02}
    without = overrides_of(spec, texts_of(spec) | {"evaluation.ttt": "false", "evaluation.ttt.lr": "0.02"})
    assert without == {"evaluation.ttt": None}
    assert parse_spec(override(spec.model_dump(mode="json"), without)) == TINY


def test_every_field_of_a_spec_is_in_the_form() -> None:
    paths = {field.path for field in all_fields()}
    plain: dict[str, Any] = TrialSpec().model_dump(mode="json")
    for path in leaves(plain):
        assert path in paths or path == "schema_version"


def leaves(plain: dict[str, Any], path: str = "") -> list[str]:
    found = []
    for name, value in plain.items():
        found += leaves(value, f"{path}{name}.") if isinstance(value, dict) else [f"{path}{name}"]
    return found


@given(st.dictionaries(st.sampled_from([field.path for field in all_fields()]), st.text(max_size=12), max_size=5))
def test_whatever_is_typed_makes_a_spec_or_a_problem_at_a_field(texts: dict[str, str]) -> None:
    problems: tuple[Problem, ...] = ()
    try:
        parse_spec(override(TINY.model_dump(mode="json"), overrides_of(TINY, texts)))
    except InvalidSpec as error:
        problems = error.problems
    assert sum(len(each) for each in placed(problems).values()) == len(problems)


def test_every_form_carries_the_token_without_which_a_signed_in_reader_writes_nothing(sweep: Sweep, url: str) -> None:
    with sweep.database.write() as session:
        secret = create_token(session, "ann", Role.SUBMITTER, datetime.now(UTC))[1]
    with httpx.Client(base_url=url, headers={"Accept": "text/html"}, follow_redirects=True) as http:
        assert http.post("/sign-in", data={"token": secret}).status_code == 200
        for path in ("/studies/demo/new", "/studies/demo/trials/2", f"/studies/demo/trials/{QUEUED}"):
            shown = http.get(path).text
            fields = re.findall(r'name="csrf" value="(\w+)"', shown)
            assert len(fields) == shown.count('method="post"') > 0
        meta = {"X-CSRF-Token": re.findall(r'<meta name="csrf" content="(\w+)"', shown)[0]}
        asked = {"model.width": "112"}
        for action in ("new/preview", "new", "trials/2/notes"):
            assert http.post(f"/studies/demo/{action}", data=asked).status_code == 403
        assert http.post("/studies/demo/new/preview", data=asked, headers=meta).status_code == 200
        made = http.post("/studies/demo/new", data={**asked, "csrf": fields[0]})
        assert made.url.path == f"/studies/demo/trials/{NEXT}"
        assert "Authorization: Bearer $CADDIE_TOKEN" in made.text
