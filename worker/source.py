"""The source files that an artifact needs to be read and scored, as one archive: code counts against the cap."""

import hashlib
import io
from functools import cache
from importlib.resources import files
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

MODULES = (
    "__init__", "shape", "tying", "sharing", "inventory", "packing", "scoring", "spec", "projection", "attention",
    "mlp", "embedding", "adapters", "repartition", "layer", "model", "world", "shards", "tokenizer",
    "quantize", "codec", "artifact", "evaluate", "ttt",
)  # fmt: skip


@cache
def archive() -> bytes:
    """The package `worker` with the files of MODULES, a zip that Python imports from as it is.

    Records ship their script compressed too: pull request 1394 counts 15,516 bytes for a source of 58,367.
    """
    written = io.BytesIO()
    with ZipFile(written, "w", ZIP_DEFLATED, compresslevel=9) as package:
        for module in MODULES:
            name = f"{module}.py"
            # With the date that a zip starts counting from: equal sources give equal bytes.
            entry = ZipInfo(f"worker/{name}")
            package.writestr(entry, (files("worker") / name).read_bytes(), ZIP_DEFLATED, 9)
    return written.getvalue()


def code_bytes() -> int:
    """Bytes of the archive. A test scores an artifact with it alone."""
    return len(archive())


@cache
def code_digest() -> str:
    """SHA-256 (hex) of the worker's sources, all of them, as they are at the first call."""
    digest = hashlib.sha256()
    for source in sorted(files("worker").iterdir(), key=lambda source: source.name):
        if source.name.endswith(".py"):
            digest.update(source.read_bytes())
    return digest.hexdigest()
