"""Values: the budget for rejects: how many a run may have."""

from __future__ import annotations

from imgbatch.config.sections import RejectsConfig
from imgbatch.errors import BudgetError
from imgbatch.terminal.plurals import counted

_MIN_IMAGES = 1_000  # before the budget is applied in the middle of a run
_MAX_EXEMPT = 20  # rejects to which the share is not applied


def check_budget(
    config: RejectsConfig, *, listed: int, labelled: int, rejected: int, at_end: bool, where: str = "rejects/"
) -> None:
    """Compare the number of rejects with the budget.

    In the middle of a run it is applied only after 1,000 images. `max_count` is exact; `max_share` is not applied to 20
    rejects or fewer. A run that labelled nothing has failed whatever the budget.

    Args:
        where: the table of rejects, for messages.

    Raises:
        BudgetError: the budget is exceeded. The message has both numbers and the key to change.
    """
    seen = labelled + rejected
    if at_end and listed and not labelled:
        raise BudgetError(
            f"none of {counted(listed, 'image')} could be labelled: look at the reasons in {where} before anything else"
        )
    if not (at_end or seen >= _MIN_IMAGES):
        return
    if config.max_count is not None and rejected > config.max_count:
        raise BudgetError(
            f"{counted(rejected, 'image')} rejected, rejects.max_count allows {config.max_count:,}: look at the reasons in "
            f"{where}, or raise it with --set rejects.max_count=…"
        )
    if rejected > _MAX_EXEMPT and rejected > config.max_share * seen:
        raise BudgetError(
            f"{rejected:,} of {seen:,} images rejected ({rejected / seen:.1%}), rejects.max_share allows "
            f"{config.max_share:.1%}: look at the reasons in {where}, or raise it with --set rejects.max_share=…"
        )
