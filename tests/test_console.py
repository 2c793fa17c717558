"""What is printed, and where."""

import errno
import os
import pty
import select
import sys
import threading
import time

import pytest

from phoque import heartbeat
from phoque.console import Console, escape_control_characters, format_breakdown, format_duration
from phoque.heartbeat import Heartbeat


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


def test_a_log_says_that_a_stage_goes_on(capsys, monkeypatch):
    monkeypatch.setattr(heartbeat, "POLL_S", 0.01)
    monkeypatch.setattr(heartbeat, "FIRST_LINE_S", 0.05)
    console = Console()
    console.stage("reading rows.jsonl")
    time.sleep(0.5)
    console.say("read")
    time.sleep(0.2)
    first, *still, last = capsys.readouterr().err.splitlines()
    assert first == "reading rows.jsonl" and last == "read"  # nothing comes after it
    assert still and all(line.startswith("  reading rows.jsonl (") for line in still)


def test_progress_without_an_update_shows_that_it_goes_on(capsys, monkeypatch):
    monkeypatch.setattr(heartbeat, "POLL_S", 0.01)
    monkeypatch.setattr(heartbeat, "FIRST_LINE_S", 0.05)
    with Console().progress(3) as update:
        update(1, "measuring")
        time.sleep(0.2)
        update(3, "done")
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("  1/3  measuring (") for line in lines) and lines[-1].startswith("3/3  done")
    assert not any(thread.name == "heartbeat" for thread in threading.enumerate())


def test_a_terminal_shows_a_spinner_with_seconds_and_clears_it(monkeypatch):
    monkeypatch.setattr(heartbeat, "SPINNER_AFTER_S", 0.05)
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w", encoding="utf-8") as terminal:
        beat = Heartbeat("reading rows.jsonl", terminal)
        time.sleep(0.4)
        beat.stop()
        shown = b""
        while select.select([leader], [], [], 1.0)[0] and not shown.endswith(b"\r\x1b[K"):
            shown += os.read(leader, 4096)  # the kernel may hand over the last write a little later
    os.close(leader)
    shown = shown.decode()
    assert "\r⠙ reading rows.jsonl  " in shown and shown.endswith("\r\x1b[K")


def test_a_secret_is_hidden_in_a_stage_too(capsys, monkeypatch):
    monkeypatch.setattr(heartbeat, "POLL_S", 0.01)
    monkeypatch.setattr(heartbeat, "FIRST_LINE_S", 0.02)
    console = Console()
    console.hide(["hf_harbour"])
    console.stage("reading hf_harbour")
    time.sleep(0.2)
    console.say("")
    assert "hf_harbour" not in capsys.readouterr().err
