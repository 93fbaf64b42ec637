"""Files of weights: wrapped, with prefixes, without counters; and files of other kinds."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save, save_file

from imgbatch.errors import ModelError
from imgbatch.models import architectures, weights
from tests.unit.networks import Load, require_same_network, tiny, write

State = dict[str, torch.Tensor]


def prefixed(state: State, prefix: str) -> State:
    """Return tensors under longer names."""
    return {prefix + name: value for name, value in state.items()}


FORMS: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "no counters": lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
    "PyTorch's tutorial": lambda state: {
        "epoch": 3,
        "model_state_dict": state,
        "optimizer_state_dict": {},
        "loss": 0.5,
    },
    "model": lambda state: {"model": state, "args": None},
    "net": lambda state: {"net": state, "acc": 93.5, "epoch": 3},
    "twice": lambda state: {"model": {"state_dict": state}, "step": 1},
    "averaged": lambda state: {"state_dict": prefixed(tiny(4).state_dict(), "x."), "state_dict_ema": state},
    "DDP": lambda state: prefixed(state, "module."),
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "DDP of compiled": lambda state: prefixed(state, "module._orig_mod."),
    "compiled layers": lambda state: {
        name.replace("layer1.", "layer1._orig_mod.").replace("fc.", "fc._orig_mod."): value
        for name, value in state.items()
    },
    "Lightning": lambda state: {"state_dict": prefixed(state, "model."), "hyper_parameters": {"lr": 1e-3}, "loops": {}},
    "deep": lambda state: prefixed(state, "module.net.backbone."),
    "SWA": lambda state: {"n_averaged": torch.tensor(3), **prefixed(state, "module.")},
    "no counters, DDP": lambda state: prefixed(FORMS["no counters"](state), "module."),
}


@pytest.mark.parametrize("form", FORMS)
def test_wrapped_and_prefixed_tensors_are_loaded(load: Load, tmp_path: Path, labels: str, form: str) -> None:
    net = tiny()
    torch.save(FORMS[form](net.state_dict()), tmp_path / "own.pth")
    model = load(tmp_path / "own.pth", architecture="test_resnet", labels=labels)
    require_same_network(model.network(), net)
    torch.save(net.state_dict(), tmp_path / "plain.pth")
    plain = load(tmp_path / "plain.pth", architecture="test_resnet", labels=labels)
    assert model.digest == plain.digest, "the same weights, however they are wrapped"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("PyTorch's tutorial", "'model_state_dict' of the checkpoint is used"),
        ("averaged", "'state_dict_ema' (averaged weights) of the checkpoint is used; 'state_dict' is not"),
        ("Lightning", "'model.' was removed from the names of the tensors"),
        ("deep", "'module.', 'net.', 'backbone.' was removed"),
        (
            "no counters",
            "buffers without effect at inference are missing or left over: bn1.num_batches_tracked and",
        ),
    ],
)
def test_changes_of_names_are_logged(
    load: Load, tmp_path: Path, labels: str, form: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    torch.save(FORMS[form](tiny().state_dict()), tmp_path / "own.pth")
    for _ in range(2):  # also when the model directory is in the node's cache
        caplog.clear()
        load(tmp_path / "own.pth", architecture="test_resnet", labels=labels)
        assert message in caplog.text


def test_timm_checkpoint_with_arguments_is_loaded(load: Load, tmp_path: Path, labels: str) -> None:
    import argparse

    net = tiny()
    torch.save({"state_dict": net.state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "own.pth.tar")
    require_same_network(load(tmp_path / "own.pth.tar", architecture="test_resnet", labels=labels).network(), net)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {**state, "extra.weight": torch.zeros(2)}, "1 left over: extra.weight"),
        (lambda state: {name: value for name, value in state.items() if name != "bn1.running_mean"},
         "1 missing: bn1.running_mean"),
        (lambda state: {name: value for name, value in state.items() if name != "fc.bias"}, "1 missing: fc.bias"),
        (lambda state: {**prefixed(state, "model."), "loss.weight": torch.zeros(3)}, "left over: loss.weight, model."),
        (lambda state: {**state, "epoch": 3}, r"no state dict: it has 'epoch' \(int\) among its tensors"),
        (lambda state: {"state_dict": {**state, "name": "x"}}, r"it has 'name' \(str\) among its tensors"),
        (lambda state: {"epoch": 3, "lr": 0.1, "best": 1, "x": None}, r"it has 'epoch' \(int\), 'lr' \(float\), .* and 1 more "
         "and no tensors"),
        (lambda state: [*state.values()], "it is list, not names with tensors"),
        (lambda state: {}, "it is empty"),
        (lambda state: {**state, "conv1.0.weight": state["conv1.0.weight"][:, :1]}, "repeat the weight"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    load: Load, tmp_path: Path, labels: str, change: Callable[[State], Any], message: str
) -> None:
    torch.save(change(tiny().state_dict()), tmp_path / "own.pth")
    with pytest.raises(ModelError, match=message):
        load(tmp_path / "own.pth", architecture="test_resnet", labels=labels)


def scripted(path: Path) -> None:
    """Write a TorchScript archive."""
    torch.jit.save(torch.jit.trace(torch.nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 4, 4)), str(path))  # type: ignore[no-untyped-call]


NO_WEIGHTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "LFS": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\nsize 4\n"), "pointer.*git lfs pull"),
    "web page": (lambda path: path.write_text("\n<!DOCTYPE html><html>Sign in"), "is a web page, not weights"),
    "store's error": (lambda path: path.write_text("<?xml version='1.0'?><Error>"), "is a web page"),
    "text": (lambda path: path.write_text('{"error": "Repository not found"}'), "is a text file, not weights: .*not found"),
    "empty": (lambda path: path.write_bytes(b""), "own.pth is empty"),
    "HDF5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(5000)), "HDF5, as Keras writes it"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(bytes(5000))), "compressed with gzip"),
    "pickled network": (lambda path: torch.save(tiny(), path), r"more than tensors \(.*and \d+ more\), which is never loaded"),
    "truncated": (lambda path: path.write_bytes(save(tiny().state_dict())[:-1000]), "it is truncated, or"),
    "TorchScript": (scripted, "is TorchScript, which is a program"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_file_that_is_not_weights_is_named_by_kind(load: Load, tmp_path: Path, labels: str, kind: str) -> None:
    make, message = NO_WEIGHTS[kind]
    make(tmp_path / "own.pth")
    with pytest.raises(ModelError, match=rf"own\.pth.*{message}|{message}"):
        load(tmp_path / "own.pth", architecture="test_resnet", labels=labels)
    place = write(tmp_path / "dir", tiny())
    make(place / "model.safetensors")
    with pytest.raises(ModelError, match=message.replace("own.pth", "model.safetensors")) as refused:
        load(place)
    assert str(place / "model.safetensors") in str(refused.value)


def test_format_is_recognised_by_content(tmp_path: Path) -> None:
    state = tiny().state_dict()
    save_file(state, tmp_path / "safe.pth")
    torch.save(state, tmp_path / "torch.safetensors")
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name in ("safe.pth", "torch.safetensors", "old.bin"):
        read, notes = weights.read(tmp_path / name, name)
        assert read.keys() == state.keys() and notes == []


@pytest.mark.parametrize("architecture", ["swin_tiny_patch4_window7_224", "levit_128s"])
def test_index_buffers_are_optional(architecture: str) -> None:
    """Only some versions of timm write these buffers; the network computes them when it is created."""
    net = timm.create_model(architecture, num_classes=3)
    state = dict(net.state_dict())
    tables = [name for name, _ in net.named_buffers() if name.rpartition(".")[2] in weights._OPTIONAL_BUFFERS]
    assert any("ind" in name or "idx" in name for name in tables)
    buffers = dict(net.named_buffers())
    architectures.load_weights(net, {**state, **{name: buffers[name] for name in tables}}, "x", architecture)
    architectures.load_weights(
        net, {name: value for name, value in state.items() if name not in tables}, "x", architecture
    )


def test_directory_with_torch_save_weights(load: Load, tmp_path: Path) -> None:
    net = tiny()
    place = write(tmp_path / "dir", net)
    safe = load(place)
    (place / "model.safetensors").unlink()
    torch.save(net.state_dict(), place / "pytorch_model.bin")
    model = load(place)
    require_same_network(model.network(), net)
    assert model.labels == safe.labels and model.preprocess == safe.preprocess
    torch.save(tiny(), place / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle with more than tensors"):
        load(place)


def test_split_weights_and_missing_weights_have_different_messages(load: Load, tmp_path: Path) -> None:
    place = write(tmp_path / "dir", tiny())
    (place / "model.safetensors").rename(place / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        load(place)
    (place / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="its weights are in several files"):
        load(place)
