"""Other servers, each as its manual would have it for files: what `ktlsd bench --against` measures, and what it is told to do.

Fair means: one worker, the same certificate, files, TLS versions and ciphers, HTTP/2 on, no access log, connections that stay
as long as the client wants, sendfile on, kernel TLS on where the build can. Whatever else is set is set because it helps the
peer, with the reason beside it. `configuration` returns what would be written, for those who doubt it; its first lines say how
it is started.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ktlsd.bench import peer_apps
from ktlsd.bench.answers import HttpKind, NotMeasurable
from ktlsd.bench.servers import Place, Server, free_port

_CIPHERS: Final = "ECDHE+AES128+AESGCM:ECDHE+AES256+AESGCM:ECDHE+CHACHA20"  # TLS 1.2, as ktlsd's own
_LASTING: Final = 1_000_000_000  # requests, seconds: for ever
_BOTH: Final[tuple[HttpKind, ...]] = ("http/1.1", "h2")
_TIMEOUT: Final = 10.0  # seconds to tell a version


@dataclass(frozen=True, slots=True)
class Installed:
    """Where a peer was found: the command that starts it, and the version it says it is."""

    command: tuple[str, ...]
    version: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """What goes into a configuration."""

    place: Place
    port: int
    version: str = ""  # the peer's own, "1.22.1"; "" if it is not known
    kernel: bool = True  # whether to ask for kernel TLS


@dataclass(frozen=True, slots=True)
class Peer:
    """One of them. `file` is the configuration's name; `options` follow the command."""

    name: str
    install: str  # the command that does
    file: str
    text: Callable[[Wanted], str]
    options: Callable[[Wanted], list[str]]
    protocols: tuple[HttpKind, ...] = _BOTH
    ktls: bool = False  # whether it can have the kernel encrypt, if it is built for it
    module: str = ""  # a Python program's
    environment: tuple[str, ...] = ()  # beside our own, "GOMAXPROCS=1"


# --- nginx -------------------------------------------------------------------------------------------------------------


def _nginx(wanted: Wanted) -> str:
    place, address = wanted.place, f"{wanted.place.network.host}:{wanted.port}"
    numbers = tuple(int(part) for part in re.findall(r"\d+", wanted.version)[:3])
    http2 = f"listen {address} ssl;\n    http2 on;" if numbers >= (1, 25, 1) else f"listen {address} ssl http2;"
    return f"""\
worker_processes 1;
pid {place.folder}/nginx.pid;
error_log stderr error;
daemon off;
{f"user nobody {_group()};" if os.geteuid() == 0 else "# not root: its workers are whoever started it"}
events {{ worker_connections 4096; }}
http {{
  access_log off;
  sendfile on;
  tcp_nopush on;                      # full packets, as its manual has it beside sendfile
  open_file_cache max=1000 inactive=1h;  # ktlsd keeps files open, too
  output_buffers 2 256k;              # what it reads at a time where it encrypts itself; its default is 32k
  keepalive_requests {_LASTING};
  keepalive_timeout 1h;
  http2_chunk_size 16k;               # frames as large as HTTP/2 allows; its default is 8k
  client_body_temp_path {place.folder}/nginx-body;
  proxy_temp_path {place.folder}/nginx-proxy;
  fastcgi_temp_path {place.folder}/nginx-fastcgi;
  uwsgi_temp_path {place.folder}/nginx-uwsgi;
  scgi_temp_path {place.folder}/nginx-scgi;
  ssl_certificate {place.cert};
  ssl_certificate_key {place.key};
  ssl_protocols TLSv1.2 TLSv1.3;
  ssl_ciphers {_CIPHERS};
  server {{
    {http2}
    {"ssl_conf_command Options KTLS;" if wanted.kernel else "# no ssl_conf_command Options KTLS: this kernel doesn't encrypt"}
    root {place.root};
  }}
}}
"""


# --- lighttpd ----------------------------------------------------------------------------------------------------------


