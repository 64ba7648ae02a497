"""The command line. Exit status 0 fine, 1 can't run, 2 misuse; errors are one line on stderr."""

import logging
import os
import platform
import ssl
import sys
import time
import urllib.parse
from collections.abc import Callable
from functools import wraps
from typing import Any

import click
import msgspec

from ktlsd import __version__
from ktlsd.errors import KtlsdError, RequestError, SettingsError, StartError
from ktlsd.files.listing import human_size
from ktlsd.net import handover
from ktlsd.net.handover import KernelFacts
from ktlsd.net.kernel import LinuxKernel
from ktlsd.net.listeners import address_text
from ktlsd.protocol.semantics import parse_path
from ktlsd.server import generation
from ktlsd.server.auth import Signer, hash_password
from ktlsd.server.crew import LOG_FORM
from ktlsd.server.rehearsal import rehearse
from ktlsd.server.supervisor import Supervisor
from ktlsd.settings import ALPN, Settings, parse_listen, read_file
from ktlsd.validation import load_file, validate

_SHOWN = 20  # problems told one by one


def _errors_as_exit_status(command: Callable[..., None]) -> Callable[..., None]:
    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KtlsdError as error:
            print(f"ktlsd: {error}", file=sys.stderr)
            sys.exit(2 if isinstance(error, SettingsError) else 1)

    return wrapped


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ktlsd")
def main() -> None:
    """An HTTPS file server whose bulk data is encrypted by the kernel."""


@main.command()
@click.argument("directory", metavar="[DIR]", required=False)
@click.option("--listen", metavar="HOST:PORT", multiple=True, help="Where to listen; may be repeated. [localhost:8443]")
@click.option("--cert", metavar="PEM", help="Certificate chain, leaf first. Without one a development certificate is made.")
@click.option("--key", metavar="PEM", help="The certificate's private key, not encrypted.")
@click.option("--config", metavar="FILE", help="TOML configuration; flags given here win over it.")
@click.option(
    "--ktls",
    type=click.Choice(["auto", "require", "off"]),
    help="auto: the kernel encrypts where it can. require: exit 1 if it can't. off: userspace only. [auto]",
)
@click.option("--workers", metavar="N", type=click.IntRange(1, 256), help="Worker processes. [one for each processor]")
@click.option("--alpn", metavar="LIST", help="Protocols offered, by commas, the best first: h2,http/1.1.")
@click.option("--access-log", metavar="FILE|-", help="One line per request; - is standard output. [none]")
@click.option("--log-format", type=click.Choice(["combined", "json"]), help="Form of the access log. [json]")
@click.option("--check", is_flag=True, help="Look whether it could be served, and end.")
@_errors_as_exit_status
def serve(config: str | None, *, check: bool, **flags: Any) -> None:
    """Serve the files in DIR (default: this folder) over HTTPS.

    SIGHUP reads the configuration and the certificates again, SIGUSR2 starts another version of the program in its place;
    neither drops a connection. SIGTERM finishes what is running.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=LOG_FORM.format(who=""))

    def load() -> Settings:
        settings = _merge(read_file(config) if config else Settings(), flags)
        validate(settings)
        return settings

    if check:
        rehearse(load)
        return
    Supervisor(load, _announce).run()


def _announce(line: str) -> None:
    try:
        print(line, flush=True)
    except OSError:
        pass  # nobody reads it any more: no reason not to serve


def _merge(settings: Settings, flags: dict[str, Any]) -> Settings:
    """Lay what was said on the command line over the settings. Raises SettingsError."""
    replace = msgspec.structs.replace
    if flags["alpn"] is not None:
        alpn = tuple(name.strip() for name in flags["alpn"].split(","))
        if not set(alpn) <= set(ALPN):
            raise SettingsError(f"--alpn: {flags['alpn']!r}: name h2, http/1.1, or both with a comma between them")
        settings = replace(settings, tls=replace(settings.tls, alpn=alpn))
    places = {
        "directory": (None, "root"),
        "workers": (None, "workers"),
        "cert": ("tls", "cert"),
        "key": ("tls", "key"),
        "ktls": ("ktls", "mode"),
    }
    places |= {"access_log": ("log", "access"), "log_format": ("log", "format")}
    for flag, (section, key) in places.items():
        if flags[flag] is not None:
            part = replace(getattr(settings, section), **{key: flags[flag]}) if section else None
            settings = replace(settings, **({section: part} if section else {key: flags[flag]}))
    if flags["listen"]:
        settings = replace(settings, listen=flags["listen"])
    return settings


@main.command()
@click.argument("file")
@_errors_as_exit_status
def check(file: str) -> None:
    """Validate the configuration FILE: exit 2 with file, key and reason if it can't be used."""
    settings = load_file(file)
    try:
        generation.check(settings)
    except SettingsError as error:
        raise SettingsError(f"{file}: {error}") from error
    print(f"{file}: fine")


