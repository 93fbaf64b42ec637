"""Effects: a file of prices: a CSV with the columns of SkyPilot's catalogue, one row for each machine and region.

Required: InstanceType, vCPUs, Price or SpotPrice (per hour). Used if they are there: MemoryGiB, AcceleratorName,
AcceleratorCount, Region, AvailabilityZone. Others are ignored.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from imgbatch.config.secrets import masked
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


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The rows of a file of prices that have a price."""

    uri: str
    """As given, without secrets."""
    modified: datetime | None
    """When the file was written; None: the store does not say."""
    prices: list[Price]

    def of_machine(self, machine: str) -> Catalogue:
        """Return the prices of a machine by its name, the cheapest first.

        Raises:
            UsageError: the file does not have it.
        """
        matching = [price for price in self.prices if price.machine == machine]
        if not matching:
            names = sorted({price.machine for price in self.prices})
            hint = did_you_mean(machine, names) or f"; it has {_examples(names)}"
            raise UsageError(f"--prices {self.uri} has no machine {machine!r}{hint}")
        return replace(self, prices=sorted(matching, key=_order))

    def like(self, cpus: float, accelerators: float, accelerator: str | None, memory_gb: float) -> Catalogue:
        """Return the prices of machines with as many CPUs and accelerators as a node, the cheapest first.

        Args:
            cpus: of the node.
            accelerators: of the node.
            accelerator: the type of the accelerators, as Ray names it; None: unknown.
            memory_gb: the memory of the node; machines with much less are left out.

        Raises:
            UsageError: the file has no such machine.
        """

        def fits(price: Price) -> bool:
            same_type = not accelerators or accelerator is None or price.accelerator.lower() == accelerator.lower()
            enough = price.memory_gb is None or price.memory_gb >= 0.7 * memory_gb
            return price.cpus == cpus and price.accelerators == accelerators and same_type and enough

        matching = sorted(filter(fits, self.prices), key=_order)
        if not matching:
            node = f"{cpus:g} vCPUs and {memory_gb:.0f} GB of memory"
            if accelerators:
                node += f" and {accelerators:g} {accelerator or 'accelerator'}"
            raise UsageError(
                f"--prices {self.uri} has no machine like the nodes of this cluster, with {node}; it has "
                f"{_examples(sorted({price.machine for price in self.prices}))}. Name one of them with --machine"
            )
        return replace(self, prices=matching)


def read(uri: str, stores: Stores) -> Catalogue:
    """Return the rows of a file of prices.

    Raises:
        UsageError: it does not exist, lacks a column, or has a number that is none.
    """
    where = f"--prices {masked(uri)}"
    try:
        content, meta = stores.read(absolute(uri), _MAX_BYTES)
    except NotFound as error:
        raise UsageError(f"{where}: {error}") from error
    rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig", "replace")))
    columns = [name.strip() for name in rows.fieldnames or []]
    rows.fieldnames = columns
    missing = [name for name in _REQUIRED if name not in columns]
    if missing or not any(name in columns for name in _PRICES):
        needed = " and ".join(missing or ["Price or SpotPrice"])
        raise UsageError(
            f"{where} has no column {needed}: use a CSV with the columns of SkyPilot's catalogue, "
            "InstanceType, vCPUs, AcceleratorName, AcceleratorCount, Price, SpotPrice, Region"
        )
    prices = [_price(row, f"{where}, line {number}") for number, row in enumerate(rows, 2)]
    prices = [price for price in prices if price.on_demand is not None or price.spot is not None]
    return Catalogue(masked(uri), meta.last_modified, prices)


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


def _order(price: Price) -> tuple[float, str]:
    return (min(value for value in (price.on_demand, price.spot) if value is not None), price.machine)


def _examples(names: Iterable[str]) -> str:
    names = [*names]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) + more) if names else "no row with a price"
