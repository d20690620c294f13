"""An artifact written in another thread while its content is scored, and read back before anybody gets it."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from worker.artifact import ArtifactError, Content, Packed, read, write
from worker.packing import QuantisationConfig


class Miswritten(RuntimeError):
    """An artifact that does not hold what it was made of: the fault of a codec or of this machine, not of the model."""


@dataclass(frozen=True)
class Written:
    """An artifact that gives what it was made of, and the seconds that writing and reading it back took."""

    packed: Packed
    seconds: float


def begin(content: Content, quantisation: QuantisationConfig) -> Future[Written]:
    """Write the content in a thread of its own, which ends with it. The future raises Miswritten as `verify` does.

    The byte compressors let other threads run meanwhile; ans does not, and is done in a fraction of a second.
    """
    executor = ThreadPoolExecutor(1, "writing")
    future = executor.submit(_written, content, quantisation)
    executor.shutdown(wait=False)
    return future


def verify(data: bytes, content: Content) -> None:
    """Raises Miswritten unless the artifact, read back, gives every tensor of the content bit for bit."""
    try:
        held = read(data)
    except ArtifactError as error:
        raise Miswritten(f"an artifact just written cannot be read back: {error}") from error
    if (held.model, held.sharing, held.half_below) != (content.model, content.sharing, content.half_below):
        raise Miswritten("the header of an artifact just written tells of another model than the one that was scored")
    restored = held.tensors()
    for name, tensor in content.tensors().items():
        if not torch.equal(restored[name].view(torch.int32), tensor.view(torch.int32)):  # -0.0 is not 0.0 here
            raise Miswritten(f"tensor {name}, read back from an artifact just written, is not what was scored")


def _written(content: Content, quantisation: QuantisationConfig) -> Written:
    started = time.perf_counter()
    packed = write(content, quantisation)
    verify(packed.data, content)
    return Written(packed, time.perf_counter() - started)
