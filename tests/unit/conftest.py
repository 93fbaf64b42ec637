"""What the tests of models share."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from imgbatch.config.sections import ModelConfig
from imgbatch.models import check, child, loading
from tests.unit.networks import STORES, Load


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load a model with caches of its own and no internet; a child's work is done here, where torch is there already."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(child, "run_task", lambda question, **_: json.loads(json.dumps(check.run_task(dict(question)))))
    return lambda name, stores=STORES, **keys: loading.load(ModelConfig(name=str(name), **keys), stores)


@pytest.fixture
def labels(tmp_path: Path) -> str:
    """A file with three names."""
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    return str(tmp_path / "labels.txt")
