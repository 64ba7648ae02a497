"""One configuration, carried out: everything that a generation of workers stands on, made before any of them is forked.

`prepare` does, in the supervisor, all that can be refused; `work` is a worker's life.
"""

import importlib
import logging
import os
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import msgspec

from ktlsd import devcert
from ktlsd.errors import SettingsError, StartError
from ktlsd.net import handover
from ktlsd.net.channel import HandoverPolicy
from ktlsd.net.kernel import Kernel, LinuxKernel
from ktlsd.net.keylog_pipe import KeyLogPipe
from ktlsd.net.listeners import Listener
from ktlsd.net.tx_kernel import Framing
from ktlsd.server import process, sandbox
from ktlsd.server.accesslog import AccessLog
from ktlsd.server.admission import Trusted
from ktlsd.server.contexts import (
    Pair,
    build_context,
    build_contexts,
    fingerprint,
    key_kind,
    load_pem,
    pairs_of,
    pem_file,
    read_pair,
)
from ktlsd.server.entrance import Door, Membership
from ktlsd.server.hot import ENTRIES, HotResponses
from ktlsd.server.metrics import Metrics
from ktlsd.server.responder import Redirector, Responder
from ktlsd.server.services import Services
from ktlsd.server.sites import Sites
from ktlsd.server.sockets import Sockets
from ktlsd.server.worker import Worker
from ktlsd.settings import Files, Http, Settings, parse_listen

