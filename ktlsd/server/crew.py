"""The worker processes: forked, told things, watched, buried. Who is wanted and why is the supervisor's business."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ktlsd.errors import KtlsdError
from ktlsd.net import control
from ktlsd.net.control import Control
from ktlsd.net.poller import Poller
from ktlsd.server.board import Board, Place
from ktlsd.server.entrance import Membership
from ktlsd.server.generation import Generation, work
from ktlsd.server.metrics import Metrics, read_report
from ktlsd.server.waker import NEVER

_log = logging.getLogger("ktlsd")
_MAX_LEAVING: Final = 64  # workers; the oldest is cut when there are more
_LAST_WORD: Final = 5.0  # seconds that a worker has to end by itself when its time is over
# The journal has the time of each line already (systemd.exec(5), JOURNAL_STREAM).
LOG_FORM: Final = ("" if "JOURNAL_STREAM" in os.environ else "%(asctime)s ") + "%(levelname)s {who}%(message)s"


@dataclass(slots=True, eq=False)
class Hand:
    """A worker that has been forked, or that an earlier program has left us (without generation and place)."""

    pid: int
    generation: Generation | None
    control: Control
    place: Place | None
    started: float  # monotonic seconds
    log: str | None = None  # where it writes what was asked
    ready: bool = False
    leaving: bool = False
    kill_at: float = NEVER


class Crew:
    """All of them, by process number."""

    def __init__(self, poller: Poller, board: Board, metrics: Metrics, signals: Sequence[signal.Signals]) -> None:
        """`signals` are those the supervisor catches."""
        self._poller = poller
        self._board = board
        self._metrics = metrics
        self._signals = signals
        self._hands: dict[int, Hand] = {}

    def __iter__(self) -> Iterator[Hand]:
        return iter(list(self._hands.values()))

    def __len__(self) -> int:
        return len(self._hands)

    def of(self, generation: Generation | None) -> list[Hand]:
        """Return the workers of a generation that are not leaving."""
        return [hand for hand in self._hands.values() if hand.generation is generation and not hand.leaving]

    def heard_at(self, source: object) -> Hand | None:
        """Return whose control this is."""
        return next((hand for hand in self._hands.values() if hand.control is source), None)

    def adopt(self, workers: Mapping[int, tuple[int, int]], logs: Mapping[int, str], now: float, *, same_board: bool) -> None:
        """Look after the workers of the program before: process number -> descriptor of its control, number of its place."""
        for pid, (fd, number) in workers.items():
            adopted = control.adopt(fd)
            place = Place(self._board, number) if same_board and number >= 0 else None
            self._hands[pid] = Hand(pid, None, adopted, place, now, logs.get(pid), ready=True)
            self._poller.add(adopted, level_triggered=True)

    def fork(self, generation: Generation, now: float, close: Callable[[], None]) -> None:
        """Start a worker; `close` is what it does first, to let go of what is only the supervisor's. Raises StartError."""
        ours, theirs = control.pair()
        place = self._board.take(os.getpid())
        sys.stdout.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        try:
            pid = os.fork()
            if not pid:
                os._exit(self._be_worker(generation, Membership(self._board, place, theirs), ours, close))
        except OSError:
            place.wipe()
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)
            theirs.close()
        self._hands[pid] = Hand(pid, generation, ours, place, now, generation.settings.log.access)
        self._poller.add(ours, level_triggered=True)

    def _be_worker(self, generation: Generation, membership: Membership, ours: Control, close: Callable[[], None]) -> int:
        """Forget that this was the supervisor, and serve; return the exit status."""
        try:
            signal.set_wakeup_fd(-1)
            for number in self._signals:  # a terminal sends them to all processes: the supervisor tells us what to do
                signal.signal(number, signal.SIG_DFL if number == signal.SIGCHLD else signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)
            for handler in logging.getLogger().handlers:
                handler.setFormatter(logging.Formatter(LOG_FORM.format(who="worker %(process)d: ")))
            membership.place.give_to(os.getpid())
            for mine in (ours, *(hand.control for hand in self._hands.values())):
                mine.close()
            close()
            work(generation, membership)
        except KtlsdError as error:
            _log.error("%s", error)
            return 1
        except BaseException:
            _log.exception("a bug")
            return 1
        return 0

    def retire(self, hand: Hand, seconds: float, now: float) -> None:
        """Others have taken over: it finishes what it has, for so many seconds at most."""
        hand.leaving, hand.kill_at = True, now + seconds + _LAST_WORD
        hand.control.send("retire", seconds)
        leaving = sorted((each for each in self._hands.values() if each.leaving), key=lambda each: each.started)
        for oldest in leaving[:-_MAX_LEAVING]:
            _log.warning("%d older workers are still busy: worker %d is told to end at once", len(leaving), oldest.pid)
            oldest.control.send("cut")
            oldest.kill_at = min(oldest.kill_at, now + _LAST_WORD)

    def dismiss(self, hand: Hand, now: float) -> None:
        """It is not wanted after all."""
        hand.leaving, hand.kill_at = True, now + _LAST_WORD
        hand.control.send("cut")
        hand.control.send("drain")

    def stop(self, seconds: float, now: float, *, at_once: bool) -> None:
        """All finish what they have, for so many seconds at most; or end at once."""
        for hand in self._hands.values():
            hand.leaving = True
            hand.control.send("cut" if at_once else "drain", seconds)
            hand.kill_at = min(hand.kill_at, now + (0 if at_once else seconds) + _LAST_WORD)

    def kill(self, hand: Hand) -> None:
        """End one that does not listen."""
        hand.kill_at = NEVER
        try:
            os.kill(hand.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has just ended

    def bury(self, pid: int) -> Hand | None:
        """One has ended: keep what it counted, and return it; None if this is none of ours. Its place is still to be wiped."""
        hand = self._hands.pop(pid, None)
        if hand is not None:
            self._poller.remove(hand.control)
            hand.control.close()
            if hand.place is not None:
                self._keep_counts(hand.place)
        return hand

    def _keep_counts(self, place: Place) -> None:
        report = read_report(place.report())
        if report is None:
            return
        self._metrics.counters.update(report.counters)
        for number, count in enumerate(report.reads[: len(self._metrics.reads)]):
            self._metrics.reads[number] += count
        self._metrics.read_seconds += report.read_seconds


def named(code: int) -> str:
    """Return an exit status as people know it."""
    if code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
    return f"status {code}"
