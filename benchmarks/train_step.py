"""A training step of each recipe: its time, the optimizer's share, evaluation's speed, and memory.

On random tokens, as the last step of training is: every virtual layer runs, and the forward pass sees quantised weights
where the recipe is quantisation-aware. Each recipe has a process of its own, so that its peak memory is its own. The
floor is the step's matrix products alone, at the speed of a bare product of the MLP's shape in the same process.

Run: .venv/bin/python benchmarks/train_step.py [--recipe ebls ...] [--steps 10]
On a GPU, compiled and in bf16: .venv/bin/python benchmarks/train_step.py --size full --device gpu
"""

import argparse
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import median

import torch
from torch import Tensor

from worker.inventory import TensorClass, tensor_inventory
from worker.model import Model, initialise
from worker.optim import Optimizer
from worker.qat import fake_quantised
from worker.recipes import load_recipe, recipe_names
from worker.spec import TrialSpec, override, parse_spec
from worker.world import World

HEADINGS = ("recipe", "layers", "tokens a step", "step, ms", "× floor", "optimizer", "evaluated tokens/s", "peak, MiB")


@dataclass(frozen=True)
class Figures:
    """What one recipe takes. Seconds are medians."""

    layers: int
    tokens: int
    step_seconds: float
    optimizer_seconds: float
    floor_seconds: float
    evaluated_per_second: float
    peak_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", default=recipe_names(), choices=recipe_names(), metavar="NAME")
    parser.add_argument("--size", default="tiny", choices=("tiny", "full"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}", flush=True)
    for recipe in options.recipe:
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
            figures = process.submit(measure, recipe, options.size, options.device, options.steps).result()
        print(row(recipe, figures), flush=True)


def row(recipe: str, figures: Figures) -> str:
    step, floor = figures.step_seconds, figures.floor_seconds
    cells = (
        recipe,
        f"{figures.layers}",
        f"{figures.tokens:,}",
        f"{1000 * step:.1f}",
        f"{step / floor:.1f}",
        f"{figures.optimizer_seconds / step:.0%}",
        f"{figures.evaluated_per_second:,.0f}",
        f"{figures.peak_mib:,.0f}",
    )
    return f"| {' | '.join(cells)} |"


def measure(recipe: str, size: str, device: str, steps: int) -> Figures:
    """One rank's share of a recipe's step, where the recipe has several."""
    spec = parse_spec(override(load_recipe(recipe, size), {"gang.device": device}))
    world = World(0, 1, torch.device("cuda" if device == "gpu" else "cpu"))
    model = Model(spec.model, spec.sharing)
    initialise(model, spec.seed)
    model.to(world.device)
    if world.device.type == "cuda":
        model.compile(fullgraph=True, dynamic=False)
    optimizer, batch = Optimizer(model, spec, world), micro_batches(spec, world)
    whole, updates = [], []
    for step in range(steps + 2):
        began = now(world)
        with fake_quantised(model, spec.quantisation) if spec.quantisation.qat_from is not None else nullcontext():
            for tokens, targets in batch:
                (model(tokens, targets, spec.objective.label_smoothing) / len(batch)).backward()
        updating = now(world)
        optimizer.step(step, 1.0)
        ended = now(world)
        whole.append(ended - began)
        updates.append(ended - updating)
    tokens_a_step = sum(tokens.numel() for tokens, _ in batch)
    return Figures(
        layers=spec.sharing.virtual_layers,
        tokens=tokens_a_step,
        step_seconds=median(whole[2:]),  # the first two compile and warm up
        optimizer_seconds=median(updates[2:]),
        floor_seconds=3 * forward_flops(spec) * tokens_a_step / matmul_flops_per_second(spec, world),
        evaluated_per_second=evaluated_per_second(model, spec, world),
        peak_mib=peak_mib(world),
    )


def micro_batches(spec: TrialSpec, world: World) -> list[tuple[Tensor, Tensor]]:
    """A rank's share of a step, drawn evenly from the vocabulary."""
    share = spec.data.batch_sequences // spec.gang.ranks
    sizes = [min(spec.data.micro_batch_sequences, share - i) for i in range(0, share, spec.data.micro_batch_sequences)]
    return [random_tokens(spec, size, spec.data.sequence_length, world) for size in sizes]


def random_tokens(spec: TrialSpec, sequences: int, length: int, world: World) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(spec.model.vocab_size, (sequences, length + 1), generator=torch.Generator().manual_seed(1))
    drawn = drawn.to(world.device)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def evaluated_per_second(model: Model, spec: TrialSpec, world: World) -> float:
    """Tokens scored a second in plain windows, as many at once as the recipe says."""
    tokens, targets = random_tokens(spec, spec.evaluation.batch_sequences, spec.evaluated_length, world)
    model.eval()
    with torch.inference_mode():
        return tokens.numel() / seconds_of(lambda: model.token_losses(tokens, targets), world)


def forward_flops(spec: TrialSpec) -> int:
    """Of a token's matrix products: twice each matrix it meets, once a virtual layer, and causal attention."""
    model, sharing = spec.model, spec.sharing
    block = sum(
        tensor.elements
        for tensor in tensor_inventory(model, sharing)
        if tensor.name.startswith("blocks.0.") and tensor.tensor_class is not TensorClass.CONTROL
    )
    attention = spec.data.sequence_length * model.width  # scores and values, half of each masked
    return 2 * (sharing.virtual_layers * (block + attention) + model.vocab_size * model.width)


def matmul_flops_per_second(spec: TrialSpec, world: World) -> float:
    """Of the MLP's first product over a micro-batch, in the dtype that the model computes in."""
    rows = min(spec.data.micro_batch_sequences, spec.data.batch_sequences) * spec.data.sequence_length
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    left = torch.randn(rows, spec.model.width, device=world.device, dtype=dtype)
    right = torch.randn(spec.model.width, spec.model.mlp_width, device=world.device, dtype=dtype)
    return 2 * rows * right.numel() / seconds_of(lambda: left @ right, world, 20)


def seconds_of(work: Callable[[], object], world: World, times: int = 5) -> float:
    """Median seconds of some work, once it has run."""
    work()
    taken = []
    for _ in range(times):
        began = now(world)
        work()
        taken.append(now(world) - began)
    return median(taken)


def now(world: World) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_mib(world: World) -> float:
    """Of the device where there is one, else of the process, Python and torch included."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
