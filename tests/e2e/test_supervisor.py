"""Workers die, configurations and certificates change, the program is replaced: whoever is downloading doesn't notice."""

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import trustme

from ktlsd.server.auth import hash_password
from tests import pki
from tests.client import Client, wait_until
from tests.e2e.test_operating import basic
from tests.e2e.test_sites import write_pair
from tests.serving import program

CONTENT = os.urandom(1 << 20) * 20


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/small").write_bytes(b"small")
    (tmp_path / "root/big").write_bytes(CONTENT)
    pki.write(tmp_path)
    configure(tmp_path)
    return tmp_path


def configure(folder, more="", *, workers=2, metrics='"127.0.0.1:0"'):
    text = f"""
workers = {workers}
root = "root"
listen = ["127.0.0.1:0"]
[tls]
cert = "cert.pem"
key = "key.pem"
[ktls]
mode = "off"
[log]
access = "log"
[metrics]
listen = [{metrics}]
{more}
"""
    fresh = folder / "new.toml"
    fresh.write_text(text)
    fresh.rename(folder / "k.toml")


def fresh_pair(folder):
    """Another certificate of the same authority."""
    write_pair(folder, "key", "localhost", "127.0.0.1")
    (folder / "key.pem").rename(folder / "cert.pem")
    (folder / "key.key").rename(folder / "key.pem")


def started(folder):
    return program("--config", "k.toml", cwd=folder)


def told_metrics(server):
    line = next(line for line in server.told if "/metrics" in line)
    return line.split()[-1].removesuffix("/metrics")


def metric(server, name):
    """The sum of a metric over its labels, a moment after it can last have changed."""
    text = urllib.request.urlopen(told_metrics(server) + "/metrics", timeout=10).read().decode()
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith((name + " ", name + "{")))


def serving(server, count=2):
    """Wait until so many workers take connections."""
    wait_until(lambda: f'ktlsd_workers{{state="serving"}} {count}.0' in page(server), 20)


def page(server):
    try:
        return urllib.request.urlopen(told_metrics(server) + "/metrics", timeout=10).read().decode()
    except OSError:
        return ""


def said(server, text):
    return text in server.stderr.read_text()


class Load(threading.Thread):
    """Short requests, each on a connection of its own, and downloads; `failures` must stay empty."""

    def __init__(self, server, *, keep_alive=False):
        super().__init__(daemon=True)
        self.server = server
        self.keep_alive = keep_alive
        self.failures, self.count = [], 0
        self._over = threading.Event()

    def run(self):
        while not self._over.is_set():
            try:
                client = Client(self.server.port)
                for _ in range(3 if self.keep_alive else 1):
                    reply = client.get("/small")
                    if reply.body != b"small":
                        self.failures.append(reply)
                    self.count += 1
                    if reply.headers.get("connection") == "close":
                        break
                client.close()
            except (OSError, AssertionError) as exc:
                self.failures.append(exc)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self.join(30)


class Download:
    """A download in small pieces, that is still running when it is looked at."""

    def __init__(self, server):
        self.client = Client(server.port, receive_buffer=65_536)
        self.client.send(b"GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self.client.head()

    def finish(self):
        assert self.client.until(len(CONTENT)) == CONTENT
        self.client.close()


# --- workers --------------------------------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_is_replaced_and_its_counts_are_kept(folder):
    with started(folder) as server:
        serving(server)
        for _ in range(20):
            Client(server.port).get("/small")
        wait_until(lambda: metric(server, "ktlsd_requests_total") == 20)
        before = server.workers()
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: len(server.workers()) == 2 and before[0] not in server.workers())
        serving(server)
        for _ in range(8):
            assert Client(server.port).get("/small").status == 200
        wait_until(lambda: metric(server, "ktlsd_requests_total") == 28)
        assert metric(server, "ktlsd_worker_deaths_total") == 1
        assert said(server, "ended with SIGKILL; a new one is started at once")
        assert server.stop() == 0


