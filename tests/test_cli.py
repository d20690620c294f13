"""`caddie` as a user types it: what it prints, its exit code, and one line on stderr where something is wrong."""

import io
import json
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from claims import Results
from rich.console import Console
from sqlalchemy import update
from typer.main import get_command

from api.bodies import StudyIn
from api.cli import app, main
from api.client import Caddie
from api.completion import spec_paths
from api.program import environment_of
from api.schemas import ActivityOut
from api.watch import watch_study
from orchestrator import leases, store
from orchestrator.database import Database
from orchestrator.lifecycle import Cause, Outcome, StudyState
from orchestrator.settings import KNOWN, Settings
from orchestrator.study import AttemptResult, Claim, NewStudy
from orchestrator.tables import TrialRow
from worker.__main__ import main as worker
from worker.recipes import load_recipe
from worker.spec import GangConfig, parse_spec

ROOT = Path(__file__).parents[1]
STUDY = {"name": "sweep", "recipe": "laptop", "space": {"sharing.lora.rank": {"choice": [0, 2]}}}


class Said:
    """What one command said: its exit code and both outputs."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def refusal(self, code: int) -> str:
        """The one line on stderr, after checking that there is no other word."""
        assert (self.code, self.out) == (code, ""), self.err
        (line,) = self.err.splitlines()
        assert line.startswith("caddie: ")
        return line


Run = Callable[..., Said]


@pytest.fixture
def caddie(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the console script's own entry in an environment without any setting but a home of its own."""
    for name in KNOWN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CADDIE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["caddie", *words])
        code = 0
        try:
            main()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        printed = capsys.readouterr()
        return Said(code, printed.out, printed.err)

    return run


@pytest.fixture
def sqlite(sqlite_template: Path, tmp_path: Path) -> Iterator[Database]:
    (tmp_path / "caddie.db").write_bytes(sqlite_template.read_bytes())
    database = Database(f"sqlite:///{tmp_path / 'caddie.db'}")
    yield database
    database.close()


@pytest.fixture
def url(sqlite: Database, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch, caddie: Run) -> str:
    """A served API, which `caddie` finds."""
    url = serve(sqlite, dashboard=False)
    monkeypatch.setenv("CADDIE_URL", url)
    return url


@pytest.fixture
def sweep(url: str, caddie: Run, tmp_path: Path) -> None:
    """A study, created from a file."""
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    assert caddie("study", "create", "study.yaml").out == "study sweep is running\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Without a server


def test_a_preview_says_what_a_spec_costs_without_a_server(caddie: Run) -> None:
    said = caddie("preview", "laptop", "--set", "sharing.lora.rank=8")
    assert (said.code, said.err) == (0, "")
    assert re.search(r"tying map +012012\n", said.out)
    assert re.search(r"verdict +fits", said.out)
    preview = json.loads(caddie("preview", "laptop", "--set", "sharing.lora.rank=8", "--json").out)
    prediction = preview["prediction"]
    assert prediction["model_bytes"] + prediction["code_bytes"] == prediction["artifact_bytes"]
    assert f"{prediction['model_bytes']:,} predicted" in said.out
    assert preview["spec"]["sharing"]["lora"]["rank"] == 8


def test_a_study_preview_says_what_would_be_proposed_and_refused_without_a_server(caddie: Run, tmp_path: Path) -> None:
    space = {
        "sharing.tying": {"families": ["cycle", "late_loop"]},
        "model.width": {"fill": {"low": 48, "high": 480, "step": 48}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**STUDY, "space": space, "cap_bytes": 500_000}))
    said = caddie("study", "preview", "study.yaml")
    assert (said.code, said.err) == (0, "")
    preview = json.loads(caddie("study", "preview", "study.yaml", "--json").out)
    counts = Counter(sample["verdict"] for sample in preview["samples"])
    assert len(preview["samples"]) == 20
    assert (counts[None], counts["cannot_fit"]) == (preview["invalid"], preview["cannot_fit"])
    assert counts[None] > 0  # loops that end before they start
    assert f"20 drawn; {preview['invalid'] / 20:.0%} would be refused: {preview['invalid']} invalid, 0" in said.out
    assert "sharing.tying.start: must be at most tying.end" in said.out
    for sample in preview["samples"]:
        if sample["verdict"] is not None:
            assert sample["prediction"]["artifact_bytes"] <= 500_000
            assert "".join(map(str, sample["tying_map"])) in said.out
            assert f"{sample['prediction']['parameters']:,} parameters" in said.out
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**STUDY, "space": {"sharing.lora.rang": {"low": 1}}}))
    refused = caddie("study", "preview", "study.yaml", "--samples", "1").refusal(2)
    assert "space.sharing.lora.rang.low: give either choice, or both low and high" in refused


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["huge"], "spec: is neither a file nor a recipe (bi-tied-15l, depth-recurrence"),
        (["laptop", "--size", "huge"], "size: must be one of full, tiny (got 'huge')"),
        (["list.yaml", "--size", "tiny"], "size: needs a recipe"),
        (["laptop", "--set", "seed"], "--set: must be PATH=VALUE"),
        (["laptop", "--set", "seed=[1"], "seed: is no YAML: expected ',' or ']', but got '<stream end>' in line 1"),
        (["laptop", "--set", "model.widht=64"], "model.widht: is not a known key: did you mean width? (got 64)"),
        (["laptop", "--set", "model.width=.nan"], "model.width: must be a finite number"),
        (["laptop", "--set", "model.heads=5"], "model.heads: must divide the width, 96 (got 5)"),
        (["broken.yaml"], "file: is no YAML: expected ',' or ']'"),
        (["list.yaml"], "file: must hold a mapping (got 'list.yaml')"),
        (["binary.yaml"], "data.dataset: is a bytes, which JSON cannot say"),
        (["key.yaml"], "sharing: is a key, and must be text"),
        (["itself.yaml"], "file: is nested too deeply, or in itself"),
        (["study.yaml"], "file: holds a study, which caddie study preview and caddie study create take (got 'study"),
        (["trial.yaml"], "file: holds a submission, which caddie submit --batch takes, in a list"),
    ],
)
def test_a_bad_spec_is_one_line_that_names_the_field(caddie: Run, tmp_path: Path, words: list[str], says: str) -> None:
    (tmp_path / "broken.yaml").write_text("a: [1")
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "binary.yaml").write_text("data: {dataset: !!binary aGk=}")
    (tmp_path / "key.yaml").write_text("sharing: {1: 2}")
    (tmp_path / "itself.yaml").write_text("a: &a [*a]")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    (tmp_path / "trial.yaml").write_text("{recipe: laptop, overrides: {seed: 1}}")
    assert says in caddie("preview", *words).refusal(2)


