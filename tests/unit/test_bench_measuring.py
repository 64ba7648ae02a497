"""The measuring half of `ktlsd bench` can't be fooled: crippled servers show as failures, every way sends the whole file."""

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
from hpack import Decoder, Encoder

from ktlsd.bench import (
    answers,
    calibration,
    client,
    command,
    conditions,
    connection,
    contest,
    machine,
    network,
    peers,
    plan,
    run,
    usage,
    ways,
)
from ktlsd.bench.answers import Http1Answer, Http2Answer, Http2Counter, NotMeasurable, Payload, WrongAnswer
from ktlsd.bench.client import Loop, Volley
from ktlsd.bench.connection import Ask
from ktlsd.bench.plan import KIB, MIB, Options
from ktlsd.bench.result import Load, Subject
from ktlsd.bench.servers import Place
from ktlsd.bench.usage import Usage
from ktlsd.errors import SettingsError
from tests import pki
from tests.conftest import kernel_has_tls

CONTENT = os.urandom(200_003)
PAYLOAD = Payload(Path("/nowhere"), "file", len(CONTENT), hashlib.sha256(CONTENT).digest())
CERTIFICATE = "cert.pem", "key.pem"


# --- parsers ---


def http1(body=CONTENT, length=None):
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX: y\r\n\r\n" % (len(CONTENT) if length is None else length) + body


def http2(body=CONTENT, streams=1, status="200", step=16_384):
    encoder, out = Encoder(), b""
    for number in range(streams):
        out += answers.frame(1, 4, 2 * number + 1, encoder.encode([(":status", status), ("content-length", str(len(body)))]))
    for at in range(0, len(body), step):
        last = at + step >= len(body)
        out += b"".join(answers.frame(0, int(last), 2 * number + 1, body[at : at + step]) for number in range(streams))
    return out


@pytest.mark.parametrize("step", [1 << 30, 1_000, 7])
def test_an_http1_answer_is_the_same_in_any_pieces(step):
    answer, wire = Http1Answer(PAYLOAD), http1()
    for at in range(0, len(wire), step):
        assert not answer.done
        answer.feed(wire[at : at + step])
    assert answer.done
    assert answer.plain == answer.least == len(wire)
    answer.check()


@pytest.mark.parametrize("step", [1 << 30, 1_000, 7])
def test_an_http2_answer_is_the_same_in_any_pieces(step):
    answer, wire = Http2Answer(PAYLOAD, 2, decoder=Decoder()), http2(streams=2, step=8_000)
    counter, ended = Http2Counter(len(CONTENT), 2), False
    for at in range(0, len(wire), step):
        assert not answer.done
        answer.feed(wire[at : at + step])
        ended = counter.feed(wire[at : at + step])
    assert answer.done
    assert ended
    assert counter.body == answer.body == 2 * len(CONTENT)
    assert answer.least == len(http2(streams=2)), "with frames as large as may be"
    answer.check()


@pytest.mark.parametrize(
    ("wire", "why"),
    [
        (http1(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])), "not the file's"),
        (http1(CONTENT[:-1]), "200002 bytes, the file has 200003"),
        (http1(CONTENT + b"!"), "200004 bytes or more"),
        (http1(CONTENT[:-1], length=200_002), "says Content-Length 200002"),
        (http1().replace(b"200 OK", b"206 OK"), "wanted HTTP/1.1 200"),
        (b"x" * 70_000, "does not end"),
    ],
)
def test_a_wrong_http1_answer_is_found_out(wire, why):
    answer = Http1Answer(PAYLOAD)
    with pytest.raises(WrongAnswer, match=why):
        answer.feed(wire)
        answer.check()


@pytest.mark.parametrize(
    ("wire", "why"),
    [
        (http2(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])), "not the file's"),
        (http2(CONTENT[:-1]), "200002 bytes"),
        (http2(CONTENT + b"!"), "200004 bytes or more"),
        (http2(status="404"), "answers 404 on stream 1"),
        (http2(streams=2), "stream 3, where nothing was asked"),
        (http2() + answers.frame(0, 1, 1, b"!"), "all was answered"),
        (answers.frame(3, 0, 1, (7).to_bytes(4, "big")), "resets stream 1, error 7"),
        (answers.frame(7, 0, 0, bytes(4) + (11).to_bytes(4, "big")), "GOAWAY, error 11"),
        (answers.frame(0, 0, 1, bytes(16_385)), "frame of 16385 bytes"),
        (answers.frame(1, 4, 1, b"\xff\xff\xff\xff\xff\xff"), "can't be decoded"),
    ],
)
def test_a_wrong_http2_answer_is_found_out(wire, why):
    answer = Http2Answer(PAYLOAD, 1, decoder=Decoder())
    with pytest.raises(WrongAnswer, match=why):
        answer.feed(wire)
        answer.check()


