"""Which representation a client would rather have: Accept and Accept-Encoding (RFC 9110 §12). Pure."""

import re
from collections.abc import Sequence
from typing import Final

_ELEMENT: Final = re.compile(rb"[ \t]*([^\s;,]+)[ \t]*((?:;[^,]*)?)(?:,|$)")
_QUALITY: Final = re.compile(rb";[ \t]*[qQ]=(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)[ \t]*(?:;|$)")
_MAX_ELEMENTS: Final = 64  # more than any client sends


def weights(value: bytes) -> dict[bytes, float]:
    """Return the elements of a list with their weights (0 to 1; 1 without a q), lower case; what is malformed is left out."""
    found: dict[bytes, float] = {}
    at = 0
    while at < len(value) and len(found) < _MAX_ELEMENTS:
        match = _ELEMENT.match(value, at)
        if match is None:
            comma = value.find(b",", at)
            if comma < 0:
                break
            at = comma + 1
            continue
        name, parameters = match[1].lower(), match[2]
        quality = _QUALITY.search(parameters)
        if quality is not None or not re.search(rb";[ \t]*[qQ]=", parameters):
            found[name] = float(quality[1]) if quality else 1.0
        at = match.end()
    return found


def choose_encoding(accept_encoding: bytes | None, available: Sequence[bytes]) -> bytes | None:
    """Return the content coding to send: one of `available` (best first), b"" for none, None if nothing is acceptable.

    Without the field only b"" is sent: a client that doesn't ask may not be able to decode (RFC 9110 §12.5.3 lets us).
    """
    if accept_encoding is None:
        return b""
    asked = weights(accept_encoding)
    if b"x-gzip" in asked:
        asked.setdefault(b"gzip", asked[b"x-gzip"])
    others = asked.get(b"*")
    plain = asked.get(b"identity", others if others == 0 else None)  # only a 0 forbids it
    best, best_weight = None, 0.0
    for coding in available:
        weight = asked.get(coding, others or 0.0)
        if weight > best_weight:
            best, best_weight = coding, weight
    if best is not None and (plain is None or best_weight >= plain):
        return best
    return None if plain == 0 else b""


def prefers_json(accept: bytes | None) -> bool:
    """Whether a client would rather have application/json than text/html; what names neither gets HTML."""
    if accept is None or b"json" not in accept.lower():
        return False
    asked = weights(accept)

    def weight(kind: bytes, family: bytes) -> float:
        return asked.get(kind, asked.get(family, asked.get(b"*/*", 0.0)))

    json, html = weight(b"application/json", b"application/*"), weight(b"text/html", b"text/*")
    return json > html or (json == html > 0 and b"application/json" in asked and b"text/html" not in asked)