def test_a_date_in_yaml_is_the_text_that_was_typed(caddie: Run, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("data: {dataset: 2024-01-01}\nmodel: {width: 2024-01-02}\n")
    assert caddie("preview", "spec.yaml").refusal(2).endswith("(got '2024-01-02')")
    assert caddie("preview", "spec.yaml", "--set", "model.width=96", "--set", "data.dataset=2024-01-01").code == 0


@pytest.mark.parametrize("command", ["up", "api", "migrate", "doctor", "orchestrator", "demo", "data", "study list"])
def test_a_misspelt_setting_is_named_by_every_command(
    caddie: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("CADDIE_PROT", "9000")
    assert caddie(*command.split()).refusal(2).startswith("caddie: CADDIE_PROT is '9000': is not a setting")


@pytest.mark.parametrize("command", ["up", "api", "migrate", "doctor"])
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("foo", "foo"),
        ("mysql://x/y", "mysql://x/y"),
        ("mysql://me:secret@x/y", "mysql://me:***@x/y"),
        ("postgresql+nodriver://x/y", "postgresql+nodriver://x/y"),
        ("postgresql://host:port/y", "postgresql://host:port/y"),
    ],
)
def test_a_database_that_is_none_is_named_without_its_password(
    caddie: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, value: str, shown: str
) -> None:
    monkeypatch.setenv("CADDIE_DATABASE_URL", value)
    monkeypatch.setenv("CADDIE_PORT", str(free_port()))
    line = caddie(command).refusal(2)
    assert line == f"caddie: CADDIE_DATABASE_URL is {shown!r}: must start with sqlite:/// or postgresql://"
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("command", ["up", "api", "migrate", "doctor"])
def test_a_database_that_does_not_answer_is_one_line(
    caddie: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("CADDIE_DATABASE_URL", f"postgresql://127.0.0.1:{free_port()}/caddie?password=secret")
    monkeypatch.setenv("CADDIE_PORT", str(free_port()))
    line = caddie(command).refusal(1)
    assert line.startswith("caddie: the database postgresql://127.0.0.1:")
    assert "refused" in line and "secret" not in line
    assert line.endswith("(CADDIE_DATABASE_URL, or else CADDIE_HOME, says which)")


@pytest.mark.parametrize("command", ["up", "api", "migrate", "doctor", "demo"])
def test_a_home_that_cannot_be_made_is_one_line(
    caddie: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CADDIE_HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setenv("CADDIE_PORT", str(free_port()))
    said = caddie(command)
    assert (said.code, len(said.err.splitlines())) == (1, 1)
    assert str(tmp_path / "file") in said.err


@pytest.mark.parametrize("command", ["up", "api", "doctor"])
def test_what_is_refused_makes_no_home(
    caddie: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    monkeypatch.setenv("CADDIE_HOST", "0.0.0.0")
    monkeypatch.setenv("CADDIE_PORT", str(free_port()))
    caddie(command).refusal(2)
    assert not (tmp_path / "home").exists()


def test_a_file_that_is_no_database_is_named(caddie: Run, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "caddie.db").write_text("no database" * 100)
    line = caddie("migrate").refusal(1)
    assert line.startswith(f"caddie: the database sqlite:///{tmp_path}/home/caddie.db: file is not a database (")


def test_migrating_is_safe_to_repeat(caddie: Run, tmp_path: Path) -> None:
    for _ in range(2):
        said = caddie("migrate")
        assert (said.code, said.err) == (0, "")
        assert said.out == f"sqlite:///{tmp_path}/home/caddie.db is at this version's schema\n"


def test_a_server_that_does_not_answer_is_one_line(caddie: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CADDIE_URL", f"http://127.0.0.1:{free_port()}")
    line = caddie("study", "list").refusal(1)
    assert "does not answer" in line
    assert line.endswith("is `caddie up` running?")


def test_packages_of_the_users_folder_are_not_ours(tmp_path: Path, small_data_root: Path) -> None:
    for name in ("api", "orchestrator", "worker"):
        (tmp_path / name).mkdir()
        for module in ("__init__", "__main__"):
            (tmp_path / name / f"{module}.py").write_text("raise SystemExit('the wrong package')\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CADDIE_")}
    ours = environment | {"PYTHONPATH": str(ROOT), "CADDIE_DATA": str(small_data_root), "CADDIE_HOME": "home"}

    def run(*words: str, **settings: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "api.cli", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=ours | settings, capture_output=True, text=True, timeout=60, check=False
        )

    listed = run("data", "list")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert listed.stdout.startswith("topics_sp512: ")
    ended = run("orchestrator", CADDIE_DATABASE_URL="mysql://x/y")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "CADDIE_DATABASE_URL" in ended.stderr


def test_a_child_process_reads_the_settings_that_its_parent_has(tmp_path: Path) -> None:
    chosen = {
        "CADDIE_HOME": str(tmp_path), "CADDIE_DATABASE_URL": "postgresql://h/d", "CADDIE_ARTIFACTS": "/a",
        "CADDIE_DATA": "/d", "CADDIE_HOST": "0.0.0.0", "CADDIE_PORT": "9000", "CADDIE_URL": "http://caddie:1",
        "CADDIE_LAUNCHER": "local", "CADDIE_RAY_ADDRESS": "head:6379", "CADDIE_RANKS": "7",
        "CADDIE_LEASE_SECONDS": "2.5", "CADDIE_GRACE_SECONDS": "1", "CADDIE_GPU_HOUR_DOLLARS": "3",
        "CADDIE_OWNER": "me", "CADDIE_REQUESTS_PER_SECOND": "9",
    }  # fmt: skip
    secrets = {"CADDIE_TOKEN": "s" * 32, "CADDIE_ADMIN_TOKEN": "t" * 32}
    assert set(chosen) == set(KNOWN) - set(secrets)
    for given in (chosen, {"CADDIE_HOME": str(tmp_path)}):
        settings = Settings.read(given)
        assert Settings.read(environment_of(settings)) == settings
    assert not set(secrets) & set(environment_of(Settings.read(secrets)))


# Against a server


@pytest.fixture
def claim(sqlite: Database, now: datetime) -> Callable[[], Claim]:
    """Takes the first queued run, as an orchestrator does."""

    def run() -> Claim:
        with sqlite.write() as session:
            claimed = leases.claim(session, GangConfig(), "host", now, timedelta(minutes=5))
        assert claimed is not None
        return claimed

    return run


@pytest.fixture
def finish(sqlite: Database, trial_result: Results, now: datetime) -> Callable[..., None]:
    """Ends a claimed run in success; keywords replace its result's fields."""

    def run(claimed: Claim, **fields: Any) -> None:
        with sqlite.write() as session:
            leases.finish(session, claimed.lease, AttemptResult(Outcome.SUCCEEDED, result=trial_result(**fields)), now)

    return run


@pytest.fixture
def fail(sqlite: Database, now: datetime) -> Callable[..., None]:
    """Ends a claimed run for good, as bad input would."""

    def run(claimed: Claim, reason: str = "no such dataset") -> None:
        with sqlite.write() as session:
            failed = AttemptResult(Outcome.FAILED, cause=Cause.BAD_INPUT, reason=reason)
            leases.finish(session, claimed.lease, failed, now)

    return run


def test_a_study_is_created_listed_and_steered(caddie: Run, sweep: None) -> None:
    for move, state in (("pause", "paused"), ("resume", "running"), ("stop", "stopped")):
        assert caddie("study", move, "sweep").out == f"study sweep is {state}\n"
    assert "sweep" in caddie("study", "list").out
    (study,) = json.loads(caddie("study", "list", "--json").out)
    assert (study["name"], study["state"]) == ("sweep", "stopped")
    assert "cannot" in caddie("study", "resume", "sweep").refusal(2)
    assert "sweep" in caddie("study", "create", "study.yaml").refusal(2)


def test_a_list_of_studies_counts_failures_and_all_that_was_refused(
    caddie: Run, sweep: None, sqlite: Database, claim: Callable[[], Claim], fail: Callable[..., None]
) -> None:
    caddie("submit", "sweep")
    fail(claim())
    assert caddie("submit", "sweep", "--set", "model.width=3072").out.startswith("trial 1 of sweep: infeasible")
    with sqlite.write() as session:
        store.count_refused(session, store.get_study(session, "sweep").id, 2)  # points of the search
    names, row = (line.split() for line in caddie("study", "list").out.splitlines())
    listed = dict(zip(names, row, strict=False))  # two names are two words, and come after these
    assert [listed[name] for name in ("trials", "open", "complete", "failed", "refused")] == ["2", "0", "0", "1", "3"]


def test_a_study_is_changed_cloned_and_put_away(caddie: Run, sweep: None) -> None:
    words = ("--max-trials", "7", "--dollars", "25", "--priority", "3")
    changed = json.loads(caddie("study", "update", "sweep", *words, "--json").out)
    assert (changed["max_trials"], changed["priority"], changed["spending"]["limit_gpu_hours"]) == (7, 3, 10.0)
    assert "of 10" in caddie("study", "show", "sweep").out
    assert json.loads(caddie("study", "update", "sweep", "--dollars", "none", "--json").out)["spending"] is None
    assert "--dollars: must be a number, or none" in caddie("study", "update", "sweep", "--dollars", "many").refusal(2)
    assert "give --max-trials" in caddie("study", "update", "sweep").refusal(2)
    assert caddie("study", "clone", "sweep", "again", "--set", "seed=7").out == "study again is running\n"
    assert json.loads(caddie("study", "show", "again", "--json").out)["definition"]["base"]["seed"] == 7
    caddie("study", "stop", "sweep")
    assert caddie("study", "archive", "sweep").out == "study sweep is stopped, and archived\n"
    assert [line.split()[0] for line in caddie("study", "list").out.splitlines()] == ["name", "again"]
    assert [line.split()[0] for line in caddie("study", "list", "--archived").out.splitlines()] == ["name", "sweep"]
    assert caddie("study", "unarchive", "sweep").out == "study sweep is stopped\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\nrecipe: laptop\nspaces: {}", "spaces"),
        (
            "name: a\nrecipe: laptop\nspace: {sharing.lora.rank: {choice: [0, .inf]}}",
            "space.sharing.lora.rank.choice.1",
        ),
        ("name: a\nrecipe: laptop\noverrides: {data.dataset: !!timestamp 2024-01-01}", "overrides.data.dataset"),
    ],
)
def test_a_bad_study_file_is_one_line_that_names_the_field(
    caddie: Run, url: str, tmp_path: Path, text: str, says: str
) -> None:
    (tmp_path / "study.yaml").write_text(text)
    assert says in caddie("study", "create", "study.yaml").refusal(2)
    assert json.loads(caddie("study", "list", "--json").out) == []


