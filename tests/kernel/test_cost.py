"""Python touches no byte of the payload: what one large download asks of the kernel, by name and number."""

import pytest

from tests import measure

pytestmark = pytest.mark.ktls


def test_a_download_in_kernel_mode_is_sendfile_and_little_else(capsys):
    mebibytes = 32
    with capsys.disabled():
        calls = measure.calls(mebibytes << 20)
    assert calls["sendfile"] >= mebibytes // 2, "2 MiB at most go out with one call"
    assert calls["sendfile"] < 4 * mebibytes
    payload_readers = {"preadv", "readv", "mmap", "splice"}
    assert not payload_readers & calls.keys()
    assert calls.get("pread64", 0) < 8, "its own memory, with each sign of life"
    assert calls.get("preadv2", 0) <= 2 * calls["sendfile"] + 2, (
        "by a byte it is asked whether the disk would have to be waited for"
    )
    assert calls.get("sendmsg", 0) + calls.get("sendto", 0) < 12, "handshake, header, close_notify"
    assert calls.get("read", 0) < 20, "the key log's pipe, nothing else"
