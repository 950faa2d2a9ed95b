"""The ASCII header that starts an AEDAT file: lines that begin with '#', each ended by a line feed."""

from __future__ import annotations

from pathlib import Path

from .arrays import EventFileError

MAX_HEADER_BYTES = 1 << 20  # jAER writes its settings into the header: tens of KiB are real, megabytes are damage


def split_header(data: bytes, path: str | Path, version: str, end_line: bytes | None) -> tuple[list[str], int]:
    """Lines of the header and the offset of the first byte after it.

    version   "2.0" or "3.1": the first line must be "#!AER-DAT<version>"
    end_line  b"#!END-HEADER" where the format has an end marker; None: the header ends at the first line without '#'
    Raises EventFileError for another first line, a missing end marker, or a header without an end.
    """
    expected = b"#!AER-DAT" + version.encode()
    if not data:
        raise EventFileError(path, "is empty (0 bytes).")
    if data[: len(expected)] != expected:
        start = data[:16]
        advice = "" if start[:9] != b"#!AER-DAT" else "It is AEDAT of another version: use the reader of that version."
        raise EventFileError(path, f"starts with {start!r}, not with {expected.decode()!r}.", advice)
    lines: list[str] = []
    offset = 0
    while data[offset : offset + 1] == b"#":
        end = data.find(b"\n", offset, offset + MAX_HEADER_BYTES)
        if end < 0:
            raise EventFileError(path, f"has a header line without an end in {MAX_HEADER_BYTES} bytes.")
        if end > MAX_HEADER_BYTES:
            raise EventFileError(path, f"has a header of more than {MAX_HEADER_BYTES} bytes: it is damaged.")
        line = data[offset:end].rstrip(b"\r")
        lines.append(line.decode("ascii", "replace"))
        offset = end + 1
        if end_line is not None and line == end_line:
            return lines, offset
    if end_line is not None:
        raise EventFileError(path, f"has no {end_line.decode()!r} line: the header ends after {len(lines)} lines.")
    return lines, offset


def header_lines(version: str, comments: list[str]) -> bytes:
    """The header as bytes: the version line, then one '# ...' line for each comment, CRLF ends."""
    for comment in comments:
        if not comment.isascii() or "\n" in comment or "\r" in comment:
            raise ValueError(f"header comment {comment!r} is not one line of ASCII text.")
    lines = [f"#!AER-DAT{version}", *(f"#{comment}" for comment in comments)]
    return "".join(line + "\r\n" for line in lines).encode("ascii")
