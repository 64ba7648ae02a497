"""ktlsd as a service: what an operator does with systemctl, and what systemd does by itself. Runs in the test kernel only."""

import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import threading
import urllib.request
from pathlib import Path

import bcrypt
import pytest

from tests import pki
from tests.serving import tls_stat
from tests.systemd import machine
from tests.systemd.machine import Download, Journal, get, main_pid, override, show, systemctl, wait_for, workers

pytestmark = [
    pytest.mark.systemd,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not machine.is_ours(), reason="runs in the test kernel only: tests/systemd/test_lane.py"),
]


@pytest.fixture(scope="session", autouse=True)
def installed():
    machine.install()


@pytest.fixture(scope="session")
def kept():
    """The journal of a service that runs and was left as it was found."""
    return {}


@pytest.fixture
def journal(installed, kept):
    """A machine on which ktlsd has not been started; its journal is shown if the test fails."""
    kept.clear()
    machine.reset()
    made = Journal()
    yield made
    print(made.text())


@pytest.fixture
def service(journal):
    """The service runs, and may be left in any state; that of `journal`."""
    systemctl("start", "ktlsd.service")
    return journal


@pytest.fixture
def running(request, installed, kept):
    """The service runs, for tests that leave it as they found it: it takes seconds to start. Its journal since then."""
    made = kept.pop("journal", None)
    if made is None:
        machine.reset()
        made = Journal()
        systemctl("start", "ktlsd.service")
    failed = request.session.testsfailed
    yield made
    print(made.text())
    if request.session.testsfailed == failed:
        kept["journal"] = made


@contextlib.contextmanager
def short_requests():
    """Ask again and again, each time by a new connection, until the end of the block; yields what came: True or an error."""
    came, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            try:
                came.append(get() == (200, machine.SMALL))
            except OSError as exc:
                came.append(exc)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield came
    finally:
        stop.set()
        thread.join()


def generation_now():
    """Which generation of workers serves, as the status says."""
    return int(re.search(r"Generation (\d+)", show("StatusText"))[1])


# --- while it runs ----------------------------------------------------------------------------------------------------


def test_status_shows_what_the_server_says_of_itself(running):
    said = show("StatusText")
    assert "2 workers" in said
    assert f'Status: "{said}"' in systemctl("status", "ktlsd.service")


def test_the_journal_has_what_the_server_prints(running):
    text = running.text()
    assert "serves /srv/files" in text
    assert "encryption" in text


def test_ipv6_and_ipv4_come_by_the_same_socket(running):
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("this kernel has no IPv6: the socket unit fell back to IPv4")
    assert get(host="127.0.0.1") == get(host="::1") == (200, machine.SMALL)


def test_it_is_nobody_and_may_nothing(running):
    for pid in (main_pid(), *workers()):
        status = machine.status_of(pid)
        uids = {int(uid) for uid in status["Uid"].split()}
        assert len(uids) == 1
        assert 61_184 <= uids.pop() <= 65_519  # systemd's range for DynamicUser
        assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
        assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
        for space in ("net", "user", "mnt", "ipc"):
            assert os.readlink(f"/proc/{pid}/ns/{space}") != os.readlink(f"/proc/self/ns/{space}"), space


def test_it_sees_what_it_serves_and_can_run_none_of_it(running):
    root = Path(f"/proc/{main_pid()}/root")
    assert os.listdir(root / "srv") == ["files"]
    for writable in ("srv/files", "var/tmp", "var/log/private/ktlsd", *([] if machine.IN_TMP else ["tmp"])):
        assert os.statvfs(root / writable).f_flag & os.ST_NOEXEC, writable
    for place in ("", "usr", "etc", "srv", "srv/files", "var/lib", "opt"):
        assert os.statvfs(root / place).f_flag & os.ST_RDONLY, place


def test_the_kernel_encrypts(running):
    if not machine.kernel_has_tls():
        pytest.skip("this kernel has no TLS")
    before = tls_stat("TlsTxSw")
    Download().finish()
    wait_for("a line in the access log", lambda: machine.LOG.exists() and b"/big" in machine.LOG.read_bytes())
    assert '"tx":"kernel"' in machine.LOG.read_text()
    assert tls_stat("TlsTxSw") > before
    assert machine.LOG.stat().st_mode & 0o777 == 0o600


def test_a_reload_under_load_fails_nobody(running):
    pid, before = main_pid(), workers()
    download = Download()
    with short_requests() as came:
        for _ in range(2):
            asked = len(came)
            systemctl("reload", "ktlsd.service")
            wait_for("a request after the reload", lambda asked=asked: len(came) > asked)
    download.finish()
    assert came.count(True) == len(came), [each for each in came if each is not True]
    assert main_pid() == pid
    wait_for("the old workers end", lambda: len(workers()) == 2 and not workers() & before)