def test_a_submission_without_a_spec_is_the_studys_base(caddie: Run, sweep: None) -> None:
    plain = json.loads(caddie("submit", "sweep", "--json").out)
    assert (plain["number"], plain["lora_rank"], plain["state"]) == (0, 4, "queued")
    changed = json.loads(caddie("submit", "sweep", "--set", "sharing.lora.rank=2", "--json").out)
    assert (changed["number"], changed["lora_rank"]) == (1, 2)
    recipe = caddie("submit", "sweep", "laptop", "--set", "sharing.lora.rank=1")
    assert recipe.out.startswith("trial 2 of sweep: queued\n  tying map 012012, LoRA rank 1, ")
    tiny = json.loads(caddie("submit", "sweep", "ebls", "--size", "tiny", "--json").out)
    assert (tiny["tying_map"], tiny["spec"]["gang"]["device"]) == ([0, 0, 0, 1, 1, 1, 2, 2, 2], "cpu")


def test_a_submission_counts_once_a_key_and_once_a_configuration(caddie: Run, sweep: None) -> None:
    for _ in range(2):
        assert json.loads(caddie("submit", "sweep", "--key", "mine", "--json").out)["number"] == 0
    assert "trial 0 (queued) has the same configuration" in caddie("submit", "sweep").refusal(2)
    assert json.loads(caddie("submit", "sweep", "--allow-duplicate", "--json").out)["number"] == 1
    assert "overrides.model.heads" in caddie("submit", "sweep", "--set", "model.heads=5").refusal(2)


