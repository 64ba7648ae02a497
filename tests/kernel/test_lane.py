"""The kernel lane: all tests marked `ktls`, inside a kernel that has TLS, where this machine's has none."""

import os
import sys

import pytest

from tests.kernel import uml

_TIMEOUT = float(os.environ.get("KTLSD_TEST_LANE_TIMEOUT", "1500"))  # seconds for the whole lane


@pytest.mark.lane
@pytest.mark.timeout(_TIMEOUT + 30)
def test_kernel_lane(capsys: pytest.CaptureFixture[str]) -> None:
    kernel = uml.kernel_file()
    if kernel is None:
        message = "this kernel has no TLS and there is no User Mode Linux to test in: apt-get install user-mode-linux"
        if os.environ.get("KTLSD_REQUIRE_KTLS") == "1":
            pytest.fail(message)
        pytest.skip(message)
    env = {k: v for k, v in os.environ.items() if k.startswith("KTLSD_") or k in ("PATH", "LANG")}
    command = [sys.executable, "-m", "pytest", "-m", "ktls", *uml.PYTEST]
    with capsys.disabled():
        print(f"\n--- kernel lane: {kernel}", flush=True)
        shown = uml.Shown()
        status = uml.run(kernel, command, env=env, timeout=_TIMEOUT, on_line=shown)
        print("--- kernel lane ends", flush=True)
    assert status == 0, f"pytest inside {kernel} ended with {status} (124: out of time)\n{shown.verdict}"
