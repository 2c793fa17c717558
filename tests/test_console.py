"""What is printed, and where."""

import errno
import sys

import pytest

from phoque.console import Console, escape_control_characters, format_breakdown, format_duration


def test_control_characters_from_a_model_cannot_reach_the_terminal():
    assert escape_control_characters("a\x1b[31mb\nc\u202e") == "a\\x1b[31mb\nc\\x202e"


def test_a_result_is_text_that_no_markup_changes_and_no_width_breaks(capsys):
    console = Console()
    console._out = sys.stdout
    text = "--with phoque[sae]==0.1.0 [/x] " + "gull " * 60 + "end"
    console.result({}, lambda: text, "")
    assert capsys.readouterr().out == text + "\n"


def test_clock():
    assert (format_duration(65), format_duration(7805)) == ("1:05", "2:10:05")
    assert format_breakdown({"steps": 59.6, "samples": 6.0, "saving": 0.2}) == "60 s steps, 6 s samples"


def test_a_log_gets_the_last_line_of_progress(capsys):
    with Console().progress(3) as update:
        for step in (1, 2, 3):
            update(step, "loss 1")
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith("1/3") and err[-1].startswith("3/3  loss 1") and "left" in err[-1]


def test_a_terminal_gets_a_bar_with_the_same_numbers(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console()
    with console.progress(3) as update:
        update(1, "loss 2.5")
        console.say("a sample")
        update(3, "loss 1.5")
    err = capsys.readouterr().err
    assert "3/3" in err and "loss 1.5" in err and "a sample" in err


def test_an_io_error_of_the_work_is_not_taken_for_a_closed_terminal(monkeypatch):
    shown = Console()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with pytest.raises(OSError, match="disk"), shown.progress(3) as update:
        update(1, "reading")
        raise OSError(errno.EIO, "the disk has failed")
