"""What a report says, not how it looks: figures are those of the statistics, and what is bad is said."""

import html.parser
import random
import re
import sys
from itertools import pairwise

import msgspec
import pytest

from ktlsd.bench import charts, copies, plots, report, report_html, report_text, stats, verdicts, words
from ktlsd.bench import ways as ways_of_sending
from ktlsd.bench.result import SCHEMA, Failure, Load, Machine, Result, Sample, Subject
from ktlsd.bench.stats import Interval
from ktlsd.errors import StartError

COMBINATIONS = [f"{version} {cipher}" for version in ("TLSv1.3", "TLSv1.2") for cipher in ("AES-128-GCM", "AES-256-GCM")]
MACHINE = Machine(
    system="Linux 7.2.13", cpu="Some CPU", cpus=2, memory=4 << 30, crypto="generic-gcm-aesni", python="3.11.2",
    kernel_tls=dict.fromkeys(COMBINATIONS, ""), openssl="OpenSSL 3.0.19", ktlsd="0.1.0",
)  # fmt: skip
WITHOUT = msgspec.structs.replace(MACHINE, kernel_tls=dict.fromkeys(COMBINATIONS, "TCP_ULP:ENOENT"))
TLS = {"version": "TLSv1.3", "cipher": "AES-256-GCM"}
PLAIN = Subject("sendfile", "none")
READ = Subject("read+SSL_write", "userspace", **TLS)
MAPPED = Subject("mmap+SSL_write", "userspace", **TLS)
KERNEL = Subject("sendfile", "kernel", **TLS)
OURS = Subject("ktlsd", "kernel", "http/1.1", **TLS, program="ktlsd 0.1.0")
NGINX = Subject("nginx", "kernel", "http/1.1", **TLS, program="nginx/1.22.1")
SMALL, BIG = Load(1024), Load(256 << 20)
HOSTILE = "<script>alert(1)</script>\x1b[2J$x$"


def sample(subject, load, number, *, speed, cpu=1.0, **more):
    """`speed` in MB/s, `cpu` in seconds per GB."""
    facts = {"seconds": 1.0, "transfers": 4, "switches": 7, "minor_faults": 9, "major_faults": 0, "peak": 30_000_000} | more
    seconds = cpu * speed / 1_000
    in_kernel = facts.pop("in_kernel", subject.tls == "kernel")
    return Sample(
        subject, load, number, bytes=round(speed * 1e6), user=seconds / 4, system=seconds * 3 / 4, in_kernel=in_kernel, **facts
    )  # fmt: skip


def measured(speeds, *, rounds=9, machine=MACHINE, noise=0.03, **more):
    """Make a result of {(subject, load): MB/s, or (MB/s, CPU seconds per GB)}."""
    source, samples = random.Random(1), []
    for number in range(rounds):
        for (subject, load), figures in speeds.items():
            speed, cpu = figures if isinstance(figures, tuple) else (figures, 1.0)
            samples.append(sample(subject, load, number, speed=speed * source.uniform(1 - noise, 1 + noise), cpu=cpu))
    return Result(SCHEMA, "2026-11-21T14:30:00Z", ["ktlsd", "bench"], machine, samples, **more)


def ways(**more):
    return measured(
        {(s, load): f * (0.1 if load is SMALL else 1) for load in (SMALL, BIG)
         for s, f in ((PLAIN, 3_000), (READ, 700), (MAPPED, 800), (KERNEL, 1_600 if load is BIG else 800))}, **more
    )  # fmt: skip


def flat(text):
    return re.sub(r"\s+", " ", text)


def everywhere(result):
    """What the text report and the page say, without layout."""
    return flat(report_text.render(result, 120)), flat(Visible.of(report_html.render(result)))


class Visible(html.parser.HTMLParser):
    """The text of a page, and a check that what is opened is closed."""

    VOID = frozenset({"meta", "path", "rect"})

    def __init__(self):
        super().__init__()
        self.parts, self.open = [], []

    def handle_starttag(self, tag, attrs):
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)
        assert tag not in ("script", "link", "img", "iframe")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.parts.append(data)

    @classmethod
    def of(cls, page):
        parser = cls()
        parser.feed(page)
        parser.close()
        assert not parser.open
        return "".join(parser.parts)


