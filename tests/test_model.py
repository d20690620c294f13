"""The model: its tensors are the inventory's, its arithmetic is the literature's."""

from math import isclose, log

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from worker.attention import RMS_EPSILON
from worker.embedding import Bigram
from worker.model import Model, initialise
from worker.recipes import load_recipe
from worker.shape import ModelConfig
from worker.sharing import LoraConfig, LoraPath, SharingConfig, TyingConfig, count_parameters, tensor_inventory
from worker.spec import parse_spec

TINY = ModelConfig(vocab_size=32, width=16, heads=4, kv_heads=2, bigram_buckets=50, bigram_width=6, smear_gate=True)


@st.composite
def model_configs(draw: st.DrawFn) -> ModelConfig:
    kv_heads, group, half = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = kv_heads * group
    return ModelConfig(
        vocab_size=draw(st.integers(8, 40)),
        width=max(8, heads * half * 2) if heads * half * 2 >= 8 else heads * 8,
        heads=heads,
        kv_heads=kv_heads,
        mlp_multiple=draw(st.sampled_from((0.5, 1.3, 2.0, 3.0))),
        unet_skips=draw(st.booleans()),
        bigram_buckets=draw(st.sampled_from((0, 1, 11))),
        bigram_width=draw(st.integers(1, 5)),
        smear_gate=draw(st.booleans()),
    )


@st.composite
def sharing_configs(draw: st.DrawFn) -> SharingConfig:
    layers = draw(st.integers(1, 6))
    blocks = draw(st.integers(1, layers))
    rest = draw(st.lists(st.integers(0, blocks - 1), min_size=layers - blocks, max_size=layers - blocks))
    owners = st.sampled_from(("block", "layer"))
    paths: st.SearchStrategy[tuple[LoraPath, ...]] = st.sampled_from((("attention",), ("mlp",), ("mlp", "attention")))
    return SharingConfig(
        virtual_layers=layers,
        unique_blocks=blocks,
        tying=TyingConfig(pattern="explicit", map=tuple(draw(st.permutations([*range(blocks), *rest])))),
        lora=LoraConfig(rank=draw(st.integers(0, 3)), paths=draw(paths)),
        scales=draw(owners),
        mixes=draw(owners),
    )


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


@settings(max_examples=60, deadline=None)
@given(model_configs(), sharing_configs())
def test_the_models_tensors_are_the_inventorys(config: ModelConfig, sharing: SharingConfig) -> None:
    with torch.device("meta"):
        model = Model(config, sharing)
    tensors = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert tensors == {tensor.name: tensor.shape for tensor in tensor_inventory(config, sharing)}
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config, sharing)


@pytest.mark.parametrize(
    ("recipe", "parameters"), [("naive-baseline", 17_059_912), ("depth-recurrence", 6_037_528), ("ebls", 29_566_018)]
)
def test_a_recipe_from_the_literature_has_its_published_parameters(recipe: str, parameters: int) -> None:
    spec = parse_spec(load_recipe(recipe))
    with torch.device("meta"):
        model = Model(spec.model, spec.sharing)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert count_parameters(spec.model, spec.sharing) == parameters


@settings(max_examples=25, deadline=None)
@given(model_configs(), sharing_configs())
def test_logits_are_what_the_formulas_say(config: ModelConfig, sharing: SharingConfig) -> None:
    model, tokens = scrambled(sharing, config), some_tokens(vocab_size=config.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(tokens), by_formula(model, tokens).float(), rtol=2e-4, atol=2e-4)


def by_formula(model: Model, tokens: Tensor) -> Tensor:
    """The logits in double precision, written out head by head and layer by layer."""
    config, sharing = model.config, model.sharing
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    length, d = tokens.shape[1], config.width
    x = w["embedding.weight"][tokens]
    if config.bigram_buckets:
        before = torch.cat((torch.zeros_like(tokens[:, :1]), tokens[:, :-1]), dim=1)
        x = x + w["bigram.table"][(104_729 * before + tokens) % config.bigram_buckets] @ w["bigram.projection"].T
    if config.smear_gate:
        keep = 1 / (1 + torch.exp(-w["smear.gate"]))
        x = keep * x + (1 - keep) * torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
    x = x0 = norm(x)
    stack: list[Tensor] = []
    half = sharing.virtual_layers // 2
    for layer, block in enumerate(sharing.tying_map):
        if config.unet_skips and half <= layer < 2 * half:
            x = x + w["skip_weights"][layer - half] * stack.pop()
        mix = w["residual_mixes"][block if sharing.mixes == "block" else layer]
        scale = block if sharing.scales == "block" else layer
        u = mix[0] * x + mix[1] * x0
        for path in ("attention", "mlp"):
            n = norm(u)
            change = attend(w, block, n, config) if path == "attention" else feed(w, block, n)
            if sharing.lora.rank and path in sharing.lora.paths:
                gamma = 1 / (1 + torch.exp(-w[f"lora.{path}.gate_logits"][layer]))
                change = change + gamma * (n @ w[f"lora.{path}.down"][layer]) @ w[f"lora.{path}.up"][layer]
            u = u + w[f"{path}_scales"][scale] * change
        x = u
        if layer < half:
            stack.append(x)
    assert x.shape == (len(tokens), length, d)
    return config.logit_softcap * torch.tanh(norm(x) @ w["embedding.weight"].T / config.logit_softcap)


def norm(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + RMS_EPSILON)


def feed(w: dict[str, Tensor], block: int, n: Tensor) -> Tensor:
    return torch.clamp(n @ w[f"blocks.{block}.mlp.up"].T, min=0) ** 2 @ w[f"blocks.{block}.mlp.down"].T


def attend(w: dict[str, Tensor], block: int, n: Tensor, config: ModelConfig) -> Tensor:
    name, size = f"blocks.{block}.attention", config.head_width
    query, key, value = (n @ w[f"{name}.{kind}"].T for kind in ("query", "key", "value"))
    length, heads = n.shape[1], []
    for head in range(config.heads):
        shared = head // (config.heads // config.kv_heads)
        q = turned(norm(query[..., head * size : (head + 1) * size]), config) * w[f"{name}.gain"][head]
        k = turned(norm(key[..., shared * size : (shared + 1) * size]), config)
        scores = q @ k.mT / size**0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1)
        heads.append(weights @ value[..., shared * size : (shared + 1) * size])
    return torch.cat(heads, dim=-1) @ w[f"{name}.output"].T


def turned(x: Tensor, config: ModelConfig) -> Tensor:
    half = config.head_width // 2
    turned = torch.empty_like(x)
    for i in range(half):
        angle = torch.arange(x.shape[1], dtype=torch.float64) * config.rope_base ** (-2 * i / config.head_width)
        a, b = x[..., i], x[..., half + i]
        turned[..., i], turned[..., half + i] = a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()
    return turned


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
    assert isclose(norm(x).square().mean().item(), 1.0, abs_tol=0.01)
    torch.testing.assert_close(F.rms_norm(x, (64,), eps=RMS_EPSILON), norm(x))


def test_the_model_compiles_as_one_graph() -> None:
    model = scrambled(SharingConfig(virtual_layers=4, unique_blocks=2, lora=LoraConfig(rank=2)))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    tokens = some_tokens()
    torch.testing.assert_close(compiled(tokens[:, :-1], tokens[:, 1:]), model(tokens[:, :-1], tokens[:, 1:]))
