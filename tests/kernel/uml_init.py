"""Process 1 of the test kernel: an overlay over the host's files, loopback up, then the job; see uml.py.

Or then systemd, as process 1 instead of us, whose only service of its own is this script with the argument "job".

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
import sys
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)
SYS_finit_module = 313  # x86_64
RB_POWER_OFF = 0x4321FEDC
MS_MOVE = 8192
SIOCSIFFLAGS, IFF_UP = 0x8914, 1

# Distribution kernels keep these as modules; a kernel with them built in has no such files. Order matters.
MODULES = (
    "fs/overlayfs/overlay", "crypto/gf128mul", "crypto/ghash-generic", "crypto/ctr", "crypto/gcm", "crypto/ccm",
    "lib/crypto/libchacha", "crypto/chacha_generic", "lib/crypto/libpoly1305", "crypto/poly1305_generic",
    "crypto/chacha20poly1305", "net/tls/tls",
)  # fmt: skip

# What this machine's systemd would do for real hardware, a network and disks; here it fails, waits or undoes what we did.
MASKED = (
    "systemd-udevd.service", "systemd-udev-trigger.service", "systemd-remount-fs.service", "local-fs.target",
    "dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount",
    "proc-sys-fs-binfmt_misc.automount", "systemd-networkd.service", "systemd-resolved.service",
    "systemd-timesyncd.service", "systemd-random-seed.service", "systemd-update-utmp.service",
    "systemd-machine-id-commit.service", "systemd-firstboot.service", "systemd-sysctl.service",
    "systemd-modules-load.service", "systemd-tmpfiles-setup-dev.service",
)  # fmt: skip
TARGET = """\
[Unit]
Requires=sysinit.target
After=sysinit.target
Wants=ktlsd-uml.service
AllowIsolate=yes
"""
JOB = """\
[Unit]
DefaultDependencies=no
After=sysinit.target
FailureAction=poweroff-force
[Service]
Type=oneshot
TimeoutStartSec=infinity
ExecStart=/bin/sh /mnt/job/init job
"""


def mount(source, target, kind, options="", flags=0):
    os.makedirs(target, exist_ok=True)
    if libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()):
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
    # Moved, not only entered by chroot: within a chroot nobody may make a user name space (PrivateUsers= of systemd).
    os.chdir(root)
    mount(".", "/", "", flags=MS_MOVE)
    os.chroot(".")


def loopback_up():
    with socket.socket() as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", IFF_UP))


def become_systemd(program, work):
    units = Path("/etc/systemd/system")
    units.mkdir(parents=True, exist_ok=True)
    for name in MASKED:
        (units / name).unlink(missing_ok=True)
        (units / name).symlink_to("/dev/null")
    generators = Path("/etc/systemd/system-generators")  # they take most of the time of a daemon-reload, for nothing here
    generators.mkdir(parents=True, exist_ok=True)
    for name in os.listdir(Path(program).parent / "system-generators"):
        (generators / name).unlink(missing_ok=True)
        (generators / name).symlink_to("/dev/null")
    (units / "ktlsd-uml.target").write_text(TARGET)
    (units / "ktlsd-uml.service").write_text(JOB)
    for name in ("/.dockerenv", "/run/.containerenv"):  # or it thinks this kernel is its host's
        Path(name).unlink(missing_ok=True)
    Path("/etc/fstab").write_text("")
    Path("/etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    if any(path.startswith("/tmp/") for path in (__file__, work["cwd"], *work["command"])):
        Path("/etc/tmpfiles.d").mkdir(exist_ok=True)
        Path("/etc/tmpfiles.d/tmp.conf").symlink_to("/dev/null")  # or systemd would empty /tmp at its start
    else:
        mount("tmpfs", "/tmp", "tmpfs", "mode=1777")
    os.chdir("/")
    os.execv(program, [program, "--unit=ktlsd-uml.target", "--show-status=0", "--log-target=journal-or-kmsg"])


def main():
    if "job" in sys.argv:
        console = os.open("/dev/tty0", os.O_WRONLY | os.O_NOCTTY)  # systemd's services have the journal instead
        os.dup2(console, 1)
        os.dup2(console, 2)
        run_job(read_work())
        return
    mount("proc", "/proc", "proc")
    with open("/proc/cmdline") as file:
        job = next(word.partition("=")[2] for word in file.read().split() if word.startswith("ktlsd_job="))
    load_modules()
    build_root(job)
    loopback_up()
    work = read_work()
    if work["systemd"]:
        become_systemd(work["systemd"], work)
    run_job(work)


def read_work():
    with open("/mnt/job/job.json") as file:
        return json.load(file)


def run_job(work):
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
