"""Mailboxes, a rank's jobs, and what becomes of an attempt by what its ranks said."""

import importlib
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

import pytest
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from orchestrator.ending import ending_of
from orchestrator.launcher import Ending
from orchestrator.lifecycle import Cause, Outcome
from orchestrator.ray_folder import RayFolder
from worker.gang import Rank, cause_of
from worker.mailbox import BEAT_SECONDS, Closing, FileMailbox, Mail, Mailbox, MemoryMailbox, failed
from worker.recipes import load_recipe
from worker.report import MAX_LINE, MAX_LINES, Directive, TrialResult
from worker.spec import GangConfig, TrialSpec, override, parse_spec

HERE = Path(__file__).parent
RESULT = TrialResult(
    val_bpb=2.0,
    val_bpb_prequant=1.9,
    val_loss=1.4,
    parameters=10,
    model_bytes=4,
    code_bytes=0,
    artifact_bytes=4,
    artifact_sha256="0" * 64,
    steps=1,
    tokens=1,
    train_seconds=0.1,
    evaluate_seconds=0.1,
    pack_seconds=0.1,
    step_seconds=0.1,
    stopped=False,
    bytes_by_class={},
    diagnostics={"gammas": {"mlp": (0.5,)}},
)
DONE, FAILED = Closing(outcome="succeeded"), Closing(outcome="failed", reason="RuntimeError: no", cause="error")
FULL = Closing(outcome="failed", reason="MemoryError", cause="out_of_memory")


@pytest.fixture(params=["memory", "file"])
def mailbox(request: pytest.FixtureRequest, tmp_path: Path) -> Mailbox:
    return MemoryMailbox() if request.param == "memory" else FileMailbox(tmp_path / "rank-0")


def spec_for(trainer: str) -> TrialSpec:
    return parse_spec(override(load_recipe("laptop"), {"data.dataset": trainer, "budget.steps": 3}))


def no_store() -> NoReturn:
    raise AssertionError("a gang of one has no rendezvous")


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Rank:
    monkeypatch.syspath_prepend(HERE)
    return Rank(0, GangConfig(), no_store, "trainers:run")


def test_measurements_are_numbered_from_one_and_read_from_a_cursor_on(mailbox: Mailbox) -> None:
    for step in (10, 20, 30):
        assert mailbox.measure(step, step / 2, {"train_loss": 1 / step}) is Directive.CONTINUE
    everything = mailbox.read(0).measurements
    assert [(said.number, said.step, said.elapsed_seconds) for said in everything] == [
        (1, 10, 5),
        (2, 20, 10),
        (3, 30, 15),
    ]
    assert mailbox.read(1).measurements == everything[1:]
    assert mailbox.read(1).measurements == everything[1:]
    assert mailbox.read(3).measurements == ()


def test_a_measurement_that_is_not_a_number_is_refused(mailbox: Mailbox) -> None:
    with pytest.raises(ValidationError):
        mailbox.measure(1, 0.1, {"train_loss": math.nan})
    assert mailbox.read(0).model_copy(update={"seconds": {}}) == Mail()


def test_log_lines_are_numbered_from_one_and_read_from_a_cursor_on(mailbox: Mailbox) -> None:
    mailbox.log("data: 3 shards")
    mailbox.measure(1, 0.1, {})
    mailbox.log("a traceback\n  has\tlines\x1b[2J")
    lines = mailbox.read(0).lines
    assert [(said.number, said.line) for said in lines] == [
        (1, "data: 3 shards"), (2, "a traceback"), (3, "  has lines\ufffd[2J")
    ]  # fmt: skip
    assert mailbox.read(0, 2).lines == lines[2:]
    assert mailbox.read(0, 3).lines == ()
    assert len(mailbox.read(0, 3).measurements) == 1


def test_a_log_is_bounded_and_says_so(mailbox: Mailbox) -> None:
    mailbox.log("x" * (MAX_LINE + 1))
    for _ in range(2):
        mailbox.log("\n".join(map(str, range(MAX_LINES))))
    lines = mailbox.read(0).lines
    assert len(lines) == MAX_LINES
    assert len(lines[0].line) == MAX_LINE
    assert lines[-1].line == "no more is kept of this log: it has 4,000 lines"


def test_a_line_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").mkdir()
    FileMailbox(tmp_path).log("the disk is full")


def test_a_stop_is_answered_to_every_later_question(mailbox: Mailbox) -> None:
    assert mailbox.directive() is Directive.CONTINUE
    mailbox.stop()
    assert mailbox.directive() is Directive.STOP
    assert mailbox.measure(1, 0.1, {}) is Directive.STOP


