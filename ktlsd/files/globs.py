"""Globs on decoded paths: * within a name, ** for any number of names, ? one character. Pure.

No path a client can send costs more than its length times the pattern's: names are matched one by one, and in a name what
stands before a * is never tried anew (as a plain regular expression would, with n^k for k stars).
"""

import re


class Glob:
    """A pattern. Without a slash it is about the last name: "*.iso" is "/**/*.iso". "/a/**" is also "/a/" itself."""

    def __init__(self, pattern: str) -> None:
        if "/" not in pattern:
            pattern = "/**/" + pattern
        parts = pattern.removeprefix("/").encode("utf-8", "surrogateescape").split(b"/")
        self._names = [None if part == b"**" else _compile_name(part) for part in parts]

    def matches(self, path: bytes) -> bool:
        """Whether it matches a path like b"/a/b.iso" (a folder's ends in a slash)."""
        wanted, names = self._names, path[1:].split(b"/")
        if wanted[-1] is None:  # stands for one name at least
            wanted, names = wanted[:-1], names[:-1]
            open_end = True
        else:
            open_end = False
        at = star = 0
        tried = -1  # the first name that the last ** does not stand for; -1: there was none yet
        here = 0
        while here < len(names):
            if at < len(wanted) and wanted[at] is None:
                at += 1
                star, tried = at, here
            elif at < len(wanted) and _fits(wanted[at], names[here]):
                at += 1
                here += 1
            elif open_end and at == len(wanted):
                return True
            elif tried >= 0:
                tried += 1
                at, here = star, tried
            else:
                return False
        return all(name is None for name in wanted[at:])


def _fits(expression: "re.Pattern[bytes] | None", name: bytes) -> bool:
    return expression is None or expression.fullmatch(name) is not None


def _compile_name(part: bytes) -> "re.Pattern[bytes]":
    chunks = [b"".join(b"." if c == 0x3F else re.escape(bytes([c])) for c in chunk) for chunk in part.split(b"*")]
    first, *rest = chunks
    if not rest:
        return re.compile(first, re.DOTALL)
    middle = b"".join(b"(?>.*?%s)" % chunk for chunk in rest[:-1] if chunk)
    return re.compile(first + middle + b".*" + rest[-1], re.DOTALL)