def test_a_trial_is_shown_and_cancelled_once(caddie: Run, sweep: None) -> None:
    caddie("submit", "sweep")
    assert caddie("trial", "sweep", "0").out.startswith("trial 0 of sweep: queued\n")
    assert json.loads(caddie("trial", "sweep", "0", "--json").out)["state"] == "queued"
    assert caddie("cancel", "sweep", "0").out.startswith("trial 0 of sweep: cancelled\n")
    assert "trial 0" in caddie("cancel", "sweep", "0").refusal(2)


def test_what_does_not_exist_is_one_line(caddie: Run, sweep: None) -> None:
    unknown = ["submit none", "trial none 0", "cancel none 0", "leaderboard none", "watch none", "study stop none"]
    for command in unknown:
        assert caddie(*command.split()).refusal(2) == "caddie: no study 'none'"
    assert caddie("trial", "sweep", "7").refusal(2) == "caddie: no trial 7 in study sweep"


def test_the_leaderboard_is_best_first(
    caddie: Run, sweep: None, claim: Callable[[], Claim], finish: Callable[..., None]
) -> None:
    for rank, score in ((1, 2.5), (2, 2.25)):
        caddie("submit", "sweep", "--set", f"sharing.lora.rank={rank}")
        finish(claim(), val_bpb=score)
    board = json.loads(caddie("leaderboard", "sweep", "--json").out)
    assert [(row["rank"], row["number"], row["val_bpb"]) for row in board["rows"]] == [(1, 1, 2.25), (2, 0, 2.5)]
    title, names, first, second, _ = caddie("leaderboard", "sweep").out.splitlines()
    columns = ("rank", "trial", "BPB", "±", "n", "before", "bytes", "params", "tying", "map", "LoRA", "ranks", "sec")
    assert (title, tuple(names.split())) == ("Leaderboard of sweep", columns)
    same = ["–", "1", "2.4000", "120,000", "100,000", "012012"]
    assert first.split() == ["1", "1", "2.2500", *same, "2", "1", "9.0"]
    assert second.split() == ["2", "0", "2.5000", *same, "1", "1", "9.0"]