@main.command("hash")
@click.argument("directory", metavar="[DIR]", default=".")
@click.option("--jobs", metavar="N", type=click.IntRange(1, 64), default=os.cpu_count() or 1, help="Files hashed at a time.")
@_errors_as_exit_status
def hash_(directory: str, jobs: int) -> None:
    """Compute the SHA-256 of every file in DIR, so that ktlsd can send it as ETag and Repr-Digest.

    The results are kept in DIR/.ktlsd-digests and count as long as a file's size and time stay the same. Run it again after
    changes; what is known is not read again, and a run that was stopped goes on where it was.
    """
    from ktlsd import hashing  # what only one command needs is not loaded by a server that starts

    os.nice(10)  # serving comes first
    shown = sys.stderr.isatty()

    def report(progress: hashing.Progress) -> None:
        if shown:
            done, total = human_size(progress.bytes_done), human_size(progress.bytes)
            print(
                f"\r{progress.files_done}/{progress.files} files, {done} of {total}\x1b[K", end="", file=sys.stderr, flush=True
            )

    done = hashing.hash_tree(directory, jobs=jobs, report=report)
    if shown:
        print(file=sys.stderr)
    print(f"{done.known} files known, {human_size(done.bytes_known)}")
    for problem in done.problems[:_SHOWN]:
        print(f"ktlsd: {problem}", file=sys.stderr)
    if len(done.problems) > _SHOWN:
        print(f"ktlsd: and {len(done.problems) - _SHOWN} more", file=sys.stderr)
    sys.exit(1 if done.problems else 0)


@main.command()
@click.argument("user")
@_errors_as_exit_status
def passwd(user: str) -> None:
    """Ask for a password and print the line for a password file (the key `auth` of a rule)."""
    if ":" in user or not user.isprintable():
        raise click.UsageError("a user name has no colon and no control characters")
    if sys.stdin.isatty():
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        password = sys.stdin.readline().rstrip("\n")
    if not password:
        raise StartError("passwd: there is no password on standard input")
    print(f"{user}:{hash_password(password)}")


@main.command()
@click.argument("url")
@click.option("--key", metavar="FILE", required=True, help="The key file named by `signed` in the rule.")
@click.option(
    "--expires", metavar="SECONDS", type=click.IntRange(1, 315_360_000), default=3600, help="How long it is good. [3600]"
)
@_errors_as_exit_status
def sign(url: str, key: str, expires: int) -> None:
    """Print URL (or a path) with a signature that lets it be fetched until it expires."""
    scheme, separator, rest = url.partition("://")
    authority, _, path = rest.partition("/") if separator else ("", "/", url.removeprefix("/"))
    try:
        parsed = parse_path(urllib.parse.quote("/" + path.partition("?")[0], safe="/%~!$&'()*+,;=:@").encode())
    except RequestError as error:
        raise click.UsageError(error.detail) from error
    query = Signer(key).query(parsed, int(time.time()) + expires)
    if kept := path.partition("?")[2]:
        query = f"{kept}&{query}"
    print(
        f"{scheme + separator + authority if separator else ''}{parsed.encoded(directory=parsed.is_directory).decode()}?{query}"
    )


