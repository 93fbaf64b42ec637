"""cluster.yaml is one that Ray and EC2 would accept, that costs nothing when idle, and that gives nothing away.

All offline: Ray's own schema and validator, and the description of EC2's API that botocore ships.
"""

import copy
import json
import re
import subprocess
from pathlib import Path

import botocore.session as botocore_session
import jsonschema
import pytest
import ray
import yaml
from botocore.validate import ParamValidator
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
CONFIG = yaml.safe_load(TEXT)
TYPES = CONFIG["available_node_types"]
HEAD = CONFIG["head_node_type"]
WORKERS = [name for name in TYPES if name != HEAD]
GPU_WORKERS = [name for name in WORKERS if TYPES[name]["resources"].get("GPU")]
CPU_WORKERS = [name for name in WORKERS if name not in GPU_WORKERS]
COMMANDS = [(key, command) for key in CONFIG if key.endswith("_commands") for command in CONFIG[key]]
PIP_INSTALLS = [command for _, command in COMMANDS if re.search(r"\bpip install\b", command)]
REMOTE_ROOT = "~/imgbatch"


def strings(value):
    """Yield every string in a YAML value, keys included."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value


def looks_secret(text):
    """Return whether a text holds an AWS key id, a word with the shape of a secret key, or a private key."""
    words = re.findall(r"(?<![\w/+=])[A-Za-z0-9/+=]{40}(?![\w/+=])", text)
    mixed = any(all(re.search(kind, word) for kind in ("[a-z]", "[A-Z]", "[0-9]")) for word in words)
    named = re.search(
        r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|secret_access_key|session_token|BEGIN [A-Z ]*PRIVATE KEY", text, re.I
    )
    return mixed or named is not None


def ray_pin():
    """Return the one version of Ray that constraints.txt allows."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [m[1] for line in lines if (m := re.match(r"ray(?:\[[\w,]*\])?==([\w.+]+)", line.replace(" ", "")))]
    assert len(pins) == 1, pins
    return pins[0]


# --- Ray and EC2 would accept it


def test_the_file_as_written_fits_rays_schema():
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(CONFIG, json.loads(schema.read_text(encoding="utf-8")))


def test_rays_validator_accepts_it_after_filling_in_its_defaults():
    prepared = prepare_config(copy.deepcopy(CONFIG))
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == set(TYPES)  # none of the defaults' node types came along


def test_rays_validator_would_notice_a_wrong_key():
    prepared = prepare_config({**copy.deepcopy(CONFIG), "max_worker": 3})
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepared)


@pytest.mark.parametrize("name", TYPES)
def test_ec2_knows_every_key_of_a_node(name):
    model = botocore_session.get_session().get_service_model("ec2").operation_model("RunInstances")
    request = {**TYPES[name]["node_config"], "MinCount": 1, "MaxCount": 1}
    errors = ParamValidator().validate(request, model.input_shape)
    assert not errors.has_errors(), errors.generate_report()


@pytest.mark.parametrize("command", [command for _, command in COMMANDS])
def test_bash_can_read_every_command(command):
    subprocess.run(["bash", "-n", "-c", command], check=True, capture_output=True, timeout=30)


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_knows_every_flag_of_its_start_commands(key):
    from ray.scripts.scripts import start

    known = {flag for parameter in start.params for flag in parameter.opts}
    used = {flag for command in CONFIG[key] for flag in re.findall(r"(?<!\S)--[\w-]+", command)}
    assert used
    assert used <= known


# --- the head does no work; workers come from nothing and go back to it


def test_the_head_takes_no_work():
    assert TYPES[HEAD]["resources"] == {"CPU": 0, "GPU": 0}
    assert TYPES[HEAD]["min_workers"] == TYPES[HEAD]["max_workers"] == 0
    start = [command for command in CONFIG["head_start_ray_commands"] if "ray start --head" in command]
    assert len(start) == 1
    assert "--num-cpus=0" in start[0].split()
    assert "--num-gpus=0" in start[0].split()


def test_the_head_is_not_spot_since_it_holds_the_driver():
    assert "InstanceMarketOptions" not in TYPES[HEAD]["node_config"]


def test_there_are_workers_with_and_without_gpus():
    assert GPU_WORKERS
    assert CPU_WORKERS


@pytest.mark.parametrize("name", WORKERS)
def test_workers_scale_from_zero(name):
    assert TYPES[name]["min_workers"] == 0
    assert TYPES[name]["max_workers"] > 0


def test_the_limits_of_the_types_add_up_to_that_of_the_cluster():
    assert CONFIG["max_workers"] == sum(TYPES[name]["max_workers"] for name in WORKERS)


def test_idle_and_stopped_nodes_do_not_stay():
    assert 0 < CONFIG["idle_timeout_minutes"] <= 30
    assert CONFIG["provider"]["cache_stopped_nodes"] is False


