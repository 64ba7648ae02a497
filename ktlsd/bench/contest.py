"""One who is measured: a way of sending or a server, behind one face. Verified first, warmed up, then sampled.

Nothing that does wrong is ever a sample: WrongAnswer goes to whoever asked, who throws away what was measured of the subject.
"""

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, Protocol

from msgspec.structs import replace

from ktlsd.bench import client, usage
from ktlsd.bench.answers import HttpKind, NotMeasurable, Payload, WrongAnswer
from ktlsd.bench.client import SMALL, Loop, Outcome, Volley
from ktlsd.bench.conditions import cold
from ktlsd.bench.connection import Ask, Wire
from ktlsd.bench.network import LOOPBACK, Network
from ktlsd.bench.result import Load, Sample, Subject
from ktlsd.bench.servers import Server
from ktlsd.bench.usage import TLS_STAT, Usage, calls_of, handed_over
from ktlsd.bench.ways import Secrets, Sender, Way

_OPEN_CLEAR: Final = 512  # connections prepared for one sample, at most
_OPEN_TLS: Final = 128  # each of these has cost a handshake
_LOOPS_COUNTED: Final = 20  # requests under strace on each connection,
_BYTES_COUNTED: Final = 32 << 20  # and as long as they are not more than this together
_LONG: Final = 60.0  # seconds


class Attendance(Protocol):
    """A contender for the time of one sample."""

    asks: Sequence[Ask]  # one for each connection at a time

    def pids(self) -> list[int]:
        """Return the processes that send."""

    def start(self) -> None:
        """Count from here on."""

    def usage(self) -> Usage:
        """Return what was used since then. Raises NotMeasurable, WrongAnswer."""


