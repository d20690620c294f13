"""Make benchmarks/search/table.jsonl: every point of a small sharing space, trained by Caddie's own worker.

LoRA rank × tying map (five families over one to six blocks) × width, in an order drawn once; then further seeds of some
of them. On one CPU core it takes an hour. Rows are added as they are made, and those that are there are kept: run
it again to go on. The text is the demo corpus, its validation split cut to VAL_TOKENS.

Run: OMP_NUM_THREADS=1 .venv/bin/python benchmarks/search/table.py
"""

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from worker.corpus import DEMO_DATASET, build_demo
from worker.job import run
from worker.recipes import load_recipe
from worker.report import Directive
from worker.shards import open_dataset, read_manifest, shard_name, write_shard
from worker.spec import TrialSpec, override, parse_spec
from worker.trainer import Job, finished
from worker.tying import canonical_map

TABLE = Path(__file__).with_name("table.jsonl")
LAYERS = 6
RANKS = (0, 2, 4, 8)
WIDTHS = (24, 32, 40, 48, 64, 80)
MAPS: dict[str, tuple[tuple[int, ...], ...]] = {
    "cycle": ((0,) * 6, (0, 1) * 3, (0, 1, 2) * 2, (0, 1, 2, 3, 0, 1), tuple(range(6))),
    "sequence": ((0, 0, 0, 1, 1, 1), (0, 0, 1, 1, 2, 2), (0, 0, 1, 2, 2, 3)),
    "palindrome": ((0, 1, 1, 0, 0, 1), (0, 1, 2, 2, 1, 0), (0, 1, 2, 3, 3, 2)),
    "core": ((0, 1, 1, 1, 1, 0), (0, 1, 1, 1, 1, 2), (0, 1, 2, 1, 2, 3)),
    "tail": ((0, 1, 1, 1, 1, 1), (0, 1, 2, 2, 2, 2), (0, 1, 2, 3, 3, 3)),
}
REPLICATED, SEEDS = 24, (2, 3)
DATASET, VAL_TOKENS = "stdlib_sp1024_short", 16_385
OVERRIDES: dict[str, Any] = {
    "model.heads": 4, "model.kv_heads": 2, "data.dataset": DATASET, "data.batch_tokens": 1024, "budget.steps": 80,
    "data.sequence_length": 128, "quantisation.half_below": 512, "evaluation.validations": 8,
    "evaluation.validation_tokens": 4096,
}  # fmt: skip


class Notes:
    """What the worker says of one job: BPB by fraction of the budget, and CPU seconds at each step."""

    def __init__(self) -> None:
        self.curve: dict[float, float] = {}
        self.ticks: list[float] = []

    def measure(self, step: int, elapsed_seconds: float, metrics: Mapping[str, float]) -> Directive:
        if "val_bpb" in metrics:
            self.curve[round(step / OVERRIDES["budget.steps"], 4)] = round(metrics["val_bpb"], 5)
        return Directive.CONTINUE

    def directive(self) -> Directive:
        self.ticks.append(time.process_time())
        return Directive.CONTINUE

    def phase(self, name: str) -> None:
        pass

    def log(self, text: str) -> None:
        pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/search-data"), help="a data root to build the text in")
    parser.add_argument("--only", type=int, default=10**6, help="make so many rows at the most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    build_short(options.data)
    made = {key_of(json.loads(line)) for line in TABLE.read_text().splitlines()} if TABLE.exists() else set()
    wanted = [point for point in points() if key_of(point) not in made][: options.only]
    for number, point in enumerate(wanted, 1):
        row = train(point, options.data)
        with TABLE.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, separators=(",", ":")) + "\n")
        print(f"{number}/{len(wanted)} {key_of(row)} {row['val_bpb']:.4f} BPB", flush=True)
    return 0


def points() -> Iterator[dict[str, Any]]:
    """Every point once, in an order drawn once; then those with further seeds."""
    first = [
        {"family": family, "map": list(tying_map), "rank": rank, "width": width, "seed": 1}
        for family, maps in MAPS.items()
        for tying_map in maps
        for rank in RANKS
        for width in WIDTHS
    ]
    random.Random(0).shuffle(first)
    yield from first
    for point in first[:REPLICATED]:
        yield from ({**point, "seed": seed} for seed in SEEDS)


def key_of(point: Mapping[str, Any]) -> tuple[Any, ...]:
    return (tuple(point["map"]), point["rank"], point["width"], point["seed"])


def spec_of(point: Mapping[str, Any]) -> TrialSpec:
    """The spec that a row is of."""
    tying_map = canonical_map(point["map"])
    changes = {
        **OVERRIDES, "sharing.virtual_layers": LAYERS, "sharing.unique_blocks": len(set(tying_map)),
        "sharing.tying": list(tying_map), "sharing.lora.rank": point["rank"], "model.width": point["width"],
        "seed": point["seed"],
    }  # fmt: skip
    return parse_spec(override(load_recipe("laptop"), changes))


def train(point: Mapping[str, Any], data_root: Path) -> dict[str, Any]:
    """The point with what its training gave. Step seconds are the process's own, on whatever else the machine did."""
    notes = Notes()
    produced = finished(run(Job(spec_of(point), data_root), notes))
    assert produced is not None
    result = produced[0]
    shown = result.diagnostics
    return {
        **point, "val_bpb": round(result.val_bpb, 5), "val_bpb_prequant": round(result.val_bpb_prequant, 5),
        "parameters": result.parameters, "model_bytes": result.model_bytes, "bytes_by_class": result.bytes_by_class,
        "curve": notes.curve, "steps": result.steps,
        "step_seconds": round(median(later - earlier for earlier, later in pairwise(notes.ticks)), 5),
        "gammas": {path: [round(gamma, 4) for gamma in gammas] for path, gammas in shown["gammas"].items()},
        "block_influence": [round(influence, 4) for influence in shown["block_influence"]],
        "contraction": [round(change, 4) for change in shown.get("contraction", {}).get("changes", [])],
    }  # fmt: skip


def build_short(root: Path) -> None:
    """The demo corpus with a validation split that takes a moment to score, as a dataset of its own."""
    build_demo(root)
    folder = root / "datasets" / DATASET
    manifest = read_manifest(root)
    if any(entry["name"] == DATASET for entry in manifest["datasets"]):
        return
    whole = open_dataset(root, DEMO_DATASET)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(whole.train[0].path, folder / shard_name("short", "train", 0))
    write_shard(folder / shard_name("short", "val", 0), whole.val[0].mapped()[:VAL_TOKENS])
    entry = next(entry for entry in manifest["datasets"] if entry["name"] == DEMO_DATASET)
    manifest["datasets"].append({"name": DATASET, "tokenizer_name": entry["tokenizer_name"], "stats": {"files_val": 1}})
    (root / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
