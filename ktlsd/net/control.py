"""Words between the supervisor and a worker: a socket pair that keeps messages apart, and carries descriptors with them.

Its end is a message too: a worker whose supervisor has died sees it, and the other way round.
"""

import array
import os
import socket
from typing import Final, NamedTuple

_MAX: Final = 4_096  # bytes of a message
_MAX_FDS: Final = 4
_AT_ONCE: Final = 16  # messages; more come with the next look


class Message(NamedTuple):
    """`word` says what, `value` how much or which; descriptors are the receiver's. An empty word is the other's end."""

    word: str
    value: float = 0
    fds: tuple[int, ...] = ()


class Control:
    """One end, as a source for the poller. Never waits."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.deadline = float("inf")

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._sock.fileno()

    def send(self, word: str, value: float = 0, fds: tuple[int, ...] = ()) -> bool:
        """Say something; whether the other end is there and had room."""
        room = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._sock.sendmsg([f"{word} {value!r}".encode()], room, socket.MSG_NOSIGNAL)
        except OSError:
            return False  # stuck or gone: whoever watches it notices by other means
        return True

    def receive(self) -> list[Message]:
        """Return what came."""
        messages: list[Message] = []
        for _ in range(_AT_ONCE):
            try:
                data, ancillary, _, _ = self._sock.recvmsg(_MAX, socket.CMSG_SPACE(_MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return messages
            except OSError:
                data, ancillary = b"", []
            if not data:
                close_all(_descriptors(ancillary))
                return [*messages, Message("")]
            try:
                word, _, value = data.decode().partition(" ")
                messages.append(Message(word, float(value), _descriptors(ancillary)))
            except ValueError:  # a worker that somebody else has taken over: it is not listened to any more
                return [*messages, Message("")]
        return messages

    def close(self) -> None:
        """Hang up."""
        self._sock.close()


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, ...]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return tuple(fds)


def pair() -> tuple[Control, Control]:
    """Return two ends that belong together."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Control(one), Control(other)


def adopt(fd: int) -> Control:
    """Return the end that an earlier program in this process left open."""
    return Control(socket.socket(fileno=fd))


def close_all(fds: tuple[int, ...]) -> None:
    """Close descriptors that came and are not wanted."""
    for fd in fds:
        os.close(fd)
