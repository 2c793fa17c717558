"""Lines of metrics and samples on a full disk."""

import errno
from pathlib import Path

import pytest

from phoque.training.metrics_log import Tracker, read_lines
from phoque.training.run_files import METRICS


@pytest.mark.parametrize("written", [None, '{"ste'])
def test_a_line_that_does_not_fit_is_left_out_whole(tmp_path, monkeypatch, written):
    warnings = []
    tracker = Tracker(tmp_path, [], warnings.append, 0)
    plain = Path.open

    def full(self, mode="r", **options):
        if mode != "a":
            return plain(self, mode, **options)
        if written:
            with plain(self, mode) as file:
                file.write(written)
        raise OSError(errno.ENOSPC, "No space left on device")

    if written:
        tracker.log_metrics(1, {"loss": 3.0})
    monkeypatch.setattr(Path, "open", full)
    tracker.log_metrics(2, {"loss": 2.0})
    monkeypatch.undo()
    tracker.log_metrics(3, {"loss": 1.0})
    assert [line["step"] for line in read_lines(tmp_path / METRICS)] == ([1, 3] if written else [3])
    assert len(warnings) == 1 and "step 2 is not in metrics.jsonl" in warnings[0]
