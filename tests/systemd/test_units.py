"""The unit files, as far as they can be held against systemd and the program without running them."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ktlsd import settings

UNITS = Path(__file__).parents[2] / "systemd"
FILES = ["ktlsd.service", "ktlsd.socket", "ktlsd-http.socket", "ktlsd-metrics.socket", "ktlsd.service.d/10-socket.conf"]
PROGRAM = "/opt/ktlsd/bin/ktlsd"
# Since which version systemd knows what an older one only warns of.
YOUNGER = {
    "Failed to parse service type, ignoring: notify-reload": 253,
    "Unknown key 'ReloadSignal' in section [Service], ignoring.": 253,
    "Unknown key 'RefreshOnReload' in section [Service], ignoring.": 260,
}
MAX_EXPOSURE = 15  # of 100; `systemd-analyze` shows tenths


@pytest.fixture(scope="session")
def analyze():
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze: apt-get install systemd")
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    version = int(told.split()[1])
    if version < 252:
        pytest.skip(f"systemd {version} is older than what the units are written for (252)")

    def run(*arguments):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
        known = {message for message, since in YOUNGER.items() if version < since}
        lines = [line for line in done.stderr.splitlines() if line.partition(": ")[2] not in known]
        return done.returncode, done.stdout, lines

    return run


@pytest.fixture
def installed(tmp_path):
    """The units in a folder of their own, with a program that is there."""
    folder = tmp_path / "units"
    shutil.copytree(UNITS, folder)
    service = folder / "ktlsd.service"
    service.write_text(service.read_text().replace(PROGRAM, "/bin/true"))
    return folder


def lines_of(name):
    return (UNITS / name).read_text().splitlines()


def values(name, key):
    return [line.partition("=")[2] for line in lines_of(name) if line.startswith(f"{key}=")]


def test_systemd_finds_nothing_wrong(analyze, installed):
    units = [str(installed / name) for name in FILES if not name.endswith(".conf")]
    status, _, complaints = analyze("verify", *units)
    assert (status, complaints) == (0, [])


def test_exposure_is_low(analyze, installed):
    status, table, complaints = analyze(
        "security", "--offline=yes", f"--threshold={MAX_EXPOSURE}", str(installed / "ktlsd.service")
    )
    assert (status, complaints) == (0, []), table


def test_exposure_is_low_without_the_socket_unit(analyze, installed):
    shutil.rmtree(installed / "ktlsd.service.d")
    status, table, _ = analyze("security", "--offline=yes", f"--threshold={MAX_EXPOSURE}", str(installed / "ktlsd.service"))
    assert status == 0, table


@pytest.mark.parametrize("name", FILES)
def test_every_line_has_a_reason(name):
    section, before = "", ""
    for number, line in enumerate(lines_of(name), 1):
        if line.startswith("["):
            section = line
        elif section in ("[Service]", "[Socket]") and line and not line.startswith("#"):
            key = line.partition("=")[0]
            assert before.startswith(("# ", f"{key}=")), f"{name}:{number}: {line}: why?"
        before = line


def test_the_sample_configuration_is_valid():
    read = settings.read_file(str(UNITS / "ktlsd.toml"))
    assert f"-{read.root}" in values("ktlsd.service", "BindReadOnlyPaths")
    assert Path(read.log.access).parent == Path("/var/log") / values("ktlsd.service", "LogsDirectory")[0]


def test_a_stop_has_time_to_drain():
    assert float(values("ktlsd.service", "TimeoutStopSec")[0]) >= settings.Limits().drain_timeout + 10


def test_descriptors_suffice_for_the_default_connections():
    _, _, hard = values("ktlsd.service", "LimitNOFILE")[0].partition(":")
    assert int(hard) >= 2 * settings.Limits().connections + 64


def test_nothing_is_granted_by_default():
    assert values("ktlsd.service", "CapabilityBoundingSet") == [""]
    assert values("ktlsd.service", "AmbientCapabilities") == []
    assert values("ktlsd.service", "DynamicUser") == ["yes"]


def test_old_and_new_systemd_each_take_the_last_type_they_know():
    assert values("ktlsd.service", "Type") == ["notify", "notify-reload"]


def test_a_private_network_comes_with_the_socket_unit_or_not_at_all():
    both = ("Requires=ktlsd.socket", "PrivateNetwork=yes")
    assert set(both) <= set(lines_of("ktlsd.service.d/10-socket.conf"))
    assert not set(both) & set(lines_of("ktlsd.service"))


def test_make_install_installs_all_of_it():
    makefile = (UNITS.parent / "Makefile").read_text()
    for file in UNITS.rglob("*"):
        assert file.is_dir() or f" systemd/{file.relative_to(UNITS)} " in makefile, file
