"""Run a command under another Linux kernel: User Mode Linux, a kernel that is an ordinary process.

The command sees this machine's file system through an overlay; what it writes is lost, but for the folder it finds in
$KTLSD_UML_OUT. Needs nothing but the kernel binary (Debian: apt-get install user-mode-linux) and this Python; with
`systemd=True` also this machine's systemd, which is process 1 there, and the command is a service of its.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

DEBIAN = "/usr/bin/linux.uml"
SYSTEMD = "/lib/systemd/systemd"
INIT = Path(__file__).with_name("uml_init.py")

# What pytest gets inside. Nothing is fast there, and the machine outside may be busy.
PYTEST = ("-p", "no:cacheprovider", "--color=no", "--durations=5", "--timeout=400")


class Shown:
    """Prints the lines of a pytest inside, and remembers what it says of failures."""

    def __init__(self) -> None:
        self._said: list[str] = []

    def __call__(self, line: str) -> None:
        print("  |", line, flush=True)
        if line.startswith(("FAILED ", "ERROR ", "E   ")):
            self._said.append(line)

    @property
    def verdict(self) -> str:
        """What failed, in pytest's words, the last 60 lines of it."""
        return "\n".join(self._said[-60:])


def kernel_file() -> str | None:
    """The kernel to test on: $KTLSD_TEST_KERNEL, else Debian's; None if there is none."""
    named = os.environ.get("KTLSD_TEST_KERNEL")
    if named:
        return named
    return DEBIAN if os.access(DEBIAN, os.X_OK) else None


def run(
    kernel: str,
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    timeout: float,
    memory: str = "2G",
    systemd: bool = False,
    on_line: Callable[[str], None] = lambda line: None,
    out: Path | None = None,
) -> int:
    """Run `command` in the present folder under `kernel`; return its exit status, 124 after `timeout` seconds.

    `on_line` gets each line it prints. What it left in $KTLSD_UML_OUT is copied to `out`. With `systemd` it finds
    KTLSD_UML_SYSTEMD=1 in its environment.
    """
    with tempfile.TemporaryDirectory(prefix="ktlsd-uml-", dir="/var/tmp") as name:
        job = Path(name)
        (job / "out").mkdir()
        inner = {"HOME": "/root", "TERM": "dumb", "TMPDIR": "/dev/shm", "KTLSD_UML_OUT": "/mnt/job/out", **env}
        if systemd:
            inner["KTLSD_UML_SYSTEMD"] = "1"
        work = {"cwd": os.getcwd(), "command": list(command), "env": inner, "systemd": SYSTEMD if systemd else None}
        (job / "job.json").write_text(json.dumps(work))
        init = job / "init"
        # The kernel gives init no arguments of ours, so a script names the interpreter. (systemd's job has one: "job".)
        init.write_text(f'#!/bin/sh\nexec {os.path.realpath(sys.executable)} -I -S {INIT} "$@"\n')
        init.chmod(0o755)
        arguments = [
            kernel, "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", f"mem={memory}", f"init={init}",
            f"ktlsd_job={job}", "con=null", "con0=fd:0,fd:1", "quiet", "loglevel=0", "panic=-1", *_cpus(kernel),
        ]  # fmt: skip
        process = subprocess.Popen(
            ["timeout", "-k", "5", str(timeout), *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": name},
        )  # fmt: skip
        assert process.stdout is not None
        started = False
        for raw in process.stdout:
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            if started:
                on_line(line)
            started = started or line == "ktlsd-uml: start"  # what comes before is the kernel's own
        process.wait()
        if out is not None:
            shutil.copytree(job / "out", out, dirs_exist_ok=True)
        status = job / "status"
        return int(status.read_text()) if status.exists() else 124


def _cpus(kernel: str) -> list[str]:
    """Two processors and the faster system call trap, for kernels that know of them."""
    told = subprocess.run([kernel, "--help"], capture_output=True, check=False).stdout
    return ["ncpus=1", "seccomp=on"] if b"seccomp=" in told else []


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Run a command under User Mode Linux.")
    parser.add_argument("--kernel", default=kernel_file())
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--mem", default="2G")
    parser.add_argument("--out", type=Path, help="a folder for what it leaves in $KTLSD_UML_OUT")
    parser.add_argument("--systemd", action="store_true", help="systemd is process 1, the command a service")
    parser.add_argument("command", nargs="+")
    asked = parser.parse_args()
    if not asked.kernel:
        sys.exit("no kernel: apt-get install user-mode-linux")
    kept = {k: v for k, v in os.environ.items() if k.startswith("KTLSD_") or k == "PATH"}
    limits = {"timeout": asked.timeout, "memory": asked.mem, "out": asked.out}
    sys.exit(run(asked.kernel, asked.command, env=kept, systemd=asked.systemd, on_line=print, **limits))
