"""A study in the middle of a sweep, as the loop would have written it."""

import random
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from api.context import Writer
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
from worker.spec import GangConfig, TrialSpec, override, parse_spec

TTL = timedelta(minutes=5)
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

    def __init__(self, database: Database, artifacts: Path, now: datetime, name: str = "demo") -> None:
        self.database, self.artifacts, self.now = database, ArtifactStore(artifacts), now
        self.chance = random.Random(7)
        space = {"sharing.lora.rank": {"choice": [0, 2, 4, 8]}, "sharing.unique_blocks": {"low": 1, "high": 6}}
        base = override(load_recipe("laptop"), BASE)
        new = NewStudy.model_validate(
            {"name": name, "base": base, "space": space, "max_trials": 24, "cap_bytes": 600_000}
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
        return self.claim(self.submit(changes).gang)

    def claim(self, gang: GangConfig) -> Claim:
        """What waits for such a gang longest, begun."""
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
