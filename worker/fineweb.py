"""The challenge's published data: FineWeb shards and their tokenizer, from the Hugging Face hub."""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import constants, hf_hub_download

from worker.corpus import merge_manifest, turn
from worker.shards import DataError, Split, open_dataset, open_shard, shard_name

REMOTE_ROOT = "datasets"
DATASETS = {"sp1024": "fineweb10B_sp1024", "sp8192": "fineweb10B_sp8192"}
REPOSITORIES = {"sp1024": "willdepueoai/parameter-golf", "sp8192": "kevclark/parameter-golf"}


def fetch(
    root: Path, variant: str = "sp1024", train_shards: int = 1, say: Callable[[str], None] = lambda message: None
) -> None:
    """Put a published dataset into the data root: all its validation shards, its first `train_shards` training shards
    (100 M tokens and 200 MB each) and its tokenizer. What is there and whole is not fetched again.

    Raises DataError, in one line, where the hub cannot be reached or has no such thing; each file is moved to its place
    only when it is whole, and the manifest comes last.
    """
    if variant not in DATASETS:
        raise DataError(f"variant is {variant!r}: must be one of {', '.join(DATASETS)}")
    if train_shards < 1:
        raise DataError(f"train_shards is {train_shards}: must be at least 1")
    name, repository = DATASETS[variant], REPOSITORIES[variant]
    _reach_hub(repository)
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".fetching-", dir=root))
    try:
        say(f"{name}: asking {repository} for its manifest")
        manifest = json.loads(_download(repository, "manifest.json", folder).read_text(encoding="utf-8"))
        dataset, tokenizer = _entries(repository, manifest, name)
        published = int(dataset["stats"]["files_train"])
        if train_shards > published:
            raise DataError(f"train_shards is {train_shards}: {name} has {published}")
        wanted: list[tuple[Split, int]] = [("val", number) for number in range(int(dataset["stats"]["files_val"]))]
        wanted += [("train", number) for number in range(train_shards)]
        for done, (split, number) in enumerate(wanted, start=1):
            say(f"{name}: {split} shard {number} ({done} of {len(wanted)})")
            _place(root, repository, f"datasets/{name}/{shard_name('fineweb', split, number)}", folder)
        _place(root, repository, str(tokenizer["model_path"]), folder)
        with turn(root):
            merge_manifest(root, dataset, tokenizer)
        open_dataset(root, name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _reach_hub(repository: str) -> None:
    """Raises DataError at once where there is no way to the hub; its own client would try for half a minute."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what goes wrong is said once, by our error
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=10).close()
    except HTTPError:
        return  # an answer, whatever it says
    except OSError as error:
        raise DataError(f"cannot reach {constants.ENDPOINT}, where {repository} is published: {_line(error)}") from None


def _entries(repository: str, manifest: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    dataset = next((entry for entry in manifest["datasets"] if entry["name"] == name), None)
    if dataset is None:
        raise DataError(f"{repository} does not list the dataset {name}")
    tokenizer = next((entry for entry in manifest["tokenizers"] if entry["name"] == dataset["tokenizer_name"]), None)
    if tokenizer is None:
        raise DataError(f"{repository} does not list the tokenizer {dataset['tokenizer_name']}")
    return dataset, tokenizer


def _place(root: Path, repository: str, relative: str, folder: Path) -> None:
    """Have the file at its place below the data root, whole."""
    place = root / relative
    if root.resolve() not in place.resolve().parents:
        raise DataError(f"{repository} names the file {relative!r}, which lies outside the data root")
    if place.suffix == ".bin" and place.exists() and _whole(place):
        return
    fetched = _download(repository, relative, folder)
    if place.suffix == ".bin":
        open_shard(fetched)
    place.parent.mkdir(parents=True, exist_ok=True)
    fetched.replace(place)


def _whole(place: Path) -> bool:
    try:
        open_shard(place)
    except DataError:
        return False
    return True


def _download(repository: str, relative: str, folder: Path) -> Path:
    remote = f"{REMOTE_ROOT}/{relative}"
    try:
        return Path(hf_hub_download(repository, remote, repo_type="dataset", local_dir=folder))
    except Exception as error:  # noqa: BLE001 - of the HTTP library below the client, which differs from release to release
        raise DataError(f"cannot fetch {remote} of {repository}: {_line(error)}") from None


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
