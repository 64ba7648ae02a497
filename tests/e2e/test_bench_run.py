"""Whole runs of the measuring half of `ktlsd bench`, with tiny sizes: the figures mean nothing, the rest everything."""

import os
import re
import shutil
import tomllib

import msgspec
import pytest

from ktlsd.bench import contest, peers, run, servers, usage
from ktlsd.bench.answers import NotMeasurable, WrongAnswer
from ktlsd.bench.conditions import make_payload
from ktlsd.bench.plan import MIB, Options, Progress
from ktlsd.bench.result import Load, Result
from ktlsd.bench.servers import Place
from ktlsd.bench.ways import LADDER
from ktlsd.errors import SettingsError
from tests.conftest import kernel_has_tls

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
SMALL, LARGE = 2_000, 200_000


def measured(**options):
    """Go through a run; return its result, which another program can read."""
    *steps, result = run.measure(Options(mode="quick", **{"rounds": 1, **options}))
    assert all(isinstance(step, Progress) and step.done <= step.total and step.what for step in steps)
    assert msgspec.json.decode(msgspec.json.encode(result), type=Result) == result
    assert usage.family(os.getpid()) == [os.getpid()], "everything that was started has ended"
    return result


def timed(result):
    return [sample for sample in result.samples if sample.calls is None]


def test_a_run_measures_every_way_and_ktlsd_in_every_protocol():
    result = measured(sizes=(SMALL, LARGE))
    assert not any(failure.wrong for failure in result.failures)
    assert all(failure.subject.tls == "kernel" for failure in result.failures), "nothing else may be missing"
    possible = ("none", "userspace", "kernel") if kernel_has_tls() else ("none", "userspace")
    ways = {(s.subject.name, s.subject.tls) for s in result.samples if s.subject.protocol == "raw"}
    assert ways == {(way.name, way.tls) for way in LADDER if way.tls in possible}
    served = {(s.subject.tls, s.subject.protocol, s.load.size) for s in timed(result) if s.subject.name == "ktlsd"}
    wanted = {(tls, protocol, LARGE) for tls in possible[1:] for protocol in ("http/1.1", "h2")}
    assert served == wanted | {("userspace", protocol, SMALL) for protocol in ("http/1.1", "h2")}
    for sample in timed(result):
        assert sample.seconds > 0
        assert sample.bytes == sample.transfers * sample.load.size > 0
        assert sample.peak > MIB
        assert sample.subject.version == ("" if sample.subject.tls == "none" else "TLSv1.3")
    assert tomllib.loads(result.configurations["ktlsd, userspace TLS"])["ktls"]["mode"] == "off"
    assert not kernel_has_tls() or any("handover_bytes" in note for note in result.notes)


@pytest.mark.skipif(kernel_has_tls(), reason="this kernel can")
def test_without_kernel_tls_a_run_says_so_and_is_useful():
    result = measured(sizes=(LARGE,), protocols=("raw",))
    failed = {failure.subject.name: failure.why for failure in result.failures}
    assert failed.keys() == {way.name for way in LADDER if way.tls == "kernel"}
    assert all(re.match(r"the kernel refuses to encrypt \(TCP_ULP:\w+\)", why) for why in failed.values())
    assert {sample.subject.tls for sample in result.samples} == {"none", "userspace"}
    assert all(result.machine.kernel_tls.values())


@pytest.mark.ktls
def test_where_the_kernel_encrypts_it_shows_in_every_sample(monkeypatch):
    monkeypatch.setattr(run, "_STEPS", 1)  # User Mode Linux counts CPU time in steps of 10 ms: samples would be long
    result = measured(sizes=(LARGE,), protocols=("raw", "http/1.1", "h2"))
    assert not result.failures
    for sample in timed(result):
        assert sample.in_kernel is {"none": None, "userspace": False, "kernel": True}[sample.subject.tls]
    kernel = {sample.subject.name for sample in timed(result) if sample.in_kernel}
    assert kernel >= {"ktlsd", *(way.name for way in LADDER if way.tls == "kernel")}


@pytest.mark.ktls
def test_who_falls_back_silently_fails_the_run_and_leaves_no_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_STEPS", 1)
    stuck = tmp_path / "tls_stat"
    stuck.write_text("TlsTxSw                         \t7\n")
    asked = Options(mode="quick", sizes=(LARGE,), rounds=1, protocols=("raw", "http/1.1"))
    *_, result = run.measure(asked, tls_stat=stuck)
    wrong = {failure.subject.name for failure in result.failures if failure.wrong}
    assert wrong == {"ktlsd", *(way.name for way in LADDER if way.tls == "kernel")}
    assert all("fell back silently" in failure.why for failure in result.failures)
    assert {sample.subject.tls for sample in result.samples} == {"none", "userspace"}