def test_workers_that_die_again_and_again_are_not_forked_in_a_storm(folder):
    with started(folder) as server:
        serving(server)
        for _ in range(4):
            pids = server.workers()
            os.kill(pids[0], signal.SIGKILL)
            wait_until(lambda gone=pids[0]: len(server.workers()) == 2 and gone not in server.workers(), 30)
        assert said(server, "a new one is started in 0.5 seconds")
        assert said(server, "a new one is started in 1 seconds")
        assert Client(server.port).get("/small").status == 200
        assert server.stop() == 0


def test_a_supervisor_that_dies_ends_its_workers_when_they_have_finished(folder):
    with started(folder) as server:
        serving(server)
        workers = server.workers()
        download = Download(server)
        server.process.kill()
        server.process.wait()
        time.sleep(0.2)
        download.finish()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 20)
        assert said(server, "the supervisor is gone")
        with pytest.raises(ConnectionRefusedError):
            Client(server.port)


def test_a_worker_that_is_stuck_is_killed_and_the_others_take_new_clients_meanwhile(folder):
    configure(folder, "[limits]\nstall_timeout = 3.0")
    with started(folder) as server:
        serving(server)
        stuck = server.workers()[0]
        os.kill(stuck, signal.SIGSTOP)
        answers = 0
        for _ in range(10):
            answers += Client(server.port).get("/small").status == 200
        assert answers == 10
        wait_until(lambda: stuck not in server.workers(), 20)
        assert said(server, f"worker {stuck} shows no sign of life for 3 seconds: killed")
        serving(server)
        assert metric(server, "ktlsd_worker_stalls_total") == 1
        assert server.stop() == 0


def test_connections_are_shared_between_workers(folder):
    with started(folder) as server:
        serving(server)
        clients = []
        for _ in range(60):
            clients.append(Client(server.port))
            clients[-1].get("/small")
        counts = [sum("socket:" in os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
                  for pid in server.workers()]  # fmt: skip
        assert min(counts) >= 20, counts
        for client in clients:
            client.close()
        assert server.stop() == 0


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_sessions_are_resumed_by_any_worker(folder, version):
    with started(folder) as server:
        serving(server)
        context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        context.maximum_version = ssl.TLSVersion.TLSv1_2 if version == "1.2" else ssl.TLSVersion.TLSv1_3
        session, resumed, held = None, [], []
        for _ in range(30):  # held open, so that both workers get some
            sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            tls = context.wrap_socket(sock, server_hostname="localhost", session=session)
            tls.sendall(b"GET /small HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while not tls.recv(65_536).endswith(b"small"):
                pass
            resumed.append(tls.session_reused)
            session = session or tls.session
            held.append(tls)
        assert resumed == [False] + [True] * 29
        for tls in held:
            tls.close()
        assert server.stop() == 0


# --- reload ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_alive", [False, True])
def test_no_request_fails_while_the_configuration_is_reloaded_again_and_again(folder, keep_alive):
    with started(folder) as server:
        serving(server)
        first = server.workers()
        download = Download(server)
        idle = Client(server.port)
        idle.get("/small")
        with Load(server, keep_alive=keep_alive) as load:
            for number in range(5):
                configure(folder, f'[files]\ncache_control = "max-age={number}"')
                server.process.send_signal(signal.SIGHUP)
                time.sleep(0.1)
            wait_until(lambda: Client(server.port).get("/small").headers.get("cache-control") == "max-age=4", 20)
            answered = load.count
            wait_until(lambda: load.count > answered + 20, 20)
        assert load.failures == []
        assert idle.get("/small").headers["connection"] == "close", "it may ask once more, and is told that this was it"
        idle.close()
        download.finish()
        wait_until(lambda: not set(first) & set(server.workers()), 20)
        wait_until(lambda: len(server.workers()) == 2, 20)
        assert server.stop() == 0
        entries = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
        assert all(entry["complete"] for entry in entries)


def test_a_bad_configuration_changes_nothing_and_says_why(folder):
    with started(folder) as server:
        serving(server)
        workers = server.workers()
        for text, why in (
            ("[limits]\nidle = 1", "unknown field `idle`"),
            ("x = [", "not TOML"),
            ("[log2]", "unknown field `log2`"),
        ):
            configure(folder, text)
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda why=why: said(server, why))
        (folder / "k.toml").unlink()
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: said(server, "k.toml: cannot be read: No such file or directory. The old configuration stays"))
        assert server.workers() == workers
        wait_until(lambda: metric(server, "ktlsd_reloads_refused_total") == 4, 15)
        assert Client(server.port).get("/small").status == 200
        assert server.stop() == 0


