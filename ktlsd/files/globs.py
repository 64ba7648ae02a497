"""Globs on decoded paths: * within a name, ** across names, ? one character. Pure."""

import re


def compile_glob(pattern: str) -> "re.Pattern[bytes]":
    """Return an expression for `fullmatch` on a path like b"/a/b.iso" (a folder's ends in a slash).

    A pattern without a slash is about the last name: "*.iso" is "/**/*.iso". "/a/**" is also "/a/" itself.
    """
    if "/" not in pattern:
        pattern = "/**/" + pattern
    elif not pattern.startswith("/"):
        pattern = "/" + pattern
    out = b""
    rest = pattern.encode("utf-8", "surrogateescape")
    while rest:
        if rest.startswith(b"/**/"):
            out, rest = out + b"/(?:[^/]+/)*", rest[4:]
        elif rest.startswith(b"**"):
            out, rest = out + b".*", rest[2:]
        elif rest.startswith(b"*"):
            out, rest = out + b"[^/]*", rest[1:]
        elif rest.startswith(b"?"):
            out, rest = out + b"[^/]", rest[1:]
        else:
            out, rest = out + re.escape(rest[:1]), rest[1:]
    return re.compile(out, re.DOTALL)
