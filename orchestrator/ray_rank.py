"""One rank as a Ray actor: mailboxes that always answer, and a thread that trains. Imports neither Ray nor torch."""

import importlib
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker.mailbox import MemoryMailbox
from worker.spec import GangConfig, TrialSpec

WAIT_SECONDS = 10.0
"""How long one call waits for an attempt's end. It holds a thread, even if whoever asked is dead."""


class RayRank:
    """One rank of a warm gang. Calls return at once; jobs run one after another, in one thread, so that what a process
    group and a thread hold stays between them. A mailbox is kept until its attempt is forgotten."""

    def __init__(self, rank: int, gang: GangConfig, trainer: str) -> None:
        self._rank = rank
        self._gang = gang
        self._trainer = trainer
        self._mailboxes: dict[int, MemoryMailbox] = {}
        self._ended: dict[int, threading.Event] = {}
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._runner: Any = None  # worker.gang.Rank, which needs torch: made and used by the thread
        self._store: Any = None
        # A daemon: a process that Ray ends must not wait for training.
        threading.Thread(target=self._work, name="train", daemon=True).start()

    def serve(self) -> int:
        """The port of the gang's rendezvous, opened here, on rank 0. Waits for torch."""
        if self._store is None:
            self._store = importlib.import_module("worker.rendezvous").serve_store(self._gang.ranks)
        port: int = self._store.port
        return port

    def assign(self, attempt_id: int, spec: str, data_root: str, port: int | None) -> int:
        """Queue an attempt of a TrialSpec (as JSON); this process's id. `port` is rank 0's, None in a gang of one."""
        mailbox = self._mailboxes[attempt_id] = MemoryMailbox()
        ended = self._ended[attempt_id] = threading.Event()

        def job() -> None:
            if self._runner is None:
                self._runner = self._open(port)
            self._runner.run(TrialSpec.model_validate_json(spec), Path(data_root), mailbox)
            ended.set()

        self._jobs.put(job)
        return os.getpid()

    def read(self, attempt_id: int, after: int) -> str:
        """The attempt's Mail as JSON, with the measurements numbered above `after`; empty if it is not known here."""
        mailbox = self._mailboxes.get(attempt_id)
        return "" if mailbox is None else mailbox.read(after).model_dump_json()

    def ended(self, attempt_id: int) -> None:
        """Return once the attempt has ended or is not known here, or after WAIT_SECONDS."""
        if attempt_id in self._ended:
            self._ended[attempt_id].wait(WAIT_SECONDS)

    def stop(self, attempt_id: int) -> None:
        """Answer STOP to the attempt from now on."""
        if attempt_id in self._mailboxes:
            self._mailboxes[attempt_id].stop()

    def artifact(self, attempt_id: int) -> bytes | None:
        """The attempt's artifact, None where there is none."""
        try:
            return self._mailboxes[attempt_id].artifact()
        except KeyError:
            return None

    def forget(self, attempt_id: int) -> None:
        """Drop the attempt's mailbox, and its artifact with it."""
        self._mailboxes.pop(attempt_id, None)
        self._ended.pop(attempt_id, None)

    def _open(self, port: int | None) -> Any:
        gang = importlib.import_module("worker.gang")

        def open_store() -> Any:
            if self._rank == 0:
                return self._store
            return importlib.import_module("worker.rendezvous").join_store(port, self._gang.ranks)

        return gang.Rank(self._rank, self._gang, open_store, self._trainer)

    def _work(self) -> None:
        try:
            while True:
                self._jobs.get()()
        finally:
            os._exit(1)  # a rank that cannot even say that its job failed must not look as if it were training
