"""The files of the recipes, checked by what can be had: the schemas of Kubernetes, Argo and AWS, hadolint, and our own pins.

KubeRay's schema is in no package, so RayCluster, RayJob and RayCronJob are checked for the fields that the recipes depend on,
and their pods by Kubernetes' schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator

import imgbatch
from imgbatch.config.reading import load
from imgbatch.config.sections import RunConfig
from tests.deploy.conftest import DEPLOY, ROOT
from tests.deploy.recipes import documents, in_recipes, of_kind, program, run

PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
RECIPES = ("kubernetes", "argo", "aws-batch", "skypilot", "slurm", "cron", "dagster", "docker")
FILES = [path for name in RECIPES for path in sorted((DEPLOY / name).iterdir()) if path.is_file()]
CLUSTERS = {
    "raycluster.yaml": lambda: of_kind("kubernetes/raycluster.yaml", "RayCluster")["spec"],
    "rayjob.yaml": lambda: of_kind("kubernetes/rayjob.yaml", "RayJob")["spec"]["rayClusterSpec"],
}
JOB_STOP_S = 60
POD_GRACE_S = 90


def validate(document: dict[str, Any], folder: Path) -> None:
    """Validate a core kind of Kubernetes strictly: unknown fields are errors."""
    path = folder / "document.yaml"
    path.write_text(yaml.safe_dump(document))
    done = run(program("kubernetes-validate"), "--strict", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


def pod_templates(cluster: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["template"]


# --- Kubernetes


def test_kubernetes_accepts_the_core_kinds(tmp_path: Path) -> None:
    validate(of_kind("kubernetes/cronjob.yaml", "CronJob"), tmp_path)
    accounts = [one for one in documents("kubernetes/raycluster.yaml") if one["kind"] == "ServiceAccount"]
    assert len(accounts) == 2
    for account in accounts:
        validate(account, tmp_path)
    broken = of_kind("kubernetes/cronjob.yaml", "CronJob")
    broken["spec"]["jobTemplate"]["spec"]["podFailurePolicies"] = {}
    with pytest.raises(AssertionError, match="podFailurePolicies"):
        validate(broken, tmp_path)


@pytest.mark.parametrize("name", CLUSTERS)
def test_kubernetes_accepts_the_pods_of_ray(name: str, tmp_path: Path) -> None:
    for template in pod_templates(CLUSTERS[name]()):
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **template}, tmp_path)


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_ray_cluster_scales_from_zero_and_needs_a_token(name: str) -> None:
    cluster = CLUSTERS[name]()
    assert str(cluster["rayVersion"]) == PINS["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert (cluster["enableInTreeAutoscaling"], cluster["autoscalerOptions"]["version"]) == (True, "v2")
    head = cluster["headGroupSpec"]
    assert (head["rayStartParams"]["num-cpus"], head["rayStartParams"]["num-gpus"]) == ("0", "0")
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert groups.keys() == {"gpu", "cpu"}
    for group in groups.values():
        assert (group["replicas"], group["minReplicas"]) == (0, 0) and group["maxReplicas"] > 0
        assert any("spot" in str(toleration) for toleration in group["template"]["spec"]["tolerations"])
    (worker,) = groups["gpu"]["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert all(template["spec"]["restartPolicy"] == "Never" for template in pod_templates(cluster))


def test_the_ray_cron_job_starts_the_ray_job() -> None:
    job = of_kind("kubernetes/rayjob.yaml", "RayJob")["spec"]
    nightly = of_kind("kubernetes/raycronjob.yaml", "RayCronJob")["spec"]["jobTemplate"]
    assert nightly == job | {"entrypoint": job["entrypoint"].replace(" --date 2026-01-31", "")}
    assert job["entrypoint"] != nightly["entrypoint"]


def test_the_limits_of_a_stop_fit_into_each_other() -> None:
    assert RunConfig().stop_timeout_s < JOB_STOP_S < POD_GRACE_S
    job = of_kind("kubernetes/rayjob.yaml", "RayJob")["spec"]
    assert yaml.safe_load(job["runtimeEnvYAML"])["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": str(JOB_STOP_S)}
    pods = [of_kind("kubernetes/cronjob.yaml", "CronJob")["spec"]["jobTemplate"]["spec"]["template"]]
    pods += [CLUSTERS[name]()["headGroupSpec"]["template"] for name in CLUSTERS]
    assert [pod["spec"]["terminationGracePeriodSeconds"] for pod in pods] == [POD_GRACE_S] * 3
    (step,) = (t for t in of_kind("argo/workflow-template.yaml", "WorkflowTemplate")["spec"]["templates"]
               if "container" in t)  # fmt: skip
    assert yaml.safe_load(step["podSpecPatch"]) == {"terminationGracePeriodSeconds": POD_GRACE_S}
    assert RunConfig().stop_timeout_s + 3 < 30  # AWS Batch and SkyPilot; 3 s for the record (docs/guarantees.md)


def test_a_night_neither_overlaps_nor_blocks_the_next() -> None:
    spec = of_kind("kubernetes/cronjob.yaml", "CronJob")["spec"]
    assert spec["concurrencyPolicy"] == "Forbid" and spec["startingDeadlineSeconds"] > 0
    assert 0 < spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] < 24 * 3600
    (container,) = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    zone = next(entry["value"] for entry in container["env"] if entry["name"] == "TZ")
    assert spec["timeZone"] == zone
    cron = of_kind("argo/cron-workflow.yaml", "CronWorkflow")["spec"]
    assert (cron["concurrencyPolicy"], cron["timezone"]) == ("Forbid", zone)


# --- Argo, AWS Batch


def test_argo_accepts_the_workflows() -> None:
    """Hera's models are generated from Argo's schema. They drop unknown fields, so the result is compared with the file."""
    for name, kind in (("workflow-template.yaml", "WorkflowTemplate"), ("cron-workflow.yaml", "CronWorkflow")):
        read = of_kind(f"argo/{name}", kind)
        parsed = in_recipes(
            "from hera.workflows import models\nmade = getattr(models, given[0]).model_validate(given[1])\n"
            "print(json.dumps(made.model_dump(by_alias=True, exclude_unset=True, mode='json')))",
            kind, read,
        )  # fmt: skip
        assert parsed == read
    names = {t["name"] for t in of_kind("argo/workflow-template.yaml", "WorkflowTemplate")["spec"]["templates"]}
    (nightly,) = of_kind("argo/cron-workflow.yaml", "CronWorkflow")["spec"]["workflowSpec"]["templates"]
    assert nightly["steps"][0][0]["templateRef"] == {"name": "imgbatch", "template": "classify"} and "classify" in names


def aws_errors(service: str, operation: str, parameters: dict[str, Any]) -> str:
    """Return what is wrong with a request, by the service's own model in botocore."""
    session = botocore.session.get_session()
    shape = session.get_service_model(service).operation_model(operation).input_shape
    return str(ParamValidator().validate(parameters, shape).generate_report())


