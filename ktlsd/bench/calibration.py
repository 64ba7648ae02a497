"""From which size on the kernel encrypts cheaper on this machine, and how frames of HTTP/2 go into it best; as settings.

The hand-over costs something once (two system calls, and a worse start), every byte behind it saves something. So what counts
is one response of a size on a connection that is still in userspace: `handover_bytes` is the smallest size from which on
kernel mode is the cheaper one in all sizes tried.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

from ktlsd.bench import conditions, machine, servers, stats, words
from ktlsd.bench.answers import NotMeasurable, Payload, WrongAnswer
from ktlsd.bench.contest import ServerContender
from ktlsd.bench.plan import KIB, MIB, Mode, Options, Progress
from ktlsd.bench.result import SCHEMA, Failure, Load, Result, Sample, Subject
from ktlsd.bench.servers import Place
from ktlsd.bench.stats import Verdict
from ktlsd.bench.usage import cpu_step
from ktlsd.errors import SettingsError

SIZES: Final = tuple(4 * KIB << number for number in range(11))  # 4 KiB to 4 MiB
FRAMINGS: Final = ("copy", "sendfile", "mapped", "spliced")
_DEFAULT: Final = "spliced"
_ROUNDS: Final[dict[Mode, int]] = {"quick": 5, "default": 9, "full": 25}
_LARGE: Final[dict[Mode, int]] = {"quick": 16 * MIB, "default": 64 * MIB, "full": 256 * MIB}
_SECONDS: Final = 0.1
_FINE: Final = 0.001  # seconds; with a CPU clock of larger steps it is the time that decides
_WARM: Final = 3  # downloads until a file's pages are mapped and touched (net/mappings)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was found: TOML for the configuration, with its evidence as comments, and the samples it rests on."""

    snippet: str
    result: Result


@dataclass(slots=True)
class _Found:
    samples: list[Sample] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    done: int = 0
    total: int = 1

    def step(self, what: str) -> Progress:
        self.done += 1
        return Progress(self.done, self.total, what)

    def of(self, subject: Subject, load: Load) -> list[Sample]:
        return [sample for sample in self.samples if (sample.subject, sample.load) == (subject, load)]


def calibrate(options: Options) -> Iterator[Progress | Calibration]:
    """Find out. Of the options `mode`, `rounds`, `sizes` and `folder` count. Raises SettingsError."""
    began, found = conditions.now(), _Found()
    if any(size < 1 for size in options.sizes):
        raise SettingsError("sizes are positive numbers")
    sizes = tuple(sorted(options.sizes)) or SIZES
    rounds, large = options.rounds or _ROUNDS[options.mode], _LARGE[options.mode] if not options.sizes else sizes[-1]
    found.total = len(sizes) * rounds + len(FRAMINGS) * (rounds + 1) + 1
    yield found.step("looking at the machine")
    facts = machine.kernel_facts()
    about = machine.machine(facts)
    lines = [f"# Found by `ktlsd bench --calibrate`, {began}: {about.system}, {about.cpu}, {about.openssl}."]
    if not facts.takes_aes:
        lines.append(f"# The kernel does not encrypt here ({facts.why_not_aes}): there is nothing to be found out.")
    else:
        fine = cpu_step() < _FINE
        try:
            with ExitStack() as stack:
                folder = stack.enter_context(conditions.folder(options.folder, sum(sizes) + large + 64 * MIB, cold=False))
                place = Place(folder)
                place.prepare()
                payloads = {size: conditions.make_payload(place.root, size) for size in {*sizes, large}}
                lines.append("[ktls]")
                yield from _handover(place, [payloads[size] for size in sizes], rounds, found, lines, fine=fine)
                yield from _framing(place, payloads[large], rounds, found, lines)
        except (NotMeasurable, WrongAnswer) as exc:
            found.failures.append(Failure(Subject("ktlsd", "kernel", "http/1.1"), str(exc), isinstance(exc, WrongAnswer)))
            lines = [lines[0], f"# It could not be measured: {exc}"]
    result = Result(SCHEMA, began, sys.argv, about, found.samples, found.failures)
    yield Calibration("\n".join(lines) + "\n", result)


# --- the hand-over -----------------------------------------------------------------------------------------------------