def test_a_port_in_use_refuses_the_reload(folder):
    with started(folder) as server, socket.create_server(("127.0.0.1", 0)) as taken:
        serving(server)
        configure(folder, f'[[http]]\nlisten = ["127.0.0.1:{taken.getsockname()[1]}"]')
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: said(server, "Address already in use"))
        killed = server.workers()[0]
        os.kill(killed, signal.SIGKILL)  # who comes after it needs the sockets, too
        wait_until(lambda: len(server.workers()) == 2 and killed not in server.workers())
        serving(server)
        assert Client(server.port).get("/small").status == 200
        server.process.send_signal(signal.SIGUSR2)  # the same is no good for an upgrade
        wait_until(lambda: said(server, "the new program would not start"), 30)
        taken.close()
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: said(server, "generation 2 serves"))
        assert Client(server.port).get("/small").status == 200
        assert server.stop() == 0


def test_addresses_come_and_go_with_a_reload(folder):
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        first, second = one.getsockname()[1], two.getsockname()[1]
    plain = '[[http]]\nlisten = ["127.0.0.1:%d"]\naction = "serve"'
    configure(folder, plain % first)
    with started(folder) as server:
        serving(server)
        assert urllib.request.urlopen(f"http://127.0.0.1:{first}/small", timeout=10).read() == b"small"
        download = Download(server)
        configure(folder, plain % second)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: said(server, "generation 2 serves"))
        assert urllib.request.urlopen(f"http://127.0.0.1:{second}/small", timeout=10).read() == b"small"
        wait_until(lambda: refused(first), 10)
        download.finish()
        assert server.stop() == 0


def refused(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_the_number_of_workers_changes_with_a_reload(folder):
    with started(folder) as server:
        serving(server)
        for count in (3, 1):
            configure(folder, workers=count)
            server.process.send_signal(signal.SIGHUP)
            serving(server, count)
            wait_until(lambda count=count: len(server.workers()) == count)
        assert Client(server.port).get("/small").status == 200
        assert server.stop() == 0


def test_sessions_are_resumed_after_a_reload_with_another_certificate(folder):
    with started(folder) as server:
        serving(server)
        context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        context.maximum_version = ssl.TLSVersion.TLSv1_2

        def handshake(session=None):
            sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            with context.wrap_socket(sock, server_hostname="localhost", session=session) as tls:
                return tls.session, tls.session_reused

        session, _ = handshake()
        before = serial(server.port)
        fresh_pair(folder)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: said(server, "generation 2 serves"))
        wait_until(lambda: serial(server.port) != before)
        wait_until(lambda: len(server.workers()) == 2)  # those that leave have heard of it
        assert handshake(session)[1]
        assert not handshake()[1]
        assert server.stop() == 0


# --- certificates ---------------------------------------------------------------------------------------------------------


def serial(port):
    return ssl.get_server_certificate(("127.0.0.1", port))


