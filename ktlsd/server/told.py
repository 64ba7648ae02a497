"""The start-up lines: what is served, where, how to trust it, who encrypts, and what the workers can't do."""

import os
import resource
import time
from typing import Final

from ktlsd import __version__
from ktlsd.net import handover, listeners
from ktlsd.net.channel import HandoverPolicy
from ktlsd.net.listeners import Listener
from ktlsd.server import sandbox
from ktlsd.server.contexts import expiry_of
from ktlsd.server.generation import Generation, descriptors_wanted, downloads_with
from ktlsd.server.sites import Sites
from ktlsd.settings import Settings

_DAY: Final = 86_400


def lines(generation: Generation) -> list[str]:
    """Return the lines about a generation, for standard output."""
    return [
        *_served(generation),
        *_gate(generation.sites),
        *_limits(generation.settings),
        *_workers(generation),
        *_encryption(generation.policy),
    ]


def _served(generation: Generation) -> list[str]:
    settings = generation.settings
    roots = dict.fromkeys(os.path.realpath(site.root) for site in settings.sites)
    told = [f"ktlsd {__version__} serves {', '.join(roots)}"]
    urls = []
    for entry in generation.entries:
        shown = [_address(entry.shown, listener) for listener in entry.listeners[: 1 if entry.shown else None]]
        if entry.kind == "https":
            urls += [f"https://{address}/" for address in shown]
            told += [f"  at           https://{address}/" for address in shown]
        elif entry.kind == "metrics":
            told += [f"  metrics      http://{address}/metrics" for address in shown]
        else:
            does = "redirects" if entry.http is not None and entry.http.action == "redirect" else "in the clear"
            told += [f"  {does:<12} http://{address}/" for address in shown]
    if generation.trust:
        told += [f"  certificate  for development only; to trust it: curl --cacert {generation.trust} {urls[0]}"]
    else:
        told += [f"  certificate  {settings.tls.cert}{_expiry(settings.tls.cert or '')}"]
    return told


def _expiry(cert: str) -> str:
    ends = expiry_of(cert)
    if ends is None:
        return ""
    days = (ends - time.time()) / _DAY
    when = time.strftime("%Y-%m-%d", time.gmtime(ends))
    return f", EXPIRED on {when}: renew it" if days < 0 else f", good until {when}"


def _address(shown: str, listener: Listener) -> str:
    host, port = listener.address
    return listeners.address_text(shown or host, port)


def _workers(generation: Generation) -> list[str]:
    process_settings = generation.settings.process
    count = f"{generation.workers} worker{'s' if generation.workers > 1 else ''}"
    who = f" as {process_settings.user}" if process_settings.user is not None else ""
    if os.geteuid() == 0 and not who:
        who = " as root (process.user names another)"
    if not process_settings.sandbox:
        return [f"  processes    {count}{who}, no core dumps, without a sandbox: switched off"]
    found = sandbox.rehearse()
    return [
        f"  processes    {count}{who}, {f'Landlock {found.landlock}' if found.landlock else f'no Landlock: {found.why_not}'}"
    ]


def _encryption(policy: HandoverPolicy) -> list[str]:
    if policy.off:
        remedy = handover.remedy(policy.off)
        return [f"  encryption   in userspace: {policy.off}", *([f"               {remedy}"] if remedy else [])]
    when = f"for responses of {policy.handover_bytes:,} bytes and more" if policy.handover_bytes else "from the handshake on"
    taken = [handover.combination_name(c) for c, reason in policy.facts.refusals.items() if not reason]
    refused = [f"{handover.combination_name(c)} ({r})" for c, r in policy.facts.refusals.items() if r]
    told = [f"  encryption   in the kernel {when}: {', '.join(taken)}"]
    if refused:
        told.append(f"               in userspace: {', '.join(refused)}")
    if not policy.facts.rekey:
        told.append("               no rekey before kernel 6.14: a client's KeyUpdate ends its connection after the response")
    return told


def _gate(sites: Sites) -> list[str]:
    if all(site.root.gate == "openat2" for site in sites.all):
        return []
    return ["  files        opened name by name: this kernel has no openat2, or a filter (seccomp) forbids it; slower, as safe"]


def _limits(settings: Settings) -> list[str]:
    """Say so if there are fewer descriptors than the settings may need (a socket and a file each)."""
    wanted = descriptors_wanted(settings)
    have = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if have == resource.RLIM_INFINITY or have >= wanted:
        return []
    enough = downloads_with(have)
    return [f"  limits       {have} descriptors are enough for about {enough} downloads at a time (ulimit -n, LimitNOFILE)"]