@main.command("status")
@click.option("--config", metavar="FILE", help="The server's configuration: metrics.listen says where to ask.")
@click.option("--url", metavar="URL", help="Where to ask, http://HOST:PORT.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_errors_as_exit_status
def status_(config: str | None, url: str | None, *, as_json: bool) -> None:
    """Tell how a running server is: who encrypts, what was sent, what went wrong, when certificates end.

    It asks the metrics listener. Exit status 1 if nobody answers there, or somebody else.
    """
    from ktlsd import status

    where = _address(url) if url is not None else _metrics_address(config)
    families = status.parse(status.fetch(where), where)
    if as_json:
        print(msgspec.json.encode(status.summarise(families, time.time())).decode())
        return
    encoding = sys.stdout.encoding  # not every terminal has every character of a path
    for line in status.report(families, time.time()):
        print(line.encode(encoding, "replace").decode(encoding))


def _address(url: str) -> str:
    """Return `url` in full. Raises SettingsError."""
    try:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        fine = parts.scheme == "http" and parts.hostname and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        fine = False
    if not fine or not url.isascii() or not url.isprintable() or " " in url:
        raise SettingsError(f"--url: {url!r} is not http://HOST:PORT; the metrics listener has no TLS")
    path = parts.path if parts.path not in ("", "/") else "/metrics"
    return urllib.parse.urlunsplit(("http", parts.netloc, path, parts.query, ""))


def _metrics_address(config: str | None) -> str:
    """Return the address of the first metrics.listen. Raises SettingsError."""
    if config is None:
        raise SettingsError("status: of which server? Give --config FILE or --url http://HOST:PORT")
    listen = read_file(config).metrics.listen
    if not listen:
        raise SettingsError(f"{config}: there is no metrics.listen; add it and reload ktlsd, or give --url")
    try:
        host, port = parse_listen(listen[0])
    except SettingsError as exc:
        raise SettingsError(f"{config}: metrics.{exc}") from exc
    if not port:
        raise SettingsError(f"{config}: metrics.listen: port 0 is any free one; give --url with what `ktlsd serve` told")
    if host in ("", "0.0.0.0", "::"):  # noqa: S104  # where it listens; asked is this machine
        host = "localhost"
    return f"http://{address_text(host, port)}/metrics"


@main.command()
@click.option("--quick", "mode", flag_value="quick", help="A quarter of a minute.")
@click.option("--full", "mode", flag_value="full", help="More sizes, ciphers and rounds: many minutes.")
@click.option("--against", metavar="NAMES", help="Servers to measure beside ktlsd, by commas: nginx,lighttpd,caddy,apache,…")
@click.option("--json", metavar="FILE|-", help="Write the result with every sample; - is standard output.")
@click.option("--html", metavar="FILE|-", help="Write a page with plots.")
@click.option("--png", metavar="FILE|-", help="Write the plots (pip install 'ktlsd[bench]').")
@click.option("--markdown", metavar="FILE|-", help="Write the tables for a document.")
@click.option("--from", "saved", metavar="FILE", help="Measure nothing: show what an earlier run wrote with --json.")
@click.option("--size", "sizes", metavar="BYTES", multiple=True, help="Size of a transfer, like 10k or 256M; may be repeated.")
@click.option("--connections", metavar="N", type=click.IntRange(1, 10_000), multiple=True, help="At a time; may be repeated.")
@click.option(
    "--protocol", "protocols", type=click.Choice(["raw", "http/1.1", "h2"]), multiple=True, help="raw: ways of sending."
)
@click.option("--cipher", "ciphers", metavar="NAME", multiple=True, help='"TLSv1.3", "TLSv1.2 AES-128-GCM" and the like.')
@click.option("--cold", is_flag=True, help="Also with files that are not in memory.")
@click.option("--delay", "delay_ms", metavar="MS", type=click.FloatRange(0, 10_000), default=0.0, help="One way; needs root.")
@click.option(
    "--loss", "loss_percent", metavar="%", type=click.FloatRange(0, 90), default=0.0, help="Of all packets; needs root."
)
@click.option("--rounds", metavar="N", type=click.IntRange(1, 1000), help="Measurements of each, in turn.")
@click.option("--folder", metavar="DIR", type=click.Path(exists=True, file_okay=False), help="Where files are put. [memory]")
@click.option("--calibrate", is_flag=True, help="Find ktls.handover_bytes and ktls.framing for this machine.")
@click.option("--print-config", metavar="NAME", help="Print the configuration a server would be measured with.")
@click.option("--compare", metavar="A B", nargs=2, help="Show how one --json file stands to another.")
@_errors_as_exit_status
def bench(**asked: Any) -> None:
    """Compare kernel and userspace TLS on this machine, and ktlsd with other servers.

    Takes about a minute. Exit status 1 if something sent wrong bytes, too few, or fell back in silence.
    """
    from ktlsd.bench import command  # not wanted by a server

    if asked["print_config"] is not None:
        command.print_config(asked["print_config"])
    elif asked["compare"] is not None:
        command.compare(*asked["compare"])
    else:
        sys.exit(command.bench(**asked))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Tell what this kernel encrypts, per TLS version and cipher, and what to do where it doesn't.

    Exit status 0 only if kernel TLS works (all AES-GCM combinations), else 1.
    """
    kernel = LinuxKernel()
    facts = handover.self_test(kernel, handover.probe(kernel))
    report = _report(facts)
    print(msgspec.json.encode(report).decode() if as_json else _report_text(report))
    sys.exit(0 if facts.takes_aes else 1)


def _report(facts: KernelFacts) -> dict[str, Any]:
    return {
        "ktlsd": __version__,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "works": facts.takes_aes,
        "rekey": facts.rekey,
        "combinations": [
            {
                "version": combination.split()[0],
                "cipher": combination.split()[1],
                "accepted": not reason,
                "reason": reason or None,
                "remedy": handover.remedy(reason) or None,
            }
            for combination, reason in ((handover.combination_name(c), r) for c, r in facts.refusals.items())
        ],
    }


def _report_text(report: dict[str, Any]) -> str:
    lines = [f"ktlsd {report['ktlsd']} on Linux {report['kernel']}, Python {report['python']}, {report['openssl']}", ""]
    for row in report["combinations"]:
        verdict = "the kernel encrypts; self-test passed" if row["accepted"] else f"no: {row['reason']}"
        lines.append(f"  {row['version']}  {row['cipher']:<18} {verdict}")
    rekey = "yes" if report["rekey"] else "no (needs 6.14): a client's KeyUpdate ends its connection after the response"
    lines += [f"  TLSv1.3  rekey              {rekey}" if report["works"] else "", ""]
    remedies = dict.fromkeys(row["remedy"] for row in report["combinations"] if row["remedy"])
    lines += remedies or (["Kernel TLS works."] if report["works"] else ["Kernel TLS does not work here."])
    return "\n".join(lines)
