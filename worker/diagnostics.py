"""What a trained model shows of its sharing and its storage, as plain data. For reports: nothing is chosen by it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import isfinite, log, pi
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.evaluate import Validation, evaluate, scoring
from worker.inventory import TensorClass, tensor_inventory
from worker.model import Model
from worker.spec import TrialSpec
from worker.world import World

MOST_TOKENS = 1 << 21  # enough for a thousandth of a bit; all of FineWeb's, a dozen times over, would take minutes


def diagnose(model: Model, loaded: Model, spec: TrialSpec, validation: Validation, world: World) -> dict[str, Any]:
    """All diagnostics of the trained model, given the one loaded back from its artifact. Every rank takes part.

    On plain windows of at most `diagnosed_tokens` tokens: the quantisation losses on all of them, the
    others on one batch. Both models are afterwards what they were.
    """
    limit = diagnosed_tokens(spec)
    batch = validation.windows(token_limit=min(limit, validation.batch_sequences * validation.sequence_length))
    tokens, targets = validation.read(batch)  # (B, T)
    text_bytes = int(validation.table.cost(tokens.numpy(), targets.numpy()).sum())
    tokens, targets = tokens.to(world.device), targets.to(world.device)
    diagnostics: dict[str, Any] = {
        "gammas": model.gammas(),
        "block_influence": block_influence(model, tokens),
        "scale_spread": scale_spread(model),
        "quantisation_loss": quantisation_loss(model, loaded, lambda: evaluate(model, validation, world, limit).bpb),
    }
    cycles, sharing = spec.evaluation.extra_recurrence, model.sharing
    if cycles and sharing.unique_blocks < sharing.virtual_layers:  # otherwise no block is tied, and none runs again
        diagnostics["contraction"] = contraction(model, tokens, targets, text_bytes, cycles)
    return diagnostics


def diagnosed_tokens(spec: TrialSpec) -> int:
    """Validation tokens that diagnostics read at most: as many as intermediate scores, up to MOST_TOKENS."""
    return min(spec.evaluation.validation_tokens or MOST_TOKENS, MOST_TOKENS)


def block_influence(model: Model, tokens: Tensor) -> list[float]:
    """By running virtual layer: the mean over tokens (B, T) of arccos(cos(x, x')) / π, x its input and x' its output.

    0 for a layer that turns no token, 1 for one that turns all about. The angle is that of Gromov et al. (2024), taken
    there of the last token; the Block Influence of ShortGPT (Men et al., 2024) is the mean of 1 - cos.
    """
    with scoring(model):
        return [_angle(before, after) / pi for before, after in pairwise(model.states(tokens))]


def scale_spread(model: Model) -> dict[str, float]:
    """How far apart the virtual layers hold the scales of their own: the standard deviation over layers, averaged over
    channels, of the attention and MLP scales, the residual mixes (mix) and the gains of query heads (gain).

    With adapters, of the values that they make of their block's. What layers take unchanged from a block is left out.
    """
    own: dict[str, Tensor] = {}
    if model.adapters is not None:
        blocks = list(model.tying_map)
        stacks = (model.attention_scales, model.mlp_scales, model.residual_mixes)
        attention, mlp, mix = model.adapters.adapted(*(stack[blocks] for stack in stacks))
        state = model.state_dict()
        gains = torch.stack([state[f"blocks.{block}.attention.gain"] for block in blocks])
        own = {"attention": attention, "mlp": mlp, "mix": mix, "gain": model.adapters.adapted_gains(gains)}
    if model.sharing.scales == "layer":
        own |= {"attention": model.attention_scales, "mlp": model.mlp_scales}
    if model.sharing.mixes == "layer":
        own["mix"] = model.residual_mixes
    return {name: float(stack.detach().std(dim=0, correction=0).mean()) for name, stack in own.items()}


def contraction(model: Model, tokens: Tensor, targets: Tensor, text_bytes: int, cycles: int) -> dict[str, Any]:
    """What running the tied blocks `cycles` times more does.

    changes: rms(Δx) / rms(x) of each cycle, which falls where the blocks contract. bpb: at each depth, from none of the
    cycles to all. None stands for what is not finite.
    """
    with scoring(model):
        losses, changes = model.deepened(tokens, targets, cycles)  # (cycles + 1, B, T), (cycles,)
    bpb = losses.double().sum(dim=(1, 2)) / log(2) / text_bytes
    return {"changes": _plain(changes), "bpb": _plain(bpb)}


def quantisation_loss(model: Model, loaded: Model, bpb: Callable[[], float]) -> dict[str, float]:
    """By tensor class: the BPB that the model loses while its tensors of that class alone are as the artifact has them.

    `bpb` scores `model`, whose weights are afterwards bit for bit what they were.
    """
    unchanged = bpb()
    names: dict[TensorClass, list[str]] = {}
    for tensor in tensor_inventory(model.config, model.sharing):
        names.setdefault(tensor.tensor_class, []).append(tensor.name)
    losses = {}
    for tensor_class, stored in names.items():
        with _replaced(model, loaded, stored):
            losses[tensor_class.value] = bpb() - unchanged
    return losses


@contextmanager
def _replaced(model: Model, loaded: Model, names: list[str]) -> Iterator[None]:
    """While it is open, the named tensors of `model` have the values that they have in `loaded`."""
    own, other = model.state_dict(), loaded.state_dict()
    kept = {name: own[name].clone() for name in names}
    try:
        for name in names:
            own[name].copy_(other[name])
        yield
    finally:
        for name in names:
            own[name].copy_(kept[name])


def _angle(before: Tensor, after: Tensor) -> float:
    cosines = F.cosine_similarity(before.double(), after.double(), dim=-1)  # near 1 an fp32 cosine leaves no angle
    return float(cosines.clamp(-1, 1).arccos().mean())


def _plain(values: Tensor) -> list[float | None]:
    return [value if isfinite(value) else None for value in values.tolist()]
