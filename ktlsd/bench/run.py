"""The run: everybody is verified and warmed up, then all who bear the same load are sampled in turn, round by round.

The order in a round changes from round to round, so that nobody is always measured in somebody's wake. Progress is told as
values; the last value is the result.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ktlsd.bench import conditions, machine, peers, servers
from ktlsd.bench.answers import NotMeasurable, Payload, WrongAnswer
from ktlsd.bench.calibration import Calibration, calibrate
from ktlsd.bench.contest import Contender, ServerContender, WayContender
from ktlsd.bench.network import network
from ktlsd.bench.plan import Options, Plan, Progress, plan
from ktlsd.bench.result import SCHEMA, Failure, Load, Result, Sample, Subject
from ktlsd.bench.servers import Place, Server
from ktlsd.bench.usage import TLS_STAT, cpu_step
from ktlsd.bench.ways import LADDER, Secrets
from ktlsd.errors import SettingsError
from ktlsd.net.handover import KernelFacts

__all__ = ["Calibration", "Options", "Progress", "calibrate", "measure"]

_STEPS: Final = 30  # of the CPU clock, that a sample has at least
_COARSE: Final = 0.001  # seconds; a CPU clock with steps like that is worth a note
_BESIDES: Final = 64 << 20  # bytes beside the files: logs, certificates


@dataclass(frozen=True, slots=True)
class Case:
    """Somebody under a load."""

    contender: Contender
    load: Load


class Run:
    """One run, and what it has found out so far."""

    def __init__(self, wanted: Plan, tls_stat: Path) -> None:
        self._plan = wanted
        self._tls_stat = tls_stat
        self.payloads: dict[int, Payload] = {}
        self.samples: list[Sample] = []
        self.failures: list[Failure] = []
        self.configurations: dict[str, str] = {}
        self.notes: list[str] = []
        self.cases: list[Case] = []
        self.done = 0
        self.total = 0

    # --- who -------------------------------------------------------------------------------------------------------

    def gather(self, place: Place, against: tuple[str, ...], facts: KernelFacts, stack: ExitStack) -> Iterator[Progress]:
        """Start everybody and make the cases, our own first: the first row of a table is what others are compared with."""
        for size in self._plan.sizes:
            self.payloads[size] = conditions.make_payload(place.root, size)
        starts: list[tuple[str, bool, Callable[[], Server]]] = []
        if self._plan.served:
            modes: tuple[bool, ...] = (True, False)
            starts += [("ktlsd", k, functools.partial(servers.start_ktlsd, place, kernel=k)) for k in modes]
            for name in against:
                modes = (True, False) if facts.takes_any and peers.BY_NAME[name].ktls else (False,)
                starts += [(name, k, functools.partial(peers.start, name, place, kernel=k)) for k in modes]
        for name, kernel, start in starts:
            yield self._progress(f"starting {name} with {_tls(kernel=kernel)}")
            if kernel and facts.why_not_aes:
                why = f"the kernel refuses to encrypt ({facts.why_not_aes})"
                self.failures.append(Failure(Subject(name, "kernel", "http/1.1"), why))
                continue
            self._enter(stack, name, start, kernel=kernel)
        self._climb(place)

    def _enter(self, stack: ExitStack, name: str, start: Callable[[], Server], *, kernel: bool) -> None:
        """Start a server and have it measured with every protocol and version."""
        try:
            server = start()
        except NotMeasurable as exc:
            self.failures.append(Failure(Subject(name, "kernel" if kernel else "userspace", "http/1.1"), str(exc)))
            return
        stack.callback(server.stop)
        self.configurations[f"{name}, {_tls(kernel=kernel)}"] = server.configuration
        if any(load.size < server.kernel_from for load in self._plan.served):
            self.notes.append(
                f"ktlsd encrypts responses of less than {server.kernel_from} bytes in userspace (ktls.handover_bytes): they "
                "are measured in that mode only."
            )
        for number, (version, cipher) in enumerate(self._plan.ciphers):
            for protocol in self._plan.protocols:
                if protocol != "raw":
                    contender = ServerContender(server, protocol, version, cipher, tls_stat=self._tls_stat)
                    contender.ours = name == "ktlsd"
                    self._add(contender, self._plan.served, first=not number)

    def _climb(self, place: Place) -> None:
        for number, (version, cipher) in enumerate(self._plan.ciphers):
            secrets = Secrets(version, cipher, place.cert, place.key)
            for way in LADDER:
                if not number or way.tls != "none":
                    contender = WayContender(way, secrets, network=place.network, tls_stat=self._tls_stat)
                    self._add(contender, self._plan.ladder, first=not number)

    def _add(self, contender: Contender, loads: tuple[Load, ...], *, first: bool) -> None:
        wanted = loads if first else tuple(load for load in loads if load in self._plan.besides)
        self.cases += [Case(contender, load) for load in wanted if contender.takes(load)]

    # --- measuring -------------------------------------------------------------------------------------------------

    def prepare(self, seconds: float) -> Iterator[Progress]:
        """Verify, warm up, count system calls: every case once."""
        self.total = self.done + len(self.cases) * (1 + self._plan.rounds)
        for case in list(self.cases):
            if case not in self.cases:
                continue  # found out meanwhile
            yield self._progress(f"verifying {_named(case)}")
            contender, load = case.contender, case.load
            payload = self.payloads[load.size]
            try:
                contender.verify(payload, load)
                contender.warm_up(payload, load, seconds)
                counted = contender.count_calls(payload, load)
            except (NotMeasurable, WrongAnswer) as exc:
                self._fail(case, exc)
                continue
            if counted is not None:
                self.samples.append(counted)

    def rounds(self, seconds: float) -> Iterator[Progress]:
        """Sample all who bear the same load one after the other, in another order every time."""
        self.total = self.done + len(self.cases) * self._plan.rounds
        for number in range(self._plan.rounds):
            for load in dict.fromkeys(case.load for case in self.cases):
                together = [case for case in self.cases if case.load == load]
                turn = number % len(together)
                for case in together[turn:] + together[:turn]:
                    if case not in self.cases:
                        continue  # found out meanwhile
                    yield self._progress(f"round {number + 1}: {_named(case)}")
                    try:
                        self.samples.append(case.contender.sample(self.payloads[load.size], load, number, seconds))
                    except (NotMeasurable, WrongAnswer) as exc:
                        self._fail(case, exc)

    def verify_again(self) -> Iterator[Progress]:
        """Compare once more what everybody sends, now that it is warm: caches may have changed the way it takes."""
        self.total = self.done + len(self.cases)
        for case in list(self.cases):
            if case not in self.cases:
                continue  # found out meanwhile
            yield self._progress(f"verifying {_named(case)} again")
            try:
                case.contender.verify(self.payloads[case.load.size], case.load)
            except (NotMeasurable, WrongAnswer) as exc:
                self._fail(case, exc)

    def _fail(self, case: Case, exc: NotMeasurable | WrongAnswer) -> None:
        """Whoever did wrong is out, with all that was measured of it; who can't be measured is out for this load."""
        subject, wrong = case.contender.subject, isinstance(exc, WrongAnswer)
        count = "1 connection" if case.load.connections == 1 else f"{case.load.connections} connections"
        why = f"{exc} (asked for {case.load.size} bytes on {count})" if wrong else str(exc)
        failure = Failure(subject, why, wrong)
        if failure not in self.failures:
            self.failures.append(failure)
        if wrong:
            self.cases = [each for each in self.cases if each.contender is not case.contender]
            self.samples = [sample for sample in self.samples if sample.subject != subject]
        else:
            self.cases.remove(case)

    def _progress(self, what: str) -> Progress:
        self.done += 1
        return Progress(self.done, max(self.total, self.done), what)


