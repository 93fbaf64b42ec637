"""`config.json` of model directories: all forms of timm, refusals and warnings."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from imgbatch.config.sections import ModelConfig
from imgbatch.errors import ConfigError, ModelError
from imgbatch.models import imagenet, loading
from imgbatch.models.preprocess import Preprocess
from imgbatch.training import network
from tests.unit.networks import LABELS, STORES, Load, require_same_network, tiny, write
from tests.unit.pictures import scene

OWN = {"mean": [0.4, 0.5, 0.6], "std": [0.3, 0.2, 0.1], "input_size": [3, 128, 128], "crop_pct": 0.8,
       "interpolation": "bilinear"}  # fmt: skip


def described(path: Path, changes: dict[str, Any], classes: int = 3) -> Path:
    """Write a directory and change its description; None removes a key."""
    labels = LABELS if classes == 3 else [f"class {number}" for number in range(classes)]
    place = write(path, tiny(classes), labels)
    config = json.loads((place / "config.json").read_text())
    for key, value in changes.items():
        config[key] = value
        if value is None:
            del config[key]
    (place / "config.json").write_text(json.dumps(config))
    return place


def flat(path: Path, keys: dict[str, Any]) -> Path:
    """Write a directory in the form of timm before 0.9, with all keys at the top."""
    place = write(path, tiny())
    config = {"architecture": "test_resnet", "num_classes": 3, "label_names": list(LABELS), **keys}
    (place / "config.json").write_text(json.dumps(config))
    return place


def by_timm(place: Path) -> dict[str, Any]:
    """Return the preprocessing that timm itself uses for a directory."""
    net = timm.create_model(f"local-dir:{place}", pretrained=False)
    data: dict[str, Any] = timm.data.resolve_model_data_config(net)
    return data


@pytest.mark.parametrize(
    "keys",
    [OWN, {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 160, 160]}, {"crop_pct": 1.0}, {"interpolation": "nearest"},
     {**OWN, "crop_mode": "squash", "test_input_size": [3, 288, 288], "test_crop_pct": 1.0}, {"mean": None}, {}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("form", ["flat", "nested"])
def test_directory_is_read_like_timm(load: Load, tmp_path: Path, form: str, keys: dict[str, Any]) -> None:
    if form == "flat":
        place = flat(tmp_path / "dir", keys)
    else:
        place = described(tmp_path / "dir", {"pretrained_cfg": {"num_classes": 3, **keys}, "model_args": None})
    model, data = load(place), by_timm(place)
    assert model.preprocess == Preprocess.from_timm(data) and model.labels == LABELS
    picture = scene(300, 400)
    theirs = timm.data.create_transform(**data, normalize=False)(Image.fromarray(picture))
    assert np.abs(np.asarray(theirs).transpose(1, 2, 0).astype(int) - model.preprocess(picture)).mean() < 0.5


@pytest.mark.parametrize("nothing", [None, {}, "null"])
def test_empty_pretrained_cfg_means_flat_form(load: Load, tmp_path: Path, nothing: Any) -> None:
    place = described(tmp_path / "dir", {"pretrained_cfg": nothing, **OWN})
    config = json.loads((place / "config.json").read_text())
    if nothing == "null":
        (place / "config.json").write_text(json.dumps({**config, "pretrained_cfg": None}))
    assert load(place).preprocess == Preprocess.from_timm(OWN)


def test_flat_description_warns_about_changed_labels(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(flat(tmp_path / "flat", OWN))
    assert (
        "since 0.2.0 the preprocessing at its top, or in preprocessor_config.json beside it, is used: 128×128 px from"
        in caplog.text
    )
    assert "0.1 ignored it and used 224×224 px from 256 (crop 0.875), bicubic, mean 0.485" in caplog.text
    caplog.clear()
    load(flat(tmp_path / "same", {"mean": [0.485, 0.456, 0.406]}))
    load(described(tmp_path / "nested", {"pretrained_cfg": OWN}))
    load(write(tmp_path / "ours", tiny()))
    assert "0.2.0" not in caplog.text, "what 0.1 read as well is no news"


PROCESSOR = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "resample": 2,
             "image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.1]}  # fmt: skip


@pytest.mark.parametrize("kind", ["ViTImageProcessor", "CLIPImageProcessor"])
def test_transformers_processor_is_read_without_other_preprocessing(load: Load, tmp_path: Path, kind: str) -> None:
    import transformers

    place = described(tmp_path / "dir", {"pretrained_cfg": None})
    sides = (
        {"size": {"height": 160, "width": 160}}
        if kind[0] == "V"
        else {"size": {"shortest_edge": 182}, "crop_size": 160}
    )
    processor = getattr(transformers, kind)(**PROCESSOR, **sides)
    processor.save_pretrained(place)
    preprocess = load(place).preprocess
    picture = scene(300, 400)
    theirs = processor(Image.fromarray(picture), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = (preprocess(picture) / 255 - preprocess.mean) / preprocess.std
    assert np.abs(theirs - ours).mean() < 0.02
    stated = described(tmp_path / "stated", {"pretrained_cfg": OWN})
    processor.save_pretrained(stated)
    assert load(stated).preprocess == Preprocess.from_timm(OWN), "config.json comes first"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"do_flip_channel_order": True}, "do_flip_channel_order=True is not supported"),
        ({"do_rescale": False}, "do_rescale=False is not supported"),
        ({"crop_pct": 0.875, "size": {"shortest_edge": 224}}, "crop_pct=0.875 is not supported"),
        ({"resample": 1}, "its preprocessing is not supported"),
        ({"size": {"shortest_edge": 224}}, "nothing is cropped"),
        (
            {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": {"height": 224, "width": 200}},
            "not square",
        ),
        ({"size": [1]}, "its preprocessing is not supported"),
    ],
)
def test_unsupported_processor_is_refused(load: Load, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    place = described(tmp_path / "dir", {"pretrained_cfg": None})
    (place / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **keys}))
    with pytest.raises(ModelError, match=f"preprocessor_config.json.*{message}"):
        load(place)


def test_missing_preprocessing_is_logged_with_defaults(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = described(tmp_path / "dir", {"pretrained_cfg": None})
    assert load(place).preprocess == Preprocess.from_timm({})
    assert (
        "does not state input_size, crop_pct, interpolation, mean, std: timm's defaults are used, 224×224 px"
        in caplog.text
    )
    assert (
        "timm's own weights for this network have 160×160 px from 168" in caplog.text
        and "Set model.mean" in caplog.text
    )
    caplog.clear()
    keys = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "image_size": 160, "crop_pct": 0.95}
    assert load(place, **keys).preprocess == Preprocess.from_timm({**keys, "input_size": (3, 160, 160)})
    load(described(tmp_path / "full", {"pretrained_cfg": OWN}))
    assert caplog.text == ""
    load(described(tmp_path / "part", {"pretrained_cfg": {key: OWN[key] for key in OWN if key != "mean"}}))
    assert "does not state mean: timm's defaults are used" in caplog.text
    caplog.clear()
    load(described(tmp_path / "bytes", {"pretrained_cfg": {**OWN, "mean": [123.7, 116.3, 103.5]}}))
    assert "looks like 0 to 255" in caplog.text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"input_space": "BGR"}, "input_space='BGR' would change the input of the network"),
        ({"input_range": [0, 255]}, r"input_range=\[0, 255\] would change"),
        ({"do_center_crop": False}, "do_center_crop=False would change"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean=.*Use timm's keys"),
        ({"resize_mode": "longest"}, "resize_mode='longest' would change"),
        ({"crop_mode": "border"}, "crop_mode='border', which is not supported"),
        ({"interpolation": "random"}, "interpolation='random'.*model.interpolation sets another"),
        ({"input_size": [1, 128, 128]}, "repeat the weight of its first convolution"),
        ({"input_size": 128}, "does not define the preprocessing"),
        ({"mean": [0.5, 0.5]}, "three numbers"),
    ],
)
@pytest.mark.parametrize("form", ["flat", "nested"])
def test_unsupported_pixel_keys_are_refused(
    load: Load, tmp_path: Path, form: str, keys: dict[str, Any], message: str
) -> None:
    said = {**OWN, **keys}
    if form == "flat":
        place = flat(tmp_path / "dir", said)
    else:
        place = described(tmp_path / "dir", {"pretrained_cfg": said, "model_args": None})
    with pytest.raises(ModelError, match=f"config.json.*{message}"):
        load(place)


def test_keys_without_effect_are_accepted(load: Load, tmp_path: Path) -> None:
    harmless = {"input_space": "RGB", "input_range": [0, 1], "do_resize": True, "license": "mit", "hidden": {"x": 1}}
    assert load(flat(tmp_path / "flat", {**OWN, **harmless})).preprocess == Preprocess.from_timm(OWN)
    assert load(described(tmp_path / "dir", {"pretrained_cfg": {**OWN, **harmless}})).preprocess.height == 128


def test_contradictory_preprocessing_is_refused(load: Load, tmp_path: Path) -> None:
    place = described(tmp_path / "dir", {"pretrained_cfg": OWN, "mean": [0.5] * 3})
    with pytest.raises(
        ModelError, match=r"mean is \[0.5, 0.5, 0.5\] at the top and \[0.4, 0.5, 0.6\] in pretrained_cfg"
    ):
        load(place)
    assert load(described(tmp_path / "same", {"pretrained_cfg": OWN, **OWN})).preprocess == Preprocess.from_timm(OWN)


def test_fixed_input_size_is_passed_to_the_network(load: Load, tmp_path: Path) -> None:
    net = timm.create_model("test_vit", num_classes=3, img_size=192).eval()
    place = write(tmp_path / "vit", net)
    config = json.loads((place / "config.json").read_text())
    assert config["model_args"].pop("img_size") == [192, 192], "as timm has not always written it"
    config["pretrained_cfg"] |= {"fixed_input_size": True, "input_size": [3, 192, 192]}
    (place / "config.json").write_text(json.dumps(config))
    model = load(place)
    assert model.preprocess.height == 192
    blank = torch.rand((1, 3, 192, 192))
    with torch.inference_mode():
        assert torch.equal(model.network()(blank), net(blank))


NAMES = ["red", "green", "blue"]


@pytest.mark.parametrize(
    "keys",
    [
        {"labels": NAMES},
        {"label_names": {"0": "red", "1": "green", "2": "blue"}},
        {"id2label": {"0": "red", "1": "green", "2": "blue"}},
        {"label_names": NAMES, "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}},
        {"label_names": NAMES, "labels": NAMES, "label_descriptions": {"red": "a colour"}},
        {"label_names": [" red", "green ", "blue"]},
    ],
    ids=str,
)
def test_class_names_are_read_from_several_keys(load: Load, tmp_path: Path, keys: dict[str, Any]) -> None:
    assert load(described(tmp_path / "dir", {"label_names": None, **keys})).labels == tuple(NAMES)
    assert load(flat(tmp_path / "flat", {"label_names": None, **OWN, **keys})).labels == tuple(NAMES)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"labels": NAMES[::-1]}, "label_names and labels name the classes differently"),
        ({"id2label": {"0": "a", "1": "c", "2": "b"}}, "label_names and id2label name the classes differently"),
        ({"label_names": {"0": "a", "2": "c"}}, "its 2 names from 0 to 2"),
        ({"label_names": [1, 2, 3]}, "the name of class 0 is 1, which is not a text"),
        (
            {"label_names": ["background", "a", "b", "c"]},
            "has 4 names, and the network has 3 classes.*'background': remove it",
        ),
        ({"label_names": ["Cafe\u0301", "Caf\u00e9", "x"]}, "'Caf\u00e9' is the name of more than one class"),
        ({"num_classes": 4, "model_args": {"num_classes": 3}}, "num_classes is 4, and 3 in model_args"),
    ],
)
def test_contradictory_class_names_are_refused(load: Load, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(described(tmp_path / "dir", keys))


def test_thousand_named_classes_keep_their_names(load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"plant {number}" for number in range(1000)]
    place = described(tmp_path / "dir", {"label_names": None, "labels": names}, 1000)
    assert load(place).labels == tuple(names) and "since 0.2.0 its 'labels' name the classes" in caplog.text
    assert load(described(tmp_path / "bare", {"label_names": None}, 1000)).labels == imagenet.imagenet_labels()


def test_placeholder_labels_are_logged(load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(described(tmp_path / "dir", {"label_names": ["LABEL_0", "LABEL_1", "LABEL_2"]}))
    assert "placeholders LABEL_0, …: set model.labels" in caplog.text


def test_number_of_classes_from_arguments_or_names(load: Load, tmp_path: Path) -> None:
    pretrained_cfg = {**OWN}
    changes = {"num_classes": None, "pretrained_cfg": pretrained_cfg, "model_args": {"num_classes": 3}}
    assert len(load(described(tmp_path / "arguments", changes)).labels) == 3
    assert len(load(described(tmp_path / "names", {**changes, "model_args": None})).labels) == 3


@pytest.mark.parametrize(
    "keys",
    [{"problem_type": "multi_label_classification"}, {"problem_type": "regression"}, {"loss": "BCEWithLogitsLoss"},
     {"criterion": "binary_cross_entropy"}, {"head_activation": "sigmoid"}, {"multi_label": True}, {"task": "Multi-Label"}],
    ids=str,
)  # fmt: skip
def test_sigmoid_head_is_refused_unless_replaced(load: Load, tmp_path: Path, keys: dict[str, Any]) -> None:
    for name, changes in (("top", keys), ("nested", {"pretrained_cfg": {**OWN, **keys}})):
        place = described(tmp_path / name, changes)
        with pytest.raises(ModelError, match=f"{next(iter(keys))} is .*best class of a softmax.*remove that key"):
            load(place)
        assert loading.load(ModelConfig(name=str(place)), STORES, replaces_head=True).labels == LABELS


@pytest.mark.parametrize(
    "keys", [{"problem_type": "single_label_classification"}, {"loss": "CrossEntropyLoss"}, {"task": 3}]
)
def test_softmax_keys_are_accepted(load: Load, tmp_path: Path, keys: dict[str, Any]) -> None:
    assert load(described(tmp_path / "dir", keys)).labels == LABELS


def test_head_of_one_class_is_refused_unless_replaced(load: Load, tmp_path: Path) -> None:
    net = tiny(1)
    place = write(tmp_path / "one", net, ["defect"])
    remedy = r"a score of 1\.0\. Make it a head of two classes: put a row of zeros before its weight"
    with pytest.raises(ModelError, match=rf"config\.json.*{remedy}"):
        load(place)
    torch.save(net.state_dict(), tmp_path / "own.pth")
    (tmp_path / "names.txt").write_text("defect\n")
    with pytest.raises(ModelError, match=rf"own\.pth.*{remedy}"):
        load(tmp_path / "own.pth", architecture="test_resnet", labels=str(tmp_path / "names.txt"))
    with pytest.raises(ModelError, match=remedy):
        load("timm:test_resnet", weights=str(tmp_path / "own.pth"), labels=str(tmp_path / "names.txt"))
    base = loading.load(ModelConfig(name=str(place)), STORES, replaces_head=True)
    assert network.head_of(network.build(base, 3, pretrained=True, seed=0)).out_features == 3


def test_remedy_for_one_class_equals_the_sigmoid(load: Load, tmp_path: Path) -> None:
    net, two = tiny(1), tiny(2)
    state = dict(net.state_dict())
    for name in ("fc.weight", "fc.bias"):
        state[name] = torch.cat([torch.zeros_like(state[name]), state[name]])
    two.load_state_dict(state)
    model = load(write(tmp_path / "two", two, ["sound", "defect"]))
    images = torch.rand((4, 3, 160, 160))
    with torch.inference_mode():
        assert torch.allclose(model.network()(images).softmax(1)[:, 1], net(images).sigmoid()[:, 0], atol=1e-6)


def test_preprocessing_can_be_overridden(load: Load, tmp_path: Path) -> None:
    place = write(tmp_path / "dir", tiny())
    plain = load(place)
    keys: dict[str, Any] = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "nearest"}
    for number in range(len(keys)):
        key = list(keys)[number]
        chosen = load(place, **{key: keys[key]})
        assert getattr(chosen.preprocess, key) == keys[key]
        assert chosen.fingerprint()["preprocess"] != plain.fingerprint()["preprocess"]
        assert chosen.digest == plain.digest
    assert load("efficientnet_lite0", **keys).preprocess.mean == (0.1, 0.2, 0.3)
    border = described(tmp_path / "random", {"pretrained_cfg": {**OWN, "interpolation": "random"}})
    assert load(border, interpolation="bicubic").preprocess.interpolation == "bicubic", (
        "what is refused can be replaced"
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mean": (0.5,)}, r"model\.mean=\[0.5\]: give three numbers"),
        ({"mean": (0.5, float("nan"), 0.5)}, "three numbers"),
        ({"mean": (123.7, 116.3, 103.5)}, "divide values of 0 to 255 by 255"),
        ({"std": (0.5, 0.0, 0.5)}, r"model\.std=.*more than 0"),
        ({"std": (0.5, -0.1, 0.5)}, "more than 0"),
        ({"interpolation": "bicubik"}, "did you mean 'bicubic'"),
        ({"interpolation": "lanczos"}, "one of bicubic, bilinear, nearest"),
    ],
)
def test_invalid_preprocessing_options_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**keys)


def test_taxonomy_option_works_with_any_model(load: Load, tmp_path: Path) -> None:
    place, tree = write(tmp_path / "dir", tiny()), tmp_path / "tree.csv"
    tree.write_text("label,kind\na,x\nb,x\nc,y\n")
    plain, chosen = load(place), load(place, taxonomy=str(tree))
    assert chosen.taxonomy is not None and chosen.taxonomy.path(1) == ["x", "b"]
    assert chosen.fingerprint() == {**plain.fingerprint(), "taxonomy": chosen.taxonomy.digest}
    (place / "taxonomy.csv").write_text("label,kind\na,broken\n")
    assert load(place, taxonomy=str(tree)).taxonomy == chosen.taxonomy, "it takes the place of the model's own"
    coarse = tmp_path / "coarse.csv"
    coarse.write_bytes(
        b"label,half\n"
        + b"".join(b'"%s",%d\n' % (name.encode(), n % 2) for n, name in enumerate(imagenet.imagenet_labels()))
    )
    default = load("efficientnet_lite0", taxonomy=str(coarse))
    assert default.taxonomy is not None and [level.name for level in default.taxonomy.levels] == ["half", "label"]
    with pytest.raises(ModelError, match=r"model\.taxonomy=.*nowhere\.csv: the taxonomy cannot be read"):
        load(place, taxonomy=str(tmp_path / "nowhere.csv"))
    with pytest.raises(ModelError, match=r"tree\.csv.*1,000 labels of the model are missing"):
        load("efficientnet_lite0", taxonomy=str(tree))


def test_summary_of_a_model_is_one_line(load: Load, tmp_path: Path) -> None:
    model = load(described(tmp_path / "dir", {"pretrained_cfg": OWN}))
    assert model.summary() == (
        f"{model.reference}: 128×128 px from 160 (crop 0.8), bilinear, mean 0.4 0.5 0.6, std 0.3 0.2 0.1; 3 classes: a, b, c"
    )
    assert (
        load("efficientnet_lite0")
        .summary()
        .endswith(
            "224×224 px from 256 (crop 0.875), bicubic, mean 0.5 0.5 0.5, std 0.5 0.5 0.5; 1,000 classes: tench, goldfish, "
            "great white shark, …; levels domain, group, kind, label"
        )
    )


def test_digest_of_a_directory_equals_that_of_0_1(load: Load, tmp_path: Path) -> None:
    """Outputs of 0.1 have it in their fingerprint."""
    place = write(tmp_path / "dir", tiny())
    config = json.loads((place / "config.json").read_text())
    config["model_args"].pop("num_classes", None)
    weights = hashlib.sha256((place / "model.safetensors").read_bytes()).hexdigest()
    model = load(place)
    assert model.digest == hashlib.sha256(json.dumps(config, sort_keys=True).encode() + weights.encode()).hexdigest()
    assert model.fingerprint() == {
        "weights": model.digest,
        "labels": hashlib.sha256(b"a\nb\nc").hexdigest(),
        "preprocess": "shorter side to 168 (bilinear), centre 160x160, mean 0.5 0.5 0.5, std 0.5 0.5 0.5",
        "taxonomy": None,
    }
    require_same_network(model.network(), tiny())