@pytest.mark.parametrize("name", GPU_WORKERS)
def test_gpu_workers_are_spot_and_have_the_cores_to_feed_the_card(name):
    assert TYPES[name]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert TYPES[name]["resources"]["CPU"] >= 16 * TYPES[name]["resources"]["GPU"]


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_starts_with_room_for_open_files(key):
    starts = [command for command in CONFIG[key] if "ray start" in command]
    assert starts
    assert all(command.startswith("ulimit -n 65536;") for command in starts)


# --- nothing is given away


def test_no_string_looks_like_a_secret():
    assert [text for text in [*strings(CONFIG), *TEXT.splitlines()] if looks_secret(text)] == []


@pytest.mark.parametrize(
    "text",
    [
        "AKIA" + "IOSFODNN7EXAMPLE",
        "x: " + "wJalrXUtnFEMI/K7MDENG/" + "bPxRfiCYEXAMPLEKEY",
        "aws_secret_access_key=x",
        "-----BEGIN RSA PRIVATE KEY-----",
    ],
)
def test_a_secret_would_be_noticed(text):
    assert looks_secret(text)


@pytest.mark.parametrize("name", TYPES)
def test_nodes_get_their_rights_from_a_role_and_their_disks_are_encrypted(name):
    node = TYPES[name]["node_config"]
    assert node["IamInstanceProfile"]["Name"]
    assert node["MetadataOptions"]["HttpTokens"] == "required"
    assert all(disk["Ebs"]["Encrypted"] and disk["Ebs"]["VolumeSize"] >= 100 for disk in node["BlockDeviceMappings"])


def test_workers_do_not_have_the_heads_right_to_start_machines():
    profiles = {name: TYPES[name]["node_config"]["IamInstanceProfile"]["Name"] for name in TYPES}
    assert profiles[HEAD] not in {profiles[name] for name in WORKERS}


def test_nothing_is_open_to_the_world():
    assert "0.0.0.0" not in TEXT
    assert "::/0" not in TEXT
    assert any("--dashboard-host=127.0.0.1" in command for command in CONFIG["head_start_ray_commands"])
    # Without a group of one's own, Ray makes one with port 22 open to all.
    assert all(TYPES[name]["node_config"]["SecurityGroupIds"] for name in TYPES)


@pytest.mark.parametrize("pattern", [".git/", ".venv/", "__pycache__/", ".env", "*.pem"])
def test_history_environments_and_secrets_are_not_copied(pattern):
    assert pattern in CONFIG["rsync_exclude"]


# --- the nodes get this checkout, with one version of everything


@pytest.mark.parametrize("local", CONFIG["file_mounts"].values())
def test_what_is_mounted_exists_in_the_checkout(local):
    assert not Path(local).is_absolute()
    assert (ROOT / local).exists()


def test_mounts_lie_on_the_node_as_in_the_checkout():
    assert CONFIG["file_mounts"] == {f"{REMOTE_ROOT}/{local}": local for local in CONFIG["file_mounts"].values()}


def test_the_mounts_hold_what_the_install_reads():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    readme = re.search(r'^readme = "(.+)"', project, re.M)[1]
    license = re.search(r'^license-files = \["([^"]+)"', project, re.M)[1]
    assert {"imgbatch", "pyproject.toml", "constraints.txt", readme, license} <= set(CONFIG["file_mounts"].values())


def test_every_install_happens_in_the_mounted_checkout_under_its_constraints():
    assert PIP_INSTALLS
    for command in PIP_INSTALLS:
        assert command.startswith(f"cd {REMOTE_ROOT} && ~/venv/bin/pip install "), command
        assert " -c constraints.txt . " in f"{command} ", command


def test_all_nodes_install_the_same_package():
    assert any(command in PIP_INSTALLS for command in CONFIG["setup_commands"])


def test_all_nodes_run_one_release_of_ubuntu_and_so_one_python():
    releases = {
        match[1] or match[2]
        for name in TYPES
        if (match := re.search(r"/ubuntu/server/([\d.]+)/|-ubuntu-([\d.]+)/", TYPES[name]["node_config"]["ImageId"]))
    }
    assert releases == {"24.04"}
    assert {word for _, command in COMMANDS for word in re.findall(r"python3\.\d+", command)} == {"python3.12"}


def test_the_nodes_ray_is_the_one_that_validated_this_file():
    assert ray_pin() == ray.__version__
    assert all(pin == ray_pin() for pin in re.findall(r"\bray(?:\[[\w,]*\])?==([\w.+]+)", TEXT))


def test_the_uploaded_working_dir_is_the_code_and_not_its_history():
    excluded = get_excludes_from_ignore_files(ROOT, include_gitignore=True)
    sent = {
        name for name in [".git", ".venv", "tests", "jobs", "imgbatch"] if not any(e(ROOT / name) for e in excluded)
    }
    assert sent == {"jobs", "imgbatch"}


@pytest.mark.parametrize("setting", re.findall(r"--set ([\w.]+)=([\w.]+)", TEXT))
def test_the_settings_in_the_instructions_exist(setting):
    from imgbatch.config.reading import load

    load(None, ["=".join(setting)])