def _handover(
    place: Place, payloads: Sequence[Payload], rounds: int, found: _Found, lines: list[str], *, fine: bool
) -> Iterator[Progress]:
    """One response on each of many connections, in the kernel from the first byte on and in userspace, by turns."""
    with ExitStack() as stack:
        kernel = _contender(stack, place, kernel=True)
        userspace = _contender(stack, place, kernel=False)
        for contender in (kernel, userspace):
            for payload in payloads:
                contender.verify(payload, Load(payload.size))
                contender.warm_up(payload, Load(payload.size), _SECONDS)
        for number in range(rounds):
            for payload in payloads:
                yield found.step(f"hand-over: {words.size(payload.size)}")
                for contender in (kernel, userspace) if number % 2 else (userspace, kernel):
                    found.samples.append(contender.sample(payload, Load(payload.size), number, _SECONDS))
    measure, what = (_cpu, "CPU time") if fine else (_seconds, "time (the CPU clock is too coarse here)")
    lines += [
        "# One response in kernel mode, hand-over included, as a multiple of the same in userspace mode:",
        f"# {what}, HTTP/1.1, {kernel.subject.version} {kernel.subject.cipher}, medians of {rounds} pairs.",
    ]
    from_here: int | None = None
    for payload in payloads:
        load = Load(payload.size)
        ratio = stats.interval(stats.ratios(found.of(kernel.subject, load), found.of(userspace.subject, load), measure))
        if ratio is None:
            continue
        lines.append(f"#   {words.size(payload.size):>8}  {words.between(ratio)}")
        from_here = (from_here or payload.size) if ratio.middle < 1 else None
    if from_here is None:
        lines += [f"# Not even {words.size(payloads[-1].size)} are cheaper in the kernel.", 'mode = "off"']
    else:
        lines.append(f"handover_bytes = {from_here}")


def _cpu(sample: Sample) -> float | None:
    return (sample.user + sample.system) / sample.transfers


def _seconds(sample: Sample) -> float | None:
    return sample.seconds / sample.transfers


def _contender(stack: ExitStack, place: Place, *, kernel: bool) -> ServerContender:
    label = f"ktlsd-calibrate-{'kernel' if kernel else 'userspace'}"
    server = servers.start_ktlsd(place, kernel=kernel, handover_bytes=0, label=label)
    stack.callback(server.stop)
    contender = ServerContender(server, "http/1.1", "TLSv1.3")
    contender.alone, contender.closes = True, False
    return contender


# --- HTTP/2 ------------------------------------------------------------------------------------------------------------


def _framing(place: Place, payload: Payload, rounds: int, found: _Found, lines: list[str]) -> Iterator[Progress]:
    """A hot file over HTTP/2 in every framing by turns; another one than the default must be clearly faster to be chosen."""
    load = Load(payload.size)
    contenders: dict[str, ServerContender] = {}
    with ExitStack() as stack:
        for framing in FRAMINGS:
            yield found.step(f"HTTP/2 framing: {framing}")
            server = servers.start_ktlsd(place, kernel=True, handover_bytes=0, framing=framing, label=f"ktlsd-{framing}")
            stack.callback(server.stop)
            server.program += f", framing {framing}"
            contenders[framing] = contender = ServerContender(server, "h2", "TLSv1.3")
            contender.verify(payload, load)
            for _ in range(_WARM):
                contender.warm_up(payload, load, _SECONDS)
        for number in range(rounds):
            turn = number % len(FRAMINGS)
            for framing in FRAMINGS[turn:] + FRAMINGS[:turn]:
                yield found.step(f"HTTP/2 framing: {framing}")
                found.samples.append(contenders[framing].sample(payload, load, number, _SECONDS))
    usual = found.of(contenders[_DEFAULT].subject, load)
    asked = f"a file of {words.size(payload.size)} that is asked for often"
    lines.append(f"# HTTP/2, {asked}: throughput as a multiple of {_DEFAULT}'s.")
    best, speed = _DEFAULT, 1.0
    for framing, contender in contenders.items():
        ratio = stats.interval(stats.ratios(found.of(contender.subject, load), usual, stats.throughput))
        if framing == _DEFAULT or ratio is None:
            continue
        lines.append(f"#   {framing:>8}  {words.between(ratio)}")
        if stats.verdict(ratio) is Verdict.BETTER and ratio.middle > speed:
            best, speed = framing, ratio.middle
    lines.append(f'framing = "{best}"')
