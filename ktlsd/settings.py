"""Settings: everything an operator can say, from the command line and a TOML file; complete, validated, immutable.

The only place that knows the names of flags and keys. Command line beats file beats default.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

import msgspec

from ktlsd.errors import SettingsError

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Count = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]
Rate = Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]  # bytes a second

DEFAULT_LISTEN: Final = ("localhost:8443",)
ALPN: Final = ("h2", "http/1.1")


class Ktls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[ktls]: when the kernel encrypts."""

    mode: Literal["auto", "require", "off"] = "auto"
    # A response body at least this long (bytes) takes its connection into the kernel; 0: at once after the handshake.
    handover_bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)] = 65_536
    # Payload (bytes) after which a key is renewed; absent: the cipher's limit of RFC 8446 §5.5 with margin.
    rekey_bytes: Annotated[int, msgspec.Meta(ge=1)] | None = None
    # How frames of HTTP/2 go into the kernel (docs/performance.md): read into a buffer with holes for headers; a sendfile for
    # each frame; or, for files that are asked for again, mapped pages by sendmsg (mapped) or vmsplice (spliced).
    framing: Literal["copy", "sendfile", "mapped", "spliced"] = "spliced"


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[tls]: the certificate and what is offered with it."""

    cert: str | None = None  # PEM, leaf first, then intermediates
    key: str | None = None  # PEM, not encrypted
    alpn: tuple[Literal["h2", "http/1.1"], ...] = ALPN
    minimum: Literal["TLSv1.2", "TLSv1.3"] = "TLSv1.2"
    client_ca: str | None = None  # PEM; clients are asked for a certificate that one of these has issued
    client_crl: str | None = None  # PEM; certificates that are no longer taken
    # With client_ca, "require" if absent; request: without a certificate is fine, with a bad one is not.
    client_auth: Literal["require", "request"] | None = None
    hsts: Annotated[int, msgspec.Meta(ge=0, le=63_072_000)] | None = None  # Strict-Transport-Security: max-age, seconds
    hsts_subdomains: bool = False
    tickets: Annotated[int, msgspec.Meta(ge=0, le=8)] = 2  # TLS 1.3 session tickets sent after a full handshake


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[limits]: how much is taken on, and how long is waited (seconds)."""

    connections: Count = 20_000  # of one worker
    # Over all workers; a client is an IPv4 address or an IPv6 /64, a subnet a /24 or a /48.
    connections_per_client: Count | None = None
    connections_per_subnet: Count | None = None
    handshakes: Count = 2_000  # of one worker, not yet through; above that the oldest is dropped
    responses: Count = 10_000  # of one worker at a time; more get 503
    requests_per_connection: Count = 10_000
    min_rate: Rate | None = 256  # bytes a second that a client must take while it downloads, over
    min_rate_grace: Seconds = 60.0
    bandwidth_per_connection: Rate | None = None  # bytes a second, kept by the kernel's pacing
    bandwidth: Rate | None = None  # what the pipe holds: clients share it equally when it is full
    handshake_timeout: Seconds = 10.0
    header_timeout: Seconds = 20.0
    idle_timeout: Seconds = 75.0
    progress_timeout: Seconds = 60.0  # without a byte accepted by the client's TCP
    linger_timeout: Seconds = 5.0  # how long the client may take to close after our close_notify
    drain_timeout: Seconds = 30.0  # how long running responses may take after SIGTERM
    retire_timeout: Seconds = 86_400.0  # and after a reload or an upgrade, when others have taken over
    stall_timeout: Annotated[float, msgspec.Meta(ge=3, le=86_400)] = (
        30.0  # a worker that shows no sign of life for so long is replaced
    )


class Log(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[log]: the access log."""

    access: str | None = None  # a file, or "-" for standard output
    format: Literal["combined", "json"] = "json"


class Files(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[files]: how a folder is served."""

    index: tuple[str, ...] = ("index.html",)  # tried in this order for a folder
    listing: bool = True  # a folder without an index is listed
    listing_template: str | None = None  # a Jinja template of your own (docs/configuration.md)
    precompressed: bool = True  # FILE.zst, FILE.br, FILE.gz beside FILE are sent to clients that take them
    digests: bool = True  # ETag from SHA256SUMS, FILE.sha256 or `ktlsd hash`, where one is known
    repr_digest: bool = False  # send Repr-Digest (RFC 9530) unasked
    cache_control: str | None = None


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[[rule]]: what is special about some paths. All rules that match apply, in their order; the later wins."""

    # A glob on the decoded path: * within a name, ** across, ? one character; without a slash it is about the last name.
    path: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
    headers: dict[str, str] = {}
    cache_control: str | None = None
    content_type: str | None = None
    disposition: Literal["inline", "attachment"] | None = None
    listing: bool | None = None
    auth: str | None = None  # a password file (`ktlsd passwd`, or htpasswd -B); "" for none
    signed: str | None = None  # a key file: only addresses signed with it, and not expired, are served (`ktlsd sign`)
    cors: tuple[str, ...] | None = None  # origins that scripts may read from; "*" for all
    redirect: str | None = None  # where to; {path} and {query} stand for the request's
    status: Literal[301, 302, 303, 307, 308] | None = None  # of the redirect, 302 if absent
    try_files: tuple[str, ...] | None = None  # tried in this order; {path} stands for the request's


class Site(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[[site]]: what is served under some names; the first is also for names that no site has."""

    names: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]  # example.org, *.example.org
    root: str
    cert: str | None = None  # PEM; together with key; otherwise that of [tls]
    key: str | None = None
    alpn: tuple[Literal["h2", "http/1.1"], ...] | None = None
    files: Files | None = None  # otherwise [files]
    rule: tuple[Rule, ...] = ()


