"""Every recipe retries the exit codes after which a retry helps, and no others. The rules are evaluated, not only compared."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import clean_environment
from tests.deploy.conftest import DEPLOY, ROOT
from tests.deploy.recipes import CODES, KILLED, RETRIED, Fake, documents, in_recipes, of_kind, program, run

LOST = -1
"""What Argo Workflows has instead of an exit code if a pod was lost."""


def test_argo_starts_the_step_again_for_these_codes() -> None:
    """expr-lang, the language of Argo's expressions, evaluates it. `asInt` is Argo's name for its `int`."""
    (step,) = (t for t in of_kind("argo/workflow-template.yaml", "WorkflowTemplate")["spec"]["templates"]
               if t["name"] == "classify")  # fmt: skip
    strategy = step["retryStrategy"]
    assert (strategy["retryPolicy"], int(strategy["limit"]) > 0) == ("Always", True)
    expression = strategy["expression"].replace("asInt(", "int(").replace("lastRetry.exitCode", "exitCode")
    again = in_recipes(
        "import golem\nengine = golem.Engine(variables={'exitCode': ''})\n"
        "print(json.dumps([engine.eval(given[0], {'exitCode': str(code)}) for code in given[1]]))",
        expression, [*CODES, LOST],
    )  # fmt: skip
    assert {code for code, retried in zip([*CODES, LOST], again, strict=True) if retried} == RETRIED | {LOST}


def batch_action(code: int | None, status_reason: str) -> str:
    """Return what AWS Batch does: the first rule of which all conditions match decides, and no match means a retry."""
    strategy = json.loads((DEPLOY / "aws-batch/job-definition.json").read_text())["retryStrategy"]
    for rule in strategy["evaluateOnExit"]:
        values = {"onExitCode": None if code is None else str(code), "onStatusReason": status_reason, "onReason": ""}
        conditions = {name: pattern for name, pattern in rule.items() if name != "action"}
        assert conditions.keys() <= values.keys()
        if all(values[name] is not None and fnmatch.fnmatchcase(str(values[name]), pattern)
               for name, pattern in conditions.items()):  # fmt: skip
            return str(rule["action"])
    return "RETRY"


def test_aws_batch_retries_these_codes_and_reclaimed_machines() -> None:
    exited = "Essential container in task exited"
    assert {code for code in CODES if batch_action(code, exited) == "RETRY"} == RETRIED
    assert batch_action(None, "Host EC2 (instance i-0123456789abcdef0) terminated.") == "RETRY"


def kubernetes_action(code: int, *, disrupted: bool = False) -> str:
    """Return what the Job controller does: the first rule that matches decides, and no match counts as an attempt."""
    job = of_kind("kubernetes/cronjob.yaml", "CronJob")["spec"]["jobTemplate"]["spec"]
    for rule in job["podFailurePolicy"]["rules"]:
        if (codes := rule.get("onExitCodes")) and codes["operator"] == "In" and code in codes["values"]:
            assert codes["containerName"] == job["template"]["spec"]["containers"][0]["name"]
            return str(rule["action"])
        if disrupted and {"type": "DisruptionTarget"} in rule.get("onPodConditions", []):
            return str(rule["action"])
    return "Count"


def test_kubernetes_starts_the_pod_again_for_these_codes() -> None:
    assert {code for code in CODES if kubernetes_action(code) == "Count"} == RETRIED
    assert {code for code in CODES if kubernetes_action(code) == "FailJob"} == set(CODES) - RETRIED
    assert kubernetes_action(143, disrupted=True) == "Ignore"  # a drained node is no attempt
    assert kubernetes_action(2, disrupted=True) == "FailJob"


@pytest.mark.parametrize(("name", "kind"), [("rayjob.yaml", "RayJob"), ("raycronjob.yaml", "RayCronJob")])
def test_ray_jobs_are_not_retried_since_kuberay_sees_no_codes(name: str, kind: str) -> None:
    spec = of_kind(f"kubernetes/{name}", kind)["spec"]
    assert spec.get("jobTemplate", spec)["backoffLimit"] == 0


def test_skypilot_reads_the_file_and_recovers_from_these_codes() -> None:
    """SkyPilot parses the file, and its own recovery strategy is asked."""
    again = in_recipes(
        "import copy, sky, yaml\nfrom sky import backends\nfrom sky.jobs import recovery_strategy\n"
        "config = yaml.safe_load(open('deploy/skypilot/imgbatch.yaml'))\n"
        "needed = [('IMGBATCH_DATE', '2026-11-28'), ('GIVE_UP_AT', '2026-11-28T12:00:00Z')]\n"
        "answers, backend = [], backends.CloudVmRayBackend()\n"
        "for code in given[0]:\n"
        "    task = sky.Task.from_yaml_config(copy.deepcopy(config), env_overrides=needed)\n"
        "    made = recovery_strategy.StrategyExecutor.make('c', backend, task, 1, 0, None, set(), None, None)\n"
        "    answers.append(made.should_restart_on_failure([code]))\n"
        "print(json.dumps(answers))",
        CODES,
    )  # fmt: skip
    assert {code for code, retried in zip(CODES, again, strict=True) if retried} == RETRIED


def test_skypilot_gives_up_at_the_given_time(tmp_path: Path) -> None:
    script = documents("skypilot/imgbatch.yaml")[0]["run"]
    (tmp_path / "imgbatch" / "bin").mkdir(parents=True)
    fake = Fake(tmp_path / "imgbatch" / "bin")
    given = {"HOME": str(tmp_path), "INPUT": "in", "OUTPUT": "out/{date}", "IMGBATCH_DATE": "2026-11-28"}
    fake.ends_with(3)
    assert run("bash", "-c", script, **given, GIVE_UP_AT="2100-01-01T00:00:00Z").returncode == 3
    assert fake.calls == ["classify --input in --output out/{date} --date 2026-11-28"]
    late = run("bash", "-c", script, **given, GIVE_UP_AT="2026-01-01T00:00:00Z")
    assert (late.returncode, len(fake.calls)) == (1, 1)
    assert 1 not in RETRIED and "not finished at 2026-01-01" in late.stderr


@pytest.mark.parametrize("name", ["airflow", "kubernetes", "argo", "aws-batch", "skypilot", "slurm", "cron", "dagster"])
def test_the_readme_of_a_recipe_names_these_codes(name: str) -> None:
    text = " ".join((DEPLOY / name / "README.md").read_text(encoding="utf-8").split())
    retried, _, never = text.partition("**Retried**: ")[2].partition(" - **")[0].partition("Never ")
    assert set(map(int, re.findall(r"\b\d+\b", retried.partition("killed (137)")[0]))) | {KILLED} == RETRIED
    assert set(map(int, re.match(r"([\d, ]+)", never)[1].replace(" ", "").split(","))) == set(CODES) - RETRIED  # type: ignore[index]
    for line in ("**Date**: ", "**Stopped**: ", "**Started twice**: "):
        assert line in text


def test_the_page_about_orchestrators_names_these_codes() -> None:
    page = (ROOT / "docs" / "orchestrators.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .*?\| \[[^]]+\]\(\.\./deploy/([\w-]+)/[^|]*\| ([^|]+) \|", page, re.MULTILINE)
    assert {name for name, _ in rows} >= {
        "airflow",
        "kubernetes",
        "argo",
        "aws-batch",
        "skypilot",
        "slurm",
        "cron",
        "dagster",
    }
    for name, codes in rows:
        if "none" not in codes:
            assert set(map(int, re.findall(r"\d+", codes))) == RETRIED, name


def test_dagster_retries_these_codes(tmp_path: Path) -> None:
    """Dagster itself materializes the asset of the recipe. A run with code 2 must not be started again."""
    for code in (2, KILLED):
        folder = tmp_path / str(code)
        folder.mkdir()
        fake = Fake(folder)
        fake.ends_with(code, 0)
        environment = {"PATH": fake.path, "RETRY_DELAY_S": "0", "DAGSTER_HOME": "", "HOME": str(tmp_path)}
        done = run(program("python"), "-c", MATERIALIZE, **environment)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        assert set(result["retried"]) == RETRIED
        assert result["success"] == (code in RETRIED)
        assert len(fake.calls) == (2 if code in RETRIED else 1)
        assert fake.calls[0].startswith("classify --input s3://images/photos/ --output s3://labels/{date}/")
        assert "--date 2026-02-03" in fake.calls[0]


MATERIALIZE = """
import json, sys
sys.path.insert(0, "deploy/dagster")
import dagster as dg, definitions
done = dg.materialize([definitions.labels], partition_key="2026-02-03", raise_on_error=False)
events = [event.step_materialization_data.materialization.metadata for event in done.get_asset_materialization_events()]
values = [{name: getattr(value, "value", None) for name, value in metadata.items()} for metadata in events]
print(json.dumps({"success": done.success, "retried": sorted(definitions.RETRIED), "metadata": values}, default=str))
"""


def test_dagster_gets_one_materialization_with_the_counts(tmp_path: Path, folder: Path) -> None:
    """A real run, which Dagster starts; imgbatch sends the counts."""
    fake = Fake(tmp_path)
    fake.add("imgbatch", f'exec {sys.executable} -m imgbatch "$@"\n')  # the real one
    (folder / "12.jpg").write_bytes(b"no image")
    environment = {
        **clean_environment(), "PATH": fake.path, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "INPUT": str(folder), "OUTPUT": f"{tmp_path}/labels/{{date}}", "DAGSTER_HOME": "",
    }  # fmt: skip
    done = run(program("python"), "-c", MATERIALIZE, **environment)
    assert done.returncode == 0, done.stderr
    (metadata,) = json.loads(done.stdout.splitlines()[-1])["metadata"]
    assert (metadata["listed"], metadata["labelled"], metadata["rejected"]) == (13, 12, 1)
    assert metadata["rejects"] == {"not_an_image": 1}
    assert metadata["output"] == f"{tmp_path}/labels/2026-02-03"