def _lighttpd(wanted: Wanted) -> str:
    place = wanted.place
    ktls = "KTLS" if wanted.kernel else "-KTLS"
    return f"""\
server.modules = ("mod_openssl")
server.document-root = "{place.root}"
server.bind = "{place.network.host}"
server.port = {wanted.port}
server.errorlog = "{place.folder}/lighttpd-error.log"
server.max-worker = 0                          # one process that does everything
server.network-backend = "sendfile"
server.max-keep-alive-requests = 65535         # the most: it has 16 bits
server.max-keep-alive-idle = 3600
server.feature-flags = ("server.h2proto" => "enable")
ssl.engine = "enable"
ssl.pemfile = "{place.cert}"
ssl.privkey = "{place.key}"
ssl.openssl.ssl-conf-cmd = ("MinProtocol" => "TLSv1.2", "CipherString" => "{_CIPHERS}", "Options" => "{ktls}")
mimetype.assign = ("" => "application/octet-stream")
"""


# --- Apache ------------------------------------------------------------------------------------------------------------


def _apache(wanted: Wanted) -> str:
    place = wanted.place
    return f"""\
ServerRoot "{place.folder}"
ServerName localhost
Listen {place.network.host}:{wanted.port}
PidFile "{place.folder}/apache.pid"
DefaultRuntimeDir "{place.folder}"
ErrorLog "{place.folder}/apache-error.log"
{_apache_modules()}
{"User nobody" if os.geteuid() == 0 else "# not root: its worker is whoever started it"}
{f"Group {_group()}" if os.geteuid() == 0 else ""}
ServerLimit 1
StartServers 1
ThreadsPerChild 64
MaxRequestWorkers 64
MinSpareThreads 1
MaxSpareThreads 64
MaxConnectionsPerChild 0
KeepAlive On
MaxKeepAliveRequests 0
KeepAliveTimeout 3600
# Off by default; with TLS it reads and encrypts all the same.
EnableSendfile On
# On by default; with TLS it costs more CPU time than reading, a tenth to a quarter.
EnableMMAP Off
Protocols h2 http/1.1
H2MaxSessionStreams 1000
# Large TLS records from the first byte on; by default only behind the first MiB.
H2TLSWarmUpSize 0
RequestReadTimeout header=0 body=0
SSLEngine On
SSLCertificateFile "{place.cert}"
SSLCertificateKeyFile "{place.key}"
SSLProtocol -all +TLSv1.2 +TLSv1.3
SSLCipherSuite {_CIPHERS}
SSLSessionCache none
SSLRandomSeed startup builtin
DocumentRoot "{place.root}"
<Directory "{place.root}">
  Require all granted
</Directory>
"""


_APACHE_FOLDERS: Final = ("/usr/lib/apache2/modules", "/usr/lib64/httpd/modules", "/usr/lib/httpd/modules")
_APACHE_MODULES: Final = ("mpm_event", "authz_core", "http2", "ssl", "reqtimeout", "socache_shmcb")


def _apache_modules() -> str:
    """Name the modules that are files; others are built in."""
    folder = next((Path(name) for name in _APACHE_FOLDERS if Path(name).is_dir()), Path("/usr/lib/apache2/modules"))
    files = [(name, folder / f"mod_{name}.so") for name in _APACHE_MODULES]
    return "\n".join(f"LoadModule {name}_module {path}" for name, path in files if path.exists() or not folder.exists())


# --- Caddy -------------------------------------------------------------------------------------------------------------


def _caddy(wanted: Wanted) -> str:
    place = wanted.place
    return f"""\
# GOMAXPROCS=1: one processor, as the others have with one worker.
{{
  admin off
  auto_https off
  storage file_system {place.folder}/caddy
  servers {{
    protocols h1 h2
    timeouts {{
      idle 1h
    }}
  }}
}}
https://localhost:{wanted.port} {{
  bind {place.network.host}
  tls {place.cert} {place.key} {{
    protocols tls1.2 tls1.3
  }}
  root * {place.root}
  file_server
}}
"""


