"""Trainers for the launchers' tests, chosen by the spec's dataset name: some train nothing well, some end badly."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

from worker.report import Directive, Reporter, TrialResult
from worker.trainer import Finish, Job, Trainer, find_trainer

Produced = tuple[TrialResult, bytes] | None


def run(job: Job, reporter: Reporter) -> Produced | Finish:
    """Leave this process's id in the data root, then do as the dataset's name says."""
    process_file(job.data_root, job.spec.seed, job.rank).write_text(str(os.getpid()))
    return TRAINERS[job.spec.data.dataset](job, reporter)


def process_file(data_root: Path, seed: int, rank: int) -> Path:
    return data_root / f"{seed}-{rank}.pid"


def count(job: Job, reporter: Reporter) -> Produced:
    """One measurement a step, whose `total` is what the ranks added up together."""
    assert job.spec.budget.steps is not None
    if job.rank == 0:
        reporter.phase("train")
        reporter.log(f"counts to {job.spec.budget.steps}")
    for step in range(1, job.spec.budget.steps + 1):
        metrics = {"total": float(step)}
        if job.ranks > 1:
            metrics = {"total": added_up(step * (job.rank + 1)), "threads": threads()}
        if job.rank == 0:
            reporter.measure(step, step / 10, metrics)
    return produced(job, stopped=False)


def added_up(value: float) -> float:
    """The ranks' values together. Torch is loaded where ranks meet, and not by those who are alone."""
    import torch
    import torch.distributed as dist

    total = torch.tensor(value)
    dist.all_reduce(total)
    return float(total)


def threads() -> float:
    import torch

    return float(torch.get_num_threads())


def until_stopped(job: Job, reporter: Reporter) -> Produced:
    """Step until told to stop; rank 0 alone is told, and tells the others."""
    step, told = 0, False
    while not told:
        step += 1
        if job.rank == 0:
            directive = reporter.measure(step, step / 10, {"loss": 1 / step}) if step == 1 else reporter.directive()
            told = directive is Directive.STOP
        if job.ranks > 1:
            told = added_up(told) > 0
    return produced(job, stopped=True)


def evaluates(job: Job, reporter: Reporter) -> Produced:
    """Trained, and being scored until told to stop."""
    if job.rank == 0:
        reporter.phase("evaluate")
    return until_stopped(job, reporter)


def fails_when_stopped(job: Job, reporter: Reporter) -> Produced:
    until_stopped(job, reporter)
    raise FloatingPointError("the loss is nan")


def check(job: Job) -> None:
    """What launchers ask of a job that has to wait."""
    if job.spec.data.dataset == "unknown-data":
        raise ValueError("there is no unknown-data")


def hang(job: Job, reporter: Reporter) -> Produced:
    """Start a child of its own, measure once all ranks are there, then wait for ever."""
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    if job.ranks > 1:
        added_up(1)
    if job.rank == 0:
        reporter.measure(1, 0.1, {"child": float(child.pid)})
    threading.Event().wait()
    return None


def killed(job: Job, reporter: Reporter) -> Produced:
    """The last rank is killed while the others wait for it."""
    if job.rank == job.ranks - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if job.ranks > 1:
        added_up(1)
    return None


def diverged(job: Job, reporter: Reporter) -> Produced:
    """The last rank fails, after a measurement, while the others wait for it."""
    if job.rank == 0:
        reporter.measure(1, 0.1, {"loss": 1.0})
    if job.rank == job.ranks - 1:
        raise FloatingPointError("the loss is nan\nat step 1")
    if job.ranks > 1:
        added_up(1)
    return None


def out_of_memory(job: Job, reporter: Reporter) -> Produced:
    raise MemoryError("no 64 GiB left")


def bad_data(job: Job, reporter: Reporter) -> Produced:
    """Until somebody mends it."""
    if (job.data_root / "mended").exists():
        return produced(job, stopped=False)
    raise ValueError(f"data.dataset is {job.spec.data.dataset!r}")


def exits(job: Job, reporter: Reporter) -> Produced:
    sys.exit("tired")


def vanishes(job: Job, reporter: Reporter) -> Produced:
    os._exit(7)


class Held:
    """Something in a reference cycle, as a model is."""

    def __init__(self) -> None:
        self.itself = self


HELD: list["weakref.ref[Held]"] = []


def keeps(job: Job, reporter: Reporter) -> Produced:
    held = Held()
    HELD.append(weakref.ref(held))
    return produced(job, stopped=False)


def keeps_and_fails(job: Job, reporter: Reporter) -> Produced:
    held = Held()
    HELD.append(weakref.ref(held))
    raise RuntimeError(f"the traceback holds the frame that holds {type(held).__name__}")


HOARD: list[bytes] = []


def hoards(job: Job, reporter: Reporter) -> Produced:
    """Leaves 300 MiB behind."""
    HOARD.append(b"\x01" * 300 * 2**20)
    return produced(job, stopped=False)


