"""From Settings to a running worker: the steps in which anything can still be refused come first, the keys last."""

import logging
import os
import resource
import signal
import ssl
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import msgspec

from ktlsd import __version__, devcert
from ktlsd.errors import StartError
from ktlsd.net import handover, listeners
from ktlsd.net.channel import HandoverPolicy
from ktlsd.net.kernel import Kernel, LinuxKernel
from ktlsd.net.keylog_pipe import KeyLogPipe
from ktlsd.net.listeners import Listener
from ktlsd.net.tx_kernel import Framing
from ktlsd.server import process
from ktlsd.server.accesslog import AccessLog
from ktlsd.server.connection import Services
from ktlsd.server.contexts import build_context, build_contexts
from ktlsd.server.metrics import Metrics
from ktlsd.server.responder import Redirector, Responder
from ktlsd.server.sites import Sites
from ktlsd.server.worker import Door, Worker
from ktlsd.settings import Files, Settings, parse_listen

_log = logging.getLogger("ktlsd")
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_SPARE_DESCRIPTORS: Final = 64


def check(settings: Settings) -> None:
    """Try everything that can be tried without listening. Raises SettingsError."""
    Sites(settings).close()
    if settings.tls.cert is not None:
        build_contexts(settings)
    else:
        for site in settings.site:
            if site.cert is not None:
                build_context(msgspec.structs.replace(settings.tls, cert=site.cert, key=site.key))


