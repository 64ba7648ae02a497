import json
import os

import pytest

from ktlsd.errors import StartError
from ktlsd.server.accesslog import AccessLog, Entry, TlsFacts

HOSTILE = '/a"\n{"status": 200}\x1b[31m\\\x7f\xff'


def entry(**changes):
    facts = {
        "time": "2026-11-21T04:22:58.129Z", "client": "::1", "method": "GET", "target": "/", "protocol": "HTTP/1.1",
        "status": 200, "bytes": 5, "duration": 0.1, "complete": True, "host": "x", "range": None, "referer": None,
        "user_agent": None, "tls": TlsFacts("TLSv1.3", "S", False, "kernel", None),
    }  # fmt: skip
    return Entry(**{**facts, **changes})


@pytest.mark.parametrize("form", ["json", "combined"])
def test_one_line_per_request_whatever_the_client_sent(tmp_path, form):
    log = AccessLog(str(tmp_path / "log"), form)
    for field in ("target", "method", "referer", "user_agent", "host"):
        log.add(entry(**{field: HOSTILE}))
    log.close()
    data = (tmp_path / "log").read_bytes()
    assert data.count(b"\n") == 5
    assert not {0x1B, 0x07, 0x0D} & set(data)
    if form == "json":
        assert json.loads(data.splitlines()[0])["target"] == HOSTILE
    else:
        assert all(line.count(b'"') == 6 for line in data.splitlines())


def test_combined_is_the_form_everybody_reads(tmp_path):
    log = AccessLog(str(tmp_path / "log"), "combined")
    log.add(entry(user_agent="curl/8"))
    log.close()
    assert (tmp_path / "log").read_text() == '::1 - - [21/Nov/2026:04:22:58 +0000] "GET / HTTP/1.1" 200 5 "-" "curl/8"\n'


def test_a_full_disk_loses_lines_and_nothing_else():
    log = AccessLog("/dev/full", "json")
    log.add(entry())
    log.flush()
    assert log.lost == 1


def test_a_log_that_cannot_be_opened_is_told_at_start(tmp_path):
    with pytest.raises(StartError, match="access log"):
        AccessLog(str(tmp_path / "no/such/log"), "json")


def test_a_pipe_that_nobody_reads_stops_nothing_and_loses_whole_lines_only(tmp_path, caplog):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = AccessLog(str(path), "json")
    for number in range(8000):  # more than the pipe and what is kept for it
        log.add(entry(status=number))
        if number % 100 == 99:
            log.flush()
    assert log.lost > 0
    assert caplog.text.count("lines are lost") == 1
    data = b""
    while True:
        log.flush()
        try:
            data += os.read(reader, 1 << 20)
        except BlockingIOError:
            break
    written = [json.loads(line)["status"] for line in data.splitlines()]
    assert written == sorted(set(written))
    assert len(written) + log.lost == 8000
    log.close()
    os.close(reader)


def test_a_pipe_without_a_reader_is_told_at_the_start(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StartError, match="nobody reads"):
        AccessLog(str(tmp_path / "pipe"), "json")


def test_a_full_disk_loses_lines_and_the_next_one_is_whole(tmp_path, monkeypatch):
    log = AccessLog(str(tmp_path / "log"), "json")
    real = os.write

    def full(fd, data):
        if len(data) > 100:
            return real(fd, data[:100])
        raise OSError(28, "No space left on device")

    log.add(entry())
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda fd, data: full(fd, data) if len(data) != 1 else real(fd, data))
        # Half a line goes out, then nothing.
        log.add(entry())
        while not log.lost:
            log.flush()
    log.add(entry(status=404))
    log.close()
    assert log.lost >= 1
    assert json.loads((tmp_path / "log").read_bytes().splitlines()[-1])["status"] == 404


def test_control_characters_of_any_kind_are_escaped(tmp_path):
    log = AccessLog(str(tmp_path / "log"), "json")
    log.add(entry(target="/\x9b31m\x7f"))
    log.close()
    data = (tmp_path / "log").read_bytes()
    assert not {0x9B, 0x7F} & set(data)
    assert json.loads(data)["target"] == "/\x9b31m\x7f"


def test_a_pipe_whose_reader_goes_loses_each_line_once(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = AccessLog(str(path), "json")
    for _ in range(1000):
        log.add(entry())
    log.flush()
    os.close(reader)
    for _ in range(3):
        log.flush()
    assert 0 < log.lost <= 1000
    before = log.lost
    log.add(entry())
    log.flush()
    assert log.lost == before + 1
    log.close()
