"""What the command line prints where the terminal is not UTF-8, and where nobody reads it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from logged_models import log_chain

from softprompt_registry.cli import main
from softprompt_registry.printing import print_table
from softprompt_registry.registry.lineage import lineage

SMILE = "\N{SLIGHTLY SMILING FACE}"


def printed(monkeypatch: pytest.MonkeyPatch, encoding: str, *arguments: str, code: int = 0) -> tuple[bytes, bytes]:
    """(stdout, stderr) of a command in a terminal of that encoding."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        with pytest.raises(SystemExit) as ended:
            main(list(arguments), prog_name="softprompt")
    assert ended.value.code == code
    out, err = (stream.detach().getvalue() for stream in streams)  # type: ignore[attr-defined]
    return out, err


def test_lineage_in_a_terminal_without_box_characters(mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = log_chain(base="Löwe 雨").translator_uri
    tree = printed(monkeypatch, "cp1252", "lineage", uri)[0].decode("cp1252")
    assert r"base model 'Löwe \u96e8' 1f2e1f2e1f2e" in tree
    assert "`- bank 'bank'" in tree and "   `- translator 'translator'" in tree
    for encoding in ("cp1252", "ascii", "utf-8"):
        found = json.loads(printed(monkeypatch, encoding, "lineage", uri, "--json")[0].decode(encoding))
        assert found == json.loads(json.dumps(asdict(lineage(uri))))


@pytest.mark.supports("terminals", "cp1252, ASCII and other encodings", "ASCII forms; what has none is escaped")
@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("cp1252", ["| é 95 · |", r"| \u96e8 -> |", r"| \U0001f642 |", r"| \udcfc |"]),
        ("ascii", [r"| \xe9 95 - |", r"| \u96e8 -> |", r"| \U0001f642 |", r"| \udcfc |"]),
        ("utf-8", ["│ é 95 · │", "│ 雨 → │", f"│ {SMILE} │", r"│ \udcfc │"]),
    ],
)
def test_a_table_takes_every_text(monkeypatch: pytest.MonkeyPatch, encoding: str, expected: list[str]) -> None:
    @main.command("table")
    def table() -> None:
        print_table("Texts", {"text": ["é 95 ·", "雨 →", SMILE, "\udcfc"]})

    try:
        out, _ = printed(monkeypatch, encoding, "table")
    finally:
        main.commands.pop("table")
    rows = [" ".join(line.split()) for line in out.decode(encoding).splitlines()]
    assert [row for row in rows if row in expected] == expected


def test_messages_about_misuse_take_every_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["tune", "--dod", str(tmp_path / "雨.sqlite"), "--out", str(tmp_path / "bank")]
    _, err = printed(monkeypatch, "cp1252", *arguments, "-s", "雨=1", code=1)
    assert rb"unknown '\u96e8'" in err
    assert rb"No such option '--\u96e8'" in printed(monkeypatch, "cp1252", *arguments, "--雨", code=2)[1]
    assert b"register" in printed(monkeypatch, "cp1252", "--help")[0]


@pytest.mark.supports("terminals", "a pipe that is closed early", "the command ends without a traceback")
def test_a_closed_pipe_ends_the_command_in_silence() -> None:
    """`softprompt … | head -1`"""
    command = [sys.executable, "-m", "softprompt_registry.cli", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ)) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