def test_reload_returns_when_the_new_configuration_counts_and_is_one_generation(running):
    before, generation = workers(), generation_now()
    with machine.CONFIG.open("a") as config:
        config.write('[[rule]]\npath = "/small"\nredirect = "/big"\n')
    systemctl("reload", "ktlsd.service")
    assert get()[0] == 302
    assert generation_now() == generation + 1
    wait_for("the old workers end", lambda: len(workers()) == 2 and not workers() & before)
    machine.configure()
    systemctl("reload", "ktlsd.service")
    assert (get(), generation_now()) == ((200, machine.SMALL), generation + 2)


def test_a_reload_with_a_broken_configuration_tells_and_changes_nothing(running):
    pid = main_pid()
    machine.configure("workerz = 3")
    with pytest.raises(subprocess.CalledProcessError):
        systemctl("reload", "ktlsd.service")
    assert len(re.findall(r"/etc/ktlsd/ktlsd\.toml: .*workerz", running.text())) == 2  # the server's line, and the check's
    assert (show("ActiveState"), main_pid()) == ("active", pid)
    assert get() == (200, machine.SMALL)
    wait_for("the status says so", lambda: "refused" in show("StatusText"))
    machine.configure()
    systemctl("reload", "ktlsd.service")
    assert "refused" not in show("StatusText")


def test_a_rotated_log_is_opened_anew(running):
    get()
    wait_for("a line", lambda: machine.LOG.exists() and machine.LOG.read_bytes())
    old = machine.LOG.rename(machine.LOG.with_suffix(".1"))
    systemctl("kill", "--kill-whom=main", "--signal=USR1", "ktlsd.service")
    wait_for("a new file", machine.LOG.exists)
    size = old.stat().st_size
    get()
    wait_for("a line in it", machine.LOG.read_bytes)
    assert old.stat().st_size == size
    old.unlink()


def test_an_upgrade_in_place_keeps_process_sockets_and_downloads(running):
    pid, before = main_pid(), workers()
    download = Download()
    with short_requests() as came:
        systemctl("kill", "--kill-whom=main", "--signal=USR2", "ktlsd.service")
        wait_for("two new workers", lambda: len(workers() - before) >= 2 and "workers" in show("StatusText"))
        asked = len(came)
        wait_for("a request after it", lambda: len(came) > asked + 1)
    download.finish()
    assert came.count(True) == len(came), [each for each in came if each is not True]
    assert (main_pid(), show("NRestarts"), show("ActiveState")) == (pid, "0", "active")


def test_a_worker_that_is_killed_is_replaced(running):
    pid, before = main_pid(), workers()
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    wait_for("another worker", lambda: len(workers()) == 2 and victim not in workers())
    assert get() == (200, machine.SMALL)
    assert (main_pid(), show("NRestarts")) == (pid, "0")


# --- starting ---------------------------------------------------------------------------------------------------------


def test_start_returns_when_the_server_is_ready(journal):
    systemctl("start", "ktlsd.service")
    assert (show("ActiveState"), show("SubState")) == ("active", "running")
    assert len(workers()) == 2
    assert show("StatusText")
    assert get() == (200, machine.SMALL)


def test_a_connection_made_before_the_service_runs_is_answered(journal):
    systemctl("start", "ktlsd.socket")
    assert show("ActiveState") == "inactive"
    assert get() == (200, machine.SMALL)
    assert show("ActiveState") == "active"


def test_port_80_leads_to_https(journal):
    systemctl("start", "ktlsd-http.socket", "ktlsd.service")
    with socket.create_connection(("127.0.0.1", 80), timeout=machine.SHORT) as sock:
        sock.sendall(b"GET /small HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: sock.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 308 ")
    assert b"\r\nlocation: https://localhost/small\r\n" in answer.lower()


def test_metrics_are_told_by_a_socket_of_their_own(journal):
    systemctl("start", "ktlsd-metrics.socket", "ktlsd.service")
    with urllib.request.urlopen("http://127.0.0.1:9117/metrics", timeout=machine.SHORT) as answer:
        assert b"ktlsd_build_info" in answer.read()


def test_misuse_is_not_tried_again(journal):
    machine.configure("listen_on = 3")
    with pytest.raises(subprocess.CalledProcessError):
        systemctl("start", "ktlsd.service")
    assert (show("ActiveState"), show("SubState"), show("NRestarts")) == ("failed", "failed", "0")
    assert show("ExecMainStatus") == "2"
    assert re.search(r"/etc/ktlsd/ktlsd\.toml: .*listen_on", journal.text())


def test_a_root_that_is_not_there_is_told_by_the_server(journal):
    away = machine.SERVED.rename("/srv/away")
    try:
        with pytest.raises(subprocess.CalledProcessError):
            systemctl("start", "ktlsd.service")
    finally:
        away.rename(machine.SERVED)
    assert show("ExecMainStatus") == "2"
    assert "/srv/files: no such directory" in journal.text()


# --- started differently, as comments in ktlsd.service say ------------------------------------------------------------