def test_a_renewed_certificate_is_served_without_being_told_and_half_a_pair_is_not(folder):
    with started(folder) as server:
        serving(server)
        workers, first = server.workers(), serial(server.port)
        download = Download(server)
        other = folder / "other"
        other.mkdir()
        fresh_pair(other)
        (other / "cert.pem").rename(folder / "cert.pem")
        wait_until(lambda: said(server, "does not belong to certificate"))
        assert serial(server.port) == first
        (other / "key.pem").rename(folder / "key.pem")
        wait_until(lambda: serial(server.port) != first)
        wait_until(lambda: first not in {serial(server.port) for _ in range(10)})
        assert server.workers() == workers
        os.kill(workers[0], signal.SIGKILL)  # its successor has the new one too
        wait_until(lambda: len(server.workers()) == 2 and workers[0] not in server.workers())
        serving(server)
        os.kill(workers[1], signal.SIGSTOP)
        assert serial(server.port) != first
        os.kill(workers[1], signal.SIGCONT)
        del download
        assert server.stop() == 0


def test_a_certificate_behind_a_link_that_is_switched(folder):
    """As certbot and Kubernetes do it: a new folder, and a link that is moved."""
    for name in ("one", "two"):
        (folder / name).mkdir()
        fresh_pair(folder / name)
    (folder / "live").symlink_to("one")
    text = (folder / "k.toml").read_text().replace('"cert.pem"', '"live/cert.pem"').replace('"key.pem"', '"live/key.pem"')
    (folder / "k.toml").write_text(text)
    with started(folder) as server:
        serving(server)
        first = serial(server.port)
        (folder / "fresh").symlink_to("two")
        (folder / "fresh").rename(folder / "live")
        wait_until(lambda: serial(server.port) != first)
        assert server.stop() == 0


# --- upgrade --------------------------------------------------------------------------------------------------------------


def test_another_program_takes_over_in_the_same_process_and_nothing_is_dropped(folder):
    with started(folder) as server:
        serving(server)
        first, pid = server.workers(), server.process.pid
        for _ in range(5):
            Client(server.port).get("/small")
        wait_until(lambda: metric(server, "ktlsd_requests_total") == 5)
        download = Download(server)
        with Load(server) as load:
            server.process.send_signal(signal.SIGUSR2)
            wait_until(lambda: len(set(server.workers()) - set(first)) == 2, 30)
            answered = load.count
            wait_until(lambda: load.count > answered + 20, 20)
        assert load.failures == []
        download.finish()
        wait_until(lambda: not set(first) & set(server.workers()), 20)
        assert server.process.pid == pid
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGUSR2)  # and once more
        second = server.workers()
        wait_until(lambda: len(server.workers()) == 2 and not set(second) & set(server.workers()), 30)
        assert Client(server.port).get("/small").status == 200
        assert server.stop() == 0


def test_a_program_that_would_not_start_does_not_take_over(folder):
    with started(folder) as server:
        serving(server)
        workers = server.workers()
        configure(folder, "broken = 1")
        server.process.send_signal(signal.SIGUSR2)
        wait_until(lambda: said(server, "the new program would not start"), 30)
        assert server.workers() == workers
        assert Client(server.port).get("/small").status == 200
        assert server.stop() == 0


# --- sockets from systemd, and its watch ----------------------------------------------------------------------------------


