"""The alert rules and the dashboard: promtool accepts the rules, and a real Prometheus scrapes a real run on a Ray head."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from imgbatch.orchestration.metrics import END, EXIT_CODE, METRICS
from imgbatch.storage.stores import Folder
from tests.conftest import ROOT, S3Server, free_ports
from tests.deploy.conftest import DEPLOY, RayHead
from tests.deploy.recipes import system_program
from tests.unit.pictures import encode, scene
from tests.unit.test_run_metrics import parsed

ALERTS = DEPLOY / "prometheus" / "alerts.yml"
SCRAPING = DEPLOY / "prometheus" / "prometheus.yml"
DASHBOARD = DEPLOY / "grafana" / "imgbatch.json"
COUNT = 6_000
TORN = 30
_PATIENCE_S = 120


def test_promtool_accepts_the_rules_and_the_configuration() -> None:
    for command in (["rules", ALERTS], ["config", SCRAPING]):
        done = subprocess.run([system_program("promtool"), "check", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_rule_fires_when_it_should_and_not_before() -> None:
    command = [system_program("promtool"), "test", "rules", ROOT / "tests" / "deploy" / "alerts_test.yml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def expressions() -> list[str]:
    """Return the queries of the dashboard, with values in place of its variables."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    values = {"$__rate_interval": "1m", "$output": ".*", "$run_id": ".*"}
    for name, value in values.items():
        queries = [query.replace(name, value) for query in queries]
    return queries


