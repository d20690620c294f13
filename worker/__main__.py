"""`python -m worker`: train one spec without a server, alone or under torchrun; and look after the data root."""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import NoReturn

from worker.recipes import load_recipe, overrides_of, read_mapping, recipe_names, require_full
from worker.report import Directive, TrialResult, log_lines
from worker.shape import FieldError
from worker.shards import DataError, read_manifest
from worker.spec import DataConfig, TrialSpec, override, parse_spec
from worker.summary import summarise
from worker.trainer import Job, finished

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 the training failed, 2 the input was wrong, 130 interrupted.

    What is wrong is said in one line on stderr, and nothing is left behind then.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _data_command(words[1:]) if words[:1] == ["data"] else _train_command(words)
    except ValueError as error:  # InvalidSpec, FieldError, DataError: each names what is wrong and what would be right
        _say(f"{'caddie' if words[:1] == ['data'] else 'error'}: {error}")  # whose words they are: see _data_parser
        return BAD_INPUT
    except (ArithmeticError, OSError) as error:  # Diverged; a disk that is full
        _say(f"error: {error}")
        return FAILED
    except KeyboardInterrupt:
        _say("interrupted: nothing was written")
        return INTERRUPTED


class Console:
    """The reporter of a run without an orchestrator: on stderr, the lines that an attempt's log would have."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def measure(self, step: int, elapsed_seconds: float, metrics: Mapping[str, float]) -> Directive:
        """Nothing to keep it for, and nothing here ever asks to stop."""
        return Directive.CONTINUE

    def directive(self) -> Directive:
        """Always to go on."""
        return Directive.CONTINUE

    def phase(self, name: str) -> None:
        """Print what the run does now."""
        _say(f"-- {name}")

    def log(self, text: str) -> None:
        """Print the lines, with the seconds so far."""
        for said in log_lines(text, 0, time.monotonic() - self._began):
            _say(f"{said.elapsed_seconds:8.1f} s  {said.line}")


def _train_command(words: list[str]) -> int:
    options = _train_parser().parse_args(words)
    spec = _spec(options)
    rank, ranks = _place_in_gang(spec)
    if options.out is not None and rank == 0:
        _require_writable(options.out)
    outcome = _run(spec, _data_root(options.data), rank, ranks)
    if outcome is None:
        return 0
    result, artifact = outcome
    record = {"spec": spec.model_dump(mode="json"), "result": result.model_dump(mode="json")}
    try:
        if options.out is not None:
            _write(options.out, "artifact.bin", artifact)
            _write(options.out, "result.json", (json.dumps(record, indent=2) + "\n").encode())
    finally:  # a disk that is full must not take hours of training with it
        print(json.dumps(record) if options.json else summarise(spec, result))
    return 0


def _data_command(words: list[str]) -> int:
    options = _data_parser().parse_args(words)
    root = _data_root(options.data)
    if options.action == "list":
        for line in _listing(root):
            print(line)
        return 0
    if options.action == "build":
        _build(options, root)
        return 0
    from worker.fineweb import DATASETS, fetch  # here: what the others need not wait for

    fetch(root, options.variant, options.train_shards, _say)
    print(f"{DATASETS[options.variant]} is in {root}")
    return 0


def _build(options: argparse.Namespace, root: Path) -> None:
    from worker.corpus import DEMO_DATASET, CorpusPlan, build_demo, build_text  # here, for the same
    from worker.fineweb import DATASETS

    name, tokenizer, vocab_size = options.name, options.tokenizer, options.vocab_size
    if options.text is None:
        if (name, tokenizer, vocab_size) != (None, None, None):
            raise ValueError("--name, --tokenizer and --vocab-size say what becomes of a --text: give one")
        build_demo(root, _say)
        print(f"{DEMO_DATASET} is in {root}")
        return
    if name is None:
        raise ValueError("--text needs a --name for the dataset that it becomes")
    if name in {DEMO_DATASET, *DATASETS.values()}:
        raise FieldError("name", name, "must be another: `caddie data build` without --text, or fetch, brings this one")
    try:
        DataConfig(dataset=name)
    except ValueError:
        right = "must be up to 100 letters, digits, '.', '_' and '-', and start with a letter or a digit"
        raise FieldError("name", name, right) from None
    pieces = build_text(root, CorpusPlan(name, name, vocab_size, tokenizer), options.text, _say)
    print(f"{name} is in {root}: train on it with data.dataset: {name} and model.vocab_size: {pieces}")


class _Parser(argparse.ArgumentParser):
    """A parser whose complaint is a ValueError, so that it becomes one line like every other."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _train_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m worker",
        description="Train, pack and score one spec, alone or under torchrun (one process for each of gang.ranks).",
        epilog="The demo corpus is built where it is missing. Other datasets: caddie data --help. "
        "Exits with 0, 1 where training failed, 2 where the input is wrong; torchrun exits with 1 for both, and says "
        "more below our line.",
    )
    parser.add_argument("spec", nargs="?", type=Path, help="a spec as YAML or JSON")
    parser.add_argument("--recipe", help=f"start from a recipe instead: {', '.join(recipe_names())}")
    parser.add_argument("--size", default="full", help="the recipe's: full, as published, or tiny, for one CPU core")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="e.g. model.width=128; repeatable"
    )
    parser.add_argument("--out", type=Path, help="a folder for artifact.bin and result.json (default: write nothing)")
    parser.add_argument("--json", action="store_true", help="print spec and result as one JSON object on stdout")
    _add_data_root(parser, "$CADDIE_DATA, else ~/.cache/caddie/data")
    return parser


