"""What is served under which name: sites by Host, and what their rules say of a path. Built once from Settings."""

from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Final

from ktlsd.errors import RequestError, SettingsError
from ktlsd.files.digests import Digests
from ktlsd.files.globs import Glob
from ktlsd.files.listing import Template
from ktlsd.files.root import DocumentRoot
from ktlsd.files.siblings import Siblings
from ktlsd.protocol.semantics import Path
from ktlsd.server.auth import Passwords, Signer
from ktlsd.settings import Files, Rule, Settings
from ktlsd.settings import Site as SiteSettings

_OWN_TEMPLATE: Final = "listing.html"


@dataclass(frozen=True, slots=True)
class Policy:
    """What holds for one path: the site's defaults with all its matching rules laid over them."""

    headers: tuple[tuple[bytes, bytes], ...] = ()
    cache_control: bytes | None = None
    content_type: bytes | None = None
    disposition: str | None = None
    listing: bool = True
    passwords: Passwords | None = None
    signer: Signer | None = None
    cors: frozenset[bytes] | None = None
    redirect: str | None = None
    status: int = 302
    try_files: tuple[str, ...] | None = None

    @property
    def is_locked(self) -> bool:
        """Whether it depends on more than the path who may have it."""
        return self.passwords is not None or self.signer is not None


class Site:
    """One root with its rules."""

    def __init__(self, settings: SiteSettings, files: Files, template: Template) -> None:
        """Raises SettingsError: a root, password or key file that can't be read."""
        self.files = files
        self.template = template
        self.root = DocumentRoot(settings.root)
        self.digests = Digests(self.root) if files.digests else None
        self.siblings = Siblings(self.root) if files.precompressed else None
        self.index = tuple(name.encode() for name in files.index)
        self._base = Policy(listing=files.listing, cache_control=_encoded(files.cache_control))
        try:
            for number, rule in enumerate(settings.rule):
                self._refuse_half_a_lock(number, rule)
            self._rules = [(Glob(rule.path), _changes(rule), _rule_headers(rule)) for rule in settings.rule]
        except BaseException:
            self.root.close()
            raise

    def _refuse_half_a_lock(self, number: int, rule: Rule) -> None:
        """A lock on a folder's bare name would leave open what is in it. Raises SettingsError."""
        bare = rule.path.strip("/")
        if not (rule.auth or rule.signed) or not bare or any(c in bare for c in "*?"):
            return
        try:
            found = self.root.open(bare.encode("utf-8", "surrogateescape"))
        except (RequestError, OSError):
            return
        if found is not None:
            found.release()
        else:
            raise SettingsError(f"rule[{number}].path: {rule.path} is a folder; write /{bare}/** for what is in it")

    def policy(self, path: Path) -> Policy:
        """Return what the rules say of a path."""
        policy = self._base
        if self._rules:
            text = b"/" + b"/".join(path.segments) + (b"/" if path.is_directory and path.segments else b"")
            for pattern, changes, headers in self._rules:
                if pattern.matches(text):
                    policy = replace(policy, **changes, headers=policy.headers + headers)
        return policy


def _changes(rule: Rule) -> dict[str, Any]:
    """Return the fields of Policy that a rule sets."""
    changes: dict[str, Any] = {
        "cache_control": _encoded(rule.cache_control),
        "content_type": _encoded(rule.content_type),
        "disposition": rule.disposition,
        "listing": rule.listing,
        "signer": Signer(rule.signed) if rule.signed else None,
        "cors": frozenset(origin.lower().encode() for origin in rule.cors) if rule.cors is not None else None,
        "redirect": rule.redirect,
        "try_files": rule.try_files,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    if rule.redirect is not None:
        changes["status"] = rule.status or 302
    if rule.auth is not None:
        changes["passwords"] = Passwords(rule.auth) if rule.auth else None
    return changes


def _rule_headers(rule: Rule) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((name.encode("ascii"), value.encode("ascii")) for name, value in rule.headers.items())


def _encoded(value: str | None) -> bytes | None:
    return None if value is None else value.encode("ascii")


class Sites:
    """All sites of a configuration; `choose` is total."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError."""
        templates: dict[str | None, Template] = {}
        self.all: list[Site] = []
        self._exact: dict[bytes, Site] = {}
        self._wild: dict[bytes, Site] = {}
        try:
            self._open(settings, templates)
        except BaseException:
            self.close()
            raise
        self._default = next((self.all[n] for n, s in enumerate(settings.sites) if "*" in s.names), self.all[0])

    def _open(self, settings: Settings, templates: dict[str | None, Template]) -> None:
        for described in settings.sites:
            files = described.files or settings.files
            if files.listing_template not in templates:
                templates[files.listing_template] = _template(files.listing_template)
            site = Site(described, files, templates[files.listing_template])
            self.all.append(site)
            for name in described.names:
                encoded = name.lower().encode()
                if encoded.startswith(b"*."):
                    self._wild[encoded[1:]] = site
                elif encoded != b"*":
                    self._exact[encoded] = site

    def choose(self, host: bytes) -> Site:
        """Return the site for a Host value: the name itself, then the nearest wildcard, then the default."""
        if not self._exact and not self._wild:
            return self._default
        name = host_name(host)
        site = self._exact.get(name)
        dot = name.find(b".")
        while site is None and dot >= 0:
            site = self._wild.get(name[dot:])
            dot = name.find(b".", dot + 1)
        return site or self._default

    def close(self) -> None:
        """Let go of the roots."""
        for site in self.all:
            site.root.close()


def host_name(host: bytes) -> bytes:
    """Return a Host value without port, brackets and final dot, lower case."""
    name = host.lower()
    if name.startswith(b"["):
        return name[1:].partition(b"]")[0]
    return name.partition(b":")[0].rstrip(b".")


def _template(file: str | None) -> Template:
    if file is None:
        return Template(resources.files("ktlsd.files").joinpath(_OWN_TEMPLATE).read_text("utf-8"), _OWN_TEMPLATE)
    try:
        with open(file, encoding="utf-8") as source:
            template = Template(source.read(), file)
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"listing_template: {file}: cannot be read: {exc}") from exc
    template.check()
    return template