def test_aws_accepts_the_job_definition_and_the_schedule() -> None:
    definition = json.loads((DEPLOY / "aws-batch/job-definition.json").read_text())
    assert aws_errors("batch", "RegisterJobDefinition", definition) == ""
    assert len(definition["retryStrategy"]["evaluateOnExit"]) <= 5
    for rule in definition["retryStrategy"]["evaluateOnExit"]:
        assert re.fullmatch(r"\d+\*?", rule.get("onExitCode", "0"))
        assert re.fullmatch(r"[\w.:\s]+\*?", rule.get("onStatusReason", "x"))
    schedule = json.loads((DEPLOY / "aws-batch/schedule.json").read_text())
    schedule["ClientToken"] = "x"  # the command line generates it
    assert aws_errors("scheduler", "CreateSchedule", schedule) == ""
    submitted = lower_keys(json.loads(schedule["Target"]["Input"]))
    assert aws_errors("batch", "SubmitJob", submitted) == ""
    assert submitted["jobDefinition"] == definition["jobDefinitionName"]
    assert submitted["containerOverrides"]["environment"] == [
        {"name": "SCHEDULED_TIME", "value": "<aws.scheduler.scheduled-time>"}
    ]
    assert {"name": "TZ", "value": schedule["ScheduleExpressionTimezone"]} in definition["containerProperties"][
        "environment"
    ]


def lower_keys(value: Any) -> Any:
    """Return the parameters as Batch names them; EventBridge Scheduler writes them with a capital letter."""
    if isinstance(value, list):
        return [lower_keys(one) for one in value]
    if isinstance(value, dict):
        return {name[0].lower() + name[1:]: lower_keys(one) for name, one in value.items()}
    return value


# --- the image


def test_hadolint_accepts_the_dockerfile() -> None:
    done = run(program("hadolint"), str(DEPLOY / "docker" / "Dockerfile"))
    assert done.returncode == 0, done.stdout


def test_the_image_has_the_versions_of_this_checkout() -> None:
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    assert re.search(r"^ARG RAY=(.+)$", text, re.MULTILINE)[1] == PINS["ray"]  # type: ignore[index]
    python = re.search(r"^ARG PYTHON=py(\d)(\d+)$", text, re.MULTILINE)
    requires = re.search(r'^requires-python = ">=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert python and requires and tuple(map(int, python.groups())) >= tuple(map(int, requires.groups()))
    assert "-c /home/ray/imgbatch/constraints.txt" in text


def test_the_build_context_holds_what_the_install_reads_and_no_more() -> None:
    lines = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text().split("\n")
    assert "*" in lines
    sent = {line[1:] for line in lines if line.startswith("!")}
    assert sent == {"imgbatch", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert all((ROOT / name).exists() for name in sent)


def test_images_of_one_version_are_used_everywhere() -> None:
    tags = {tag for path in FILES for tag in re.findall(r"imgbatch:([\d.]+)-(?:cpu|cuda)", path.read_text())}
    assert tags == {imgbatch.__version__}


# --- all files


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_options_exist_and_there_are_no_secrets(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    load(None, re.findall(r"--set ([\w.]+=[\w.]+)", text))
    assert not re.search(r"AKIA\w{16}|secret_?access_?key|password", text, re.IGNORECASE)


@pytest.mark.parametrize("name", RECIPES)
def test_a_readme_is_short_and_its_files_say_what_to_edit(name: str) -> None:
    assert len((DEPLOY / name / "README.md").read_text(encoding="utf-8").splitlines()) <= 30
    files = [path for path in FILES if path.parent.name == name and path.suffix != ".md"]
    assert name == "docker" or any("EDIT" in path.read_text(encoding="utf-8") for path in files)