def test_seeds_are_shown_with_their_interval_and_judged_by_the_challenges_rule(
    caddie: Run, sweep: None, claim: Callable[[], Claim], finish: Callable[..., None]
) -> None:
    for seed, nats in ((1337, 4.0), (42, 4.01), (314, 4.02), (999, 4.0), (2025, 4.01), (7, 4.015)):
        shown = caddie("submit", "sweep", "--allow-duplicate", "--set", f"seed={seed}").out
        assert shown.startswith("trial 0 of sweep: ")
        finish(claim(), val_loss=nats, val_bpb=nats / 2)
    board = caddie("leaderboard", "sweep").out
    assert "2.0046  0.0042  6" in board and "Without it: trial 0 2.0055." in board
    said = caddie("verdict", "sweep", "0", "--losses", "4.1,4.11,4.12")
    assert said.code == 0
    assert said.out.startswith("trial 0 of sweep sets a record against the losses given\n")
    less = caddie("verdict", "sweep", "0", "--losses", "4.01,4.015")
    assert less.code == 1 and "missing: it is 0.0015 nats ahead" in less.out
    assert json.loads(caddie("verdict", "sweep", "0", "--losses", "4.01,4.015", "--json").out)["record"] is False
    assert "numbers with commas" in caddie("verdict", "sweep", "0", "--losses", "4.1;4.2").refusal(2)


def test_the_ledger_shows_what_a_study_has_cost(caddie: Run, sweep: None, sqlite: Database, now: datetime) -> None:
    caddie("submit", "sweep", "--set", "gang.device=gpu")
    with sqlite.write() as session:
        held = leases.claim(session, GangConfig(device="gpu"), "host", now, timedelta(minutes=5))
        assert held is not None
        leases.renew(session, held.lease, now, timedelta(minutes=5), gang="gang-1", phase="train")
    with sqlite.write() as session:
        leases.finish(session, held.lease, AttemptResult(Outcome.STOPPED), now + timedelta(hours=2))
    ledger = json.loads(caddie("ledger", "sweep", "--json").out)
    cost = {"seconds": 7200.0, "gpu_seconds": 7200.0, "dollars": 5.0}
    nothing = {"seconds": 0.0, "gpu_seconds": 0.0, "dollars": 0.0}
    assert ledger == {
        "study": "sweep", "trial": None, "gpu_hour_dollars": 2.5, "attempts": 1,
        "phases": {"queue": nothing, "train": cost}, "wasted": nothing, "void": nothing, "total": cost,
        "gangs": {"gang-1": cost}, "other_gangs": nothing, "trials": {"0": cost}, "other_trials": nothing,
        "savings": {"refused": nothing, "refused_trials": 0, "refused_unknown": 0,
                    "pruned": nothing, "pruned_trials": 1, "pruned_unknown": 1},
    }  # fmt: skip
    assert json.loads(caddie("ledger", "sweep", "0", "--json").out) == {**ledger, "trial": 0, "savings": None}
    shown = [line.split() for line in caddie("ledger", "sweep").out.splitlines()]
    assert ["phase", "seconds", "GPU-seconds", "dollars"] in shown
    for name in ("train", "total", "gang-1", "0"):
        assert [name, "7,200.0", "7,200.0", "5.00"] in shown
    assert "Ledger of trial 0 of sweep" in caddie("ledger", "sweep", "0").out
    assert "none" in caddie("ledger", "none").refusal(2)


def test_a_trial_is_found_by_what_it_is_labelled_with(caddie: Run, sweep: None) -> None:
    for rank in range(3):
        caddie("submit", "sweep", "--set", f"sharing.lora.rank={rank}")
    assert caddie("trial", "tag", "sweep", "1", "keep", "wide").out == "keep\nwide\n"
    assert caddie("trial", "tag", "sweep", "1", "--remove", "wide").out == "keep\n"
    assert caddie("trial", "tag", "sweep", "1", "two words").code == 2
    listed = json.loads(caddie("trial", "list", "sweep", "--tag", "keep", "--json").out)
    assert [trial["number"] for trial in listed] == [1]
    numbers = [
        line.split()[0] for line in caddie("trial", "list", "sweep", "--sort", "-number", "-n", "2").out.splitlines()
    ]
    assert numbers == ["trial", "2", "1"]
    assert caddie("trial", "list", "sweep", "-n", "2").err == "caddie: only the first 2; --limit 0 gives all\n"
    assert len(caddie("trial", "list", "sweep", "-n", "0").out.splitlines()) == 4
    noted = caddie("trial", "note", "sweep", "1", "looks good\n\x1b[31mso far")
    assert noted.out.startswith("note 1 by local, ") and noted.out.endswith("\n  looks good\n  \\x1b[31mso far\n")
    assert "looks good" in caddie("trial", "sweep", "1").out
    assert caddie("trial", "note", "sweep", "1", "--delete", "1", "--json").out == "[]\n"


