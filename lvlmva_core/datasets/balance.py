"""How many samples of each group a split gets, and which."""

import numpy as np

from lvlmva_core.errors import InputError


def shares_to_counts(total: int, share: float) -> tuple[int, int]:
    """(plain, spurious) counts that add up to `total`, the second rounded to the nearest from `share` (0..1)."""
    spurious = round(total * share)
    return total - spurious, spurious


def choose_per_group(
    candidates: list[np.ndarray], counts: tuple[int, ...], rng: np.random.Generator, setting: str
) -> list[np.ndarray]:
    """Draw `counts[g]` rows for each group g out of `candidates[g]`, none twice; groups may share candidates.

    Returns:
        rows (int64, rising) of each group.

    Raises:
        InputError: too few candidates; `setting` names the key to lower.
    """
    taken: set[int] = set()
    chosen = []
    for rows, count in zip(candidates, counts, strict=True):
        free = np.array([row for row in rows if row not in taken], dtype=np.int64)
        if len(free) < count:
            raise InputError(f"{setting}: {count} pictures are wanted for a group, {len(free)} are there; lower it")
        drawn = np.sort(rng.permutation(free)[:count])
        taken.update(drawn.tolist())
        chosen.append(drawn)
    return chosen