class Contender(abc.ABC):
    """A subject that can be measured. `subject` is complete once something is verified: version and cipher are agreed on."""

    closes = True  # whether every download has the server end its connection
    alone = False  # whether small files too are asked for once on each connection
    ours = True  # whether it must encrypt in the kernel when it is told to

    def __init__(self, subject: Subject, tls_stat: Path = TLS_STAT) -> None:
        self.subject = subject
        self._tls_stat = tls_stat
        self._wires: dict[tuple[int, int], Wire] = {}
        self._each: dict[Load, int] = {}

    @abc.abstractmethod
    def attend(self, payload: Payload, load: Load, each: int) -> AbstractContextManager[Attendance]:
        """Be ready for `each` downloads on every connection, one after the other. Raises NotMeasurable."""

    def takes(self, load: Load) -> bool:
        """Whether this load means anything to it."""
        return load.streams == 1 or self.subject.protocol == "h2"

    # --- before ----------------------------------------------------------------------------------------------------

    def verify(self, payload: Payload, load: Load) -> None:
        """Do one transfer whole and compare it. Raises NotMeasurable, WrongAnswer."""
        with self.attend(payload, replace(load, connections=1), 1) as there:
            before = handed_over(self._tls_stat)
            wire = client.verify(there.asks[0])
            self._judge(before, 1)
        agreed = replace(self.subject, version=wire.version, cipher=wire.cipher)
        if self._wires and agreed != self.subject:
            raise WrongAnswer(f"it agrees on {agreed.version} {agreed.cipher}, before on {self.subject.cipher}")
        self._wires[payload.size, load.streams] = wire
        self.subject = agreed

    def warm_up(self, payload: Payload, load: Load, seconds: float) -> None:
        """Measure once for nothing, and find out how many downloads fill so many seconds."""
        self._each[load] = 1
        if self._loops(load):
            self._measure(payload, load, seconds / 2)
            return
        took = self._measure(payload, load, seconds)[0].seconds
        room = (_OPEN_TLS if self.subject.tls != "none" else _OPEN_CLEAR) // load.connections
        self._each[load] = 1 if load.cold else max(1, min(round(seconds / took), room))

    # --- samples ---------------------------------------------------------------------------------------------------

    def sample(self, payload: Payload, load: Load, number: int, seconds: float) -> Sample:
        """Measure once, for the round of this number. Raises NotMeasurable, WrongAnswer."""
        outcome, spent, in_kernel = self._measure(payload, load, seconds)
        return self._sample(load, number, outcome, spent, in_kernel=in_kernel)

    def _loops(self, load: Load) -> bool:
        return load.size <= SMALL and self.subject.protocol != "raw" and not self.alone and not load.cold

    def _measure(self, payload: Payload, load: Load, seconds: float) -> tuple[Outcome, Usage, bool | None]:
        if load.cold:
            with cold(payload) as copy:
                return self._measure_once(copy, load, seconds)
        return self._measure_once(payload, load, seconds)

    def _measure_once(self, payload: Payload, load: Load, seconds: float) -> tuple[Outcome, Usage, bool | None]:
        each = self._each.get(load, 1)
        with self.attend(payload, load, each) as there:
            before = handed_over(self._tls_stat)
            with self._load(there, load, each) as work:
                there.start()
                outcome = work.run(seconds) if isinstance(work, Loop) else work.run()
                spent = there.usage()
            in_kernel = self._judge(before, load.connections * each)
        return outcome, spent, in_kernel

    def _load(self, there: Attendance, load: Load, each: int) -> Volley | Loop:
        wire = self._wires[load.size, load.streams]
        return Loop(there.asks, wire) if self._loops(load) else Volley(there.asks, wire, each)

    def count_calls(self, payload: Payload, load: Load) -> Sample | None:
        """Count system calls under strace: a sample that tells nothing else. None where it can't be.

        Small transfers are repeated on each connection, so that what its first one takes besides doesn't count for all.
        """
        each = max(1, min(_LOOPS_COUNTED, _BYTES_COUNTED // load.size)) if self._each.get(load, 1) > 1 else 1
        with self.attend(payload, load, each) as there, self._load(there, load, each) as work, calls_of(there.pids()) as told:
            there.start()
            outcome = work.run(_LONG, most=_LOOPS_COUNTED) if isinstance(work, Loop) else work.run()
            spent = there.usage()
        if told.total is None:
            return None
        return self._sample(load, 0, outcome, spent, calls=told.total)

    def _sample(
        self,
        load: Load,
        number: int,
        outcome: Outcome,
        spent: Usage,
        *,
        in_kernel: bool | None = None,
        calls: int | None = None,
    ) -> Sample:
        return Sample(
            subject=self.subject,
            load=load,
            round=number,
            seconds=outcome.seconds,
            bytes=outcome.bytes,
            transfers=outcome.transfers,
            user=spent.user,
            system=spent.system,
            switches=spent.switches,
            minor_faults=spent.minor_faults,
            major_faults=spent.major_faults,
            peak=spent.peak,
            calls=calls,
            in_kernel=in_kernel,
        )

    def _judge(self, before: int | None, connections: int) -> bool | None:
        """Return whether the kernel took so many connections since then, None if it doesn't tell. Raises WrongAnswer."""
        after = handed_over(self._tls_stat)
        if before is None or after is None or self.subject.tls == "none":
            return None
        risen = after - before
        if self.subject.tls == "kernel" and risen < connections:
            if not self.ours and not self._wires:
                raise NotMeasurable("kernel TLS is switched on, but this build of it doesn't use it (TlsTxSw does not rise)")
            raise WrongAnswer(f"fell back silently: the kernel has taken {risen} of {connections} connections (TlsTxSw)")
        return risen >= connections


class WayContender(Contender):
    """A way of sending: a sender process for every connection at a time, new for every sample."""

    def __init__(self, way: Way, secrets: Secrets | None, *, network: Network = LOOPBACK, tls_stat: Path = TLS_STAT) -> None:
        self._way = way
        self._network = network
        self._secrets = secrets if way.tls != "none" else None
        version, cipher = (self._secrets.version, self._secrets.cipher) if self._secrets else ("", "")
        super().__init__(Subject(way.name, way.tls, "raw", version, cipher), tls_stat)

    @contextlib.contextmanager
    def attend(self, payload: Payload, load: Load, each: int) -> Iterator[Attendance]:
        """Fork the senders; whatever goes wrong, what they say about it themselves is told."""
        senders: list[Sender] = []
        try:
            for _ in range(load.connections):
                senders.append(Sender(self._way, payload, self._secrets, each, host=self._network.host))  # noqa: PERF401  # those that are there end too
            yield _Senders(senders, self._ask(payload))
        except (NotMeasurable, WrongAnswer) as seen:
            for sender in senders:
                sender.blame(seen)
            raise
        finally:
            for sender in senders:
                sender.close()

    def _ask(self, payload: Payload) -> Ask:
        version, cipher = (self._secrets.version, self._secrets.cipher) if self._secrets else ("", "")
        return Ask(0, payload, "raw", version, cipher, network=self._network)


class _Senders:
    def __init__(self, senders: list[Sender], ask: Ask) -> None:
        self._senders = senders
        self.asks: Sequence[Ask] = [dataclasses.replace(ask, port=sender.port) for sender in senders]

    def pids(self) -> list[int]:
        return [sender.pid for sender in self._senders]

    def start(self) -> None:
        """They count by themselves, from the first byte that asks."""

    def usage(self) -> Usage:
        return sum((sender.report() for sender in self._senders), Usage())


class ServerContender(Contender):
    """A server that runs, asked in one protocol with one version of TLS."""

    def __init__(
        self, server: Server, protocol: HttpKind, version: str, cipher: str = "", *, tls_stat: Path = TLS_STAT
    ) -> None:
        super().__init__(Subject(server.name, server.tls, protocol, version, cipher, server.program), tls_stat)
        self.server = server
        self._asked = (version, cipher)

    def takes(self, load: Load) -> bool:
        """A server that hands over large responses only has nothing to show in kernel mode for small ones."""
        return super().takes(load) and load.size >= self.server.kernel_from

    @contextlib.contextmanager
    def attend(self, payload: Payload, load: Load, each: int) -> Iterator[Attendance]:
        """It is there already."""
        version, cipher = self._asked
        closes = self.closes and not self._loops(load)
        kind, network = self.subject.protocol, self.server.network
        ask = Ask(self.server.port, payload, kind, version, cipher, load.streams, closes, network)
        try:
            yield _Served(self.server, [ask] * load.connections)
        except (NotMeasurable, WrongAnswer):
            self.server.pids()  # if it has ended, that is what went wrong
            raise


class _Served:
    def __init__(self, server: Server, asks: list[Ask]) -> None:
        self._server = server
        self.asks: Sequence[Ask] = asks
        self._before = Usage()

    def pids(self) -> list[int]:
        return self._server.pids()

    def start(self) -> None:
        usage.reset_peak(self._server.pids())
        self._before = self._server.usage()

    def usage(self) -> Usage:
        return self._server.usage().since(self._before)
