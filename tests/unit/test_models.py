"""Loading of models: zoos, state dicts and directories, refusals, and results of the right weights."""

from __future__ import annotations

import json
import pickle
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from imgbatch.concurrency.monitor import on_tick
from imgbatch.config.sections import ClassifyConfig, ModelConfig
from imgbatch.errors import Interrupted, ModelError
from imgbatch.models import architectures, child, directory, imagenet, loading, pretrained
from imgbatch.models.model import Model
from imgbatch.models.preprocess import Preprocess
from imgbatch.models.runtimes.base import Prediction
from imgbatch.models.runtimes.build import build
from imgbatch.storage.stores import Folder
from tests.conftest import S3Server
from tests.unit.networks import LABELS, STORES, Load, require_same_network, tiny, write
from tests.unit.pictures import scene

PIXELS = np.stack([scene(160, 160, seed=number) for number in range(5)])


def put_into_hub_cache(cache: Path, repository: str, net: nn.Module) -> None:
    """Write weights into the cache of huggingface_hub."""
    place, revision = cache / f"models--{repository.replace('/', '--')}", "0" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(revision)
    (place / "snapshots" / revision).mkdir(parents=True)
    save_file(net.state_dict(), place / "snapshots" / revision / "model.safetensors")


def test_timm_network_from_hub_cache(load: Load, tmp_path: Path) -> None:
    net = tiny(1000)
    put_into_hub_cache(tmp_path / "hf", "timm/test_resnet.r160_in1k", net)
    model = load("timm:test_resnet")
    assert (model.name, model.slug) == ("timm:test_resnet.r160_in1k", "timm-test_resnet.r160_in1k")
    assert model.labels[285] == "Egyptian cat" and model.features == 96
    assert model.preprocess == Preprocess.from_timm(net.pretrained_cfg)
    require_same_network(model.network(), net)
    again = load("timm:test_resnet.r160_in1k")
    assert again.digest == model.digest, "both names mean the same weights"