def serve(settings: Settings, *, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT. Raises SettingsError, StartError before the first connection is accepted."""
    trust = None
    if settings.tls.cert is None:
        made = devcert.ensure(devcert.default_directory())
        trust = str(made.ca)
        tls = msgspec.structs.replace(settings.tls, cert=str(made.cert), key=str(made.key))
        settings = msgspec.structs.replace(settings, tls=tls)
    process.forbid_core_dumps()
    contexts = build_contexts(settings)
    sites = Sites(settings)
    access_log = AccessLog(settings.log.access, settings.log.format)
    kernel = LinuxKernel()
    policy, keylog = prepare_kernel(settings, kernel, contexts)
    services = Services(Responder(sites, hsts=_hsts(settings)), access_log, Metrics(), settings.limits)
    bound = [(host, _bind(host, port)) for host, port in settings.listen_addresses]
    doors = [Door(listener, contexts[0], services) for _, group in bound for listener in group]
    plain = _plain_doors(settings, sites, services)
    worker = Worker([*doors, *plain], kernel, policy, services, keylog=keylog)
    worker.waker.hook(_SIGNALS)
    for line in (
        *_told(settings, bound, plain, trust),
        *_told_gate(sites),
        *_told_limits(settings),
        *_told_encryption(policy),
    ):
        announce(line)
    worker.run()
    sites.close()


def _bind(host: str, port: int) -> list[Listener]:
    return [Listener(sock) for sock in listeners.bind(host, port)]


def _plain_doors(settings: Settings, sites: Sites, services: Services) -> list[Door]:
    """The listeners of [[http]], each with who answers there. Raises SettingsError, StartError."""
    doors = []
    for http in settings.http:
        challenges = sites
        if http.acme is not None:
            challenges = Sites(
                Settings(root=http.acme, files=Files(index=(), listing=False, digests=False, precompressed=False))
            )
        answers = Responder(sites) if http.action == "serve" else Redirector(Responder(challenges), http.https_port)
        own = replace(services, responder=answers)
        for text in http.listen:
            doors += [Door(listener, None, own) for listener in _bind(*parse_listen(text))]
    return doors


def _hsts(settings: Settings) -> bytes | None:
    tls = settings.tls
    if tls.hsts is None:
        return None
    return b"max-age=%d%s" % (tls.hsts, b"; includeSubDomains" if tls.hsts_subdomains else b"")


def prepare_kernel(
    settings: Settings, kernel: Kernel, contexts: Sequence[ssl.SSLContext]
) -> tuple[HandoverPolicy, KeyLogPipe | None]:
    """Find out what the kernel takes and catch the key log if it takes anything. Raises StartError for `require`."""
    ktls = settings.ktls
    if ktls.mode == "off":
        return HandoverPolicy(off="switched off"), None
    facts = handover.self_test(kernel, handover.probe(kernel))
    reason = "" if facts.takes_any else next(iter(facts.refusals.values()))
    if ktls.mode == "require" and not facts.takes_aes:
        refused = facts.why_not_aes
        raise StartError(f"--ktls require: the kernel doesn't encrypt ({refused}). {handover.remedy(refused)}")
    if reason:
        return HandoverPolicy(facts, off=reason), None
    try:
        keylog = KeyLogPipe()
        for context in contexts:
            keylog.attach(context)
    except OSError as exc:
        if ktls.mode == "require":
            raise StartError(f"--ktls require: no key log ({exc.strerror}): /proc, fs.pipe-user-pages-soft") from exc
        return HandoverPolicy(facts, off=f"no key log: {exc.strerror}"), None
    return HandoverPolicy(facts, ktls.handover_bytes, ktls.rekey_bytes, framing=Framing(ktls.framing)), keylog


def _told(settings: Settings, bound: list[tuple[str, list[Listener]]], plain: list[Door], trust: str | None) -> list[str]:
    """The start-up lines: what is served, where, how to trust it."""
    urls = [f"https://{_address(host, group[0])}/" for host, group in bound]
    roots = dict.fromkeys(os.path.realpath(site.root) for site in settings.sites)
    lines = [f"ktlsd {__version__} serves {', '.join(roots)}"]
    lines += [f"  at           {url}" for url in urls]
    for door in plain:
        does = "redirects" if isinstance(door.services.responder, Redirector) else "in the clear"
        lines.append(f"  {does:<12} http://{_address(door.listener.address[0], door.listener)}/")
    if trust:
        lines += [f"  certificate  for development only; to trust it: curl --cacert {trust} {urls[0]}"]
    else:
        lines += [f"  certificate  {settings.tls.cert}"]
    return lines


def _address(host: str, listener: Listener) -> str:
    name = host if host not in ("", "0.0.0.0", "::") else "localhost"  # noqa: S104  # shown, not bound
    return listeners.address_text(name, listener.address[1])


def _told_encryption(policy: HandoverPolicy) -> list[str]:
    if policy.off:
        remedy = handover.remedy(policy.off)
        return [f"  encryption   in userspace: {policy.off}", *([f"               {remedy}"] if remedy else [])]
    when = f"for responses of {policy.handover_bytes:,} bytes and more" if policy.handover_bytes else "from the handshake on"
    taken = [handover.combination_name(c) for c, reason in policy.facts.refusals.items() if not reason]
    refused = [f"{handover.combination_name(c)} ({r})" for c, r in policy.facts.refusals.items() if r]
    lines = [f"  encryption   in the kernel {when}: {', '.join(taken)}"]
    if refused:
        lines.append(f"               in userspace: {', '.join(refused)}")
    if not policy.facts.rekey:
        lines.append("               no rekey before kernel 6.14: a client's KeyUpdate ends its connection after the response")
    return lines


def _told_gate(sites: Sites) -> list[str]:
    if all(site.root.gate == "openat2" for site in sites.all):
        return []
    return ["  files        opened name by name: this kernel has no openat2, or a filter (seccomp) forbids it; slower, as safe"]


def _told_limits(settings: Settings) -> list[str]:
    """Raise the limit of descriptors; say so if it stays below what the settings may need (a socket and a file each)."""
    wanted = 2 * settings.limits.connections + _SPARE_DESCRIPTORS
    have = process.raise_descriptor_limit(wanted)
    if have == resource.RLIM_INFINITY or have >= wanted:
        return []
    enough = (have - _SPARE_DESCRIPTORS) // 2
    return [f"  limits       {have} descriptors are enough for about {enough} downloads at a time (ulimit -n, LimitNOFILE)"]