# --- Python ------------------------------------------------------------------------------------------------------------


def _asgi(wanted: Wanted) -> str:
    return peer_apps.ASGI.format(root=str(wanted.place.root))


def _hypercorn(wanted: Wanted) -> str:
    return _asgi(wanted) + peer_apps.HYPERCORN.format(requests=_LASTING)


def _aiohttp(wanted: Wanted) -> str:
    place = wanted.place
    return peer_apps.AIOHTTP.format(
        ciphers=_CIPHERS,
        cert=str(place.cert),
        key=str(place.key),
        root=str(place.root),
        host=place.network.host,
        port=wanted.port,
    )


def _uvicorn_options(wanted: Wanted) -> list[str]:
    return [
        "uvicorn_app:app", "--host", wanted.place.network.host, "--port", str(wanted.port), "--workers", "1", "--no-access-log",
        "--log-level", "warning", "--timeout-keep-alive", "3600", "--ssl-certfile", str(wanted.place.cert),
        "--ssl-keyfile", str(wanted.place.key), "--ssl-ciphers", _CIPHERS,
    ]  # fmt: skip


def _hypercorn_options(wanted: Wanted) -> list[str]:
    return [
        "hypercorn_app:app", "--config", "python:hypercorn_app.Settings", "--workers", "1", "--keep-alive", "3600",
        "--bind", f"{wanted.place.network.host}:{wanted.port}", "--log-level", "warning", "--ciphers", _CIPHERS,
        "--certfile", str(wanted.place.cert), "--keyfile", str(wanted.place.key),
    ]  # fmt: skip


def _granian_options(wanted: Wanted) -> list[str]:
    return [
        "granian_app:app", "--interface", "rsgi", "--host", wanted.place.network.host, "--port", str(wanted.port),
        "--workers", "1", "--runtime-threads", "1", "--no-ws", "--log-level", "warning", "--ssl-protocol-min", "tls1.2",
        "--ssl-certificate", str(wanted.place.cert), "--ssl-keyfile", str(wanted.place.key),
    ]  # fmt: skip


# --- all of them -------------------------------------------------------------------------------------------------------

PEERS: Final = (
    Peer("nginx", "apt-get install nginx", "nginx.conf", _nginx,
         lambda w: ["-p", str(w.place.folder), "-c", str(w.place.folder / "nginx.conf"), "-e", "stderr"], ktls=True),
    Peer("lighttpd", "apt-get install lighttpd lighttpd-mod-openssl", "lighttpd.conf", _lighttpd,
         lambda w: ["-D", "-f", str(w.place.folder / "lighttpd.conf")], ktls=True),
    Peer("caddy", "apt-get install caddy", "Caddyfile", _caddy,
         lambda w: ["run", "--adapter", "caddyfile", "--config", str(w.place.folder / "Caddyfile")],
         environment=("GOMAXPROCS=1",)),
    Peer("apache", "apt-get install apache2", "apache.conf", _apache,
         lambda w: ["-D", "FOREGROUND", "-f", str(w.place.folder / "apache.conf")]),
    Peer("granian", "pip install granian uvloop", "granian_app.py", lambda w: peer_apps.GRANIAN.format(root=str(w.place.root)),
         _granian_options, module="granian"),
    # Its parser that knows HTTP/2 as well (--http zttp --http2) takes a third more CPU time for HTTP/1.1, so it is not used.
    Peer("uvicorn", "pip install 'uvicorn[standard]'", "uvicorn_app.py", _asgi, _uvicorn_options, ("http/1.1",),
         module="uvicorn"),
    Peer("hypercorn", "pip install hypercorn uvloop", "hypercorn_app.py", _hypercorn, _hypercorn_options, module="hypercorn"),
    Peer("aiohttp", "pip install aiohttp uvloop", "aiohttp_app.py", _aiohttp, lambda w: ["aiohttp_app.py"], ("http/1.1",),
         module="aiohttp"),
)  # fmt: skip
BY_NAME: Final = {peer.name: peer for peer in PEERS}
NAMES: Final = tuple(BY_NAME)
_PROGRAMS: Final = {"apache": ("apache2", "httpd")}
_VERSION: Final = {"nginx": "-v", "lighttpd": "-v", "apache": "-v", "caddy": "version"}


