"""What a benchmark finds out, complete enough to be repeated, and to be read by another program. Values only.

A `Result` is what `--json` writes and `--compare` reads. Every number that was measured is in a `Sample`; medians, ratios and
verdicts are made from samples (stats), never stored instead of them.
"""

from typing import Final, Literal

import msgspec

SCHEMA: Final = 1  # a number for the layout below

Tls = Literal["none", "userspace", "kernel"]


class Machine(msgspec.Struct, frozen=True):
    """Where it was measured."""

    system: str  # "Linux 6.1.0-28-amd64"
    cpu: str  # the model's name
    cpus: int  # this process may use so many
    memory: int  # bytes
    crypto: str  # the kernel's driver for gcm(aes), from /proc/crypto; "" if unknown
    kernel_tls: dict[str, str]  # "TLSv1.3 AES-128-GCM" -> "" if the kernel encrypts it, else why not
    python: str
    openssl: str
    ktlsd: str
    virtual: str = ""  # "User Mode Linux", "docker" and the like: what may make figures misleading


class Subject(msgspec.Struct, frozen=True):
    """What is measured: a way of sending, or a server in one configuration. The key by which samples belong together."""

    name: str  # "sendfile", "ktlsd", "nginx"
    tls: Tls
    protocol: Literal["raw", "http/1.1", "h2"] = "raw"  # raw: bytes on a socket, no HTTP
    version: str = ""  # "TLSv1.3"
    cipher: str = ""  # "AES-256-GCM"
    program: str = ""  # "nginx/1.22.1", with what was switched on


class Load(msgspec.Struct, frozen=True):
    """What it was asked to do."""

    size: int  # bytes of one transfer
    connections: int = 1
    streams: int = 1  # HTTP/2: at a time on each connection
    cold: bool = False  # the file was taken out of the page cache before
    delay_ms: float = 0.0  # netem, one way
    loss_percent: float = 0.0


class Sample(msgspec.Struct, frozen=True):
    """One measurement. CPU, calls, faults and memory are the sending process's (a server's processes together)."""

    subject: Subject
    load: Load
    round: int  # samples of one round were taken one after the other, and are compared with each other
    seconds: float  # by the clock, from the first request to the last byte
    bytes: int  # of payload that arrived
    transfers: int
    user: float  # CPU seconds
    system: float
    switches: int  # context switches, both kinds
    minor_faults: int
    major_faults: int
    peak: int  # bytes of resident memory
    calls: int | None = None  # system calls, None where they were not counted: counting slows down, so it is a run of its own
    in_kernel: bool | None = None  # whether /proc/net/tls_stat says that the kernel encrypted, None if it can't be asked


class Failure(msgspec.Struct, frozen=True):
    """Something that could not be measured, and why: never left out in silence."""

    subject: Subject
    why: str
    wrong: bool = False  # it gave wrong bytes, too few, or fell back in silence: the whole run counts as failed


class Result(msgspec.Struct, frozen=True):
    """One run of `ktlsd bench`."""

    schema: int
    began: str  # RFC 3339
    command: list[str]
    machine: Machine
    samples: list[Sample]
    failures: list[Failure] = []
    configurations: dict[str, str] = {}  # of peers, as they were written: by name
    notes: list[str] = []
