from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as some

from lvlmva_core.errors import InputError
from lvlmva_core.shares import Share, read_share

COUNTS = [0, 1, 63, 64, 65, 256, 1000]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("of", [1, 2, 3, 4, 7, 50])
@pytest.mark.parametrize("multiple", [1, 64])
def test_shares_are_disjoint_and_together_all_in_whole_shards(count: int, of: int, multiple: int) -> None:
    shares: Sequence[range] = [Share(number, of).places(count, multiple) for number in range(1, of + 1)]
    assert [place for share in shares for place in share] == list(range(count))
    for share in shares:
        assert share.start % multiple == 0 or not share
        assert share.stop % multiple == 0 or share.stop == count
    blocks = [-(-len(share) // multiple) for share in shares]
    assert max(blocks) - min(blocks) <= 1


@given(limit=some.integers(0, 10**9), of=some.integers(1, 2000))
def test_parts_of_a_number_of_calls_add_up_to_it(limit: int, of: int) -> None:
    parts = [Share(number, of).of_calls(limit) for number in range(1, of + 1)]
    assert sum(parts) == limit
    assert max(parts) - min(parts) <= 1


@example(limit=5e-323, of=7)  # of the smallest numbers there are
@given(limit=some.floats(0, 1e9), of=some.integers(1, 10**6))
def test_parts_of_an_amount_add_up_to_no_more(limit: float, of: int) -> None:
    part = Share(1, of).of_cost(limit)
    assert part * of <= limit
    assert part * of == pytest.approx(limit, rel=1e-9)


def test_a_share_is_read_or_refused() -> None:
    assert read_share("2/3") == Share(2, 3)
    assert str(read_share("01/4")) == "1/4"
    for wrong in ("0/3", "4/3", "1", "1/0", "a/b", "-1/2", "1/2/3", " 1/2", "", "1.0/2", "١/٢"):
        with pytest.raises(InputError, match=r"expected i/n with i from 1 to n"):
            read_share(wrong)
