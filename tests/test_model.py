"""The model's parts, one by one, and what it tells of itself. test_formulas.py has their combinations."""

import hashlib
import json
from itertools import pairwise
from math import isclose, log, sqrt
from pathlib import Path

import pytest
import torch
from torch import Tensor

from worker.attention import RMS_EPSILON, rms_norm, rotation_base
from worker.embedding import Bigram
from worker.model import Model, initialise
from worker.projection import observing
from worker.recipes import load_recipe
from worker.repartition import repartitioned
from worker.shape import ModelConfig
from worker.sharing import LoraConfig, RepartitionConfig, SharingConfig
from worker.spec import parse_spec

TINY = ModelConfig(vocab_size=32, width=16, heads=4, kv_heads=2, bigram_buckets=50, bigram_width=6, smear_gate=True)


def built(sharing: SharingConfig, model: ModelConfig = TINY, seed: int = 7) -> Model:
    made = Model(model, sharing)
    initialise(made, seed)
    return made


def scrambled(sharing: SharingConfig, model: ModelConfig = TINY) -> Model:
    """A model none of whose parameters is at a special value such as 0 or 1."""
    made = built(sharing, model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return made


def some_tokens(sequences: int = 2, length: int = 12, vocab_size: int = 32) -> Tensor:
    return torch.randint(0, vocab_size, (sequences, length), generator=torch.Generator().manual_seed(11))


def test_a_tied_layers_gradient_is_the_sum_of_its_untied_copies() -> None:
    tied = scrambled(SharingConfig(virtual_layers=4, unique_blocks=2, scales="layer", mixes="layer"))
    free = Model(TINY, SharingConfig(virtual_layers=4, unique_blocks=4))
    copies = {
        name: tied.state_dict()[name.replace("blocks.2.", "blocks.0.").replace("blocks.3.", "blocks.1.")]
        for name in free.state_dict()
    }
    free.load_state_dict(copies)
    tokens = some_tokens()
    for model in (tied, free):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert torch.equal(tied.logits(tokens), free.logits(tokens))
    gradients = {name: parameter.grad for name, parameter in free.named_parameters()}
    for name, parameter in tied.named_parameters():
        if name.startswith("blocks."):
            block = int(name.split(".")[1])
            first, second = gradients[name], gradients[name.replace(f"blocks.{block}.", f"blocks.{block + 2}.")]
            assert first is not None and second is not None
            torch.testing.assert_close(parameter.grad, first + second, rtol=1e-4, atol=1e-6)


def test_tied_layers_stay_one_tensor_after_a_load() -> None:
    sharing = SharingConfig(virtual_layers=6, unique_blocks=2, lora=LoraConfig(rank=2))
    source, target = scrambled(sharing), built(sharing)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source.logits(some_tokens()), target.logits(some_tokens()))
    assert len(target.blocks) == 2
    assert len({parameter.data_ptr() for parameter in target.parameters()}) == len(list(target.parameters()))


def test_a_bypass_changes_nothing_until_it_has_learned() -> None:
    hard = built(SharingConfig(virtual_layers=4, unique_blocks=2))
    soft = built(SharingConfig(virtual_layers=4, unique_blocks=2, lora=LoraConfig(rank=2)))
    assert not any(name.startswith("lora.") for name in hard.state_dict())
    assert torch.equal(hard.logits(some_tokens()), soft.logits(some_tokens()))
    with torch.no_grad():
        soft.get_parameter("lora.mlp.up")[3].fill_(1.0)
    assert not torch.equal(hard.logits(some_tokens()), soft.logits(some_tokens()))


def test_the_penalty_of_ebls_starts_at_its_published_value() -> None:
    spec = parse_spec(load_recipe("ebls"))
    model = built(spec.sharing)
    assert isclose(model.penalty().item(), 0.0214565, abs_tol=5e-8)
    assert set(model.gammas()) == {"attention", "mlp"}
    assert all(isclose(gamma, 0.1192, abs_tol=5e-5) for gammas in model.gammas().values() for gamma in gammas)
    assert [len(gammas) for gammas in model.gammas().values()] == [9, 9]


def test_a_hard_tie_has_no_penalty_and_no_gammas() -> None:
    model = built(SharingConfig(virtual_layers=2, unique_blocks=1))
    assert model.penalty().item() == 0.0
    assert model.gammas() == {}


