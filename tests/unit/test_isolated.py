from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from imgbatch.decode import Rejected, decode
from imgbatch.decode.sandbox import decode_isolated
from tests.integration import faults
from tests.unit.pictures import encode, scene

LIMITS = {"max_pixels": 1_000_000, "short_side": 64}
DEADLY = """
def decode(data, **more):
    exec(data.decode(), {"os": os, "time": time, "Rejected": module.Rejected})
module.decode = decode
"""


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_sandbox_decodes_like_decode(form: str) -> None:
    data = encode(scene(300, 200), form)
    expected, found = decode(data, **LIMITS), decode_isolated(data, timeout_s=30, **LIMITS)
    assert (found.width, found.height) == (expected.width, expected.height)
    assert np.array_equal(found.pixels, expected.pixels)


def test_sandbox_rejects_like_decode() -> None:
    with pytest.raises(Rejected, match="no bytes") as caught:
        decode_isolated(b"", timeout_s=30, **LIMITS)
    assert caught.value.reason == "empty"


@pytest.mark.parametrize(
    ("what", "reason", "said"),
    [
        (f"os.kill(os.getpid(), {int(signal.SIGSEGV)})", "crashed", "SIGSEGV"),
        (f"os.kill(os.getpid(), {int(signal.SIGKILL)})", "out_of_memory", "SIGKILL"),
        ("os._exit(7)", "crashed", "exit code 7"),
        ("os._exit(0)", "crashed", "returned no result"),
        ("raise LookupError('odd')", "crashed", "LookupError: odd"),
        ("print('chatter')\nraise Rejected('corrupt', 'told')", "corrupt", "told"),
        ("time.sleep(1000)", "timeout", "decode.timeout_s"),
    ],
)
def test_failure_of_the_sandbox_process_has_a_reason(
    what: str, reason: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((name, value),) = faults.patched(tmp_path, "imgbatch.decode", DEADLY).items()
    monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(value)
    monkeypatch.setattr("imgbatch.decode.sandbox._START_S", 8.0)
    with pytest.raises(Rejected, match=said) as caught:
        decode_isolated(what.encode(), timeout_s=0.1, **LIMITS)
    assert caught.value.reason == reason


def test_memory_of_the_sandbox_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "original = module.decode\nmodule.decode = lambda data, **more: original(data + bytes(20 << 30), **more)\n"
    ((_, value),) = faults.patched(tmp_path, "imgbatch.decode", body).items()
    monkeypatch.syspath_prepend(value)
    with pytest.raises(Rejected) as caught:
        decode_isolated(b"any", timeout_s=30, **LIMITS)
    assert caught.value.reason == "out_of_memory"
