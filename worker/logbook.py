"""What a job tells of itself: its phases, and sentences for whoever asks at night what went on. Rank 0 alone speaks."""

from collections.abc import Mapping
from typing import Any

from worker.inventory import count_parameters
from worker.report import Hardware, Reporter, TrialResult
from worker.shards import Dataset
from worker.spec import BudgetConfig, TrialSpec

SLOWER = 1.25
"""From here on a device that has become slower while it trained is worth a warning."""


class Logbook:
    """The reporter of a job on rank 0; without one, on the other ranks, nothing is said."""

    def __init__(self, reporter: Reporter | None) -> None:
        self._reporter = reporter

    def phase(self, name: str) -> None:
        if self._reporter is not None:
            self._reporter.phase(name)

    def say(self, line: str) -> None:
        if self._reporter is not None:
            self._reporter.log(line)

    def model(self, spec: TrialSpec, ranks: int, device: str) -> None:
        """What is about to be trained, where, and for how long."""
        sharing, layers = spec.sharing, " ".join(map(str, spec.sharing.tying_map))
        self.say(
            f"model: {count_parameters(spec.model, sharing):,} parameters, width {spec.model.width}, layers {layers}, "
            f"LoRA rank {sharing.lora.rank}, seed {spec.seed}; {ranks} {device} {'rank' if ranks == 1 else 'ranks'}"
        )
        self.say(f"budget: {_budget(spec.budget)}, {spec.data.batch_tokens:,} tokens a step")

    def data(self, dataset: Dataset, targets: int) -> None:
        tokens, shards = sum(shard.tokens for shard in dataset.train), len(dataset.train)
        files = "1 shard" if shards == 1 else f"{shards} shards"
        self.say(f"data: {dataset.name}, {tokens:,} training tokens in {files}, scored on {targets:,} tokens")

    def trained(self, steps: int, tokens: int, seconds: float, loss: float, *, stopped: bool) -> None:
        how = "stopped early, as told, after" if stopped else "trained for"
        rate = f"{seconds / steps * 1000:.1f} ms a step, " if steps else ""
        self.say(f"{how} {steps:,} steps, {tokens:,} tokens, {seconds:.1f} s: {rate}last loss {loss:.4f}")

    def hardware(self, seen: Hardware) -> None:
        before, after = max(seen.probe_seconds), max(seen.probe_after_seconds)
        self.say(
            f"hardware: {seen.device} on {seen.node}; its probe took {1000 * before:.2f} ms, then {1000 * after:.2f} ms"
        )
        if after > SLOWER * before:
            self.say(f"warning: the slowest device became {after / before:.1f} times as slow while it trained")

    def scores(self, averages: Mapping[str, float], applied: str, scores: Mapping[str, float]) -> None:
        weights = ", ".join(f"{name} {bpb:.4f}" for name, bpb in averages.items())
        self.say(f"before quantisation, BPB by weights: {weights}; {applied} is packed")
        self.say("after it, BPB by way of scoring: " + ", ".join(f"{name} {bpb:.4f}" for name, bpb in scores.items()))

    def result(self, result: TrialResult) -> None:
        code = f"model {result.model_bytes:,} + code {result.code_bytes:,}"
        self.say(f"artifact: {result.artifact_bytes:,} bytes = {code}, SHA-256 {result.artifact_sha256[:12]}…")
        self.say(
            "model bytes: " + ", ".join(f"{name} {size:,}" for name, size in sorted(result.bytes_by_class.items()))
        )
        self.say(
            f"result: {result.val_bpb:.4f} BPB; evaluated in {result.evaluate_seconds:.1f} s, "
            f"packed in {result.pack_seconds:.1f} s"
        )


def of_step(steps: int, budget: BudgetConfig, metrics: Mapping[str, float], seconds: float, tokens: int) -> str:
    """A step's line. `seconds` and `tokens` are those since the line before."""
    of = f" of {budget.steps:,}" if budget.steps is not None else ""
    parts = [f"loss {metrics['train_loss']:.4f}"] if "train_loss" in metrics else []
    parts += [f"{metrics['val_bpb']:.4f} BPB"] if "val_bpb" in metrics else []
    parts += [f"learning rate × {metrics['lr_multiplier']:.3f}"] if "lr_multiplier" in metrics else []
    parts += [f"{tokens / seconds:,.0f} tokens/s"] if seconds > 0 else []
    return f"step {steps:,}{of} ({metrics.get('fraction', 0.0):.0%}): {', '.join(parts)}"


def _budget(budget: BudgetConfig) -> str:
    limits: dict[str, Any] = {"steps": budget.steps, "seconds": budget.seconds, "tokens": budget.tokens}
    return " or ".join(f"{limit:,} {name}" for name, limit in limits.items() if limit is not None)
