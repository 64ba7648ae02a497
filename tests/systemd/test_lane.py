"""The systemd lane: all tests marked `systemd`, inside a kernel of their own in which systemd is process 1."""

import os
import sys

import pytest

from tests.kernel import uml

_TIMEOUT = float(os.environ.get("KTLSD_TEST_LANE_TIMEOUT", "900"))  # seconds for the whole lane


@pytest.mark.timeout(_TIMEOUT + 30)
def test_systemd_lane(capsys: pytest.CaptureFixture[str]) -> None:
    kernel = os.environ.get("KTLSD_TEST_SYSTEMD_KERNEL") or uml.kernel_file()
    missing = [] if kernel else ["user-mode-linux"]
    if not os.access(uml.SYSTEMD, os.X_OK):
        missing.append("systemd")
    if missing:
        message = f"no systemd to test the units under, or no kernel for it: apt-get install {' '.join(missing)}"
        if os.environ.get("KTLSD_REQUIRE_KTLS") == "1":
            pytest.fail(message)
        pytest.skip(message)
    assert kernel is not None
    env = {k: v for k, v in os.environ.items() if k.startswith("KTLSD_") or k in ("PATH", "LANG")}
    command = [sys.executable, "-m", "pytest", "-m", "systemd", *uml.PYTEST]
    with capsys.disabled():
        print(f"\n--- systemd lane: {kernel}", flush=True)
        shown = uml.Shown()
        status = uml.run(kernel, command, env=env, timeout=_TIMEOUT, systemd=True, on_line=shown)
        print("--- systemd lane ends", flush=True)
    assert status == 0, f"pytest under systemd inside {kernel} ended with {status} (124: out of time)\n{shown.verdict}"
