"""Training: optimizers, schedules, and the loop with its gang. Run as a program, this file is one rank of a gang."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import inf, isfinite, nan
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from worker.model import Model, initialise
from worker.optim import Optimizer
from worker.report import Directive
from worker.schedule import Progress, learning_rate_multiplier, muon_momentum
from worker.spec import OptimizerConfig, TrialSpec, override, parse_spec
from worker.train import Diverged, TrainingSummary, train
from worker.world import World, backends

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "sharing": {"virtual_layers": 4, "unique_blocks": 2, "tying": "cycle", "lora": {"rank": 2}, "scales": "layer"},
    "model": {"vocab_size": 64, "width": 16, "heads": 4, "kv_heads": 2, "bigram_buckets": 50, "smear_gate": True},
    "data": {"sequence_length": 16, "batch_tokens": 128, "micro_batch_sequences": 8},
    "schedule": {"warmdown_fraction": 0.5},
    "optimizer": {"muon_momentum_warmup_steps": 5, "muon_weight_decay": 0.01, "gradient_clip": 1.0},
    "budget": {"steps": 6},
    "evaluation": {"validations": 0},
}


def tiny(**changes: Any) -> TrialSpec:
    return parse_spec(override(TINY, {path.replace("__", "."): value for path, value in changes.items()}))


@dataclass
class Noise:
    """Batches of tokens that repeat themselves enough to be learned, the same whatever the ranks and micro-batches."""

    spec: TrialSpec
    world: World
    each_step: Callable[[], None] = lambda: None

    def batch(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.each_step()
        data, generator = self.spec.data, torch.Generator().manual_seed(step)
        steps = torch.randint(1, 4, (data.batch_sequences, data.sequence_length + 1), generator=generator)
        sequences = steps.cumsum(dim=1) % self.spec.model.vocab_size
        share = data.batch_sequences // self.world.ranks
        mine = sequences[self.world.rank * share : (self.world.rank + 1) * share]
        for micro in torch.split(mine, data.micro_batch_sequences):
            yield micro[:, :-1], micro[:, 1:]


@dataclass
class Notebook:
    """A reporter that writes down what it hears, and says stop from `stop_at` on."""

    stop_at: float = inf
    heard: list[tuple[int, float, dict[str, float]]] = field(default_factory=list)

    def measure(self, step: int, elapsed_seconds: float, metrics: Mapping[str, float]) -> Directive:
        self.heard.append((step, elapsed_seconds, dict(metrics)))
        return self.directive()

    def directive(self) -> Directive:
        return Directive.STOP if self.heard and self.heard[-1][0] >= self.stop_at else Directive.CONTINUE

    def phase(self, name: str) -> None:
        raise AssertionError("phases are the attempt's, not the training's")

    def log(self, text: str) -> None: ...

    def of(self, metric: str) -> list[tuple[int, float]]:
        return [(step, metrics[metric]) for step, _, metrics in self.heard if metric in metrics]


@dataclass(frozen=True)
class Threads(World):
    """Ranks that are threads of this process, and add up what they bring in the order of the ranks."""

    meeting: Barrier
    brought: list[Any]

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        for tensor, each in zip(tensors, zip(*self._told([one.clone() for one in tensors]), strict=True), strict=True):
            tensor.copy_(torch.stack(each).sum(dim=0))

    def lead(self, *values: float) -> tuple[float, ...]:
        return tuple(self._told(values)[0])

    def _told(self, mine: Any) -> list[Any]:
        self.brought[self.rank] = mine
        self.meeting.wait()
        found = list(self.brought)
        self.meeting.wait()
        return found


def fresh(spec: TrialSpec) -> Model:
    model = Model(spec.model, spec.sharing)
    initialise(model, spec.seed)
    return model


def trained(
    spec: TrialSpec, notebook: Notebook | None = None, validate: Callable[[Model], float] = lambda model: 2.0
) -> tuple[Model, Notebook, TrainingSummary]:
    model, notebook, world = fresh(spec), notebook or Notebook(), World(0, 1, CPU)
    return model, notebook, train(model, spec, Noise(spec, world), world, notebook, validate)


def test_the_model_learns() -> None:
    _, notebook, summary = trained(tiny(budget__steps=60))
    losses = notebook.of("train_loss")
    assert losses[-1] == (60, summary.train_loss)
    assert summary.train_loss < 0.6 * losses[0][1]
    assert (summary.steps, summary.tokens, summary.stopped) == (60, 60 * 128, False)
    assert 0 < summary.step_seconds < summary.train_seconds


def test_a_curve_has_points_enough_and_a_validation_at_each_equal_fraction() -> None:
    _, notebook, _ = trained(tiny(budget__steps=100, evaluation__validations=4, data__batch_tokens=32))
    assert [step for step, _ in notebook.of("val_bpb")] == [25, 50, 75, 100]
    assert len(notebook.of("train_loss")) >= 20
    steps = [step for step, _, _ in notebook.heard]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (1, 100)
    assert notebook.of("fraction")[-1] == (100, 1.0)
    assert notebook.of("lr_multiplier")[0] == (1, 1.0)


def test_one_seed_gives_the_same_losses_bit_for_bit_and_another_gives_others() -> None:
    one, two, other = (trained(tiny(seed=seed))[1].of("train_loss") for seed in (1, 1, 2))
    assert one == two
    assert len(one) == 6
    assert all(mine[1] != theirs[1] for mine, theirs in zip(one, other, strict=True))


@pytest.mark.parametrize("sequences", [1, 3, 4])
def test_cutting_the_batch_into_micro_batches_changes_nothing(sequences: int) -> None:
    whole = trained(tiny())[1].of("train_loss")
    cut = trained(tiny(data__micro_batch_sequences=sequences))[1].of("train_loss")
    assert values(cut) == pytest.approx(values(whole), rel=1e-4)


def test_two_ranks_train_the_model_of_one(tmp_path: Path) -> None:
    spec = tiny(gang__ranks=2, budget__steps=5, evaluation__validations=1, optimizer__row_normalise=True)
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, __file__, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    try:
        assert [rank.wait(timeout=90) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    alone, notebook, _ = trained(spec)
    assert values(first["losses"]) == pytest.approx(values(notebook.of("train_loss")), rel=1e-4)
    assert second["losses"] == []  # only rank 0 speaks
    assert first["fingerprint"] == second["fingerprint"]  # the ranks' weights agree bit for bit
    assert first["sums"] == pytest.approx(sums(alone), rel=1e-3, abs=1e-3)
    assert first["stopped_at"] == second["stopped_at"] == 3  # rank 0's directive stops both
    assert first["diverged_at"] == second["diverged_at"] == 1  # rank 1's bad batch is seen on both


@pytest.mark.parametrize("ranks", [4, 8])
def test_four_and_eight_ranks_train_the_model_of_one(ranks: int) -> None:
    spec = tiny(gang__ranks=ranks, budget__steps=4)
    models, notebooks = [fresh(spec) for _ in range(ranks)], [Notebook() for _ in range(ranks)]
    meeting, brought = Barrier(ranks, timeout=60), list[Any](range(ranks))

    def run(rank: int) -> None:
        world = Threads(rank, ranks, CPU, meeting, brought)
        try:
            train(models[rank], spec, Noise(spec, world), world, notebooks[rank], lambda model: 2.0)
        except BaseException:
            meeting.abort()  # the others need not wait for a rank that failed
            raise

    with ThreadPoolExecutor(ranks) as threads:
        list(threads.map(run, range(ranks)))
    alone, notebook, _ = trained(spec)
    assert values(notebooks[0].of("train_loss")) == pytest.approx(values(notebook.of("train_loss")), rel=1e-4)
    assert all(sums(model) == sums(models[0]) for model in models)
    assert sums(models[0]) == pytest.approx(sums(alone), rel=1e-3, abs=1e-3)


def test_a_directive_ends_training_at_the_next_step() -> None:
    _, notebook, summary = trained(tiny(budget__steps=50), Notebook(stop_at=4))
    assert summary.stopped
    assert summary.steps == 5
    assert notebook.heard[-1][0] == 5
    assert notebook.of("fraction")[-1] == (5, 0.1)


def test_a_directive_after_the_last_step_stops_nothing() -> None:
    assert not trained(tiny(), Notebook(stop_at=6))[2].stopped


def test_seconds_end_training_and_exclude_validation() -> None:
    spec = tiny(budget={"seconds": 5.0}, evaluation__validations=2)
    now = 1000.0

    def second(seconds: float) -> None:
        nonlocal now
        now += seconds

    def validate(model: Model) -> float:
        second(100.0)
        return 2.0

    world, notebook = World(0, 1, CPU), Notebook()
    data = Noise(spec, world, lambda: second(1.0))
    summary = train(fresh(spec), spec, data, world, notebook, validate, lambda: now)
    assert (summary.steps, summary.train_seconds, summary.step_seconds) == (5, 5.0, 1.0)
    assert [step for step, _ in notebook.of("val_bpb")] == [3, 5]
    assert [elapsed for _, elapsed, _ in notebook.heard] == [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("budget", "steps"),
    [({"steps": 4, "tokens": 10_000}, 4), ({"steps": 9, "tokens": 3 * 128}, 3), ({"tokens": 300}, 3)],
)
def test_the_first_limit_of_the_budget_ends_training(budget: dict[str, int], steps: int) -> None:
    assert trained(tiny(budget=budget))[2].steps == steps


@pytest.mark.parametrize("nuclear_norm", [0.0, 0.1])
def test_a_loss_that_is_no_number_is_named_with_its_step(nuclear_norm: float) -> None:
    objective = {"nuclear_norm": nuclear_norm, "nuclear_norm_every": 1}
    spec, world = tiny(objective=objective, quantisation__half_below=30), World(0, 1, CPU)
    model = fresh(spec)
    with torch.no_grad():
        model.attention_scales.fill_(nan)
    with pytest.raises(Diverged, match="step 1") as diverged:
        train(model, spec, Noise(spec, world), world, Notebook(), lambda model: 2.0)
    assert diverged.value.step == 1
    assert not isfinite(diverged.value.loss)
    assert isinstance(diverged.value, ArithmeticError)


def test_a_score_that_is_no_number_is_divergence() -> None:
    with pytest.raises(Diverged, match="step 3"):
        trained(tiny(evaluation__validations=2), validate=lambda model: nan)


def test_weights_that_the_last_update_ruined_are_divergence() -> None:
    with pytest.raises(Diverged, match="step 1"):
        trained(tiny(budget__steps=1, optimizer__scalar_lr=1e38, optimizer__adam_weight_decay=1e3))


def test_blocks_wait_to_be_repeated_until_their_fraction_of_the_budget() -> None:
    spec, world, seen = tiny(sharing__tying={"from_fraction": 0.5}, budget__steps=4), World(0, 1, CPU), []
    model = fresh(spec)
    start = model.state_dict()["attention_scales"].clone()
    ((tokens, _),) = Noise(spec, world).batch(0)

    def look() -> None:
        seen.append(len(model.states(tokens)) - 1)
        waiting = torch.equal(model.state_dict()["attention_scales"][2:], start[2:])
        assert waiting == (len(seen) <= 3)  # no step has yet run the two layers that repeat a block

    train(model, spec, Noise(spec, world, look), world, Notebook(), lambda model: 2.0)
    assert seen == [2, 2, 4, 4]
    stopped, _, summary = trained(spec, Notebook(stop_at=1))
    assert summary.stopped
    assert len(stopped.states(tokens)) - 1 == 4  # whatever comes after training sees the whole model


def test_averages_come_with_the_summary_and_change_no_step() -> None:
    plain, _, without = trained(tiny())
    model, _, summary = trained(tiny(averaging={"ema_decay": 0.9, "swa_every": 2, "swa_from": 1.0}))
    assert without.averages == {}
    assert sums(model) == sums(plain)
    assert set(summary.averages) == {"ema", "swa"}
    for average in summary.averages.values():
        plain.load_state_dict(average)
        assert sums(plain) != sums(model)


def test_labels_are_smoothed_in_the_training_loss() -> None:
    spec = tiny(objective__label_smoothing=0.2)
    ((tokens, targets),) = Noise(spec, World(0, 1, CPU)).batch(0)
    first = trained(spec)[1].of("train_loss")[0][1]
    assert first == fresh(spec)(tokens, targets, 0.2).item() != fresh(spec)(tokens, targets).item()


@st.composite
def sharings(draw: st.DrawFn) -> dict[str, Any]:
    """Any tying, with one of the ways in which scales are owned, and what else tells layers apart."""
    layers = draw(st.integers(1, 5))
    tying = {"pattern": draw(st.sampled_from(("cycle", "sequence", "palindrome", "tail")))}
    owners = ("block", "layer")
    way = draw(st.sampled_from(("owned", "adapters", "bounded_recurrence")))
    owned: dict[str, Any] = {"scales": draw(st.sampled_from(owners)), "mixes": draw(st.sampled_from(owners))}
    if way == "bounded_recurrence":
        owned = {"bounded_recurrence": draw(st.sampled_from((0.5, 0.9)))}
    return {
        "virtual_layers": layers,
        "unique_blocks": draw(st.integers(1, layers)),
        "tying": tying | {"from_fraction": draw(st.sampled_from((0.0, 0.5)))},
        "lora": {
            "rank": draw(st.integers(0, 3)),
            "paths": draw(st.sampled_from((["mlp"], ["attention"], ["attention", "mlp"]))),
        },
        "repartition": {"mode": draw(st.sampled_from(("none", "fixed", "blended"))), "heads": draw(st.booleans())},
        "repeat_embeddings": draw(st.booleans()),
        **({"adapters": True} if way == "adapters" else owned),
    }


@st.composite
def shapes(draw: st.DrawFn, sharing: dict[str, Any]) -> dict[str, Any]:
    """Any shape that goes with a sharing."""
    layers, blocks = sharing["virtual_layers"], sharing["unique_blocks"]
    laned = sharing["tying"]["pattern"] == "sequence" and blocks > 1 and "bounded_recurrence" not in sharing
    kv_heads, group, half = (draw(st.integers(1, 2)) for _ in range(3))
    heads, skips, embedded = kv_heads * group, draw(st.booleans()), draw(st.booleans())
    return {
        "vocab_size": 64,
        "heads": heads,
        "kv_heads": kv_heads,
        "width": heads * half * 4 if heads * half > 1 else 8,
        "query_rank": draw(st.integers(0, 3)) if sharing["repartition"]["mode"] == "none" else 0,
        "mlp_multiple": draw(st.sampled_from((0.5, 2.0, 3.0))),
        "activation": draw(st.sampled_from(("relu2", "leaky_relu2", "swiglu"))),
        "rope_width": draw(st.sampled_from((None, 2))),
        "xsa_last": draw(st.integers(0, 3)),
        "attention_gate": draw(st.booleans()),
        "ln_scale": draw(st.sampled_from(("none", "block", "first_layer", "layer"))),
        "unet_skips": skips,
        "skip_gates": skips and draw(st.booleans()),
        "lanes_from": draw(st.sampled_from((None, *range(1, blocks)))) if laned else None,
        "bigram_buckets": draw(st.sampled_from((0, 7))),
        "bigram_hash": draw(st.sampled_from(("product", "xor"))),
        "smear_gate": draw(st.booleans()),
        "smear_place": draw(st.sampled_from(("before_norm", "after_norm", "window"))),
        "gate_inputs": 4,
        "value_embedding_width": 4 if embedded else 0,
        "value_embedding_layers": [draw(st.integers(0, layers - 1))] if embedded else [],
    }


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_legal_tiny_spec_trains(data: st.DataObject) -> None:
    sharing = data.draw(sharings())
    spec = tiny(
        sharing=sharing,
        model=data.draw(shapes(sharing)),
        schedule=data.draw(st.sampled_from(({"warmdown_steps": 1}, {"warmdown_fraction": 1.0}))),
        optimizer__gradient_clip=data.draw(st.sampled_from((0.0, 0.3))),
        optimizer__row_normalise=data.draw(st.booleans()),
        optimizer__muon_coefficients=data.draw(st.sampled_from(("constant", "per_iteration"))),
        objective={
            "label_smoothing": data.draw(st.sampled_from((0.0, 0.1))),
            "nuclear_norm": data.draw(st.sampled_from((0.0, 0.01))),
            "nuclear_norm_every": 1,
        },
        averaging={"ema_decay": data.draw(st.sampled_from((0.0, 0.9))), "swa_every": data.draw(st.integers(0, 2))},
        quantisation={
            "qat_from": data.draw(st.sampled_from((None, 0.0, 0.5))),
            "clip": data.draw(st.sampled_from(("amax", "quantile", "sigmas", "grid"))),
            "prune": data.draw(st.sampled_from((0.0, 0.2))),
            "half_below": 30,
        },
        data__micro_batch_sequences=data.draw(st.integers(1, 8)),
        budget__steps=2,
    )
    model, _, summary = trained(spec)
    assert summary.steps == 2
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert all(tensor.isfinite().all() for average in summary.averages.values() for tensor in average.values())


def test_every_parameter_learns_from_the_second_step_on() -> None:
    spec, world = tiny(), World(0, 1, CPU)
    model = fresh(spec)
    optimizer = Optimizer(model, spec, world)
    for step in range(2):
        for tokens, targets in Noise(spec, world).batch(step):
            model(tokens, targets).backward()
        idle = {name for name, parameter in model.named_parameters() if not gradient(parameter).any()}
        if step == 0:  # what zeros hide: up is zero in the bypasses, and so is output, down and the bigram projection
            assert {"lora.attention.down", "lora.mlp.down", "bigram.table", "blocks.0.mlp.up"} <= idle
            assert idle.isdisjoint({"lora.attention.up", "lora.mlp.gate_logits", "embedding.weight", "skip_weights"})
        else:
            assert idle == set()
        optimizer.step(step, 1.0)


def multiplier(steps: int, seconds: float = 0.0, **changes: Any) -> float:
    return learning_rate_multiplier(tiny(**changes), Progress(steps, seconds, steps * 128))


def test_a_warmdown_in_steps_ends_with_the_steps() -> None:
    changes: dict[str, Any] = {"schedule": {"warmdown_steps": 40}, "budget": {"steps": 100}}
    assert [multiplier(step, **changes) for step in (0, 59, 60, 70, 99)] == [1.0, 1.0, 1.0, 0.75, 0.025]


def test_a_warmdown_in_steps_is_converted_to_seconds_at_the_mean_step() -> None:
    changes: dict[str, Any] = {"schedule": {"warmdown_steps": 1200}, "budget": {"seconds": 600.0}}
    assert multiplier(0, **changes) == 1.0
    # 0.05 s a step: the warmdown is 60 s long
    assert multiplier(100, 5.0, **changes) == 1.0
    assert multiplier(11_400, 570.0, **changes) == pytest.approx(0.5)
    assert multiplier(11_400, 570.0, **changes | {"budget": {"seconds": 600.0, "steps": 11_700}}) == pytest.approx(0.25)
    assert multiplier(12_100, 605.0, **changes) == 0.0
    # 1 s a step: all 600 steps are warmdown, and it starts at a half
    assert multiplier(1, 1.0, **changes) == pytest.approx(599 / 1200)


def test_a_warmdown_fraction_is_a_share_of_the_nearest_limit() -> None:
    changes: dict[str, Any] = {
        "schedule": {"warmdown_fraction": 0.5, "min_multiplier": 0.1},
        "budget": {"steps": 100, "seconds": 10.0},
    }
    assert multiplier(50, 2.0, **changes) == 1.0
    assert multiplier(75, 2.0, **changes) == pytest.approx(0.5)
    assert multiplier(50, 8.0, **changes) == pytest.approx(0.4)
    assert multiplier(99, 2.0, **changes) == 0.1
    assert multiplier(0, **changes | {"schedule": {"warmdown_fraction": 1.0}}) == 1.0
    assert multiplier(99, **changes | {"schedule": {"warmdown_fraction": 0.0}}) == 1.0


def test_tokens_count_towards_the_budget() -> None:
    spec = tiny(budget={"tokens": 1280, "steps": 100}, schedule={"warmdown_steps": 8})
    assert Progress(5, 0.0, 640).fraction(spec.budget) == 0.5
    assert learning_rate_multiplier(spec, Progress(5, 0.0, 640)) == pytest.approx(5 / 8)


def test_momentum_warms_up_linearly() -> None:
    config = OptimizerConfig(muon_momentum_start=0.85, muon_momentum=0.95, muon_momentum_warmup_steps=500)
    assert [muon_momentum(config, step) for step in (0, 250, 500, 9000)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert muon_momentum(OptimizerConfig(muon_momentum_warmup_steps=0), 0) == 0.95


def gradient(parameter: torch.nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def values(points: list[tuple[int, float]]) -> list[float]:
    return [value for _, value in points]


def sums(model: Model) -> list[float]:
    return [parameter.detach().abs().mean().item() for parameter in model.parameters()]


def as_one_rank(folder: Path, rank: int) -> None:
    """Train as one of two ranks: to the end, until rank 0 hears a stop, and with weights that rank 1 has spoilt."""
    torch.set_num_threads(1)
    dist.init_process_group(backends(CPU), init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    spec, world = parse_spec(json.loads((folder / "spec.json").read_text())), World(rank, 2, CPU)
    model, notebook = fresh(spec), Notebook()
    train(model, spec, Noise(spec, world), world, notebook, lambda model: world.total(1.0, 1.0)[0])
    stopped = train(fresh(spec), spec, Noise(spec, world), world, Notebook(stop_at=2), lambda model: 2.0)

    def spoil() -> None:
        if rank == 1:
            with torch.no_grad():
                spoilt.mlp_scales.fill_(nan)

    spoilt, diverged_at = fresh(spec), 0
    try:
        train(spoilt, spec, Noise(spec, world, spoil), world, Notebook(), lambda model: 2.0)
    except Diverged as diverged:
        diverged_at = diverged.step
    said = {
        "losses": notebook.of("train_loss"),
        "sums": sums(model),
        "fingerprint": [float(parameter.detach().double().sum()).hex() for parameter in model.parameters()],
        "stopped_at": stopped.steps,
        "diverged_at": diverged_at,
    }
    (folder / f"{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    as_one_rank(Path(sys.argv[1]), int(sys.argv[2]))