def test_sockets_that_systemd_opened_are_used_and_it_is_told(folder):
    notify = folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, socket.create_server(("127.0.0.1", 0)) as listening:
        manager.bind(str(notify))
        manager.settimeout(20)
        code = (
            "import os, sys\nos.dup2(int(sys.argv[1]), 3)\nos.environ['LISTEN_PID'] = str(os.getpid())\n"
            "os.execv(sys.executable, [sys.executable, '-m', 'ktlsd', 'serve', *sys.argv[2:]])"
        )
        fd = os.dup(listening.fileno())
        os.set_inheritable(fd, True)
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(fd), "--config", "k.toml"], cwd=folder, pass_fds=[fd],
            env={**os.environ, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "https", "NOTIFY_SOCKET": str(notify),
                 "WATCHDOG_USEC": "500000"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        os.close(fd)
        port = listening.getsockname()[1]
        listening.close()

        def hear(text):
            while True:
                message = manager.recv(4096).decode()
                if text in message:
                    return message

        try:
            assert "STATUS=Generation 1: 2 workers" in hear("READY=1")
            assert Client(port).get("/small").status == 200
            for _ in range(3):
                hear("WATCHDOG=1")
            process.send_signal(signal.SIGHUP)
            assert "MONOTONIC_USEC=" in hear("RELOADING=1")
            assert "Generation 2" in hear("READY=1")
            process.send_signal(signal.SIGUSR2)
            hear("READY=1")
            assert Client(port).get("/small").status == 200
            process.send_signal(signal.SIGTERM)
            hear("STOPPING=1")
            assert process.wait(20) == 0
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()


def test_the_worker_does_not_begin_to_serve_what_it_can_not(folder):
    """A worker that can't start ends the program, at the first start, and says why."""
    env = {**os.environ, "PYTHONPATH": str(folder)}
    (folder / "sitecustomize.py").write_text(
        "import ktlsd.server.sandbox as s\n"
        "def preload(): raise RuntimeError('as if something were missing')\n"
        "s.preload = preload\n"
    )
    command = [sys.executable, "-m", "ktlsd", "serve", "--config", "k.toml"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "a worker ended with status 1 before it could serve" in done.stderr


# --- probes ---------------------------------------------------------------------------------------------------------------


def test_probes_and_metrics_are_answered_beside_the_files(folder):
    with started(folder) as server:
        serving(server)
        base = told_metrics(server)
        assert urllib.request.urlopen(base + "/healthz", timeout=10).read() == b"ok\n"
        assert urllib.request.urlopen(base + "/readyz", timeout=10).read() == b"ok\n"
        with pytest.raises(urllib.error.HTTPError) as refused_:
            urllib.request.urlopen(base + "/", timeout=10)
        assert refused_.value.code == 404
        assert metric(server, "ktlsd_certificate_expiry_seconds") > time.time()
        assert metric(server, "ktlsd_requests_total") == 0, "who asks for metrics is not counted"
        assert server.stop() == 0


# --- what a worker may do -------------------------------------------------------------------------------------------------


def status_of(pid):
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_workers_become_another_user_who_need_not_reach_the_root_by_its_path(folder):
    """The way to it is root's alone; key and log, too."""
    folder.chmod(0o700)
    configure(folder, '[process]\nuser = "nobody"')
    with started(folder) as server:
        serving(server)
        assert {status_of(pid)["Uid"].split()[0] for pid in server.workers()} == {"65534"}
        assert status_of(server.process.pid)["Uid"].split()[0] == "0"
        assert "as nobody" in "".join(server.told)
        client = Client(server.port)
        assert client.get("/big").body == CONTENT
        (folder / "root/late").write_bytes(b"late")
        assert client.get("/late").body == b"late"
        (folder / "root/closed").write_bytes(b"closed")
        (folder / "root/closed").chmod(0o600)
        assert client.get("/closed").status == 403
        client.close()
        fresh_pair(folder)  # which they may not read: the supervisor hands it to them
        wait_until(lambda: said(server, "renewed"))
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: said(server, "generation 2 serves"))
        assert Client(server.port).get("/small").status == 200
        server.process.send_signal(signal.SIGUSR1)
        assert server.stop() == 0
        assert "bug" not in server.stderr.read_text()


def test_workers_gain_no_privileges_and_the_start_up_lines_say_what_they_can_not_do(folder):
    with started(folder) as server:
        serving(server)
        assert {status_of(pid)["NoNewPrivs"] for pid in server.workers()} == {"1"}
        line = next(line for line in server.told if "processes" in line)
        assert "2 workers" in line
        assert "Landlock" in line
        assert server.stop() == 0
    configure(folder, "[process]\nsandbox = false")
    with started(folder) as server:
        assert "without a sandbox" in next(line for line in server.told if "processes" in line)
        assert server.stop() == 0


def test_a_password_file_that_is_replaced_is_read_from_inside_the_sandbox(folder):
    (folder / "users").write_text(f"anna:{hash_password('a')}\n")
    configure(folder, '[[rule]]\npath = "/big"\nauth = "users"', workers=1)
    with started(folder) as server:
        serving(server, 1)
        client = Client(server.port)
        assert client.get("/big", Authorization=basic("anna", "a")).status == 200
        (folder / "new").write_text(f"bert:{hash_password('b')}\n# longer\n")
        (folder / "new").rename(folder / "users")
        wait_until(lambda: client.get("/big", Authorization=basic("bert", "b")).status == 200, 20)
        assert server.stop() == 0


def test_no_counter_goes_back_whatever_happens_to_the_workers(folder):
    with started(folder) as server:
        serving(server)
        seen, over = [], threading.Event()

        def watch():
            while not over.is_set():
                with contextlib.suppress(OSError):  # the worker that is killed may be the one that was asked
                    seen.append(metric(server, "ktlsd_requests_total"))

        watching = threading.Thread(target=watch)
        for _ in range(20):
            Client(server.port).get("/small")
        wait_until(lambda: metric(server, "ktlsd_requests_total") == 20)
        watching.start()
        try:
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: said(server, "generation 2 serves"), 20)
            serving(server)
            first = server.workers()
            server.process.send_signal(signal.SIGUSR2)
            wait_until(lambda: len(server.workers()) == 2 and not set(first) & set(server.workers()), 30)
            serving(server)
            os.kill(server.workers()[0], signal.SIGKILL)
            wait_until(lambda: said(server, "ended with SIGKILL"))
            serving(server)
        finally:
            over.set()
            watching.join(20)
        assert seen == [20.0] * len(seen)
        assert len(seen) > 20
        assert metric(server, "ktlsd_upgrades_total") == 1
        assert server.stop() == 0


