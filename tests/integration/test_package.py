"""The package as it is installed: the command `imgbatch`, and the functions of the module, from another folder."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT, clean_environment

TWICE = """
import signal, sys, threading
import imgbatch
from imgbatch.errors import ClusterError, UsageError

import ray

images, model, output, copy = sys.argv[1:]
handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
first = imgbatch.classify(input=images, output=output, model=model, config={"cluster.device": "cpu", "top_k": 2})
assert (first.counts["listed"], first.counts["labelled"], first.this_run["labelled"]) == (12, 12, 12), first
assert str(first).startswith("12 images listed, 12 labelled") and not ray.is_initialized()

try:
    imgbatch.classify(input=images, output=copy, model=model, config={"cluster.min_actors": 99, "cluster.startup_timeout_s": 1})
except ClusterError as error:
    assert error.exit_code == 3 and "cluster.min_actors=99" in str(error)
else:
    raise AssertionError("no cluster has so many CPUs")
assert not ray.is_initialized()

threads = []
def in_a_thread() -> None:
    threads.append(imgbatch.classify(input=[images], output=copy, model=model))
thread = threading.Thread(target=in_a_thread)
thread.start()
thread.join()
assert threads[0].this_run["labelled"] == 12 and not ray.is_initialized()

again = imgbatch.classify(input=images, output=output, model=model, config={"top_k": 2})
assert again.counts["already_done"] == 12 and again.this_run["labelled"] == 0
assert imgbatch.verify(output).rows == 12
try:
    imgbatch.verify(output, seed=3)
except UsageError as error:
    assert error.exit_code == 2
assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers

ray.init(address="local", include_dashboard=False, log_to_driver=False)
imgbatch.classify(input=images, output=copy + "-2", model=model)
assert ray.is_initialized(), "it was there before"
ray.shutdown()
print(imgbatch.__file__)
"""


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, beside the packages of the tests' own environment."""

    bin: Path
    place: Path

    def __call__(self, *command: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(self.bin / str(command[0])), *map(str, command[1:])],
            cwd=self.place, capture_output=True, text=True, timeout=280, env=clean_environment(),
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel of this checkout, installed without its dependencies."""
    place = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", place, ROOT], check=True
    )
    venv.create(place / "env", with_pip=False)
    (wheel,) = place.glob("*.whl")
    there = place / "env" / "bin"
    subprocess.run([*pip, "--python", there / "python", "install", "--no-deps", "--no-index", wheel], check=True)
    packages = next((place / "env" / "lib").glob("python*")) / "site-packages"
    (packages / "beside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return Installed(there, place)


def test_the_wheel_has_what_it_needs(installed: Installed) -> None:
    files = ["py.typed", "report/templates/page.html", "report/templates/page.css", "report/templates/page.js"]
    code = (
        "import imgbatch, pathlib; p = pathlib.Path(imgbatch.__file__).parent; "
        f"print(p, all((p / name).exists() for name in {files!r}))"
    )
    said = installed("python", "-c", code).stdout
    assert said.startswith(str(installed.place)) and said.endswith("True\n")


def test_the_command_has_the_verbs(installed: Installed, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert installed("imgbatch", "--version").stdout == "imgbatch 0.2.0\n"
    assert "classify" in installed("imgbatch", "--help").stdout
    wrong = installed("imgbatch", "clasify", code=2)
    assert "did you mean 'classify'?" in wrong.stderr and "evaluate" in wrong.stderr
    assert "no verb" in installed("imgbatch", code=2).stderr
    for verb in ("classify", "train", "evaluate", "verify", "demo"):
        ours = installed("imgbatch", verb, "--help").stdout
        job = subprocess.run([sys.executable, f"jobs/{verb}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
        assert ours == job.stdout
    command = ("imgbatch", "classify", "--input", folder, "--output", tmp_path / "out", "--model", tiny_model)
    assert "would classify 12 of 12 images" in installed(*command, "--dry-run").stdout
    assert "unknown config key 'top'" in installed(*command, "--set", "top=3", code=2).stderr


def test_the_functions_leave_the_process_as_it_was(
    installed: Installed, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    done = installed("python", "-c", TWICE, folder, tiny_model, tmp_path / "out", tmp_path / "copy")
    assert done.stdout.startswith(str(installed.place)), "nothing else is printed"


def test_help_imports_no_heavy_library() -> None:
    code = (
        "import sys\nfrom imgbatch.__main__ import main\ntry:\n    main(['classify', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('ray', 'torch', 'timm', 'openvino', 'pyarrow', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
