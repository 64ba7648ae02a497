"""Process 1 of the test kernel: an overlay over the host's files, loopback up, then the job; see uml.py.

Standard library only, and nothing of the project: it runs before there is a proper root.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess

libc = ctypes.CDLL(None, use_errno=True)
SYS_finit_module = 313  # x86_64
RB_POWER_OFF = 0x4321FEDC
SIOCSIFFLAGS, IFF_UP = 0x8914, 1

# Distribution kernels keep these as modules; a kernel with them built in has no such files. Order matters.
MODULES = (
    "fs/overlayfs/overlay", "crypto/gf128mul", "crypto/ghash-generic", "crypto/ctr", "crypto/gcm", "crypto/ccm",
    "lib/crypto/libchacha", "crypto/chacha_generic", "lib/crypto/libpoly1305", "crypto/poly1305_generic",
    "crypto/chacha20poly1305", "net/tls/tls",
)  # fmt: skip


def mount(source, target, kind, options=""):
    os.makedirs(target, exist_ok=True)
    if libc.mount(source.encode(), target.encode(), kind.encode(), 0, options.encode()):
        raise OSError(ctypes.get_errno(), f"mount {kind} on {target}: {os.strerror(ctypes.get_errno())}")


def load_modules():
    folder = f"/usr/lib/uml/modules/{os.uname().release}/kernel"
    for name in MODULES:
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(f"{folder}/{name}.ko", os.O_RDONLY)
            libc.syscall(SYS_finit_module, fd, b"", 0)
            os.close(fd)


def build_root(job):
    root = "/mnt/root"
    mount("tmpfs", "/mnt", "tmpfs")
    for name in ("upper", "work", "root"):
        os.mkdir(f"/mnt/{name}")
    mount("overlay", root, "overlay", "lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work")
    for kind, target in (
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/dev/shm"),
        ("devpts", "/dev/pts"),
        ("tmpfs", "/run"),
    ):
        mount(kind, root + target, kind)
    mount("none", root + "/mnt/job", "hostfs", job)
    os.chroot(root)


def loopback_up():
    with socket.socket() as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", IFF_UP))


def main():
    mount("proc", "/proc", "proc")
    with open("/proc/cmdline") as file:
        job = next(word.partition("=")[2] for word in file.read().split() if word.startswith("ktlsd_job="))
    load_modules()
    build_root(job)
    loopback_up()
    with open("/mnt/job/job.json") as file:
        work = json.load(file)
    print("ktlsd-uml: start", flush=True)
    status = subprocess.run(work["command"], cwd=work["cwd"], env=work["env"], check=False).returncode
    with open("/mnt/job/status", "w") as file:
        file.write(str(status if status >= 0 else 128 - status))
    os.sync()


try:
    main()
except BaseException as exc:  # process 1 must not end: say why, then power off
    print(f"ktlsd-uml: start\nktlsd-uml: {type(exc).__name__}: {exc}", flush=True)
finally:
    libc.reboot(RB_POWER_OFF)