# --- what a review found --------------------------------------------------------------------------------------------------


def test_a_worker_whose_successors_can_not_start_is_not_given_up(folder):
    """Somebody has served: it may get better."""
    configure(folder, workers=1)
    (folder / "sitecustomize.py").write_text(
        "import os, ktlsd.server.sandbox as s\n"
        "real = s.preload\n"
        "def preload():\n"
        "    if os.path.exists('broken'): raise RuntimeError('as if something were missing')\n"
        "    real()\n"
        "s.preload = preload\n"
    )
    with program("--config", "k.toml", cwd=folder, env={"PYTHONPATH": str(folder)}) as server:
        serving(server, 1)
        (folder / "broken").touch()
        os.kill(server.workers()[0], signal.SIGKILL)
        wait_until(lambda: said(server, "ended with status 1; a new one is started in"))
        (folder / "broken").unlink()
        wait_until(lambda: page(server), 30)
        assert Client(server.port).get("/small").status == 200
        assert server.stop() == 0


def test_a_certificate_renewed_together_with_a_reload_is_served_by_the_new_workers(folder):
    with started(folder) as server:
        serving(server)
        for _ in range(3):
            before, said_before = serial(server.port), server.stderr.read_text().count("serves")
            server.process.send_signal(signal.SIGHUP)
            time.sleep(0.05)
            fresh_pair(folder)
            wait_until(lambda n=said_before: server.stderr.read_text().count("serves") > n)
            wait_until(lambda b=before: b not in {serial(server.port) for _ in range(10)})
        assert server.stop() == 0


def test_workers_that_leave_write_to_the_log_that_others_write_to(folder):
    with started(folder) as server:
        serving(server)
        download = Download(server)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: said(server, "generation 2 serves"))
        (folder / "log").rename(folder / "log.1")
        server.process.send_signal(signal.SIGUSR1)
        wait_until((folder / "log").exists)
        time.sleep(0.3)
        download.finish()
        wait_until(lambda: '"/big"' in (folder / "log").read_text())
        assert server.stop() == 0