def test_passwords_are_verified_without_writable_code(journal):
    """bcrypt by cffi or Rust, scrypt by OpenSSL: nothing of it trips over MemoryDenyWriteExecute or the filter of calls."""
    from ktlsd.server.auth import hash_password

    hashed = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()
    users = Path("/etc/ktlsd/users")
    users.write_text(f"ann:{hashed}\nbob:{hash_password('secret')}\n")
    users.chmod(0o400)
    override("LoadCredential=users:/etc/ktlsd/users")
    with machine.CONFIG.open("a") as config:
        config.write('[[rule]]\npath = "/small"\nauth = "/run/credentials/ktlsd.service/users"\n')
    systemctl("start", "ktlsd.service")
    assert get()[0] == 401
    for basic in ("YW5uOnNlY3JldA==", "Ym9iOnNlY3JldA=="):  # ann:secret, bob:secret
        assert get(headers={"Authorization": f"Basic {basic}"}) == (200, machine.SMALL)


def test_it_listens_by_itself_without_the_socket_unit(journal):
    """As the comment at the top of ktlsd.service says."""
    (machine.UNITS / "ktlsd.service.d/10-socket.conf").unlink()
    capability = "CAP_NET_BIND_SERVICE"
    override(f"AmbientCapabilities={capability}", f"CapabilityBoundingSet={capability}", "PrivateUsers=no")
    systemctl("start", "ktlsd.service")
    assert show("ActiveState", "ktlsd.socket") == "inactive"
    assert get() == (200, machine.SMALL)
    assert int(machine.status_of(main_pid())["CapBnd"], 16) == 1 << 10


def test_with_an_account_of_its_own_files_are_opened_by_openat2(journal):
    """As the comment at DynamicUser= says."""
    subprocess.run(["useradd", "--system", "ktlsd"], check=True)
    try:
        override("DynamicUser=no", "User=ktlsd", "RestrictSUIDSGID=no")
        systemctl("start", "ktlsd.service")
        assert get() == (200, machine.SMALL)
        assert "opened name by name" not in journal.text()
        systemctl("stop", "ktlsd.socket", "ktlsd.service")
    finally:
        subprocess.run(["userdel", "ktlsd"], check=True)


# --- when something hangs or dies -------------------------------------------------------------------------------------


def test_a_worker_that_hangs_is_replaced(journal):
    with machine.CONFIG.open("a") as config:
        config.write("[limits]\nstall_timeout = 10.0\n")
    systemctl("start", "ktlsd.service")
    pid, before = main_pid(), workers()
    victim = min(before)
    os.kill(victim, signal.SIGSTOP)
    wait_for("another worker", lambda: len(workers()) == 2 and victim not in workers())
    assert get() == (200, machine.SMALL)
    assert (main_pid(), show("NRestarts")) == (pid, "0")


def test_the_watchdog_leaves_a_supervisor_that_works_and_replaces_one_that_hangs(journal):
    override("WatchdogSec=4")
    systemctl("start", "ktlsd.service")
    pid, before, seen = main_pid(), workers(), show("WatchdogTimestampMonotonic")
    for _ in range(4):
        wait_for("a sign of life", lambda seen=seen: show("WatchdogTimestampMonotonic") != seen)
        seen = show("WatchdogTimestampMonotonic")
    assert (main_pid(), show("NRestarts")) == (pid, "0")
    os.kill(pid, signal.SIGSTOP)
    wait_for("another supervisor", lambda: show("SubState") == "running" and main_pid() not in (0, pid))
    assert show("NRestarts") == "1"
    assert not workers() & before
    assert get() == (200, machine.SMALL)
    assert "atchdog" in journal.text()


def test_a_supervisor_that_is_killed_takes_its_workers_along_and_is_started_again(service):
    pid, before = main_pid(), workers()
    os.kill(pid, signal.SIGKILL)
    wait_for("another supervisor", lambda: show("SubState") == "running" and main_pid() not in (0, pid))
    assert not workers() & before
    assert get() == (200, machine.SMALL)


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_stop_lets_a_download_end_and_exits_with_0(service):
    download = Download()
    systemctl("stop", "--no-block", "ktlsd.service")
    wait_for("it says that it stops", lambda: show("ActiveState") == "deactivating")
    download.finish()
    wait_for("it has stopped", lambda: show("ActiveState") == "inactive")
    assert (show("ExecMainCode"), show("ExecMainStatus"), show("Result")) == ("1", "0", "success")


def test_a_restart_fails_nobody_and_takes_a_renewed_certificate(service):
    fresh = pki.authority().issue_cert("localhost", "127.0.0.1")
    pem = fresh.cert_chain_pems[0].bytes().decode()
    files = [machine.CONFIG.parent / name for name in ("cert.pem", "key.pem")]
    kept = [file.read_bytes() for file in files]
    try:
        files[0].write_text(pem)
        files[1].write_bytes(fresh.private_key_pem.bytes())
        with short_requests() as came:
            wait_for("a request before it", lambda: came)
            systemctl("restart", "ktlsd.service")
            asked = len(came)
            wait_for("a request after it", lambda: len(came) > asked + 1)
        with machine.connect() as sock:
            assert ssl.DER_cert_to_PEM_cert(sock.getpeercert(binary_form=True)) == pem
    finally:
        for file, content in zip(files, kept, strict=True):
            file.write_bytes(content)
    assert came.count(True) == len(came), [each for each in came if each is not True]
