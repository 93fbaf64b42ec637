"""The metrics of a run, their files, and the notification at its end."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from imgbatch.concurrency.signals import StopRequest
from imgbatch.config.results import MetricsConfig, NotifyConfig
from imgbatch.config.sections import Config, StorageConfig
from imgbatch.config.training import Training
from imgbatch.engine.ray_metrics import RayMetrics
from imgbatch.errors import BudgetError, ConfigError, Interrupted
from imgbatch.ledger import run_record
from imgbatch.ledger.run_record import Record
from imgbatch.orchestration import metrics, metrics_export, notify
from imgbatch.storage.stores import Folder, Stores

FACTS: dict[str, Any] = {
    "run_id": "r", "status": "running", "started": "2026-11-29T03:00:00+00:00", "written": "2026-11-29T03:02:30+00:00",
    "this_run": {"labelled": 90, "rejected": 10}, "counts": {"listed": 300}, "seconds": {"fetch": 1.5, "commit": 0.25},
    "images_per_second": 7.0, "exit_code": None,
    "progress": {
        "total": 200, "rate": 5.0, "seconds_left": 20.0, "bytes": 1234, "rejects": {"empty": 10},
        "last_commit": "2026-11-29T03:02:26+00:00",
    },
}  # fmt: skip


@pytest.fixture
def output(tmp_path: Path) -> Folder:
    """An empty output."""
    return Folder(Stores(StorageConfig(), {}), str(tmp_path / "out"))


def parsed(content: bytes) -> dict[str, float]:
    """Return the values of metrics in the text format by their names and own labels."""
    found = {}
    for family in text_string_to_metric_families(content.decode()):
        for sample in family.samples:
            own = [value for name, value in sample.labels.items() if name not in metrics.COMMON_LABELS]
            found[" ".join([sample.name, *own])] = sample.value
    return found


def metrics_of(path: Path) -> dict[str, float]:
    """Return the metrics in a file by their names and own labels."""
    return parsed(path.read_bytes())


def values(facts: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a run."""
    return parsed(metrics.text_format(metrics.samples(facts, verb="classify", output="out")))


def test_metrics_have_the_figures_of_the_record() -> None:
    assert values(FACTS) == {
        "imgbatch_images_total labelled": 90, "imgbatch_images_total rejected": 10, "imgbatch_rejects_total empty": 10,
        "imgbatch_bytes_total": 1234, "imgbatch_stage_seconds_total fetch": 1.5, "imgbatch_stage_seconds_total commit": 0.25,
        "imgbatch_images_listed": 300, "imgbatch_images_planned": 200, "imgbatch_images_per_second": 5,
        "imgbatch_time_left_seconds": 20, "imgbatch_start_timestamp_seconds": 1795921200,
        "imgbatch_last_commit_timestamp_seconds": 1795921346, "imgbatch_heartbeat_timestamp_seconds": 1795921350,
    }  # fmt: skip
    assert "imgbatch_late" not in values(FACTS)
    timed = {**FACTS, "config": {"run": {"finish_by": "06:00"}}}
    assert values(timed)["imgbatch_late"] == 0 and values({**timed, "late": {"forecast": None}})["imgbatch_late"] == 1
    over = values(
        {
            **FACTS,
            "config": {"run": {"finish_by": "06:00"}},
            "status": "failed",
            "exit_code": 4,
            "finished": "2026-11-29T03:03:00+00:00",
        }
    )
    assert (over["imgbatch_exit_code"], over["imgbatch_end_timestamp_seconds"]) == (4, 1795921380)
    assert over["imgbatch_images_per_second"] == 7 and "imgbatch_time_left_seconds" not in over
    assert over.keys() | values(FACTS).keys() == {
        key for key in over.keys() | values(FACTS).keys() if key.split()[0] in {each.exported_name for each in metrics.METRICS}
    }  # fmt: skip
    assert {key.split()[0] for key in over.keys() | values(FACTS).keys()} == {
        each.exported_name for each in metrics.METRICS
    }


def test_labels_are_escaped() -> None:
    content = metrics.text_format(metrics.samples(FACTS, verb="classify", output='a"b\\c\nd'))
    samples = [sample for family in text_string_to_metric_families(content.decode()) for sample in family.samples]
    assert samples and all(
        sample.labels["output"] == 'a"b\\c\nd' and sample.labels["run_id"] == "r" for sample in samples
    )


def test_a_record_without_figures_has_metrics() -> None:
    assert values({}) == {}
    assert values({"run_id": "r", "seconds": 12.5, "progress": None}) == {}, "of a training"


def run(record: Record, code: int = 0) -> None:
    """Do what a run does with its record."""
    record.start()
    record.facts |= {key: FACTS[key] for key in ("this_run", "counts", "progress", "seconds")}
    record._written -= run_record.HEARTBEAT_S
    record.beat()
    record.finish("succeeded" if code == 0 else "failed", code)


