"""Settings: everything an operator can say, from the command line and a TOML file; complete, validated, immutable.

The only place that knows the names of flags and keys. Command line beats file beats default.
"""

import os
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from ktlsd.errors import SettingsError

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Count = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]

DEFAULT_LISTEN: Final = ("localhost:8443",)
ALPN: Final = ("http/1.1",)


class Ktls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[ktls]: when the kernel encrypts."""

    mode: Literal["auto", "require", "off"] = "auto"
    # A response body at least this long (bytes) takes its connection into the kernel; 0: at once after the handshake.
    handover_bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)] = 65_536
    # Payload (bytes) after which a key is renewed; absent: the cipher's limit of RFC 8446 §5.5 with margin.
    rekey_bytes: Annotated[int, msgspec.Meta(ge=1)] | None = None


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[tls]: the certificate and what is offered with it."""

    cert: str | None = None  # PEM, leaf first, then intermediates
    key: str | None = None  # PEM, not encrypted
    alpn: tuple[Literal["http/1.1"], ...] = ALPN
    minimum: Literal["TLSv1.2", "TLSv1.3"] = "TLSv1.2"
    tickets: Annotated[int, msgspec.Meta(ge=0, le=8)] = 2  # TLS 1.3 session tickets sent after a full handshake


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[limits]: how much one worker takes on, and how long it waits (seconds)."""

    connections: Count = 20_000
    requests_per_connection: Count = 10_000
    handshake_timeout: Seconds = 10.0
    header_timeout: Seconds = 20.0
    idle_timeout: Seconds = 75.0
    progress_timeout: Seconds = 60.0  # without a byte accepted by the client's TCP
    linger_timeout: Seconds = 5.0  # how long the client may take to close after our close_notify
    drain_timeout: Seconds = 30.0  # how long running responses may take after SIGTERM


class Log(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[log]: the access log."""

    access: str | None = None  # a file, or "-" for standard output
    format: Literal["combined", "json"] = "json"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of it."""

    root: str | None = None  # None: the folder ktlsd was started in
    listen: tuple[str, ...] = DEFAULT_LISTEN
    workers: Literal[1] = 1
    tls: Tls = Tls()
    ktls: Ktls = Ktls()
    limits: Limits = Limits()
    log: Log = Log()

    @property
    def directory(self) -> str:
        """The folder that is served."""
        return "." if self.root is None else self.root

    @property
    def listen_addresses(self) -> list[tuple[str, int]]:
        """`listen` as (host, port)."""
        return [parse_listen(text) for text in self.listen]


def parse_listen(text: str) -> tuple[str, int]:
    """Return (host, port) of "HOST:PORT", "[::1]:PORT", ":PORT" or "*:PORT" (both: all addresses). Raises SettingsError."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise SettingsError(f"listen: {text!r} is not HOST:PORT, like localhost:8443, 0.0.0.0:443 or [::]:443")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise SettingsError(f"listen: {text!r}: write an IPv6 address in brackets, [::1]:8443")
    return ("" if host == "*" else host), int(port)


def load_file(path: str) -> Settings:
    """Read a configuration file and check it as a whole. Raises SettingsError with file, key and reason."""
    settings = read_file(path)
    try:
        validate(settings)
    except SettingsError as exc:
        raise SettingsError(f"{path}: {exc}") from exc
    return settings


def read_file(path: str) -> Settings:
    """Read a configuration file, names and types checked only: what the command line replaces may be wrong.

    Raises SettingsError with file, key and reason; relative paths count from the file.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as exc:
        raise SettingsError(f"{path}: cannot be read: {exc.strerror}") from exc
    try:
        settings = msgspec.toml.decode(text, type=Settings)
    except msgspec.ValidationError as exc:
        reason, _, where = str(exc).partition(" - at `$")
        raise SettingsError(f"{path}: {where.rstrip('`').lstrip('.') or 'top level'}: {reason}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise SettingsError(f"{path}: not TOML: {exc}") from exc
    except RecursionError as exc:
        raise SettingsError(f"{path}: not TOML: nested too deeply") from exc
    base = Path(path).resolve().parent

    def anchored(name: str | None) -> str | None:
        return name if name is None or name == "-" else str(base / name)

    return msgspec.structs.replace(
        settings,
        root=anchored(settings.root),
        tls=msgspec.structs.replace(settings.tls, cert=anchored(settings.tls.cert), key=anchored(settings.tls.key)),
        log=msgspec.structs.replace(settings.log, access=anchored(settings.log.access)),
    )


def validate(settings: Settings) -> None:
    """Check what types can't say: addresses, and things that need each other. Raises SettingsError."""
    if not settings.listen:
        raise SettingsError("listen: is empty; give at least one HOST:PORT")
    _ = settings.listen_addresses
    if (settings.tls.cert is None) != (settings.tls.key is None):
        missing = "key" if settings.tls.key is None else "cert"
        raise SettingsError(f"tls.{missing}: is missing; a certificate and its key come together")
    for name, file in (("tls.cert", settings.tls.cert), ("tls.key", settings.tls.key)):
        if file is not None and not os.path.isfile(file):
            raise SettingsError(f"{name}: {file}: no such file")
    if not settings.tls.alpn:
        raise SettingsError("tls.alpn: is empty; leave it out or name http/1.1")
    if settings.root is not None and not os.path.isdir(settings.root):
        raise SettingsError(f"root: {settings.root}: no such directory")
