"""Another version of the program in the same process: the sockets stay open, the workers stay its children.

First the new program is asked, in a process of its own, whether it would start. Then this one becomes it (exec): the
process number stays, and what systemd or a pid file knows remains true. What the new program must know lies in a memfd.
"""

import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

from ktlsd.errors import StartError

_log = logging.getLogger("ktlsd")
_VARIABLE: Final = "KTLSD_STATE"
LAYOUT: Final = 2  # a number for what is below
_MAX: Final = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class State:
    """What one program leaves to the next. Descriptors by number."""

    layout: int
    sockets: dict[str, dict[str, list[int]]]
    workers: dict[int, tuple[int, int]]  # process number -> descriptor of its control, number of its place on the board
    logs: dict[int, str]  # process number -> the access log it writes to
    board: int
    place: int  # the supervisor's own
    started: float  # seconds since the epoch
    settings: str  # what was served, as JSON: if what is in the files now won't do
    counters: dict[str, int]  # the supervisor's own, those of workers that have ended among them
    reads: list[int]
    read_seconds: float


def take_state(environment: Mapping[str, str]) -> State | None:
    """Return what the program before us in this process has left, None if there was none. Raises StartError."""
    number = os.environ.pop(_VARIABLE, "") if environment is os.environ else environment.get(_VARIABLE, "")
    if not number.isdecimal():
        return None
    with open(int(number), "rb") as file:
        file.seek(0)
        state = json.loads(file.read(_MAX))
    if state.pop("layout") != LAYOUT:
        raise StartError("the running program is of another kind than this one can take over from: restart it")
    workers = {int(pid): (fd, place) for pid, (fd, place) in state.pop("workers").items()}
    logs = {int(pid): log for pid, log in state.pop("logs").items()}
    made = State(LAYOUT, workers=workers, logs=logs, **state)
    _inherit(made, False)
    return made


def _inherit(state: State, yes: bool) -> None:
    """Have descriptors outlive an exec, or not."""
    for fd in (state.board, *(fd for fd, _ in state.workers.values())):
        os.set_inheritable(fd, yes)


class Upgrade:
    """The supervisor's."""

    def __init__(self) -> None:
        self.pid: int | None = None  # of the process in which the new program is tried

    def begin(self, state: State) -> bool:
        """Try whether the new program would start from here. False: not begun. Its end is the caller's to see."""
        if self.pid is not None:
            return False
        try:
            fd = _file(state)
            try:
                arguments = [*_command(), "--check"]
                self.pid = os.posix_spawn(sys.executable, arguments, {**_environment(), _VARIABLE: str(fd)})
            finally:
                os.close(fd)
        except OSError as exc:
            _log.error("upgrade: cannot start %s: %s", sys.executable, exc.strerror)
            return False
        finally:
            _inherit(state, False)
        return True

    def execute(self, state: State) -> None:
        """Become the new program. Returns only if that fails; the sockets outlive an exec then (`Sockets.keep`)."""
        try:
            fd = _file(state)
            try:
                os.execve(sys.executable, _command(), {**_environment(), _VARIABLE: str(fd)})  # noqa: S606  # no shell
            finally:
                os.close(fd)
        except OSError as exc:
            _log.error("upgrade: cannot become %s: %s", sys.executable, exc.strerror)
        finally:
            _inherit(state, False)


def _file(state: State) -> int:
    _inherit(state, True)
    fd = os.memfd_create("ktlsd-state", 0)
    os.write(fd, json.dumps(asdict(state)).encode())
    return fd


def _command() -> list[str]:
    return [sys.executable, *sys.orig_argv[1:]]


def _environment() -> dict[str, str]:
    """Return ours without what was only for us: sockets that systemd opened are in the state."""
    return {key: value for key, value in os.environ.items() if key not in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")}