@pytest.mark.parametrize(("previous", "token", "bucket"), [(5, 7, 1412), (1, 1023, 3352), (900, 512, 7652)])
def test_a_bigram_falls_into_the_published_bucket(previous: int, token: int, bucket: int) -> None:
    bigram = Bigram(ModelConfig(bigram_buckets=10_240))
    assert bigram.buckets(torch.tensor([[previous, token]])).tolist() == [[previous % 10_240, bucket]]


def test_a_position_never_sees_a_later_token() -> None:
    model = scrambled(SharingConfig(virtual_layers=4, unique_blocks=2, lora=LoraConfig(rank=2)))
    tokens = some_tokens()
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 32
    before, after = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(dim=-1).all()


def test_the_loss_is_the_mean_of_the_token_losses_and_starts_near_uniform() -> None:
    model, tokens = built(SharingConfig(virtual_layers=3, unique_blocks=3)), some_tokens()
    losses = model.token_losses(tokens[:, :-1], tokens[:, 1:])
    assert losses.shape == (2, 11)
    torch.testing.assert_close(losses.mean(), model(tokens[:, :-1], tokens[:, 1:]))
    assert isclose(losses.mean().item(), log(32), abs_tol=0.05)


def test_initial_weights_depend_on_the_seed_and_the_tensor_alone() -> None:
    few = built(SharingConfig(virtual_layers=4, unique_blocks=2), seed=5).state_dict()
    torch.rand(3)  # the global generator plays no part
    more = built(SharingConfig(virtual_layers=6, unique_blocks=3, lora=LoraConfig(rank=2)), seed=5).state_dict()
    other = built(SharingConfig(virtual_layers=4, unique_blocks=2), seed=6).state_dict()
    assert all(torch.equal(tensor, more[name]) for name, tensor in few.items() if name.startswith(("blocks.", "emb")))
    random = ("embedding.weight", "bigram.table", "blocks.0.attention.query", "blocks.1.mlp.up")
    assert not any(torch.equal(few[name], other[name]) for name in random)
    assert not torch.equal(few["blocks.0.mlp.up"], few["blocks.1.mlp.up"])


def test_initial_weights_follow_the_table() -> None:
    config = ModelConfig(vocab_size=512, width=64, heads=4, kv_heads=2, bigram_buckets=999, smear_gate=True)
    sharing = SharingConfig(virtual_layers=4, unique_blocks=2, lora=LoraConfig(rank=8), scales="layer")
    weights = built(sharing, config).state_dict()
    for name in ("query", "key", "value"):
        assert 0.95 / 8 < weights[f"blocks.1.attention.{name}"].abs().max().item() <= 1 / 8
    assert 0.95 / 8 < weights["blocks.0.mlp.up"].abs().max().item() <= 1 / 8
    assert isclose(weights["embedding.weight"].std().item(), 0.005, rel_tol=0.03)
    assert isclose(weights["bigram.table"].std().item(), 0.01, rel_tol=0.03)
    assert isclose(weights["lora.attention.down"].std().item(), 1 / 8, rel_tol=0.05)
    for name, value in {
        "bigram.projection": 0.0, "blocks.0.attention.output": 0.0, "blocks.1.mlp.down": 0.0, "lora.mlp.up": 0.0,
        "lora.mlp.gate_logits": -2.0, "smear.gate": 3.0, "blocks.1.attention.gain": 1.5, "attention_scales": 1.0,
        "mlp_scales": 1.0, "skip_weights": 1.0,
    }.items():  # fmt: skip
        assert torch.equal(weights[name], torch.full_like(weights[name], value)), name
    assert torch.equal(weights["residual_mixes"][:, 0], torch.ones(2, 64))
    assert torch.equal(weights["residual_mixes"][:, 1], torch.zeros(2, 64))


def test_the_norm_does_not_damp_a_small_embedding() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 0.005
    assert isclose(rms_norm(x).square().mean().item(), 1.0, abs_tol=0.01)
    torch.testing.assert_close(rms_norm(x), x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + RMS_EPSILON))


PRISM = SharingConfig(virtual_layers=5, unique_blocks=2, tying="split", adapters=True,
                      repartition=RepartitionConfig(mode="blended"))  # fmt: skip
