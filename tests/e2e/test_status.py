"""`ktlsd status` against a running server, against nobody, and against others: what it prints and its exit status."""

import http.server
import json
import socket
import subprocess
import threading
from contextlib import contextmanager

import pytest

from ktlsd import cli, status
from ktlsd.errors import StartError
from tests import pki
from tests.client import Client, wait_until
from tests.e2e.test_program import ktlsd
from tests.e2e.test_supervisor import configure, metric, serving, started, told_metrics


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/small").write_bytes(b"small")
    pki.write(tmp_path)
    configure(tmp_path)
    return tmp_path


@contextmanager
def answering(body, code=200, headers=()):
    """Another server than ktlsd, that answers this to everything; its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(code)
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            try:
                self.wfile.write(body)
            except OSError:
                pass  # it has heard enough

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def refused(done, code):
    """One line that is fit for a terminal."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("ktlsd: ")
    assert done.stderr.count("\n") == 1
    assert done.stderr.rstrip("\n").isprintable()
    return done.stderr


def test_a_running_server_is_told_about(folder):
    with started(folder) as server:
        serving(server)
        for _ in range(3):
            Client(server.port).get("/small")
        Client(server.port).get("/missing")
        wait_until(lambda: metric(server, "ktlsd_responses_total") == 4)
        url = told_metrics(server)
        done = ktlsd("status", "--url", url, cwd=folder)
        assert (done.returncode, done.stderr) == (0, "")
        assert max(map(len, done.stdout.splitlines())) <= 80
        assert done.stdout.startswith("ktlsd ")
        for line in (
            "  workers      2 serving; generation 1\n",
            "  encryption   in userspace (switched off): everything\n",
            "  requests     0 now, 4 since the start; answers: 3 2xx, 1 4xx\n",
            "  handshakes   4 full, 0 resumed (0.0 %)\n",
        ):
            assert line in done.stdout
        assert f"renew it: {folder}" not in done.stdout
        assert "days left, until" in done.stdout
        facts = json.loads(ktlsd("status", "--url", url, "--json", cwd=folder).stdout)
        assert (facts["workers"], facts["counts"]["requests"]) == ({"serving": 2}, 4)
        assert facts["reasons"]["body_bytes"].keys() == {"userspace"}
        assert server.stop() == 0
    assert "Connection refused" in refused(ktlsd("status", "--url", url, cwd=folder), 1)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", ""])
def test_the_configuration_says_where_to_ask(folder, host):
    with started(folder) as server:
        serving(server)
        port = told_metrics(server).rpartition(":")[2]
        (folder / "asked.toml").write_text(f'[metrics]\nlisten = ["{host}:{port}", "127.0.0.1:1"]\n')
        done = ktlsd("status", "--config", "asked.toml", cwd=folder, env={"http_proxy": "http://127.0.0.1:1"})
        assert (done.returncode, done.stderr) == (0, "")
        assert "2 serving" in done.stdout
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "Give --config FILE or --url"),
        (["--config", "k.toml"], "k.toml: metrics.listen: port 0 is any free one; give --url"),
        (["--config", "none.toml"], "none.toml: there is no metrics.listen; add it and reload ktlsd, or give --url"),
        (["--config", "bad.toml"], "bad.toml: metrics.listen: 'nonsense' is not HOST:PORT"),
        (["--config", "missing.toml"], "missing.toml: cannot be read"),
        (["--url", "https://localhost:9100"], "the metrics listener has no TLS"),
        (["--url", "file:///etc/passwd"], "is not http://HOST:PORT"),
        (["--url", ":9100"], "is not http://HOST:PORT"),
        (["--url", "http://user:password@localhost:9100"], "is not http://HOST:PORT"),
        (["--url", "http://localhost:x"], "is not http://HOST:PORT"),
        (["--url", "http://[::1"], "is not http://HOST:PORT"),
        (["--url", "http://a\x1b[31m:1"], "is not http://HOST:PORT"),
    ],
)
def test_misuse_ends_with_2_and_says_what_to_do(folder, monkeypatch, capsys, args, says):
    (folder / "none.toml").write_text("")
    (folder / "bad.toml").write_text('[metrics]\nlisten = ["nonsense"]\n')
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        cli.main(["status", *args])
    done = subprocess.CompletedProcess(args, ended.value.code, *capsys.readouterr())
    assert says in refused(done, 2)


def test_nobody_answers(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        port = free.getsockname()[1]
        said = refused(ktlsd("status", "--url", f"127.0.0.1:{port}", cwd=folder), 1)
    assert f"http://127.0.0.1:{port}/metrics: Connection refused; start ktlsd" in said
    said = refused(ktlsd("status", "--url", "http://no.such.host.invalid:1", cwd=folder), 1)
    assert "http://no.such.host.invalid:1/metrics: " in said


def test_the_port_of_the_files_is_not_that_of_the_metrics(folder):
    with started(folder) as server:
        assert "not the metrics of a ktlsd" in refused(ktlsd("status", "--url", f"localhost:{server.port}", cwd=folder), 1)
        said = refused(ktlsd("status", "--url", told_metrics(server) + "/healthz", cwd=folder), 1)
        assert "not in Prometheus' format" in said
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("body", "code", "headers", "says"),
    [
        (b"go_goroutines 7\n", 200, [], "there is no ktlsd_build_info in it"),
        (b"\x1b]0;owned\x07 1\n", 200, [], "not in Prometheus' format"),
        (b"", 200, [], "there is no ktlsd_build_info in it"),
        (b"# " + bytes(2 << 20), 200, [], "longer than 1.0 MiB"),
        (b"#\n" * (1 << 20), 200, [], "longer than 1.0 MiB"),
        (b"no", 404, [], "status 404"),
        (b"", 302, [("Location", "file:///etc/passwd")], "status 302"),
        (b"few", 200, [("Content-Length", "1000")], "it breaks off"),
        (b"few", 200, [("Transfer-Encoding", "chunked")], "it speaks no HTTP"),
    ],
)
def test_others_are_told_apart(body, code, headers, says):
    with answering(body, code, headers) as url, pytest.raises(StartError, match=says):
        status.parse(status.fetch(url + "/metrics"), url)


@pytest.mark.parametrize(
    "talk", [b"", b"220 mail ESMTP\r\n", b"\x15\x03\x03\x00\x02\x02\x46", b"HTTP/1.1 200\r\n" + b"a: b\r\n" * 200]
)
def test_what_speaks_something_else_is_told_apart(talk):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def speak():
            peer, _ = server.accept()
            with peer:
                peer.recv(1 << 16)
                peer.sendall(talk)

        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/metrics"
        with pytest.raises(StartError) as told:
            status.fetch(url)
        thread.join()
    assert str(told.value).startswith(url)
    assert str(told.value).isprintable()


def test_who_never_ends_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(status, "_TIMEOUT", 0.3)
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip():
            peer, _ = server.accept()
            with peer:
                peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                while not over.wait(0.02):
                    try:
                        peer.send(b"# a\n")
                    except OSError:
                        return

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        with pytest.raises(StartError, match="no answer in time"):
            status.fetch(f"http://127.0.0.1:{server.getsockname()[1]}/metrics")
        over.set()
        thread.join()


def test_who_says_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(status, "_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(StartError, match="no answer in time"):
        status.fetch(f"http://127.0.0.1:{server.getsockname()[1]}/metrics")
