"""The process that owns the sockets and the workers: starts them, watches them, replaces them, and never serves itself.

A reload, an upgrade and a crash are the same thing to it: a worker that is wanted and not there is forked, one that is there
and not wanted is told to leave.
"""

import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from ktlsd.errors import KtlsdError, StartError
from ktlsd.net import control, listeners
from ktlsd.net.notify import Notifier
from ktlsd.net.poller import Event, Poller
from ktlsd.server import process, told
from ktlsd.server.board import Place, State, board_of
from ktlsd.server.crew import Crew, Hand, named
from ktlsd.server.generation import Generation, prepare
from ktlsd.server.metrics import Metrics, Report
from ktlsd.server.renewal import Renewal
from ktlsd.server.sockets import Sockets
from ktlsd.server.upgrade import LAYOUT, Upgrade, take_state
from ktlsd.server.upgrade import State as Handed
from ktlsd.server.waker import NEVER, Waker
from ktlsd.settings import Settings

_log = logging.getLogger("ktlsd")
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)
_QUICK: Final = 10.0  # seconds; a worker that lived less has crashed at once
_BACK_OFF: Final = (0.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # seconds before the next one, by how many did so


class Supervisor:
    """`run` returns when the last worker has ended."""

    def __init__(self, load: Callable[[], Settings], announce: Callable[[str], None]) -> None:
        """`load` reads the settings, again for every reload. Raises StartError."""
        self._load = load
        self._announce = announce
        self._notifier = Notifier()
        self._poller = Poller()
        self._waker = Waker()
        self._metrics = Metrics()
        self._generation: Generation | None = None
        self._next: Generation | None = None  # whose workers are starting
        self._reload_again = False
        self._crashes = 0
        self._fork_at = 0.0
        self._tick_at = 0.0
        self._ticked = 0.0
        self._stopping = False
        self._served = False  # a worker has been ready
        self._upgrade = Upgrade()
        self._renewal = Renewal()
        state = take_state(os.environ)
        self._board, same_board = board_of(None if state is None else state.board)
        self._place = Place(self._board, state.place) if state and same_board else self._board.take(os.getpid())
        self._place.state = State.LEAVING  # it takes no connections
        self._crew = Crew(self._poller, self._board, self._metrics, _SIGNALS)
        self._started = time.time() if state is None else state.started
        self._before = None if state is None else state.settings
        if state is None:
            self._sockets = Sockets(listeners.inherited(os.environ))
        else:
            self._sockets = Sockets.take_over(state.sockets)
            self._metrics.counters.update(state.counters)
            self._metrics.reads, self._metrics.read_seconds = state.reads, state.read_seconds
            self._crew.adopt(state.workers, state.logs, time.monotonic(), same_board=same_board)

    # --- life ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until told to stop. Raises SettingsError, StartError before the first worker is ready."""
        process.forbid_core_dumps()
        process.take_name("ktlsd")
        self._generation = self._first()
        self._sockets.commit(self._generation.names)
        self._waker.hook(_SIGNALS)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # an upgrade has blocked them
        self._poller.add(self._waker, level_triggered=True)
        if self._renewal.watch.works:
            self._poller.add(self._renewal.watch, level_triggered=True)
        for line in told.lines(self._generation):
            self._announce(line)
        self._renewal.look_after(self._generation)
        self._reap(time.monotonic())  # workers of an earlier program may have ended meanwhile
        while len(self._crew) or not self._stopping:
            now = time.monotonic()
            self._act(now)
            ready = self._poller.wait(now, self._next_moment())
            now = time.monotonic()
            for event in self._poller.events(ready, now):
                self._event(event, now)
        self._sockets.close()
        _log.info("stopped")

    def _first(self) -> Generation:
        """Carry out the settings; after an upgrade those of the program before, if they changed since they were looked at."""
        try:
            return prepare(self._load(), self._sockets, 1)
        except KtlsdError as error:
            if self._before is None:
                raise
            _log.error("upgrade: %s. What was served before is served on", error)
            self._metrics.count("reloads_refused")
            return prepare(msgspec.json.decode(self._before, type=Settings), self._sockets, 1)

    def _event(self, event: Event, now: float) -> None:
        if event.source is self._waker:
            came = deque(self._waker.drain())
            while came:
                self._signal(came.popleft(), now, came)
        elif event.source is self._renewal.watch:
            self._renewal.noticed(now)
        else:
            hand = self._crew.heard_at(event.source)
            if hand is not None:
                self._heard(hand, now)

    def _next_moment(self) -> float:
        kills = min((hand.kill_at for hand in self._crew), default=NEVER)
        return min(self._tick_at, self._renewal.look_at, self._fork_at if self._missing else NEVER, kills)

    def _act(self, now: float) -> None:
        """Everything that time has made due."""
        if now >= self._tick_at:
            self._tick(now)
        if now >= self._renewal.look_at:
            self._renew(now)
        for hand in self._crew:
            if now >= hand.kill_at:
                _log.warning("worker %d does not end: killed", hand.pid)
                self._crew.kill(hand)
        while self._missing and now >= self._fork_at:
            self._start(now)

    def _signal(self, number: int, now: float, behind: Iterable[int]) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self._stop(now)
        elif number == signal.SIGHUP:
            self._reload(now)
        elif number == signal.SIGUSR1:
            self._reopen_log()
        elif number == signal.SIGUSR2:
            self._begin_upgrade()
        elif number == signal.SIGCHLD:
            self._reap(now, behind)

    # --- workers ---------------------------------------------------------------------------------------------------

    @property
    def _wanted(self) -> Generation:
        """The generation that is to serve."""
        wanted = self._next or self._generation
        assert wanted is not None
        return wanted

    @property
    def _missing(self) -> bool:
        """Whether there are fewer workers than there shall be."""
        return not self._stopping and len(self._crew.of(self._wanted)) < self._wanted.workers

    def _start(self, now: float) -> None:
        try:
            self._crew.fork(self._wanted, now, self._let_go)
        except (OSError, StartError) as exc:  # no memory, too many processes: later, perhaps
            _log.error("cannot start a worker: %s", exc.strerror if isinstance(exc, OSError) else exc)
            self._fork_at = now + _BACK_OFF[-1]
            if self._next is not None:
                self._abandon_reload("not all of the new workers could be started")

    def _let_go(self) -> None:
        """In a new worker: close what is only the supervisor's, and sockets of other generations: they must be able to end."""
        self._sockets.commit(self._wanted.names)
        for generation in (self._generation, self._next):
            if generation is not None and generation is not self._wanted:
                generation.close()
        for each in (self._poller, self._waker, self._notifier, self._renewal):
            each.close()

    def _heard(self, hand: Hand, now: float) -> None:
        for message in hand.control.receive():
            control.close_all(message.fds)
            if message.word == "ready":
                hand.ready = True
                self._check_ready(now)
            elif not message.word:  # it ends, or is dead: SIGCHLD tells
                self._poller.remove(hand.control)

    def _check_ready(self, now: float) -> None:
        """Go over to the next generation when all its workers are there."""
        if sum(hand.ready for hand in self._crew.of(self._wanted)) < self._wanted.workers or self._stopping:
            return
        self._served = True
        if self._next is not None:
            old, self._generation, self._next = self._generation, self._next, None
            self._sockets.commit(self._generation.names)
            if old is not None:
                if old.settings.log == self._generation.settings.log:
                    self._send_log(self._generation)
                old.close()
            self._renewal.look_after(self._generation)
            self._metrics.count("reloads")
            _log.info("reloaded: generation %d serves", self._generation.number)
        for hand in self._crew:
            if hand.generation is not self._generation and not hand.leaving:
                self._crew.retire(hand, self._wanted.settings.limits.retire_timeout, now)
        self._tell_ready()
        if self._reload_again:
            self._reload_again = False
            self._reload(now)

    def _tell_ready(self) -> None:
        generation = self._generation
        assert generation is not None
        encrypts = f"in userspace ({generation.policy.off})" if generation.policy.off else "in the kernel"
        self._notifier.tell("READY=1", f"STATUS=Generation {generation.number}: {generation.workers} workers, TLS {encrypts}")

    def _reap(self, now: float, behind: Iterable[int] = ()) -> None:
        """See which processes have ended; `behind` are signals that came and have not been looked at."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            code = os.waitstatus_to_exitcode(status)
            if pid == self._upgrade.pid:
                self._finish_upgrade(code, behind)
            else:
                with self._board.moving():
                    if hand := self._crew.bury(pid):
                        self._buried(hand, code, now)
                    self._publish()
                    if hand is not None and hand.place is not None:
                        hand.place.wipe()

    def _buried(self, hand: Hand, code: int, now: float) -> None:
        """A worker has ended: decide what that means."""
        if hand.leaving or self._stopping or hand.generation is None:  # None: an earlier program's, not yet told to leave
            if code:
                _log.warning("worker %d, which was leaving, ended with %s", hand.pid, named(code))
            return
        self._metrics.count(f"worker_deaths:{named(code)}")
        if self._next is not None and hand.generation is self._next:
            self._abandon_reload(f"a new worker ended with {named(code)} before it could serve")
            return
        if not hand.ready and not self._served:
            self._stopping = True
            raise StartError(f"a worker ended with {named(code)} before it could serve; see above")
        self._crashes = self._crashes + 1 if now - hand.started < _QUICK else 1
        pause = _BACK_OFF[min(self._crashes, len(_BACK_OFF) - 1)]
        self._fork_at = max(self._fork_at, now + pause)
        again = f"in {pause:g} seconds" if pause else "at once"
        _log.error("worker %d ended with %s; a new one is started %s", hand.pid, named(code), again)

    # --- the clock -------------------------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        """Look for workers that are stuck; tell the service manager that somebody serves."""
        stall = self._wanted.settings.limits.stall_timeout
        period = min(stall / 3, self._notifier.watchdog / 2 if self._notifier.watchdog is not None else NEVER, 10.0)
        late, self._ticked = self._ticked and now - self._ticked > 2 * period, now
        self._tick_at = now + period
        alive = False
        for hand in self._crew:
            if hand.place is None or late:  # we were stopped ourselves, so perhaps was everybody
                alive = True
            elif now - max(hand.place.last_beat, hand.started) <= stall:
                alive = alive or hand.ready
            else:
                _log.error("worker %d shows no sign of life for %g seconds: killed", hand.pid, stall)
                self._metrics.count("worker_stalls")
                self._crew.kill(hand)
        if alive:
            self._notifier.tell("WATCHDOG=1")
        self._publish()

    def _publish(self) -> None:
        report = Report(0, dict(self._metrics.counters), self._metrics.reads, self._metrics.read_seconds)
        report.certificates, report.started = self._renewal.expiries(), self._started
        self._place.publish(msgspec.json.encode(report))
        self._place.beat(time.monotonic())

    def _renew(self, now: float) -> None:
        """Certificates may have changed: serve the new ones, if they are any good."""
        for index, fd in self._renewal.renewed(self._generation, now):
            for hand in self._crew.of(self._generation):
                hand.control.send("certificate", index, (fd,))
            os.close(fd)
            self._metrics.count("certificates_renewed")
        if self._renewal.wants_reload:
            self._renewal.wants_reload = False
            self._reload(now)
        self._publish()

    # --- being told ------------------------------------------------------------------------------------------------

    def _reload(self, now: float) -> None:
        """Read the settings again and carry them out beside the old ones; those go on until the new ones serve."""
        if self._stopping:
            return
        if self._next is not None or self._generation is None:
            self._reload_again = True
            return
        self._notifier.reloading()
        self._reopen_log()  # what moves logs away may know of SIGHUP only
        try:
            self._next = prepare(self._load(), self._sockets, self._generation.number + 1, self._generation)
        except KtlsdError as error:
            self._refused_reload(str(error))
            return
        except Exception as error:  # our bug, or something nobody thought of: who is served goes on being served
            _log.exception("reload: a bug")
            self._refused_reload(f"{type(error).__name__}: {error}")
            return
        self._crashes, self._fork_at = 0, now

    def _refused_reload(self, why: str) -> None:
        self._metrics.count("reloads_refused")
        _log.error("reload: %s. The old configuration stays", why)
        self._notifier.tell("READY=1", f"STATUS=Reload refused: {why}")

    def _abandon_reload(self, why: str) -> None:
        assert self._next is not None
        for hand in self._crew.of(self._next):
            self._crew.dismiss(hand, time.monotonic())
        self._sockets.rollback()
        self._next.close()
        self._next = None
        self._refused_reload(why)
        if self._reload_again:
            self._reload_again = False
            self._reload(time.monotonic())

    def _reopen_log(self) -> None:
        """The access log has been moved away: go on in a new file of its name."""
        for generation in {id(g): g for g in (self._generation, self._next) if g is not None}.values():
            if generation.access_log.fd >= 0:
                generation.access_log.reopen()
                self._send_log(generation)

    def _send_log(self, generation: Generation) -> None:
        """Have all workers that write to a log of this name, those that are leaving too, write where this generation does."""
        for hand in self._crew if generation.access_log.fd >= 0 else ():
            if hand.log == generation.settings.log.access:
                hand.control.send("log", 0, (generation.access_log.fd,))

    def _stop(self, now: float) -> None:
        """Finish what is running; told again, end at once."""
        at_once, self._stopping = self._stopping, True
        self._notifier.tell("STOPPING=1", "STATUS=Finishing what is running")
        self._sockets.close()
        self._crew.stop(self._wanted.settings.limits.drain_timeout, now, at_once=at_once)

    # --- another program in this process ---------------------------------------------------------------------------

    def _begin_upgrade(self) -> None:
        """See in a process of its own whether the new program would start; SIGCHLD tells."""
        if self._next is not None or self._stopping:
            _log.warning("upgrade: a reload is on its way; try again when it is done")
            return
        begun = self._upgrade.begin(self._state())
        self._sockets.keep()
        if begun:
            _log.info("upgrade: trying the new program")

    def _finish_upgrade(self, code: int, behind: Iterable[int]) -> None:
        self._upgrade.pid = None
        if code or self._next is not None or self._stopping:
            why = f"would not start ({named(code)}; see above)" if code else "has to wait: a reload is on its way"
            _log.error("upgrade: the new program %s. The old one goes on", why)
            self._metrics.count("upgrades_refused")
            return
        self._metrics.count("upgrades")
        _log.info("upgrade: the new program takes over")
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        for number in (*behind, *self._waker.drain()):  # they stay pending, and reach the new program
            os.kill(os.getpid(), number)
        self._upgrade.execute(self._state())
        self._sockets.keep()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _state(self) -> Handed:
        """Return what the next program has to know; sockets outlive an exec from now on."""
        metrics = self._metrics
        workers = {hand.pid: (hand.control.fileno(), hand.place.number if hand.place else -1) for hand in self._crew}
        logs = {hand.pid: hand.log for hand in self._crew if hand.log is not None}
        return Handed(
            LAYOUT, self._sockets.hand_over(), workers, logs, self._board.fd, self._place.number, self._started,
            msgspec.json.encode(self._generation.settings).decode() if self._generation is not None else "{}",
            dict(metrics.counters), metrics.reads, metrics.read_seconds,
        )  # fmt: skip
