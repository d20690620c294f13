"""The source files that an artifact needs to be read and scored, and their bytes: code counts against the cap."""

from importlib.resources import files

MODULES = (
    "__init__", "shape", "sharing", "spec", "attention", "mlp", "embedding", "adapters", "model",
    "world", "shards", "tokenizer", "quantize", "codec", "artifact", "evaluate",
)  # fmt: skip


def code_bytes() -> int:
    """UTF-8 bytes of the files of MODULES, uncompressed. A test scores an artifact with these files alone."""
    return sum(len((files("worker") / f"{module}.py").read_bytes()) for module in MODULES)
