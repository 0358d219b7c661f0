"""The rows of a task file, whatever its format: CSV and JSON Lines line by line, Parquet in batches.

Each reader yields (number, row) pairs, where the row is a dict by column or the `Fault` that kept it from being one.
The number is what an editor shows: the line on which the row starts, or in Parquet the row counted from 1.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

ENDINGS = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet")
PARQUET_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Fault:
    """Why a row cannot be used."""

    reason: str
    """A few words by which skipped rows are counted."""
    found: str
    expected: str
    advice: str
    fatal: bool = False
    """The rest of the file cannot be read either, so the row cannot just be skipped."""


Rows = Iterator[tuple[int, "dict[str, Any] | Fault"]]


def ending_of(name: str) -> str | None:
    """The part of a file's name that tells its format, as written; None if it is not a task file."""
    for ending in ENDINGS:
        if name.lower().endswith(ending) and len(name) > len(ending):
            return name[-len(ending) :]
    return None


def is_text(value: object) -> bool:
    """Whether a value is a string with more than white space in it that UTF-8 can hold (a lone surrogate cannot)."""
    return isinstance(value, str) and bool(value.strip()) and _fits_utf8(value)


def _fits_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def rows_of(path: Path, columns: Sequence[str]) -> Rows:
    """The rows of a task file; `columns` are those that a CSV header or a Parquet schema must have."""
    ending = (ending_of(path.name) or "").lower()
    if ending == ".parquet":
        return _parquet_rows(path, columns)
    if ending.startswith(".csv"):
        return _csv_rows(path, columns)
    return jsonl_rows(path)


def _unreadable(error: Exception, fmt: str) -> Fault:
    return Fault(
        "unreadable file",
        f"a file that cannot be read ({error})",
        f"a whole {fmt} file",
        "Write the file again.",
        fatal=True,
    )


def _open_bytes(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


def _column_fault(found: Sequence[str], needed: Sequence[str]) -> Fault | None:
    """What is wrong with the columns of a whole file."""
    twice = [name for name, count in Counter(found).items() if count > 1]
    if twice:
        return Fault(
            "duplicate column", f"columns {twice} twice", "each column once", "Remove or rename one.", fatal=True
        )
    missing = [name for name in needed if name not in found]
    if missing:
        return Fault(
            "missing column",
            f"the columns {list(found)} without {missing}",
            f"{list(needed)}, separated by commas if this is CSV",
            "Add a header, or name the right columns in the config.",
            fatal=True,
        )
    return None


_BAD_UTF8 = Fault("not UTF-8", "bytes that are not UTF-8", "UTF-8 text", "Save the file as UTF-8.")


def _csv_rows(path: Path, columns: Sequence[str]) -> Rows:
    start = 1
    try:
        # surrogateescape keeps a bad byte inside its cell, so that only its row is lost and not the whole file.
        with (
            _open_bytes(path) as raw,
            io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
        ):
            reader = csv.reader(text, strict=True)
            header: list[str] | None = None
            while True:
                start = reader.line_num + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    break
                except csv.Error as error:
                    # An error on a later line than the row's first is a quote that was never closed: where the next row
                    # starts is then unknown.
                    fatal = reader.line_num > start or header is None
                    yield start, _bad_quotes(error, fatal=fatal)
                    if fatal:
                        return
                    continue
                if not cells:
                    continue  # an empty line
                readable = _fits_utf8("".join(cells))
                if header is None:
                    header = cells
                    fault = _column_fault(header, columns) if readable else replace(_BAD_UTF8, fatal=True)
                    if fault is not None:
                        yield start, fault
                        return
                elif not readable:
                    yield start, _BAD_UTF8
                elif len(cells) != len(header):
                    yield (
                        start,
                        Fault(
                            "wrong number of cells",
                            f"{len(cells)} cell{'s' if len(cells) > 1 else ''}",
                            f"{len(header)}, as in the header {header}",
                            "Put quotes around a cell that has a comma in it.",
                        ),
                    )
                else:
                    yield start, dict(zip(header, cells, strict=True))
            fault = _column_fault(header or [], columns)
            if fault is not None:  # no header at all
                yield start, fault
    except (OSError, EOFError, zlib.error) as error:
        yield start, _unreadable(error, "CSV")


def _bad_quotes(error: csv.Error, *, fatal: bool) -> Fault:
    return Fault(
        "broken quotes",
        f"broken quotes ({error})",
        'cells in "double quotes", with "" for a quote inside them',
        "Close the quotes, and double those inside a cell.",
        fatal=fatal,
    )


class _DuplicateKey(ValueError):
    pass


def _unique_keys(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """An object's dict; `json` alone would silently keep the last of two equal keys."""
    result: dict[str, Any] = {}
    for key, value in items:
        if key in result:
            raise _DuplicateKey(key)
        result[key] = value
    return result


def jsonl_rows(path: Path) -> Rows:
    """The objects of a JSON Lines file; empty lines are left out."""
    line = 0
    try:
        with _open_bytes(path) as file:
            for line, raw in enumerate(file, start=1):
                if line == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors write
                if raw.strip():
                    yield line, _json_object(raw)
    except (OSError, EOFError, zlib.error) as error:
        yield line + 1, _unreadable(error, "JSON Lines")


def _json_object(raw: bytes) -> dict[str, Any] | Fault:
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError:
        return _BAD_UTF8
    except _DuplicateKey as error:
        return Fault("duplicate column", f"the key {str(error)!r} twice", "each key once", "Remove one of them.")
    except (ValueError, RecursionError) as error:
        return Fault("broken JSON", f"broken JSON ({error})", "one JSON object on the line", "Correct the line.")
    if not isinstance(value, dict):
        return Fault(
            "not an object",
            f"a JSON {type(value).__name__}",
            "an object in braces",
            'Write {"input": …, "output": …}.',
        )
    return value


def _parquet_rows(path: Path, columns: Sequence[str]) -> Rows:
    # Imported here because pyarrow takes a while to load and most folders have no Parquet file.
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            fault = _column_fault(names, columns)
            if fault is not None:
                yield 1, fault
                return
            read = [*columns, *(["split"] if "split" in names else [])]
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=read):
                for values in zip(*(_arrow_values(batch.column(name)) for name in read), strict=True):
                    number += 1
                    yield number, dict(zip(read, values, strict=True))
    except (OSError, pyarrow.ArrowException) as error:
        yield number + 1, _unreadable(error, "Parquet")


def _arrow_values(column: Any) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:  # a writer put other bytes into a string column; keep the loss to its rows
        return [
            value.as_buffer().to_pybytes().decode("utf-8", "surrogateescape") if value.is_valid else None
            for value in column
        ]
