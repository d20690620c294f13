"""Training batches: the challenge's stream loader, with the same global batch for any number of ranks."""

from collections.abc import Iterator

import torch
from torch import Tensor

from worker.shards import Dataset, open_stream
from worker.spec import DataConfig
from worker.world import World


class Batches:
    """The training split as one endless stream without shuffling, wrapping at its end, the same for every seed.

    Step s takes the next N·T tokens of the stream as N sequences of T inputs; a target is the token after its input.
    Rank r of R takes sequences r·N/R to (r+1)·N/R, in micro-batches. (The challenge's loader skips one token a rank and
    micro-step, which makes its batches depend on the number of ranks; these do not.) Windows cross documents.
    """

    def __init__(self, dataset: Dataset, config: DataConfig, vocab_size: int, world: World) -> None:
        assert config.batch_sequences % world.ranks == 0, "TrialSpec checks it"
        self._stream = open_stream(dataset.train, vocab_size)
        self._config, self._world = config, world

    def batch(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of a step's batch (steps count from 0) as (tokens, targets), each (b, T) int64 on the
        host, in memory that a GPU can fetch from by itself. Raises DataError for a token outside the vocabulary."""
        length, sequences = self._config.sequence_length, self._config.batch_sequences
        share = sequences // self._world.ranks
        first = step * sequences + self._world.rank * share
        for begin in range(0, share, self._config.micro_batch_sequences):
            count = min(self._config.micro_batch_sequences, share - begin)
            read = torch.from_numpy(self._stream.read((first + begin) * length, count * length + 1))
            if self._world.device.type == "cuda":
                read = read.pin_memory()
            yield read[:-1].view(count, length), read[1:].view(count, length)
