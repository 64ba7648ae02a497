"""Words between supervisor and workers."""

import os

from ktlsd.net import control
from ktlsd.net.control import Message


def test_words_numbers_and_descriptors_arrive():
    one, other = control.pair()
    reading, writing = os.pipe()
    assert one.send("log", 0, (writing,))
    assert one.send("drain", 2.5)
    first, second = other.receive()
    assert (first.word, second) == ("log", Message("drain", 2.5))
    os.write(first.fds[0], b"x")
    assert os.read(reading, 1) == b"x"
    assert not os.get_inheritable(first.fds[0])
    control.close_all((reading, writing, *first.fds))
    one.close()
    assert other.receive() == [Message("")]
    assert not other.send("late")
    other.close()


def test_nonsense_from_a_worker_that_was_taken_over_is_its_end():
    one, other = control.pair()
    for nonsense in (b"x", b"\xff 1", b"a b c", b"drain nan nan"):
        one._sock.send(nonsense)
        assert other.receive()[-1] == Message("")
    one.close()
    other.close()


def test_who_does_not_listen_holds_nobody_up():
    one, other = control.pair()
    said = 0
    while one.send("drain", 1.0):
        said += 1
    assert said > 10
    heard = 0
    while got := other.receive():
        assert len(got) <= 16, "not more at a time"
        heard += len(got)
    assert heard == said
    one.close()
    other.close()
