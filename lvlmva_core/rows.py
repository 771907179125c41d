"""Records of many samples, asked for some at a time, so that memory does not grow with the number of samples."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from lvlmva_core.arrays import SHARD_ROWS
from lvlmva_core.store import Record


@dataclass(frozen=True)
class Rows:
    """What is kept of each of N samples: by it a stage and its workers find the same keys and the same records.

    kind: of the store. ids: of the samples. chunk: how many are computed before they are kept, which is what a killed
    run loses at most. keys_of: places (0..N-1) -> what their records are kept under. compute: places -> their records.
    Neither holds more samples than it is asked for; a record does not depend on what is asked for beside it.
    """

    kind: str
    ids: Sequence[str]
    chunk: int
    keys_of: Callable[[Sequence[int]], list[str]]
    compute: Callable[[Sequence[int]], list[Record]]

    def keys(self, places: Sequence[int] | None = None) -> list[str]:
        """Keys of these samples, or of all, with no more than a shard of samples in memory."""
        asked = range(len(self.ids)) if places is None else places
        return [key for part in shards_of(len(asked)) for key in self.keys_of(asked[part])]


def shards_of(count: int) -> Iterator[slice]:
    """The rows of each shard of an array of `count` rows."""
    for first in range(0, count, SHARD_ROWS):
        yield slice(first, min(first + SHARD_ROWS, count))


def stacked(records: Iterable[Record]) -> Iterator[dict[str, np.ndarray]]:
    """Records as arrays with a row a record, a shard of them at a time; names sorted."""
    remaining = iter(records)
    while some := list(islice(remaining, SHARD_ROWS)):
        yield {name: np.stack([record[name] for record in some]) for name in sorted(some[0])}
