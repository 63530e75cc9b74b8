"""Rates that `tests/gpu/accept.py` measured on a card, in place of shares of its maker's peaks."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mhr_scale.errors import ConfigError, first_line

#: What a file has: the rate, and part, entry and value of each place where it may stand.
PLACES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "products": (
        ("plan", "products of layers", "flops_per_s"),
        ("card", "matrix products", "flops_per_s"),
    ),
    "memory": (("card", "memory", "bytes_per_s"),),
    "host": (("card", "copies", "up_bytes_per_s"),),
    "launch": (("card", "launches", "seconds"),),
}
AGAIN = "measure it again with `python tests/gpu/accept.py --only card plan`"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Rates of one card: bf16 products (FLOP/s), memory and host (bytes/s), a launch (seconds)."""

    card: str
    date: str
    products: float
    memory: float
    host: float
    launch: float

    @property
    def what(self) -> str:
        """What is measured, in words."""
        return (
            "rates of bf16 products, memory, the host's link and kernel launches are measured: on "
            f"{self.card}, {self.date} (hardware.measured); all others are the table's"
        )


def read_measured(file: str) -> Measured:
    """The rates in an accept.json; raises `ConfigError` for a file that has not all of them."""
    place = f"hardware.measured: {file}"
    try:
        with open(file, encoding="utf-8") as opened:
            found = json.load(opened)
    except OSError as error:
        raise ConfigError(f"{place}: {error.strerror}; name an accept.json") from error
    except ValueError as error:
        raise ConfigError(f"{place}: it is no JSON ({first_line(error)}); {AGAIN}") from error
    try:
        machine, entries = found["machine"], found["entries"]
        values = {(entry["part"], entry["name"]): entry["values"] for entry in entries}
        card, date = str(machine["device"]), str(machine["date"])
    except (KeyError, TypeError) as error:
        lacks = f" (it has no {error})" if isinstance(error, KeyError) else ""
        raise ConfigError(
            f"{place}: it is no accept.json of this version{lacks}; {AGAIN}"
        ) from error
    if card == "CPU":
        raise ConfigError(f"{place}: measured on a CPU at toy size; {AGAIN} on a GPU")
    return measured_on(card, date, values, place=place)


def measured_on(
    card: str, date: str, values: Mapping[tuple[str, str], Any], *, place: str
) -> Measured:
    """The rates among the values of entries, by part and name; raises `ConfigError` as above."""
    return Measured(card=card, date=date, **{rate: _rate(rate, values, place) for rate in PLACES})


def _rate(rate: str, values: Mapping[tuple[str, str], Any], place: str) -> float:
    """The first that is there."""
    for part, name, key in PLACES[rate]:
        own = values.get((part, name))
        value = own.get(key) if isinstance(own, dict) else None
        if value is None:
            continue
        if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{place}: {part}, {name}: {key} {value} is not above 0; {AGAIN}")
        return float(value)
    part, name, key = PLACES[rate][-1]
    raise ConfigError(f"{place}: no {key} under {part}, {name}; {AGAIN}")
