"""Effects: a file of prices: a CSV with the columns of SkyPilot's catalogue, one row for each machine and region.

Required: InstanceType, vCPUs, Price or SpotPrice (per hour). Used if they are there: MemoryGiB, AcceleratorName,
AcceleratorCount, Region, AvailabilityZone. Others are ignored.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from imgbatch.errors import NotFound, UsageError, did_you_mean
from imgbatch.storage.stores import Stores
from imgbatch.storage.uris import absolute

_MAX_BYTES = 64 << 20
_SHOWN = 4
_REQUIRED = ("InstanceType", "vCPUs")
_PRICES = ("Price", "SpotPrice")


@dataclass(frozen=True, slots=True)
class Price:
    """The price of a machine in a region, per hour; in the currency of the file."""

    machine: str
    region: str
    cpus: float
    memory_gb: float | None
    accelerator: str
    accelerators: float
    on_demand: float | None
    spot: float | None


def read(uri: str, stores: Stores) -> list[Price]:
    """Return all rows of a file of prices.

    Raises:
        UsageError: it does not exist, lacks a column, or has a number that is none.
    """
    try:
        content = stores.read(absolute(uri), _MAX_BYTES)[0]
    except NotFound as error:
        raise UsageError(f"--prices {uri}: {error}") from error
    rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig", "replace")))
    columns = [name.strip() for name in rows.fieldnames or []]
    rows.fieldnames = columns
    missing = [name for name in _REQUIRED if name not in columns]
    if missing or not any(name in columns for name in _PRICES):
        needed = " and ".join(missing or ["Price or SpotPrice"])
        raise UsageError(
            f"--prices {uri} has no column {needed}: use a CSV with the columns of SkyPilot's catalogue, "
            "InstanceType, vCPUs, AcceleratorName, AcceleratorCount, Price, SpotPrice, Region"
        )
    prices = [_price(row, f"--prices {uri}, line {number}") for number, row in enumerate(rows, 2)]
    return [price for price in prices if price.on_demand is not None or price.spot is not None]


def _price(row: Mapping[str, str | None], where: str) -> Price:
    return Price(
        (row.get("InstanceType") or "").strip(),
        (row.get("AvailabilityZone") or row.get("Region") or "").strip(),
        _number(row, "vCPUs", where) or 0.0,
        _number(row, "MemoryGiB", where),
        (row.get("AcceleratorName") or "").strip(),
        _number(row, "AcceleratorCount", where) or 0.0,
        _number(row, "Price", where),
        _number(row, "SpotPrice", where),
    )


def _number(row: Mapping[str, str | None], name: str, where: str) -> float | None:
    text = (row.get(name) or "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"{where}: {name} is {text!r}, not a number")
    return value


def of_machine(prices: Sequence[Price], machine: str, uri: str) -> list[Price]:
    """Return the prices of a machine by its name, the cheapest first.

    Raises:
        UsageError: the file does not have it.
    """
    matching = [price for price in prices if price.machine == machine]
    if not matching:
        names = sorted({price.machine for price in prices})
        hint = did_you_mean(machine, names) or f"; it has {_examples(names)}"
        raise UsageError(f"--prices {uri} has no machine {machine!r}{hint}")
    return sorted(matching, key=_order)


def like(
    prices: Sequence[Price], cpus: float, accelerators: float, accelerator: str | None, memory_gb: float, uri: str
) -> list[Price]:
    """Return the prices of machines with as many CPUs and accelerators as a node, the cheapest first.

    Args:
        accelerator: the type of the accelerators, as Ray names it; None: unknown.
        memory_gb: the memory of the node; machines with much less are left out.

    Raises:
        UsageError: the file has no such machine.
    """

    def fits(price: Price) -> bool:
        same_type = not accelerators or accelerator is None or price.accelerator.lower() == accelerator.lower()
        enough = price.memory_gb is None or price.memory_gb >= 0.7 * memory_gb
        return price.cpus == cpus and price.accelerators == accelerators and same_type and enough

    matching = sorted(filter(fits, prices), key=_order)
    if not matching:
        node = f"{cpus:g} vCPUs and {memory_gb:.0f} GB of memory"
        if accelerators:
            node += f" and {accelerators:g} {accelerator or 'accelerator'}"
        raise UsageError(
            f"--prices {uri} has no machine like the nodes of this cluster, with {node}; it has "
            f"{_examples(sorted({price.machine for price in prices}))}. Name one of them with --machine"
        )
    return matching


def _order(price: Price) -> tuple[float, str]:
    return (min(value for value in (price.on_demand, price.spot) if value is not None), price.machine)


def _examples(names: Iterable[str]) -> str:
    names = [*names]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) + more) if names else "no row with a price"
