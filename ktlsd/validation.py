"""What types can't say of settings: addresses, files that must be there, things that need each other."""

import ipaddress
import os
import re
from typing import Final

from ktlsd.errors import SettingsError
from ktlsd.settings import Files, Rule, Settings, Site, parse_listen, read_file


def load_file(path: str) -> Settings:
    """Read a configuration file and check it as a whole. Raises SettingsError with file, key and reason."""
    settings = read_file(path)
    try:
        validate(settings)
    except SettingsError as exc:
        raise SettingsError(f"{path}: {exc}") from exc
    return settings


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
    for network in settings.proxy_protocol:
        try:
            ipaddress.ip_network(network, strict=False)
        except ValueError as exc:
            raise SettingsError(f"proxy_protocol: {network!r} is not a network like 10.0.0.0/8 or fd00::/8") from exc
    limits = settings.limits
    if limits.min_rate is not None and (limits.bandwidth_per_connection or limits.min_rate * 2) < limits.min_rate * 2:
        raise SettingsError("limits.bandwidth_per_connection: must be twice limits.min_rate, or clients would be cut for it")
    process = settings.process
    if process.group is not None and process.user is None:
        raise SettingsError("process.group: means nothing without process.user")
    for text in settings.metrics.listen:
        try:
            parse_listen(text)
        except SettingsError as exc:
            raise SettingsError(f"metrics.{exc}") from exc
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
    named += [("metrics.listen", text) for text in settings.metrics.listen]
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
