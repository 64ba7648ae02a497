"""What Python's servers are given to run when they are measured: texts, written into a file beside their configuration."""

from typing import Final

# One application for all ASGI servers. Reading blocks, but only for as long as a copy from memory takes: a thread for each
# read, as Starlette has it, would cost more.
ASGI: Final = """\
import os

ROOT = {root!r}
STEP = 262_144


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({{"type": message["type"] + ".complete"}})
            if message["type"] == "lifespan.shutdown":
                return
    path = os.path.join(ROOT, os.path.basename(scope["path"]))
    size = os.path.getsize(path)
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", b"%d" % size)]
    await send({{"type": "http.response.start", "status": 200, "headers": headers}})
    if "http.response.pathsend" in (scope.get("extensions") or {{}}):
        await send({{"type": "http.response.pathsend", "path": path}})
        return
    with open(path, "rb", buffering=0) as file:
        left = size
        while left > 0:
            data = file.read(STEP)
            left -= len(data)
            await send({{"type": "http.response.body", "body": data, "more_body": left > 0}})
"""

# Added to it; a class, because the settings are pickled for the worker.
HYPERCORN: Final = """

class Settings:
    keep_alive_max_requests = {requests}  # its default is 1000
    try:
        import uvloop
        worker_class = "uvloop"  # saves a fifth of the CPU time for small files
    except ImportError:
        worker_class = "asyncio"
"""

# Granian's own interface: a tenth less CPU time than ASGI's "http.response.pathsend".
GRANIAN: Final = """\
# --static-path-mount is faster still over HTTP/2, but sends files without Content-Length, over HTTP/1.1 in chunks.
import os

ROOT = {root!r}


async def app(scope, protocol):
    path = os.path.join(ROOT, os.path.basename(scope.path))
    headers = [("content-type", "application/octet-stream"), ("content-length", str(os.path.getsize(path)))]
    protocol.response_file(200, headers, path)
"""

AIOHTTP: Final = """\
import ssl

from aiohttp import web

context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.minimum_version = ssl.TLSVersion.TLSv1_2
context.set_ciphers({ciphers!r})
context.load_cert_chain({cert!r}, {key!r})
app = web.Application()
app.router.add_static("/", {root!r})  # FileResponse: sendfile where it can, which is not with TLS
try:
    import uvloop
    loop = uvloop.new_event_loop()
except ImportError:
    loop = None
web.run_app(app, host={host!r}, port={port}, ssl_context=context, access_log=None, keepalive_timeout=3600, loop=loop)
"""
