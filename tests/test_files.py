"""Folders that are complete or absent, also where two processes write the same one."""

import subprocess
import sys

from phoque.files import atomic_folder

SLOW = """
import sys
from pathlib import Path
from phoque.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as staging:
    (staging / "one").write_text("slow")
    print(staging, flush=True)
    if not sys.stdin.readline():
        raise SystemExit(1)
    (staging / "two").write_text("slow")
"""


def start_writer(folder):
    """A process that has written the first of its two files, and the folder that it writes into."""
    process = subprocess.Popen([sys.executable, "-c", SLOW, folder], stdin=-1, stdout=-1, text=True)
    return process, process.stdout.readline().strip()


def read(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_of_two_processes_that_write_a_folder_each_writes_it_whole(tmp_path):
    process, _ = start_writer(tmp_path / "out")
    with atomic_folder(tmp_path / "out") as staging:
        (staging / "two").write_text("fast")
    assert read(tmp_path / "out") == {"two": "fast"}
    process.communicate("go on\n")
    assert process.returncode == 0 and read(tmp_path / "out") == {"one": "slow", "two": "slow"}


def test_two_processes_that_finish_at_the_same_time_both_succeed(tmp_path):
    script = (
        "import sys; from pathlib import Path; from phoque.files import atomic_folder\n"
        "for _ in range(200):\n with atomic_folder(Path(sys.argv[1])) as staging: (staging / 'a').write_text('a')"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, tmp_path / "out"]) for _ in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert read(tmp_path / "out") == {"a": "a"} and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_deleted(tmp_path):
    (tmp_path / ".out.partial").mkdir()  # of an earlier version
    process, left = start_writer(tmp_path / "out")
    process.kill()
    process.communicate()
    assert tmp_path.joinpath(left).is_dir()
    with atomic_folder(tmp_path / "out") as staging:
        (staging / "two").write_text("fast")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