def test_torchvision_network_from_cache(load: Load, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torchvision.models.shufflenet_v2_x0_5().eval()
    entry = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT
    (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)
    torch.save(net.state_dict(), tmp_path / "torch/hub/checkpoints" / entry.url.rpartition("/")[2])
    model = load("torchvision:shufflenet_v2_x0_5")
    assert model.name == "torchvision:shufflenet_v2_x0_5@IMAGENET1K_V1" and "@" not in model.slug
    assert model.labels == imagenet.imagenet_labels() and model.features == 1024
    require_same_network(model.network(), net)


@pytest.mark.long
def test_torchvision_arguments_for_pretrained_weights_are_used(load: Load, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"transform_input": True, "aux_logits": False, "init_weights": False}
    net = torchvision.models.googlenet(**options).eval()
    save_file(net.state_dict(), tmp_path / "own.safetensors")
    model = load("torchvision:googlenet", weights=str(tmp_path / "own.safetensors"))
    require_same_network(model.network(), net)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:test_resnet", "are not available from https://huggingface.co/timm/test_resnet.*HF_HOME.*model.weights"),
        ("torchvision:resnet18", "are not available from https://download.pytorch.org/.*TORCH_HOME.*model.weights"),
        ("timm:resnet5O", "did you mean 'resnet50'"),
        ("timm:resnet50.a1_in2k", "did you mean 'a1_in1k'.*; it has: a1_in1k,"),
        ("torchvision:resnet5O", "did you mean 'resnet50'"),
        ("torchvision:resnet50@IMAGENET1K_V3", "did you mean 'IMAGENET1K_V2'"),
        ("torchvision:fcn_resnet50", "no network 'fcn_resnet50'"),
        ("timm:vit_small_patch14_dinov2", "features, not classes"),
        ("timm:resnet51q_", "did you mean"),
        ("timm:", "has no network ''"),
        ("resnet50", "timm:resnet50, one of torchvision torchvision:resnet50"),
        ("eficientnet_lite0", "did you mean 'efficientnet_lite0'"),
    ],
)
def test_unknown_model_name_is_refused_with_a_remedy(load: Load, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(name)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_plain_state_dict(load: Load, tmp_path: Path, labels: str, suffix: str) -> None:
    net, path = tiny(), tmp_path / f"own.{suffix}"
    save_file(net.state_dict(), path) if suffix == "safetensors" else torch.save({"state_dict": net.state_dict()}, path)
    model = load(path, architecture="test_resnet", labels=labels)
    assert (model.name, model.labels) == (str(path), LABELS)
    require_same_network(model.network(), net)
    same = load("timm:test_resnet", weights=str(path), labels=labels)
    assert (same.digest, same.name) == (model.digest, model.name)


def test_state_dict_that_does_not_fit_names_its_tensors(load: Load, tmp_path: Path, labels: str) -> None:
    state = dict(tiny().state_dict())
    state["head.weight"] = state.pop("fc.weight")
    state["fc.bias"] = torch.zeros(4)
    save_file(state, tmp_path / "own.safetensors")
    with pytest.raises(ModelError) as raised:
        load(tmp_path / "own.safetensors", architecture="test_resnet", labels=labels)
    message = str(raised.value)
    assert "1 missing: fc.weight" in message and "1 left over: head.weight" in message
    assert "fc.bias is 4 instead of 3" in message


def test_wrong_number_of_names_names_the_label_file(load: Load, tmp_path: Path, labels: str) -> None:
    put_into_hub_cache(tmp_path / "hf", "timm/test_resnet.r160_in1k", tiny(1000))
    save_file(tiny(5).state_dict(), tmp_path / "five.safetensors")
    five = str(tmp_path / "five.safetensors")
    cases: list[tuple[str, dict[str, str], str]] = [
        ("timm:test_resnet", {"labels": labels}, "has 3 names, and timm:test_resnet has 1,000 classes"),
        ("timm:test_resnet", {"labels": labels, "weights": five}, f"has 3 names, and {five} has 5 classes"),
        ("timm:test_resnet", {"weights": five}, f"{five} has 5 classes, and its zoo names 1,000: give the names with"),
        (five, {"architecture": "test_resnet", "labels": labels}, f"has 3 names, and {five} has 5 classes"),
    ]
    for name, keys, message in cases:
        with pytest.raises(ModelError) as refused:
            load(name, **keys)
        assert message in str(refused.value) and "fc.weight" not in str(refused.value)
        assert ("labels" not in keys) or f"model.labels={labels} has" in str(refused.value)


def test_head_of_another_width_names_the_weights(load: Load, tmp_path: Path, labels: str) -> None:
    state = dict(tiny(5).state_dict())
    state["fc.weight"] = state["fc.weight"][:, :7].contiguous()
    save_file(state, tmp_path / "own.safetensors")
    with pytest.raises(ModelError, match=r"fc\.weight is 5x7 instead of 3x96"):
        load(tmp_path / "own.safetensors", architecture="test_resnet", labels=labels)


@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:resnet18"])
def test_cache_with_git_lfs_pointers_is_named(load: Load, tmp_path: Path, name: str) -> None:
    put_into_hub_cache(tmp_path / "hf", "timm/test_resnet.r160_in1k", tiny(1000))
    (kept,) = tmp_path.glob("hf/*/snapshots/*/model.safetensors")
    if name.startswith("torchvision"):
        entry = torchvision.models.ResNet18_Weights.DEFAULT
        kept = tmp_path / "torch" / "hub" / "checkpoints" / entry.url.rpartition("/")[2]
        kept.parent.mkdir(parents=True)
    kept.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    with pytest.raises(ModelError) as refused:
        load(name)
    assert f"{kept} is a Git LFS pointer" in str(refused.value) and "git lfs pull" in str(refused.value)
    assert "weights_only" not in str(refused.value)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_pickles_are_never_loaded(load: Load, tmp_path: Path, labels: str) -> None:
    torch.save({"state_dict": tiny().state_dict(), "extra": Bomb(tmp_path / "boom")}, tmp_path / "bomb.pth")
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    (tmp_path / "bomb.safetensors").write_bytes((tmp_path / "bomb.pth").read_bytes())
    for suffix in ("pth", "pt", "safetensors"):
        with pytest.raises(ModelError, match="never loaded"):
            load(tmp_path / f"bomb.{suffix}", architecture="test_resnet", labels=labels)
    place = write(tmp_path / "dir", tiny())
    (place / "model.safetensors").write_bytes((tmp_path / "bomb.pth").read_bytes())
    with pytest.raises(ModelError, match="never loaded"):
        load(place)
    assert not (tmp_path / "boom").exists()
    torch.load(tmp_path / "bomb.pth", weights_only=False)
    assert (tmp_path / "boom").exists(), "it would have gone off"


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("x/own.pth", {}, "give the network with --set model.architecture"),
        ("x/nowhere.pth", {"architecture": "test_resnet"}, "no state dict x/nowhere.pth"),
        ("x/dir", {"weights": "x"}, "model.weights cannot be combined with"),
        ("timm:test_resnet", {"architecture": "resnet18"}, "model.architecture cannot be combined with"),
        ("efficientnet_lite0", {"labels": "x"}, "model.labels cannot be combined with"),
        ("timm:test_resnet", {"labels": "x/nowhere.txt"}, "model.labels=x/nowhere.txt"),
    ],
)
def test_contradicting_model_keys_are_refused(load: Load, name: str, keys: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(name, **keys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\n", r"model\.labels=.*bad\.txt has 2 names, and (the network|.*own\.safetensors) has 3 classes"),
        (b"background\na\nb\nc\n", r"has 4 names, and .* has 3 classes.*the first name is 'background': remove it"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
            r"bad\.txt is a Git LFS pointer.*lfs pull",
        ),
        (b"<!doctype html>\n<p>\nlog in", r"bad\.txt is an HTML page"),
        (b"a\n\nc\n", "line 2 is empty"),
        (b"a\nb\na\n", "'a' is the name of more than one class"),
        (b"\n", "is empty"),
        (b"\xff\xfe\x00", "not a text file"),
    ],
)
def test_wrong_label_file_is_refused(load: Load, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    save_file(tiny().state_dict(), tmp_path / "own.safetensors")
    place = write(tmp_path / "dir", tiny())
    for name, keys in ((tmp_path / "own.safetensors", {"architecture": "test_resnet"}), (place, {})):
        with pytest.raises(ModelError, match=message):
            load(name, labels=str(tmp_path / "bad.txt"), **keys)


def test_directories_are_exchanged_with_timm(load: Load, tmp_path: Path) -> None:
    net = timm.create_model("test_efficientnet", num_classes=3, global_pool="max", act_layer="relu").eval()
    ours = write(tmp_path / "ours", net)
    said = timm.create_model(f"local-dir:{ours}", pretrained=True).eval()
    require_same_network(said, net)
    assert said.pretrained_cfg["label_names"] == list(LABELS)
    require_same_network(load(ours).network(), net)
    timm.models.save_for_hf(
        net, str(tmp_path / "theirs"), model_config={"label_names": list(LABELS)}, safe_serialization=True
    )
    theirs = load(tmp_path / "theirs")
    require_same_network(theirs.network(), net)
    assert theirs.labels == LABELS and theirs.digest == load(ours).digest


def test_directories_are_exchanged_with_transformers(load: Load, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    net = timm.create_model("test_efficientnet", num_classes=3).eval()
    said = AutoModelForImageClassification.from_pretrained(write(tmp_path / "ours", net)).eval()
    assert tuple(said.config.id2label[number] for number in range(3)) == LABELS
    images = torch.randn((2, 3, 160, 160), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(said(pixel_values=images).logits, net(images))
    said.save_pretrained(tmp_path / "theirs")
    theirs = load(tmp_path / "theirs")
    require_same_network(theirs.network(), net)
    assert theirs.labels == LABELS


def test_directory_in_a_store_is_fetched_once_per_node(load: Load, s3: S3Server, tmp_path: Path) -> None:
    stores, net = s3.stores(), tiny()
    place = Folder(stores, "s3://out/models/tiny")
    directory.write_directory(place, net, LABELS, {"crop_pct": 0.5})
    model = load(place.uri, stores)
    assert model.name == place.uri and model.preprocess.resize == (320,)
    require_same_network(model.network(), net)
    place.put("model.safetensors", b"something else")
    require_same_network(model.network(), net)  # from the node's cache
    for kept in tmp_path.glob("imgbatch-*/weights-*"):
        kept.unlink()
    with pytest.raises(ModelError, match="has changed since the run started"):
        model.network()


def test_local_weights_are_shared_with_other_nodes_during_a_run(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = tiny()
    model, place = load(write(tmp_path / "mine", net)), Folder(STORES, str(tmp_path / "run" / "model"))
    with loading.share_weights(model, None) as alone:
        assert alone is model
    with loading.share_weights(model, place) as travels:
        (tmp_path / "mine" / "model.safetensors").unlink()  # as on another node
        require_same_network(travels.network(), net)
        assert replace(travels, network=model.network) == model
    assert place.names() == []


def change(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a key; None removes it."""
    config.pop(key) if value is None else config.__setitem__(key, value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("architecture", None, "names no 'architecture'"),
        ("architecture", "hf-hub:somebody/something", "no network 'hf-hub:somebody/something'"),
        ("architecture", "torchvision:fasterrcnn_resnet50_fpn", "no network"),
        ("architecture", "test_resnets", "did you mean 'test_resnet'"),
        ("architecture", "test_efficientnet", "does not fit 'test_efficientnet'.*missing"),
        ("model_args", {"checkpoint_path": "/evil.pth"}, "may not have checkpoint_path"),
        ("model_args", {"nonsense": 1}, "cannot create 'test_resnet'"),
        ("model_args", {"channels": (10**13,) * 4}, "cannot create 'test_resnet'"),
        ("model_args", [1], "'model_args' is not an object"),
        ("num_classes", 10**9, "has 3 names, and the network has 1,000,000,000 classes"),
        ("num_classes", True, "num_classes is True"),
        ("num_classes", 0, "num_classes is 0"),
        ("label_names", ["a", "b", "a"], "'a' is the name of more than one class"),
        ("label_names", ["a", "b"], "has 2 names, and the network has 3 classes"),
        ("label_names", {"a": 1}, "numbers its 1 name from 1 to 1"),
        ("label_names", "a, b, c", "no 'label_names'"),
        ("problem_type", "multi_label_classification", "an image any number of labels"),
        ("model_args", {"in_chans": 1}, r"3 channels.*repeat the weight"),
        ("pretrained_cfg", {"mean": "grey"}, "does not define the preprocessing"),
    ],
)
def test_contradictory_directory_is_refused(load: Load, tmp_path: Path, key: str, value: Any, message: str) -> None:
    place = write(tmp_path / "dir", tiny())
    config = json.loads((place / "config.json").read_text())
    change(config, key, value)
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load(place)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 200_000, "not JSON"),
        (b'{"architecture": "' + b"a" * (17 << 20) + b'"}', "larger than"),
        (b'{"architectures": ["ResNetForImageClassification"]}', "transformers wrote it for one of its own networks"),
        (b"\xff", "not JSON"),
    ],
)
def test_invalid_description_is_refused(load: Load, tmp_path: Path, content: bytes, message: str) -> None:
    place = write(tmp_path / "dir", tiny())
    (place / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load(place)


def test_damaged_weights_are_refused(load: Load, tmp_path: Path) -> None:
    net = tiny()
    with torch.no_grad():
        net.get_classifier().weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        load(write(tmp_path / "nan", net))
    torn = write(tmp_path / "torn", tiny())
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(ModelError, match="torn"):
        load(torn)


def test_unsupported_image_size_is_refused(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not accept images of 100x100.*model\.image_size"):
        load(write(tmp_path / "vit", tiny(name="test_vit")), image_size=100)


def test_child_process_result_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    chosen = ModelConfig(name=str(write(tmp_path / "dir", tiny())))
    assert loading.load(chosen, STORES).features == 96
    assert list(tmp_path.glob("imgbatch-*/checked-*.json"))
    monkeypatch.setattr(child, "run_task", None)
    assert loading.load(chosen, STORES).features == 96, "once per machine and model"


def test_tick_ends_the_wait_for_the_child() -> None:
    def interrupt() -> None:
        raise Interrupted(15)

    task = {"task": "check", "name": "x"}
    with pytest.raises(Interrupted), on_tick(interrupt):
        child.run_task(task, limit_s=60)
    with pytest.raises(ModelError, match="took more than 0 s"):
        child.run_task(task, limit_s=0)


def test_child_that_dies_raises_with_its_last_line() -> None:
    with pytest.raises(ModelError, match="x: the process that checked its network ended with 1: KeyError"):
        child.run_task({"name": "x"}, limit_s=60)


def test_labels_are_readable_and_unique() -> None:
    assert imagenet.imagenet_labels()[281:287] == (
        "tabby", "tiger cat", "Persian cat", "Siamese cat", "Egyptian cat", "cougar"
    )  # fmt: skip
    for classes in imagenet._SUBSETS:
        names = imagenet.labels_of(classes, None)
        assert len(set(names)) == len(names) == classes
    assert imagenet.labels_of(2, ["n02124075", "n02123159"]) == ("Egyptian cat", "tiger cat")
    assert imagenet.labels_of(2, ["n02124075", "other"]) == ("n02124075", "other")
    with pytest.raises(ModelError, match=r"the names of its 7 classes are unknown.*model\.labels"):
        imagenet.labels_of(7, None)
    with pytest.raises(ModelError, match="more than one class"):
        imagenet.require_unique(("a", "a"), "here")


def test_all_torchvision_weights_have_preprocessing() -> None:
    names = torchvision.models.list_models(module=torchvision.models)
    entries = [entry for name in names for entry in torchvision.models.get_model_weights(name)]
    assert len(entries) > 100
    for entry in entries:
        preset = entry.transforms()
        ours = Preprocess.from_timm(pretrained._to_pretrained_cfg(preset))
        assert (ours.height, ours.width, ours.resize) == (*preset.crop_size * 2, tuple(preset.resize_size)), entry
        assert (ours.mean, ours.std) == (tuple(preset.mean), tuple(preset.std))
        assert (ours.interpolation, preset.antialias) == (preset.interpolation.value, True)


@pytest.mark.parametrize("name", ["resnet50", "inception_v3", "efficientnet_b1", "efficientnet_v2_l"])
def test_preprocessing_agrees_with_torchvision(name: str, photos: list[Path]) -> None:
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    ours = Preprocess.from_timm(pretrained._to_pretrained_cfg(preset))
    for path in photos[:3]:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
            theirs = preset(Image.fromarray(pixels))
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (ours.mean, ours.std))
        shown = (theirs * std + mean).permute(1, 2, 0).numpy() * 255
        assert np.abs(shown - ours(pixels)).mean() < 0.5


@pytest.mark.parametrize("keys", [{"crop_pct": 1.0}, {"image_size": 128}, {"crop_pct": 0.8, "image_size": 192}])
def test_crop_and_size_can_be_overridden(load: Load, tmp_path: Path, keys: dict[str, Any]) -> None:
    net = tiny()
    place = write(tmp_path / "dir", net)
    chosen, plain = load(place, **keys), load(place)
    size = keys.get("image_size", 160)
    asked = {"crop_pct": keys.get("crop_pct"), "input_size": (3, size, size)}
    data = timm.data.resolve_data_config(
        {key: value for key, value in asked.items() if value}, pretrained_cfg=net.pretrained_cfg
    )
    picture = scene(300, 400)
    theirs = timm.data.create_transform(**data, normalize=False)(Image.fromarray(picture))
    assert np.abs(np.asarray(theirs).transpose(1, 2, 0).astype(int) - chosen.preprocess(picture)).mean() < 0.5
    assert chosen.fingerprint()["preprocess"] != plain.fingerprint()["preprocess"]
    assert chosen.fingerprint()["weights"] == plain.fingerprint()["weights"]
    assert load("efficientnet_lite0", **keys).preprocess != load("efficientnet_lite0").preprocess


def predict(model: Model, runtime: str, pixels: npt.NDArray[np.uint8], embeddings: bool = True) -> Prediction:
    """Return the prediction of a runtime in 32 bits."""
    config = ClassifyConfig(runtime=runtime, dtype="float32", batch_size=2)
    return build(model, k=3, device="cpu", config=config, embeddings=embeddings)(pixels)


def by_hand(net: nn.Module, model: Model, pixels: npt.NDArray[np.uint8]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return probabilities and the features before the head, computed with timm."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.preprocess.mean, model.preprocess.std))
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        return net(images).softmax(1), net.forward_head(net.forward_features(images), pre_logits=True)


@pytest.mark.parametrize(
    ("runtime", "name"), [("torch", "mobilenetv3_small_050"), ("torch", "test_resnet"), ("openvino", "test_resnet")]
)
@pytest.mark.long
def test_embeddings_are_the_input_of_the_head(load: Load, tmp_path: Path, runtime: str, name: str) -> None:
    net = tiny(4, name).eval()
    model = load(write(tmp_path / "dir", net, "wxyz"), image_size=160)
    scores, features = by_hand(net, model, PIXELS)
    found = predict(model, runtime, PIXELS)
    assert found.embeddings is not None and found.embeddings.dtype == np.float16
    assert found.embeddings.shape == (5, model.features) and features.std() > 0
    assert np.allclose(found.embeddings, features, rtol=2e-3, atol=2e-3)
    assert np.allclose(found.scores, scores.topk(3).values, atol=1e-4)
    assert predict(model, runtime, PIXELS[:0]).embeddings.shape == (0, model.features)  # type: ignore[union-attr]
    if runtime == "torch":  # a second conversion to OpenVINO would take seconds
        plain = predict(model, runtime, PIXELS, embeddings=False)
        assert plain.embeddings is None and np.allclose(plain.scores, found.scores, atol=1e-5)


def test_embeddings_of_a_convolutional_head_are_averaged(load: Load, tmp_path: Path, labels: str) -> None:
    torch.manual_seed(0)
    net = torchvision.models.squeezenet1_1(num_classes=3).eval()
    save_file(net.state_dict(), tmp_path / "own.safetensors")
    model = load("torchvision:squeezenet1_1", weights=str(tmp_path / "own.safetensors"), labels=labels, image_size=160)
    seen: list[torch.Tensor] = []
    architectures.find_head(net, 3).register_forward_hook(lambda *called: seen.append(called[1][0]))  # type: ignore[union-attr]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.preprocess.mean, model.preprocess.std))
    with torch.inference_mode():
        scores = net((torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255 - mean) / std).softmax(1)
    found = predict(model, "torch", PIXELS)
    assert np.allclose(found.embeddings, seen[0].mean((2, 3)), rtol=2e-3, atol=2e-3)
    assert np.allclose(found.scores, scores.topk(3).values, atol=1e-4) and model.features == 512


def test_network_without_single_head_layer_has_no_embeddings(load: Load, tmp_path: Path) -> None:
    model = replace(load(write(tmp_path / "dir", tiny())), features=None)
    with pytest.raises(ModelError, match=r"output\.embeddings.*no single layer"):
        model.width()
