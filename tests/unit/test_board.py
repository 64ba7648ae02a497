"""Shared memory between the processes of a server."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktlsd.errors import StartError
from ktlsd.server import board as module
from ktlsd.server.admission import Admission, Trusted, guest
from ktlsd.server.board import Board, State, Tally
from ktlsd.settings import Limits


@pytest.fixture
def board():
    made = Board()
    yield made
    made.close()


def test_what_one_process_writes_another_reads(board):
    place = board.take(1)
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        place.give_to(os.getpid())
        place.beat(12.5)
        place.connections = 7
        place.state = State.SERVING
        place.publish(b'{"a": 1}')
        os.write(writing, b"x")
        os._exit(0)
    os.read(reading, 1)
    os.waitpid(pid, 0)
    assert (place.pid, place.last_beat, place.connections, place.state, place.report()) == (
        pid, 12.5, 7, State.SERVING, b'{"a": 1}',
    )  # fmt: skip
    os.close(reading)
    os.close(writing)


def test_a_place_that_is_taken_again_remembers_nothing(board):
    place = board.take(1)
    place.publish(b"old")
    Tally(board, place).add(b"client")
    place.wipe()
    again = board.take(2)
    assert again.number == place.number
    assert again.report() == b""
    assert Tally(board, again).add(b"client") == 1


def test_a_report_that_is_being_written_hides_the_last_one_from_nobody(board):
    place = board.take(1)
    place.publish(b"whole")
    start = place._report_at(1 - module._WORD.unpack_from(board.memory, place._at + module._WHICH_AT)[0])
    board.memory[start : start + 4] = b"half"  # as a worker leaves it that is stopped in the middle
    assert place.report() == b"whole"
    place.publish(b"next")
    assert place.report() == b"next"


def test_who_adds_up_while_counts_move_does_so_again(board):
    seen = []
    for places in board.settled():
        seen.append(len(places))
        if len(seen) == 1:
            with board.moving():
                board.take(1)
    assert seen == [0, 1]
    assert len(list(board.settled())) == 1
    with board.moving():
        assert len(list(board.settled())) == 100, "it does not wait for ever"


def test_a_report_too_long_for_its_place_is_refused(board):
    place = board.take(1)
    place.publish(b"before")
    assert not place.publish(bytes(100_000))
    assert place.report() == b"before"


def test_places_run_out_with_a_clear_error(board):
    for number in range(module.PLACES):
        board.take(number + 1)
    with pytest.raises(StartError, match="512 workers are running"):
        board.take(1)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.booleans()), max_size=60))
def test_clients_are_counted_over_all_workers(steps):
    board = Board()
    tallies = [Tally(board, board.take(number + 1)) for number in range(3)]
    held = []
    for worker, client, leaves in steps:
        name = b"client %d" % client
        if leaves and (worker, name) in held:
            held.remove((worker, name))
            tallies[worker].remove(name)
        else:
            held.append((worker, name))
            assert tallies[worker].add(name) >= sum(each == name for _, each in held)
    for worker, name in held:
        tallies[worker].remove(name)
    assert tallies[0].add(b"client 0") == 1
    board.close()


def test_a_thousand_clients_hardly_ever_share_both_counts(board):
    tally = Tally(board, board.take(1))
    assert sum(tally.add(b"%d" % number) > 1 for number in range(1000)) <= 4


@pytest.mark.parametrize(("one", "other", "same_client", "same_subnet"), [
    ("192.0.2.1", "192.0.2.1", True, True), ("192.0.2.1", "192.0.2.2", False, True), ("192.0.2.1", "192.0.3.1", False, False),
    ("2001:db8::1", "2001:db8::2", True, True), ("2001:db8::1", "2001:db8:0:1::1", False, True),
    ("2001:db8::1", "2001:db8:1::1", False, False), ("::ffff:192.0.2.1", "192.0.2.1", True, True),
    ("fe80::1%lo", "fe80::1", True, True),
])  # fmt: skip
def test_who_counts_as_one_client(one, other, same_client, same_subnet):
    assert (guest(one).client == guest(other).client) is same_client
    assert (guest(one).subnet == guest(other).subnet) is same_subnet


def test_a_connection_that_is_refused_for_its_subnet_is_not_counted_for_its_client(board):
    admission = Admission(Limits(connections_per_client=2, connections_per_subnet=2), Tally(board, board.take(1)))
    assert admission.admit(guest("192.0.2.1")) is None
    assert admission.admit(guest("192.0.2.2")) is None
    assert admission.admit(guest("192.0.2.3")) == "subnet"
    admission.leave(guest("192.0.2.1"))
    assert admission.admit(guest("192.0.2.3")) is None
    assert admission.admit(guest("192.0.2.3")) == "subnet"
    admission.leave(guest("192.0.2.2"))
    assert admission.admit(guest("192.0.2.3")) is None
    assert admission.admit(guest("192.0.2.3")) == "client"


def test_trusted_networks():
    trusted = Trusted(["10.0.0.0/8", "fd00::/8"])
    assert "10.1.2.3" in trusted
    assert "::ffff:10.1.2.3" in trusted
    assert "fd00::1%eth0" in trusted
    assert "11.1.2.3" not in trusted
    assert "2001:db8::1" not in trusted