def _named(case: Case) -> str:
    subject, size = case.contender.subject, case.load.size
    if subject.tls == "none":
        return f"{subject.name}, {size} bytes"
    protocol = f" {subject.protocol}" if subject.protocol != "raw" else ""
    return f"{subject.name}{protocol}, {_tls(kernel=subject.tls == 'kernel')}, {size} bytes"


def _tls(*, kernel: bool) -> str:
    return "kernel TLS" if kernel else "userspace TLS"


def measure(options: Options, *, tls_stat: Path = TLS_STAT) -> Iterator[Progress | Result]:
    """Measure what was asked for. Raises SettingsError, StartError; everything else that goes wrong is in the result."""
    wanted = plan(options)
    strangers = [name for name in options.against if name not in peers.BY_NAME]
    if strangers:
        raise SettingsError(f"against {', '.join(strangers)}: known are {', '.join(peers.NAMES)}")
    began, run = conditions.now(), Run(wanted, tls_stat)
    yield Progress(0, 1, "looking at the machine")
    with ExitStack() as stack:
        facts = KernelFacts()
        try:
            facts = machine.kernel_facts()
            net = stack.enter_context(network(options.delay_ms, options.loss_percent))
            needed = sum(wanted.sizes) + _BESIDES
            folder = stack.enter_context(conditions.folder(options.folder, needed, cold=options.cold))
        except NotMeasurable as exc:
            run.failures.append(Failure(Subject("this machine", "none"), str(exc)))
        else:
            place = Place(folder, net)
            place.prepare()
            step = cpu_step()
            if step > _COARSE:
                run.notes.append(f"CPU time is counted in steps of {step * 1000:.0f} ms here.")
            seconds = max(wanted.seconds, _STEPS * step)
            yield from run.gather(place, options.against, facts, stack)
            yield from run.prepare(seconds)
            yield from run.rounds(seconds)
            yield from run.verify_again()
        about = machine.machine(facts)
    yield Result(SCHEMA, began, sys.argv, about, run.samples, run.failures, run.configurations, run.notes)
