"""What `ktlsd bench` does with what was asked on the command line: measure, show, write down."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from ktlsd.bench import calibration, peers, plots, report_html, report_markdown, report_text, run
from ktlsd.bench.answers import NotMeasurable
from ktlsd.bench.calibration import Calibration
from ktlsd.bench.plan import Options, Progress
from ktlsd.bench.result import SCHEMA, Result
from ktlsd.errors import SettingsError, StartError

_BAR: Final = 30  # columns


def bench(
    *, calibrate: bool, json: str | None, html: str | None, png: str | None, markdown: str | None, saved: str | None,
    against: str | None, mode: str | None, sizes: Sequence[str], folder: str | None, **asked: Any,
) -> int:  # fmt: skip
    """Do what was asked on the command line; return the exit status. Raises SettingsError, StartError."""
    for name in ("print_config", "compare"):
        asked.pop(name, None)
    names = tuple(name.strip() for name in against.split(",")) if against else ()
    _check_names(names)
    _check_found(names)
    options = Options(
        mode=mode or "default",  # type: ignore[arg-type]  # click has checked it
        sizes=tuple(_size(text) for text in sizes),
        against=names,
        folder=Path(folder) if folder else None,
        **asked,
    )
    if calibrate:
        return _calibrate(options)
    targets = Targets(json, html, png, markdown)
    targets.check()
    result = _read(saved) if saved is not None else _followed(run.measure(options))
    assert isinstance(result, Result)
    return _show(result, targets)


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if name not in peers.BY_NAME:
            raise SettingsError(f"{name!r} is no server that can be measured; there are {', '.join(peers.BY_NAME)}")


def _check_found(names: Sequence[str]) -> None:
    """Before a minute is spent; if some are there, the rest is told in the result. Raises SettingsError."""
    missing = []
    for name in names:
        try:
            peers.find(name)
        except NotMeasurable as exc:
            missing.append(str(exc))
    if missing and len(missing) == len(names):
        raise SettingsError("--against: " + "; ".join(missing))


def _size(text: str) -> int:
    """Return bytes: 10k, 256M, 1G, 4096. Raises SettingsError."""
    match = re.fullmatch(r"(\d+)([kKmMgG]?)(?:i?[bB])?", text)
    if match is None or not int(match[1]):
        raise SettingsError(f"--size: {text!r} is no size like 4096, 10k, 256M or 1G")
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[match[2].lower()]


@dataclass(frozen=True, slots=True)
class Targets:
    """What is to be written, and where: a path, "-" for standard output, None for nowhere."""

    json: str | None = None
    html: str | None = None
    png: str | None = None
    markdown: str | None = None

    def check(self) -> None:
        """Before a minute is spent. Raises SettingsError."""
        for target in (self.json, self.html, self.png, self.markdown):
            _check_target(target)


def _show(result: Result, targets: Targets) -> int:
    """Print the tables and the verdict, write what was asked for; return the exit status.

    1 if something gave wrong results, so that it can't have been measured, or if nothing was measured at all. Raises
    SettingsError, StartError.
    """
    if "-" not in (targets.json, targets.html, targets.png, targets.markdown):
        print(report_text.render(result, _columns()))
    if targets.json is not None:
        _write(targets.json, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    if targets.html is not None:
        _write(targets.html, report_html.render(result).encode())
    if targets.png is not None:
        _write(targets.png, plots.render(result))
    if targets.markdown is not None:
        _write(targets.markdown, report_markdown.render(result).encode())
    wrong = [failure for failure in result.failures if failure.wrong]
    for failure in wrong:
        print(f"ktlsd: {failure.subject.name}: {failure.why}", file=sys.stderr)
    return 1 if wrong or not result.samples else 0


def _calibrate(options: Options) -> int:
    """Print the settings that are best on this machine, with the evidence; return the exit status."""
    found = _followed(calibration.calibrate(options))
    assert isinstance(found, Calibration)
    print(found.snippet)
    return 0


def compare(one: str, other: str) -> None:
    """Print how the second result stands to the first. Raises SettingsError."""
    print(report_text.compare(_read(one), _read(other), _columns()))


def print_config(name: str) -> None:
    """Print the configuration a peer would be measured with. Raises SettingsError."""
    _check_names((name,))
    print(peers.configuration(name, Path("/srv/bench"), 8443))


def _followed(steps: Iterator[Progress | Result | Calibration]) -> Result | Calibration:
    """Go through the steps with a bar on the terminal; return what comes out in the end."""
    shown = sys.stderr.isatty()
    for step in steps:
        if not isinstance(step, Progress):
            if shown:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            return step
        if shown:
            full = _BAR * step.done // max(step.total, 1)
            bar = "#" * full + "." * (_BAR - full)
            print(f"\r[{bar}] {step.done}/{step.total} {step.what}\x1b[K", end="", file=sys.stderr, flush=True)
    raise AssertionError("a measurement ends with a result")


def _columns() -> int:
    try:
        return max(os.get_terminal_size().columns, 80)
    except OSError:
        return 120


def _check_target(target: str | None) -> None:
    """Before a minute is spent. Raises SettingsError."""
    if target in (None, "-"):
        return
    folder = os.path.dirname(target or "") or "."
    if not os.path.isdir(folder):
        raise SettingsError(f"{target}: there is no such folder; create it")


def _write(target: str, data: bytes) -> None:
    if target == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    try:
        Path(target).write_bytes(data)
    except OSError as exc:
        raise StartError(f"{target}: cannot be written: {exc.strerror}") from exc


def _read(path: str) -> Result:
    try:
        result = msgspec.json.decode(Path(path).read_bytes(), type=Result)
    except OSError as exc:
        raise SettingsError(f"{path}: cannot be read: {exc.strerror}") from exc
    except msgspec.DecodeError as exc:
        raise SettingsError(f"{path}: is no result of ktlsd bench --json: {exc}") from exc
    if result.schema != SCHEMA:
        raise SettingsError(f"{path}: was written by another version (schema {result.schema}, this one reads {SCHEMA})")
    return result