def test_the_files_are_written_while_a_run_works_and_at_its_end(output: Folder, tmp_path: Path) -> None:
    textfile = tmp_path / "imgbatch.prom"
    seen = []
    with (
        metrics_export.written(MetricsConfig(textfile=str(textfile)), "classify", output.uri, output, StopRequest()),
        run_record.on_write(lambda facts: seen.append(parsed(textfile.read_bytes()))),
    ):
        record = Record(output, {})
        run(record, 4)
    assert [len(each) > 5 for each in seen] == [False, True, True] and "imgbatch_exit_code" not in seen[1]
    final = record.folder.read(metrics_export.FINAL)
    assert textfile.read_bytes() == final and parsed(final)["imgbatch_exit_code"] == 4
    assert parsed(final)["imgbatch_images_total labelled"] == 90
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["imgbatch.prom"], (
        "no temporary file is left"
    )
    assert os.stat(textfile).st_mode & stat.S_IROTH, "node exporter is another user"


def test_a_textfile_that_cannot_be_written_is_one_warning(
    output: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = MetricsConfig(textfile=str(tmp_path / "no" / "a.prom"))
    with metrics_export.written(config, "classify", output.uri, output, StopRequest()):
        record = Record(output, {})
        run(record)
    assert [each.getMessage() for each in caplog.records] == [
        f"metrics.textfile={tmp_path}/no/a.prom cannot be written: No such file or directory"
    ]
    assert record.folder.exists(metrics_export.FINAL)


def test_a_textfile_that_node_exporter_would_not_read_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"metrics\.textfile=a\.txt: the name must end in \.prom"):
        MetricsConfig(textfile="a.txt")


def test_metrics_that_ray_refuses_are_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    metric = metrics.Metric("imgbatch_test", "A test.", labels=("a",))
    exporter = RayMetrics()
    exporter.publish([metrics.Sample(metric, {"a": "b"}, 1.0)])
    assert not caplog.records
    for _ in range(2):
        exporter.publish([metrics.Sample(metric, {"other": "b"}, 1.0)])
    (record,) = caplog.records
    assert record.getMessage().startswith("the metrics could not be given to Ray: ")


def test_gauges_are_set_again_while_the_driver_hangs_and_counters_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's agent drops a gauge that was not set for 20 s."""
    from ray.util import metrics as of_ray

    repeated, calls = threading.Event(), []

    class Gauge(of_ray.Gauge):
        def set(self, value: float | None, tags: dict[str, str] | None = None) -> None:
            super().set(value, tags)
            calls.append((self.info["name"], value))
            if len(calls) >= 5:
                repeated.set()

    class Counter(of_ray.Counter):
        def inc(self, value: int | float = 1.0, tags: dict[str, str] | None = None) -> None:
            super().inc(value, tags)
            calls.append((self.info["name"], value))

    monkeypatch.setattr(of_ray, "Gauge", Gauge)
    monkeypatch.setattr(of_ray, "Counter", Counter)
    gauge, counter = metrics.Metric("imgbatch_gauge", "A test."), metrics.Metric("imgbatch_counter", "A test.", True)
    exporter = RayMetrics()
    exporter.publish([metrics.Sample(counter, {}, 3.0), metrics.Sample(gauge, {}, 7.0)])
    with exporter.repeating(0.01):
        assert repeated.wait(60)
    assert calls[:2] == [("imgbatch_counter", 3.0), ("imgbatch_gauge", 7.0)] and set(calls[1:]) == {
        ("imgbatch_gauge", 7.0)
    }
    number = len(calls)
    exporter.publish([metrics.Sample(counter, {}, 5.0)])
    assert calls[number:] == [("imgbatch_counter", 2.0)]


