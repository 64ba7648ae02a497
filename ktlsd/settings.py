"""Settings: everything an operator can say, from the command line and a TOML file; complete, validated, immutable.

The only place that knows the names of flags and keys. Command line beats file beats default.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

import msgspec

from ktlsd.errors import SettingsError

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Count = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]

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


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of it."""

    root: str | None = None  # None: the folder ktlsd was started in
    listen: tuple[str, ...] = DEFAULT_LISTEN
    workers: Literal[1] = 1
    tls: Tls = Tls()
    ktls: Ktls = Ktls()
    limits: Limits = Limits()
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
        only = "this release has only" if len(values) == 1 else "it is one of"
        return f"{reason}; {only} {', '.join(map(repr, values))}"
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


def validate(settings: Settings) -> None:
    """Check what types can't say: addresses, files that must be there, things that need each other. Raises SettingsError."""
    if not settings.listen:
        raise SettingsError("listen: is empty; give at least one HOST:PORT")
    _ = settings.listen_addresses
    tls = settings.tls
    _check_pair("tls.", tls.cert, tls.key)
    if not tls.alpn:
        raise SettingsError("tls.alpn: is empty; leave it out or name h2 and http/1.1")
    _check_file("tls.client_ca", tls.client_ca)
    _check_file("tls.client_crl", tls.client_crl)
    for name, value in (("client_crl", tls.client_crl), ("client_auth", tls.client_auth)):
        if value is not None and tls.client_ca is None:
            raise SettingsError(f"tls.{name}: means nothing without tls.client_ca")
    if tls.hsts_subdomains and tls.hsts is None:
        raise SettingsError("tls.hsts_subdomains: means nothing without tls.hsts")
    access = settings.log.access
    if access not in (None, "-") and not os.path.isdir(os.path.dirname(access or "") or "."):
        raise SettingsError(f"log.access: {access}: there is no such folder; create it")
    if settings.root is not None and not os.path.isdir(settings.root):
        raise SettingsError(f"root: {settings.root}: {_why_no_directory(settings.root)}")
    _check_files("files.", settings.files)
    _check_rules("", settings.rule)
    if settings.rule and settings.site and settings.root is None:
        raise SettingsError("rule: belongs to the top level's root, and there is none; put the rules into their [[site]]")
    for number, http in enumerate(settings.http):
        for text in http.listen:
            try:
                parse_listen(text)
            except SettingsError as exc:
                raise SettingsError(f"http[{number}].{exc}") from exc
        if http.acme is not None and not os.path.isdir(http.acme):
            raise SettingsError(f"http[{number}].acme: {http.acme}: no such directory")
    _check_addresses(settings)
    seen: dict[str, int] = {}
    for number, site in enumerate(settings.site):
        _check_site(number, site, seen)


def _check_addresses(settings: Settings) -> None:
    taken: set[tuple[str, int]] = set()
    named = [("listen", text) for text in settings.listen]
    named += [(f"http[{number}].listen", text) for number, http in enumerate(settings.http) for text in http.listen]
    for name, text in named:
        address = parse_listen(text)
        if address[1] and address in taken:
            raise SettingsError(f"{name}: {text} is there twice")
        taken.add(address)


def _check_site(number: int, site: Site, seen: dict[str, int]) -> None:
    where = f"site[{number}]."
    for name in site.names:
        if not _SITE_NAME.fullmatch(name):
            raise SettingsError(f"{where}names: {name!r} is not a host name like example.org or *.example.org")
        if name.lower() in seen:
            raise SettingsError(f"{where}names: {name} is site[{seen[name.lower()]}]'s already")
        seen[name.lower()] = number
    if not os.path.isdir(site.root):
        raise SettingsError(f"{where}root: {site.root}: {_why_no_directory(site.root)}")
    _check_pair(where, site.cert, site.key)
    if site.alpn == ():
        raise SettingsError(f"{where}alpn: is empty; leave it out or name h2 and http/1.1")
    if site.files is not None:
        _check_files(where + "files.", site.files)
    _check_rules(where, site.rule)


_SITE_NAME: Final = re.compile(r"\*|(?:\*\.)?[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*|[0-9A-Fa-f:]+")
_FIELD_NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_FIELD_VALUE: Final = re.compile(r"[\t\x20-\x7e]*")
_FRAMING: Final = frozenset(
    (
        *("content-length", "transfer-encoding", "connection", "date", "content-range", "content-encoding", "etag", "trailer"),
        *("keep-alive", "proxy-connection", "upgrade", "te"),
    )
)
_MEDIA_TYPE: Final = re.compile(r"[\w.+!#$&^-]+/[\w.+!#$&^-]+(?:[ \t]*;[\t\x20-\x7e]*)?", re.ASCII)


def _why_no_directory(path: str) -> str:
    return "is a file; name the directory it is in" if os.path.exists(path) else "no such directory"


def _check_pair(where: str, cert: str | None, key: str | None) -> None:
    if (cert is None) != (key is None):
        missing = "key" if key is None else "cert"
        raise SettingsError(f"{where}{missing}: is missing; a certificate and its key come together")
    _check_file(f"{where}cert", cert)
    _check_file(f"{where}key", key)


def _check_file(name: str, file: str | None) -> None:
    if file is not None and not os.path.isfile(file):
        raise SettingsError(f"{name}: {file}: no such file")


def _check_value(name: str, value: str | None) -> None:
    if value is not None and not _FIELD_VALUE.fullmatch(value):
        raise SettingsError(f"{name}: {value!r} can't be a header's value; use printable ASCII")


def _check_files(where: str, files: Files) -> None:
    _check_file(f"{where}listing_template", files.listing_template)
    _check_value(f"{where}cache_control", files.cache_control)
    for name in files.index:
        if not name or "/" in name or name.startswith("."):
            raise SettingsError(f"{where}index: {name!r} is not a file name")


def _check_rules(where: str, rules: tuple[Rule, ...]) -> None:
    for number, rule in enumerate(rules):
        at = f"{where}rule[{number}]."
        for name, value in rule.headers.items():
            if not _FIELD_NAME.fullmatch(name):
                raise SettingsError(f"{at}headers: {name!r} is not a header's name")
            if name.lower() in _FRAMING:
                raise SettingsError(f"{at}headers: {name} is ktlsd's own to say")
            _check_value(f"{at}headers.{name}", value)
        _check_value(f"{at}cache_control", rule.cache_control)
        if rule.content_type is not None and not _MEDIA_TYPE.fullmatch(rule.content_type):
            raise SettingsError(f"{at}content_type: {rule.content_type!r} is not a media type like text/plain; charset=utf-8")
        if rule.auth:
            _check_file(f"{at}auth", rule.auth)
        _check_file(f"{at}signed", rule.signed)
        for origin in rule.cors or ():
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise SettingsError(f"{at}cors: {origin!r} is not an origin like https://example.org, nor *")
        if rule.redirect is not None and not re.match(r"/|https?://", rule.redirect):
            raise SettingsError(f"{at}redirect: {rule.redirect!r} is neither a path nor an http(s) address")
        _check_value(f"{at}redirect", rule.redirect)
        if rule.status is not None and rule.redirect is None:
            raise SettingsError(f"{at}status: means nothing without redirect")
        for candidate in rule.try_files or ():
            if not candidate.startswith(("/", "{path}")):
                raise SettingsError(f"{at}try_files: {candidate!r} starts neither with / nor with {{path}}")
