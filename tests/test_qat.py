"""Quantisation-aware training: what the forward pass sees, what gradients are of, and what it is worth."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from worker.inventory import TensorClass
from worker.model import Model, initialise
from worker.packing import QuantisationConfig
from worker.qat import fake_quantised, quantised_parameters, rounded
from worker.quantize import dequantise_rows, quantise
from worker.report import Directive, Reporter
from worker.spec import TrialSpec, override, parse_spec
from worker.train import train
from worker.world import World

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "sharing": {"virtual_layers": 4, "unique_blocks": 2},
    "model": {"vocab_size": 64, "width": 32, "heads": 4, "kv_heads": 2, "bigram_buckets": 50, "bigram_width": 16},
    "data": {"sequence_length": 16, "batch_tokens": 256},
    "optimizer": {"muon_momentum_warmup_steps": 5},
    "schedule": {"warmdown_fraction": 0.5},
    "quantisation": {"bits": 4, "half_below": 100},
    "budget": {"steps": 60},
    "evaluation": {"validations": 0},
}
CLIPS = ("amax", "quantile", "sigmas", "grid")


def tiny(**changes: Any) -> TrialSpec:
    return parse_spec(override(TINY, {path.replace("__", "."): value for path, value in changes.items()}))


def fresh(spec: TrialSpec) -> Model:
    model = Model(spec.model, spec.sharing)
    initialise(model, spec.seed)
    return model


@dataclass
class Walks:
    """Sequences whose steps of 1 to 3 can be learned, their place not."""

    spec: TrialSpec

    def batch(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        data, generator = self.spec.data, torch.Generator().manual_seed(step)
        steps = torch.randint(1, 4, (data.batch_sequences, data.sequence_length + 1), generator=generator)
        sequences = steps.cumsum(dim=1) % self.spec.model.vocab_size
        yield sequences[:, :-1], sequences[:, 1:]


class Silent(Reporter):
    def measure(self, *_: object) -> Directive:
        return Directive.CONTINUE

    def directive(self) -> Directive:
        return Directive.CONTINUE

    def phase(self, name: str) -> None: ...

    def log(self, text: str) -> None: ...


def trained(spec: TrialSpec) -> Model:
    model = fresh(spec)
    train(model, spec, Walks(spec), World(0, 1, CPU), Silent(), lambda model: 0.0)
    return model


def bits_of(model: Model) -> list[bytes]:
    return [parameter.detach().numpy().tobytes() for parameter in model.parameters()]


def test_the_sources_example(shared: Path) -> None:
    expected = json.loads((shared / "reference" / "expected.json").read_text())
    example = find(expected, "ebls_fake_quant_example")
    result = rounded(torch.tensor(example["weights"]), TensorClass.MLP, QuantisationConfig(bits=6))
    torch.testing.assert_close(result, torch.tensor(example["out"]), atol=5e-4, rtol=0)  # our scales are fp16


@pytest.mark.parametrize("clip", CLIPS)
def test_a_step_sees_what_the_artifact_would_hold(clip: str) -> None:
    spec = tiny(quantisation={"bits": 5, "half_below": 100, "clip": clip, "prune": 0.1, "class_bits": {"mlp": 4}})
    model = fresh(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    matrices = quantised_parameters(model, 100)
    expected = [dequantise_rows(quantise(each, kind, spec.quantisation)) for each, kind in matrices]
    with fake_quantised(model, spec.quantisation):
        assert all(torch.equal(each, values) for (each, _), values in zip(matrices, expected, strict=True))


def test_exact_weights_return_bit_for_bit_even_after_an_error() -> None:
    spec = tiny()
    model = fresh(spec)
    before = bits_of(model)
    with fake_quantised(model, spec.quantisation):
        assert bits_of(model) != before
    assert bits_of(model) == before
    with pytest.raises(KeyError), fake_quantised(model, spec.quantisation):
        raise KeyError
    assert bits_of(model) == before


def test_gradients_are_those_at_the_quantised_weights_for_the_exact_ones() -> None:
    spec = tiny()
    model, twin = fresh(spec), fresh(spec)
    ((tokens, targets),) = Walks(spec).batch(0)
    with torch.no_grad():
        for matrix, kind in quantised_parameters(twin, 100):
            matrix.copy_(dequantise_rows(quantise(matrix, kind, spec.quantisation)))
    twin(tokens, targets).backward()
    with fake_quantised(model, spec.quantisation):
        model(tokens, targets).backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad)


def test_small_tensors_and_controls_stay_as_they_are() -> None:
    spec = tiny(quantisation__half_below=600)
    model = fresh(spec)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with fake_quantised(model, spec.quantisation):
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    quantised = {id(matrix) for matrix, _ in quantised_parameters(model, 600)}
    assert changed <= {name for name, parameter in model.named_parameters() if id(parameter) in quantised}
    assert {"embedding.weight", "bigram.table", "blocks.0.attention.query"} <= changed
    assert "bigram.projection" not in changed  # 512 values


def test_training_with_quantised_weights_loses_less_to_quantisation() -> None:
    gaps = {}
    for start in (None, 0.5):
        spec = tiny(quantisation__qat_from=start)
        model = trained(spec)
        ((tokens, targets),) = Walks(spec).batch(10_000)
        with torch.no_grad():
            exact = model.token_losses(tokens, targets).mean().item()
            with fake_quantised(model, spec.quantisation):
                gaps[start] = model.token_losses(tokens, targets).mean().item() - exact
    assert gaps[0.5] < 0.5 * gaps[None]


def test_qat_from_a_late_fraction_changes_no_earlier_step() -> None:
    never, late = trained(tiny(budget__steps=4)), trained(tiny(budget__steps=4, quantisation__qat_from=0.99))
    early = trained(tiny(budget__steps=4, quantisation__qat_from=0.0))
    assert bits_of(never) == bits_of(late) != bits_of(early)


def test_quantised_weights_and_late_tying_leave_the_pass_one_graph_a_side() -> None:
    spec, counter = tiny(sharing__tying={"from_fraction": 0.5}), CompileCounter()
    model, eager = fresh(spec), fresh(spec)
    model.compile(backend=counter, fullgraph=True, dynamic=False)
    ((tokens, targets),) = Walks(spec).batch(0)
    for fraction in (0.0, 1.0, 0.0, 1.0):
        for each in (model, eager):
            each.progress_to(fraction)
        exact = model(tokens, targets).item()
        assert exact == eager(tokens, targets).item()
        with fake_quantised(model, spec.quantisation), fake_quantised(eager, spec.quantisation):
            assert exact != model(tokens, targets).item() == eager(tokens, targets).item()
    assert counter.frame_count == 2


def find(tree: Any, key: str) -> Any:
    """The value of a key somewhere in plain data."""
    if isinstance(tree, dict):
        return tree[key] if key in tree else next((hit for each in tree.values() if (hit := find(each, key))), None)
    return None
