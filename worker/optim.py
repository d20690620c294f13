"""The optimizers: Muon for matrices, AdamW for the rest, and the proximal step on singular values."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from worker.model import Model
from worker.qat import quantised_parameters
from worker.schedule import muon_momentum
from worker.spec import ObjectiveConfig, OptimizerConfig, TrialSpec
from worker.world import World

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_BY_ITERATION = (  # parameter-golf pull request 1855
    (8.1566, -22.4833, 15.8788),
    (4.0429, -2.8089, 0.5000),
    (3.8917, -2.7725, 0.5061),
    (3.2858, -2.3681, 0.4645),
    (2.3465, -1.7098, 0.4232),
)
TINY = 1e-7
TABLES = ("bigram.table", "value_embedding.table")
PROJECTIONS = ("bigram.projection", "value_embedding.projection")


class Optimizer:
    """Updates all parameters of a model from their gradients. The same gradients give the same bits on every rank."""

    def __init__(self, model: Model, spec: TrialSpec, world: World) -> None:
        self._config, self._objective = spec.optimizer, spec.objective
        self._parameters = list(model.parameters())
        self._proximal = [parameter for parameter, _ in quantised_parameters(model, spec.quantisation.half_below)]
        config, groups = spec.optimizer, parameter_groups(model)
        self._muon = Muon(groups["matrix"], config, world)
        decay = config.adam_weight_decay
        rows_decay = decay if config.embedding_weight_decay is None else config.embedding_weight_decay
        self._peaks = (config.embedding_lr, config.table_lr or config.scalar_lr, config.scalar_lr)
        self._adam = torch.optim.AdamW(
            [
                {"params": groups["embedding"], "weight_decay": rows_decay},
                {"params": groups["table"], "weight_decay": rows_decay},
                {"params": groups["scalar"], "weight_decay": decay},
            ],
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )

    def step(self, step: int, multiplier: float) -> None:
        """Apply the gradients of step `step` (from 0) at `multiplier` times the peak learning rates, and drop them.

        A parameter without a gradient stays as it is.
        """
        if self._config.gradient_clip:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._config.gradient_clip)
        self._muon.step(muon_momentum(self._config, step), multiplier)
        for group, peak in zip(self._adam.param_groups, self._peaks, strict=True):
            group["lr"] = peak * multiplier
        self._adam.step()
        if _shrinks(self._objective, step):
            shrink_singular_values(self._proximal, self._objective.nuclear_norm * multiplier)
        for parameter in self._parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The same on every rank; all of them ask for it."""
        return {"momentum": self._muon.momentum(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._muon.load_momentum(state_dict["momentum"])
        self._adam.load_state_dict(state_dict["adam"])


def parameter_groups(model: Model) -> dict[str, list[Parameter]]:
    """matrix: the blocks' matrices and the projections of tables · embedding · table · scalar: all else that is used.

    Each in exactly one. An attention gate over heads is a control, though it has two dimensions.
    """
    groups: dict[str, list[Parameter]] = {"matrix": [], "embedding": [], "table": [], "scalar": []}
    trained = {name: parameter for name, parameter in model.named_parameters() if not name.startswith("unused.")}
    for name, parameter in trained.items():
        in_block = name.startswith("blocks.") and parameter.ndim == 2 and not name.endswith(".head_gate")
        if in_block or name in PROJECTIONS:
            groups["matrix"].append(parameter)
        elif name == "embedding.weight":
            groups["embedding"].append(parameter)
        else:
            groups["table" if name in TABLES else "scalar"].append(parameter)
    grouped = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(grouped) == sorted({id(parameter) for parameter in trained.values()})
    return groups


class Muon:
    """Nesterov momentum, orthogonalised (Jordan et al., 2024): W -= lr · sqrt(max(1, rows / columns)) · X.

    Weight decay is decoupled, at the scheduled learning rate, before the update. A tied matrix is one parameter whose
    gradient sums over its applications; nothing rescales it. Each matrix belongs to one rank, which alone keeps its
    momentum and orthogonalises it, equal shapes in one batched call; every rank then gets every update.
    """

    def __init__(self, matrices: Sequence[Parameter], config: OptimizerConfig, world: World) -> None:
        self._matrices, self._config, self._world = list(matrices), config, world
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for index, matrix in enumerate(matrices):
            by_shape[matrix.shape].append(index)
        dealt = list(chain.from_iterable(by_shape.values()))[world.rank :: world.ranks]  # by shape: ranks work equally
        owned = ([index for index in indices if index in dealt] for indices in by_shape.values())
        self._batches = [(mine, torch.zeros_like(torch.stack([matrices[i] for i in mine]))) for mine in owned if mine]

    @torch.no_grad()
    def step(self, momentum: float, multiplier: float) -> None:
        """Update every matrix from its gradient."""
        rate, decay = self._config.matrix_lr * multiplier, self._config.muon_weight_decay
        for matrix, update in zip(self._matrices, self._updates(momentum), strict=True):
            if matrix.grad is not None:
                rows, columns = matrix.shape
                matrix.mul_(1 - rate * decay)
                matrix.add_(update, alpha=-rate * max(1.0, rows / columns) ** 0.5)

    def _updates(self, momentum: float) -> list[Tensor]:
        """X of every matrix, the same bits on every rank."""
        updates: dict[int, Tensor] = {}
        for mine, velocity in self._batches:
            gradient = torch.stack([_gradient(self._matrices[i]) for i in mine])  # (n, rows, columns)
            velocity.mul_(momentum).add_(gradient)
            update = gradient.add_(velocity, alpha=momentum)
            if self._config.row_normalise:
                update = F.normalize(update, dim=2, eps=TINY)
            updates |= zip(mine, orthogonalise(update, coefficients(self._config)).unbind(), strict=True)
        return self._gathered(updates)

    def momentum(self) -> list[Tensor]:
        """Of every matrix, on every rank; all of them ask for it."""
        owned: dict[int, Tensor] = {}
        for mine, velocity in self._batches:
            owned |= zip(mine, velocity.unbind(), strict=True)
        return self._gathered(owned)

    def load_momentum(self, momentum: Sequence[Tensor]) -> None:
        """Of every matrix: each rank takes what is its own."""
        for mine, velocity in self._batches:
            velocity.copy_(torch.stack([momentum[i] for i in mine]))

    def _gathered(self, owned: dict[int, Tensor]) -> list[Tensor]:
        """Of every matrix, the same bits on every rank: each is a sum of one rank's tensor and the others' zeros."""
        if self._world.ranks == 1:
            return [owned[index] for index in range(len(self._matrices))]
        shared = [owned[i] if i in owned else torch.zeros_like(each) for i, each in enumerate(self._matrices)]
        self._world.all_reduce_sum(shared)
        return shared


def coefficients(config: OptimizerConfig) -> tuple[tuple[float, float, float], ...]:
    """Of the Newton-Schulz polynomial of each iteration."""
    if config.muon_coefficients == "constant":
        return (NEWTON_SCHULZ,) * config.muon_iterations
    return NEWTON_SCHULZ_BY_ITERATION


def orthogonalise(matrices: Tensor, polynomials: Sequence[tuple[float, float, float]]) -> Tensor:
    """(n, rows, columns) -> the same shape, singular values brought near 1 by quintic Newton-Schulz; zero stays zero.

    One iteration a polynomial: s becomes a·s + b·s³ + c·s⁵. In bf16 on a GPU and in fp32 on a CPU; the result is in the
    dtype given.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x: Tensor = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + TINY)
    x = x.to(torch.bfloat16 if x.is_cuda else x.dtype)
    x = x.mT if tall else x
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if tall else x
    return x.to(matrices.dtype)


@torch.no_grad()
def shrink_singular_values(matrices: Sequence[Parameter], amount: float) -> None:
    """Every singular value s becomes max(s - amount, 0): the proximal step of `amount` times the nuclear norm.

    A matrix that is not finite stays as it is: the loss tells of it.
    """
    for matrix in matrices:
        try:
            u, values, v = torch.linalg.svd(matrix, full_matrices=False)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        matrix.copy_((u * (values - amount).clamp(min=0)) @ v)


def _shrinks(objective: ObjectiveConfig, step: int) -> bool:
    return objective.nuclear_norm > 0 and (step + 1) % objective.nuclear_norm_every == 0


def _gradient(parameter: Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
