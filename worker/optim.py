"""The optimizers: Muon for matrices, AdamW for the rest."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from worker.model import Model
from worker.schedule import muon_momentum
from worker.spec import OptimizerConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
TINY = 1e-7


class Optimizer:
    """Updates all parameters of a model from their gradients. The same gradients give the same bits on every rank."""

    def __init__(self, model: Model, config: OptimizerConfig) -> None:
        self._config = config
        self._parameters = list(model.parameters())
        groups = parameter_groups(model)
        self._muon = Muon(groups["matrix"], config)
        self._peaks = (config.embedding_lr, config.scalar_lr)
        self._adam = torch.optim.AdamW(
            [{"params": groups["embedding"]}, {"params": groups["scalar"]}],
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.adam_weight_decay,
            fused=True,
        )

    def step(self, step: int, multiplier: float) -> None:
        """Apply the gradients of step `step` (from 0) at `multiplier` times the peak learning rates, and drop them."""
        if self._config.gradient_clip:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._config.gradient_clip)
        self._muon.step(muon_momentum(self._config, step), multiplier)
        for group, peak in zip(self._adam.param_groups, self._peaks, strict=True):
            group["lr"] = peak * multiplier
        self._adam.step()
        for parameter in self._parameters:
            parameter.grad = None


def parameter_groups(model: Model) -> dict[str, list[Parameter]]:
    """matrix: the blocks' matrices and the bigram projection · embedding · scalar: all else. Each in exactly one."""
    groups: dict[str, list[Parameter]] = {"matrix": [], "embedding": [], "scalar": []}
    for name, parameter in model.named_parameters():
        if name == "bigram.projection" or (name.startswith("blocks.") and parameter.ndim == 2):
            groups["matrix"].append(parameter)
        else:
            groups["embedding" if name == "embedding.weight" else "scalar"].append(parameter)
    grouped = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(grouped) == sorted({id(parameter) for parameter in model.parameters()})
    return groups


class Muon:
    """Nesterov momentum, orthogonalised (Jordan et al., 2024): W -= lr · sqrt(max(1, rows / columns)) · X.

    Weight decay is decoupled, at the scheduled learning rate, before the update. A tied matrix is one parameter whose
    gradient sums over its applications; nothing rescales it. Equal shapes are orthogonalised in one batched call.
    """

    def __init__(self, matrices: Sequence[Parameter], config: OptimizerConfig) -> None:
        self._config = config
        by_shape: dict[torch.Size, list[Parameter]] = defaultdict(list)
        for matrix in matrices:
            by_shape[matrix.shape].append(matrix)
        self._batches = [(batch, torch.zeros_like(torch.stack([*batch]))) for batch in by_shape.values()]

    @torch.no_grad()
    def step(self, momentum: float, multiplier: float) -> None:
        """Update every matrix from its gradient."""
        rate = self._config.matrix_lr * multiplier
        for matrices, velocity in self._batches:
            gradient = torch.stack([_gradient(matrix) for matrix in matrices])  # (n, rows, columns)
            velocity.mul_(momentum).add_(gradient)
            update = orthogonalise(gradient.add_(velocity, alpha=momentum), self._config.muon_iterations)
            rows, columns = update.shape[1:]
            for matrix, change in zip(matrices, update.unbind(), strict=True):
                matrix.mul_(1 - rate * self._config.muon_weight_decay)
                matrix.add_(change, alpha=-rate * max(1.0, rows / columns) ** 0.5)


def orthogonalise(matrices: Tensor, iterations: int) -> Tensor:
    """(n, rows, columns) -> the same shape, singular values brought near 1 by quintic Newton-Schulz; zero stays zero.

    In bf16 on a GPU and in fp32 on a CPU; the result is in the dtype given.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x: Tensor = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + TINY)
    x = x.to(torch.bfloat16 if x.is_cuda else x.dtype)
    x = x.mT if tall else x
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if tall else x
    return x.to(matrices.dtype)


def _gradient(parameter: Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
