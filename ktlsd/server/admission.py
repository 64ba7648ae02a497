"""Who may come in: how many connections a client, or the network it is in, may have over all workers."""

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from ktlsd.server.board import Tally
from ktlsd.settings import Limits

_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:a.b.c.d (RFC 4291 §2.5.5.2)


@dataclass(frozen=True, slots=True)
class Guest:
    """A client as it is counted: an IPv4 address and its /24, or an IPv6 /64 (what one customer gets) and its /48."""

    client: bytes
    subnet: bytes


def guest(host: str) -> Guest:
    """Return whom a numeric address counts for; anything else counts for itself."""
    address = host.partition("%")[0]
    try:
        packed = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    except OSError:
        return Guest(host.encode(), host.encode())
    if packed.startswith(_MAPPED):
        packed = packed[12:]
    return Guest(packed, packed[:3]) if len(packed) == 4 else Guest(packed[:8], packed[:6])


class Admission:
    """Counts guests, and says when one has too many connections."""

    def __init__(self, limits: Limits, tally: Tally) -> None:
        self._per_client = limits.connections_per_client
        self._per_subnet = limits.connections_per_subnet
        self._tally = tally

    def admit(self, who: Guest) -> str | None:
        """Count one more connection; or don't, and return which limit is against it."""
        if self._per_client is not None and self._tally.add(b"c" + who.client) > self._per_client:
            self._tally.remove(b"c" + who.client)
            return "client"
        if self._per_subnet is not None and self._tally.add(b"n" + who.subnet) > self._per_subnet:
            self._tally.remove(b"n" + who.subnet)
            if self._per_client is not None:
                self._tally.remove(b"c" + who.client)
            return "subnet"
        return None

    def leave(self, who: Guest) -> None:
        """One of its connections has ended."""
        if self._per_client is not None:
            self._tally.remove(b"c" + who.client)
        if self._per_subnet is not None:
            self._tally.remove(b"n" + who.subnet)


class Trusted:
    """Networks that we believe when they say who their client is."""

    def __init__(self, networks: Sequence[str]) -> None:
        self._networks = [ipaddress.ip_network(network, strict=False) for network in networks]

    def __bool__(self) -> bool:
        return bool(self._networks)

    def __contains__(self, host: str) -> bool:
        address = ipaddress.ip_address(host.partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None)
        address = mapped or address
        return any(address in network for network in self._networks if network.version == address.version)
