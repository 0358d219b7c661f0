"""What stages report: forgotten by default, shown on stderr by the console recorder."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from softprompt_registry.recording import ConsoleRecorder, NullRecorder, Recorder, _LineBar


@pytest.mark.parametrize("recorder", [NullRecorder(), ConsoleRecorder()])
def test_everything_can_be_reported_and_nothing_reaches_stdout(
    recorder: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder.params("tuning", {"epochs": 1})
    recorder.metric("loss", 0.5, step=1)
    recorder.figure("loss.png", Figure())
    recorder.table("texts.json", {"task": ["a"]})
    recorder.artifact(tmp_path)
    with recorder.progress("tune", 2) as bar:
        bar.advance(0, "epoch 1")
        bar.advance(2)
    said = capsys.readouterr()
    assert said.out == "" and bool(said.err) == isinstance(recorder, ConsoleRecorder)
    assert list(tmp_path.iterdir()) == []


def test_in_a_pipe_progress_is_one_line_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleRecorder().progress("tune soft prompts", 3) as bar:
        for number in range(3):
            bar.advance(1, f"task {number}")
    assert capsys.readouterr().err == "tune soft prompts 3/3 0 s task 2\n"


def test_in_a_pipe_a_line_comes_when_enough_time_has_passed(capsys: pytest.CaptureFixture[str]) -> None:
    class Hasty(_LineBar):
        SECONDS = 0.0

    with Hasty("train", 2) as bar:
        bar.advance(1, "loss 2.0")
        bar.advance(1, "loss 1.0")
    assert capsys.readouterr().err == "train 1/2 0 s loss 2.0\ntrain 2/2 0 s loss 1.0\ntrain 2/2 0 s loss 1.0\n"


def test_the_last_line_is_written_after_an_error_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), ConsoleRecorder().progress("tune", 2) as bar:
        bar.advance(1, "task a")
        raise RuntimeError
    assert capsys.readouterr().err == "tune 1/2 0 s task a\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    with ConsoleRecorder().progress("tune", 2) as bar:
        bar.advance(2, "task a")
    assert all(part in terminal.getvalue() for part in ("tune", "2/2", "task a"))
