"""The configuration: sources of values, refusals, and masking of secrets."""

from __future__ import annotations

import dataclasses
import json
import pickle
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge

from imgbatch.config import sections
from imgbatch.config.options import Section, hints_of, option
from imgbatch.config.reading import fill_output_template, load, load_as
from imgbatch.config.secrets import masked
from imgbatch.config.sections import Config, ConfigError, SourceConfig, describe
from imgbatch.config.training import TrainConfig, Training
from imgbatch.config.worker import WorkerConfig


def test_flags_override_settings_file_and_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'input = ["a", "b"]\ntop_k = 2\nlimit = 7\nmodel = "m"\n[cluster]\nstartup_timeout_s = 5\nmin_actors = 2\n'
    )
    chosen = load(str(file), ["top_k=3", "limit=8", "cluster.startup_timeout_s=6"], limit=9, output="out", model=None)
    assert (chosen.top_k, chosen.limit, chosen.output.uri, chosen.model.name) == (3, 9, "out", "m")
    assert (chosen.cluster.startup_timeout_s, chosen.cluster.min_actors, chosen.input) == (6.0, 2, ("a", "b"))
    assert chosen.rejects.max_share == 0.10


def test_every_option_has_help_and_can_be_set() -> None:
    options = list(describe())
    assert len({key for key, _, _ in options}) == len(options) > 20
    for key, default, help in options:
        assert len(help) > 10
        assert default != "None"
        plain = load(None)
        for name in key.split("."):
            plain = getattr(plain, name)


@pytest.mark.parametrize(
    "setting, message",
    [
        ("topk=3", "unknown config key 'topk'; did you mean 'top_k'"),
        ("cluster.devices=cpu", "did you mean 'cluster.device'"),
        ("xyzzy=1", "unknown config key 'xyzzy'; the keys are: "),
        ("top_k", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("top_k=", "expected int"),
        ("top_k=0", "must be 1 or more"),
        ("top_k=1.5", "top_k=1.5: expected int"),
        ("top_k=true", "expected int"),
        ("top_k=many", "top_k='many': expected int"),
        ("limit=0", "must be 1 or more"),
        ("model=3", "model.name=3: expected str"),
        ("model.crop_pct=0", "more than 0 and at most 1"),
        ("model.crop_pct=87.5", "more than 0 and at most 1"),
        ("model.image_size=0", "must be 1 or more"),
        ("model.mean=[0.5, 0.5]", "give three numbers"),
        ("model.mean=0.5", "give three numbers"),
        ("model.mean=grey", r"expected numbers, such as \[0.5, 0.5, 0.5\]"),
        ("model.std=[0.5, 0, 0.5]", "each must be more than 0"),
        ("model.std=[true, true, true]", "expected numbers"),
        ("model.interpolation=bicubik", "did you mean 'bicubic'"),
        ("model.weight=x", "did you mean 'model.weights'"),
        ("output.embedding=true", "did you mean 'output.embeddings'"),
        ("cluster=3", "cluster is a section"),
        ("top_k.x=3", "top_k is a section|unknown|expected"),
        ("input=[1]", "expected tuple"),
        ("cluster.device=gpu", "one of auto, cpu, cuda"),
        ("cluster.device=cdua", "did you mean 'cuda'"),
        ("cluster.startup_timeout_s=nan", "must be more than 0"),
        ("cluster.startup_timeout_s=0", "must be more than 0"),
        ("cluster.gpus_per_actor=1.5", "only whole numbers"),
        ("cluster.max_actors=0", "less than cluster.min_actors"),
        ("rejects.max_share=1.01", "between 0 and 1"),
        ("rejects.max_share=nan", "between 0 and 1"),
        ("rejects.max_count=-1", "0 or more"),
        ("rejects.retry=never", "one of transient, all"),
        ("answer.min_score=-0.1", "between 0 and 1"),
        ("source.format=csv", "one of auto, objects, manifest"),
        ('source.suffixes=""', "source.suffixes"),
        ('source.suffixes=" , ."', "source.suffixes"),
        ("source.allow_empty=1", "expected bool"),
        ("source.allow_empty=yes", "expected bool"),
        ("storage.retries=-1", "0 or more"),
        ("storage.timeout_s=-1", "more than 0"),
        ("storage.options=x", "expected dict"),
        ("fetch.concurrency=0", "1 or more"),
        ("decode.max_pixels=0", "1 or more"),
        ("classify.dtype=int8", "one of auto"),
        ("run.commit_interval_s=0", "more than 0"),
    ],
)
def test_wrong_setting_names_its_key(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, [setting])


def test_plain_model_and_output_set_one_key(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "net"\n[output]\nuri = "there"\nembeddings = true\n')
    chosen = load(str(file), ["model.crop_pct=0.9"], output="elsewhere")
    assert (chosen.model.name, chosen.model.crop_pct) == ("net", 0.9)
    assert (chosen.output.uri, chosen.output.embeddings) == ("elsewhere", True)
    file.write_text('[model]\nname = "net"\nimage_size = 96\n')
    chosen = load(str(file), ["output.columns=['label']"], model="other")
    assert (chosen.model.name, chosen.model.image_size, chosen.output.columns) == ("other", 96, ("label",))


def test_section_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="'top_k' is a value, not a section"):
        load(None, ["top_k=3", "top_k.x=1"])


def test_prune_with_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run\.prune.*--limit"):
        load(None, ["run.prune=true"], limit=3)
    assert load(None, ["run.prune=true"]).run.prune
    assert load(None, limit=3).limit == 3


def test_numbers_as_list_or_with_commas(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[model]\nmean = [0, 0.5, 1]\n")
    assert load(str(tmp_path / "run.toml")).model.mean == (0.0, 0.5, 1.0)
    for text in ("[0.1,0.2,0.3]", "0.1,0.2,0.3", "0.1, 0.2, 0.3"):
        assert load(None, [f"model.std={text}"]).model.std == (0.1, 0.2, 0.3)


def test_values_are_toml_or_text() -> None:
    chosen = load(None, ["model=./my model", 'output="s3://b/{model}"', "input=photos/*.jpg", "storage.options.anon=true",
                         "storage.options.endpoint_url=http://host:1", "cluster.max_actors=3",
                         "fetch.concurrency = 4"])  # fmt: skip
    assert (chosen.model.name, chosen.output.uri, chosen.input) == ("./my model", "s3://b/{model}", ("photos/*.jpg",))
    assert chosen.storage.options == {"anon": True, "endpoint_url": "http://host:1"}
    assert (chosen.cluster.max_actors, chosen.fetch.concurrency) == (3, 4)
    assert load(None, ["output=a=b"]).output.uri == "a=b"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"top_k = ", "is not TOML"),
        (b"\xff\xfe", "is not TOML"),
        (b"[cluster]\nx = 1", "unknown config key 'cluster.x'"),
        (b"top_k = 1\ntop_k = 2", "is not TOML"),
        (b"cluster = 3", "cluster is a section"),
    ],
)
def test_invalid_config_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(str(file))


