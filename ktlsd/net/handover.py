"""What the kernel takes, found out by asking it, and the two calls that hand a live connection over.

`probe` tries each (version, cipher) on a loopback pair; `self_test` sends a file through each that was taken and opens the
records with another implementation. Never by kernel version, /proc or /sys: containers and distributions lie.
"""

import errno
import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from ktlsd import uapi
from ktlsd.errors import FileTruncated, HandoverError, PeerError, RecordError
from ktlsd.net.kernel import Kernel
from ktlsd.tls import protection, records

VERSIONS: Final = (uapi.TLS_1_3_VERSION, uapi.TLS_1_2_VERSION)
CIPHERS: Final = (uapi.TLS_CIPHER_AES_GCM_128, uapi.TLS_CIPHER_AES_GCM_256, uapi.TLS_CIPHER_CHACHA20_POLY1305)
Combination = tuple[int, int]  # version, cipher_type

# Odd on purpose: inside a page, across pages, across records, one byte, many records, to the very end.
_SLICES: Final = ((0, 1), (1, 4095), (4095, 2), (12_345, 16_384), (3, 16_383), (16_385, 32_769), (99_991, 9))
_FILE_SIZE: Final = 100_000
_TIMEOUT: Final = 5.0  # seconds for one loopback read of the self-test


@dataclass(frozen=True, slots=True)
class KernelFacts:
    """What this kernel takes: a refusal reason for each combination, "" where it was accepted and tested.

    `rekey` tells whether a second TLS_TX is taken on a TLS 1.3 socket (since 6.14).
    """

    refusals: dict[Combination, str] = field(default_factory=dict)
    rekey: bool = False

    def refusal(self, version: int, cipher_type: int) -> str:
        """Return why the kernel can't encrypt this combination, "" if it can."""
        return self.refusals.get((version, cipher_type), "not in ktlsd's list")

    @property
    def takes_any(self) -> bool:
        """Whether at least one combination works."""
        return any(not reason for reason in self.refusals.values())

    @property
    def takes_aes(self) -> bool:
        """Whether every AES-GCM combination works: what `--ktls require` asks for."""
        return not self.why_not_aes

    @property
    def why_not_aes(self) -> str:
        """The first reason against an AES-GCM combination, "" if every one works."""
        return next((reason for v in VERSIONS for c in CIPHERS[:2] if (reason := self.refusal(v, c))), "")


def combination_name(combination: Combination) -> str:
    """Return "TLSv1.3 AES-256-GCM" and the like."""
    version, cipher_type = combination
    return f"{uapi.VERSIONS[version]} {uapi.CIPHERS[cipher_type].name}"


def remedy(reason: str) -> str:
    """Return what an operator can do about a refusal reason, one sentence, "" for none known."""
    step, _, code = reason.partition(":")
    return _REMEDIES.get((step, code), "")


_REMEDIES: Final = {
    ("TCP_ULP", "ENOENT"): "The kernel has no TLS module loaded: run `modprobe tls` as root on the host "
    "(containers too; to keep it: echo tls > /etc/modules-load.d/ktlsd.conf). If modprobe finds none, "
    "the kernel was built without CONFIG_TLS.",
    ("TCP_ULP", "ENOPROTOOPT"): "The kernel is older than 4.13 or built without CONFIG_TLS: use a newer one.",
    ("TCP_ULP", "EPERM"): "A security policy (seccomp, LSM) forbids TCP_ULP: allow setsockopt for this service.",
    ("TLS_TX", "ENOENT"): "The cipher's module is missing: load `gcm`, `aesni_intel` or `chacha20poly1305` on the host.",
    ("TLS_TX", "EINVAL"): "This kernel doesn't know the combination: TLS 1.3 and AES-256 need 5.1, ChaCha20 5.11.",
    ("TLS_TX", "EPERM"): "A security policy (seccomp, LSM) forbids SOL_TLS: allow setsockopt for this service.",
    ("TLS_TX", "ENOPROTOOPT"): "The kernel has the ULP but not the option: it is damaged or filtered; try another kernel.",
}


def install(kernel: Kernel, sock: socket.socket, info: uapi.CryptoInfo) -> None:
    """Hand the connection's sending side to the kernel: TCP_ULP, then TLS_TX.

    Everything sent before must be in TCP. Raises HandoverError: then nothing was installed and the socket is still plain.
    """
    kernel.attach_ulp(sock)
    kernel.set_tx(sock, info)