COMPOSITES = {
    "prism": (
        {"rope_width": 2, "xsa_last": 5, "skip_gates": True, "ln_scale": "layer"},
        PRISM.model_copy(update={"virtual_layers": 3}),
    ),
    "lanes": (
        {"lanes_from": 1, "attention_gate": True, "gate_inputs": 3, "smear_place": "window", "bigram_hash": "xor",
         "value_embedding_width": 4, "value_embedding_layers": (0, 2), "rope_train_length": 8},
        SharingConfig(virtual_layers=3, unique_blocks=2, tying="sequence", lora=LoraConfig(rank=2)),
    ),
    "recurrence": (
        {"query_rank": 4, "activation": "swiglu", "smear_place": "after_norm"},
        SharingConfig(virtual_layers=3, unique_blocks=2, repeat_embeddings=True, bounded_recurrence=0.9),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPOSITES)
def test_the_model_compiles_as_one_graph(name: str) -> None:
    changes, sharing = COMPOSITES[name]
    model = scrambled(sharing, ModelConfig.model_validate({**TINY.model_dump(), **changes}))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    tokens = some_tokens()
    torch.testing.assert_close(compiled(tokens[:, :-1], tokens[:, 1:]), model(tokens[:, :-1], tokens[:, 1:]))


def test_the_loss_gains_the_gates_penalty_and_smoothed_labels() -> None:
    model, tokens = scrambled(SharingConfig(virtual_layers=4, unique_blocks=2, lora=LoraConfig(rank=2))), some_tokens()
    tokens, targets = tokens[:, :-1], tokens[:, 1:]
    penalty = 0.01 * sum(sum(gammas) for gammas in model.gammas().values())
    assert isclose(model.penalty().item(), penalty, rel_tol=1e-6)
    plain, logits = model.token_losses(tokens, targets).mean(), model.logits(tokens)
    torch.testing.assert_close(model(tokens, targets), plain + penalty)
    uniform = -logits.log_softmax(dim=-1).mean()
    torch.testing.assert_close(model(tokens, targets, label_smoothing=0.1), 0.9 * plain + 0.1 * uniform + penalty)


@pytest.mark.parametrize(("encoder_only", "applications"), [(False, 5), (True, 2)])
def test_every_blend_pulls_its_mean_share_to_a_half(encoder_only: bool, applications: int) -> None:
    repartition = RepartitionConfig(mode="blended", encoder_only=encoder_only, blend_penalty=3.0)
    model, tokens = built(PRISM.model_copy(update={"repartition": repartition})), some_tokens()
    tokens, targets = tokens[:, :-1], tokens[:, 1:]
    plain = model.token_losses(tokens, targets).mean()
    torch.testing.assert_close(model(tokens, targets), plain)
    with torch.no_grad():
        for block in range(2):
            model.get_parameter(f"blocks.{block}.attention.blend_bias").fill_(2.0)
    penalty = 3.0 * applications * (torch.tensor(2.0).sigmoid() - 0.5) ** 2
    torch.testing.assert_close(model(tokens, targets) - model.token_losses(tokens, targets).mean(), penalty)


def test_late_tying_runs_each_block_once_and_then_all_layers() -> None:
    late = SharingConfig.model_validate(
        {"virtual_layers": 6, "unique_blocks": 3, "scales": "layer",
         "tying": {"pattern": "loop", "start": 1, "end": 1, "passes": 4, "from_fraction": 0.35}}
    )  # fmt: skip
    model, plain, tokens = scrambled(late), built(SharingConfig(virtual_layers=3, unique_blocks=3)), some_tokens()
    weights = model.state_dict()
    first = {name: weights[name][[0, 1, 5]] for name in ("attention_scales", "mlp_scales")}
    plain.load_state_dict({**weights, **first, "skip_weights": weights["skip_weights"][:1]})
    tied = model.logits(tokens)
    model.progress_to(0.34)
    assert len(model.states(tokens)) == 4
    torch.testing.assert_close(model.logits(tokens), plain.logits(tokens))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    gradient = model.attention_scales.grad
    assert gradient is not None
    assert [bool(row.any()) for row in gradient] == [True, True, False, False, False, True]
    model.progress_to(0.35)
    assert len(model.states(tokens)) == 7
    assert torch.equal(model.logits(tokens), tied)


def test_states_run_from_the_stem_to_the_head() -> None:
    model, tokens = scrambled(SharingConfig(virtual_layers=4, unique_blocks=2)), some_tokens()
    states = model.states(tokens)
    assert [state.shape for state in states] == [(2, 12, 16)] * 5
    head = rms_norm(states[-1]) @ model.embedding.weight.T
    torch.testing.assert_close(torch.tanh(head / 30) * 30, model.logits(tokens))
    short = scrambled(SharingConfig(virtual_layers=2, unique_blocks=2), TINY.model_copy(update={"unet_skips": False}))
    short.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(short.states(tokens), states[:3])


@pytest.mark.parametrize(("tying", "depths"), [("cycle", (6, 8)), ("tail", (5, 6))])
def test_another_cycle_is_a_deeper_model(tying: str, depths: tuple[int, int]) -> None:
    config = TINY.model_copy(update={"unet_skips": False})
    model = scrambled(SharingConfig.model_validate({"virtual_layers": 4, "unique_blocks": 2, "tying": tying}), config)
    tokens, targets = some_tokens()[:, :-1], some_tokens()[:, 1:]
    losses, changes = model.deepened(tokens, targets, 2)
    assert torch.equal(losses[0], model.token_losses(tokens, targets))
    states = [model.states(tokens)[-1]]
    for depth, layers in enumerate(depths, 1):
        sharing = SharingConfig.model_validate({"virtual_layers": layers, "unique_blocks": 2, "tying": tying})
        deeper = built(sharing, config)
        deeper.load_state_dict(model.state_dict())
        torch.testing.assert_close(losses[depth], deeper.token_losses(tokens, targets))
        states.append(deeper.states(tokens)[-1])
    expected = [(after - before).norm() / before.norm() for before, after in pairwise(states)]
    torch.testing.assert_close(changes, torch.stack(expected))


def test_a_model_without_tied_blocks_has_nothing_to_repeat() -> None:
    model = built(SharingConfig(virtual_layers=2, unique_blocks=2))
    with pytest.raises(ValueError, match="nothing to repeat"):
        model.deepened(some_tokens(), some_tokens(), 1)


def test_the_orders_are_the_published_ones(shared: Path) -> None:
    expected = json.loads((shared / "reference" / "expected.json").read_text())["functional_checks"][
        "prism_permutation"
    ]
    config = ModelConfig(vocab_size=8192, rope_width=16)
    sharing = SharingConfig(virtual_layers=11, unique_blocks=2, repartition=RepartitionConfig(mode="fixed"))
    rows = repartitioned(config, sharing)
    tables = {"q": rows[:, :512], "k": rows[:, 512:768] - 512}
    assert torch.equal(rows[:, 768:], torch.arange(768, 1024).expand(11, -1))
    for name, table in tables.items():
        assert table[0, :8].tolist() == expected[f"{name}_layer0_first8"]
        heads = {str(layer): (table[layer, ::64] // 64).tolist() for layer in (0, 1, 10)}
        assert heads == expected[f"{name}_head_order"]
        digest = hashlib.sha256(table.contiguous().numpy().astype("<i8").tobytes()).hexdigest()
        assert digest.startswith(expected[f"{name}_table_sha256_prefix_int64_le"])


def test_an_anchored_head_stays_and_each_option_moves_its_part_alone() -> None:
    def rows(**options: object) -> Tensor:
        repartition = RepartitionConfig.model_validate({"mode": "fixed", **options})
        sharing = SharingConfig(virtual_layers=3, unique_blocks=3, repartition=repartition)
        return repartitioned(ModelConfig(rope_width=16), sharing)

    everything, place = rows(), torch.arange(1024)
    anchored = rows(anchor_heads=4)
    assert torch.equal(anchored[:, :256], place[:256].expand(3, -1))
    assert torch.equal(anchored[:, 512:640], place[512:640].expand(3, -1))
    assert torch.equal(anchored.sort().values, place.expand(3, -1))
    assert (anchored[:, 256:512] != place[256:512]).any(dim=1).all()
    assert torch.equal(rows(values=False) // 64, everything // 64)
    assert torch.equal(rows(values=False) % 64, place.expand(3, -1) % 64)
    assert torch.equal(rows(heads=False) // 64, place.expand(3, -1) // 64)
    assert torch.equal(rows(heads=False)[:, :512] % 64, everything[:, :512] % 64)


def test_the_published_rotation_of_longer_sequences() -> None:
    config = ModelConfig(rope_width=16, rope_train_length=1024)
    assert isclose(rotation_base(config, 2048), 22_081.790273, abs_tol=1e-6)
    assert rotation_base(config, 1024) == 10_000


@pytest.mark.parametrize(
    ("buckets", "previous", "token", "bucket"),
    [(2048, 5, 7, 1082), (2048, 1, 1023, 752), (2048, 900, 512, 313), (4096, 5, 7, 1051), (10_240, 5, 7, 5128)],
)
def test_an_exclusive_or_falls_into_the_published_bucket(buckets: int, previous: int, token: int, bucket: int) -> None:
    bigram = Bigram(ModelConfig(bigram_buckets=buckets, bigram_hash="xor"))
    assert bigram.buckets(torch.tensor([[previous, token]])).tolist() == [[buckets - 1, bucket]]


def test_what_prism_allocates_and_never_applies() -> None:
    sharing = SharingConfig(virtual_layers=11, unique_blocks=1, unused=("adapters", "skips"))
    with torch.device("meta"):
        model = Model(ModelConfig(vocab_size=8192, unet_skips=False), sharing)
    assert sum(parameter.numel() for parameter in model.unused.parameters()) == 27_736
    tiny = built(sharing, TINY.model_copy(update={"unet_skips": False}))
    tiny(some_tokens(), some_tokens()).backward()
    assert all(parameter.grad is None for parameter in tiny.unused.parameters())
    with torch.no_grad():
        before = tiny.logits(some_tokens())
        for parameter in tiny.unused.parameters():
            parameter.fill_(7.0)
    assert torch.equal(tiny.logits(some_tokens()), before)


@pytest.mark.parametrize("init", ["uniform", "orthogonal"])
def test_the_initial_weights_of_later_systems_follow_the_table(init: str) -> None:
    config = ModelConfig.model_validate(
        {"vocab_size": 512, "width": 128, "heads": 2, "kv_heads": 1, "init": init, "activation": "swiglu",
         "bigram_buckets": 99, "bigram_width": 64, "bigram_hash": "xor", "smear_gate": True, "smear_place": "window",
         "value_embedding_width": 64, "value_embedding_layers": [1], "attention_gate": True, "lanes_from": 1,
         "skip_gates": True}
    )  # fmt: skip
    model = built(PRISM.model_copy(update={"repeat_embeddings": True}), config)
    weights = model.state_dict()
    for name, value in {
        "bigram.scale": 0.05, "value_embedding.scale": 0.1, "value_embedding.layer_scales": 1.0, "smear.weight": 0.0,
        "smear.strength": 0.0, "lanes.residual": 1.1, "lanes.attention": 1.0, "lanes.mlp": 1.0, "skip_gates": 0.0,
        "adapters.attention_scales": 1.0, "adapters.residual_mixes": 0.0, "adapters.gains": 1.0,
        "repeat_embeddings": 0.0, "blocks.0.attention.head_gate": 0.0, "blocks.1.attention.blend_weight": 0.0,
        "blocks.0.mlp.down": 0.0,
    }.items():  # fmt: skip
        assert torch.equal(weights[name], torch.full_like(weights[name], value)), name
    assert isclose(weights["value_embedding.table"].std().item(), 0.01, rel_tol=0.05)
    orthogonal = {"blocks.0.attention.query": 1.0, "blocks.1.attention.key": 1.0, "blocks.1.mlp.gate": 1.0,
                  "bigram.projection": 1 / sqrt(10), "value_embedding.projection": 1 / sqrt(10)}  # fmt: skip
    for name, gain in orthogonal.items():
        scales = torch.linalg.svdvals(weights[name])
        assert torch.allclose(scales, torch.full_like(scales, gain), atol=1e-5) == (init == "orthogonal"), name
    model(some_tokens(), some_tokens()).backward()
    learns = [model.get_parameter(f"bigram.{part}").grad for part in ("table", "projection")]
    assert any(bool(gradient.any()) for gradient in learns if gradient is not None)


def test_what_enters_each_matrix_can_be_observed() -> None:
    config = ModelConfig.model_validate(
        {**TINY.model_dump(), "query_rank": 4, "activation": "swiglu", "value_embedding_width": 3,
         "value_embedding_layers": [2]}
    )  # fmt: skip
    model, tokens = scrambled(SharingConfig(virtual_layers=4, unique_blocks=2, tying="tail"), config), some_tokens()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    entered: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        with observing(lambda weight, x: entered.setdefault(names[id(weight)], []).append(x)):
            model.logits(tokens)
        model.logits(tokens)
    matrices = ("query_in", "query_out", "key", "value", "output")
    parts = [f"attention.{name}" for name in matrices] + [f"mlp.{name}" for name in ("gate", "up", "down")]
    once = {"embedding.weight", "bigram.projection", "value_embedding.projection"}
    assert {name: len(inputs) for name, inputs in entered.items()} == {
        **{f"blocks.0.{part}": 1 for part in parts},
        **{f"blocks.1.{part}": 3 for part in parts},
        **dict.fromkeys(once, 1),
    }
    assert all(x.shape[-1] == model.get_parameter(name).shape[1] for name, inputs in entered.items() for x in inputs)
    torch.testing.assert_close(entered["embedding.weight"][0], rms_norm(model.states(tokens)[-1]))
