"""What a process does to itself before it holds secrets: no core dumps, enough descriptors."""

import ctypes
import resource

from ktlsd import uapi


def forbid_core_dumps() -> None:
    """Keep secrets out of core files, of the crash handlers that core_pattern pipes to, and from other users' ptrace."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(uapi.PR_SET_DUMPABLE, 0, 0, 0, 0)


def raise_descriptor_limit(wanted: int) -> int:
    """Raise the soft limit of open descriptors to `wanted`, as far as the hard limit lets; return what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        soft = target
    return soft