def test_what_is_asked_for_in_http2_says_what_it_should():
    wire = answers.http2_requests("a.bin", 2, first=5)
    size = int.from_bytes(wire[:3], "big")
    assert wire[3:9] == b"\1\5\0\0\0\5", "HEADERS, END_STREAM and END_HEADERS, stream 5"
    fields = Decoder().decode(wire[9 : 9 + size])
    assert fields == [(":method", "GET"), (":scheme", "https"), (":path", "/a.bin"), (":authority", "localhost")]
    assert int.from_bytes(wire[9 + size + 5 : 9 + size + 9], "big") == 7


# --- servers that do wrong ---


class Crippled:
    """A server of HTTP/1.1 that does `behave(tls, number)` with the n-th request (from 1); False ends the connection."""

    name, tls, program, kernel_from, network = "crippled", "userspace", "crippled/1", 0, network.LOOPBACK

    def __init__(self, behave):
        self._behave = behave
        self._context = pki.server_context()
        self._context.set_alpn_protocols(["http/1.1"])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._requests = 0
        self.gone = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        try:
            with self._context.wrap_socket(sock, server_side=True) as tls:
                buffer = b""
                while data := tls.recv(65_536):
                    buffer += data
                    while b"\r\n\r\n" in buffer:
                        request, _, buffer = buffer.partition(b"\r\n\r\n")
                        self._requests += 1
                        if self._behave(self, tls, self._requests) is False or b"Connection: close" in request:
                            tls.unwrap()
                            return
        except (OSError, ValueError):  # the latter: it has been detached
            pass

    def pids(self):
        return []

    def usage(self):
        return Usage()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.gone.set()
        self._listener.close()


def honest(server, tls, number):
    tls.sendall(http1())


def late(then):
    """Behave until the first, verified transfer is over."""
    return lambda server, tls, number: honest(server, tls, number) if number == 1 else then(server, tls, number)


def short(by, *, hangs_up=True):
    def behave(server, tls, number):
        tls.sendall(http1(CONTENT[:-by]))
        if hangs_up:
            tls.shutdown(socket.SHUT_WR)
            tls.recv(1)
        return False  # or it says goodbye, and waits for the client to do the same

    return behave


def longer(server, tls, number):
    tls.sendall(http1(CONTENT + CONTENT))


def stuck(server, tls, number):
    tls.sendall(http1(CONTENT[:100_000]))
    server.gone.wait(10)
    return False


def killed(server, tls, number):
    tls.sendall(http1(CONTENT[:100_000]))
    tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    os.close(tls.detach())
    return False


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(connection, "STALL", 0.3)


def ask(server, **more):
    return Ask(server.port, PAYLOAD, "http/1.1", **more)


@pytest.mark.parametrize("version", ["TLSv1.3", "TLSv1.2"])
def test_an_honest_server_is_measured(version):
    with Crippled(honest) as server:
        wire = client.verify(ask(server, version=version))
        assert wire.least <= wire.bytes <= wire.most
        assert wire.bytes - wire.least < 300, "nearly nothing could be left out unnoticed"
        with Volley([ask(server, version=version)] * 3, wire, 2) as volley:
            outcome = volley.run()
    assert (outcome.transfers, outcome.bytes) == (6, 6 * len(CONTENT))
    assert outcome.seconds > 0


