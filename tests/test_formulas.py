"""Every combination of the model's parts has the inventory's tensors, the literature's arithmetic, and trains."""

from math import sqrt

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from worker.attention import RMS_EPSILON
from worker.inventory import count_parameters, require_compatible, tensor_inventory
from worker.model import Model, initialise
from worker.optim import Optimizer
from worker.shape import ModelConfig
from worker.sharing import LoraConfig, LoraPath, Owner, RepartitionConfig, SharingConfig
from worker.spec import TrialSpec
from worker.tying import TyingConfig
from worker.world import World

Shape = tuple[ModelConfig, SharingConfig]
LONE = World(0, 1, torch.device("cpu"))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """A model and a sharing that go together."""
    layers = draw(st.integers(1, 6))
    blocks = draw(st.integers(1, layers))
    rest = draw(st.lists(st.integers(0, blocks - 1), min_size=layers - blocks, max_size=layers - blocks))
    tying = TyingConfig(
        pattern="explicit",
        map=tuple(draw(st.permutations([*range(blocks), *rest]))),
        from_fraction=draw(st.sampled_from((0.0, 0.5))),
    )
    changes = draw(st.sampled_from(("none", "layer", "mixes", "adapters", "recurrence")))
    owner: Owner = "layer" if changes == "layer" else "block"
    paths: st.SearchStrategy[tuple[LoraPath, ...]] = st.sampled_from((("attention",), ("mlp",), ("mlp", "attention")))
    sharing = SharingConfig(
        virtual_layers=layers,
        unique_blocks=blocks,
        tying=tying,
        lora=LoraConfig(rank=draw(st.integers(0, 3)), paths=draw(paths)),
        scales=owner,
        mixes="layer" if changes == "mixes" else owner,
        adapters=changes == "adapters",
        repeat_embeddings=draw(st.booleans()),
        bounded_recurrence=0.9 if changes == "recurrence" else 0.0,
        unused={"none": ("layer_scales", "adapters"), "layer": ("block_scales",)}.get(changes, ()),
    )
    model = draw(models(sharing))
    orders = draw(repartitions(model))
    sharing = sharing.model_copy(update={"repartition": orders})
    require_compatible(model, sharing)
    return model, sharing