def test_whatever_a_rank_says_or_asks_is_a_beat(mailbox: Mailbox) -> None:
    assert mailbox.read(0).beats == 0
    mailbox.directive()
    beats = mailbox.read(0).beats
    assert beats == mailbox.read(0).beats == 1, "reading is none"


def test_asking_every_step_writes_a_beat_now_and_then(tmp_path: Path) -> None:
    seconds = 100.0
    mailbox, reader = FileMailbox(tmp_path, lambda: seconds), FileMailbox(tmp_path)
    beats = []
    for passed in (0.0, BEAT_SECONDS / 2, 1.5 * BEAT_SECONDS, 2 * BEAT_SECONDS, 3 * BEAT_SECONDS):
        seconds = 100.0 + passed
        mailbox.directive()
        beats.append(reader.read(0).beats)
    assert beats == [1, 1, 2, 2, 3]


def test_a_beat_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "beats").mkdir()
    assert FileMailbox(tmp_path).directive() is Directive.CONTINUE


def test_a_measurement_and_a_phase_are_beats(tmp_path: Path) -> None:
    seconds = iter(range(100))
    for mailbox in (MemoryMailbox(), FileMailbox(tmp_path, lambda: float(next(seconds)))):
        mailbox.measure(1, 0.1, {})
        mailbox.phase("train")
        mailbox.directive()
        assert mailbox.read(0).beats == 3


def test_a_closing_comes_with_the_artifact_and_after_everything_else(mailbox: Mailbox) -> None:
    mailbox.phase("pack")
    with pytest.raises(KeyError):
        mailbox.artifact()
    mailbox.close(Closing(outcome="succeeded", result=RESULT), b"\x00\xff\n")
    mail = mailbox.read(0)
    assert mail.phase == "pack"
    assert mail.closing is not None and mail.closing.result is not None
    assert mail.closing.result.diagnostics == {"gammas": {"mlp": [0.5]}}, "as JSON has it, however it travels"
    assert mailbox.artifact() == b"\x00\xff\n"


def test_a_result_that_cannot_be_told_closes_nothing(mailbox: Mailbox) -> None:
    result = RESULT.model_copy(update={"diagnostics": {"what": object()}})
    with pytest.raises(PydanticSerializationError):
        mailbox.close(Closing(outcome="succeeded", result=result), b"model")
    assert mailbox.read(0).model_copy(update={"seconds": {}}) == Mail()
    with pytest.raises(KeyError):
        mailbox.artifact()


