"""Telling systemd how we are (sd_notify(3)): datagrams to $NOTIFY_SOCKET; without it nothing is told to nobody."""

import logging
import os
import socket
import time
from collections.abc import Mapping

_log = logging.getLogger("ktlsd")


class Notifier:
    """Speaks to the service manager."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        name = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) if name else None
        self.watchdog = _watchdog(environment)  # seconds within which it wants a sign of life, None for never

    def tell(self, *assignments: str) -> None:
        """Send "READY=1", "STATUS=…" and the like, in one datagram."""
        if self._sock is None:
            return
        try:
            self._sock.sendto("\n".join(assignments).encode(), self._address)
        except OSError as exc:
            _log.warning("cannot tell systemd: %s", exc.strerror)

    def reloading(self) -> None:
        """A reload begins; `tell("READY=1")` ends it."""
        self.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def close(self) -> None:
        """Hang up: in a process that has nothing to tell."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def _watchdog(environment: Mapping[str, str]) -> float | None:
    try:
        pid = environment.get("WATCHDOG_PID")
        if pid is not None and int(pid) != os.getpid():
            return None
        return int(environment["WATCHDOG_USEC"]) / 1e6 or None
    except (KeyError, ValueError):
        return None