@pytest.mark.parametrize(
    ("behave", "why"),
    [
        (lambda s, tls, n: tls.sendall(http1(CONTENT[:500] + b"?" + CONTENT[501:])), "not the file's"),
        (short(1), "200002 bytes, the file has 200003"),
        (longer, "or more, the file has"),
        (stuck, "nothing came for 0.3 seconds"),
        (killed, "the connection was lost"),
        (lambda s, tls, n: tls.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"), "wanted HTTP/1.1 200"),
    ],
)
def test_what_is_wrong_with_a_server_is_found_out_before_it_is_measured(behave, why, impatient):
    with Crippled(behave) as server, pytest.raises(WrongAnswer, match=why):
        client.verify(ask(server))


@pytest.mark.parametrize(
    ("behave", "why"),
    [
        (short(1_000), "no encryption of the answer is below"),
        (short(150_000), "no encryption of the answer is below"),
        (short(1_000, hangs_up=False), "nothing came for 0.3 seconds, after .* of 200904 bytes"),
        (longer, "it sends .* bytes of the wire and more"),
        (stuck, "nothing came for 0.3 seconds"),
        (killed, "the connection was lost|it ends after"),
    ],
)
def test_a_server_that_turns_bad_while_it_is_measured_never_looks_fast(behave, why, impatient):
    with Crippled(late(behave)) as server:
        wire = client.verify(ask(server))
        with Volley([ask(server)], wire, 3) as volley, pytest.raises(WrongAnswer, match=why):
            volley.run()


def test_a_slow_server_looks_slow(impatient):
    def slow(server, tls, number):
        tls.sendall(http1(CONTENT[:100_000]))
        server.gone.wait(0.1)
        tls.sendall(CONTENT[100_000:])

    with Crippled(late(slow)) as server:
        wire = client.verify(ask(server))
        with Volley([ask(server)], wire, 2) as volley:
            assert volley.run().seconds >= 0.2


def test_a_server_that_does_not_hang_up_when_it_is_asked_to_is_measured_all_the_same(impatient, monkeypatch):
    monkeypatch.setattr(connection, "_END", 0.1)

    def stays(server, tls, number):
        honest(server, tls, number)
        server.gone.wait(1)

    with Crippled(stays) as server:
        wire = client.verify(ask(server))
        with Volley([ask(server)], wire, 2) as volley:
            assert volley.run().transfers == 2


def test_a_server_that_chunks_its_answers_is_not_called_wrong():
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    with Crippled(lambda s, tls, n: tls.sendall(chunked)) as server, pytest.raises(NotMeasurable, match="in chunks"):
        client.verify(ask(server))


def test_a_server_without_http2_is_not_called_wrong():
    with Crippled(honest) as server, pytest.raises(NotMeasurable, match="doesn't offer HTTP/2"):
        client.verify(Ask(server.port, PAYLOAD, "h2"))


def test_a_cipher_that_the_server_does_not_have_is_not_called_wrong():
    with Crippled(honest) as server, pytest.raises(NotMeasurable, match="it chooses AES-256-GCM"):
        client.verify(ask(server, cipher="AES-128-GCM"))


def test_a_server_that_is_not_there_is_not_called_wrong():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with pytest.raises(NotMeasurable, match="nobody answers"):
        client.verify(Ask(port, PAYLOAD, "http/1.1"))


@pytest.fixture
def small(tmp_path):
    (tmp_path / "small").write_bytes(CONTENT[:10_000])
    return Payload(tmp_path / "small", "small", 10_000, hashlib.sha256(CONTENT[:10_000]).digest())


def test_small_files_are_all_compared(small):
    def behave(server, tls, number):
        body = CONTENT[:10_000] if number < 8 else CONTENT[1:10_001]
        tls.sendall(http1(b"", length=10_000))  # header and body in records of their own
        tls.sendall(body)

    with Crippled(behave) as server:
        asked = [Ask(server.port, small, "http/1.1", closes=False)] * 2
        wire = client.verify(asked[0])
        with Loop(asked, wire) as loop:
            assert loop.run(60, most=3).transfers == 6
            with pytest.raises(WrongAnswer, match="answers something else"):
                loop.run(60)


# --- who says that the kernel encrypts ---


def stat(path, count):
    path.write_text(f"TlsCurrTxSw                     \t0\nTlsTxSw                         \t{count}\n")
    return path


def contender(server, tls_stat, tls):
    server.tls = tls
    return contest.ServerContender(server, "http/1.1", "TLSv1.3", tls_stat=tls_stat)


def test_a_server_that_claims_kernel_tls_and_is_not_in_the_kernel_is_found_out(tmp_path):
    with Crippled(honest) as server:
        claims = contender(server, stat(tmp_path / "tls_stat", 5), "kernel")
        with pytest.raises(WrongAnswer, match="fell back silently: the kernel has taken 0 of 1"):
            claims.verify(PAYLOAD, Load(PAYLOAD.size))
        claims.ours = False
        with pytest.raises(NotMeasurable, match="this build of it doesn't use it"):
            claims.verify(PAYLOAD, Load(PAYLOAD.size))


def test_a_server_that_falls_back_while_it_is_measured_is_found_out(tmp_path):
    tls_stat, load = stat(tmp_path / "tls_stat", 5), Load(PAYLOAD.size, connections=2)
    taken, lock = [], threading.Lock()

    def behave(server, tls, number):
        with lock:
            if len(taken) < 4:
                taken.append(number)
                stat(tls_stat, 5 + len(taken))
        honest(server, tls, number)

    with Crippled(behave) as server:
        claims = contender(server, tls_stat, "kernel")
        claims.verify(PAYLOAD, load)
        sample = claims.sample(PAYLOAD, load, 0, 0.01)
        assert sample.in_kernel is True
        assert sample.subject == Subject("crippled", "kernel", "http/1.1", "TLSv1.3", "AES-256-GCM", "crippled/1")
        with pytest.raises(WrongAnswer, match="fell back silently: the kernel has taken 1 of 2"):
            claims.sample(PAYLOAD, load, 1, 0.01)


def test_a_sample_in_userspace_says_so_and_one_without_the_file_says_nothing(tmp_path):
    with Crippled(honest) as server:
        for tls_stat, said in ((stat(tmp_path / "tls_stat", 5), False), (tmp_path / "none", None)):
            honest_one = contender(server, tls_stat, "userspace")
            honest_one.verify(PAYLOAD, Load(PAYLOAD.size))
            assert honest_one.sample(PAYLOAD, Load(PAYLOAD.size), 0, 0.01).in_kernel is said


# --- a run with somebody bad in it ---


@pytest.mark.parametrize("good_requests", [0, 1, 2, 3, 4, 5, 6])
def test_what_was_measured_of_a_server_that_turns_bad_is_thrown_away(good_requests, tmp_path):
    """Requests: verified, warming up, counting calls, round 1, round 2, verified again."""
    wanted = plan.plan(Options(sizes=(PAYLOAD.size,), protocols=("http/1.1",), rounds=2))
    measured = run.Run(wanted, tmp_path / "no tls_stat")
    measured.payloads[PAYLOAD.size] = PAYLOAD
    bad = lambda server, tls, number: (honest if number <= good_requests else short(9_000))(server, tls, number)  # noqa: E731
    with Crippled(honest) as one, Crippled(bad) as other:
        other.name = "bad"
        contenders = [contest.ServerContender(server, "http/1.1", "TLSv1.3") for server in (one, other)]
        measured.cases = [run.Case(contender, Load(PAYLOAD.size)) for contender in contenders]
        steps = [*measured.prepare(1e-6), *measured.rounds(1e-6), *measured.verify_again()]
    assert all(step.done <= step.total for step in steps)
    assert [sample.round for sample in measured.samples if sample.subject.name == "crippled"] == [0, 1]
    assert [sample.round for sample in measured.samples if sample.subject.name == "bad"] == (
        [0, 1] if good_requests == 6 else []
    )
    assert [failure.wrong for failure in measured.failures] == ([] if good_requests == 6 else [True])
    assert all(failure.subject.name == "bad" for failure in measured.failures)


def test_other_bytes_of_the_same_length_are_found_out_in_the_end(tmp_path):
    measured = run.Run(plan.plan(Options(sizes=(PAYLOAD.size,), protocols=("http/1.1",), rounds=1)), tmp_path / "no tls_stat")
    measured.payloads[PAYLOAD.size] = PAYLOAD
    other = late(lambda server, tls, number: tls.sendall(http1(CONTENT[::-1])))
    with Crippled(other) as server:
        measured.cases = [run.Case(contest.ServerContender(server, "http/1.1", "TLSv1.3"), Load(PAYLOAD.size))]
        list(measured.prepare(1e-6))
        list(measured.rounds(1e-6))
        assert not measured.failures, "ciphertext looks like ciphertext"
        list(measured.verify_again())
    (failure,) = measured.failures
    assert (failure.wrong, measured.samples) == (True, [])
    assert "are not the file's: SHA-256" in failure.why


# --- the ways of sending ---


SIZES = (1, 100_003, 3 * MIB + 5)
KERNEL = [way for way in ways.LADDER if way.tls == "kernel"]
OTHERS = [way for way in ways.LADDER if way.tls != "kernel"]


def named(way):
    return f"{way.name}-{way.tls}"


def climb(way, tmp_path, version="TLSv1.3", cipher="", size=100_003, **more):
    """Return a sample: two connections at a time, everything verified before."""
    pki.write(tmp_path)
    payload = conditions.make_payload(tmp_path, size)
    secrets = ways.Secrets(version, cipher, *(tmp_path / name for name in CERTIFICATE))
    one = contest.WayContender(way, secrets, **more)
    load = Load(size, connections=2)
    one.verify(payload, load)
    one.warm_up(payload, load, 0.02)
    return one.sample(payload, load, 0, 0.02)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", OTHERS, ids=named)
def test_a_way_sends_the_file(way, size, tmp_path):
    sample = climb(way, tmp_path, size=size)
    assert sample.bytes == sample.transfers * size
    assert sample.transfers % 2 == 0
    assert sample.peak > 0
    assert sample.in_kernel is not True


@pytest.mark.parametrize("cipher", connection.CIPHERS)
def test_a_way_speaks_what_it_is_told_to(cipher, tmp_path):
    way = next(way for way in OTHERS if way.tls == "userspace")
    assert climb(way, tmp_path, "TLSv1.2", cipher).subject == Subject(way.name, "userspace", "raw", "TLSv1.2", cipher)


@pytest.mark.ktls
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", KERNEL, ids=named)
def test_a_way_of_the_kernel_sends_the_file(way, size, tmp_path):
    sample = climb(way, tmp_path, size=size)
    assert sample.bytes == sample.transfers * size
    assert sample.in_kernel is True


@pytest.mark.ktls
@pytest.mark.parametrize(("way", "cipher"), zip(KERNEL, (*connection.CIPHERS, connection.CIPHERS[0]), strict=True))
def test_a_way_of_the_kernel_knows_every_cipher(way, cipher, tmp_path):
    assert climb(way, tmp_path, "TLSv1.2", cipher).in_kernel is True


@pytest.mark.ktls
def test_a_way_of_the_kernel_that_does_not_show_in_the_kernel_is_found_out(tmp_path):
    with pytest.raises(WrongAnswer, match="fell back silently"):
        climb(KERNEL[0], tmp_path, tls_stat=stat(tmp_path / "tls_stat", 5))


@pytest.mark.skipif(kernel_has_tls(), reason="this kernel can")
@pytest.mark.parametrize("way", KERNEL, ids=named)
def test_a_way_that_this_kernel_does_not_know_says_why(way, tmp_path):
    with pytest.raises(NotMeasurable, match="the kernel refuses to encrypt .TCP_ULP:"):
        climb(way, tmp_path)


def test_a_sender_that_sends_too_little_is_found_out(tmp_path):
    def half(link, fd, size):
        link.sock.sendall(os.pread(fd, size // 2, 0))

    with pytest.raises(WrongAnswer, match="it sends 50001 bytes, the file has 100003"):
        climb(ways.Way("half", "none", half), tmp_path)


def test_a_sender_that_breaks_says_how(tmp_path):
    def broken(link, fd, size):
        raise ZeroDivisionError("on purpose")

    with pytest.raises(WrongAnswer, match="the sender broke: ZeroDivisionError: on purpose"):
        climb(ways.Way("broken", "none", broken), tmp_path)


def test_no_sender_outlives_its_sample(tmp_path):
    before = set(usage.family(os.getpid()))
    climb(OTHERS[0], tmp_path)
    assert set(usage.family(os.getpid())) == before


# --- what was used ---


def test_the_usage_of_a_family_has_its_children():
    burn = "sum(range(3_000_000))"
    child = f"[sys.executable, '-c', 'print({burn}, flush=True); import sys; sys.stdin.readline()']"
    code = f"import subprocess, sys; subprocess.Popen({child}, stdin=0).wait()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        family = usage.family(process.pid)
        assert len(family) == 2
        spent = usage.of(family)
        assert spent.user + spent.system > usage.of([process.pid]).user
        assert spent.peak > MIB
        assert spent.minor_faults > 0
        assert spent.since(spent) == Usage(peak=spent.peak)
        process.communicate(b"\n")
    assert usage.of(family) == Usage(), "gone"


def test_usage_adds_up_and_keeps_the_sum_of_cpu_time():
    assert Usage(1, 2, 3, 4, 5, 6) + Usage(1, 1, 1, 1, 1, 1) == Usage(2, 3, 4, 5, 6, 7)
    # By ticks the user's part went back a little: what is spent together stays.
    assert Usage(0.9, 2.1).since(Usage(1.0, 1.0)) == Usage(0.0, 1.0)


@pytest.mark.skipif(not shutil.which("strace"), reason="no strace")
def test_calls_are_counted():
    code = (
        "import os, sys\nsys.stdin.readline()\nfor _ in range(1000): os.getppid()\nprint(1, flush=True)\nsys.stdin.readline()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        with usage.calls_of([process.pid]) as counter:
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdout.readline()
        process.communicate(b"\n")
    if counter.total is None:
        pytest.skip("strace may not look at other processes here")
    assert counter.calls["getppid"] == 1000
    assert counter.total == sum(counter.calls.values()) > 1000


# --- what it stands on ---


def test_no_two_pieces_of_a_file_are_equal(tmp_path):
    payload = conditions.make_payload(tmp_path, 5 * MIB + 7)
    content = payload.path.read_bytes()
    assert (len(content), hashlib.sha256(content).digest()) == (payload.size, payload.digest)
    assert len({content[at : at + 4096] for at in range(0, 5 * MIB, 4096)}) == 5 * MIB // 4096


def test_a_cold_cache_in_memory_is_refused():
    if not Path("/dev/shm").is_dir():
        pytest.skip("no tmpfs")
    with conditions.folder(Path("/dev/shm"), 1, cold=False) as folder:
        payload = conditions.make_payload(folder, 100_000)
        with pytest.raises(NotMeasurable, match="Is it tmpfs"), conditions.cold(payload):
            pass
        assert [path.name for path in folder.iterdir()] == [payload.path.name]


def test_a_cold_copy_is_the_same_file(tmp_path):
    payload = conditions.make_payload(tmp_path, 300_000)
    try:
        with conditions.cold(payload) as copy:
            assert hashlib.sha256(copy.path.read_bytes()).digest() == payload.digest
    except NotMeasurable as exc:
        pytest.skip(str(exc))


def test_a_folder_without_room_is_refused(tmp_path):
    with pytest.raises(NotMeasurable, match="no room"), conditions.folder(tmp_path, 1 << 60, cold=False):
        pass
    with pytest.raises(NotMeasurable, match="no folder can be made"), conditions.folder(tmp_path / "no", 1, cold=False):
        pass


def test_delay_and_loss_need_root_and_tools(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NotMeasurable, match="root"), network.network(1.0, 0.0):
        pass
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(NotMeasurable, match="iproute2"), network.network(0.0, 1.0):
        pass


def test_the_machine_is_described():
    about = machine.machine(machine.kernel_facts())
    assert about.system.startswith("Linux ")
    assert about.cpus >= 1
    assert about.memory > MIB
    assert len(about.kernel_tls) == 6


def test_the_crypto_driver_is_the_one_of_the_highest_priority():
    def block(driver, priority, name="gcm(aes)", internal="no"):
        return f"name         : {name}\ndriver       : {driver}\npriority     : {priority}\ninternal     : {internal}\n"

    blocks = [block("slow", 100), block("fast", 400), block("inner", 900, internal="yes"), block("x", 950, "rfc4106(gcm(aes))")]
    assert machine.crypto_driver("\n".join(blocks)) == "fast"
    assert machine.crypto_driver("") == ""
    assert machine.virtual("vendor_id\t: User Mode Linux\n") == "User Mode Linux"


# --- the plan ---


@pytest.mark.parametrize("mode", ["quick", "default", "full"])
def test_every_mode_measures_ways_and_servers(mode):
    made = plan.plan(Options(mode=mode))
    assert made.ladder
    assert made.served
    assert {load.size for load in made.ladder + made.served} <= set(made.sizes)
    assert set(made.besides) <= set(made.ladder + made.served)
    assert len(set(made.served)) == len(made.served)


def test_what_was_asked_for_is_measured_in_every_combination():
    made = plan.plan(Options(sizes=(1_000, MIB), connections=(1, 8), protocols=("h2",), streams=(1, 4), cold=True, rounds=2))
    assert made.ladder == ()
    assert made.rounds == 2
    hot = {(load.size, load.connections, load.streams) for load in made.served if not load.cold}
    assert hot == {(size, count, streams) for size in (1_000, MIB) for count in (1, 8) for streams in (1, 4)}
    assert {load.size for load in made.served if load.cold} == {MIB}


def test_against_others_the_ways_of_sending_are_left_out():
    made = plan.plan(Options(against=("nginx",)))
    assert made.protocols == ("http/1.1", "h2")
    assert not made.ladder


@pytest.mark.parametrize(
    "options", [Options(sizes=(0,)), Options(connections=(0,)), Options(rounds=0), Options(ciphers=("TLSv1.1",))]
)
def test_nonsense_is_refused(options):
    with pytest.raises(SettingsError):
        plan.plan(options)


# --- peers ---


@pytest.mark.parametrize("name", peers.NAMES)
def test_a_peer_is_configured_fairly(name, tmp_path):
    text = peers.configuration(name, tmp_path, 8443)
    assert re.search(r"\b8443\b", text)
    assert str(tmp_path / "root") in text
    assert str(tmp_path / "localhost.pem") in text, "if not in the file, then in the command above it"
    assert "access_log on" not in text


@pytest.mark.parametrize(("name", "says"), [
    ("nginx", r"^# \S*nginx -p \S+ -c \S+/nginx.conf"),
    ("lighttpd", r"^server.max-keep-alive-requests = 65535\b"),  # more wraps around
    ("caddy", r"^# GOMAXPROCS=1 \S*caddy run "),
    ("apache", r"^H2TLSWarmUpSize 0$"),
    ("granian", r"^# .* granian granian_app:app --interface rsgi .*--workers 1 "),
    ("uvicorn", r"^# .* uvicorn uvicorn_app:app .*--no-access-log "),
    ("hypercorn", r"^    keep_alive_max_requests = 1000000000\b"),
    ("aiohttp", r"^# .*aiohttp_app.py$"),
])  # fmt: skip
def test_a_configuration_says_how_it_is_started_and_what_it_lifts(name, says, tmp_path):
    assert re.search(says, peers.configuration(name, tmp_path, 8443), re.MULTILINE)


def test_nginx_asks_for_kernel_tls_where_there_is_one(tmp_path):
    assert "\n    ssl_conf_command Options KTLS;" in peers.configuration("nginx", tmp_path, 1, kernel=True)
    assert "\n    ssl_conf_command" not in peers.configuration("nginx", tmp_path, 1, kernel=False)


@pytest.mark.parametrize("name", peers.NAMES)
def test_a_peer_that_is_not_installed_says_what_installs_it(name, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "_path", lambda: "/nonexistent")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(sys, "executable", "/nonexistent/python3")
    with pytest.raises(NotMeasurable, match=f"{name} is not installed: (apt-get|pip) install"):
        peers.start(name, Place(tmp_path), kernel=False)


def test_where_no_peer_is_there_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "_find_quietly", lambda peer: None)
    nothing = {"calibrate": False, "json": None, "html": None, "png": None, "mode": "quick", "sizes": (), "folder": None} | {
        "markdown": None,
        "saved": None,
    }
    with pytest.raises(SettingsError, match="^--against: nginx is not installed: apt-get install nginx; caddy is not inst"):
        command.bench(against="nginx,caddy", **nothing)


# --- calibration ---


@pytest.mark.ktls
def test_a_calibration_is_a_part_of_a_configuration(tmp_path):
    steps = list(calibration.calibrate(Options(mode="quick", sizes=(16 * KIB, MIB), rounds=1)))
    found = steps[-1]
    assert not found.result.failures
    settings = tomllib.loads(found.snippet)["ktls"]
    assert settings["framing"] in calibration.FRAMINGS
    assert settings.get("mode") == "off" or settings["handover_bytes"] in (16 * KIB, MIB)
    assert "#     16 KiB" in found.snippet
    assert all(step.done <= step.total for step in steps[:-1])
    assert all(sample.in_kernel is (sample.subject.tls == "kernel") for sample in found.result.samples)


@pytest.mark.skipif(kernel_has_tls(), reason="this kernel can")
def test_without_kernel_tls_there_is_nothing_to_calibrate():
    *_, found = calibration.calibrate(Options())
    assert tomllib.loads(found.snippet) == {}
    assert "TCP_ULP" in found.snippet