@st.composite
def models(draw: st.DrawFn, sharing: SharingConfig) -> ModelConfig:
    kv_heads, group, half = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = kv_heads * group
    width = heads * half * 2 if heads * half * 2 >= 8 else heads * 8
    rotated = draw(st.sampled_from(range(2, width // heads + 1, 2)))
    skips, values = draw(st.booleans()), draw(st.sampled_from((0, 3)))
    layers = st.lists(st.integers(0, sharing.virtual_layers - 1), min_size=1, unique=True)
    return ModelConfig(
        vocab_size=draw(st.integers(8, 40)),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        query_rank=draw(st.sampled_from((0, 0, 3))),
        mlp_multiple=draw(st.sampled_from((0.5, 1.3, 3.0))),
        activation=draw(st.sampled_from(("relu2", "leaky_relu2", "swiglu"))),
        rope_width=draw(st.sampled_from((None, rotated))),
        rope_train_length=draw(st.sampled_from((None, 5, 50))) if rotated >= 4 else None,
        xsa_last=draw(st.sampled_from((0, 1, 9))),
        attention_gate=draw(st.booleans()),
        ln_scale=draw(st.sampled_from(("none", "block", "first_layer", "layer"))),
        init=draw(st.sampled_from(("uniform", "orthogonal"))),
        unet_skips=skips,
        skip_gates=skips and draw(st.booleans()),
        lanes_from=draw(st.sampled_from((None, *lane_starts(sharing)))),
        bigram_buckets=draw(st.sampled_from((0, 2, 11))),
        bigram_width=draw(st.integers(1, 5)),
        bigram_hash=draw(st.sampled_from(("product", "xor"))),
        smear_gate=draw(st.booleans()),
        smear_place=draw(st.sampled_from(("before_norm", "after_norm", "window"))),
        gate_inputs=draw(st.integers(1, 8)),
        value_embedding_width=values,
        value_embedding_layers=tuple(draw(layers)) if values else (),
    )


def lane_starts(sharing: SharingConfig) -> list[int]:
    """The blocks from which on two lanes are possible."""
    blocks = sharing.tying_map
    if sharing.bounded_recurrence:
        return []
    return [first for first in range(1, sharing.unique_blocks) if min(blocks[blocks.index(first) :]) >= first]


@st.composite
def repartitions(draw: st.DrawFn, model: ModelConfig) -> RepartitionConfig:
    heads, values = draw(st.sampled_from(((True, True), (True, False), (False, True))))
    return RepartitionConfig(
        mode="none" if model.query_rank else draw(st.sampled_from(("none", "fixed", "blended"))),
        heads=heads,
        values=values,
        anchor_heads=draw(st.integers(0, model.kv_heads - 1)) * (model.heads // model.kv_heads),
        encoder_only=draw(st.booleans()),
    )


def scrambled(config: ModelConfig, sharing: SharingConfig) -> Model:
    """A model none of whose parameters is at a special value such as 0 or 1."""
    model, generator = Model(config, sharing), torch.Generator().manual_seed(3)
    initialise(model, 7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def some_tokens(vocab_size: int, sequences: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, vocab_size, (sequences, length), generator=torch.Generator().manual_seed(11))


@settings(max_examples=60)
@given(shapes())
def test_the_models_tensors_are_the_inventorys(shape: Shape) -> None:
    with torch.device("meta"):
        model = Model(*shape)
    tensors = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert tensors == {tensor.name: tensor.shape for tensor in tensor_inventory(*shape)}
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(*shape)


@settings(max_examples=40)
@given(shapes(), st.sampled_from((0.0, 1.0)))
def test_logits_are_what_the_formulas_say(shape: Shape, fraction: float) -> None:
    model, tokens = scrambled(*shape), some_tokens(shape[0].vocab_size)
    model.progress_to(fraction)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(tokens), by_formula(model, tokens).float(), rtol=3e-4, atol=3e-4)


@settings(max_examples=25)
@given(shapes())
def test_every_combination_trains(shape: Shape) -> None:
    model, tokens = Model(*shape), some_tokens(shape[0].vocab_size, length=9)
    initialise(model, 7)
    optimizer = Optimizer(model, TrialSpec(model=model.config, sharing=model.sharing), LONE)
    for step, fraction in enumerate((0.2, 0.7)):
        model.progress_to(fraction)
        model(tokens[:, :-1], tokens[:, 1:], label_smoothing=0.1).backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        optimizer.step(step, 1.0)
        assert all(grad is None for name, grad in grads.items() if name.startswith("unused."))
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert torch.isfinite(model(tokens[:, :-1], tokens[:, 1:]))


def by_formula(model: Model, tokens: Tensor) -> Tensor:
    """The logits in double precision, written out head by head and layer by layer."""
    config, sharing = model.config, model.sharing
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    x = x0 = stem(w, tokens, config)
    running = sharing.layers_at(1.0) if model.running == sharing.layers_at(1.0) else sharing.layers_at(0.0)
    lanes, stack, half = [x], list[Tensor](), len(running) // 2
    for position, layer in enumerate(running):
        block = sharing.tying_map[layer]
        if config.lanes_from is not None and block >= config.lanes_from and len(lanes) == 1:
            lanes = [lanes[0], lanes[0]]
        if config.unet_skips and half <= position < 2 * half:
            skip = w["skip_weights"][position - half] * stack.pop()
            gate = sigmoid(w["skip_gates"][position - half]) if config.skip_gates else None
            lanes[0] = lanes[0] + skip if gate is None else gate * lanes[0] + (1 - gate) * skip
        lanes = advance(w, config, sharing, layer, lanes, x0, tokens)
        if position < half:
            stack.append(lanes[0])
    x = sum(lanes, torch.zeros_like(x0)) / len(lanes)
    return config.logit_softcap * torch.tanh(norm(x) @ w["embedding.weight"].T / config.logit_softcap)


def stem(w: dict[str, Tensor], tokens: Tensor, config: ModelConfig) -> Tensor:
    x = w["embedding.weight"][tokens]
    if config.bigram_buckets:
        rows = [
            [bucket(config, int(p), int(t)) for p, t in zip([-1, *row], row, strict=False)] for row in tokens.tolist()
        ]
        pair = w["bigram.table"][torch.tensor(rows)] @ w["bigram.projection"].T
        x = x + (w["bigram.scale"] * pair if config.bigram_hash == "xor" else pair)
    before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
    if config.smear_gate and config.smear_place == "before_norm":
        keep = sigmoid(w["smear.gate"])
        x = keep * x + (1 - keep) * before
    elif config.smear_gate and config.smear_place == "window":
        share = w["smear.strength"] * sigmoid(x[..., : config.gate_inputs] @ w["smear.weight"])
        x = x + (share * (tokens != 1))[..., None] * before
    x = norm(x)
    if config.smear_gate and config.smear_place == "after_norm":
        take = sigmoid(w["smear.gate"])
        x = (1 - take) * x + take * torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
    return x


def bucket(config: ModelConfig, previous: int, token: int) -> int:
    if config.bigram_hash == "product":
        return (104_729 * max(previous, 0) + token) % config.bigram_buckets
    last = config.bigram_buckets - 1
    return last if previous < 0 else ((36_313 * token) ^ (27_191 * previous)) % last


def advance(
    w: dict[str, Tensor],
    config: ModelConfig,
    sharing: SharingConfig,
    layer: int,
    lanes: list[Tensor],
    x0: Tensor,
    tokens: Tensor,
) -> list[Tensor]:
    """The residual stream, one lane or two, after one virtual layer."""
    block, repeat = sharing.tying_map[layer], torch.zeros_like(x0[0, 0])
    if sharing.repeat_embeddings:
        repeat = w["repeat_embeddings"][layer]

    def attention(u: Tensor) -> Tensor:
        return bypassed(w, sharing, layer, "attention", u, config, attend(w, config, sharing, layer, u, tokens))

    def mlp(u: Tensor) -> Tensor:
        return bypassed(w, sharing, layer, "mlp", u, config, feed(w, block, scaled(u, config, sharing, layer), config))

    if sharing.bounded_recurrence:
        c = torch.softmax(w["recurrence_logits"][layer], dim=0)
        a = attention(lanes[0] + repeat)
        m = mlp(lanes[0] + repeat + a)
        return [c[0] * lanes[0] + c[1] * x0 + sharing.bounded_recurrence * (c[2] * a + c[3] * m)]
    lanes = [lane + repeat for lane in lanes]
    attention_scale, mlp_scale, mix = scales(w, sharing, layer)
    if len(lanes) == 2:
        a = attention_scale * attention(mix[0] * lanes[0] + mix[1] * x0)
        m = mlp_scale * mlp(lanes[1])
        r, p, q = (w[f"lanes.{name}"][block] for name in ("residual", "attention", "mlp"))
        return [r[i] * lanes[i] + p[i] * a + q[i] * m for i in range(2)]
    u = mix[0] * lanes[0] + mix[1] * x0
    u = u + attention_scale * attention(u)
    return [u + mlp_scale * mlp(u)]


def scales(w: dict[str, Tensor], sharing: SharingConfig, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    block = sharing.tying_map[layer]
    own = block if sharing.scales == "block" else layer
    attention, mlp = w["attention_scales"][own], w["mlp_scales"][own]
    mix = w["residual_mixes"][block if sharing.mixes == "block" else layer]
    if not sharing.adapters:
        return attention, mlp, mix
    attention = elu(attention * w["adapters.attention_scales"][layer] - 1) + 1.0001
    mlp = elu(mlp * w["adapters.mlp_scales"][layer] - 1) + 1.0001
    return attention, mlp, mix + w["adapters.residual_mixes"][layer]


def scaled(u: Tensor, config: ModelConfig, sharing: SharingConfig, layer: int) -> Tensor:
    """The input of a sub-layer: the stream, normed, times the layer's scale."""
    block = sharing.tying_map[layer]
    index = {"none": 0, "block": block, "first_layer": sharing.tying_map.index(block), "layer": layer}[config.ln_scale]
    return norm(u) / sqrt(index + 1)


def bypassed(
    w: dict[str, Tensor], sharing: SharingConfig, layer: int, path: LoraPath, u: Tensor, config: ModelConfig, y: Tensor
) -> Tensor:
    if not sharing.lora.rank or path not in sharing.lora.paths:
        return y
    n, gamma = scaled(u, config, sharing, layer), sigmoid(w[f"lora.{path}.gate_logits"][layer])
    return y + gamma * (n @ w[f"lora.{path}.down"][layer]) @ w[f"lora.{path}.up"][layer]


def feed(w: dict[str, Tensor], block: int, n: Tensor, config: ModelConfig) -> Tensor:
    z = n @ w[f"blocks.{block}.mlp.up"].T
    if config.activation == "swiglu":
        gate = n @ w[f"blocks.{block}.mlp.gate"].T
        hidden = gate * sigmoid(gate) * z
    else:
        hidden = torch.where(z > 0, z * z, 0.0 if config.activation == "relu2" else 0.25 * z * z)
    return hidden @ w[f"blocks.{block}.mlp.down"].T


def attend(
    w: dict[str, Tensor], config: ModelConfig, sharing: SharingConfig, layer: int, u: Tensor, tokens: Tensor
) -> Tensor:
    block, size, n = sharing.tying_map[layer], config.head_width, scaled(u, config, sharing, layer)
    name = f"blocks.{block}.attention"
    group = config.heads // config.kv_heads
    key, value = (n @ w[f"{name}.{kind}"].T for kind in ("key", "value"))
    query = n @ w[f"{name}.query_in"].T @ w[f"{name}.query_out"].T if config.query_rank else n @ w[f"{name}.query"].T
    query, key = reordered(w, config, sharing, layer, n, query, key)
    if layer in config.value_embedding_layers:
        added = w["value_embedding.table"][tokens] @ w["value_embedding.projection"].T * w["value_embedding.scale"]
        value = value + added * w["value_embedding.layer_scales"][config.value_embedding_layers.index(layer)]
    gain = w[f"{name}.gain"]
    if sharing.adapters:
        gain = (torch.log(1 + torch.exp(4 * gain * w["adapters.gains"][layer])) / 4).clamp(min=1e-4)
    heads = []
    for head in range(config.heads):
        mine, shared = slice(head * size, (head + 1) * size), slice(head // group * size, (head // group + 1) * size)
        q, k, v = (
            turned(norm(query[..., mine]), config) * gain[head],
            turned(norm(key[..., shared]), config),
            value[..., shared],
        )
        future = torch.ones(n.shape[1], n.shape[1], dtype=torch.bool).triu(1)
        y = torch.softmax((q @ k.mT / size**0.5).masked_fill(future, -torch.inf), dim=-1) @ v
        if layer >= sharing.virtual_layers - config.xsa_last:
            along = v / v.norm(dim=-1, keepdim=True)
            y = y - (y * along).sum(dim=-1, keepdim=True) * along
        if config.attention_gate:
            y = y * sigmoid(n[..., : config.gate_inputs] @ w[f"{name}.head_gate"][head] / 2)[..., None]
        heads.append(y)
    return torch.cat(heads, dim=-1) @ w[f"{name}.output"].T


def reordered(
    w: dict[str, Tensor], config: ModelConfig, sharing: SharingConfig, layer: int, n: Tensor, query: Tensor, key: Tensor
) -> tuple[Tensor, Tensor]:
    order, width, rotated = sharing.repartition, config.head_width, config.rotated_width
    if order.mode == "none" or (order.encoder_only and layer >= sharing.virtual_layers // 2):
        return query, key
    generator = torch.Generator().manual_seed(order.seed + 1009 * layer)
    pairs = torch.randperm(rotated // 2, generator=generator)
    rest = torch.randperm(width - rotated, generator=generator) + rotated
    within = torch.cat((pairs, pairs + rotated // 2, rest)) if order.values else torch.arange(width)
    results = []
    for x, heads in ((query, config.heads), (key, config.kv_heads)):
        anchored = order.anchor_heads * heads // config.heads
        moved = torch.randperm(heads - anchored, generator=generator) + anchored
        sources = moved if order.heads else torch.arange(anchored, heads)
        split = x.view(*x.shape[:2], heads, width)
        result = torch.cat((split[..., :anchored, :], split[..., sources, :][..., within]), dim=-2).flatten(-2)
        if order.mode == "blended":
            name = f"blocks.{sharing.tying_map[layer]}.attention"
            p = sigmoid(n @ w[f"{name}.blend_weight"].T + w[f"{name}.blend_bias"])
            result = p * x + (1 - p) * result
        results.append(result)
    return results[0], results[1]


def turned(x: Tensor, config: ModelConfig) -> Tensor:
    length, rotated, base = x.shape[1], config.rotated_width, config.rope_base
    if config.rope_train_length is not None and length > config.rope_train_length:
        base *= (length / config.rope_train_length) ** (rotated / (rotated - 2))
    half, turned = rotated // 2, x.clone()
    for i in range(half):
        angle = torch.arange(length, dtype=torch.float64) * base ** (-2 * i / rotated)
        a, b = x[..., i], x[..., half + i]
        turned[..., i], turned[..., half + i] = a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()
    return turned


def norm(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + RMS_EPSILON)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def elu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.exp(x) - 1)
