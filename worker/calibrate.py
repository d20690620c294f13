"""What training data says of a trained model's matrices: what enters them, and how much the loss minds their errors.

Every function runs on the model's device, takes gradients aside and leaves the model as it was.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from worker.inventory import TensorShape, is_quantised, tensor_inventory
from worker.model import Model
from worker.projection import observing
from worker.shape import FieldError
from worker.shards import Dataset, TokenStream
from worker.spec import TrialSpec

BATCH_TOKENS = 1 << 15  # in one pass: without a compiler its activations take several times what training's do
Batch = tuple[Tensor, Tensor]  # tokens and targets, each (B, T) int64 on the host


@dataclass(frozen=True)
class Calibration:
    """By name of a matrix that will be quantised. What the spec's quantisation does not read is left empty."""

    moments: dict[str, Tensor] = field(default_factory=dict)  # see second_moments
    row_gradients: dict[str, Tensor] = field(default_factory=dict)  # see row_gradients
    sensitivities: dict[str, float] = field(default_factory=dict)  # see sensitivities


def calibrate(model: Model, dataset: Dataset, spec: TrialSpec) -> Calibration:
    """What `spec.quantisation` needs to know of the model. Raises FieldError for too little training data."""
    quantisation = spec.quantisation
    names = [tensor.name for tensor in quantised_matrices(model, quantisation.half_below)]
    if not quantisation.calibrates or not names:
        return Calibration()
    batches = calibration_batches(dataset, spec)
    mixed = quantisation.high_fraction + quantisation.low_fraction > 0
    return Calibration(
        second_moments(model, batches, names) if quantisation.rounding == "gptq" else {},
        row_gradients(model, batches, names) if mixed else {},
        sensitivities(model, batches, names, spec.seed) if quantisation.target_bytes is not None else {},
    )


def quantised_matrices(model: Model, half_below: int) -> list[TensorShape]:
    """Those tensors of the model that are stored as small integers, in the inventory's order."""
    inventory = tensor_inventory(model.config, model.sharing)
    return [tensor for tensor in inventory if is_quantised(tensor, half_below)]


def calibration_batches(dataset: Dataset, spec: TrialSpec) -> list[Batch]:
    """`calibration_tokens` of the training split in windows that are spread evenly over it and do not overlap.

    All of the split's windows where it has fewer. Raises FieldError where it has none.
    """
    require_window(dataset, spec)
    stream, length = TokenStream(dataset.train, spec.model.vocab_size), spec.data.sequence_length
    available = (len(stream) - 1) // length
    windows = min(available, spec.quantisation.calibration_tokens // length)
    starts = [window * available // windows * length for window in range(windows)]
    batches = []
    size = max(1, min(spec.data.micro_batch_sequences, BATCH_TOKENS // length))
    for first in range(0, windows, size):
        batch = starts[first : first + size]
        read = torch.stack([torch.from_numpy(stream.read(start, length + 1)) for start in batch])
        batches.append((read[:, :-1], read[:, 1:]))
    return batches


def require_window(dataset: Dataset, spec: TrialSpec) -> None:
    """Raises FieldError where packing will read training data, and there is not a window of it. Reads no token."""
    tokens, length = sum(shard.tokens for shard in dataset.train), spec.data.sequence_length
    if spec.quantisation.calibrates and tokens <= length:
        message = f"the {tokens} training tokens of dataset {dataset.name} hold no window of {length} and a target"
        raise FieldError("quantisation.calibration_tokens", spec.quantisation.calibration_tokens, message)


def second_moments(model: Model, batches: Iterable[Batch], names: Iterable[str]) -> dict[str, Tensor]:
    """The mean of x·xᵀ over the inputs of each matrix, (in, in) fp32, over all virtual layers that apply it.

    Matrices that always read the same input share one tensor. Tables that are only looked up in have none.
    """
    wanted = {id(model.get_parameter(name)): name for name in names}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    owners: dict[str, str] = {}  # a matrix -> the one whose input it reads
    latest: tuple[Tensor, str] | None = None

    def observe(weight: Tensor, x: Tensor) -> None:
        nonlocal latest
        name = wanted.get(id(weight))
        if name is None:
            return
        if latest is not None and latest[0] is x and owners.get(name, latest[1]) == latest[1]:
            owners[name] = latest[1]  # query, key and value; gate and up
            return
        latest = (x, name)
        owners[name] = name
        inputs = x.flatten(0, -2).float()  # (N, in)
        product = inputs.T @ inputs
        sums[name] = sums[name].add_(product) if name in sums else product
        counts[name] = counts.get(name, 0) + len(inputs)

    with torch.no_grad(), observing(observe):
        for tokens, targets in batches:
            model.token_losses(*_placed(model, tokens, targets))
            latest = None
    means = {name: total.div_(counts[name]) for name, total in sums.items()}
    return {name: means[owner] for name, owner in owners.items()}


def row_gradients(model: Model, batches: Iterable[Batch], names: Iterable[str]) -> dict[str, Tensor]:
    """The norm of the loss's gradient by each row of each matrix, (rows,), the mean over batches."""
    means: dict[str, Tensor] = {}
    weights = {name: model.get_parameter(name) for name in names}
    batches = list(batches)
    for tokens, targets in batches:
        for name, gradient in _gradients(model, tokens, targets, weights):
            norms = gradient.norm(dim=1) / len(batches)
            means[name] = means[name] + norms if name in means else norms
    return means


def sensitivities(model: Model, batches: Iterable[Batch], names: Iterable[str], seed: int) -> dict[str, float]:
    """The mean over each matrix's values of the diagonal of the Fisher information, for one token.

    To second order an error of variance v in every value of a matrix of n adds n·v/2 times this to the loss. Targets
    are drawn from the model's own predictions, so that the gradients of tokens have mean zero, do not correlate, and
    one backward pass over many tokens gives the sum of their squares without bias.
    """
    batches = list(batches)
    weights = {name: model.get_parameter(name) for name in names}
    totals = dict.fromkeys(weights, 0.0)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for tokens, _ in batches:
        with torch.no_grad():
            chances = model.logits(tokens.to(device)).softmax(dim=-1)  # (B, T, V)
            drawn = torch.multinomial(chances.flatten(0, 1), 1, generator=generator).view(tokens.shape)
        for name, gradient in _gradients(model, tokens, drawn, weights):
            totals[name] += float(gradient.square().mean()) * tokens.numel()
    return {name: total / len(batches) for name, total in totals.items()}


def _gradients(
    model: Model, tokens: Tensor, targets: Tensor, weights: dict[str, torch.nn.Parameter]
) -> Iterator[tuple[str, Tensor]]:
    loss = model.token_losses(*_placed(model, tokens, targets)).mean()
    return zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)


def _placed(model: Model, *batch: Tensor) -> tuple[Tensor, ...]:
    device = next(model.parameters()).device
    return tuple(part.to(device) for part in batch)