def scatters(job: Job, reporter: Reporter) -> Produced:
    """Leaves one last piece of 400 MiB behind, above which malloc has nothing and below which it keeps everything."""
    HOARD.append([b"\x01" * 2**16 for _ in range(6400)][-1])
    return produced(job, stopped=False)


STORED = threading.Event()


def stores(job: Job, reporter: Reporter) -> Produced | Finish:
    """Leaves 300 MiB to whoever stores them, which takes until STORED is set."""
    held = b"\x01" * 300 * 2**20

    def finish() -> tuple[TrialResult, bytes]:
        assert STORED.wait(100) and held
        made = produced(job, stopped=False)
        assert made is not None
        return made

    return finish if job.defer else finish()


def compiles(job: Job, reporter: Reporter) -> Produced:
    """A model of a shape of its own, compiled whole, as a GPU's are."""
    import torch

    width = job.spec.seed
    torch.compile(torch.nn.Linear(width, 1), fullgraph=True, dynamic=False, backend="eager")(torch.ones(1, width))
    return produced(job, stopped=False)


def paced(job: Job, reporter: Reporter) -> Produced:
    """A tenth of its budget after the other, each once the data root has a file of its number.

    BPB falls from 1 above what the learning rate gives in the end straight down to that.
    """
    final, told = job.spec.optimizer.matrix_lr * 10, False
    for tenth in range(1, 11):
        while not (job.data_root / str(tenth)).exists() and not told:
            told = reporter.directive() is Directive.STOP
            threading.Event().wait(0.01)
        if told:
            return produced(job, stopped=True, val_bpb=final + 1 - (tenth - 1) / 10)
        metrics = {"fraction": tenth / 10, "val_bpb": final + 1 - tenth / 10}
        told = reporter.measure(tenth, tenth / 10, metrics) is Directive.STOP
    return produced(job, stopped=False, val_bpb=final)


def nap(job: Job, reporter: Reporter) -> Produced:
    """What a trial of 50 ms takes: for benchmarks/slots.py."""
    reporter.phase("train")
    threading.Event().wait(0.05)
    return produced(job, stopped=False)


def nap_1s(job: Job, reporter: Reporter) -> Produced:
    """What a trial of 1 s takes: for benchmarks/slots.py."""
    reporter.phase("train")
    threading.Event().wait(1.0)
    return produced(job, stopped=False)


def scores(job: Job, reporter: Reporter) -> Produced:
    """A model as good as its learning rate is small, give or take 0.001 BPB by its seed."""
    made = produced(job, stopped=False)
    assert made is not None
    luck = hashlib.sha256(str(job.spec.seed).encode()).digest()[0] / 255 - 0.5
    bpb = 2 + job.spec.optimizer.matrix_lr + 0.002 * luck
    return made[0].model_copy(update={"val_bpb": bpb, "val_loss": bpb * 1.7}), made[1]


def silent(job: Job, reporter: Reporter) -> Produced:
    return None


def unspeakable(job: Job, reporter: Reporter) -> Produced:
    """A result that JSON cannot hold."""
    made = produced(job, stopped=False)
    assert made is not None
    return made[0].model_copy(update={"diagnostics": {"what": object()}}), made[1]


def produced(job: Job, *, stopped: bool, val_bpb: float = 2.0) -> Produced:
    if job.rank:
        return None
    artifact = hashlib.sha256(str(job.spec.seed).encode()).digest() * 1000
    result = TrialResult(
        val_bpb=val_bpb,
        val_bpb_prequant=1.9,
        val_loss=1.4,
        parameters=10,
        model_bytes=len(artifact),
        code_bytes=0,
        artifact_bytes=len(artifact),
        artifact_sha256=hashlib.sha256(artifact).hexdigest(),
        steps=1,
        tokens=1,
        train_seconds=0.1,
        evaluate_seconds=0.1,
        pack_seconds=0.1,
        step_seconds=0.1,
        stopped=stopped,
        bytes_by_class={"mlp": len(artifact)},
        diagnostics={"process": os.getpid()},
    )
    return result, artifact


TRAINERS: dict[str, Trainer] = {
    "count": count,
    "until-stopped": until_stopped,
    "evaluates": evaluates,
    "fails-when-stopped": fails_when_stopped,
    "hang": hang,
    "killed": killed,
    "diverged": diverged,
    "out-of-memory": out_of_memory,
    "bad-data": bad_data,
    "exits": exits,
    "vanishes": vanishes,
    "keeps": keeps,
    "keeps-and-fails": keeps_and_fails,
    "hoards": hoards,
    "scatters": scatters,
    "stores": stores,
    "compiles": compiles,
    "paced": paced,
    "nap": nap,
    "nap-1s": nap_1s,
    "scores": scores,
    "silent": silent,
    "unspeakable": unspeakable,
    "topics_sp512": lambda job, reporter: find_trainer("worker.job:run")(job, reporter),  # the real one
}
