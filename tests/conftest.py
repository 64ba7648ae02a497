"""Which tests run where: those marked `ktls` natively where the kernel has TLS, else inside User Mode Linux (test_lane.py)."""

import functools
import os
import socket

import pytest
from hypothesis import settings

from ktlsd import uapi

settings.register_profile("ktlsd", deadline=None, print_blob=True)
settings.load_profile("ktlsd")


@functools.cache
def kernel_has_tls() -> bool:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        try:
            sock.setsockopt(uapi.SOL_TCP, uapi.TCP_ULP, b"tls")
        except OSError:
            return False
        return True


def pytest_report_header() -> str:
    where = "natively" if kernel_has_tls() else "under User Mode Linux"
    return f"kernel: {os.uname().release}; tests marked ktls run {where}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without TLS in the kernel the lane test stands for all that are marked `ktls`; with it, they stand for themselves."""
    native = kernel_has_tls()
    under_systemd = os.environ.get("KTLSD_UML_SYSTEMD") == "1"
    left_out = [
        item
        for item in items
        if (item.get_closest_marker("systemd") is not None) != under_systemd
        or ((item.get_closest_marker("ktls") is None) == native and not under_systemd and _belongs(item, native))
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _belongs(item: pytest.Item, native: bool) -> bool:
    return not native or item.get_closest_marker("lane") is not None
