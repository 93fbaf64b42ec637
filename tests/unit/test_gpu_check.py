"""The script for machines with a GPU, walked through on a CPU."""

from __future__ import annotations

import pytest
import torch

from imgbatch.errors import ModelError
from imgbatch.models import builtin
from tests.gpu import check


def test_all_checks_run_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--device", "cpu", "--small"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {len(line.split("|")) for line in lines} == {5}
    said = "\n".join(lines)
    assert "batches of 4096 became 16; 100.0% of the labels are equal" in said
    assert said.count("labels in ") == 3 and said.count("images/s, batches of ") == 2
    assert "NO" not in said


def test_random_weights_give_many_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(config: object) -> None:
        raise ModelError("the package with the weights is not installed")

    monkeypatch.setattr(builtin, "efficientnet_lite0", missing)
    model = check.load_model()
    pixels = check.pictures(24, model.preprocess)
    labels = check.TorchRuntime(model, k=1, device="cpu", dtype="float32")(pixels).ids
    assert len(set(labels[:, 0].tolist())) > 8


def test_a_difference_is_reported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "rows", lambda device, size: [check.Row("labels in float16", "3 of 8", passed=False)])
    assert check.main(["--device", "cpu"]) == 1
    assert "| labels in float16 | 3 of 8 | NO |" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([]) == 2
    assert "torch finds no CUDA device on this machine" in capsys.readouterr().err
