"""Every recipe, tiny, from training to the score of its artifact: what it reaches, and what packing costs it.

The gap is between plain windows before and after; a sliding score has windows that overlap by half.

Run: .venv/bin/python benchmarks/recipes.py [--recipe ebls ...] [--data DIR]
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from worker.recipes import recipe_names

HEADINGS = (
    "recipe", "parameters", "steps", "BPB before", "BPB after", "gap", "sliding", "model bytes", "train, s", "whole, s",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", default=recipe_names(), choices=recipe_names(), metavar="NAME")
    parser.add_argument("--data", help="the data root, as python -m worker takes it")
    options = parser.parse_args()
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}", flush=True)
    failed = 0
    for recipe in options.recipe:
        command = [sys.executable, "-m", "worker", "--recipe", recipe, "--size", "tiny", "--json"]
        began = time.perf_counter()
        done = subprocess.run([*command, *(["--data", options.data] if options.data else [])], capture_output=True)
        if done.returncode == 0:
            print(row(recipe, json.loads(done.stdout)["result"], time.perf_counter() - began), flush=True)
        else:
            failed += 1
            print(f"| {recipe} | {done.stderr.decode().strip().splitlines()[-1]} |", flush=True)
    return int(failed > 0)


def row(recipe: str, result: dict[str, Any], seconds: float) -> str:
    before, scores = result["val_bpb_prequant"], result["diagnostics"]["scores"]
    cells = (
        recipe,
        f"{result['parameters']:,}",
        f"{result['steps']}",
        f"{before:.4f}",
        f"{scores['plain']:.4f}",
        f"{scores['plain'] - before:+.4f}",
        f"{scores['sliding']:.4f}" if "sliding" in scores else "–",
        f"{result['model_bytes']:,}",
        f"{result['train_seconds']:.1f}",
        f"{seconds:.1f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
