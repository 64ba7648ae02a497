"""multipart/byteranges (RFC 9110 §14.6) as segments: part headers between slices of the file, nothing copied."""

from collections.abc import Sequence

from ktlsd.protocol.semantics import ByteRange
from ktlsd.slices import FileSlice, OpenFile, Segment


def byteranges(file: OpenFile, ranges: Sequence[ByteRange], content_type: bytes, boundary: bytes) -> tuple[list[Segment], int]:
    """Return the body and its length in bytes. `boundary` must be random: it may not occur in the file (RFC 2046 §5.1.1)."""
    body: list[Segment] = []
    length = 0
    for number, part in enumerate(ranges):
        head = b"%s--%s\r\nContent-Type: %s\r\nContent-Range: bytes %d-%d/%d\r\n\r\n" % (
            b"\r\n" if number else b"", boundary, content_type, part.first, part.last, file.size,
        )  # fmt: skip
        body += (head, FileSlice(file, part.first, part.length))
        length += len(head) + part.length
    end = b"\r\n--%s--\r\n" % boundary
    body.append(end)
    return body, length + len(end)
