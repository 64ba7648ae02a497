"""The ways a test's server can send: every promise to clients holds in all of them."""

import pytest

from ktlsd.net.kernel import LinuxKernel
from tests.fakes.kernel import FakeKernel, nibbling

MODES = ["userspace", "fake", "nibbling", pytest.param("kernel", marks=pytest.mark.ktls)]


def kernel_of(mode):
    return {
        "userspace": lambda: None,
        "fake": FakeKernel,
        "nibbling": lambda: FakeKernel(appetite=nibbling(9, blocks=False)),
        "kernel": LinuxKernel,
    }[mode]()
