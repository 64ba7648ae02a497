import json

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
