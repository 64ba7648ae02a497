"""Content types by file name; a table of our own, so that every machine answers alike (mimetypes reads /etc/mime.types)."""

import re
from typing import Final

DEFAULT: Final = b"application/octet-stream"

# Text types name a charset only where a browser would guess wrong without: what is served is UTF-8 nowadays.
_TYPES: Final[dict[bytes, bytes]] = {
    extension: content_type.encode("ascii")
    for content_type, extensions in {
        "text/html; charset=utf-8": b"html htm",
        "text/css; charset=utf-8": b"css",
        "text/javascript; charset=utf-8": b"js mjs",
        "text/plain; charset=utf-8": b"txt text log md sha256 sha512 md5 asc sig conf ini toml yaml yml",
        "text/csv; charset=utf-8": b"csv",
        "text/tab-separated-values; charset=utf-8": b"tsv",
        "text/xml; charset=utf-8": b"xml",
        "text/vtt; charset=utf-8": b"vtt",
        "application/json": b"json map",
        "application/jsonl": b"jsonl ndjson",
        "application/manifest+json": b"webmanifest",
        "application/wasm": b"wasm",
        "application/pdf": b"pdf",
        "application/zip": b"zip whl",
        "application/gzip": b"gz tgz",
        "application/x-bzip2": b"bz2",
        "application/x-xz": b"xz",
        "application/zstd": b"zst",
        "application/x-tar": b"tar",
        "application/x-7z-compressed": b"7z",
        "application/java-archive": b"jar",
        "application/vnd.debian.binary-package": b"deb udeb",
        "application/x-rpm": b"rpm",
        "application/x-iso9660-image": b"iso",
        "application/vnd.apache.parquet": b"parquet",
        "application/vnd.apple.mpegurl": b"m3u8",
        "application/dash+xml": b"mpd",
        "application/x-bittorrent": b"torrent",
        "application/metalink4+xml": b"meta4",
        "image/png": b"png",
        "image/jpeg": b"jpg jpeg",
        "image/gif": b"gif",
        "image/webp": b"webp",
        "image/avif": b"avif",
        "image/svg+xml": b"svg",
        "image/x-icon": b"ico",
        "audio/mpeg": b"mp3",
        "audio/ogg": b"ogg oga opus",
        "audio/flac": b"flac",
        "audio/wav": b"wav",
        "audio/mp4": b"m4a",
        "video/mp4": b"mp4 m4v",
        "video/webm": b"webm",
        "video/x-matroska": b"mkv",
        "video/quicktime": b"mov",
        "video/mp2t": b"ts m2ts",
        "font/woff": b"woff",
        "font/woff2": b"woff2",
        "font/ttf": b"ttf",
        "font/otf": b"otf",
    }.items()
    for extension in extensions.split()
}


def content_type(name: bytes) -> bytes:
    """Return the media type for a file name, application/octet-stream if its extension says nothing."""
    _, dot, extension = name.rpartition(b".")
    return _TYPES.get(extension.lower(), DEFAULT) if dot else DEFAULT


# What precompressed siblings are sent for: text in the wide sense. An archive's .gz is another file, not another form of it.
_COMPRESSIBLE: Final = re.compile(
    rb"text/.*|application/(?:json|jsonl|manifest\+json|wasm|xml|.*\+json|.*\+xml)(?:;.*)?|image/svg\+xml|font/[ot]tf"
)


def is_compressible(content_type: bytes) -> bool:
    """Whether another content coding of this type makes sense."""
    return _COMPRESSIBLE.fullmatch(content_type) is not None
