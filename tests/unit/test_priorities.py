"""RFC 9218: what a priority says, and budgets that come back."""

import pytest

from ktlsd.protocol.budgets import Allowance
from ktlsd.protocol.priorities import Priority, parse_priority


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"", Priority(3, False)),
        (b"u=0", Priority(0, False)),
        (b"i", Priority(3, True)),
        (b"u=5, i", Priority(5, True)),
        (b"i,u=7", Priority(7, True)),
        (b"u=1,i=?0", Priority(1, False)),
        (b"u=1;x=2, i=?1;y", Priority(1, True)),
        (b"u=2, u=6", Priority(6, False)),
        (b"u=9", Priority(3, False)),
        (b"u=1.5", Priority(3, False)),
        (b"u=-1", Priority(3, False)),
        (b"id, ui=4", Priority(3, False)),
        (b"\xff\x00", Priority(3, False)),
        (b"u=4,unknown=\"i\"", Priority(4, False)),
    ],
)  # fmt: skip
def test_a_priority_field(value, expected):
    assert parse_priority(value) == expected


def test_a_priority_field_of_any_length_is_read_in_time():
    for value in (b"u=1;" * 16_000, b", \t" * 16_000, b"i;" * 16_000, b"i" + b" \t" * 16_000 + b"x"):
        parse_priority(value)


def test_an_allowance_is_a_burst_that_comes_back():
    allowance = Allowance(3, 1)
    assert [allowance.spend(100) for _ in range(4)] == [True, True, True, False]
    assert not allowance.spend(100.5)
    assert allowance.spend(102)
    assert not allowance.spend(102)
    assert [allowance.spend(1e6) for _ in range(4)] == [True, True, True, False]
    allowance.earn(100)
    assert [allowance.spend(1e6) for _ in range(13)] == [True] * 12 + [False]