# --- rows ---


def test_ratios_are_those_of_the_statistics():
    result = ways()
    small, big = report.groups(result)
    assert (small.load, big.load) == (SMALL, BIG)
    assert [row.subject for row in big.rows] == [PLAIN, READ, MAPPED, KERNEL]
    of = {s: [x for x in result.samples if x.subject == s and x.load == BIG] for s in (PLAIN, READ)}
    expected = stats.interval(stats.ratios(of[READ], of[PLAIN], stats.throughput))
    assert big.rows[0].ratio is None
    assert big.rows[1].ratio == expected
    for text in everywhere(result):
        assert words.between(expected) in text or words.between(expected, to="-") in text


def test_figures_are_medians_of_samples_and_calls_of_their_own_runs():
    result = measured({(KERNEL, BIG): 1_000}, noise=0)
    slowed = sample(KERNEL, BIG, 99, speed=10, calls=5_000, cpu=9)
    result = msgspec.structs.replace(result, samples=[*result.samples, slowed])
    (group,) = report.groups(result)
    (row,) = group.rows
    assert row.speed == Interval(1e9, 1e9, 1e9, 9)
    assert (row.user, row.system, row.cpu.middle) == (0.25, 0.75, 1.0)
    assert row.calls == 500_000
    assert (row.switches, row.faults, row.peak) == (7, 9, 30_000_000)


def test_samples_that_only_counted_calls_have_no_speed_and_say_so():
    samples = [sample(KERNEL, BIG, 0, speed=10, calls=5_000)]
    result = msgspec.structs.replace(ways(), samples=samples)
    assert report.groups(result)[0].rows[0].speed is None
    for text in everywhere(result):
        assert "500,000" in text
    assert "times not taken" in report_text.render(result)
    plots.render(result) if _has_matplotlib() else None


# --- does kernel TLS help? ---


def test_yes_with_how_much_and_from_which_size():
    answer = verdicts.findings(ways(machine=MACHINE))[0].answer
    assert re.match(r"Yes: (1\.9|2\.)\d+ times \([\d.]+ to [\d.]+\) the throughput of the fastest userspace way", answer)
    assert "for 256 MiB; below about 256 MiB: no difference can be told" in answer
    for text in everywhere(ways()):
        assert answer in text


def test_no_where_it_is_slower():
    finding = verdicts.findings(measured({(MAPPED, BIG): 1_000, (KERNEL, BIG): 500}))[0]
    assert finding.answer.startswith("No, it is slower: 0.5")


def test_it_depends_where_it_is_both():
    speeds = {(MAPPED, SMALL): 100, (KERNEL, SMALL): 50, (MAPPED, BIG): 1_000, (KERNEL, BIG): 2_000}
    assert re.match(
        r"It depends on the size: .* for 256 MiB; but 0\.5.* for 1 KiB\.", verdicts.findings(measured(speeds))[0].answer
    )


def test_the_same_speed_for_less_cpu_time_is_said():
    finding = verdicts.findings(measured({(MAPPED, BIG): (1_000, 2.0), (KERNEL, BIG): (1_000, 1.0)}))[0]
    assert finding.answer.startswith("It is not faster, but saves CPU time:")
    assert "with 0.50 times (0.50 to 0.50) its CPU time" in finding.answer


def test_nobody_wins_where_no_difference_can_be_told():
    finding = verdicts.findings(measured({(MAPPED, BIG): 1_000, (KERNEL, BIG): 1_000}, noise=0.2))[0]
    assert finding.answer.startswith("No difference can be told:")


def test_only_the_same_cipher_is_compared():
    other = msgspec.structs.replace(KERNEL, cipher="AES-128-GCM")
    assert verdicts.findings(measured({(MAPPED, BIG): 1_000, (other, BIG): 5_000}))[0].answer.startswith("Not measured")


