"""The rows of a task file, whatever its format: CSV, TSV and JSON Lines line by line, Parquet in batches, JSON as a whole.

Each reader yields (number, row) pairs, where the row is a dict by column or the `Fault` that kept it from being one.
The number is what an editor shows: the line on which the row starts, or in Parquet and JSON the row counted from 1.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, cast

_TEXT_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
ENDINGS = (*(ending + gz for ending in _TEXT_ENDINGS for gz in ("", ".gz")), ".parquet")
PARQUET_BATCH_ROWS = 1024
MAX_CELL_CHARACTERS = 2**24
"""Longest cell of a CSV file. A bound, since a quote that is never closed makes the rest of a file one cell."""


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
    """The ending of a file's name that names its format, as written; None if it is not a task file."""
    for ending in ENDINGS:
        if name.lower().endswith(ending) and len(name) > len(ending):
            return name[-len(ending) :]
    return None


def unit_of(path: Path) -> str:
    """What the numbers of a file's rows count."""
    return "row" if _format_of(path) in (".parquet", ".json") else "line"


def _format_of(path: Path) -> str:
    return (ending_of(path.name) or "").lower().removesuffix(".gz")


def is_text(value: object) -> bool:
    """Whether a value is a string with more than white space in it that UTF-8 can hold (a lone surrogate cannot)."""
    return isinstance(value, str) and bool(value.strip()) and _fits_utf8(value)


def _fits_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def rows_of(path: Path, columns: Sequence[str] = (), optional: Sequence[str] = ()) -> Rows:
    """The rows of a task file.

    Args:
        columns: what a CSV header or a Parquet schema must have.
        optional: what is read of a Parquet file besides, where it is there; without `columns`, everything is.
    """
    match _format_of(path):
        case ".parquet":
            return _parquet_rows(path, columns, optional)
        case ".csv":
            return _csv_rows(path, columns, "comma")
        case ".tsv":
            return _csv_rows(path, columns, "tab")
        case ".json":
            return _json_rows(path)
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


def _column_fault(found: Sequence[str], needed: Sequence[str], separator: str | None = None) -> Fault | None:
    """What is wrong with the columns of a whole file."""
    if "\0" in "".join(found):
        return Fault("not UTF-8", "NUL bytes, as UTF-16 has them", "UTF-8 text", "Save the file as UTF-8.", fatal=True)
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
            f"{list(needed)}{f', separated by {separator}s' if separator else ''}",
            "Add a header, or name the right columns in the config.",
            fatal=True,
        )
    return None


_BAD_UTF8 = Fault("not UTF-8", "bytes that are not UTF-8", "UTF-8 text", "Save the file as UTF-8.")


def _csv_rows(path: Path, columns: Sequence[str], separator: Literal["comma", "tab"]) -> Rows:
    start = 1
    # Python's limit of 131,072 characters holds for the whole process, so it is raised once and never lowered under another
    # reader. A number beyond a C long, which has 32 bits on Windows, would be refused.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL_CHARACTERS))
    try:
        # surrogateescape keeps a bad byte inside its cell, so that only its row is lost and not the whole file.
        with (
            _open_bytes(path) as raw,
            io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
        ):
            reader = csv.reader(text, strict=True, delimiter="," if separator == "comma" else "\t")
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
                    yield start, _bad_cells(error, fatal=fatal)
                    if fatal:
                        return
                    continue
                if not cells:
                    continue  # an empty line
                readable = _fits_utf8("".join(cells))
                if header is None:
                    header = cells
                    fault = _column_fault(header, columns, separator) if readable else replace(_BAD_UTF8, fatal=True)
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
                            f"Put quotes around a cell that has a {separator} in it.",
                        ),
                    )
                else:
                    yield start, dict(zip(header, cells, strict=True))
            fault = _column_fault(header or [], columns, separator)
            if fault is not None:  # no header at all
                yield start, fault
    except (OSError, EOFError, zlib.error) as error:
        yield start, _unreadable(error, "CSV")


def _bad_cells(error: csv.Error, *, fatal: bool) -> Fault:
    if str(error).startswith("field larger than field limit"):
        return Fault(
            "cell too long",
            f"a cell of more than {csv.field_size_limit():,} characters",
            "shorter ones",
            "Shorten it, or close the quotes: an open quote makes one cell of all that follows.",
            fatal=fatal,
        )
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
                if raw.removeprefix(codecs.BOM_UTF8).strip():
                    yield line, _object(json_value(raw, "one JSON object on the line", "Correct the line."))
    except (OSError, EOFError, zlib.error) as error:
        yield line + 1, _unreadable(error, "JSON Lines")


def _json_rows(path: Path) -> Rows:
    """The objects of a JSON file that is one list of them."""
    wanted, advice = "one list of objects", "Correct the file, or call it .jsonl if each of its lines is an object."
    try:
        with _open_bytes(path) as file:
            value = json_value(file.read(), wanted, advice)
    except (OSError, EOFError, zlib.error) as error:
        yield 1, _unreadable(error, "JSON")
        return
    if isinstance(value, Fault):
        yield 1, replace(value, fatal=True)
    elif not isinstance(value, list):
        found = f"a JSON {type(value).__name__}"
        yield 1, Fault("not a list", found, wanted, 'Write [{"input": …, "output": …}, …].', fatal=True)
    else:
        for number, item in enumerate(value, start=1):
            yield number, _object(item)


def json_value(raw: bytes, expected: str, advice: str) -> Any:
    """The value in JSON text, with or without a byte order mark, or the `Fault` that the text has."""
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError:
        return _BAD_UTF8
    except _DuplicateKey as error:
        return Fault("duplicate column", f"the key {str(error)!r} twice", "each key once", "Remove one of them.")
    except (ValueError, RecursionError) as error:
        return Fault("broken JSON", f"broken JSON ({error})", expected, advice)


def _object(value: Any) -> dict[str, Any] | Fault:
    if isinstance(value, dict | Fault):
        return value
    return Fault(
        "not an object",
        f"a JSON {type(value).__name__}",
        "an object in braces",
        'Write {"input": …, "output": …}.',
    )


def _parquet_rows(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Rows:
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
            read = [*columns, *(name for name in optional if name in names)] if columns else names
            classes = _class_names(file.schema_arrow.metadata or {})
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=read):
                cells = (_named(_arrow_values(batch.column(name)), classes.get(name, ())) for name in read)
                for values in zip(*cells, strict=True):
                    number += 1
                    yield number, dict(zip(read, values, strict=True))
    except (OSError, pyarrow.ArrowException) as error:
        yield number + 1, _unreadable(error, "Parquet")


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Column → the names of its classes. The library `datasets` stores a class as a number, and its name in the metadata."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {name: about["names"] for name, about in features.items() if about.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):  # not written by it: the numbers stay
        return {}


def _named(values: list[Any], classes: Sequence[str]) -> list[Any]:
    """Numbers of classes as their names; others, such as -1 for a label that was not published, as they are."""
    known = range(len(classes))
    return [classes[value] if isinstance(value, int) and value in known else value for value in values]


def _arrow_values(column: Any) -> list[Any]:
    import pyarrow

    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:  # a writer put other bytes into a string column; keep the loss to its rows
        if isinstance(column, pyarrow.DictionaryArray):
            column = column.dictionary_decode()
        return [
            value.as_buffer().to_pybytes().decode("utf-8", "surrogateescape") if value.is_valid else None
            for value in column
        ]
