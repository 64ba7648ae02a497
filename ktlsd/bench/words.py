"""How numbers, loads and subjects are written for people: the same in tables, plots and sentences."""

from typing import Final

from ktlsd.bench.result import Load, Subject, Tls
from ktlsd.bench.stats import Interval, Verdict

TLS: Final[dict[Tls, str]] = {"none": "in the clear", "userspace": "userspace TLS", "kernel": "kernel TLS"}
TLS_SHORT: Final[dict[Tls, str]] = {"none": "none", "userspace": "user", "kernel": "kernel"}
SPEED: Final = {Verdict.BETTER: "faster", Verdict.WORSE: "slower", Verdict.OPEN: "no difference can be told"}
NOTHING: Final = "-"  # where there is no figure

_BINARY: Final = ("bytes", "KiB", "MiB", "GiB", "TiB")
_DECIMAL: Final = ("bytes", "KB", "MB", "GB", "TB")


def size(number: int) -> str:
    """Return bytes exactly where a unit allows it ("64 KiB", "10 KB"), else with two decimals."""
    for units, step in ((_BINARY, 1024), (_DECIMAL, 1000)):
        value, unit = number, 0
        while value >= step and value % step == 0 and unit < len(units) - 1:
            value, unit = value // step, unit + 1
        if unit and value < 10_000:
            return f"{value:,} {units[unit]}"
    if number < 10_000:
        return "1 byte" if number == 1 else f"{number:,} bytes"
    shown, unit = float(number), 0
    while shown >= 1024 and unit < len(_BINARY) - 1:
        shown, unit = shown / 1024, unit + 1
    return f"{shown:.2f} {_BINARY[unit]}"


def figure(value: float | None) -> str:
    """Return three significant digits, or all of a larger whole number: "0.0123", "1.23", "12.3", "4,321"."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude >= 99.95:
        return f"{value:,.0f}"
    for limit, digits in ((9.995, 1), (0.0995, 2), (0.00995, 3)):
        if magnitude >= limit:
            return f"{value:.{digits}f}"
    return f"{value:.2g}"


def short(value: float | None) -> str:
    """Return the same in at most five characters: "481", "8,561", "85.6k", "1.2M"."""
    if value is None or abs(value) < 9_999.5:
        return figure(value)
    for limit, divisor, letter in ((999_500, 1e3, "k"), (999_500_000, 1e6, "M"), (999_500_000_000, 1e9, "G")):
        if value < limit:
            scaled = value / divisor
            return f"{scaled:.1f}{letter}" if scaled < 99.95 else f"{scaled:.0f}{letter}"
    return f"{value:.0e}"


def times(value: float) -> str:
    """Return a ratio: two decimals where it is near 1, three digits elsewhere."""
    return f"{value:.2f}" if 0.0995 <= value < 9.995 else figure(value)


def between(found: Interval, *, to: str = " to ") -> str:
    """Return "2.10 (1.90 to 2.40)"."""
    return f"{times(found.middle)} ({times(found.low)}{to}{times(found.high)})"


def condition(load: Load) -> str:
    """Return what a load is apart from its size: "16 connections, cold cache, 10 ms delay"."""
    parts = ["1 connection" if load.connections == 1 else f"{load.connections:,} connections"]
    if load.streams > 1:
        parts.append(f"{load.streams:,} streams each")
    if load.cold:
        parts.append("cold cache")
    if load.delay_ms:
        parts.append(f"{load.delay_ms:g} ms delay each way")
    if load.loss_percent:
        parts.append(f"{load.loss_percent:g} % loss")
    return ", ".join(parts)


def load(asked: Load) -> str:
    """Return "256 MiB, 1 connection"."""
    return f"{size(asked.size)}, {condition(asked)}"


def printable(text: str) -> str:
    """Return the text with what a result from elsewhere could do to a terminal replaced."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


class Labels:
    """What subjects are called where these are together: the name, and of the rest what tells them apart.

    TLS by whom is not in the label unless `tls` is asked for: tables have a column for it, plots a colour.
    """

    def __init__(self, subjects: list[Subject]) -> None:
        """Take all that will be asked for."""
        encrypted = [s for s in subjects if s.tls != "none"]
        values: dict[str, set[str]] = {
            "protocol": {s.protocol for s in subjects},
            "version": {s.version for s in encrypted if s.version},
            "cipher": {s.cipher for s in encrypted if s.cipher},
        }
        self._telling = [name for name, found in values.items() if len(found) > 1]
        self._common = [next(iter(found)) for found in values.values() if len(found) == 1]
        self._together = subjects

    @property
    def common(self) -> str:
        """What all have in common, "raw, TLSv1.3, AES-256-GCM": for a heading; "" for nothing."""
        return ", ".join("bytes on a socket, no HTTP" if part == "raw" else part for part in self._common)

    def of(self, subject: Subject, *, tls: bool = False) -> str:
        """Return what a subject is called; with `tls` it says who encrypts."""
        telling = [getattr(subject, name) for name in self._telling]
        parts = [subject.name, *(value for value in telling if value and value != "raw")]
        label = " ".join(parts)
        twins = [s for s in self._together if self._key(s) == self._key(subject) and s != subject]
        if any(s.program != subject.program for s in twins):
            label += f" [{subject.program or 'no program named'}]"
        return printable(f"{label}, {TLS[subject.tls]}" if tls else label)

    @staticmethod
    def _key(subject: Subject) -> tuple[str, ...]:
        return subject.name, subject.tls, subject.protocol, subject.version, subject.cipher
