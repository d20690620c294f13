"""Bytes over the symbols' entropy, and seconds, of each codec on a model's worth of six-bit Gaussian rows.

Run: .venv/bin/python benchmarks/codecs.py [--matrices 17] [--clip amax sigmas]
"""

import argparse
import sys
import time

import numpy as np
import torch

from worker.codec import Group, codec, entropy_bits
from worker.inventory import TensorClass
from worker.packing import LEVELS, QuantisationConfig
from worker.quantize import quantise

ROWS, COLUMNS = 2_000, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--matrices", type=int, default=17, help=f"of {ROWS} rows of {COLUMNS} values")
    parser.add_argument("--clip", nargs="+", default=["amax", "sigmas"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for clip in arguments.clip:
        groups = symbols(arguments.matrices, QuantisationConfig.model_validate({"clip": clip}))
        values = sum(group.size for group in groups)
        # Of all symbols together: what one table, and no codec without a memory, can reach.
        ideal = entropy_bits(np.bincount(np.concatenate(groups))) / 8
        print(f"{clip}: {values:,} symbols, {8 * ideal / values:.4f} bits each, {ideal:,.0f} bytes at their entropy")
        for name in ("ans", "zlib", "zstd", "lzma", "brotli"):
            report(name, groups, ideal)


def symbols(matrices: int, quantisation: QuantisationConfig) -> list[Group]:
    """Each matrix as an artifact holds it: by its columns, a byte a symbol."""
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(matrices))
    rounded = (quantise(weight, TensorClass.MLP, quantisation).symbols for weight in weights)
    return [(matrix.T.contiguous().numpy().astype(np.int16) + 128).astype(np.uint8).reshape(-1) for matrix in rounded]


def report(name: str, groups: list[Group], ideal: float) -> None:
    began = time.perf_counter()
    compressed = codec(name).compress(groups, LEVELS[name][2] if name in LEVELS else 0)
    written = time.perf_counter()
    expanded = codec(name).expand(compressed, [group.size for group in groups])
    read = time.perf_counter()
    assert all(np.array_equal(before, after) for before, after in zip(groups, expanded, strict=True))
    size = len(compressed)
    times = f"written in {written - began:.2f} s, read in {read - written:.2f} s"
    print(f"  {name:7} {size:11,} bytes, {size / ideal:.5f} of the entropy, {times}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