def test_many_trials_are_submitted_together_or_not_at_all(caddie: Run, sweep: None, tmp_path: Path) -> None:
    (tmp_path / "many.yaml").write_text("- params: {sharing.lora.rank: 0}\n- {recipe: ebls, size: tiny}\n")
    made = json.loads(caddie("submit", "sweep", "--batch", "many.yaml", "--json").out)
    assert [(trial["number"], trial["lora_rank"]) for trial in made] == [(0, 0), (1, 8)]
    (tmp_path / "many.jsonl").write_text('{"overrides": {"seed": 1}}\n{"overrides": {"model.heads": 5}}\n')
    assert "trials.1.overrides.model.heads" in caddie("submit", "sweep", "--batch", "many.jsonl").refusal(2)
    (tmp_path / "one.yaml").write_text("params: {}\n")
    assert "must hold a list of trials" in caddie("submit", "sweep", "--batch", "one.yaml").refusal(2)
    assert "give no spec" in caddie("submit", "sweep", "laptop", "--batch", "many.yaml").refusal(2)
    assert len(json.loads(caddie("trial", "list", "sweep", "--json").out)) == 2


def test_a_failed_or_cancelled_trial_is_queued_again_and_a_complete_one_gets_seeds(
    caddie: Run, sweep: None, claim: Callable[[], Claim], finish: Callable[..., None]
) -> None:
    caddie("submit", "sweep")
    caddie("cancel", "sweep", "0")
    assert caddie("trial", "retry", "sweep", "0").out.startswith("trial 0 of sweep: queued\n")
    finish(claim())
    runs = json.loads(caddie("trial", "seeds", "sweep", "0", "5", "6", "--json").out)
    assert [run["seed"] for run in runs] == [5, 6]
    shown = [line.split() for line in caddie("trial", "sweep", "0").out.splitlines()]
    assert [row[1] for row in shown if "queued" in row] == ["5", "6"]
    assert caddie("cancel", "sweep", "0", "--run", str(runs[1]["id"])).code == 0
    assert "either seeds or --count" in caddie("trial", "seeds", "sweep", "0").refusal(2)


def test_events_are_read_from_an_id_on_a_line_each(caddie: Run, sweep: None) -> None:
    caddie("submit", "sweep")
    first, second = caddie("events", "sweep").out.splitlines()
    assert "study.created" in first and "trial.queued" in second
    (event,) = map(json.loads, caddie("events", "--after", "1", "--json").out.splitlines())
    assert (event["id"], event["study"], event["trial"], event["kind"]) == (2, "sweep", 0, "trial.queued")
    assert caddie("trial", "events", "sweep", "0").out == f"{second}\n"
    assert caddie("trial", "logs", "sweep", "0").out == caddie("trial", "logs", "sweep", "0", "--json").out == ""


def test_trials_are_compared_by_what_differs(caddie: Run, sweep: None) -> None:
    for rank in (1, 2):
        caddie("submit", "sweep", "--set", f"sharing.lora.rank={rank}")
    rows = [line.split() for line in caddie("compare", "sweep", "0", "1").out.splitlines()]
    assert ["sharing.lora.rank", "1", "2"] in rows
    assert not [row for row in rows if row[0] == "model.width"]
    assert {"BPB,", "95", "Seeds"} <= {row[0] for row in rows}  # the page's lines
    assert "two to five" in caddie("compare", "sweep", "0").refusal(2)


JSON_TOO = (
    "study list", "study show sweep", "study pareto sweep", "study importance sweep", "study arms sweep",
    "study activity sweep", "study stopping sweep", "study pause sweep", "trial list sweep", "trial show sweep 0",
    "trial tag sweep 0", "trial note sweep 0", "trial measurements sweep 0", "leaderboard sweep", "ledger sweep",
    "ledger sweep 0", "compare sweep 0 1", "cluster", "recipes", "me", "cancel sweep 0", "token list", "audit",
)  # fmt: skip


def test_work_takes_a_device_for_ranks_alone(caddie: Run, sweep: None) -> None:
    assert "--ranks" in caddie("work", "sweep", "--device", "gpu").refusal(2)


def test_whatever_prints_data_prints_one_json_document_too(caddie: Run, sweep: None) -> None:
    for rank in (1, 2):
        caddie("submit", "sweep", "--set", f"sharing.lora.rank={rank}")
    for words in JSON_TOO:
        said = caddie(*words.split(), "--json")
        assert (said.code, said.err) == (0, ""), words
        json.loads(said.out)


