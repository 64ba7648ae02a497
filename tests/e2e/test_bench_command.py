"""`ktlsd bench` on the command line: what it refuses before it measures, and what it shows of what was measured."""

import json
import os
import re
import sys

import msgspec
import pytest

from ktlsd.bench.result import SCHEMA, Load, Machine, Result, Sample, Subject
from tests.e2e.test_program import ktlsd


def sample(name, number, seconds):
    subject = Subject(name, "userspace", "http/1.1", "TLSv1.3")
    return Sample(subject, Load(1 << 20), number, seconds, 1 << 20, 1, 0.01, 0.01, 10, 10, 0, 1 << 20)


def result(path, *, factor=1.0, schema=SCHEMA):
    machine = Machine("Linux", "a processor", 2, 1 << 30, "", {}, "3.11", "OpenSSL 3", "0.1.0")
    samples = [sample(name, number, 0.1 * factor) for number in range(9) for name in ("ktlsd", "nginx")]
    path.write_bytes(msgspec.json.encode(Result(schema, "2026-11-21T00:00:00Z", ["ktlsd", "bench"], machine, samples)))
    return str(path)


@pytest.mark.parametrize(("arguments", "says"), [
    (["--against", "iis"], "'iis' is no server that can be measured; there are nginx, "),
    (["--print-config", "iis"], "'iis' is no server that can be measured"),
    (["--size", "10x"], "--size: '10x' is no size like 4096, 10k, 256M or 1G"),
    (["--size", "0"], "--size: '0' is no size"),
    (["--json", "no/such/folder/a.json"], "there is no such folder; create it"),
    (["--from", "nothing.json"], "nothing.json: cannot be read"),
    (["--from", "b.json"], "b.json: is no result of ktlsd bench --json"),
    (["--markdown", "no/such/folder/a.md"], "there is no such folder; create it"),
    (["--compare", "a.json", "nothing.json"], "nothing.json: cannot be read"),
    (["--compare", "a.json", "b.json"], "b.json: is no result of ktlsd bench --json"),
    (["--compare", "a.json", "c.json"], "c.json: was written by another version"),
])  # fmt: skip
def test_misuse_is_told_before_a_minute_is_spent(tmp_path, arguments, says):
    result(tmp_path / "a.json")
    (tmp_path / "b.json").write_text(json.dumps({"hello": 1}))
    result(tmp_path / "c.json", schema=99)
    done = ktlsd("bench", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
    assert says in done.stderr


CRIPPLED = """\
#!{python}
import re, socket, ssl, sys
if "-v" in sys.argv:
    sys.exit("nginx version: nginx/1.30.0")
told = open(sys.argv[sys.argv.index("-c") + 1]).read()
host, port = re.search(r"listen ([^:]+):(\\d+)", told).groups()
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(*re.findall(r"ssl_certificate(?:_key)? (\\S+);", told))
listener = socket.create_server((host, int(port)))
while True:
    try:
        with context.wrap_socket(listener.accept()[0], server_side=True) as tls:
            tls.recv(9999)
            tls.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 100000\\r\\n\\r\\n" + bytes(100_000))
            tls.unwrap()
    except OSError:
        pass
"""


def test_a_peer_that_sends_wrong_bytes_fails_the_run(tmp_path):
    program = tmp_path / "nginx"
    program.write_text(CRIPPLED.format(python=sys.executable))
    program.chmod(0o755)
    arguments = ["--quick", "--rounds", "1", "--size", "100000", "--protocol", "http/1.1", "--against", "nginx"]
    done = ktlsd("bench", *arguments, cwd=tmp_path, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.returncode == 1
    assert "nginx: its 100000 bytes are not the file's" in done.stderr
    assert "Failed:\n  - nginx, " in done.stdout
    assert re.search(r"^ktlsd +user", done.stdout, re.MULTILINE), "the rest is measured"


def test_two_results_are_compared(tmp_path):
    result(tmp_path / "a.json")
    result(tmp_path / "b.json", factor=2.0)
    done = ktlsd("bench", "--compare", "a.json", "b.json", cwd=tmp_path)
    assert done.returncode == 0
    assert "0.5" in done.stdout


def test_a_peer_s_configuration_can_be_looked_at(tmp_path):
    done = ktlsd("bench", "--print-config", "nginx", cwd=tmp_path)
    assert done.returncode == 0
    assert "sendfile on;" in done.stdout


def test_a_saved_result_is_shown_again_and_as_tables_for_a_document(tmp_path):
    saved = result(tmp_path / "a.json")
    shown = ktlsd("bench", "--from", saved, "--html", "a.html", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "ktlsd" in shown.stdout
    assert "<svg" in (tmp_path / "a.html").read_text()
    document = ktlsd("bench", "--from", saved, "--markdown", "-", cwd=tmp_path).stdout
    assert document.startswith("2026-11-21; Linux, a processor.\n")
    head, rule, *rows = [line for line in document.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in (head, rule, *rows)} == {8}
    assert [row.split("|")[1].strip() for row in rows] == ["ktlsd", "nginx"]
    assert "10.5" in rows[0], "MB/s: 1 MiB in a tenth of a second"
    assert "1.00 (1.00 to 1.00), can't be told" in rows[1]
