"""A trace from the bytes of a file: the format is told from the content, never from the name."""

from typing import Final

from tokenworks.errors import UserError
from tokenworks.workload.lines import read_lines, write
from tokenworks.workload.tables import read_table
from tokenworks.workload.trace import Trace

__all__ = ["read", "write"]

_BOM: Final = b"\xef\xbb\xbf"

# First bytes, what they mean, and what to do.
_NOT_TEXT: Final = (
    (b"\x1f\x8b", "is compressed (gzip)", "gunzip it first."),
    (b"PK\x03\x04", "is compressed (zip)", "unzip it first."),
    (b"\x28\xb5\x2f\xfd", "is compressed (zstd)", "Decompress it with zstd -d first."),
    (b"BZh", "is compressed (bzip2)", "bunzip2 it first."),
    (b"\xfd7zXZ", "is compressed (xz)", "unxz it first."),
    (b"PAR1", "is a Parquet file", "Convert it to CSV first."),
)


def read(data: bytes, name: str) -> Trace:
    """The trace in a file's bytes: CSV of Azure or BurstGPT, JSON lines of Mooncake, Dynamo or our
    own. `name` is the file's, for errors. UserError in one line, with the place, for all else.
    """
    for magic, what, remedy in _NOT_TEXT:
        if data.startswith(magic):
            raise UserError(f"{name} {what}", remedy)
    data = data.removeprefix(_BOM)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}:{line}: not UTF-8", "Save the file as UTF-8.") from None
    if "\0" in text:
        remedy = "Give CSV (Azure, BurstGPT) or JSON lines (Mooncake, Dynamo, our own)."
        raise UserError(f"{name} is no text file", remedy)
    start = text.lstrip()[:1]
    if not start:
        raise UserError(f"{name} is empty", "Give a file with requests.")
    if start == "[":
        remedy = "Write one object per line, without brackets around: jq -c '.[]'."
        raise UserError(f"{name} is a JSON array", remedy)
    return read_lines(data, name) if start == "{" else read_table(text, name)
