"""What is measured: from what was asked for to loads. Values in, values out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from msgspec.structs import replace

from ktlsd.bench.client import SMALL
from ktlsd.bench.connection import CIPHERS, VERSIONS
from ktlsd.bench.result import Load
from ktlsd.errors import SettingsError

Kind = Literal["raw", "http/1.1", "h2"]
Mode = Literal["quick", "default", "full"]
KIB: Final = 1 << 10
MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for; whatever is empty, the mode decides.

    `sizes` bytes; `connections`, `streams` (HTTP/2's) at a time. `protocols`: raw are the ways of sending. `ciphers`:
    "TLSv1.3", "TLSv1.3 AES-256-GCM", "TLSv1.2 AES-128-GCM" and the like; without a cipher the server chooses. `cold` adds
    what is measured with a cold page cache. `delay_ms` (one way) and `loss_percent` of everything. `against`: names of peers.
    `folder`: where files are put, None for memory, if there is enough.
    """

    mode: Mode = "default"
    sizes: tuple[int, ...] = ()
    connections: tuple[int, ...] = ()
    protocols: tuple[Kind, ...] = ()
    ciphers: tuple[str, ...] = ()
    cold: bool = False
    delay_ms: float = 0.0
    loss_percent: float = 0.0
    against: tuple[str, ...] = ()
    rounds: int | None = None
    folder: Path | None = None
    streams: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: `done` of `total` steps (an estimate that becomes better), and what comes now."""

    done: int
    total: int
    what: str


@dataclass(frozen=True, slots=True)
class Scale:
    """How much a mode measures: so many rounds of samples that take about so many seconds each."""

    rounds: int
    seconds: float
    ladder: tuple[int, ...]  # sizes for the ways of sending
    served: tuple[int, ...]  # and for servers
    middle: int  # the size for everything that is varied besides
    connections: tuple[int, ...]
    streams: tuple[int, ...]
    ciphers: tuple[str, ...]


_EVERY_CIPHER: Final = ("TLSv1.3", *(f"TLSv1.2 {cipher}" for cipher in CIPHERS))
SCALES: Final[dict[Mode, Scale]] = {
    "quick": Scale(3, 0.1, (16 * MIB,), (10 * KIB, 16 * MIB), 16 * MIB, (1,), (1,), ("TLSv1.3",)),
    "default": Scale(7, 0.15, (64 * MIB,), (10 * KIB, MIB, 16 * MIB), 16 * MIB, (1, 4), (1,), ("TLSv1.3",)),
    "full": Scale(
        15, 0.5,
        (16 * KIB, 256 * KIB, MIB, 16 * MIB, 256 * MIB, 1024 * MIB),
        (KIB, 10 * KIB, 100 * KIB, MIB, 16 * MIB, 256 * MIB, 1024 * MIB),
        16 * MIB, (1, 4, 16), (1, 8), _EVERY_CIPHER,
    ),
}  # fmt: skip
_SMALL_CONNECTIONS: Final = 4  # at a time for small files: one alone would measure how quickly two processes wake each other


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured with which TLS ("version", "version cipher"): the first for all loads."""

    rounds: int
    seconds: float
    protocols: tuple[Kind, ...]
    ciphers: tuple[tuple[str, str], ...]
    ladder: tuple[Load, ...]
    served: tuple[Load, ...]
    besides: tuple[Load, ...]  # for the other ciphers

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every size that is needed."""
        return tuple(sorted({load.size for load in self.ladder + self.served + self.besides}))


def plan(options: Options) -> Plan:
    """Return it. Raises SettingsError."""
    scale = SCALES[options.mode]
    if any(size < 1 for size in options.sizes) or any(n < 1 for n in options.connections + options.streams):
        raise SettingsError("sizes, connections and streams are positive numbers")
    if options.rounds is not None and options.rounds < 1:
        raise SettingsError(f"{options.rounds} rounds; there is at least one")
    protocols = options.protocols or (("http/1.1", "h2") if options.against else ("raw", "http/1.1", "h2"))
    ciphers = tuple(_cipher(text) for text in options.ciphers or scale.ciphers)
    ladder = _loads(options, scale, scale.ladder, served=False) if "raw" in protocols else ()
    served = _loads(options, scale, scale.served, served=True) if set(protocols) - {"raw"} else ()
    besides = ladder + served if options.ciphers else tuple(load for load in ladder + served if _is_middle(load, scale))
    return Plan(options.rounds or scale.rounds, scale.seconds, protocols, ciphers, ladder, served, besides)


def _is_middle(load: Load, scale: Scale) -> bool:
    return load.size == scale.middle and load.connections == load.streams == 1 and not load.cold


def _loads(options: Options, scale: Scale, sizes: tuple[int, ...], *, served: bool) -> tuple[Load, ...]:
    """What was asked for in every combination; what was not, one thing at a time, the others as usual."""
    found = [Load(size, _usual_connections(options, size, served=served)) for size in options.sizes or sizes]
    middle = [load for load in found if load.size > SMALL and (options.sizes or load.size == scale.middle or not served)]
    base = found if options.connections else middle if served else []
    for count in options.connections or scale.connections:
        found += [replace(load, connections=count) for load in base]
    for count in options.streams or scale.streams if served else ():
        found += [replace(load, streams=count) for load in (found if options.streams else middle)]
    if options.cold:
        found += [replace(load, cold=True) for load in middle]
    network = {"delay_ms": options.delay_ms, "loss_percent": options.loss_percent}
    return tuple(dict.fromkeys(replace(load, **network) for load in found))


def _usual_connections(options: Options, size: int, *, served: bool) -> int:
    if options.connections:
        return options.connections[0]
    return _SMALL_CONNECTIONS if served and size <= SMALL else 1


def _cipher(text: str) -> tuple[str, str]:
    version, _, cipher = text.strip().partition(" ")
    if version not in VERSIONS or cipher not in ("", *CIPHERS):
        raise SettingsError(
            f"cipher {text!r}: wanted are TLSv1.3, TLSv1.2, and these with one of {', '.join(CIPHERS)} behind it"
        )
    return version, cipher
