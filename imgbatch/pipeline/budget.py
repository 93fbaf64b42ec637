"""Values: how many rejects a run may have."""

from __future__ import annotations

from imgbatch.config.sections import RejectsConfig
from imgbatch.errors import BudgetError
from imgbatch.terminal.plurals import counted

_JUDGED_FROM = 1_000


_SHARE_APPLIES_ABOVE = 20


def check_budget(
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
