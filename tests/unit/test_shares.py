"""Clients share: turns of the loop, and a pipe that is full."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktlsd.server.shares import Shares, fair_level
from ktlsd.server.turns import Turns

DEMANDS = st.dictionaries(st.text(min_size=1, max_size=4), st.floats(0, 1e9), max_size=20)


@given(DEMANDS, st.floats(1, 1e9))
def test_what_is_given_out_is_what_there_is_and_nobody_gets_more_than_wanted(demands, pipe):
    level = fair_level(demands, pipe)
    if level is None:
        assert sum(demands.values()) <= pipe
    else:
        assert sum(min(demand, level) for demand in demands.values()) == pytest.approx(pipe, rel=1e-6)
        assert level >= pipe / len(demands) * (1 - 1e-9), "nobody has less than an equal part, but who wants less"


class Simulation:
    """A pipe that gives every connection the same, as TCP does, within what the kernel's pacing lets it have."""

    def __init__(self, pipe, clients):
        self.pipe, self.clients = pipe, clients  # name -> (connections, what it wants in all)
        self.shares = Shares(int(pipe))
        self.caps = None

    def second(self):
        wants = {}
        for name, (count, want) in self.clients.items():
            cap = self.caps.get(name.encode().hex(), float("inf")) if self.caps else float("inf")
            wants |= {(name, number): min(want / count, cap) for number in range(count)}
        level = fair_level({str(key): want for key, want in wants.items()}, self.pipe)
        rates = {key: want if level is None else min(want, level) for key, want in wants.items()}
        got = {name: sum(rate for (owner, _), rate in rates.items() if owner == name) for name in self.clients}
        seen = {name.encode().hex(): (got[name], count) for name, (count, _) in self.clients.items() if got[name]}
        self.caps = self.shares.reckon([seen])
        return got


def test_a_crawler_with_500_connections_gets_one_share_of_a_full_pipe_and_all_of_an_idle_one():
    world = Simulation(1e8, {"crawler": (500, 1e12)})
    assert [round(world.second()["crawler"] / 1e8, 2) for _ in range(5)] == [1.0] * 5, "nobody else is there"
    world.clients["one"] = (1, 1e12)
    for _ in range(20):
        got = world.second()
    assert 0.9 < got["one"] / got["crawler"] < 1.2
    assert sum(got.values()) > 0.95e8
    del world.clients["one"]
    for _ in range(6):
        got = world.second()
    assert got["crawler"] > 0.95e8, "it may have what the others leave"


def test_who_wants_little_gets_it_and_the_pipe_stays_full():
    world = Simulation(1e8, {"crawler": (100, 1e12), **{f"small {n}": (1, 2e6) for n in range(20)}})
    used = 0
    for second in range(30):
        got = world.second()
        if second >= 10:
            used += sum(got.values())
            assert all(got[f"small {n}"] > 1.8e6 for n in range(20))
    assert used / 20 > 0.85e8


def test_where_there_is_room_nobody_is_held_back():
    world = Simulation(1e9, {"a": (3, 1e8), "b": (1, 2e8)})
    for _ in range(5):
        world.second()
        assert world.caps is None


class Source:
    def __init__(self, fd, *, brief=False):
        self.fd = fd
        self.in_line = False
        self.brief = brief


def served(turns, cost):
    """One round: which descriptors had a turn, by client."""
    had = {}
    for client in turns.clients():
        quota = turns.quota()
        while quota > 0 and (source := turns.take(client)) is not None:
            had.setdefault(client, []).append(source.fd)
            quota -= turns.cost(cost)
    return had


def test_one_connection_has_as_much_of_the_loop_as_five_hundred():
    turns = Turns()
    for fd in range(500):
        turns.add(b"crawler", Source(fd))
    turns.add(b"one", Source(1000))
    had = served(turns, 4 << 20)
    assert (len(had[b"crawler"]), had[b"one"]) == (1, [1000])
    assert served(turns, 4 << 20)[b"crawler"] == [1], "the next one: those that had their turn stand behind"


def test_small_things_of_one_client_are_done_in_one_round():
    turns = Turns()
    for fd in range(16):
        turns.add(b"one", Source(fd))
    assert served(turns, 10_000)[b"one"] == list(range(16))
    assert not turns


def test_who_had_a_turn_when_the_round_was_cut_short_stands_behind_the_others():
    turns = Turns()
    for fd in range(3):
        turns.add(b"crawler", Source(fd))
        turns.add(b"one", Source(100 + fd))
        turns.add(b"two", Source(200 + fd))
    seen = []
    while turns:
        client = turns.clients()[0]  # a round ends after the first
        seen.append(turns.take(client).fd)
        turns.rest(client)
        if not turns._lines[client].news and not turns._lines[client].going:
            assert turns.take(client) is None
            turns.rest(client)
    assert seen == [0, 100, 200, 1, 101, 201, 2, 102, 202]


def test_a_connection_stands_in_line_once_and_again_after_its_turn():
    turns, source = Turns(), Source(1)
    turns.add(b"one", source)
    turns.add(b"one", source)
    assert turns.take(b"one") is source
    turns.add(b"one", source)
    assert turns.take(b"one") is source
    assert turns.take(b"one") is None
    assert not turns


def test_what_came_does_not_wait_for_all_that_goes_on_nor_that_for_it():
    turns = Turns()
    going, news = [Source(n) for n in range(10)], [Source(n) for n in range(100, 104)]
    for source in going:
        turns.add(b"one", source)
    for source in news:
        turns.add(b"one", source, news=True)
    order = []
    while (source := turns.take(b"one")) is not None:
        order.append(source.fd)
    assert order == [100, 0, 101, 1, 102, 2, 103, 3, 4, 5, 6, 7, 8, 9]
    assert not turns


def test_brief_ones_are_taken_together_and_what_goes_on_has_its_turn_between_them():
    turns = Turns()
    for fd in range(100, 107):
        turns.add(b"one", Source(fd, brief=fd != 104), news=True)
    for fd in range(3):
        turns.add(b"one", Source(fd))
    taken = turns.take_brief(b"one", 3)
    assert [source.fd for source in taken] == [100, 101, 102]
    assert not any(source.in_line for source in taken)
    turns.put_back(b"one", taken[1:])
    turns.add(b"one", taken[2], news=True)  # it stands there already
    assert turns.take(b"one").fd == 0
    taken[1].brief = taken[2].brief = False
    assert turns.take_brief(b"one", 3) == []
    assert [turns.take(b"one").fd for _ in range(3)] == [101, 1, 102]
    assert [source.fd for source in turns.take_brief(b"one", 3)] == [103]
    assert [turns.take(b"one").fd for _ in range(2)] == [2, 104]
    assert [source.fd for source in turns.take_brief(b"one", 3)] == [105, 106]
    assert turns.take_brief(b"one", 3) == []
    assert turns.take(b"one") is None
    assert not turns
