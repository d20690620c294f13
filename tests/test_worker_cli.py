"""`python -m worker`: one spec from a file to an artifact, alone and under torchrun; bad input is one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import worker
from worker.__main__ import main
from worker.artifact import load
from worker.recipes import load_recipe, read_mapping
from worker.report import TrialResult
from worker.spec import override, parse_spec
from worker.summary import summarise

TINY = {
    "model": {"vocab_size": 512, "width": 32, "heads": 4, "kv_heads": 2, "mlp_multiple": 2},
    "data.dataset": "topics_sp512",
    "data.sequence_length": 64,
    "data.batch_tokens": 512,
    "budget": {"steps": 8},
    "quantisation.half_below": 500,
    "evaluation": {"validations": 1, "validation_tokens": 512, "batch_sequences": 16},
}

RESULT = TrialResult(
    val_bpb=1.25, val_bpb_prequant=1.24, val_loss=2.0, parameters=1000, model_bytes=900, code_bytes=100,
    artifact_bytes=1000, artifact_sha256="0" * 64, steps=8, tokens=4096, train_seconds=1.0, evaluate_seconds=1.0,
    pack_seconds=1.0, step_seconds=0.1, stopped=False, bytes_by_class={"mlp": 900}, diagnostics={},
)  # fmt: skip


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(override(load_recipe("laptop"), TINY)))
    return path


def test_a_spec_file_becomes_an_artifact_and_a_result(
    spec_file: Path, small_data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    torch.set_num_threads(2)
    assert main([str(spec_file), "--data", str(small_data_root), "--out", str(out), "--set", "seed=7"]) == 0
    assert torch.get_num_threads() == 1  # whatever OMP_NUM_THREADS says: several are slower, and score otherwise
    printed = capsys.readouterr()
    record = json.loads((out / "result.json").read_text())
    artifact = (out / "artifact.bin").read_bytes()
    assert sorted(path.name for path in out.iterdir()) == ["artifact.bin", "result.json"]
    assert parse_spec(record["spec"]).seed == 7
    assert len(artifact) == record["result"]["model_bytes"]
    assert load(artifact).config.width == 32
    for part in (f"{record['result']['val_bpb']:.4f}", f"{record['result']['val_bpb_prequant']:.4f}", "0 1 2 0 1 2"):
        assert part in printed.out
    for name, size in record["result"]["bytes_by_class"].items():
        assert f"{name} {size:,}" in printed.out
    assert "step 8 of 8 (100%): loss " in printed.err
    assert " BPB" in printed.err


def test_two_ranks_under_torchrun_score_as_one_rank_does(
    spec_file: Path, small_data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(spec_file), "--data", str(small_data_root), "--json"]
    assert main(arguments) == 0
    results = {1: json.loads(capsys.readouterr().out)["result"]}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "worker"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(worker.__file__).parents[1])}
    command = [*torchrun, *arguments, "--set", "gang.ranks=2"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=110
    )
    assert done.returncode == 0, done.stderr
    results[2] = json.loads(done.stdout)["result"]
    assert results[2]["val_bpb"] == pytest.approx(results[1]["val_bpb"], rel=2e-3)
    assert results[2]["val_bpb_prequant"] == pytest.approx(results[1]["val_bpb_prequant"], rel=1e-3)
    assert results[2]["tokens"] == results[1]["tokens"]
    assert results[2]["diagnostics"]["val_bytes"] == results[1]["diagnostics"]["val_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a spec file or a --recipe, and not both"),
        (["no-such.yaml"], "file: cannot be read: No such file or directory (got 'no-such.yaml')"),
        (["--recipe", "huge"], "recipe: must be one of"),
        (["--recipe", "ebls", "--size", "huge"], "size: must be one of full, tiny (got 'huge')"),
        (["spec.yaml", "--size", "tiny"], "size: needs a recipe"),
        (["--recipe", "laptop", "--sets", "a=1"], "unrecognized arguments: --sets"),
        (
            ["--recipe", "laptop", "--set", "seed"],
            "--set: must be PATH=VALUE, such as sharing.lora.rank=4 (got 'seed')",
        ),
        (["--recipe", "laptop", "--set", "seed=[1"], "seed: is no YAML: expected ',' or ']'"),
        (["--recipe", "laptop", "--set", ".=3"], ".: is no path: must be names with one dot between"),
        (["--recipe", "laptop", "--set", "budget.seconds=.inf"], "budget.seconds: must be a finite number (got inf)"),
        (["--recipe", "laptop", "--set", "model.widht=64"], "model.widht: is not a known key: did you mean width?"),
        (["--recipe", "laptop", "--set", "sharing.tying=[0, 0, 1, 1, 3, 3]"], "sharing.tying.map: skips block 2"),
        (["--recipe", "laptop", "--set", "model.heads=5"], "model.heads: must divide the width, 96 (got 5)"),
        (
            ["--recipe", "laptop", "--set", "sharing.lora.rank=200"],
            "sharing.lora.rank: must be at most model.width, 96",
        ),
        (
            ["--recipe", "laptop", "--set", "gang.ranks=2"],
            "gang.ranks is 2: must be the number of processes, 1; or use torchrun",
        ),
        (
            ["--recipe", "laptop", "--set", "data.dataset=missing"],
            "data.dataset is 'missing': ",
        ),
        pytest.param(
            ["--recipe", "laptop", "--set", "gang.device=gpu"],
            "gang.device is 'gpu': no CUDA device is available here; use cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (["--recipe", "laptop", "--out", "file/in"], "--out is 'file/in', which cannot be written to: Not a directory"),
        (["--recipe", "laptop", "--out", "/proc/x"], "--out is '/proc/x', which cannot be written to"),
        (["data"], "the following arguments are required: action"),
        (["data", "list"], "manifest.json is missing: build or fetch a dataset first"),
        (
            ["data", "build", "--name", "x"],
            "--name, --tokenizer and --vocab-size say what becomes of a --text: give one",
        ),
        (["data", "build", "--text", "gone.txt"], "--text needs a --name for the dataset that it becomes"),
        (["data", "build", "--text", "gone.txt", "--name", "x"], "text gone.txt cannot be read: No such file"),
        (["data", "build", "--text", "file", "--name", "a/b"], "name is 'a/b': must be up to 100 letters"),
        (["data", "build", "--text", "file", "--name", "stdlib_sp1024"], "name is 'stdlib_sp1024': must be another"),
        (["data", "fetch", "--variant", "sp7"], "variant is 'sp7': must be one of sp1024"),
        (["data", "fetch", "--train-shards", "many"], "argument --train-shards: invalid int value: 'many'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CADDIE_DATA", str(tmp_path / "data"))
    assert main(arguments) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if not line.startswith("--")]
    assert len(lines) == 1
    assert lines[0].startswith("caddie: " if arguments[:1] == ["data"] else "error: ")
    assert message in lines[0]
    assert printed.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3", "must hold a mapping"),
        ("- a\n- b", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("a: [1", "is no YAML: expected ',' or ']', but got '<stream end>' in line 1"),
        ("a: \xff", "cannot be read: 'utf-8' codec can't decode byte 0xff"),
        ("a: \0", "is no YAML: unacceptable character #x0000"),
        ("a: {b: 1}\nc:\n  d: 1\n  e: 2\n  d: 3", "is no YAML: the key 'd' of line 3 is given again in line 5"),
        ("a: " + "[" * 400 + "]" * 400, "is nested too deeply"),
    ],
)
def test_a_spec_file_that_is_no_mapping_is_refused(
    tmp_path: Path, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spec.yaml").write_text(text, encoding="latin-1")
    assert main([str(tmp_path / "spec.yaml")]) == 2
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(f"error: file: {says}")


def test_a_file_may_take_over_what_another_part_of_it_says(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("a: {inner: &all {<<: &some {x: 1, y: 2}, y: 3}}\nb: {<<: *all, x: 4}")
    assert read_mapping(tmp_path / "spec.yaml")["b"] == {"x": 4, "y": 3}


def test_training_that_diverges_exits_with_1_and_writes_nothing(
    spec_file: Path, small_data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["--set", "optimizer.embedding_lr=1.0e+38", "--set", "optimizer.scalar_lr=1.0e+38"]
    assert main([str(spec_file), *changes, "--data", str(small_data_root), "--out", str(tmp_path / "out")]) == 1
    assert "error: training diverged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_datasets_are_listed_with_what_is_wrong_with_them(
    small_data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "list", "--data", str(small_data_root)]) == 0
    assert "topics_sp512: " in capsys.readouterr().out
    entries = [{"name": "gone", "tokenizer_name": "t"}, {"name": "odd", "tokenizer_name": "t", "stats": [1]}]
    manifest = {"datasets": entries, "tokenizers": []}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert main(["data", "list", "--data", str(tmp_path)]) == 0
    gone, odd = capsys.readouterr().out.splitlines()
    assert gone == f"gone: not usable: {tmp_path}/datasets/gone cannot be read, though manifest.json lists it: " + (
        "No such file or directory"
    )
    assert odd.startswith("odd: not usable: ") and "the stats [1]; they must be an object" in odd


def test_building_the_demo_corpus_again_does_nothing(data_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "build", "--data", str(data_root)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"stdlib_sp1024 is in {data_root}\n"
    assert printed.err == ""


def test_help_says_where_data_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    assert "$CADDIE_DATA, else ~/.cache/caddie/data" in " ".join(capsys.readouterr().out.split())


def test_a_summary_shows_whatever_the_diagnostics_hold() -> None:
    spec = parse_spec(load_recipe("laptop"))
    shown = {
        "scores": {"plain": 1.25, "sliding": 1.2, "ttt": None},
        "averages": {"last": 1.3, "ema": 1.24},
        "quantisation_loss": {"mlp": 0.002},
        "bytes_curve": [{"artifact_bytes": 120_000, "val_bpb": 1.26}, {"artifact_bytes": 150_000, "val_bpb": 1.25}],
        "codec": "ans",
        "gammas": {"attention": [0.12, 0.05]},
        "block_influence": [0.25, 0.125],
        "scale_spread": {"attention": 0.5},
        "contraction": {"changes": [0.5, None], "bpb": [1.25, 1.3, 1.4]},
    }
    text = summarise(spec, RESULT.model_copy(update={"diagnostics": shown}))
    for line in (
        "scores          plain 1.2500  sliding 1.2000  ttt –\n",
        "averages        last 1.3000  ema 1.2400  (before quantisation)\n",
        "artifact        1,000 bytes = model 900 + code 100, by ans\n",
        "stored          mlp 900  (compressed bytes)\n",
        "lost by class   mlp 0.0020  (bits per byte, to quantisation)\n",
        "bytes curve     120,000 1.2600  150,000 1.2500  (artifact bytes, bits per byte)\n",
        "gates attention 0.120 0.050\n",
        "block influence 0.250 0.125\n",
        "scale spread    attention 0.5000\n",
        "contraction     relative changes 0.5000 –, bits per byte 1.2500 1.3000 1.4000  (by extra cycle)\n",
    ):
        assert line in text
    assert "scores" not in summarise(spec, RESULT)