class Http(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[[http]]: a listener without TLS."""

    listen: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    action: Literal["redirect", "serve"] = "redirect"  # to https; or serve in the clear, behind a terminator
    https_port: Annotated[int, msgspec.Meta(ge=1, le=65_535)] = 443  # where redirects lead
    acme: str | None = None  # the webroot for /.well-known/acme-challenge/; otherwise the site's own root


class Process(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[process]: what the workers run as."""

    user: str | None = None  # workers become this user, if ktlsd is started as root
    group: str | None = None  # otherwise the user's own
    sandbox: bool = True  # workers may read what they serve and nothing else (Landlock), where the kernel can


class MetricsListener(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[metrics]: /metrics, /healthz and /readyz, in the clear."""

    listen: tuple[str, ...] = ()


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of it."""

    root: str | None = None  # None: the folder ktlsd was started in
    listen: tuple[str, ...] = DEFAULT_LISTEN
    workers: Literal["auto"] | Annotated[int, msgspec.Meta(ge=1, le=256)] = "auto"  # auto: one for each processor
    proxy_protocol: tuple[str, ...] = ()  # networks of proxies that begin each connection with a PROXY header
    tls: Tls = Tls()
    ktls: Ktls = Ktls()
    limits: Limits = Limits()
    process: Process = Process()
    metrics: MetricsListener = MetricsListener()
    log: Log = Log()
    files: Files = Files()
    rule: tuple[Rule, ...] = ()
    site: tuple[Site, ...] = ()
    http: tuple[Http, ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        """Everything that is served, the default first: the top level if it has a root or there is no [[site]]."""
        default = Site(names=("*",), root=self.directory, rule=self.rule)
        sites = self.site if self.site and self.root is None else (default, *self.site)
        return tuple(msgspec.structs.replace(site, files=site.files or self.files) for site in sites)

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
        where = where.rstrip("`").lstrip(".")
        raise SettingsError(f"{path}: {where or 'top level'}: {_explained(reason, where)}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise SettingsError(f"{path}: not TOML: {exc}") from exc
    except RecursionError as exc:
        raise SettingsError(f"{path}: not TOML: nested too deeply") from exc
    anchored: Settings = _anchor(settings, Path(path).resolve().parent)
    return anchored


def _explained(reason: str, where: str) -> str:
    """Return msgspec's reason with what to do about it."""
    reason = reason.replace(" | null`", "`")
    kind: Any = Settings
    for step in re.findall(r"[a-z_]+", where):  # from the whole to the part that is wrong
        kind = get_type_hints(kind).get(step) if isinstance(kind, type) else None
        kind = next((each for each in _flat(kind) if isinstance(each, type) and issubclass(each, msgspec.Struct)), kind)
    if reason.startswith("Invalid enum value"):
        values = [value for each in _flat(kind) if get_origin(each) is Literal for value in get_args(each)]
        return f"{reason}; it is one of {', '.join(map(repr, values))}{' or a number' if int in _flat(kind) else ''}"
    if match := re.search(r"unknown field `(.*)`", reason):
        fields = kind.__struct_fields__ if isinstance(kind, type) and issubclass(kind, msgspec.Struct) else ()
        near = difflib.get_close_matches(match[1], fields, 1)
        return f"{reason}; did you mean {near[0]}?" if near else f"{reason}; its keys are {', '.join(fields)}"
    if "Expected `array`, got `object`" in reason:
        return f"{reason}; write [[{where}]]"
    if "Expected `array`, got" in reason:
        return f'{reason}; write a list: {where.rpartition(".")[2]} = ["…"]'
    return reason


def _flat(kind: Any) -> list[Any]:
    """Return a type and everything it is made of."""
    parts = [kind]
    for each in () if get_origin(kind) is Literal else get_args(kind):
        parts += _flat(each)
    return parts


# Keys whose values are names of files or folders, relative to the configuration file.
_PATHS: Final = frozenset(
    ("root", "cert", "key", "client_ca", "client_crl", "access", "listing_template", "auth", "signed", "acme")
)


def _anchor(part: Any, base: Path) -> Any:
    """Return `part` with every path in it made absolute; "-" and "" are no paths."""
    if isinstance(part, tuple):
        return tuple(_anchor(each, base) for each in part)
    if not isinstance(part, msgspec.Struct):
        return part
    changed = {}
    for name in part.__struct_fields__:
        value = getattr(part, name)
        if name in _PATHS and isinstance(value, str) and value not in ("", "-"):
            changed[name] = str(base / value)
        else:
            changed[name] = _anchor(value, base)
    return msgspec.structs.replace(part, **changed)