def test_servers_are_compared_with_themselves_not_with_others():
    speeds = {(OURS, BIG): 2_000, (msgspec.structs.replace(OURS, tls="userspace"), BIG): 1_000, (NGINX, BIG): 9_000}
    assert verdicts.findings(measured(speeds))[0].answer.startswith(
        "Yes: 1.98 times (1.92 to 2.09) the throughput of ktlsd's userspace mode"
    )


def test_a_kernel_that_does_not_encrypt_is_said_with_the_remedy():
    result = measured({(PLAIN, BIG): 3_000, (READ, BIG): 700}, machine=WITHOUT)
    for text in everywhere(result):
        assert "does not encrypt TLS (TCP_ULP:ENOENT)" in text
        assert "modprobe tls" in text
        assert "What encryption costs" in text  # still useful


def test_a_single_cipher_that_the_kernel_refuses_is_said():
    some = MACHINE.kernel_tls | {"TLSv1.2 AES-128-GCM": "TLS_TX:EINVAL"}
    text = everywhere(ways(machine=msgspec.structs.replace(MACHINE, kernel_tls=some)))[0]
    assert "does not encrypt TLSv1.2 AES-128-GCM (TLS_TX:EINVAL). This kernel doesn't know the combination" in text


def test_a_silent_fallback_is_said_and_is_no_kernel_way():
    result = ways()
    lied = [msgspec.structs.replace(s, in_kernel=False) if s.subject == KERNEL else s for s in result.samples]
    result = msgspec.structs.replace(result, samples=lied)
    assert verdicts.findings(result)[0].answer.startswith("Not measured")
    for text in everywhere(result):
        assert "the kernel did not encrypt in 9 of 9 samples: not what its name says" in text
    assert "sendfile, not kernel TLS" in Visible.of(report_html.render(result))  # in the drawings
    assert [bar.label for bar in charts.throughput(report.groups(result)[1]).bars][-1] == "sendfile, not kernel TLS"


def test_user_mode_linux_overstates():
    for text in everywhere(ways(machine=msgspec.structs.replace(MACHINE, virtual="User Mode Linux"))):
        assert "the gain of kernel TLS is overstated" in text


# --- against others ---


def test_it_says_where_ktlsd_loses():
    speeds = {(OURS, SMALL): 10, (NGINX, SMALL): 50, (OURS, BIG): 1_500, (NGINX, BIG): 750}
    result = measured(speeds)
    finding = verdicts.findings(result)[1]
    assert finding.answer == "ktlsd loses for 1 KiB; ktlsd wins for 256 MiB."
    assert finding.points[0].startswith("1 KiB: slower; 0.20 times (")
    for text in everywhere(result):
        assert finding.answer in text


def test_a_crippled_server_shows_as_such():
    crippled = msgspec.structs.replace(OURS, name="crippled")
    result = measured({(OURS, BIG): 1_500, (NGINX, BIG): 1_500, (crippled, BIG): 30})
    row = report.groups(result)[0].rows[2]
    assert row.verdict is stats.Verdict.WORSE
    assert row.ratio.high < 0.03
    assert re.search(r"crippled\s+kernel\s+\d+\.\d\s+0\.0\d+ \(0\.0\d+-0\.0\d+\)<", report_text.render(result))
    assert re.search(r"crippled.*0\.0\d+ \(0\.0\d+ to 0\.0\d+\), slower", everywhere(result)[1])


def test_a_winner_of_peers_is_not_called_when_intervals_hold_one():
    finding = verdicts.findings(measured({(OURS, BIG): 1_000, (NGINX, BIG): 1_000}, noise=0.2))[1]
    assert finding.answer == "No difference can be told for 256 MiB."


def test_peers_without_ktlsd_are_shown_and_not_judged():
    assert len(verdicts.findings(measured({(NGINX, BIG): 1_000}))) == 1
    apart = measured({(NGINX, BIG): 1_000, (OURS, SMALL): 1_000})
    assert verdicts.findings(apart)[1].answer == "They had no load in common."