def test_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml: No such file"):
        load(str(tmp_path / "no.toml"))
    with pytest.raises(ConfigError, match="Is a directory"):
        load(str(tmp_path))


def test_output_template_is_filled() -> None:
    chosen = load(None, output="s3://b/{model}/{date}", date="2026-01-02")
    assert fill_output_template(chosen, model="net").output.uri == "s3://b/net/2026-01-02"
    assert fill_output_template(load(None, output="plain"), model="net").output.uri == "plain"


def test_the_date_is_filled_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The flag comes first, then the file, then the variable, then today."""
    (tmp_path / "run.toml").write_text('input = ["s3://b/{date}/*.jpg", "list.csv"]\noutput = "s3://o/{date}"\n')
    path = str(tmp_path / "run.toml")
    monkeypatch.delenv("IMGBATCH_DATE", raising=False)
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    assert load(path).date in (today, datetime.now(UTC).strftime("%Y-%m-%d"))
    monkeypatch.setenv("IMGBATCH_DATE", "2026-02-28")
    assert load(path).output.uri == "s3://o/2026-02-28"
    chosen = load(path, ["date=2026-03-01"])
    assert (chosen.date, chosen.output.uri) == ("2026-03-01", "s3://o/2026-03-01")
    assert chosen.input == ("s3://b/2026-03-01/*.jpg", "list.csv")
    assert load(path, ["date=2026-03-01"], date="2026-03-02").input[0] == "s3://b/2026-03-02/*.jpg"
    assert load_as(Training, None, output="m/{date}", date="2026-03-02").output == "m/2026-03-02"


def test_a_date_that_fills_nothing_in_leaves_the_config_as_it_is() -> None:
    assert load(None, output="s3://b/labels", date="2026-03-02") == load(None, output="s3://b/labels")


@pytest.mark.parametrize("date", ["", "today", "20260102", "2026-1-2", "2026-02-30", "2026-01-02T00:00", " 2026-01-02"])
def test_a_date_that_is_none_is_refused(date: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--date .* YYYY-MM-DD"):
        load(None, date=date)
    if date:  # an empty variable counts as unset
        monkeypatch.setenv("IMGBATCH_DATE", date)
        with pytest.raises(ConfigError, match=r"IMGBATCH_DATE .* YYYY-MM-DD"):
            load(None)


@pytest.mark.parametrize(
    "output", ["{x}", "{}", "{0}", "{model", "{model.x}", "{model[x]}", "{date:%Y}", "}", "{model!z}"]
)
def test_other_names_in_braces_are_refused(output: str) -> None:
    with pytest.raises(ConfigError, match="can be filled in"):
        fill_output_template(load(None, output=output), model="net")


def test_secrets_are_masked() -> None:
    secrets = {"secret": "hunter2", "token": "hunter3", "key": "hunter4", "connection_string": "AccountKey=hunter5",
               "client_kwargs": {"password": "hunter6"}, "az": {"account_key": "hunter1", "account_name": "me"},
               "endpoint_url": "http://me:hunter7@host"}  # fmt: skip
    tree = ["https://me:hunter8@host/a.jpg", "https://host/a?X-Amz-Signature=hunter9&sig=hunter0"]
    chosen = dataclasses.replace(load(None, input=tree), storage=dataclasses.replace(Config().storage, options=secrets))
    shown = json.dumps(chosen.public())
    assert "hunter" not in shown
    assert "host/a.jpg" in shown and '"account_name": "me"' in shown
    assert chosen.storage.options["secret"] == "hunter2"
    assert chosen.input[0] == "https://me:hunter8@host/a.jpg"


def test_options_without_secrets_are_shown() -> None:
    chosen = load(
        None, ["storage.options.anon=true", "storage.options.endpoint_url=http://host:1"], input=["s3://b/x?y"]
    )
    plain = chosen.public()
    assert plain["storage"]["options"] == {"anon": True, "endpoint_url": "http://host:1"}
    assert list(plain["input"]) == ["s3://b/x?y"]
    assert plain["top_k"] == 5


@pytest.mark.parametrize("text", ["s3://b/me@home/x.jpg", "/data/a?b=c", "https://host/?page=2", "mail me@host", ""])
def test_text_without_secrets_is_unchanged(text: str) -> None:
    assert masked(text) == text


def test_workers_get_no_uri_and_no_option_of_a_store() -> None:
    """Every option of free text holds a URI with a password; workers get those that name suffixes and columns, and no other."""
    uri = "https://me:hunter2@host/a?sig=hunter3"
    secret: dict[str, Any] = {"input": (uri,), "storage": sections.StorageConfig(options={"key": uri})}
    for section, kind in hints_of(Config).items():
        if dataclasses.is_dataclass(kind) and section not in secret:
            texts = [name for name, hint in hints_of(kind).items() if hint in (str, str | None)]
            # uri_column excludes uri_template; the other two are no free text.
            omitted = (("source", "uri_column"), ("run", "finish_by"), ("metrics", "textfile"))
            texts = [name for name in texts if (section, name) not in omitted]
            needed = {"canary_accuracy": 0.9} if section == "guard" else {}
            secret[section] = kind(**dict.fromkeys(texts, uri), **needed)  # type: ignore[operator]
    worker = dataclasses.asdict(WorkerConfig.of(Config(**secret)))
    parts = {name: value if isinstance(value, dict) else {"": value} for name, value in worker.items()}
    holding = {f"{name}.{key}" for name, part in parts.items() for key, value in part.items() if uri in str(value)}
    assert holding == {"source.suffixes", "source.image_column", "source.label_column", "source.split_column"}
    assert not {"storage", "input", "output", "model"} & worker.keys()


def test_config_is_frozen_and_can_be_pickled(tmp_path: Path) -> None:
    chosen: Any = load(None, ["cluster.startup_timeout_s=3"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        chosen.top_k = 3
    with pytest.raises(TypeError):
        SourceConfig("auto")  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(chosen)) == chosen


def test_sections_made_by_code_are_checked() -> None:
    """Not only files are checked. NaN is refused as well."""
    for make in (
        lambda: sections.FetchConfig(concurrency=0),
        lambda: sections.StorageConfig(timeout_s=float("nan")),
        lambda: sections.SourceConfig(labels="folder"),  # type: ignore[arg-type]
        lambda: sections.AnswerConfig(min_score=1.5),
        lambda: TrainConfig(folds=1),
    ):
        with pytest.raises(ConfigError):
            make()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RenamedConfig(Section):
    speed: Annotated[int, Ge(1)] = option(3, "how fast", formerly="pace")
    retry: Literal["transient", "all"] = option(
        "transient", "what is tried again", former_values={"passing": "transient"}
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Whole(Section):
    renamed: RenamedConfig = dataclasses.field(default_factory=RenamedConfig)


def test_old_key_works_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert load_as(Whole, None, ["renamed.pace=4", "renamed.pace=5"]).renamed.speed == 5
    assert [record.message for record in caplog.records] == ["the config key renamed.pace is now called renamed.speed"]
    caplog.clear()
    assert load_as(Whole, None, ["renamed.retry=passing"]).renamed.retry == "transient"
    assert "renamed.retry=passing is now written renamed.retry=transient" in caplog.text


def test_old_and_new_key_with_different_values_are_refused() -> None:
    assert load_as(Whole, None, ["renamed.pace=4", "renamed.speed=4"]).renamed.speed == 4
    with pytest.raises(ConfigError, match=r"renamed\.pace is the old name of renamed\.speed"):
        load_as(Whole, None, ["renamed.pace=4", "renamed.speed=5"])
    with pytest.raises(ConfigError, match=r"renamed\.pace=0|renamed\.speed=0"):
        load_as(Whole, None, ["renamed.pace=0"])
