"""What wakes a loop from outside its sockets: signals, other threads, and a timer."""

import signal
import socket
from collections.abc import Sequence
from typing import Final

NEVER: Final = float("inf")


class Waker:
    """A source: numbers of signals come out of a socket pair, which the interpreter or a thread has written them into."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self.deadline = NEVER

    def hook(self, signals: Sequence[signal.Signals]) -> None:
        """Catch these signals from now on; in the main thread only."""
        for number in signals:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)

    def fileno(self) -> int:
        """The end the interpreter does not write to."""
        return self._read.fileno()

    def write(self, number: int) -> None:
        """As if a signal had come; from any thread."""
        try:
            self._write.send(bytes([number]))
        except BlockingIOError:
            pass  # full: it wakes anyway

    def drain(self) -> bytes:
        """Return the numbers of the signals that came, b"" if none did."""
        try:
            return self._read.recv(4096)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        """Close both ends."""
        self._read.close()
        self._write.close()
