"""How often each way of sending moves a byte of payload, with the reason: known from the kernel's code, not measured.

Counted is what the sending side's CPU copies between the page cache and the socket's buffers. What the network card reads, and
what a receiver on the same machine copies out of its socket, comes to all ways alike and is not counted. Encrypting is counted
apart: it reads every byte and writes it somewhere else, so it is a copy that does something.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ktlsd.bench.result import Subject, Tls


@dataclass(frozen=True, slots=True)
class Copies:
    """What happens to a byte of payload: `copies` as text ("0", "0-1"), passes of encryption, and where each happens."""

    copies: str
    encryptions: int
    why: str


_WAYS: Final[dict[tuple[str, Tls], Copies]] = {
    ("read+write", "none"): Copies("2", 0, "page cache to our buffer (read), our buffer to the socket (write)"),
    ("mmap+write", "none"): Copies("1", 0, "page cache to the socket (write reads the mapping); page faults, no read"),
    ("sendfile", "none"): Copies("0-1", 0, "the socket refers to the page cache; a copy if the card can't gather or checksum"),
    ("splice", "none"): Copies("0-1", 0, "as sendfile, through a pipe that holds references; two calls where sendfile has one"),
    ("zerocopy", "none"): Copies("0-1", 0, "the socket refers to our pages; on loopback the kernel copies them after all"),
    ("read+ssl_write", "userspace"): Copies(
        "4", 1, "page cache to our buffer (read), encrypted into OpenSSL's record, record to its memory BIO, BIO to Python, "
        "Python to the socket; 2 in a program that gives OpenSSL the socket",
    ),
    ("mmap+ssl_write", "userspace"): Copies(
        "3", 1, "encrypted from the page cache's mapping into OpenSSL's record, record to its memory BIO, BIO to Python, "
        "Python to the socket; 1 in a program that gives OpenSSL the socket",
    ),
    ("send", "kernel"): Copies(
        "1", 1, "page cache to our buffer (read), encrypted from there into the socket's pages (whole records are not copied)"
    ),
    ("sendfile", "kernel"): Copies("0", 1, "encrypted from the page cache into the socket's pages"),
    ("splice", "kernel"): Copies("0", 1, "as sendfile, through a pipe that holds references to the page cache"),
    ("sendmsg", "kernel"): Copies(
        "0", 1, "encrypted from the page cache's mapping into the socket's pages; page faults while the mapping is new"
    ),
    ("vmsplice", "kernel"): Copies(
        "0", 1, "encrypted from the page cache through a pipe that refers to its mapping; page faults while the mapping is new"
    ),
}  # fmt: skip

# What ways are called, by the word in the name that tells: first match.
_WORDS: Final = (
    ("zerocopy", "zerocopy"), ("vmsplice", "vmsplice"), ("splice", "splice"), ("sendfile", "sendfile"), ("sendmsg", "sendmsg"),
    ("mapped", "sendmsg"), ("mmap", "mmap"), ("read", "read"), ("send", "send"),
)  # fmt: skip


def of(subject: Subject) -> Copies | None:
    """Return what a way of sending copies; None for a server, which has ways of its own, and for a way that isn't known."""
    if subject.protocol != "raw":
        return None
    name = subject.name.lower()
    word = next((way for part, way in _WORDS if part in name), "")
    if subject.tls == "kernel":
        word = {"mmap": "sendmsg", "read": "send"}.get(word, word)
    elif word in ("mmap", "read"):
        word += "+ssl_write" if subject.tls == "userspace" else "+write"
    return _WAYS.get((word, subject.tls))


def told(subjects: Iterable[Subject]) -> list[tuple[str, Tls, Copies]]:
    """Return the ways among these with what they copy; those that differ in their name alone are one."""
    found: dict[tuple[Tls, Copies], dict[str, None]] = {}
    for subject in subjects:
        if known := of(subject):
            found.setdefault((subject.tls, known), {})[subject.name] = None
    return [(", ".join(names), tls, known) for (tls, known), names in found.items()]
