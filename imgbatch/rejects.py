"""Why an image has no label: the closed list of reasons, which of them may pass, and how many a run may have."""

from __future__ import annotations

from dataclasses import dataclass

from imgbatch.config import RejectsConfig
from imgbatch.errors import BudgetError
from imgbatch.plurals import counted

REASONS = (
    "empty", "not_an_image", "truncated", "corrupt", "unsupported", "too_large", "vanished", "changed", "forbidden",
    "unreachable", "timeout", "crashed", "out_of_memory", "duplicate",
)  # fmt: skip

_STORE_MAY_ANSWER_LATER = {"vanished", "changed", "forbidden", "unreachable", "timeout"}

_JUDGED_FROM = 1_000
_SHARE_APPLIES_ABOVE = 20


def is_passing(stage: str, reason: str) -> bool:
    """Return whether a later run may succeed with the same bytes.

    >>> is_passing("fetch", "timeout"), is_passing("decode", "timeout"), is_passing("decode", "out_of_memory")
    (True, False, True)
    """
    return (stage == "fetch" and reason in _STORE_MAY_ANSWER_LATER) or reason == "out_of_memory"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One reject, before it becomes a row."""

    stage: str
    reason: str
    message: str
    attempts: int = 1

    @property
    def passing(self) -> bool:
        """Whether a later run tries this image again."""
        return is_passing(self.stage, self.reason)


def judge(
    config: RejectsConfig, *, listed: int, labelled: int, rejected: int, at_end: bool, where: str = "rejects/"
) -> None:
    """Hold the number of rejects against the budget.

    In the middle of a run it is applied after 1,000 images only. `max_count` is exact; `max_share` is not applied to 20
    rejects or fewer. A run that labelled nothing has failed whatever the budget.

    Args:
        where: names the table of rejects in messages.

    Raises:
        BudgetError: naming both numbers and the keys to change.
    """
    seen = labelled + rejected
    if at_end and listed and not labelled:
        raise BudgetError(
            f"none of {counted(listed, 'image')} could be labelled: look at the reasons in {where} before anything else"
        )
    if not (at_end or seen >= _JUDGED_FROM):
        return
    if config.max_count is not None and rejected > config.max_count:
        raise BudgetError(
            f"{counted(rejected, 'image')} rejected, rejects.max_count allows {config.max_count:,}: look at the reasons in "
            f"{where}, or raise it with --set rejects.max_count=…"
        )
    if rejected > _SHARE_APPLIES_ABOVE and rejected > config.max_share * seen:
        raise BudgetError(
            f"{rejected:,} of {seen:,} images rejected ({rejected / seen:.1%}), rejects.max_share allows "
            f"{config.max_share:.1%}: look at the reasons in {where}, or raise it with --set rejects.max_share=…"
        )
