"""One rank as a Ray actor: mailboxes that always answer, and a thread that trains. Imports neither Ray nor torch."""

import importlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker.mailbox import Closing, MemoryMailbox, failed
from worker.source import code_digest
from worker.spec import GangConfig, TrialSpec
from worker.trainer import Job, find_check

WAIT_SECONDS = 10.0
"""How long one call waits for an attempt's end. It holds a thread, even if whoever asked is dead."""
WATCH_SECONDS = 1.0


class RayRank:
    """One rank of a warm gang. Calls return at once; jobs run one after another, in one thread, so that what a process
    group and a thread hold stays between them. A mailbox is kept until its attempt is forgotten.

    Rank 0 takes jobs in the order in which it gets them, and the other ranks follow it. A detached gang that nobody has
    asked anything for some seconds belongs to nobody, and removes itself: `orphan` is how many, and how.
    """

    def __init__(
        self, rank: int, gang: GangConfig, trainer: str, orphan: tuple[float, Callable[[], None]] | None = None
    ) -> None:
        self._rank, self._gang, self._trainer = rank, gang, trainer
        self._mailboxes: dict[int, MemoryMailbox] = {}
        self._ended: dict[int, threading.Event] = {}
        self._jobs: dict[int, Callable[[], None]] = {}
        """What waits, in order."""
        self._news = threading.Condition()
        self._busy = False
        self._at: int | None = None
        self._code = code_digest()
        self._runner: Any = None  # worker.gang.Rank, which needs torch: made and used by the thread
        self._store: Any = None
        self._orders: Any = None
        self._port: int | None = None
        self._heard_at = time.monotonic()
        # Daemons: a process that Ray ends must not wait for training.
        threading.Thread(target=self._work, name="train", daemon=True).start()
        if orphan is not None:
            threading.Thread(target=self._watch, args=orphan, name="watch", daemon=True).start()

    def serve(self) -> int:
        """The port of the gang's rendezvous, opened here, on rank 0. Waits for torch."""
        if self._store is None:
            self._store = importlib.import_module("worker.rendezvous").serve_store(self._gang.ranks)
        port: int = self._store.port
        return port

    def assign(self, attempt_id: int, spec: str, data_root: str, port: int | None) -> int:
        """Queue an attempt of a TrialSpec (as JSON); this process's id. `port` is rank 0's, None in a gang of one."""
        self._heard_at = time.monotonic()
        parsed = TrialSpec.model_validate_json(spec)
        with self._news:
            waits = self._busy or bool(self._jobs)
            mailbox = self._mailboxes[attempt_id] = MemoryMailbox("queue" if waits else "start")
            ended = self._ended[attempt_id] = threading.Event()

            def job() -> None:
                if self._runner is None:
                    self._runner = self._open(port)
                self._runner.run(parsed, Path(data_root), mailbox, ended.set)

            self._jobs[attempt_id] = job
            self._port = port
            self._news.notify_all()
        return os.getpid()

    def check(self, attempt_id: int, spec: str, data_root: str, accepted: object) -> None:
        """Look at the data of an attempt that waits: where it is wrong, its mailbox closes at once. For rank 0.

        `accepted` is what `assign` returned: calls may overtake each other, and Ray makes none before its arguments are
        there.
        """
        check, mailbox = find_check(self._trainer), self._mailboxes.get(attempt_id)
        if check is None or mailbox is None:
            return
        job = Job(spec=TrialSpec.model_validate_json(spec), data_root=Path(data_root), ranks=self._gang.ranks)
        try:
            check(job)
        except ValueError as error:  # anything else may be well when its turn comes
            mailbox.close(failed(error, "bad_input"))
            self._ended[attempt_id].set()

    def about(self) -> tuple[int | None, str]:
        """The attempt that this rank is at, and the digest of the code that it runs."""
        return self._at, self._code

    def read(self, attempt_id: int, after: int, logged: int = 0) -> str:
        """The attempt's Mail as JSON, with what is numbered above these; empty if it is not known here."""
        self._heard_at = time.monotonic()
        mailbox = self._mailboxes.get(attempt_id)
        return "" if mailbox is None else mailbox.read(after, logged).model_dump_json()

    def ended(self, attempt_id: int) -> None:
        """Return once the attempt has ended or is not known here, or after WAIT_SECONDS."""
        if attempt_id in self._ended:
            self._ended[attempt_id].wait(WAIT_SECONDS)

    def stop(self, attempt_id: int) -> None:
        """Answer STOP to the attempt from now on."""
        if attempt_id in self._mailboxes:
            self._mailboxes[attempt_id].stop()

    def withdraw(self, attempt_id: int, accepted: object = None) -> bool:
        """Drop an attempt that waits; whether it had not begun. For rank 0, which the others follow.

        `accepted` is as in `check`, where the caller has it.
        """
        with self._news:
            return self._jobs.pop(attempt_id, None) is not None

    def artifact(self, attempt_id: int) -> bytes | None:
        """The attempt's artifact, None where there is none."""
        try:
            return self._mailboxes[attempt_id].artifact()
        except KeyError:
            return None

    def forget(self, attempt_id: int, accepted: object = None) -> None:
        """Drop the attempt's mailbox, and its artifact with it. `accepted` is as in `check`."""
        with self._news:
            self._jobs.pop(attempt_id, None)
        self._mailboxes.pop(attempt_id, None)
        self._ended.pop(attempt_id, None)

    def ping(self) -> None:
        """Somebody still wants this gang."""
        self._heard_at = time.monotonic()

    def unasked_seconds(self) -> float:
        """For how long nobody has asked this gang anything. This question does not count."""
        return time.monotonic() - self._heard_at

    def _open(self, port: int | None) -> Any:
        gang = importlib.import_module("worker.gang")
        return gang.Rank(self._rank, self._gang, lambda: self._meet(port), self._trainer)

    def _meet(self, port: int | None) -> Any:
        """The gang's rendezvous, which rank 0 serves."""
        if self._store is None:
            self._store = importlib.import_module("worker.rendezvous").join_store(port, self._gang.ranks)
        return self._store

    def _work(self) -> None:
        try:
            free_at: float | None = None
            for number in range(1, 2**62):
                self._at = None
                attempt_id, job = self._next(number)
                self._at = attempt_id
                began_at = time.monotonic()
                if attempt_id in self._mailboxes:
                    self._mailboxes[attempt_id].begin(0.0 if free_at is None else began_at - free_at)
                if self._runner is not None and (why := self._runner.worn()):
                    self._decline(attempt_id, why)
                else:
                    job()
                free_at = time.monotonic()
        finally:
            os._exit(1)  # a rank that cannot even say that its job failed must not look as if it were training

    def _next(self, number: int) -> tuple[int, Callable[[], None]]:
        """The gang's next job, which rank 0 chooses. Waits for it."""
        with self._news:
            self._busy = False
            self._news.wait_for(lambda: self._jobs)
            self._busy = True
            if self._rank == 0:
                attempt_id = next(iter(self._jobs))
                job = self._jobs.pop(attempt_id)
            port = self._port
        if self._gang.ranks == 1:
            return attempt_id, job
        rendezvous = importlib.import_module("worker.rendezvous")
        if self._rank == 0:
            rendezvous.tell(self._meet(port), number, attempt_id)
            return attempt_id, job
        if self._orders is None:
            self._orders = rendezvous.follow_store(port, self._gang.ranks)
        attempt_id = rendezvous.hear(self._orders, number)
        with self._news:
            self._news.wait_for(lambda: attempt_id in self._jobs)
            return attempt_id, self._jobs.pop(attempt_id)

    def _decline(self, attempt_id: int, why: str) -> None:
        self._mailboxes[attempt_id].close(Closing(outcome="declined", reason=why))
        self._ended[attempt_id].set()

    def _watch(self, seconds: float, remove: Callable[[], None]) -> None:
        while time.monotonic() - self._heard_at < seconds:
            time.sleep(WATCH_SECONDS)
        try:
            remove()  # any of them: others may be gone
        finally:
            os._exit(1)