def test_two_configurations_of_one_name_are_told_apart():
    other = msgspec.structs.replace(NGINX, program="nginx/1.22.1, sendfile off")
    text = report_text.render(measured({(NGINX, BIG): 1_000, (other, BIG): 500}), 120)
    assert "nginx [nginx/1.22.1, sendfile off]" in text


# --- what must not be hidden ---


def test_who_did_wrong_is_told_apart_from_who_is_not_there():
    result = ways(failures=[Failure(OURS, "no such cipher"), Failure(NGINX, "sent 5 bytes of 1,024", wrong=True)])
    text, page = report_text.render(result), report_html.render(result)
    for shown in (text, page):
        order = [shown.index(said) for said in ("Failed", "sent 5 bytes", "Not measured", "no such cipher")]
        assert order == sorted(order)
    assert "Failed" not in report_text.render(ways(failures=[Failure(OURS, "no such cipher")]))


def test_too_few_rounds_are_not_called_no_difference():
    finding = verdicts.findings(measured({(OURS, BIG): 1_300, (NGINX, BIG): 1_000}, rounds=3, noise=0.12))[1]
    assert finding.answer == "Too few rounds to call it for 256 MiB."
    assert finding.points[0].startswith("256 MiB: too few rounds to call it; 1.")


def test_failures_notes_and_configurations_are_shown():
    result = ways(
        failures=[Failure(NGINX, "sent 5 bytes of 1,024")],
        notes=["the governor is powersave"],
        configurations={"nginx": "sendfile on;"},
    )
    for text in everywhere(result):
        assert "nginx, kernel TLS, http/1.1, TLSv1.3, AES-256-GCM: sent 5 bytes of 1,024" in text
        assert "the governor is powersave" in text
    assert "sendfile on;" in report_html.render(result)


def test_an_unsteady_or_stalled_series_is_said():
    result = ways()
    samples = [
        msgspec.structs.replace(s, seconds=10.0) if s.subject == KERNEL and s.load == BIG and s.round < 3 else s
        for s in result.samples
    ]
    result = msgspec.structs.replace(result, samples=samples)
    text = everywhere(result)[0]
    assert "1 of 8 rows are so unsteady that the figure means little" in text
    assert "sendfile (kernel TLS), 256 MiB, 1 connection: 3 of 9" in text
    assert re.search(r"sendfile\s+kernel\s+[\d,.]+\?", report_text.render(result))


def test_drift_is_said():
    result = ways()
    samples = [msgspec.structs.replace(s, seconds=2.0) if s.round > 3 else s for s in result.samples]
    text = everywhere(msgspec.structs.replace(result, samples=samples))[0]
    assert "8 of 8 rows changed their speed" in text
    assert "changed against the first" not in text  # all alike


def test_every_sample_is_on_the_page():
    result = ways(rounds=3)
    page = report_html.render(result)
    assert page.count("<tr><td>1 KiB, 1 connection</td>") == 12
    assert all(f"<td>{s.bytes}</td>" in page for s in result.samples)


def test_few_rounds_promise_nothing():
    assert "range of all rounds" in everywhere(ways(rounds=3))[0]
    assert "95 %" not in everywhere(ways(rounds=3))[0]
    assert "95 %" in everywhere(ways())[0]
    assert "range of all rounds" not in everywhere(ways())[0]


# --- strange results ---