def test_new_workers_hold_nothing_of_the_old_configuration(folder):
    (folder / "other").mkdir()
    with started(folder) as server:
        serving(server)
        first = server.workers()
        text = (
            (folder / "k.toml")
            .read_text()
            .replace('root = "root"', 'root = "other"')
            .replace('access = "log"', 'access = "log2"')
        )
        (folder / "k.toml").write_text(text)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: len(server.workers()) == 2 and not set(first) & set(server.workers()), 20)
        for pid in (*server.workers(), server.process.pid):
            held = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
            assert str(folder / "other") in held
            assert not held & {str(folder / "root"), str(folder / "log")}
        assert server.stop() == 0


def test_a_reload_asked_for_during_one_that_fails_is_carried_out(folder):
    (folder / "sitecustomize.py").write_text(
        "import os, ktlsd.server.sandbox as s\n"
        "real = s.preload\n"
        "def preload():\n"
        "    if os.path.exists('broken'):\n"
        "        os.unlink('broken')\n"
        "        raise RuntimeError('once')\n"
        "    real()\n"
        "s.preload = preload\n"
    )
    with program("--config", "k.toml", cwd=folder, env={"PYTHONPATH": str(folder)}) as server:
        serving(server)
        (folder / "broken").touch()
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: not (folder / "broken").exists())
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: said(server, "before it could serve") or said(server, "serves"), 20)
        wait_until(lambda: said(server, "generation 2 serves"), 20)
        assert Client(server.port).get("/small").status == 200
        assert server.stop() == 0


def test_a_certificate_with_another_kind_of_key_takes_the_old_one_s_place(folder):
    """OpenSSL would keep both, and give old clients the one that runs out."""
    leaf = pki.authority().issue_cert("localhost", "127.0.0.1", key_type=trustme.KeyType.RSA)
    with started(folder) as server:
        serving(server)
        first = serial(server.port)
        (folder / "new.pem").write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
        leaf.private_key_pem.write_to_path(str(folder / "new.key"))
        (folder / "new.pem").rename(folder / "cert.pem")
        (folder / "new.key").rename(folder / "key.pem")
        wait_until(lambda: said(server, "another kind of key"))
        wait_until(lambda: first not in {serial(server.port) for _ in range(5)}, 20)
        only_ecdsa = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        only_ecdsa.maximum_version = ssl.TLSVersion.TLSv1_2
        only_ecdsa.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256")
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock, pytest.raises(ssl.SSLError):
            only_ecdsa.wrap_socket(sock, server_hostname="localhost")
        assert server.stop() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("what", ["root", "auth"])
def test_what_the_workers_user_may_not_read_is_told_before_it_matters(folder, what):
    (folder / "users").write_text(f"anna:{hash_password('a')}\n")
    configure(folder, '[process]\nuser = "nobody"\n[[rule]]\npath = "/big"\nauth = "users"')
    folder.chmod(0o755)
    for parent in list(folder.parents)[:3]:
        parent.chmod(parent.stat().st_mode | 0o011)
    (folder / ("root" if what == "root" else "users")).chmod(0o700 if what == "root" else 0o600)
    for command in (["check", "k.toml"], ["serve", "--config", "k.toml"]):
        arguments = [sys.executable, "-m", "ktlsd", *command]
        done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=30, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "nobody (process.user) may not read it" in done.stderr


def test_signatures_are_not_in_the_log(folder):
    with started(folder) as server:
        Client(server.port).get("/small?expires=1&signature=abcdef&x=y")
        wait_until(lambda: "/small" in (folder / "log").read_text())
        assert "/small?expires=1&signature=-&x=y" in (folder / "log").read_text()
        assert server.stop() == 0