def configuration(name: str, folder: Path, port: int, *, kernel: bool = True) -> str:
    """Return what would be written for this peer to serve `folder`/root at this port. `name` is one of NAMES."""
    peer = BY_NAME[name]
    found = _find_quietly(peer) or Installed(("python", "-m", name) if peer.module else (name,), "")
    return _text(peer, found, Wanted(Place(folder), port, found.version, kernel))


def _text(peer: Peer, found: Installed, wanted: Wanted) -> str:
    """Return the configuration below the command that starts it."""
    command = shlex.join([*found.command, *peer.options(wanted)])
    return f"""\
# {peer.name} {found.version or "(not installed here)"}, started in {wanted.place.folder}, files in {wanted.place.root}:
# {" ".join([*peer.environment, command])}
{peer.text(wanted)}"""


def find(name: str) -> Installed:
    """Look for a peer in PATH, a Python program's in every Python there. Raises NotMeasurable with what would install it."""
    found = _find_quietly(BY_NAME[name])
    if found is None:
        raise NotMeasurable(f"{name} is not installed: {BY_NAME[name].install}")
    return found


def _find_quietly(peer: Peer) -> Installed | None:
    return _find_module(peer.module) if peer.module else _find_program(peer.name)


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"  # where servers are, and not in everybody's PATH


def _find_program(name: str) -> Installed | None:
    for program in _PROGRAMS.get(name, (name,)):
        if path := shutil.which(program, path=_path()):
            match = re.search(r"\d+\.\d+(?:\.\d+)?", _output(path, _VERSION[name]))
            return Installed((path,), match[0] if match else "")
    return None


def _find_module(module: str) -> Installed | None:
    """Look first where we run ourselves, then in the environments in PATH."""
    pythons = [sys.executable] if importlib.util.find_spec(module) else []
    pythons += [str(Path(folder) / "python3") for folder in os.environ.get("PATH", "").split(":") if folder]
    for python in dict.fromkeys(pythons):
        version = _output(python, "-c", f"import importlib.metadata as m; print(m.version({module!r}))")
        if re.match(r"\d", version):
            return Installed((python,) if module == "aiohttp" else (python, "-m", module), version.strip())
    return None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)  # noqa: S603  # ours
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode else done.stdout + done.stderr


def _group() -> str:
    """Return the group that a server becomes with the user nobody, when it gives up root."""
    return "nogroup" if "nogroup" in Path("/etc/group").read_text() else "nobody"


def start(name: str, place: Place, *, kernel: bool) -> Server:
    """Start a peer and wait until it listens; `kernel`: with kernel TLS, if it can. Raises NotMeasurable."""
    peer, found = BY_NAME[name], find(name)
    kernel = kernel and peer.ktls
    label = f"{name}-{'kernel' if kernel else 'userspace'}"
    wanted = Wanted(place, free_port(place.network), found.version, kernel)
    text = _text(peer, found, wanted)
    (place.folder / peer.file).write_text(text)
    env = {"HOME": str(place.folder), "PYTHONDONTWRITEBYTECODE": "1"}  # they leave nothing behind elsewhere
    env |= dict(setting.split("=") for setting in peer.environment)
    server = Server(name, [*found.command, *peer.options(wanted)], place, label=label, env=env)
    try:
        server.await_port(wanted.port)
    except BaseException:
        server.stop()
        raise
    server.tls = "kernel" if kernel else "userspace"
    server.configuration = text
    server.program = f"{name}/{found.version}, {'kernel TLS on' if kernel else 'userspace TLS'}"
    return server
