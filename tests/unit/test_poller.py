import socket

import pytest

from ktlsd.net.poller import Poller


class Source:
    def __init__(self, deadline=float("inf")):
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.deadline = deadline

    def fileno(self):
        return self.ours.fileno()


@pytest.fixture
def poller():
    made = Poller()
    yield made
    made.close()


def round_(poller, now):
    return list(poller.events(poller.wait(now), now))


def test_an_edge_is_told_once(poller):
    source = Source()
    poller.add(source)
    assert [e.readable for e in round_(poller, 0)] == [False]  # writable
    source.theirs.send(b"x")
    assert [(e.readable, e.ended) for e in round_(poller, 0)] == [(True, False)]
    source.deadline = 1.0
    poller.reschedule(source, source.fileno())
    assert [e.overdue for e in round_(poller, 1.0)] == [True], "no new edge: only the deadline"


def test_an_end_is_told_with_the_input_before_it(poller):
    source = Source()
    poller.add(source)
    source.theirs.send(b"x")
    source.theirs.close()
    (event,) = round_(poller, 0)
    assert (event.readable, event.ended) == (True, True)


def test_deadlines_move_both_ways(poller):
    source = Source(deadline=10.0)
    poller.add(source)
    round_(poller, 0)
    source.deadline = 20.0
    poller.reschedule(source, source.fileno())
    source.deadline = 5.0
    poller.reschedule(source, source.fileno())
    assert [e.overdue for e in round_(poller, 5.0)] == [True]
    source.deadline = 30.0
    poller.reschedule(source, source.fileno())
    assert list(poller.events([], 20.0)) == [], "the entries for 10 and 20 are stale"
    assert [e.overdue for e in poller.events([], 30.0)] == [True]


def test_a_descriptor_used_anew_does_not_inherit_deadlines(poller):
    first = Source(deadline=5.0)
    fd = first.fileno()
    poller.add(first)
    poller.forget(fd)
    first.ours.close()
    second = Source(deadline=50.0)
    assert second.fileno() == fd
    poller.add(second)
    assert list(poller.events([], 10.0)) == []
    assert len(poller) == 1


def test_sources_that_end_meanwhile_are_left_out(poller):
    first, second = Source(), Source()
    poller.add(first)
    poller.add(second)
    seen = []
    for event in poller.events(poller.wait(0), 0):
        seen.append(event.source)
        other = second if event.source is first else first
        poller.forget(other.fileno())
    assert len(seen) == 1