@pytest.mark.skipif(not NGINX, reason="no nginx")
def test_nginx_and_ktlsd_are_measured_by_turns():
    result = measured(sizes=(4 * MIB,), against=("nginx",), rounds=2)
    assert not any(failure.wrong for failure in result.failures)
    names = [sample.subject.name for sample in timed(result) if sample.subject.protocol == "http/1.1"]
    assert set(names) == {"ktlsd", "nginx"}
    programs = {sample.subject.program for sample in result.samples if sample.subject.name == "nginx"}
    assert all(re.match(r"nginx/\d+\.\d+\.\d+, (kernel TLS on|userspace TLS)$", program) for program in programs)
    assert "worker_processes 1;" in result.configurations["nginx, userspace TLS"]
    rounds = [
        [sample.subject.name for sample in timed(result) if sample.round == number and sample.subject.protocol == "h2"]
        for number in (0, 1)
    ]
    assert sorted(rounds[0]) == sorted(rounds[1])
    assert all(sample.load == Load(4 * MIB) for sample in result.samples)


@pytest.mark.parametrize("name", peers.NAMES)
def test_a_peer_serves_what_it_should_and_ends(name, tmp_path):
    place = Place(tmp_path)
    place.prepare()
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)  # pytest's are its own, and some servers give up root
    payload = make_payload(place.root, LARGE)
    try:
        server = peers.start(name, place, kernel=False)
    except NotMeasurable as exc:
        assert "not installed" in str(exc), exc
        pytest.skip(str(exc))
    try:
        for protocol in peers.BY_NAME[name].protocols:
            for version in ("TLSv1.3", "TLSv1.2"):
                contest.ServerContender(server, protocol, version).verify(payload, Load(LARGE))
        assert len(server.pids()) >= 1
        assert server.usage().peak > MIB
    finally:
        server.stop()
    with pytest.raises(WrongAnswer, match="the server has ended"):
        server.pids()
    assert usage.family(os.getpid()) == [os.getpid()]


def test_a_peer_that_is_not_there_is_a_failure_with_its_remedy(monkeypatch):
    monkeypatch.setattr(peers, "_path", lambda: "/nonexistent")
    result = measured(sizes=(SMALL,), against=("lighttpd",), protocols=("http/1.1",))
    (failure,) = [failure for failure in result.failures if failure.subject.name == "lighttpd"]
    assert failure.why == "lighttpd is not installed: apt-get install lighttpd lighttpd-mod-openssl"
    assert not failure.wrong


def test_a_peer_that_nobody_knows_is_refused():
    with pytest.raises(SettingsError, match="against iis: known are nginx, lighttpd"):
        list(run.measure(Options(against=("iis",))))


def test_ktlsd_that_does_not_start_says_why(tmp_path):
    place = Place(tmp_path)
    place.prepare()
    place.key.write_text("no key")
    with pytest.raises(NotMeasurable, match="ktlsd: it does not start: .*there is no key in it"):
        servers.start_ktlsd(place, kernel=False)
    assert usage.family(os.getpid()) == [os.getpid()]


def test_delay_is_measured_or_refused(tmp_path):
    result = measured(sizes=(LARGE,), delay_ms=5.0, protocols=("raw", "http/1.1"), folder=tmp_path)
    if result.failures and not result.samples:
        (failure,) = result.failures
        assert re.search("root|iproute2|no delay and loss here|no network namespace", failure.why)
        pytest.skip(failure.why)
    assert all(sample.load.delay_ms == 5.0 for sample in result.samples)
    assert all(sample.seconds >= 0.01 for sample in result.samples), "there and back"


@pytest.mark.ktls
def test_delay_is_measured_or_refused_where_the_kernel_encrypts(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_STEPS", 1)
    test_delay_is_measured_or_refused(tmp_path)


def test_a_cold_cache_is_measured_or_refused(tmp_path):
    result = measured(sizes=(LARGE,), cold=True, protocols=("raw", "http/1.1"), folder=tmp_path)
    hot = {sample.subject for sample in timed(result) if not sample.load.cold}
    cold = {sample.subject for sample in timed(result) if sample.load.cold}
    refused = {failure.subject for failure in result.failures if "cold cache" in failure.why}
    assert hot == cold | refused
    assert not any(failure.wrong for failure in result.failures)


def test_a_run_that_is_broken_off_leaves_nothing_behind(tmp_path):
    steps = run.measure(Options(mode="quick", sizes=(LARGE,), folder=tmp_path))
    for step in steps:
        if "round" in step.what:
            break
    assert len(usage.family(os.getpid())) > 1
    steps.close()
    assert usage.family(os.getpid()) == [os.getpid()]
    assert not list(tmp_path.iterdir())
