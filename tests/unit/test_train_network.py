"""The precision of training, and the memory that a training process keeps."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from imgbatch.training import network
from tests.conftest import ROOT, clean_environment


def test_only_depthwise_convolutions_compute_in_float32() -> None:
    net = timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=3)
    network.compute_depthwise_in_float32(net)
    dtypes: dict[str, set[torch.dtype]] = {"depthwise": set(), "other": set()}

    def note(module: nn.Conv2d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        dtypes["depthwise" if module.groups > 1 else "other"].add(output.dtype)

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    names = set(net.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(torch.rand(2, 3, 64, 64)).float().square().sum()
    loss.backward()
    assert dtypes == {"depthwise": {torch.float32}, "other": {torch.bfloat16}}
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert set(net.state_dict()) == names


MEMORY = """
import psutil
from imgbatch.concurrency import process
{call}
before = psutil.Process().memory_info().rss
blocks = [b"x" * (4 << 20) for _ in range(50)]
del blocks
print((psutil.Process().memory_info().rss - before) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    kept = {}
    for call in ("", "process.keep_freed_memory()"):
        command = [sys.executable, "-c", MEMORY.format(call=call)]
        ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=clean_environment())
        kept[call] = int(ran.stdout)
    assert kept[""] < 50 < 150 < kept["process.keep_freed_memory()"], kept
