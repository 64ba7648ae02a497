"""What a process does to itself before it holds secrets: no core dumps, enough descriptors."""

import ctypes
import math
import os
import resource
from pathlib import Path

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


def descriptor_limit() -> int:
    """Return how many descriptors this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 30 if soft == resource.RLIM_INFINITY else soft


def out_of_descriptors() -> bool:
    """Whether not a single one more is to be had."""
    try:
        os.close(os.dup(2))
    except OSError:
        return True
    return False


def processors() -> int:
    """Return how many processors this process may use: its affinity, and its container's share of time, rounded up."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("ascii").split()
        return max(min(allowed, math.ceil(int(quota) / int(period))), 1)
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return allowed


def take_name(name: str) -> None:
    """Be listed by this name, at most 15 bytes; after an upgrade it would be the interpreter's. Workers inherit it."""
    ctypes.CDLL(None).prctl(uapi.PR_SET_NAME, name.encode(), 0, 0, 0)