def strange():
    hostile = Subject(HOSTILE, "kernel", "h2", HOSTILE, HOSTILE, HOSTILE)
    machine = msgspec.structs.replace(MACHINE, system=HOSTILE, cpu=HOSTILE, virtual=HOSTILE, kernel_tls={HOSTILE: HOSTILE})
    dead = sample(NGINX, BIG, 0, speed=0)
    return {
        "nothing": ways(rounds=0),
        "one sample": measured({(KERNEL, BIG): 1_000}, rounds=1),
        "one pair": measured({(MAPPED, BIG): 1_000, (KERNEL, BIG): 2_000}, rounds=1),
        "userspace only": measured({(MAPPED, load): 1_000 for load in (SMALL, BIG)}, machine=WITHOUT),
        "in the clear only": measured({(PLAIN, BIG): 1_000}),
        "kernel not asked": ways(machine=msgspec.structs.replace(MACHINE, kernel_tls={})),
        "no bytes, no time": msgspec.structs.replace(
            ways(), samples=[dead, msgspec.structs.replace(dead, seconds=0.0, round=1), sample(OURS, BIG, 0, speed=9)]
        ),
        "only dead": msgspec.structs.replace(ways(), samples=[dead, msgspec.structs.replace(dead, load=SMALL)]),
        "hostile": measured({(hostile, SMALL): 1, (hostile, BIG): 1}, machine=machine, notes=[HOSTILE],
                            failures=[Failure(hostile, HOSTILE)], configurations={HOSTILE: HOSTILE}),
        "many conditions": measured(
            {(OURS, Load(1024, n, n, n % 2 == 0, n * 1.5, n / 2)): 10 for n in range(1, 12)}, rounds=2
        ),
        "ciphers and versions": measured({(msgspec.structs.replace(KERNEL, version=v, cipher=c), BIG): 100
                                          for v in ("TLSv1.2", "TLSv1.3") for c in ("AES-128-GCM", "AES-256-GCM")}),
    }  # fmt: skip


@pytest.mark.parametrize("name", strange())
def test_every_result_can_be_shown(name):
    result = strange()[name]
    result = msgspec.json.decode(msgspec.json.encode(result), type=Result)  # as --compare reads it
    for width in (1, 80, 200):
        text = report_text.render(result, width)
        assert text.endswith("\n")
        assert "\x1b" not in text
        assert name in ("hostile", "many conditions") or max(map(len, text.splitlines())) <= max(width, 80)
    page = report_html.render(result)
    assert "<script" not in page
    Visible.of(page)
    assert "None" not in Visible.of(page)
    assert report_text.compare(result, ways(), 80)
    assert "\x1b" not in report_text.compare(ways(), result, 80)


@pytest.mark.parametrize("name", strange())
def test_every_result_can_be_drawn(name):
    if not _has_matplotlib():
        pytest.skip("without the extra `bench`")
    assert plots.render(strange()[name]).startswith(b"\x89PNG\r\n")


def test_one_pair_is_said_to_be_one():
    assert "(one pair)" in verdicts.findings(strange()["one pair"])[0].answer
    assert verdicts.findings(strange()["one pair"])[0].answer.startswith("No difference can be told")


def test_names_are_text_on_the_page_not_markup():
    page = report_html.render(strange()["hostile"])
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>" in Visible.of(page)  # as text


def _has_matplotlib():
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(StartError, match=r"pip install 'ktlsd\[bench\]'"):
        plots.render(ways())


# --- two runs ---


def test_comparing_two_runs():
    before = measured({(OURS, BIG): 1_000, (NGINX, BIG): 1_000, (PLAIN, BIG): 1})
    newer = msgspec.structs.replace(OURS, program="ktlsd 0.2.0")
    after = measured({(newer, BIG): 2_000, (NGINX, BIG): 1_000, (PLAIN, SMALL): 1}, machine=WITHOUT)
    text = flat(report_text.compare(before, after, 80))
    assert re.search(r"ktlsd kernel [\d,]+ [\d,]+ 2\.\d+ \([\d.]+-[\d.]+\)>", text)
    assert re.search(r"nginx kernel [\d,]+ [\d,]+ \d\.\d+ \(0\.\d+-1\.\d+\)~", text)
    assert "prove little" in text
    assert "TLS in the kernel: all 4 versions and ciphers tried | none of 4 versions and ciphers tried (TCP_ULP:ENOENT)" in text
    assert "ktlsd 0.1.0 | ktlsd 0.2.0" in text
    assert "Only in a: - sendfile, in the clear: 256 MiB, 1 connection" in text
    assert "Only in b: - sendfile, in the clear: 1 KiB, 1 connection" in text


