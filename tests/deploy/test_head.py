"""The servers of these tests: the Ray head runs jobs, and refuses clients without its token."""

from __future__ import annotations

import urllib.error
import urllib.request

import pytest

from tests.deploy.conftest import RayHead


def test_the_job_server_answers_to_its_token_only(ray_head: RayHead) -> None:
    assert isinstance(ray_head.jobs(), list)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{ray_head.dashboard}/api/jobs/", timeout=30)