def _data_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="caddie data", description="Build, fetch and list datasets.")
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build", help="build a dataset of your text, or stdlib_sp1024 of this Python's library")
    build.description = "Build a dataset of your own text; without --text, of this Python's standard library."
    build.add_argument("--text", type=Path, metavar="FILE", help="UTF-8: .jsonl with a `text` a line, or a text a line")
    build.add_argument("--name", help="the new dataset's: what data.dataset says in a spec")
    build.add_argument("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece (default: train one on the text)")
    build.add_argument("--vocab-size", type=int, metavar="N", help="its pieces (default: 1024 where one is trained)")
    fetch = actions.add_parser("fetch", help="fetch the challenge's FineWeb shards and tokenizer")
    fetch.add_argument("--variant", default="sp1024", help="which tokenizer's shards (default: sp1024)")
    fetch.add_argument(
        "--train-shards", type=int, default=1, help="how many, 200 MB each (default: 1; the challenge: 80)"
    )
    for action in (build, fetch, actions.add_parser("list", help="list the datasets of the data root")):
        _add_data_root(action, str(_data_root(None)).replace("%", "%%"))  # `caddie` gives its own as $CADDIE_DATA
    return parser


def _add_data_root(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help=f"the data root (default: {default})")


def _data_root(given: Path | None) -> Path:
    return given or Path(os.environ.get("CADDIE_DATA") or Path.home() / ".cache" / "caddie" / "data")


def _spec(options: argparse.Namespace) -> TrialSpec:
    if (options.spec is None) == (options.recipe is None):
        raise ValueError("name a spec file or a --recipe, and not both")
    if options.recipe is None:
        require_full(options.size)
    plain = load_recipe(options.recipe, options.size) if options.recipe is not None else read_mapping(options.spec)
    return parse_spec(override(plain, overrides_of(options.set)))


def _place_in_gang(spec: TrialSpec) -> tuple[int, int]:
    """(rank, ranks) as torchrun says in the environment; alone without it."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks != spec.gang.ranks:
        command = f"torchrun --nproc-per-node {spec.gang.ranks} -m worker"
        raise FieldError("gang.ranks", spec.gang.ranks, f"must be the number of processes, {ranks}; or use {command}")
    return int(os.environ.get("RANK", "0")), ranks


def _run(spec: TrialSpec, data_root: Path, rank: int, ranks: int) -> tuple[TrialResult, bytes] | None:
    import torch  # here: it takes seconds to load, and neither bad input nor --help should wait for them
    import torch.distributed as dist

    from worker.job import run
    from worker.rendezvous import PATIENCE, prepare
    from worker.world import backends

    prepare(spec.gang, int(os.environ.get("LOCAL_RANK", "0")))
    if ranks == 1:
        return finished(run(Job(spec, data_root), Console()))
    dist.init_process_group(backends(torch.device("cuda" if spec.gang.device == "gpu" else "cpu")), timeout=PATIENCE)
    try:
        return finished(run(Job(spec, data_root, rank, ranks), Console()))
    finally:
        dist.destroy_process_group()


def _require_writable(folder: Path) -> None:
    """Raises ValueError, before hours of training, where the results could not be written. Leaves nothing behind."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--out is {str(folder)!r}, which cannot be written to: {error.strerror}") from None
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()


def _write(folder: Path, name: str, data: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.partial"
    temporary.write_bytes(data)
    temporary.replace(folder / name)


def _listing(root: Path) -> list[str]:
    """A line a dataset: what it holds, or what is wrong with it."""
    from worker.corpus import open_whole  # here, for the same

    lines = []
    for entry in read_manifest(root)["datasets"]:
        name = str(entry.get("name"))
        try:
            dataset = open_whole(root, name)
        except DataError as error:
            lines.append(f"{name}: not usable: {error}")
            continue
        train, val = (sum(shard.tokens for shard in shards) for shards in (dataset.train, dataset.val))
        lines.append(f"{name}: {train:,} training and {val:,} validation tokens, tokenizer {dataset.tokenizer}")
    return lines


def _say(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    # In one write: print writes the end of the line by itself, and another rank's line may come before it.
    sys.stderr.write(f"{message}\n" if rank == "0" else f"rank {rank}: {message}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a thread of gloo's that asks for the interpreter while that is torn down aborts a finished run.
    os._exit(code)
