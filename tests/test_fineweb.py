"""The challenge's published data: fetched whole or not at all, and what does not suit is said in one line."""

import hashlib
import json
import shlex
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from worker.fineweb import REPOSITORIES, command_for, fetch
from worker.shards import DataError, open_dataset, write_shard

NAME = "fineweb10B_sp1024"


class Hub(BaseHTTPRequestHandler):
    """The hub's side of a download: the files of a folder, each with the headers that its client wants."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.folder = folder
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.wfile.write(self.answer())

    def answer(self) -> bytes:
        path = self.folder / self.path.partition("/resolve/main/datasets/")[2]
        found = path.is_file()
        data = path.read_bytes() if found else b""
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", hashlib.sha256(data).hexdigest())
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        return data

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def published(tmp_path: Path, small_data_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that a hub of our own publishes: two shards and their tokenizer."""
    folder = tmp_path / "published"
    (folder / "datasets" / NAME).mkdir(parents=True)
    for split in ("train", "val"):
        write_shard(folder / "datasets" / NAME / f"fineweb_{split}_000000.bin", [1, 2, 3])
    (folder / "toy.model").write_bytes(open_dataset(small_data_root, "topics_sp512").tokenizer.read_bytes())
    entry = {"name": NAME, "tokenizer_name": "toy", "stats": {"files_train": 80, "files_val": 1}}
    manifest = {"datasets": [entry], "tokenizers": [{"name": "toy", "model_path": "toy.model"}]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    template = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_published_dataset_is_fetched_whole_and_once(published: Path, tmp_path: Path) -> None:
    root, said = tmp_path / "root", list[str]()
    fetch(root, say=said.append)
    dataset = open_dataset(root, NAME)
    assert [shard.tokens for shard in (*dataset.train, *dataset.val)] == [3, 3]
    assert dataset.tokenizer == root / "datasets" / NAME / "toy.model", "where no other dataset's can replace it"
    assert said[-1] == f"{NAME}: train shard 0 (2 of 2)"
    for path in (published / "datasets" / NAME).iterdir():
        path.unlink()
    fetch(root)
    assert {path.name for path in root.iterdir()} == {"manifest.json", "datasets", ".lock"}
    with pytest.raises(DataError, match="train_shards is 81: fineweb10B_sp1024 has 80"):
        fetch(root, train_shards=81)
    with pytest.raises(DataError, match=r"cannot fetch .*fineweb_train_000001\.bin"):
        fetch(root, train_shards=2)
    assert open_dataset(root, NAME) == dataset
    for number in (1, 2):
        write_shard(published / "datasets" / NAME / f"fineweb_train_{number:06d}.bin", [number])
    assert command_for(root, NAME) == f"caddie data fetch --data {shlex.quote(str(root))} --variant sp1024"
    write_shard(root / "datasets" / NAME / "fineweb_train_000002.bin", [2])
    with pytest.raises(DataError, match="misses train shard 000001"):
        open_dataset(root, NAME)
    assert command_for(root, NAME).endswith(" --variant sp1024 --train-shards 3")
    fetch(root, train_shards=3)
    assert [shard.tokens for shard in open_dataset(root, NAME).train] == [3, 1, 1]


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("[]", "has no list of objects under 'datasets'"),
        ('{"datasets": [{}], "tokenizers": []}', f"does not list the dataset {NAME}"),
        ('{"datasets": [{"name": "NAME"}], "tokenizers": []}', "does not say how many files_train and files_val"),
        (
            '{"datasets": [{"name": "NAME", "stats": {"files_train": "x", "files_val": 1}}], "tokenizers": []}',
            "the files_train 'x'; it must be a whole number",
        ),
        (
            '{"datasets": [{"name": "NAME", "stats": {"files_train": 1, "files_val": 1}}], "tokenizers": [{}]}',
            "no file for the tokenizer None",
        ),
    ],
)
def test_a_published_manifest_that_cannot_be_used_is_one_line(
    published: Path, tmp_path: Path, manifest: str, message: str
) -> None:
    (published / "manifest.json").write_text(manifest.replace("NAME", NAME))
    with pytest.raises(DataError, match=rf"^{REPOSITORIES['sp1024']} has published .*{message}"):
        fetch(tmp_path / "root")
    assert [path.name for path in (tmp_path / "root").iterdir()] == [".lock"]


def test_a_fetch_without_a_network_says_so_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # a port that nobody listens on
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    expected = r"^cannot reach http://127\.0\.0\.1:9, where willdepueoai/parameter-golf is published: .*refused"
    with pytest.raises(DataError, match=expected) as caught:
        fetch(tmp_path / "data", "sp1024", 1)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variant", "shards", "message"), [("sp7", 1, "variant is 'sp7'"), ("sp1024", 0, "at least 1")]
)
def test_a_fetch_of_nothing_known_is_refused(tmp_path: Path, variant: str, shards: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fetch(tmp_path / "data", variant, shards)
    assert list(tmp_path.iterdir()) == []