def test_a_wrong_word_is_one_line_that_says_what_would_be_right(caddie: Run, sweep: None) -> None:
    assert caddie("study", "show", "swep").refusal(2) == "caddie: no study 'swep'; did you mean sweep?"
    assert "Did you mean 'list'?" in caddie("trial", "lst", "sweep").refusal(2)
    assert "Missing argument 'number' (" in caddie("trial", "show", "sweep").refusal(2)
    assert "'number': Input should be a valid integer, unable to parse string as an integer, got 'one' (" in caddie(
        "trial", "show", "sweep", "one"
    ).refusal(2)
    assert "greater than or equal to 1, got '0' (" in caddie("preview", "laptop", "--cap-bytes", "0").refusal(2)
    assert "caddie trial STUDY NUMBER shows a trial" in caddie("trial", "sweep").refusal(2)
    assert "No such option: --jsn" in caddie("study", "list", "--jsn").refusal(2)
    assert "query.sort" in caddie("trial", "list", "sweep", "--sort", "size").refusal(2)


def test_the_shell_offers_names_numbers_recipes_and_paths(
    caddie: Run, sweep: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offered(line: str) -> list[str]:
        words = {"_CADDIE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        with monkeypatch.context() as patched:
            for name, value in words.items():
                patched.setenv(name, value)
            said = caddie()
        assert (said.code, said.err) == (0, "")
        return said.out.split()

    for rank in (1, 2):
        caddie("submit", "sweep", "--set", f"sharing.lora.rank={rank}")
    caddie("cancel", "sweep", "1")
    assert offered("caddie study sho") == ["show"]
    assert offered("caddie study show s") == ["sweep"]
    assert offered("caddie trial show sweep ") == ["0", "1"]
    assert offered("caddie cancel sweep ") == ["0"]
    assert offered("caddie preview eb") == ["ebls"]
    assert offered("caddie submit sweep --set sharing.lora.r") == ["sharing.lora.rank="]
    monkeypatch.setenv("CADDIE_URL", f"http://127.0.0.1:{free_port()}")
    assert offered("caddie study show ") == []


def test_every_path_that_the_shell_offers_is_one_of_a_spec() -> None:
    paths = spec_paths()
    assert {"seed", "model.width", "sharing.lora.rank", "sharing.tying.pattern", "gang.ranks"} <= set(paths)
    for path in paths:
        value: Any = parse_spec(load_recipe("laptop"))
        for part in path.split("."):
            assert part in type(value).model_fields, path
            value = getattr(value, part)
            if value is None:
                break


def test_a_reader_that_has_enough_is_no_error_to_speak_of(caddie: Run, url: str, sweep: None) -> None:
    script = f"{sys.executable} -m api.cli trial list sweep --json | true; echo ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (said.stdout, said.stderr) in (("1\n", ""), ("0\n", ""))


class Story(Caddie):
    """A client of the real API between whose polls the next thing happens."""

    def __init__(self, url: str, *steps: Callable[[], object]) -> None:
        super().__init__(url)
        self.steps = list(steps)

    def activity(self, study: str) -> list[ActivityOut]:
        if self.steps:
            self.steps.pop(0)()
        return super().activity(study)


def test_a_stopped_study_is_watched_until_what_runs_has_ended(
    caddie: Run, url: str, sweep: None, claim: Callable[[], Claim], finish: Callable[..., None]
) -> None:
    caddie("submit", "sweep")
    claimed = claim()
    steps = [lambda: caddie("study", "stop", "sweep"), lambda: finish(claimed)]
    with closing(Story(url, *steps)) as story:
        assert watch_study(Console(quiet=True), story, "sweep").counts == {"complete": 1}
        assert not story.steps


def test_a_study_that_proposes_is_watched_until_it_is_complete(
    caddie: Run, url: str, sweep: None, sqlite: Database, now: datetime
) -> None:
    def complete() -> None:
        with sqlite.write() as session:
            study = store.get_study(session, "sweep")
            store.move_study(session, study.id, StudyState.COMPLETE, now)

    with closing(Story(url, lambda: None, complete)) as story:
        assert watch_study(Console(quiet=True), story, "sweep").state == "complete"
        assert not story.steps


def test_a_study_without_a_space_is_watched_until_its_trials_have_ended(
    caddie: Run, url: str, tmp_path: Path, claim: Callable[[], Claim], finish: Callable[..., None]
) -> None:
    (tmp_path / "study.yaml").write_text("name: mine\nrecipe: laptop")
    caddie("study", "create", "study.yaml")
    caddie("submit", "mine")
    with closing(Story(url, lambda: None, lambda: finish(claim()))) as story:
        assert watch_study(Console(quiet=True), story, "mine").counts == {"complete": 1}
        assert not story.steps


def test_without_a_terminal_a_watch_is_a_line_a_trial_and_one_at_the_end(
    caddie: Run, url: str, tmp_path: Path, claim: Callable[[], Claim], finish: Callable[..., None]
) -> None:
    (tmp_path / "study.yaml").write_text("name: mine\nrecipe: laptop")
    caddie("study", "create", "study.yaml")
    for rank in (1, 2):
        caddie("submit", "mine", "--set", f"sharing.lora.rank={rank}")
    out = io.StringIO()
    with closing(Story(url, lambda: finish(claim(), val_bpb=2.25), lambda: caddie("cancel", "mine", "1"))) as story:
        watch_study(Console(file=out), story, "mine")
    first, second, last = out.getvalue().splitlines()
    assert first == "trial   0  complete   012012 LoRA 1 ranks 1    2.2500 BPB, 120,000 bytes"
    assert second.startswith("trial   1  cancelled  012012 LoRA 2 ranks 1")
    assert last == "study mine is running: 2 trials, the best trial 0 with 2.2500 BPB"


def test_a_watch_of_which_nothing_came_says_why_and_exits_1(
    caddie: Run, url: str, sqlite: Database, tmp_path: Path, now: datetime,
    claim: Callable[[], Claim], fail: Callable[..., None], finish: Callable[..., None],
) -> None:  # fmt: skip
    (tmp_path / "study.yaml").write_text("name: mine\nrecipe: laptop")
    caddie("study", "create", "study.yaml")
    for rank, reason in ((1, "no\ndataset"), (2, "no\ndataset"), (3, "diverged")):
        caddie("submit", "mine", "--set", f"sharing.lora.rank={rank}")
        fail(claim(), reason)
    said = caddie("watch", "mine")
    assert (said.code, said.err) == (1, "")
    assert said.out.splitlines()[-2:] == [
        "study mine is running: 3 trials", "3 of 3 trials failed, most often: no dataset"
    ]  # fmt: skip
    caddie("trial", "retry", "mine", "0")
    finish(claim())
    assert caddie("watch", "mine").code == 0

    caddie("trial", "retry", "mine", "1")  # it stays queued in a study that waits for somebody
    with sqlite.write() as session:
        mine = store.get_study(session, "mine")
        store.move_study(session, mine.id, StudyState.PAUSED, now, "no dataset")
    said = caddie("watch", "mine")
    assert said.code == 1
    assert "study mine is paused (no dataset): 2 trials, the best trial 0 with 2.5000 BPB\n" in said.out
    assert caddie("submit", "mine", "--wait").code == 1


def test_a_watch_shows_every_ending_once_in_whatever_order_they_are_seen(
    caddie: Run, url: str, sqlite: Database, tmp_path: Path, now: datetime
) -> None:
    (tmp_path / "study.yaml").write_text("name: mine\nrecipe: laptop")
    caddie("study", "create", "study.yaml")
    for rank in (1, 2):
        caddie("submit", "mine", "--set", f"sharing.lora.rank={rank}")

    def end_the_first_before_the_second() -> None:
        caddie("cancel", "mine", "0")
        with sqlite.write() as session:
            session.execute(update(TrialRow).where(TrialRow.number == 0).values(finished_at=now - timedelta(hours=1)))

    again = [lambda: caddie("cancel", "mine", "1"), lambda: caddie("trial", "retry", "mine", "1")] * 2
    out = io.StringIO()
    with closing(Story(url, *again[:3], end_the_first_before_the_second)) as story:
        watch_study(Console(file=out), story, "mine")
    assert [line.split()[1] for line in out.getvalue().splitlines()[:-1]] == ["1", "1", "0"]


# README.md


def readme_studies() -> list[str]:
    """The README's YAML: a study file, and what may stand in its place or beside it."""
    return re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readmes_studies_are_studies() -> None:
    first, *more = (yaml.safe_load(block) for block in readme_studies())
    assert len(more) == 2
    for changes in ({}, *more):
        deeper = {"recipe": "naive-baseline", "gangs": [{"ranks": 8, "device": "gpu"}]} if "space" in changes else {}
        study = StudyIn.model_validate({**first, **deeper, **changes}).definition()
        assert isinstance(study, NewStudy)
        assert study.space


def test_the_readmes_commands_exist_and_take_those_options(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text()
    commands: Any = get_command(app)
    lines = [line.partition("#")[0].split() for line in re.findall(r"^caddie (.*)", text, re.MULTILINE)]
    lines += [words.split() for words in re.findall(r"`caddie ([^`]*)`", text)]
    assert len(lines) > 8
    for words in lines:
        command = commands.commands[words[0]]
        if hasattr(command, "commands"):
            command = command.commands[words[1]]
        options = {option for parameter in command.params for option in parameter.opts}
        if words[0] == "data":  # whose words are the worker's
            with pytest.raises(SystemExit):
                worker([*words[:2], "--help"])
            options = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        assert {word.strip("[]") for word in words if word.strip("[").startswith("--")} <= options, words


def test_the_readmes_submission_is_one_for_its_study(caddie: Run, url: str, tmp_path: Path) -> None:
    text, block = (ROOT / "README.md").read_text(), readme_studies()[0]
    (line,) = re.findall(r"^caddie (submit .*--set.*)", text, re.MULTILINE)
    (tmp_path / "study.yaml").write_text(block)
    assert caddie("study", "create", "study.yaml").code == 0
    said = caddie(*line.partition("#")[0].split())
    assert said.out.startswith("trial 0 of my-study: queued\n"), said.err
