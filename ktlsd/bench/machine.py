"""Where it is measured: everything about a machine that explains a figure, read from /proc and asked of the kernel."""

import os
import platform
import re
import ssl
from pathlib import Path
from typing import Final

from ktlsd import __version__
from ktlsd.bench.result import Machine
from ktlsd.net import handover
from ktlsd.net.handover import KernelFacts
from ktlsd.net.kernel import LinuxKernel

_CONTAINERS: Final = (("/.dockerenv", "docker"), ("/run/.containerenv", "podman"))
_DMI: Final = Path("/sys/class/dmi/id")


def kernel_facts() -> KernelFacts:
    """Ask the kernel what it encrypts, and try it."""
    kernel = LinuxKernel()
    return handover.self_test(kernel, handover.probe(kernel))


def machine(facts: KernelFacts) -> Machine:
    """Return what there is to say about this one."""
    cpuinfo = _read("/proc/cpuinfo")
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu(cpuinfo),
        cpus=len(os.sched_getaffinity(0)),
        memory=_memory(),
        crypto=crypto_driver(_read("/proc/crypto")),
        kernel_tls={handover.combination_name(combination): reason for combination, reason in facts.refusals.items()},
        python=platform.python_version(),
        openssl=ssl.OPENSSL_VERSION,
        ktlsd=__version__,
        virtual=virtual(cpuinfo),
    )


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return ""


def _cpu(cpuinfo: str) -> str:
    """Return the model's name; on ARM, where there is none, the architecture; under UML that of the machine below."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    host = re.search(r"^host\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return f"{name} on {host[1].strip()}" if host else name


def _memory() -> int:
    found = re.search(r"^MemTotal:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def crypto_driver(crypto: str) -> str:
    """Return the driver that the kernel takes for gcm(aes), from /proc/crypto's text: the one of the highest priority.

    "" for none: it has no entry before it has been used once.
    """
    found: list[tuple[int, str]] = []
    for block in crypto.split("\n\n"):
        fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in block.splitlines())}
        if fields.get("name") == "gcm(aes)" and fields.get("internal") != "yes":
            found.append((int(fields.get("priority", "0")), fields.get("driver", "")))
    return max(found)[1] if found else ""


def virtual(cpuinfo: str) -> str:
    """Return what stands between this kernel and the hardware, "" if nothing is known to."""
    if "User Mode Linux" in cpuinfo:
        return "User Mode Linux"
    found = [name for path, name in _CONTAINERS if Path(path).exists()]
    container = re.search(r"(?:^|\0)container=([^\0]+)", _read("/proc/1/environ"))
    if container:
        found.append(container[1])
    if re.search(r"^flags\s*:.*\bhypervisor\b", cpuinfo, re.MULTILINE):
        paths = ("/sys/hypervisor/type", _DMI / "sys_vendor", _DMI / "product_name")
        kind = next((text for path in paths if (text := _read(path).strip())), "")
        found.append(f"a virtual machine ({kind})" if kind else "a virtual machine")
    return ", ".join(dict.fromkeys(found))
