"""The ranks that train one attempt together, and the few things they tell each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among its gang. With several ranks, the default process group is joined already (`backends`)."""

    rank: int
    ranks: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, the only one that speaks."""
        return self.rank == 0

    def all_reduce_mean(self, tensors: Sequence[Tensor]) -> None:
        """Every tensor (one dtype, on `device`) becomes its mean over the ranks: the same bits on each of them."""
        if self.ranks > 1:
            self.all_reduce_sum(tensors)
            torch._foreach_div_(list(tensors), self.ranks)

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Every tensor (one dtype, on `device`) becomes its sum over the ranks: the same bits on each of them."""
        if self.ranks == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])  # one message, however many tensors
        dist.all_reduce(flat)
        pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))

    def lead(self, *values: float) -> tuple[float, ...]:
        """Rank 0's values on every rank, exactly. Travels between the hosts: does not wait for the device."""
        message = torch.tensor(values, dtype=torch.float64)
        if self.ranks > 1:
            dist.broadcast(message, src=0)
        return tuple(message.tolist())

    def lead_bytes(self, data: bytes) -> bytes:
        """Rank 0's bytes on every rank. Travels between the hosts."""
        (size,) = self.lead(len(data))
        if self.ranks == 1 or not size:
            return data
        message = torch.frombuffer(bytearray(data if self.leads else int(size)), dtype=torch.uint8)
        dist.broadcast(message, src=0)
        return message.numpy().tobytes()

    def total(self, *values: float) -> tuple[float, ...]:
        """The sums over the ranks, in double precision, on every rank. Travels between the hosts."""
        message = torch.tensor(values, dtype=torch.float64)
        if self.ranks > 1:
            dist.all_reduce(message)
        return tuple(message.tolist())


def backends(device: torch.device) -> str:
    """What to call `torch.distributed.init_process_group` with. Hosts talk by gloo in either case (`lead`, `total`)."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
