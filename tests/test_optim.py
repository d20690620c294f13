"""The optimizers: groups, Muon's update by its published formula, decays, and the proximal step."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from worker.model import Model, initialise
from worker.optim import (
    NEWTON_SCHULZ,
    NEWTON_SCHULZ_BY_ITERATION,
    Muon,
    Optimizer,
    orthogonalise,
    parameter_groups,
    shrink_singular_values,
)
from worker.qat import quantised_parameters
from worker.shape import FieldError
from worker.spec import OptimizerConfig, TrialSpec, override, parse_spec
from worker.world import World

ALONE = World(0, 1, torch.device("cpu"))
TINY: dict[str, Any] = {
    "sharing": {"virtual_layers": 4, "unique_blocks": 2, "lora": {"rank": 2}},
    "model": {"vocab_size": 64, "width": 16, "heads": 4, "kv_heads": 2, "bigram_buckets": 50},
    "data": {"sequence_length": 16, "batch_tokens": 128},
    "quantisation": {"half_below": 64},
}
FIVE = (NEWTON_SCHULZ,) * 5


def tiny(**changes: Any) -> TrialSpec:
    return parse_spec(override(TINY, {path.replace("__", "."): value for path, value in changes.items()}))


def fresh(spec: TrialSpec) -> Model:
    model = Model(spec.model, spec.sharing)
    initialise(model, spec.seed)
    return model


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_trained_parameter_is_in_one_group_and_matrices_are_muons() -> None:
    spec = tiny(
        sharing__unused=["layer_scales"],
        sharing__repartition={"mode": "blended"},
        model__attention_gate=True,
        model__activation="swiglu",
        model__value_embedding_width=4,
        model__value_embedding_layers=[1, 3],
    )
    model = fresh(spec)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group: {names[id(p)] for p in parameters} for group, parameters in parameter_groups(model).items()}
    unused = {name for name in names.values() if name.startswith("unused.")}
    assert unused
    assert sum(map(len, groups.values())) == len(names) - len(unused)
    assert all(unused.isdisjoint(names) for names in groups.values())
    assert groups["embedding"] == {"embedding.weight"}
    assert groups["table"] == {"bigram.table", "value_embedding.table"}
    attention = ("query", "key", "value", "output", "blend_weight")
    matrices = [f"attention.{name}" for name in attention] + ["mlp.gate", "mlp.up", "mlp.down"]
    blocks = {f"blocks.{block}.{matrix}" for block in range(2) for matrix in matrices}
    assert groups["matrix"] == {"bigram.projection", "value_embedding.projection"} | blocks
    scalars = {"lora.mlp.down", "lora.mlp.gate_logits", "blocks.1.attention.gain", "blocks.1.attention.head_gate"}
    assert scalars <= groups["scalar"]


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 32, 16), (2, 8, 40)])
def test_muon_orthogonalises(shape: tuple[int, int, int]) -> None:
    matrices = noise(*shape)
    result = orthogonalise(matrices, 2 * FIVE)
    found = torch.linalg.svdvals(result)
    assert 0.6 < found.min().item() <= found.max().item() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    cosines = torch.linalg.vecdot(result.flatten(1), (u @ v).flatten(1))
    lengths = result.flatten(1).norm(dim=1) * (u @ v).flatten(1).norm(dim=1)
    assert (cosines / lengths).min().item() > 0.97  # the nearest orthogonal matrix, not just any


def test_five_polynomials_of_their_own_orthogonalise_more_closely_than_one_five_times() -> None:
    def error(polynomials: tuple[tuple[float, float, float], ...]) -> float:
        return float((torch.linalg.svdvals(orthogonalise(noise(4, 16, 48), polynomials)) - 1).abs().max())

    assert error(NEWTON_SCHULZ_BY_ITERATION) < 0.5 * error(FIVE)


def test_a_zero_gradient_moves_no_matrix() -> None:
    assert not orthogonalise(torch.zeros(2, 4, 6), FIVE).any()


@pytest.mark.parametrize("row_normalise", [False, True])
@pytest.mark.parametrize("coefficients", ["constant", "per_iteration"])
def test_muons_step_is_the_published_one(row_normalise: bool, coefficients: Any) -> None:
    config = OptimizerConfig(
        matrix_lr=0.1, muon_weight_decay=0.5, row_normalise=row_normalise, muon_coefficients=coefficients
    )
    tall, wide = Parameter(noise(12, 3, seed=1)), Parameter(noise(3, 12, seed=2))
    muon, velocity, expected = Muon([tall, wide], config, ALONE), torch.zeros(12, 3), tall.detach().clone()
    for seed, multiplier in ((3, 1.0), (4, 0.5)):
        tall.grad, wide.grad = noise(12, 3, seed=seed), noise(3, 12, seed=seed)
        velocity = 0.9 * velocity + tall.grad
        update = tall.grad + 0.9 * velocity
        if row_normalise:
            update = update / update.norm(dim=1, keepdim=True)
        x = (update / update.norm()).T
        for a, b, c in FIVE if coefficients == "constant" else NEWTON_SCHULZ_BY_ITERATION:
            x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
        expected = expected * (1 - 0.1 * multiplier * 0.5) - 0.1 * multiplier * 2.0 * x.T  # sqrt(12 / 3)
        muon.step(0.9, multiplier)
        torch.testing.assert_close(tall.detach(), expected, rtol=1e-4, atol=1e-5)


def test_each_matrix_is_one_ranks_and_ranks_share_equal_shapes_evenly() -> None:
    matrices = [Parameter(noise(*shape)) for shape in [(4, 4), (8, 4)] * 4 + [(2, 2)]]
    ranks = [Muon(matrices, OptimizerConfig(), World(rank, 4, ALONE.device)) for rank in range(4)]
    owned = [sorted(index for mine, _ in muon._batches for index in mine) for muon in ranks]
    assert sorted(index for indices in owned for index in indices) == list(range(9))
    assert [sum(matrices[index].shape == (8, 4) for index in indices) for indices in owned] == [1, 1, 1, 1]


def test_five_polynomials_take_five_iterations() -> None:
    with pytest.raises(ValueError, match="must be 5 with muon_coefficients per_iteration") as refused:
        OptimizerConfig(muon_iterations=6, muon_coefficients="per_iteration")
    assert isinstance(refused.value.errors()[0]["ctx"]["error"], FieldError)  # type: ignore[attr-defined]


def with_gradients(model: Model) -> dict[str, Parameter]:
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    return parameters


def test_clipping_bounds_the_gradient_of_everything_at_once() -> None:
    spec = tiny(optimizer__gradient_clip=1e-3)
    model = fresh(spec)
    kept = [parameter.grad for parameter in with_gradients(model).values()]
    Optimizer(model, spec, ALONE).step(0, 0.0)
    norms = [gradient.norm() for gradient in kept if gradient is not None]
    assert torch.stack(norms).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_tables_and_the_embedding_have_rates_and_decays_of_their_own() -> None:
    spec = tiny(
        optimizer__embedding_lr=0.1,
        optimizer__table_lr=0.2,
        optimizer__scalar_lr=0.3,
        optimizer__adam_weight_decay=0.5,
        optimizer__embedding_weight_decay=0.25,
    )
    model = fresh(spec)
    parameters = with_gradients(model)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    Optimizer(model, spec, ALONE).step(0, 0.5)
    for name, rate, decay in [
        ("embedding.weight", 0.1, 0.25), ("bigram.table", 0.2, 0.25), ("attention_scales", 0.3, 0.5)
    ]:  # fmt: skip
        expected = before[name] * (1 - 0.5 * rate * decay) - 0.5 * rate  # Adam's first step is the gradient's sign
        torch.testing.assert_close(parameters[name].detach(), expected)


def test_a_parameter_without_a_gradient_stays_as_it_is() -> None:
    spec = tiny(sharing__unused=["layer_scales"], optimizer={"muon_weight_decay": 0.5, "adam_weight_decay": 0.3})
    model = fresh(spec)
    parameters = with_gradients(model)
    still = {name for name in parameters if name.startswith(("unused.", "lora.mlp.", "blocks.1."))}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for name in still:
        parameters[name].grad = None
    Optimizer(model, spec, ALONE).step(0, 1.0)
    moved = {name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])}
    assert moved == set(parameters) - still


def test_the_proximal_step_shrinks_singular_values_and_drops_the_small_ones() -> None:
    matrix = Parameter(noise(6, 10))
    before = torch.linalg.svdvals(matrix.detach())
    amount = before[3].item()
    shrink_singular_values([matrix], amount)
    torch.testing.assert_close(torch.linalg.svdvals(matrix.detach()), (before - amount).clamp(min=0), atol=1e-5, rtol=0)


def test_the_nuclear_norm_acts_on_quantised_matrices_every_so_many_steps() -> None:
    spec = tiny(objective={"nuclear_norm": 0.2, "nuclear_norm_every": 3})
    model = fresh(spec)
    optimizer = Optimizer(model, spec, ALONE)
    matrices = [matrix for matrix, _ in quantised_parameters(model, spec.quantisation.half_below)]
    assert any(matrix is model.embedding.weight for matrix in matrices)
    values = []
    for step in range(3):  # no gradients: nothing else moves anything
        optimizer.step(step, 0.5)
        values.append(torch.linalg.svdvals(model.state_dict()["blocks.0.attention.query"]))
    assert torch.equal(values[0], values[1])
    torch.testing.assert_close(values[2], (values[1] - 0.1).clamp(min=0), atol=1e-5, rtol=0)
