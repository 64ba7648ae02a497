"""Lines of the key log (draft-ietf-tls-keylogfile, formerly NSS Key Log Format): label, client random, secret."""

from collections.abc import Iterator
from typing import Final, NamedTuple

# The labels whose secrets protect application data; the handshake's own are dropped as soon as they are read.
MASTER: Final = "CLIENT_RANDOM"  # TLS 1.2: the (extended) master secret
SERVER_TRAFFIC: Final = "SERVER_TRAFFIC_SECRET_0"
CLIENT_UPDATED: Final = "CLIENT_TRAFFIC_SECRET_N"  # OpenSSL writes the letter N for every generation behind the first
SERVER_UPDATED: Final = "SERVER_TRAFFIC_SECRET_N"
_KEPT = {label.encode(): label for label in (MASTER, SERVER_TRAFFIC, CLIENT_UPDATED, SERVER_UPDATED)}


class LoggedSecret(NamedTuple):
    """One line: `client_random` is 32 bytes, `secret` 32 or 48."""

    label: str
    client_random: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"LoggedSecret({self.label}, …)"


def parse(lines: bytes) -> Iterator[LoggedSecret]:
    """Yield the secrets that matter for application data from whole lines; comments and other labels are passed over.

    OpenSSL 4 may number the generations (SERVER_TRAFFIC_SECRET_1); any number but 0 is taken for N.
    """
    for line in lines.splitlines():
        parts = line.split(b" ")
        if len(parts) != 3:
            continue
        name, random, secret = parts
        label = _KEPT.get(name)
        if label is None:
            stem, _, number = name.rpartition(b"_")
            if not number.isdigit() or stem not in (b"CLIENT_TRAFFIC_SECRET", b"SERVER_TRAFFIC_SECRET") or number == b"0":
                continue
            label = CLIENT_UPDATED if stem.startswith(b"CLIENT") else SERVER_UPDATED
        try:
            yield LoggedSecret(label, bytes.fromhex(random.decode("ascii")), bytes.fromhex(secret.decode("ascii")))
        except ValueError:
            continue  # half a line can't come through a pipe (one atomic write each); a comment can
