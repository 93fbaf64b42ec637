"""The self-check of workers: a damaged network is detected even with matching digests, and replaced."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from imgbatch.config.sections import ClassifyConfig, ModelConfig
from imgbatch.models import loading, node_cache, pretrained, self_check
from imgbatch.models.model import Model
from imgbatch.models.preprocess import Preprocess
from imgbatch.models.runtimes import base, build, openvino_runtime
from imgbatch.models.self_check import SelfCheckError
from tests.unit.networks import STORES, Load, tiny, write


@pytest.fixture
def model(load: Load, tmp_path: Path) -> Model:
    """A small network in a model directory."""
    return load(write(tmp_path / "model", tiny()))


def checked(model: Model, **chosen: Any) -> base.Runtime:
    """Return the runtime that a worker would use for the model."""
    return build.build_checked(model, k=3, device="cpu", config=ClassifyConfig(batch_size=2, **chosen))


def converted() -> Path:
    """Return the converted network in the node's cache."""
    (place,) = (path for path in node_cache.folder().glob("openvino-*") if path.is_dir())
    return place


PIXELS = (28995874, [198, 95, 235])


def forge(place: Path) -> None:
    """Write the digests of the current content."""
    sums = node_cache._digest_file(place)
    sums.write_text(json.dumps({**json.loads(sums.read_text()), "files": node_cache._digests_of(place)}))


def test_shipped_reference_equals_torch() -> None:
    model = loading.load(ModelConfig(), STORES)
    assert model.logits is not None
    again = pretrained._reference_logits(model.network(), model.preprocess)
    shipped, computed = (np.frombuffer(each, "<f4") for each in (model.logits, base64.b64decode(again)))
    assert np.abs(shipped - computed).max() < 1e-3 < shipped.std()


def test_other_size_has_its_own_reference(load: Load) -> None:
    plain, cropped, other = load("efficientnet_lite0"), load("efficientnet_lite0", crop_pct=1.0), load(
        "efficientnet_lite0", image_size=96
    )  # fmt: skip
    assert plain.logits == cropped.logits != other.logits
    self_check.run_check(
        other, build.build(other, k=1, device="cpu", config=ClassifyConfig(runtime="torch", batch_size=2))
    )


def test_sound_network_passes_in_every_runtime_and_dtype(model: Model) -> None:
    for name, dtype in (("openvino", "float32"), ("openvino", "bfloat16"), ("torch", "float32"), ("torch", "bfloat16")):
        facts = checked(model, runtime=name, dtype=dtype).facts()
        assert "node_faults" not in facts and facts["dtype"] == dtype and facts["runtime"].startswith(name)


def zero(path: Path, third: int) -> None:
    """Zero a third of a file. Only the last third of the small network matters: its residual branches start with zeros."""
    content = bytearray(path.read_bytes())
    length = len(content) // 3
    content[third * length : (third + 1) * length] = bytes(length)
    path.write_bytes(content)


def zeroed(path: Path) -> None:
    zero(path, 2)


