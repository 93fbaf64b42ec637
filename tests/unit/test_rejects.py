"""The budget for images without a label."""

from __future__ import annotations

import pytest

from imgbatch.config.sections import RejectsConfig
from imgbatch.errors import BudgetError
from imgbatch.pipeline.budget import check_budget
from imgbatch.rejects import REASONS, Refusal, is_passing

END, WAY = True, False


@pytest.mark.parametrize(
    ("labelled", "rejected", "at_end", "settings", "message"),
    [
        (180, 20, END, {}, None),
        (1, 20, END, {}, None),  # never below 20
        (1, 21, END, {}, "95.5%"),
        (189, 21, END, {}, None),  # exactly a tenth
        (188, 21, END, {}, "rejects.max_share"),
        (0, 3, END, {"max_share": 1.0}, "none of 3"),
        (500, 499, WAY, {}, None),  # too early to judge
        (500, 500, WAY, {}, "rejects.max_share"),
        (0, 1000, WAY, {}, "rejects.max_share"),
        (900, 100, WAY, {}, None),
        (10_000, 30, END, {"max_count": 29}, "rejects.max_count allows 29"),
        (10_000, 30, END, {"max_count": 30}, None),
        (10_000, 20, END, {"max_count": 0}, "20 images rejected, rejects.max_count allows 0"),
        (10_000, 1, END, {"max_count": 0}, "1 image rejected, rejects.max_count allows 0"),
        (10_000, 0, END, {"max_count": 0}, None),
        (2, 19, END, {"max_count": 19}, None),  # the share is not applied to 20 or fewer
        (999, 1, WAY, {"max_count": 0}, "rejects.max_count"),
        (998, 1, WAY, {"max_count": 0}, None),  # too early to judge
        (900, 101, WAY, {"max_count": 100, "max_share": 1.0}, "rejects.max_count"),
        (1, 10_000, END, {"max_share": 1.0}, None),
        (0, 0, END, {}, None),
    ],
)
def test_the_budget(
    labelled: int, rejected: int, at_end: bool, settings: dict[str, float], message: str | None
) -> None:
    def verdict() -> None:
        config = RejectsConfig(**settings)  # type: ignore[arg-type]
        check_budget(config, listed=labelled + rejected, labelled=labelled, rejected=rejected, at_end=at_end)

    if message is None:
        verdict()
    else:
        with pytest.raises(BudgetError, match=message):
            verdict()


def test_reasons_are_the_closed_list_of_the_contract() -> None:
    contract = (
        "empty, not_an_image, truncated, corrupt, unsupported, too_large, vanished, changed, forbidden, unreachable, "
        "timeout, crashed, out_of_memory, duplicate"
    )
    assert ", ".join(REASONS) == contract


def test_failures_of_the_store_are_transient() -> None:
    passing = {reason for reason in REASONS if is_passing("fetch", reason)}
    assert passing == {"vanished", "changed", "forbidden", "unreachable", "timeout", "out_of_memory"}
    assert {reason for reason in REASONS if is_passing("decode", reason)} == {"out_of_memory"}
    assert Refusal("fetch", "timeout", "").passing and not Refusal("decode", "corrupt", "").passing
