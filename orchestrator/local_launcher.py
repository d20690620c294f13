"""Gangs as plain processes of this machine: started cold for each attempt, gone after it. Needs no Ray."""

import contextlib
import itertools
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import worker
from orchestrator.ending import ending_of, lost
from orchestrator.launcher import Assignment, Ending, NoRoom, Offer, Update
from worker.mailbox import FileMailbox
from worker.spec import GangConfig

KEPT = 20
"""Attempts without a result whose logs are kept, the last ones: the evidence of why they failed."""


@dataclass
class _Gang:
    """One attempt's processes and mailboxes, by rank. `ending` is kept from the moment it is known."""

    attempt_id: int
    name: str
    shape: GangConfig
    directory: Path
    gpus: tuple[str, ...]
    processes: list[subprocess.Popen[bytes]]
    mailboxes: list[FileMailbox]
    ending: Ending | None = None


class LocalLauncher:
    """A Launcher of subprocesses, for one thread. They die with the process that made it, however that dies.

    `directory`/<attempt> holds an attempt's spec, logs and mailboxes. A release leaves nothing of an attempt that has a
    result; of the last KEPT others it leaves the spec and `rank-<n>.log`.
    """

    def __init__(
        self,
        directory: Path,
        data_root: Path,
        ranks: int,
        trainer: str = "worker.job:run",
        *,
        gpus: Sequence[str] = (),
        import_path: Sequence[Path] = (),
    ) -> None:
        """Room for `ranks` CPU ranks side by side, and a GPU rank on each of `gpus`, named as in CUDA_VISIBLE_DEVICES.

        `trainer` is `module:function`, found by the ranks on `import_path` or in this process's environment.
        """
        self._directory = directory
        self._data_root = data_root
        self._ranks = ranks
        self._trainer = trainer
        self._gpus = tuple(gpus)
        self._import_path = tuple(import_path)
        self._gangs: dict[int, _Gang] = {}
        self._names = itertools.count(1)
        self._reserved: GangConfig | None = None

    def free(self, gang: GangConfig) -> int:
        if gang.device == "gpu":
            return len(self._free_gpus()) // gang.ranks
        used = sum(held.shape.ranks for held in self._gangs.values() if held.shape.device == "cpu")
        return max(0, self._ranks - used) // gang.ranks

    def capacity(self, gang: GangConfig) -> int:
        return (len(self._gpus) if gang.device == "gpu" else self._ranks) // gang.ranks

    def offer(self, gang: GangConfig) -> Offer | None:
        if not self.free(gang) or self._reserved not in (None, gang):
            return None
        return Offer(f"local-{os.getpid()}-{next(self._names)}", behind=False)

    def reserve(self, gang: GangConfig | None) -> None:
        self._reserved = gang

    def want(self, gangs: Mapping[GangConfig, int]) -> None:
        pass  # there is this machine

    def start(self, assignment: Assignment, gang: str) -> str:
        attempt_id, shape = assignment.attempt_id, assignment.spec.gang
        if attempt_id in self._gangs:
            return self._gangs[attempt_id].name
        if self.free(shape) < 1:
            raise NoRoom(f"no room for {shape.ranks} {shape.device} ranks beside the {len(self._gangs)} gangs here")
        directory = self._directory / str(attempt_id)
        shutil.rmtree(directory, ignore_errors=True)  # another database's attempt may have had this number
        mailboxes = [FileMailbox(directory / f"rank-{rank}") for rank in range(shape.ranks)]
        (directory / "spec.json").write_text(assignment.spec.model_dump_json())
        gpus = self._free_gpus()[: shape.ranks] if shape.device == "gpu" else ()
        mailboxes[0].phase("start")
        started = self._gangs[attempt_id] = _Gang(attempt_id, gang, shape, directory, gpus, [], mailboxes)
        try:
            for rank in range(shape.ranks):
                started.processes.append(self._spawn(started, rank))
        except OSError:
            self.release(attempt_id)
            raise
        return gang

    def adopt(self, attempt_id: int, gang: str) -> bool:
        return attempt_id in self._gangs  # processes die with the launcher that started them

    def reap(self) -> int:
        return 0

    def poll(self, cursors: Mapping[int, int], logged: Mapping[int, int] | None = None) -> dict[int, Update]:
        known = logged or {}
        return {each: self._poll(each, after, known.get(each, 0)) for each, after in cursors.items()}

    def _poll(self, attempt_id: int, after: int, logged: int) -> Update:
        gang = self._gangs.get(attempt_id)
        if gang is None:
            return Update("lost", (), lost(attempt_id))
        mails = [mailbox.read(after, logged) for mailbox in gang.mailboxes]
        if gang.ending is None:
            deaths = _deaths(gang)
            for rank in deaths:
                mails[rank] = gang.mailboxes[rank].read(
                    after, logged
                )  # again, after its end: it may have closed in between
            gang.ending = ending_of(attempt_id, mails, deaths)
            if gang.ending is not None:
                _kill(gang)
        lead = mails[0]
        return Update(lead.phase, lead.measurements, gang.ending, lead.beats, lead.seconds, lead.lines)

    def wait(self, seconds: float) -> None:
        running = [gang for gang in self._gangs.values() if gang.ending is None]
        processes = [process for gang in running for process in gang.processes]
        # An end that a poll has seen is no news. One that none has seen is left for it: it then ends the rank's group.
        ends = [os.pidfd_open(process.pid) for process in processes if process.returncode is None]
        try:
            select.select(ends, [], [], seconds)
        finally:
            for end in ends:
                os.close(end)

    def stop(self, attempt_id: int) -> None:
        gang = self._gangs.get(attempt_id)
        if gang is not None:
            gang.mailboxes[0].stop()

    def artifact(self, attempt_id: int) -> bytes:
        gang = self._gangs.get(attempt_id)
        if gang is None or gang.ending is None or gang.ending.result is None:
            raise KeyError(f"attempt {attempt_id} has no result here")
        return gang.mailboxes[0].artifact()

    def release(self, attempt_id: int) -> None:
        gang = self._gangs.pop(attempt_id, None)
        if gang is None:
            return
        _kill(gang)
        if gang.ending is not None and gang.ending.result is not None:
            shutil.rmtree(gang.directory, ignore_errors=True)
            return
        for rank in range(gang.shape.ranks):
            shutil.rmtree(gang.directory / f"rank-{rank}", ignore_errors=True)
        (gang.directory / "rendezvous").unlink(missing_ok=True)
        # One with a mailbox may be the gang of another launcher.
        left = (path for path in self._directory.iterdir() if path.name.isdigit() and not (path / "rank-0").exists())
        for old in sorted(left, key=_written_at)[:-KEPT]:  # not by number: those begin anew with a database
            shutil.rmtree(old, ignore_errors=True)

    def leave(self) -> bool:
        return False

    def close(self) -> None:
        for attempt_id in list(self._gangs):
            self.release(attempt_id)

    def _free_gpus(self) -> tuple[str, ...]:
        taken = {gpu for gang in self._gangs.values() for gpu in gang.gpus}
        return tuple(gpu for gpu in self._gpus if gpu not in taken)

    def _spawn(self, gang: _Gang, rank: int) -> subprocess.Popen[bytes]:
        command = [
            *(sys.executable, "-P", "-m", "worker.gang"),
            *("--rank", str(rank)),
            *("--spec", str(gang.directory / "spec.json")),
            *("--data-root", str(self._data_root)),
            *("--mailbox", str(gang.directory / f"rank-{rank}")),
            *("--rendezvous", str(gang.directory / "rendezvous")),
            *("--trainer", self._trainer),
        ]
        roots = [str(path) for path in (*self._import_path, *source_roots())]
        inherited = os.environ.get("PYTHONPATH")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([*roots, *([inherited] if inherited else [])]),
            "CUDA_VISIBLE_DEVICES": gang.gpus[rank] if gang.gpus else "",
        }
        if gang.shape.device == "cpu":
            environment["OMP_NUM_THREADS"] = "1"  # a rank is one core: no pool of threads for all of them
        with (gang.directory / f"rank-{rank}.log").open("wb") as log:
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,  # never written to: its end tells the child that this process is gone
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # one group to kill, whatever the rank starts; and no Ctrl-C meant for us
            )


def source_roots() -> tuple[Path, ...]:
    """Where ranks find Caddie's own packages: the source tree that runs this; nothing where they are installed."""
    root = Path(worker.__file__).resolve().parents[1]
    return () if root.name in ("site-packages", "dist-packages") else (root,)


def _deaths(gang: _Gang) -> dict[int, str]:
    """What became of the ranks whose process has ended, well or not."""
    deaths = {}
    for rank, process in enumerate(gang.processes):
        if process.returncode is None and process.poll() is not None:
            _kill_group(process)
        if process.returncode is not None:
            status = process.returncode
            deaths[rank] = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
    return deaths


def _written_at(folder: Path) -> int:
    """In nanoseconds; 0 where another launcher has just removed it."""
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _kill(gang: _Gang) -> None:
    """End every process of the gang, and whatever they started. Repeatable."""
    for process in gang.processes:
        if process.returncode is None:  # not waited for yet, so its number is still its own
            _kill_group(process)
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # nothing of the group is left
        os.killpg(process.pid, signal.SIGKILL)
