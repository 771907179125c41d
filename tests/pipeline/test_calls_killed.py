"""A dozen kills at random moments of critique and judge; benchmarks/kills.py does it a thousand times."""

import random

from benchmarks.kills import CONCURRENCY, kill_rounds


def test_after_kills_at_random_moments_nothing_is_lost_or_bought_twice() -> None:
    tally = kill_rounds(kills=12, samples=24, generator=random.Random(1))
    assert tally.kills >= 12
    assert tally.bought_twice == 0
    assert tally.most_lost_at_once <= CONCURRENCY
    assert tally.kept == tally.paid - tally.lost
