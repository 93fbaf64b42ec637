"""Who may import what: the heavy libraries are each in few hands."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "imgbatch"
ALLOWED = {
    "ray": {
        "engine/dataset", "engine/placement", "engine/ray_metrics", "engine/session", "engine/shared_weights",
        "orchestration/ray_jobs", "training/ray_train",
    },
    "torch": {
        "models/architectures", "models/builtin", "models/directory", "models/model", "models/preprocess",
        "models/pretrained", "models/runtimes/build", "models/runtimes/openvino_runtime",
        "models/runtimes/torch_runtime", "models/weights", "training/augment", "training/checkpoint", "training/context",
        "training/head", "training/loss", "training/network", "training/ray_train", "training/strategies",
        "training/trainer",
    },
    "timm": {"models/architectures", "models/builtin", "models/directory", "models/pretrained", "training/network"},
    "torchvision": {"models/architectures", "models/pretrained", "training/augment", "training/loss"},
    "openvino": {"models/runtimes/openvino_runtime"},
    "jinja2": {"report/page"},
    "fsspec": {"sources/objects", "sources/recognise", "storage/fsspec_store", "storage/http"},
    "obstore": {"storage/azure", "storage/gcs", "storage/obstore_listing", "storage/obstore_store", "storage/s3"},
    "botocore": {"storage/s3"},
    "azure": {"storage/azure"},
    "google": {"storage/gcs"},
    "prometheus_client": {"orchestration/metrics"},
    "requests": {"orchestration/notify", "orchestration/ray_jobs", "storage/gcs"},
    "rich": {"commands/demo", "terminal/live_line", "terminal/live_view"},
    "pydicom": {"decode/dicom"},
    "pillow_heif": {"decode/heic"},
}  # fmt: skip


@pytest.mark.parametrize("library", ALLOWED)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    importers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            if any(name.split(".")[0] == library for name in names):
                importers.add(str(path.relative_to(PACKAGE).with_suffix("")).removesuffix("/__init__"))
    assert importers and importers <= ALLOWED[library]


def test_a_format_s_library_is_imported_only_when_such_bytes_come() -> None:
    code = "import sys; import imgbatch.decode; print([n for n in ('pydicom', 'pillow_heif', 'torch') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_run_that_finds_nothing_to_do_needs_neither_ray_nor_torch() -> None:
    code = (
        "import sys; import imgbatch.commands.classify, imgbatch.pipeline.run; from imgbatch.terminal import console; "
        "console.install(sys.stderr); console.step('x');"
        "print([n for n in ('ray', 'torch', 'timm', 'openvino', 'rich') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_status_needs_neither_the_cluster_nor_the_model() -> None:
    modules = "imgbatch.commands.status, imgbatch.orchestration.status, imgbatch.orchestration.status_text"
    for imported, absent in (
        ("imgbatch.commands.status", ("pyarrow", "numpy", "ray", "torch", "rich", "prometheus_client", "requests")),
        (modules, ("ray", "torch", "timm", "openvino", "rich", "prometheus_client", "requests")),
    ):
        code = f"import sys; import {imported}; print([n for n in {absent!r} if n in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
        assert done.stdout.strip() == "[]", done.stderr


def test_verify_labels_a_sample_in_other_processes_and_needs_neither_ray_nor_torch_itself() -> None:
    code = (
        "import sys; import imgbatch.commands.verify, imgbatch.verification.run, imgbatch.verification.sample; "
        "import imgbatch.labelling.explain, imgbatch.labelling.again, imgbatch.labelling.export, imgbatch.ledger.compact; "
        "print([n for n in ('ray', 'torch', 'timm', 'openvino') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_what_is_measured_with_can_be_imported() -> None:
    """No other test runs them, and what they take from the package may have moved."""
    names = [path.stem for path in (PACKAGE.parent / "tests/bench").glob("*.py") if path.stem != "chart"]
    code = f"import importlib; [importlib.import_module('tests.bench.' + name) for name in {names!r}]"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
