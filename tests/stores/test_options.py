"""Options of the stores: refused by name where a store lacks them, and apart for each cloud."""

from __future__ import annotations

from typing import Any

import pytest

from imgbatch.errors import ConfigError, NotFound
from imgbatch.storage.stores import Folder
from tests.azurite import Azurite
from tests.fake_gcs import FakeGcs
from tests.stores.test_credentials import stores


@pytest.mark.parametrize(
    "uri, options, named",
    [
        ("s3://b/x", {"requesterpays": True}, "'requester_pays'"),
        ("s3://b/x", {"config_kwargs": {"signature_version": "s3"}}, "'signature_version'"),
        ("s3://b/x", {"s3": {"sas_token": "x"}}, "'sas_token'"),
        ("gs://bucket/x", {"key": "x"}, r"'key'.*storage\.options\.s3"),
        ("gs://bucket/x", {"gs": {"tokens": "x"}}, "'token'"),
        ("az://images/x", {"endpoint_url": "http://x"}, "'endpoint_url'"),
        ("az://images/x", {"az": {"account_names": "x"}}, "'account_name'"),
    ],
)
def test_an_option_that_a_store_does_not_have_is_refused_by_name(uri: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        stores({}, **options).read(uri)


def test_a_section_is_no_value() -> None:
    with pytest.raises(ConfigError, match=r"storage\.options\.gs\.NAME"):
        stores({}, gs="anon").read("gs://bucket/x")


def test_input_and_output_may_lie_in_different_clouds(gcs: FakeGcs, azure: Azurite) -> None:
    ours = stores({}, gs=gcs.options, az=azure.options)
    Folder(ours, "gs://images/both").put("x", b"1")
    Folder(ours, "az://out/both").put("x", Folder(ours, "gs://images/both").read("x"))
    assert Folder(ours, "az://out/both").read("x") == b"1"


def test_a_missing_object_is_not_found_whatever_the_credentials(gcs: FakeGcs, azure: Azurite) -> None:
    for ours, uri in ((gcs.stores(), "gs://images/nothing"), (azure.stores(), "az://images/nothing")):
        with pytest.raises(NotFound, match="nothing"):
            ours.read(uri)
