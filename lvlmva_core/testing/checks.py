"""What several suites check."""

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np


@contextlib.contextmanager
def global_generators_left_alone() -> Iterator[None]:
    """Raises AssertionError where what runs inside draws from, or seeds, the generators of numpy or torch."""
    import torch

    before = torch.get_rng_state()
    with np.printoptions(threshold=100_000):
        of_numpy = str(np.random.get_state())  # noqa: NPY002
        yield
        assert str(np.random.get_state()) == of_numpy, "numpy's global generator was used"  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before), "torch's global generator was used"


def assert_same_arrays(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], why: str) -> None:
    """Same names, dtypes, shapes and bytes. Raises AssertionError, saying which array differs and `why` it must not."""
    assert found.keys() == wanted.keys(), f"arrays {sorted(found)} and {sorted(wanted)}: {why}"
    for name, array in wanted.items():
        one, other = _plain(found[name]), _plain(array)
        assert one == other, f"'{name}' differs: {why}"


def _plain(array: np.ndarray) -> object:
    """Dtype, shape and bytes; of words what they are, since their dtype is as wide as the longest."""
    return array.tolist() if array.dtype.kind == "U" else (array.dtype, array.shape, array.tobytes())


@contextlib.contextmanager
def refused(*words: str, by: type[Exception] = ValueError) -> Iterator[None]:
    """Raises AssertionError where what runs inside raises nothing, or says none of `words`."""
    try:
        yield
    except by as error:
        if not all(word in str(error) for word in words):
            raise AssertionError(f"the message does not name {words}: {error}") from error
    else:
        raise AssertionError(f"bad input was taken; expected a {by.__name__} that names {words}")