_log = logging.getLogger("ktlsd")
_TICKET_KEYS_LAST: Final = 86_400.0  # seconds; a reload after that makes new ones
_SPARE_DESCRIPTORS: Final = 64
_HTTP_DEFAULT: Final = Http(listen=("systemd",))  # behind a socket from systemd for which there is no [[http]]


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one group of sockets leads: `kind` is "https", "http" or "metrics"; `shown` the host that was asked for."""

    kind: str
    shown: str
    listeners: list[Listener]
    http: Http | None = None


@dataclass(slots=True)
class Generation:
    """Made by `prepare`, inherited by the workers that are forked for it."""

    number: int
    settings: Settings
    workers: int
    contexts: list[ssl.SSLContext]
    made: float  # when the contexts were: monotonic seconds
    pairs: list[Pair]  # of the contexts' certificates, in the same order
    sites: Sites
    challenges: dict[str, Sites]
    access_log: AccessLog
    kernel: Kernel
    policy: HandoverPolicy
    trust: str | None  # the development CA
    fingerprints: dict[Pair, bytes]  # of the certificates, when they were read or before
    kinds: dict[Pair, str]  # of their keys
    entries: list[Entry] = field(default_factory=list)
    names: set[str] = field(default_factory=set)  # of the sockets, for Sockets.commit

    def close(self) -> None:
        """Let go of what the supervisor holds of it; workers go on with theirs."""
        self.access_log.close()
        for sites in (self.sites, *self.challenges.values()):
            sites.close()


def check(settings: Settings) -> None:
    """Try everything that can be tried without listening. Raises SettingsError."""
    check_user(settings)
    sites = Sites(settings)
    try:
        _check_rights(settings, [sites])
    finally:
        sites.close()
    if settings.tls.cert is not None:
        build_contexts(settings)
    else:
        for site in settings.site:
            if site.cert is not None:
                build_context(msgspec.structs.replace(settings.tls, cert=site.cert, key=site.key))


def prepare(settings: Settings, sockets: Sockets, number: int, before: Generation | None = None) -> Generation:
    """Carry out a configuration up to the fork. Raises SettingsError, StartError: then nothing has changed.

    The contexts of the generation `before` go on being used if only certificates may have changed: clients can resume their
    sessions then (a context's ticket keys are its own).
    """
    trust = None
    if settings.tls.cert is None:
        made = devcert.ensure(devcert.default_directory())
        trust = str(made.ca)
        tls = msgspec.structs.replace(settings.tls, cert=str(made.cert), key=str(made.key))
        settings = msgspec.structs.replace(settings, tls=tls)
    check_user(settings)
    _raise_limits(settings)
    fingerprints = {pair: fingerprint(pair) for pair in pairs_of(settings)}
    contexts, fds = _contexts(settings, before)
    try:
        return _prepared(settings, sockets, number, contexts, before, trust, fds, fingerprints)
    finally:
        for fd in fds:
            os.close(fd)


def _prepared(
    settings: Settings, sockets: Sockets, number: int, contexts: list[ssl.SSLContext], before: Generation | None,
    trust: str | None, fds: list[int], fingerprints: dict[Pair, bytes],
) -> Generation:  # fmt: skip
    """The rest of `prepare`; `fds` hold chain and key for contexts that are used again: loaded when nothing can be refused."""
    sites = Sites(settings)
    challenges: dict[str, Sites] = {}
    access_log = None
    try:
        for http in settings.http:
            if http.acme is not None and http.acme not in challenges:
                bare = Files(index=(), listing=False, digests=False, precompressed=False)
                challenges[http.acme] = Sites(Settings(root=http.acme, files=bare))
        access_log = AccessLog(settings.log.access, settings.log.format)
        kernel = LinuxKernel()
        policy = _policy(settings, kernel)
        _check_rights(settings, [sites, *challenges.values()])
        workers = process.processors() if settings.workers == "auto" else settings.workers
        since = before.made if before is not None and contexts is before.contexts else time.monotonic()
        made_generation = Generation(
            number,
            settings,
            workers,
            contexts,
            since,
            pairs_of(settings),
            sites,
            challenges,
            access_log,
            kernel,
            policy,
            trust,
            fingerprints,
            {pair: key_kind(read_pair(pair)) for pair in pairs_of(settings)},
        )
        _open_doors(made_generation, sockets)
        for context, fd in zip(contexts, fds, strict=False):
            load_pem(context, fd)
    except BaseException:
        sockets.rollback()
        for each in (sites, *challenges.values()):
            each.close()
        if access_log is not None:
            access_log.close()
        raise
    return made_generation


def _contexts(settings: Settings, before: Generation | None) -> tuple[list[ssl.SSLContext], list[int]]:
    """Return the earlier contexts, and descriptors of what is to be loaded into them; or new ones. Raises SettingsError."""
    if before is None or settings.tls.client_ca is not None or time.monotonic() - before.made > _TICKET_KEYS_LAST:
        return build_contexts(settings), []
    if _shape(settings) != _shape(before.settings):
        return build_contexts(settings), []
    pems = {pair: read_pair(pair) for pair in pairs_of(settings)}
    if {pair: key_kind(pem) for pair, pem in pems.items()} != before.kinds:
        return build_contexts(settings), []
    fds: list[int] = []
    try:
        for pair in pairs_of(settings):
            fds += [pem_file(pair, pems[pair])]
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return before.contexts, fds


def _check_rights(settings: Settings, groups: Sequence[Sites]) -> None:
    """Raises SettingsError if the workers' user may not read what they must: it would be 403s, and locks that stay open."""
    if settings.process.user is None:
        return
    wanted = {f"/proc/self/fd/{site.root.fd}": f"root: {site.root.path}" for sites in groups for site in sites.all}
    wanted |= {rule.auth: f"auth: {rule.auth}" for site in settings.sites for rule in site.rule if rule.auth}
    for path in sandbox.unreadable(list(wanted), settings.process.user, settings.process.group):
        fix = "chmod o+rx" if wanted[path].startswith("root") else "chgrp, chmod 0640: changes of it would not count"
        raise SettingsError(f"{wanted[path]}: {settings.process.user} (process.user) may not read it; {fix}")


def _raise_limits(settings: Settings) -> None:
    """Have as many descriptors as the settings may need, a socket and a file for each connection, if that can be had."""
    process.raise_descriptor_limit(descriptors_wanted(settings))


def descriptors_wanted(settings: Settings) -> int:
    """Return how many descriptors a worker may need."""
    return 2 * settings.limits.connections + ENTRIES + _SPARE_DESCRIPTORS


def downloads_with(descriptors: int) -> int:
    """Return for how many downloads at a time so many descriptors are enough."""
    return max((descriptors - min(ENTRIES, descriptors // 8) - _SPARE_DESCRIPTORS) // 2, 0)


def _shape(settings: Settings) -> object:
    return settings.tls, [(site.names, site.cert, site.key, site.alpn) for site in settings.site]


def check_user(settings: Settings) -> None:
    """Raises SettingsError if there is no such user, as `process.user` names."""
    if settings.process.user is not None:
        sandbox.ids_of(settings.process.user, settings.process.group)


def _open_doors(generation: Generation, sockets: Sockets) -> None:
    settings = generation.settings
    wanted: list[tuple[str, str, Http | None]] = []
    if not sockets.activated("https"):
        wanted += [("https", text, None) for text in settings.listen]
    if not sockets.activated("http"):
        wanted += [("http", text, http) for http in settings.http for text in http.listen]
    if not sockets.activated("metrics"):
        wanted += [("metrics", text, None) for text in settings.metrics.listen]
    for kind in ("https", "http", "metrics"):
        if group := sockets.activated(kind):
            http = (settings.http[0] if settings.http else _HTTP_DEFAULT) if kind == "http" else None
            generation.entries.append(Entry(kind, "", [Listener(sock) for sock in group], http))
    for kind, text, http in wanted:
        host, port = parse_listen(text)
        name = f"{kind} {host}:{port}"
        while name in generation.names:  # port 0, more than once
            name += "'"
        bound = [Listener(sock) for sock in sockets.bind(name, host, port)]
        generation.entries.append(Entry(kind, host, bound, http))
        generation.names.add(name)
    if any(entry.kind == "metrics" for entry in generation.entries):
        importlib.import_module("ktlsd.server.exposition")  # here, where it may be read; a tenth of the start for who wants it


def _policy(settings: Settings, kernel: Kernel) -> HandoverPolicy:
    """Find out what the kernel takes. Raises StartError for `require`."""
    ktls = settings.ktls
    if ktls.mode == "off":
        return HandoverPolicy(off="switched off")
    facts = handover.self_test(kernel, handover.probe(kernel))
    reason = "" if facts.takes_any else next(iter(facts.refusals.values()))
    if ktls.mode == "require" and not facts.takes_aes:
        refused = facts.why_not_aes
        raise StartError(f"--ktls require: the kernel doesn't encrypt ({refused}). {handover.remedy(refused)}")
    if reason:
        return HandoverPolicy(facts, off=reason)
    try:
        KeyLogPipe().close()  # each worker makes its own
    except OSError as exc:
        if ktls.mode == "require":
            raise StartError(f"--ktls require: no key log ({exc.strerror}): /proc, fs.pipe-user-pages-soft") from exc
        return HandoverPolicy(facts, off=f"no key log: {exc.strerror}")
    return HandoverPolicy(facts, ktls.handover_bytes, ktls.rekey_bytes, framing=Framing(ktls.framing))


# --- a worker -------------------------------------------------------------------------------------------------------------


def work(generation: Generation, membership: Membership) -> None:
    """Be a worker from the fork to the end: lock the doors behind, then serve. Raises StartError."""
    settings = generation.settings
    sandbox.preload()
    if settings.process.user is not None:
        sandbox.drop_privileges(settings.process.user, settings.process.group)
    keylog = _catch_keys(generation.policy, generation.contexts)
    services = Services(
        HotResponses(Responder(generation.sites, hsts=_hsts(settings))), generation.access_log, Metrics(), settings.limits
    )
    doors = [
        Door(listener, generation.contexts[0] if entry.kind == "https" else None, own, direct=entry.kind == "metrics")
        for entry in generation.entries
        for own in [_services_behind(entry, generation, membership, services)]
        for listener in entry.listeners
    ]
    membership = replace(
        membership,
        generation=generation.number,
        proxies=Trusted(settings.proxy_protocol) if settings.proxy_protocol else None,
        contexts=generation.contexts,
    )
    worker = Worker(doors, generation.kernel, generation.policy, services, keylog=keylog, membership=membership)
    generation.kernel.preload()
    if settings.process.sandbox:
        found = sandbox.confine(_readable(generation))
        if found.why_not and generation.number == 1:
            _log.info("no sandbox: %s", found.why_not)
    worker.run()


def _readable(generation: Generation) -> list[str]:
    """Return what a worker must be able to open again and again: what is served, and files it looks at for changes.

    Roots by their descriptors: root has opened them, and the way to them may be closed to this user.
    """
    roots = [site.root for sites in (generation.sites, *generation.challenges.values()) for site in sites.all]
    rules = [rule for site in generation.settings.sites for rule in site.rule]
    # Who changes a password file may put a new one into its place: the folder, then.
    files = [place for rule in rules if rule.auth for place in (rule.auth, os.path.realpath(rule.auth))]
    folders = {folder_of(file) for file in files}
    return [*(f"/proc/self/fd/{root.fd}" for root in roots), *sorted(folders)]


def folder_of(file: str) -> str:
    """Return the folder a file is in."""
    return file.rpartition("/")[0] or ("/" if file.startswith("/") else ".")


def _services_behind(entry: Entry, generation: Generation, membership: Membership, services: Services) -> Services:
    """Return the services with who answers behind this entry. Who only asks for metrics is not counted or logged."""
    if entry.kind == "metrics":
        from ktlsd.server.exposition import MetricsPage

        page = MetricsPage(membership.board, generation.policy)
        return replace(services, responder=page, access_log=AccessLog(None, "json"), metrics=Metrics())
    http = entry.http
    if http is None:
        return services
    if http.action == "serve":
        return replace(services, responder=HotResponses(Responder(generation.sites)))
    sites = generation.challenges[http.acme] if http.acme is not None else generation.sites
    return replace(services, responder=Redirector(Responder(sites), http.https_port))


def _hsts(settings: Settings) -> bytes | None:
    tls = settings.tls
    if tls.hsts is None:
        return None
    return b"max-age=%d%s" % (tls.hsts, b"; includeSubDomains" if tls.hsts_subdomains else b"")


def _catch_keys(policy: HandoverPolicy, contexts: Sequence[ssl.SSLContext]) -> KeyLogPipe | None:
    """Catch this process's key log, where the kernel is to have keys. Raises StartError."""
    if policy.off:
        return None
    try:
        keylog = KeyLogPipe()
        for context in contexts:
            keylog.attach(context)
    except OSError as exc:
        raise StartError(f"no key log: {exc.strerror}; see fs.pipe-user-pages-soft, or use --ktls off") from exc
    return keylog