def test_comparing_runs_that_have_nothing_in_common():
    assert "no subject and load in common" in report_text.compare(measured({(OURS, BIG): 1}), ways(), 80)


# --- words, copies, places ---


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (1024, "1 KiB"), (10_000, "10 KB"), (65_536, "64 KiB"), (1 << 28, "256 MiB"),
     (10**9, "1 GB"), (1500, "1,500 bytes"), (16_384_001, "15.63 MiB"), (123_457, "120.56 KiB")],
)  # fmt: skip
def test_sizes(number, text):
    assert words.size(number) == text


@pytest.mark.parametrize(
    ("value", "long", "short"),
    [(None, "-", "-"), (0, "0", "0"), (0.00123, "0.0012", "0.0012"), (0.0123, "0.012", "0.012"), (0.5, "0.50", "0.50"),
     (9.999, "10.0", "10.0"), (99.96, "100", "100"), (1234.5, "1,234", "1,234"), (85_640, "85,640", "85.6k"),
     (999_499, "999,499", "999k"), (1_234_567, "1,234,567", "1.2M"), (12e9, "12,000,000,000", "12.0G")],
)  # fmt: skip
def test_figures(value, long, short):
    assert words.figure(value) == long
    assert words.short(value) == short
    assert len(words.short(value)) <= 6


@pytest.mark.parametrize(
    ("name", "tls", "number", "passes"),
    [("read+write", "none", "2", 0), ("mmap+write", "none", "1", 0), ("sendfile", "none", "0-1", 0),
     ("splice", "none", "0-1", 0),
     ("read+SSL_write", "userspace", "4", 1), ("mmap+SSL_write", "userspace", "3", 1), ("send", "kernel", "1", 1),
     ("sendfile", "kernel", "0", 1), ("mapped sendmsg", "kernel", "0", 1), ("MSG_ZEROCOPY", "none", "0-1", 0)],
)  # fmt: skip
def test_copies_of_every_way(name, tls, number, passes):
    known = copies.of(Subject(name, tls))
    assert (known.copies, known.encryptions) == (number, passes)


def test_every_way_of_the_ladder_has_its_copies_told():
    ladder = [Subject(way.name, way.tls) for way in ways_of_sending.LADDER]
    assert sum(name.count(",") + 1 for name, _, _ in copies.told(ladder)) == len(ladder)
    told = report_text.render(measured({(subject, BIG): 1_000 for subject in ladder}), 200)
    assert "read+write 64 KiB, read+write 256 KiB, in the clear: 2: page cache" in told


def test_copies_of_servers_are_not_known():
    assert copies.of(OURS) is None
    assert copies.of(Subject("carrier pigeon", "none")) is None


def test_lines_of_several_servers_have_a_colour_each():
    of_nginx = charts.against_size(report.groups(measured({(s, load): 100 for s in (OURS, NGINX) for load in (SMALL, BIG)})))
    assert len({line.colour for line in of_nginx.lines}) == 2
    alone = charts.against_size(report.groups(measured({(OURS, load): 100 for load in (SMALL, BIG)})))
    assert [line.colour for line in alone.lines] == [OURS.tls]
    assert charts.COLOURS.keys() == charts.COLOURS_DARK.keys()


def test_labels_do_not_overlap_and_stay_near_their_lines():
    placed = charts.apart([10, 11, 12, 100, 200, 199], 15, 0, 205)
    ordered = sorted(placed)
    assert all(b - a >= 15 - 1e-9 for a, b in pairwise(ordered))
    assert placed[3] == 100
    assert min(placed) >= 0
    assert max(placed) <= 205
    assert sorted(range(6), key=lambda at: placed[at]) == [0, 1, 2, 3, 5, 4]
    assert charts.apart([], 15, 0, 100) == []


@pytest.mark.parametrize("highest", [0.003, 1, 7, 99, 4_046])
def test_ticks_are_few_and_round(highest):
    found = charts.ticks(highest)
    assert 3 <= len(found) <= 6
    assert found[-1] <= highest
    assert charts.ticks(0) == [0]
