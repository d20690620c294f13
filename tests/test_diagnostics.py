"""Diagnostics: what they measure, by models of which the answer is known."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from worker.diagnostics import block_influence, contraction, diagnose, quantisation_loss, scale_spread
from worker.evaluate import Validation, evaluate
from worker.inventory import tensor_inventory
from worker.model import Model, initialise
from worker.scoring import EvaluationConfig
from worker.shape import ModelConfig
from worker.shards import Tokens, TokenStream
from worker.sharing import LoraConfig, SharingConfig
from worker.spec import TrialSpec, override, parse_spec
from worker.tokenizer import ByteTable
from worker.tying import TyingConfig
from worker.world import World

ALONE = World(0, 1, torch.device("cpu"))
CONFIG = ModelConfig(vocab_size=16, width=8, heads=2, kv_heads=1, embedding_init_std=0.5, unet_skips=False)
BY_LAYER = SharingConfig(virtual_layers=3, unique_blocks=1, scales="layer", mixes="layer")


class Text(TokenStream):
    """257 tokens in memory, and how often a window of them was read."""

    def __init__(self) -> None:
        self.tokens = np.random.default_rng(1).integers(0, 16, 257)
        self.reads = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, count: int) -> Tokens:
        self.reads += 1
        return self.tokens[start : start + count]


def make_validation() -> Validation:
    return Validation(Text(), ByteTable(np.full(16, 2), np.zeros(16, np.bool_), np.zeros(16, np.bool_)), 16, 4)


def make_model(sharing: SharingConfig = BY_LAYER) -> Model:
    model = Model(CONFIG, sharing)
    initialise(model, 3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("output", "down", "up")):  # some start at zero, and sub-layers then do nothing
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) / 3)
    return model


def without_sublayers(*mixes: Tensor | float) -> Model:
    """A model whose virtual layers only multiply the stream, each by its mix."""
    model = make_model()
    with torch.no_grad():
        model.attention_scales.zero_()
        model.mlp_scales.zero_()
        for layer, mix in enumerate(mixes):
            model.residual_mixes[layer, 0] = mix
    return model


def batch() -> tuple[Tensor, Tensor, int]:
    validation = make_validation()
    tokens, targets = validation.read(validation.windows()[:3])
    return tokens, targets, 2 * targets.numel()


def test_block_influence_is_the_angle_by_which_a_layer_turns_the_stream() -> None:
    half = torch.tensor([1.0, -1.0]).repeat(4)
    model = without_sublayers(3.0, -2.0, half)
    tokens, _, _ = batch()
    entering = model.states(tokens)[2].detach().double().flatten(0, 1)  # (N, D)
    angles = [math.acos(float(x @ (half * x)) / float(x @ x)) / math.pi for x in entering]
    assert block_influence(model, tokens) == pytest.approx([0, 1, sum(angles) / len(angles)], abs=1e-6)


def test_block_influence_has_a_value_for_each_layer_that_runs() -> None:
    model = make_model(BY_LAYER.model_copy(update={"tying": TyingConfig(from_fraction=0.5)})).train()
    tokens, _, _ = batch()
    influence = block_influence(model, tokens)
    assert all(0 < angle < 1 for angle in influence)
    model.progress_to(0.2)
    assert (len(influence), len(block_influence(model, tokens))) == (3, 1)
    assert model.training


def test_scale_spread_is_the_deviation_over_the_layers_that_own_them() -> None:
    model = make_model()
    with torch.no_grad():
        model.attention_scales[2] = 4.0
        model.residual_mixes[0, 1] = 3.0
    assert scale_spread(model) == pytest.approx({"attention": math.sqrt(2), "mlp": 0, "mix": math.sqrt(2) / 2})


def test_scale_spread_leaves_out_what_blocks_own() -> None:
    assert scale_spread(make_model(SharingConfig(virtual_layers=2, unique_blocks=2))) == {}
    assert scale_spread(make_model(SharingConfig(virtual_layers=2, unique_blocks=1, bounded_recurrence=0.9))) == {}


def test_scale_spread_is_of_the_values_that_adapters_make() -> None:
    model = make_model(SharingConfig(virtual_layers=2, unique_blocks=1, adapters=True))
    assert scale_spread(model) == pytest.approx({"attention": 0, "mlp": 0, "mix": 0, "gain": 0})
    assert model.adapters is not None
    with torch.no_grad():
        model.attention_scales.fill_(2.0)
        model.adapters.attention_scales[1] = 3.0  # 2 and 6
        model.adapters.mlp_scales[1] = 0.5  # 1 and e^-0.5
        model.adapters.residual_mixes[1] = 1.0
        model.adapters.gains[1] = 20.0  # 1.5 with softplus, and 30
    softplus = math.log1p(math.exp(4 * 1.5)) / 4
    expected = {"attention": 2, "mlp": (1 - math.exp(-0.5)) / 2, "mix": 0.5, "gain": (30 - softplus) / 2}
    assert scale_spread(model) == pytest.approx(expected, rel=1e-4)


def test_contraction_is_how_far_each_cycle_moves_the_stream() -> None:
    tokens, targets, text_bytes = batch()
    halving = contraction(without_sublayers(1.0, 1.0, 0.5), tokens, targets, text_bytes, 3)
    assert halving["changes"] == pytest.approx([0.5, 0.5, 0.5])
    assert halving["bpb"] == pytest.approx([halving["bpb"][0]] * 4, rel=1e-4)  # the norm undoes it


def test_contraction_starts_at_the_models_own_score() -> None:
    model, (tokens, targets, text_bytes) = make_model().train(), batch()
    report = contraction(model, tokens, targets, text_bytes, 2)
    losses = model.token_losses(tokens, targets).detach()
    assert report["bpb"][0] == pytest.approx(float(losses.sum()) / math.log(2) / text_bytes, rel=1e-6)
    assert len(report["bpb"]) == 3
    assert len(report["changes"]) == 2
    assert model.training


def test_a_contraction_that_blows_up_is_reported_without_numbers() -> None:
    tokens, targets, text_bytes = batch()
    report = contraction(without_sublayers(1.0, 1.0, 1e30), tokens, targets, text_bytes, 2)
    assert report["changes"][-1] is None
    assert report["bpb"][-1] is None
    assert report["bpb"][0] is not None


def rounded(model: Model) -> Model:
    """The model as a coarse artifact would have it."""
    loaded = copy.deepcopy(model)
    with torch.no_grad():
        for weight in loaded.parameters():
            weight.copy_((weight / 0.3).round() * 0.3)
    return loaded


def test_quantisation_loss_is_that_of_one_class_alone() -> None:
    validation = make_validation()
    sharing = BY_LAYER.model_copy(update={"lora": LoraConfig(rank=2)})
    model = make_model(sharing)
    loaded, before = rounded(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def bpb(scored: Model) -> float:
        return evaluate(scored, validation, ALONE).bpb

    losses = quantisation_loss(model, loaded, lambda: bpb(model))
    classes = {tensor.name: tensor.tensor_class for tensor in tensor_inventory(CONFIG, sharing)}
    assert set(losses) == {"embedding", "attention", "mlp", "lora", "control"}
    for tensor_class, lost in losses.items():
        mixed = copy.deepcopy(model)
        mixed.load_state_dict(
            {
                name: loaded.state_dict()[name] if classes[name] == tensor_class else tensor
                for name, tensor in before.items()
            }
        )
        assert lost == bpb(mixed) - bpb(model) != 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_whose_score_fails_is_whole_again() -> None:
    model = make_model()
    loaded, before, calls = rounded(model), model.embedding.weight.clone(), []

    def fail_when_replaced() -> float:
        calls.append(torch.equal(model.embedding.weight, before))
        if not calls[-1]:
            raise ArithmeticError("diverged")
        return 1.0

    with pytest.raises(ArithmeticError, match="diverged"):
        quantisation_loss(model, loaded, fail_when_replaced)
    assert calls == [True, False]
    assert torch.equal(model.embedding.weight, before)


def make_spec(**changes: object) -> TrialSpec:
    base = {
        "model": CONFIG.model_dump(),
        "sharing": {"virtual_layers": 3, "unique_blocks": 1, "scales": "layer", "lora": {"rank": 2}},
        "data": {"sequence_length": 16, "batch_tokens": 64},
    }
    return parse_spec(override(base, changes))


def test_all_diagnostics_are_plain_data() -> None:
    spec, validation = make_spec(**{"evaluation.extra_recurrence": 2}), make_validation()
    model = make_model(spec.sharing)
    diagnostics = diagnose(model, rounded(model), spec, validation, ALONE)
    assert json.loads(json.dumps(diagnostics, allow_nan=False)) == diagnostics
    assert set(diagnostics) == {"gammas", "block_influence", "scale_spread", "quantisation_loss", "contraction"}
    assert diagnostics["gammas"] == model.gammas()
    assert len(diagnostics["block_influence"]) == 3
    assert len(diagnostics["contraction"]["changes"]) == 2


def test_without_a_tied_block_there_is_no_contraction() -> None:
    untied = {"sharing.unique_blocks": 3, "evaluation.extra_recurrence": 2}
    spec = make_spec(**untied)
    model = make_model(spec.sharing)
    assert "contraction" not in diagnose(model, rounded(model), spec, make_validation(), ALONE)


def test_diagnostics_read_no_more_of_the_text_than_the_spec_says() -> None:
    spec, validation = make_spec(**{"evaluation.validation_tokens": 32}), make_validation()
    model = make_model(spec.sharing)
    diagnostics = diagnose(model, rounded(model), spec, validation, ALONE)
    assert len(diagnostics["contraction"]["changes"]) == EvaluationConfig().extra_recurrence
    assert isinstance(validation.stream, Text)
    assert validation.stream.reads == 2 * (1 + 1 + len(diagnostics["quantisation_loss"]))
