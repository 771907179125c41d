"""A share of the samples: the i-th of n parts that workers divide them into."""

import math
import re
from dataclasses import dataclass

from lvlmva_core.arrays import SHARD_ROWS
from lvlmva_core.errors import InputError


@dataclass(frozen=True)
class Share:
    """Part `number` of `of`, from 1."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def places(self, count: int, multiple: int = SHARD_ROWS) -> range:
        """Which of `count` samples are in it: whole multiples, but for the last; the shares of all `of` are disjoint,
        as equal as that allows, and together all. It is empty where there are fewer multiples than shares."""
        blocks = -(-count // multiple)
        first, last = (blocks * number // self.of * multiple for number in (self.number - 1, self.number))
        return range(min(first, count), min(last, count))

    def of_calls(self, limit: int) -> int:
        """Its part of a number of calls: the parts of all shares add up to it."""
        return limit // self.of + (self.number <= limit % self.of)

    def of_cost(self, limit: float) -> float:
        """Its part of an amount: the parts of all shares add up to no more."""
        part = limit / self.of
        while part * self.of > limit:  # rounded up
            part = math.nextafter(part, 0)
        return part


def read_share(text: str) -> Share:
    """The share that "i/n" says. Raises InputError where it says none."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    number, of = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= of:
        raise InputError(f"--shard '{text}': expected i/n with i from 1 to n, as in 1/4, 2/4, 3/4, 4/4")
    return Share(number, of)