def test_the_queries_of_the_dashboard_are_valid(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(expressions())]
    assert len(rules) > 10 and not any("$" in rule["expr"] for rule in rules)
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run([system_program("promtool"), "check", "rules", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_and_dashboard_name_metrics_that_exist() -> None:
    known = {metric.exported_name for metric in METRICS}
    known |= {f"ray_{name}" for name in known}
    for text in (ALERTS.read_text(encoding="utf-8"), "\n".join(expressions())):
        named = set(re.findall(r"\b(?:ray_)?imgbatch_\w+", text))
        assert len(named) > 4 and named <= known
    labels = {"verb", "output", "run_id", *(label for metric in METRICS for label in metric.labels)}
    grouped = re.findall(r"(?:by|on) \(([\w, ]+)\)", ALERTS.read_text() + "\n".join(expressions()))
    assert grouped and {label for group in grouped for label in group.split(", ")} <= labels


class Prometheus:
    """A running Prometheus."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer."""
        with urllib.request.urlopen(
            f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=30
        ) as page:
            return json.load(page)["data"]

    def values(self, query: str) -> list[float]:
        """Return all scraped values of the series of a query, oldest first."""
        series = self.get("query", query=f"{query}[1h]")["result"]
        assert len(series) <= 1
        return [float(value) for each in series for _, value in each["values"]]


@pytest.fixture
def prometheus(ray_head: RayHead, tmp_path: Path) -> Iterator[Prometheus]:
    """Run a Prometheus with the configuration and the rules of deploy/, which scrapes the Ray head every second."""
    place = tmp_path / "prometheus"
    shutil.copytree(SCRAPING.parent, place)
    text = SCRAPING.read_text(encoding="utf-8").replace("scrape_interval: 15s", "scrape_interval: 1s")
    text = text.replace("/tmp/ray/", f"{ray_head.place}/")
    assert "scrape_interval: 1s" in text and f"{ray_head.place}/prom_metrics" in text
    (place / "prometheus.yml").write_text(text)
    (port,) = free_ports(1)
    command = [system_program("prometheus"), f"--config.file={place}/prometheus.yml", f"--storage.tsdb.path={place}/data",
               f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
    with (place / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    running = Prometheus(port)
    try:
        wait_for(lambda: any(target["health"] == "up" for target in running.get("targets")["activeTargets"]))
        yield running
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so; a server that does not answer yet is not ready."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        with suppress(OSError):
            if condition():
                return
        time.sleep(0.2)
    raise AssertionError("waited in vain")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of small images, some of them truncated."""
    folder = tmp_path / "images"
    folder.mkdir()
    contents = [encode(scene(seed=seed), "JPEG") for seed in range(20)]
    for number in range(COUNT):
        content = contents[number % len(contents)]
        (folder / f"{number:05d}.jpg").write_bytes(content[: len(content) // 2] if number < TORN else content)
    return folder


def published_by(job: subprocess.Popen[str], textfile: Path) -> list[float]:
    """Return what a driver gave to Ray as the number of labels, in its order: the textfile is written at the same times."""
    values = [0.0]
    while job.poll() is None:
        with suppress(FileNotFoundError):
            value = parsed(textfile.read_bytes()).get("imgbatch_images_total labelled", 0.0)
            values += [value] if value != values[-1] else []
        time.sleep(0.05)
    return values


def test_prometheus_scrapes_what_the_driver_counts(
    prometheus: Prometheus, ray_head: RayHead, s3: S3Server, started: Callable[..., Any],
    images: Path, tiny_model: Path, tmp_path: Path,
) -> None:  # fmt: skip
    textfile = tmp_path / "imgbatch.prom"
    job = started(
        "classify", "--input", images, "--output", "s3://out/monitored", "--model", tiny_model,
        "--set", f"metrics.textfile={textfile}", "--set", "run.commit_interval_s=1", "--set", "classify.batch_size=8",
        "--set", "run.finish_by=2999-01-01T06:00",
        env={**s3.environment, **ray_head.environment, "RAY_ADDRESS": ray_head.address},
    )  # fmt: skip
    published = published_by(job, textfile)
    out, err = job.communicate()
    assert job.returncode == 0, err
    output = Folder(s3.stores(), "s3://out/monitored")
    (run_id,) = output.folders("runs")
    record = json.loads(output.read(f"runs/{run_id}/run.json"))
    assert (record["this_run"]["labelled"], record["this_run"]["rejected"]) == (COUNT - TORN, TORN), out

    # When a run ends, the driver exports once more, and Ray's agent keeps the counters, so that the last scrape has the end.
    query = f'ray_imgbatch_images_total{{run_id="{run_id}", outcome="labelled"}}'
    wait_for(lambda: prometheus.values(query)[-1:] == [COUNT - TORN])
    scraped = prometheus.values(query)
    assert scraped == sorted(scraped) and set(scraped) <= {*published, COUNT - TORN}
    assert any(0 < value < COUNT - TORN for value in scraped), "it was scraped in the middle of the run as well"

    content = output.read(f"runs/{run_id}/metrics.prom")
    final = parsed(content)
    assert content == textfile.read_bytes(), "the textfile has the final figures too"
    assert final["imgbatch_images_total labelled"] == COUNT - TORN and final["imgbatch_rejects_total truncated"] == TORN
    assert final["imgbatch_images_listed"] == record["counts"]["listed"] == COUNT and final["imgbatch_exit_code"] == 0
    assert final["imgbatch_bytes_total"] == sum(path.stat().st_size for path in images.iterdir())
    checked = subprocess.run([system_program("promtool"), "check", "metrics"], input=content, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    require_all_exported(prometheus, run_id)


def require_all_exported(prometheus: Prometheus, run_id: str) -> None:
    """Require that Prometheus has each live metric, and that each panel of the dashboard showed something during the run."""
    exported = {name for name in prometheus.get("label/__name__/values") if name.startswith("ray_imgbatch_")}
    live = [metric for metric in METRICS if metric not in (END, EXIT_CODE)]
    assert exported == {f"ray_{metric.exported_name}" for metric in live}
    working = f'ray_imgbatch_time_left_seconds{{run_id="{run_id}"}}'
    during = str(prometheus.get("query", query=f"{working}[1h]")["result"][0]["values"][-1][0])
    for expression in expressions():
        if "ray_imgbatch" in expression:
            assert prometheus.get("query", query=expression, time=during)["result"], expression
