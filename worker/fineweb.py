"""The challenge's published data: FineWeb shards and their tokenizer, from the Hugging Face hub."""

import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import constants, hf_hub_download

from worker.corpus import DEMO_DATASET, merge_manifest, open_whole, turn
from worker.shards import DataError, Split, open_shard, read_manifest, shard_name, stats_of

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
    with turn(root, say) as folder:
        say(f"{name}: asking {repository} for its manifest")
        dataset, tokenizer = _published(repository, _download(repository, "manifest.json", folder), name)
        published = dataset["stats"]["files_train"]
        if train_shards > published:
            raise DataError(f"train_shards is {train_shards}: {name} has {published}")
        wanted: list[tuple[Split, int]] = [("val", number) for number in range(dataset["stats"]["files_val"])]
        wanted += [("train", number) for number in range(train_shards)]
        here = root / "datasets" / name
        for done, (split, number) in enumerate(wanted, start=1):
            say(f"{name}: {split} shard {number} ({done} of {len(wanted)})")
            shard = shard_name("fineweb", split, number)
            _place(here / shard, repository, f"datasets/{name}/{shard}", folder)
        own = here / Path(tokenizer).name
        _place(own, repository, tokenizer, folder)
        merge_manifest(root, dataset, own)
        open_whole(root, name)


def command_for(root: Path, name: str) -> str:
    """The command that puts a dataset of this name into the data root, whole, with as many training shards and as
    large a vocabulary as it had; and what to remove before."""
    where, here = f"--data {shlex.quote(str(root))}", root / "datasets" / name
    if name == DEMO_DATASET:
        return f"caddie data build {where}"
    for variant, published in DATASETS.items():
        if name == published:
            last = max((int(path.stem[-6:]) for path in here.glob(f"*_train_{'[0-9]' * 6}.bin")), default=0)
            return f"caddie data fetch {where} --variant {variant}" + (f" --train-shards {last + 1}" if last else "")
    command = f"caddie data build {where} --name {shlex.quote(name)} --text FILE{_vocabulary(root, name)}"
    return f"{command} (remove {here} first)" if here.exists() else command


def _vocabulary(root: Path, name: str) -> str:
    """The option that gives a dataset of one's own the vocabulary that it had: with a word to replace, like FILE, where
    the manifest lists it without one, as an earlier release's does. None for a dataset that is not listed."""
    try:
        stats = [stats_of(root, entry) for entry in read_manifest(root)["datasets"] if entry.get("name") == name]
    except DataError:
        return ""  # the command will say what is wrong with the manifest
    if not stats:
        return ""
    if stats[0].get("tokenizer_given"):
        return " --tokenizer MODEL"
    return f" --vocab-size {stats[0].get('vocab_size', 'N')}"


def _reach_hub(repository: str) -> None:
    """Raises DataError at once where there is no way to the hub; its own client would try for half a minute."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what goes wrong is said once, by our error
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=10).close()
    except HTTPError:
        return  # an answer, whatever it says
    except OSError as error:
        raise DataError(f"cannot reach {constants.ENDPOINT}, where {repository} is published: {_line(error)}") from None


def _published(repository: str, path: Path, name: str) -> tuple[dict[str, Any], str]:
    """The dataset's entry in the published manifest at `path`, with its stats checked, and its tokenizer's file."""
    try:
        manifest = read_manifest(path.parent)
        dataset = next((entry for entry in manifest["datasets"] if entry.get("name") == name), None)
        if dataset is None:
            raise DataError(f"it does not list the dataset {name}")
        if not {"files_train", "files_val"} <= stats_of(path.parent, dataset).keys():
            raise DataError(f"it does not say how many files_train and files_val {name} has")
    except DataError as error:
        raise DataError(f"{repository} has published a manifest that cannot be used: {error}") from None
    wanted = dataset.get("tokenizer_name")
    file = next((entry.get("model_path") for entry in manifest["tokenizers"] if entry.get("name") == wanted), None)
    if not isinstance(file, str) or not Path(file).name:
        raise DataError(f"{repository} has published no file for the tokenizer {wanted!r}, which is that of {name}")
    return dataset, file


def _place(place: Path, repository: str, relative: str, folder: Path) -> None:
    """Have the published file at its place in the data root, whole."""
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