def test_threads_that_measure_at_once_share_one_numbering() -> None:
    mailbox = MemoryMailbox()
    threads = [
        threading.Thread(target=lambda: [mailbox.measure(step, 0.0, {}) for step in range(200)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [said.number for said in mailbox.read(0).measurements] == list(range(1, 801))


def test_what_one_process_writes_another_reads(tmp_path: Path) -> None:
    writer, reader = FileMailbox(tmp_path), FileMailbox(tmp_path)
    writer.measure(1, 0.1, {"val_bpb": 2.5})
    assert reader.read(0).measurements[0].metrics == {"val_bpb": 2.5}
    writer.phase("evaluate")
    writer.measure(2, 0.2, {"val_bpb": 2.4})
    assert [said.step for said in reader.read(1).measurements] == [2]
    assert reader.read(1).phase == "evaluate"
    reader.stop()
    assert writer.directive() is Directive.STOP


def test_a_line_that_its_writer_did_not_finish_is_not_read(tmp_path: Path) -> None:
    writer, reader = FileMailbox(tmp_path), FileMailbox(tmp_path)
    writer.measure(1, 0.1, {})
    path = tmp_path / "measurements.jsonl"
    line = path.read_bytes().replace(b'"number":1', b'"number":2')
    with path.open("ab") as file:
        file.write(line[:9])
    assert len(reader.read(0).measurements) == 1
    with path.open("ab") as file:
        file.write(line[9:])
    assert [said.number for said in reader.read(0).measurements] == [1, 2]


def test_a_rank_runs_job_after_job_and_a_failure_is_a_closing(rank: Rank, tmp_path: Path) -> None:
    outcomes = []
    for trainer in ("count", "out-of-memory", "count"):
        mailbox = MemoryMailbox()
        well = rank.run(spec_for(trainer), tmp_path, mailbox)
        closing = mailbox.read(0).closing
        assert closing is not None
        outcomes.append((well, closing.outcome, closing.reason, len(mailbox.read(0).measurements)))
    failed = (False, "failed", "MemoryError: no 64 GiB left", 0)
    assert outcomes == [(True, "succeeded", "", 3), failed, (False, "succeeded", "", 3)]


def test_a_failure_brings_the_end_of_its_traceback(rank: Rank, tmp_path: Path) -> None:
    mailbox = MemoryMailbox()
    rank.run(spec_for("out-of-memory"), tmp_path, mailbox)
    closing = mailbox.read(0).closing
    assert closing is not None
    assert closing.cause == "out_of_memory"
    assert "in out_of_memory" in closing.traceback
    assert closing.traceback.endswith("MemoryError: no 64 GiB left")


class OutOfMemoryError(RuntimeError):
    """Named as torch's, which stands for a CUDA device's memory."""


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (MemoryError(), "out_of_memory"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "out_of_memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate"), "out_of_memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out_of_memory"),
        (FloatingPointError("the loss is nan"), "diverged"),
        (ZeroDivisionError(), "diverged"),
        (ValueError("data.dataset"), "bad_input"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), "bad_input"),
        (RuntimeError("NCCL error: unhandled system error"), "error"),
        (KeyError("model"), "error"),
        (SystemExit(3), "error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value,
)
def test_the_kind_of_an_exception_is_the_cause(error: BaseException, cause: str) -> None:
    assert cause_of(error) == cause


@pytest.mark.parametrize("trainer", ["keeps", "keeps-and-fails"])
def test_what_a_job_held_is_gone_before_the_next(rank: Rank, tmp_path: Path, trainer: str) -> None:
    rank.run(spec_for(trainer), tmp_path, MemoryMailbox())
    held = importlib.import_module("trainers").HELD
    assert held.pop()() is None


def test_a_trainer_that_does_not_exist_is_a_failure_that_may_pass(tmp_path: Path) -> None:
    mailbox = MemoryMailbox()
    assert not Rank(0, GangConfig(), no_store, "worker.job:walk").run(spec_for("count"), tmp_path, mailbox)
    closing = mailbox.read(0).closing
    assert closing is not None
    assert (closing.cause, closing.reason) == ("error", "AttributeError: module 'worker.job' has no attribute 'walk'")


@pytest.mark.parametrize(
    ("closings", "deaths", "ending"),
    [
        ([None, None], {}, None),
        ([DONE, None], {}, None),
        ([None, DONE], {}, None),
        ([DONE, DONE], {0: "exited with status 0", 1: "exited with status 0"}, Outcome.SUCCEEDED),
        ([Closing(outcome="stopped"), DONE], {}, Outcome.STOPPED),
        ([None, FAILED], {}, (Cause.ERROR, "rank 1: RuntimeError: no")),
        ([FAILED, FAILED], {}, (Cause.ERROR, "rank 0: RuntimeError: no")),
        ([FAILED, None], {1: "was killed by signal 9"}, (Cause.CRASH, "rank 1 was killed by signal 9")),
        ([None, None], {1: "exited with status 0"}, (Cause.CRASH, "rank 1 exited with status 0")),
        ([FAILED], {}, (Cause.ERROR, "RuntimeError: no")),
        ([None, FULL], {}, (Cause.OUT_OF_MEMORY, "rank 1: MemoryError")),
        ([failed(ValueError("no\ndata"), "bad_input")] * 2, {}, (Cause.BAD_INPUT, "no data")),
    ],
)
def test_an_attempt_ends_as_its_worst_rank_or_once_all_have_ended(
    closings: list[Closing | None], deaths: dict[int, str], ending: Outcome | tuple[Cause, str] | None
) -> None:
    ended = ending_of(1, [Mail(closing=closing) for closing in closings], deaths)
    if isinstance(ending, Outcome):
        assert ended is not None and ended.outcome is ending
    elif ending is None:
        assert ended is None
    else:
        assert ended == Ending(Outcome.FAILED, ending[1], cause=ending[0])


def test_a_folder_left_by_a_dead_owner_goes_when_the_next_is_made(tmp_path: Path) -> None:
    living = RayFolder(tmp_path)
    left = (
        f"from pathlib import Path; from orchestrator.ray_folder import RayFolder; RayFolder(Path({str(tmp_path)!r}))"
    )
    subprocess.run([sys.executable, "-c", left], check=True, cwd=HERE.parent)
    assert len(list(tmp_path.iterdir())) == 2
    next_one = RayFolder(tmp_path)
    assert set(tmp_path.iterdir()) == {living.path, next_one.path}
    living.remove()
    next_one.remove()
    assert not list(tmp_path.iterdir())
