"""The ssl module's key log, caught in a pipe, so that no secret ever touches a disk.

OpenSSL writes each line at once, in the thread that does the handshake; the worker has one thread and drains after every
step, so what comes out belongs to the session that was just at work, and the pipe never fills (a full one would block).
"""

import fcntl
import os
import ssl
from typing import Final

# Bytes. OpenSSL blocks in write() on a full pipe, so what one step can log must fit: 32 KiB of ciphertext (what one step is
# fed at most) hold 1,213 KeyUpdates of 27 bytes, each logs a line of 186. 1 MiB is the limit for the unprivileged.
_CAPACITY: Final = 1 << 18
_READ: Final = 1 << 16


class KeyLogPipe:
    """A pipe for the key log of this process's contexts. Make it after the fork that makes the worker. Raises OSError."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read, False)
        try:
            fcntl.fcntl(self._write, fcntl.F_SETPIPE_SZ, _CAPACITY)
        except OSError:  # over the user's allowance, fs.pipe-user-pages-soft
            self.close()
            raise

    def attach(self, context: ssl.SSLContext) -> None:
        """Have `context` log here. Never taken back: sessions that live may write on. Raises OSError without /proc."""
        # /proc/self/fd opens the pipe anew, as a description of its own that blocks; hence the draining.
        context.keylog_filename = f"/proc/self/fd/{self._write}"

    def drain(self) -> bytes:
        """Return the lines that have come since the last call, b"" if none."""
        lines = b""
        while True:
            try:
                lines += os.read(self._read, _READ)
            except BlockingIOError:
                return lines

    def close(self) -> None:
        """Close both ends; contexts attached keep theirs until they go."""
        os.close(self._read)
        os.close(self._write)