def halved(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize(
    ("name", "damage"),
    [("network.bin", zeroed), ("network.bin", halved), ("network.xml", halved), ("network.xml", zeroed)],
)
def test_damaged_network_is_converted_again_once(
    model: Model, name: str, damage: Callable[[Path], object], forged: bool
) -> None:
    """With forged digests, the self-check must detect the damage."""
    assert "node_faults" not in checked(model, dtype="float32").facts()
    damage(converted() / name)
    if forged:
        forge(converted())
        with pytest.raises((SelfCheckError, openvino_runtime.ConversionUnreadable)):
            self_check.run_check(model, build.build(model, k=3, device="cpu", config=ClassifyConfig(dtype="float32")))
    repaired = checked(model, dtype="float32")
    facts = repaired.facts()
    assert facts["runtime"].startswith("openvino") and ("node_faults" in facts) == forged
    if forged:
        (fault,) = facts["node_faults"].values()
        assert fault.endswith(": made again")
    self_check.run_check(model, repaired)
    assert "node_faults" not in checked(model, dtype="float32").facts(), "the next process finds it sound"


@pytest.mark.long
def test_zeroed_third_of_the_default_model_is_detected(load: Load) -> None:
    model = load("efficientnet_lite0")
    chosen: dict[str, Any] = {"k": 5, "device": "cpu", "config": ClassifyConfig()}
    self_check.run_check(model, build.build(model, **chosen))
    path = converted() / "network.bin"
    whole = path.read_bytes()
    for third in range(3):
        path.write_bytes(whole)
        zero(path, third)
        forge(converted())
        with pytest.raises((SelfCheckError, openvino_runtime.ConversionUnreadable)):
            self_check.run_check(model, build.build(model, **chosen))


def test_repeated_failure_falls_back_to_torch(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    convert, made = openvino_runtime._convert, []

    def badly(*arguments: Any) -> None:
        convert(*arguments)
        made.append(arguments)
        zeroed(arguments[-1] / "network.bin")

    monkeypatch.setattr(openvino_runtime, "_convert", badly)
    found = checked(model)
    facts = found.facts()
    assert (facts["runtime"].split()[0], facts["dtype"], len(made)) == ("torch", "float32", 2)
    (fault,) = facts["node_faults"].values()
    assert ("differ from the model's" in fault or "cannot be loaded" in fault) and fault.endswith(
        ": torch in 32 bits is used"
    )
    assert json.dumps(facts)
    self_check.run_check(model, found)
    assert len(found(self_check.fixed_images(160, 160)).ids) == 2


def test_node_is_unusable_if_torch_disagrees(model: Model) -> None:
    logits = np.frombuffer(model.logits or b"", "<f4")
    other = replace(model, logits=self_check.to_bytes(logits[::-1].copy()))
    with pytest.raises(SelfCheckError, match=r"differ from the model's by \d.*\(float32\)"):
        checked(other)


class Answers:
    """A network that returns fixed logits."""

    def __init__(self, logits: npt.NDArray[Any], dtype: str) -> None:
        self._logits, self._dtype = logits.astype(np.float32), dtype

    def logits(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return self._logits

    def facts(self) -> dict[str, Any]:
        return {"dtype": self._dtype}


def test_tolerance_of_the_self_check() -> None:
    random = np.random.default_rng(0)
    reference, noise = random.normal(-7, 2, (2, 50)), random.normal(0, 2, (2, 50))
    model = Model(
        name="x", digest="", labels=tuple(map(str, range(50))), network=lambda: None,  # type: ignore[arg-type, return-value]
        preprocess=Preprocess(height=8, width=8, resize=(8,), mean=(0.5,) * 3, std=(0.5,) * 3),
        logits=self_check.to_bytes(reference),
    )  # fmt: skip
    for dtype, share in (("float32", 0.001), ("float16", 0.1), ("bfloat16", 0.1)):
        self_check.run_check(model, Answers(reference + share * noise, dtype))
        wrong = [
            reference[::-1], reference * 0, reference[:, ::-1], np.full((2, 50), -7.0), reference + noise,
            np.where(np.arange(100).reshape(2, 50) == 60, np.nan, reference), reference[:, :49],
        ]  # fmt: skip
        for answer in wrong:
            with pytest.raises(SelfCheckError):
                self_check.run_check(model, Answers(answer, dtype))
    with pytest.raises(SelfCheckError):
        self_check.run_check(model, Answers(reference + 0.1 * noise, "float32"))
    # An untrained head: all logits are almost equal, and differ only by rounding.
    alike = replace(model, logits=self_check.to_bytes(np.full((2, 50), 8.0)))
    self_check.run_check(alike, Answers(np.full((2, 50), 8.03), "bfloat16"))
    with pytest.raises(SelfCheckError):
        self_check.run_check(alike, Answers(np.full((2, 50), 9.0), "bfloat16"))


def test_fixed_images_never_change() -> None:
    """A change needs a new `VERSION` and a new shipped reference."""
    found = self_check.fixed_images(224, 160)
    assert found.shape == (2, 224, 160, 3) and found.dtype == np.uint8 and found.std() > 50
    assert (int(found.sum()), found[0, 100, 100].tolist()) == PIXELS


def test_a_signal_after_openvino_was_used_in_another_thread() -> None:
    code = """
import faulthandler, signal, threading
from imgbatch.models.runtimes.openvino_runtime import get_core
faulthandler.enable()  # whose stack for signals the plugin replaces
held = [get_core()]
held[0].get_property("CPU", "OPTIMIZATION_CAPABILITIES")
thread = threading.Thread(target=held.clear)
thread.start()
thread.join()
signal.signal(signal.SIGINT, lambda *ignored: print("handled"))
signal.raise_signal(signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
