"""One rank of a gang: joins its process group once, then runs jobs one after another.

`python -m worker.gang` is one rank's process of orchestrator.local_launcher: one job, spoken for in a folder.
"""

import argparse
import gc
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker.mailbox import Cause, Closing, FileMailbox, Mailbox, failed
from worker.memory import Floor
from worker.report import TrialResult
from worker.spec import GangConfig, TrialSpec
from worker.trainer import Finish, Job, Trainer, find_trainer

TRACEBACK_LINES = 20
OUT_OF_MEMORY = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")  # a RuntimeError says so in its message alone


class Rank:
    """This process as one rank of a gang. With several ranks they share one process group for as long as they live."""

    def __init__(
        self, rank: int, gang: GangConfig, open_store: Callable[[], Any], trainer: str = "worker.job:run"
    ) -> None:
        """`trainer` is `module:function`, with worker.job.run's signature.

        `open_store` gives the gang's rendezvous, a store of worker.rendezvous; where there are several ranks, the first
        job calls it, in its thread.
        """
        self._rank = rank
        self._gang = gang
        self._open_store = open_store
        self._trainer_name = trainer
        self._trainer: Trainer | None = None
        self._failed = False
        self._floor = Floor()
        self._storing: threading.Thread | None = None

    def run(self, spec: TrialSpec, data_root: Path, mailbox: Mailbox, closed: Callable[[], None] | None = None) -> bool:
        """Run one job to its end and close its mailbox; whether it and all before it went well.

        A failure of any kind is a closing, never an exception. The gang is then of no further use: other ranks may be
        waiting in a collective that this one has left. Nothing that the job held is held afterwards. Where `closed` is
        given, what needs no rank may still go on in another thread when this returns, in phase "store", and `closed` is
        called once the mailbox is closed.
        """
        defer = closed is not None and self._may_defer(spec)
        job = Job(spec=spec, data_root=data_root, rank=self._rank, ranks=self._gang.ranks, defer=defer)
        left = self._train(job, mailbox)
        if left is not None and closed is not None:
            self._storing = threading.Thread(
                target=self._store, args=(left, mailbox, closed), name="store", daemon=True
            )
            self._storing.start()
        elif closed is not None:
            closed()
        gc.collect()
        if not self._failed:  # after a CUDA error each call that touches the GPU raises another
            device_bytes = _rendezvous().release_memory() if "torch" in sys.modules else 0
            self._floor.job_ended(device_bytes, storing=self._is_storing())
        return not self._failed

    def worn(self) -> str:
        """Why this process should not start another job; empty where it may."""
        return "a job has failed on it" if self._failed else self._floor.excess

    def leave(self) -> None:
        """Leave the process group, if it was joined."""
        if "torch" in sys.modules:
            _rendezvous().leave()

    def _may_defer(self, spec: TrialSpec) -> bool:
        """Whether the next job may train while this one's artifact is compressed. On CPUs it would feel that, which
        matters where seconds are its budget, as they most likely are if they are this one's. One at a time: what is
        stored must not pile up."""
        return not self._is_storing() and (self._gang.device == "gpu" or spec.budget.seconds is None)

    def _is_storing(self) -> bool:
        return self._storing is not None and self._storing.is_alive()

    def _train(self, job: Job, mailbox: Mailbox) -> Finish | None:
        """Close the mailbox, or give what is left to do before that, which needs no rank."""
        try:
            trainer = self._join()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the attempt's ending
            self._fail(mailbox, error, "error")  # of the gang, whatever it is: another one may do better
            return None
        try:
            produced = trainer(job, mailbox)
            if callable(produced):
                mailbox.phase("store")
                return produced
            mailbox.close(*self._closing(produced))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - as above
            self._fail(mailbox, error, cause_of(error))
        return None

    def _store(self, left: Finish, mailbox: Mailbox, closed: Callable[[], None]) -> None:
        try:
            mailbox.close(*self._closing(left()))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - as above
            self._fail(mailbox, error, cause_of(error))
        closed()

    def _fail(self, mailbox: Mailbox, error: BaseException, cause: Cause) -> None:
        self._failed = True
        mailbox.close(_failed(error, cause))

    def _join(self) -> Trainer:
        """The trainer, in a process that is ready for it. Everything but the trainer's lookup happens once."""
        if self._trainer is None:
            trainer = find_trainer(self._trainer_name)
            if "torch" in sys.modules or self._gang.ranks > 1:
                _rendezvous().prepare(self._gang)
            if self._gang.ranks > 1:
                _rendezvous().join(self._rank, self._gang, self._open_store())
            gc.freeze()  # what is imported stays: without it, each collection after a job takes a tenth of a second
            self._trainer = trainer
        return self._trainer

    def _closing(self, produced: tuple[TrialResult, bytes] | None) -> tuple[Closing, bytes | None]:
        if self._rank:
            return Closing(outcome="succeeded"), None
        if produced is None:
            raise TypeError(f"{self._trainer_name} returned no result on rank 0")
        result, artifact = produced
        return Closing(outcome="stopped" if result.stopped else "succeeded", result=result), artifact


def _rendezvous() -> Any:
    """worker.rendezvous, loaded with torch only once it is needed: a trainer alone in its gang may do without torch."""
    return importlib.import_module("worker.rendezvous")


def main(arguments: list[str] | None = None) -> int:
    """Run one job from a spec file, speaking in a FileMailbox. Dies with the process that holds its standard input.

    A rank that failed stays until it is killed: its peers then wait, and have no error of their own to hide its own.
    """
    parser = argparse.ArgumentParser(prog="python -m worker.gang", description="One rank's process of a gang.")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--spec", type=Path, required=True, help="TrialSpec as JSON")
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--mailbox", type=Path, required=True, help="folder")
    parser.add_argument("--rendezvous", type=Path, required=True, help="file that the ranks meet in")
    parser.add_argument("--trainer", required=True, help="module:function")
    options = parser.parse_args(arguments)
    orphaned = _die_with_parent()
    mailbox = FileMailbox(options.mailbox)
    spec = TrialSpec.model_validate_json(options.spec.read_bytes())

    def open_store() -> Any:
        return _rendezvous().file_store(str(options.rendezvous), spec.gang.ranks)

    rank = Rank(options.rank, spec.gang, open_store, options.trainer)
    if not rank.run(spec, options.data_root, mailbox):
        orphaned.join()
    rank.leave()
    return 0


def _die_with_parent() -> threading.Thread:
    """Kill this process, and its group where it leads one, once standard input ends.

    The kernel closes the other end of the pipe however the parent died, SIGKILL included, on every POSIX system.
    """

    def watch() -> None:
        while os.read(0, 4096):
            pass
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    thread = threading.Thread(target=watch, name="parent-watch", daemon=True)
    thread.start()
    return thread


def cause_of(error: BaseException) -> Cause:
    """What kind of failure an exception of a trainer is. Torch's own are known by name: a gang may do without torch."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, MemoryError) or "OutOfMemoryError" in kinds:
        return "out_of_memory"
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY):
        return "out_of_memory"
    if isinstance(error, ArithmeticError):
        return "diverged"
    return "bad_input" if isinstance(error, ValueError) else "error"


def _failed(error: BaseException, cause: Cause) -> Closing:
    lines = traceback.format_exception(error)
    sys.stderr.writelines(lines)
    sys.stderr.flush()
    last = "".join(lines).splitlines()[-TRACEBACK_LINES:]
    return failed(error, cause, "\n".join(last))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as in worker.__main__: gloo's threads and the interpreter's teardown do not go together