class Hook(HTTPServer):
    """A server that keeps what is posted to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.posted: list[dict[str, Any]] = []
        self.answer = 200
        self.delay = threading.Event()
        self.delay.set()

    @property
    def url(self) -> str:
        """Its address, with a secret path."""
        return f"http://127.0.0.1:{self.server_port}/services/SECRET-PATH"


class Handler(BaseHTTPRequestHandler):
    """Takes one POST."""

    server: Hook

    def do_POST(self) -> None:
        """Keep the content, and answer."""
        self.server.posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.delay.wait(30)
        self.send_response(self.server.answer)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture
def hook(caplog: pytest.LogCaptureFixture) -> Iterator[Hook]:
    """A running server; no log line may have its secret."""
    server = Hook()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with caplog.at_level(logging.DEBUG, "imgbatch"):
        yield server
    server.delay.set()
    server.shutdown()
    server.server_close()
    thread.join()
    assert "SECRET" not in "".join(each.getMessage() for each in caplog.records if each.name.startswith("imgbatch"))


def test_one_notification_at_the_end_of_a_verb(hook: Hook, output: Folder) -> None:
    with notify.at_end(NotifyConfig(url=hook.url), "classify", output.uri):
        run(Record(output, {}))  # evaluate has two
        run(Record(output, {}))
        assert not hook.posted
    (content,) = hook.posted
    assert content["text"] == f"imgbatch classify succeeded: 300 images listed. {output.uri}"
    assert (content["event"], content["status"], content["exit_code"]) == ("end", "succeeded", 0)
    assert content["this_run"] == {"labelled": 90, "rejected": 10} and content["run_id"]


def test_one_notification_that_a_run_will_be_late(hook: Hook, output: Folder) -> None:
    late = {"finish_by": "2026-11-29T06:00:00+00:00", "forecast": None, "noticed": "2026-11-29T05:00:00+00:00"}
    with notify.at_end(NotifyConfig(url=hook.url), "classify", output.uri) as notification:
        notification.send_late(late)
        run(Record(output, {}))
    first, last = sorted(hook.posted, key=lambda content: str(content["event"]), reverse=True)
    assert first["text"] == (
        f"imgbatch classify will be late: run.finish_by is 2026-11-29 06:00 UTC, the forecast is unknown. {output.uri}"
    )
    assert first["event"] == "late" and first.items() >= late.items() and last["event"] == "end"
    with notify.at_end(NotifyConfig(), "classify", output.uri) as notification:
        notification.send_late(late)
    assert len(hook.posted) == 2


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (BudgetError("too many <b>rejects"), 4, "failed with exit code 4: too many &lt;b&gt;rejects. To do: look at"),
        (Interrupted(15), 143, "interrupted with exit code 143: stopped by signal 15"),
        (ZeroDivisionError("division"), 1, "failed with exit code 1: ZeroDivisionError: division. To do: report it"),
    ],
)  # fmt: skip
def test_a_failure_before_the_first_record_is_notified(hook: Hook, error: Exception, code: int, text: str) -> None:
    with (
        pytest.raises(type(error)),
        notify.at_end(NotifyConfig(url=hook.url), "classify", "https://me:password@host/out"),
    ):
        raise error
    (content,) = hook.posted
    assert content["exit_code"] == code and text in content["text"] and "password" not in json.dumps(content)
    assert content["output"] == "https://***@host/out"


def test_the_url_may_come_from_the_environment(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMGBATCH_NOTIFY_URL", hook.url)
    with notify.at_end(NotifyConfig(), "train", "out"):
        pass
    assert [content["text"] for content in hook.posted] == ["imgbatch train succeeded. out"]


def test_no_notification_fails_a_run(hook: Hook, caplog: pytest.LogCaptureFixture) -> None:
    hook.answer = 500
    refused = "http://127.0.0.1:1/SECRET"
    for url in (hook.url, refused, "https://", "http://[::1/SECRET"):
        with notify.at_end(NotifyConfig(url=url), "classify", "out"):
            pass
    messages = [each.getMessage() for each in caplog.records if each.name.startswith("imgbatch")]
    assert len(messages) == 4 and messages[0] == "notify.url answered the notification with HTTP status 500"
    assert all("could not be sent to notify.url: " in message for message in messages[1:])


def test_a_receiver_that_does_not_answer_delays_the_end_by_its_timeout(
    hook: Hook, caplog: pytest.LogCaptureFixture
) -> None:
    hook.delay.clear()
    with notify.at_end(NotifyConfig(url=hook.url, timeout_s=0.3), "classify", "out"):
        pass
    assert len(hook.posted) == 1 and any("notif" in each.getMessage() for each in caplog.records)


def test_a_run_that_a_limit_ends_is_notified_in_another_thread(hook: Hook, output: Folder) -> None:
    with notify.at_end(NotifyConfig(url=hook.url), "classify", output.uri):
        record = Record(output, {})
        record.start()
        thread = threading.Thread(target=record.record_interrupt, args=(15,))
        thread.start()
        thread.join()
        (content,) = hook.posted
        assert (content["status"], content["exit_code"]) == ("interrupted", 143)
    assert len(hook.posted) == 1


@pytest.mark.parametrize("kind", [Config, Training])
def test_the_url_is_in_no_record_and_no_repr(kind: type) -> None:
    config = kind(notify=NotifyConfig(url="https://hooks.example/SECRET"))
    assert config.public()["notify"]["url"] == "***" and kind().public()["notify"]["url"] == ""
    assert "SECRET" not in repr(config)
    with pytest.raises(ConfigError) as refused:
        NotifyConfig(url="hooks.example/SECRET")
    assert "SECRET" not in str(refused.value) and re.match(r"notify\.url must begin with http://", str(refused.value))
