"""What an attempt trained on: told without changing what it computes."""

import multiprocessing
import os
import platform
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from worker.hardware import observed
from worker.report import Hardware
from worker.world import World

CPU = World(0, 1, torch.device("cpu"))


def test_what_is_observed_computes_what_it_would_have_alone() -> None:
    def draw() -> torch.Tensor:
        return torch.rand(4)

    torch.manual_seed(7)
    alone = [draw(), draw()]
    torch.manual_seed(7)
    first, _ = observed(CPU, draw)
    assert torch.equal(torch.stack([first, draw()]), torch.stack(alone))


def test_the_hardware_says_what_a_timing_is_compared_by() -> None:
    _, hardware = observed(CPU, lambda: None)
    assert hardware.device in Path("/proc/cpuinfo").read_text() + platform.processor() + platform.machine()
    assert (hardware.node, hardware.node_devices, hardware.ranks) == (platform.node(), os.cpu_count(), 1)
    assert (hardware.torch, hardware.cuda) == (torch.__version__, None)
    assert len(hardware.probe_seconds) == len(hardware.probe_after_seconds) == 1
    assert 0 < hardware.slowest_probe_seconds < 1
    assert Hardware.model_validate_json(hardware.model_dump_json()) == hardware


def test_every_rank_knows_what_each_of_them_probed(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_observe, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    told = [Hardware.model_validate_json((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert told[0].probe_seconds == told[1].probe_seconds
    assert told[0].probe_after_seconds == told[1].probe_after_seconds
    assert [len(told[0].probe_seconds), told[0].ranks] == [2, 2]
    assert told[0].slowest_probe_seconds == max(*told[0].probe_seconds, *told[0].probe_after_seconds)


def _observe(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    _, hardware = observed(World(rank, 2, torch.device("cpu")), lambda: None)
    (folder / f"{rank}.json").write_text(hardware.model_dump_json())
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_a_gpu_is_told_by_its_model_its_clocks_and_its_node() -> None:
    _, hardware = observed(World(0, 1, torch.device("cuda", 0)), lambda: None)
    assert hardware.device == torch.cuda.get_device_name(0)
    assert hardware.node_devices >= torch.cuda.device_count()
    assert hardware.clock_limit_mhz is not None
    assert 0 < hardware.clocks_mhz[0] <= hardware.clock_limit_mhz
    assert hardware.cuda == torch.version.cuda
    assert 0 < hardware.slowest_probe_seconds < 1
