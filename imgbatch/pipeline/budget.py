"""Values: the budget for rejects: the maximum number of rejects of a run."""

from __future__ import annotations

from imgbatch.config.sections import RejectsConfig
from imgbatch.errors import BudgetError
from imgbatch.terminal.plurals import counted

_MIN_IMAGES = 1_000  # before the budget is applied in the middle of a run
_MAX_EXEMPT = 20  # rejects to which `max_share` is not applied


def check_budget(
    config: RejectsConfig, *, listed: int, labelled: int, rejected: int, at_end: bool, where: str = "rejects/"
) -> None:
    """Compare the number of rejects with the budget.

    In the middle of a run it is applied only after 1,000 images. `max_count` is exact; `max_share` is not applied to 20
    rejects or fewer. A run without a single label fails regardless of the budget.

    Args:
        where: the table of rejects, for messages.

    Raises:
        BudgetError: the budget is exceeded. The message has both numbers and the key to change.
    """
    processed = labelled + rejected
    if at_end and listed and not labelled:
        raise BudgetError(f"none of {counted(listed, 'image')} could be labelled: look at the reasons in {where} first")
    if not (at_end or processed >= _MIN_IMAGES):
        return
    if config.max_count is not None and rejected > config.max_count:
        raise BudgetError(
            f"{counted(rejected, 'image')} rejected, rejects.max_count allows {config.max_count:,}: look at the reasons in "
            f"{where}, or raise it with --set rejects.max_count=…"
        )
    if rejected > _MAX_EXEMPT and rejected > config.max_share * processed:
        raise BudgetError(
            f"{rejected:,} of {processed:,} images rejected ({rejected / processed:.1%}), rejects.max_share allows "
            f"{config.max_share:.1%}: look at the reasons in {where}, or raise it with --set rejects.max_share=…"
        )