def probe(kernel: Kernel) -> KernelFacts:
    """Ask the kernel for every combination on loopback connections of our own, with keys that are all zero."""
    refusals: dict[Combination, str] = {}
    rekey = False
    for version in VERSIONS:
        for cipher_type in CIPHERS:
            info = _with_key(version, cipher_type, bytes)
            try:
                with _loopback_pair() as (ours, _):
                    install(kernel, ours, info)
                    refusals[version, cipher_type] = ""
                    if version == uapi.TLS_1_3_VERSION:
                        rekey = rekey or _takes_a_second_key(kernel, ours, info)
            except HandoverError as exc:
                refusals[version, cipher_type] = exc.reason
            except OSError as exc:  # no loopback: a network namespace with lo down, RestrictAddressFamilies
                refusals[version, cipher_type] = f"loopback:{errno.errorcode.get(exc.errno or 0, exc.errno)}"
    return KernelFacts(refusals, rekey)


def _takes_a_second_key(kernel: Kernel, sock: socket.socket, info: uapi.CryptoInfo) -> bool:
    try:
        kernel.set_tx(sock, info)
    except HandoverError:
        return False
    return True


def self_test(kernel: Kernel, facts: KernelFacts) -> KernelFacts:
    """Send a patterned file by sendfile at odd offsets through each combination that `probe` found; compare by hash.

    The records are opened by `tls.protection`, on `cryptography`'s AEADs: another implementation than the one tested.
    A combination that fails gets the refusal "self-test: …" and is not used.
    """
    refusals = dict(facts.refusals)
    pattern = b"".join(i.to_bytes(4, "big") for i in range(_FILE_SIZE // 4))
    with open(os.memfd_create("ktlsd-self-test"), "r+b") as file:
        file.write(pattern)
        file.flush()
        for combination in (c for c, reason in facts.refusals.items() if not reason):
            try:
                _send_and_open(kernel, combination, file.fileno(), pattern)
            except (PeerError, HandoverError, FileTruncated, OSError) as exc:
                refusals[combination] = f"self-test: {exc}"
    return KernelFacts(refusals, facts.rekey)


def _send_and_open(kernel: Kernel, combination: Combination, fd: int, pattern: bytes) -> None:
    info = _with_key(*combination, os.urandom)
    expected, opened = hashlib.sha256(), hashlib.sha256()
    with _loopback_pair() as (ours, theirs):
        theirs.settimeout(_TIMEOUT)
        install(kernel, ours, info)
        opener = protection.Protection(info)
        pending = b""
        for offset, count in _SLICES:
            head = b"%d+%d:" % (offset, count)
            expected.update(head + pattern[offset : offset + count])
            # Both are small against a loopback socket's buffer: nothing blocks.
            if kernel.send(ours, [head], more=True) != len(head) or kernel.sendfile(ours, fd, offset, count) != count:
                raise RecordError("the kernel accepted less than it was given")
            remaining = len(head) + count
            while remaining > 0:
                pending += theirs.recv(1 << 16)
                for record in protection.split(pending):
                    content_type, payload = opener.open(record)
                    pending = pending[len(record) :]
                    if content_type != records.APPLICATION_DATA:
                        raise RecordError(f"content type {content_type}, wanted 23")
                    opened.update(payload)
                    remaining -= len(payload)
        if kernel.send_control(ours, records.ALERT, records.CLOSE_NOTIFY_ALERT) is None:
            raise RecordError("close_notify would block")
        if opener.open(theirs.recv(1 << 16)) != (records.ALERT, records.CLOSE_NOTIFY_ALERT):
            raise RecordError("close_notify came out wrong")
    if expected.digest() != opened.digest():
        raise RecordError("the bytes that came out are not the file's")


def _with_key(version: int, cipher_type: int, fill: Callable[[int], bytes]) -> uapi.CryptoInfo:
    layout = uapi.CIPHERS[cipher_type]
    return uapi.CryptoInfo(
        version, cipher_type, iv=fill(layout.iv), key=fill(layout.key), salt=fill(layout.salt), rec_seq=bytes(8)
    )


@contextmanager
def _loopback_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected TCP sockets, ours non-blocking; IPv6 where there is no IPv4."""
    family, host = (socket.AF_INET, "127.0.0.1")
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    with listener, socket.create_connection(listener.getsockname()[:2], timeout=_TIMEOUT) as theirs:
        ours, _ = listener.accept()
        with ours:
            ours.setblocking(False)
            yield ours, theirs
