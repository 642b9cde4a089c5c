"""The folders that commands write into: what is ours there is known, and everything else stays byte for byte."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from foveal import output_folder
from foveal.output_folder import LIST_FILE, OutputFolder, hold, scratch_folder


def write(folder: OutputFolder, **files: str) -> None:
    for name, text in files.items():
        with folder.writing(name) as aside:
            aside.write_text(text)


def renew(folder: OutputFolder, files: dict[str, str], **options) -> None:
    with folder.renewing(**{"last": "index"} | options) as new:
        for name, text in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_text(text)


def content(path) -> dict[str, str]:
    """Every file below a folder but the list."""
    files = (file for file in path.rglob("*") if file.is_file() and file.name != LIST_FILE)
    return {file.relative_to(path).as_posix(): file.read_text() for file in files}


def test_the_list_says_what_was_written(tmp_path):
    write(OutputFolder(tmp_path / "new" / "folder", "demo"), page="one")
    line = json.loads((tmp_path / "new" / "folder" / LIST_FILE).read_text())
    assert line == {"foveal": "demo", "file": "page", "bytes": 3, "sha256": hashlib.sha256(b"one").hexdigest()}
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [LIST_FILE, "page"]


def test_what_is_ours_is_replaced_by_another_process_too(tmp_path):
    write(OutputFolder(tmp_path, "demo"), page="one")
    write(OutputFolder(tmp_path, "demo"), page="two")
    assert content(tmp_path) == {"page": "two"}
    # Back to what it was: each version that was written is known.
    (tmp_path / "page").write_text("one")
    write(OutputFolder(tmp_path, "demo"), page="three")
    assert content(tmp_path) == {"page": "three"}


def theirs(place):
    (place / "below").mkdir()
    (place / "below" / "page").write_text("theirs")


def changed(place):
    with OutputFolder(place, "demo").writing("below/page") as aside:
        aside.write_text("ours")
    (place / "below" / "page").write_text("edit")


def of_another_command(place):
    with OutputFolder(place, "inspect").writing("below/page") as aside:
        aside.write_text("theirs")


def link(place):
    (place / "below").mkdir()
    (place / "target").write_text("theirs")
    (place / "below" / "page").symlink_to(place / "target")


def a_folder(place):
    (place / "below" / "page").mkdir(parents=True)
    (place / "below" / "page" / "note").write_text("theirs")


def a_file_where_a_folder_goes(place):
    (place / "below").write_text("theirs")


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (theirs, "below/page was not written by foveal demo, and is left as it is: move it away"),
        (changed, "below/page was changed after foveal demo wrote it"),
        (of_another_command, "below/page was not written by foveal demo"),
        (link, "below/page was not written by foveal demo"),
        (a_folder, "below/page was not written by foveal demo"),
        (a_file_where_a_folder_goes, "below is no folder"),
    ],
)
def test_what_is_not_ours_is_an_error_that_names_it(tmp_path, put, message):
    put(tmp_path)
    former, listed = content(tmp_path), sorted(os.listdir(tmp_path))
    folder = OutputFolder(tmp_path, "demo")
    with pytest.raises(FileExistsError, match=message):
        folder.check(["other", "below/page"])
    with pytest.raises(FileExistsError, match=message), folder.writing("below/page"):
        pytest.fail("worked first")
    with pytest.raises(FileExistsError, match=message):
        renew(folder, {"index": "new", "below/page": "new"})
    assert content(tmp_path) == former
    assert sorted(os.listdir(tmp_path)) == listed


def test_all_that_is_in_the_way_is_counted(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("theirs")
    with pytest.raises(FileExistsError, match=r"/a was not written by foveal demo \(and 2 more like it\), and"):
        OutputFolder(tmp_path, "demo").check(["a", "b", "c", "d"])


def test_what_comes_while_we_work_is_kept(tmp_path):
    def interfere():
        with OutputFolder(tmp_path, "demo").writing("page") as aside:
            aside.write_text("ours")
            (tmp_path / "page").write_text("theirs")

    with pytest.raises(FileExistsError, match="page was not written by foveal demo"):
        interfere()
    assert content(tmp_path) == {"page": "theirs"}


def test_a_renewed_folder_keeps_what_others_put_there(tmp_path):
    folder = OutputFolder(tmp_path, "demo")
    renew(folder, {"index": "1", "old/a": "1", "old/b": "1", "new/c": "1"})
    (tmp_path / "notes").write_text("theirs")
    (tmp_path / "old" / "notes").write_text("theirs")
    (tmp_path / "old" / "b").write_text("theirs now")
    write(OutputFolder(tmp_path, "inspect"), seen="theirs")
    renew(OutputFolder(tmp_path, "demo"), {"index": "2", "new/c": "2"})
    assert content(tmp_path) == {
        "index": "2",
        "new/c": "2",
        "notes": "theirs",
        "old/notes": "theirs",
        "old/b": "theirs now",
        "seen": "theirs",
    }
    (tmp_path / "old" / "notes").unlink()
    (tmp_path / "old" / "b").unlink()
    renew(OutputFolder(tmp_path, "demo"), {"index": "3", "d": "3"})
    assert content(tmp_path) == {"index": "3", "d": "3", "notes": "theirs", "seen": "theirs"}
    # A folder that is empty then goes with what was in it.
    assert not (tmp_path / "new").exists()


def test_a_part_of_a_folder_is_renewed_alone(tmp_path):
    folder = OutputFolder(tmp_path, "eval")
    renew(folder, {"index": "1", "a": "1"}, below="part")
    write(folder, table="1")
    renew(folder, {"index": "2", "b": "2"}, below="part")
    assert content(tmp_path) == {"part/index": "2", "part/b": "2", "table": "1"}


def test_the_last_file_goes_first_and_comes_last(tmp_path, monkeypatch):
    """So that where it is, all others are of the same result."""
    renew(OutputFolder(tmp_path, "demo"), {"a": "1", "index": "1", "z": "1"})
    seen, replace = [], os.replace

    def watch(source, target):
        replace(source, target)
        seen.append((os.path.basename(target), (tmp_path / "index").exists()))

    monkeypatch.setattr(os, "replace", watch)
    renew(OutputFolder(tmp_path, "demo"), {"a": "2", "index": "2", "z": "2"})
    assert seen == [("a", False), ("z", False), ("index", True)]


def test_an_interrupt_leaves_everything_as_it_was(tmp_path):
    def interrupted(folder):
        with OutputFolder(folder, "demo").renewing(last="index") as new:
            (new / "index").write_text("2")
            raise KeyboardInterrupt

    renew(OutputFolder(tmp_path / "former", "demo"), {"index": "1"})
    for name in ("former", "deep/new"):
        with pytest.raises(KeyboardInterrupt):
            interrupted(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["former"]
    assert content(tmp_path / "former") == {"index": "1"}
    assert sorted(os.listdir(tmp_path / "former")) == [LIST_FILE, "index"]


def test_files_that_grow_are_ours_whatever_they_hold(tmp_path):
    with OutputFolder(tmp_path, "train").writing("log", grows=True) as aside:
        aside.write_text("a\n")
    (tmp_path / "log").write_text("a\nb\n")
    assert OutputFolder(tmp_path, "train").owns("log")
    assert not OutputFolder(tmp_path, "demo").owns("log")


def test_large_files_are_told_by_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(output_folder, "HASHED_BYTES", 3)
    write(OutputFolder(tmp_path, "demo"), small="abc", large="abcd")
    lines = [json.loads(line) for line in (tmp_path / LIST_FILE).read_text().splitlines()]
    assert [set(line) for line in lines] == [{"foveal", "file", "bytes", "sha256"}, {"foveal", "file", "bytes"}]
    for name in ("small", "large"):
        (tmp_path / name).write_text("x" * len((tmp_path / name).read_text()))
    assert [OutputFolder(tmp_path, "demo").owns(name) for name in ("small", "large")] == [False, True]
    (tmp_path / "large").write_text("abcde")
    assert not OutputFolder(tmp_path, "demo").owns("large")


def test_two_processes_may_write_into_one_folder(tmp_path):
    first, second = OutputFolder(tmp_path, "generate"), OutputFolder(tmp_path, "generate")
    with first.writing("a") as a, second.writing("b") as b:
        a.write_text("1")
        b.write_text("1")
        write(second, c="1")
    assert first.owns("c")
    assert all(OutputFolder(tmp_path, "generate").owns(name) for name in "abc")
    write(first, b="2", c="2")
    assert second.owns("b")


def test_a_line_that_was_cut_off_harms_no_other(tmp_path):
    write(OutputFolder(tmp_path, "demo"), a="1", b="1")
    text = (tmp_path / LIST_FILE).read_bytes()
    (tmp_path / LIST_FILE).write_bytes(text[:-9])
    folder = OutputFolder(tmp_path, "demo")
    assert folder.owns("a")
    assert not folder.owns("b")
    write(folder, c="1")
    assert all(OutputFolder(tmp_path, "demo").owns(name) for name in "ac")


def test_a_list_that_is_not_ours_is_left_alone(tmp_path):
    for text in ("theirs", '{"file": "page"}\n'):
        (tmp_path / LIST_FILE).write_text(text)
        with pytest.raises(FileExistsError, match=f"{LIST_FILE} is no list that foveal wrote"):
            write(OutputFolder(tmp_path, "demo"), page="one")
        assert (tmp_path / LIST_FILE).read_text() == text
        assert os.listdir(tmp_path) == [LIST_FILE]


def test_places_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("theirs")
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    for name, message in (
        ("file", "output .*/file is a file; expected a folder"),
        ("file/deep/below", "output .*/file/deep/below cannot be made: .*/file is a file; expected a folder"),
        ("dead", "output .*/dead is a link to nothing; expected a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            OutputFolder(tmp_path / name, "demo").check()
    assert content(tmp_path) == {"file": "theirs"}


def test_a_folder_without_leave_to_write_is_said_at_once(tmp_path, monkeypatch):
    # root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match=f"output {tmp_path}/new cannot be written: {tmp_path} allows no new files"):
        OutputFolder(tmp_path / "new", "demo").check()


def test_a_link_to_a_folder_is_written_through(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for text in ("1", "2"):
        renew(OutputFolder(tmp_path / "link", "demo"), {"index": text})
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "disk") == {"index": "2"}


def test_a_folder_of_others_is_told_from_ours(tmp_path):
    folder = OutputFolder(tmp_path, "demo")
    folder.check_alone()
    (tmp_path / ".DS_Store").write_text("theirs")
    folder.check_alone()
    write(folder, page="1")
    (tmp_path / "notes").write_text("theirs")
    folder.check_alone()
    with pytest.raises(ValueError, match=rf"holds something else \({LIST_FILE}\), nothing of foveal train"):
        OutputFolder(tmp_path, "train").check_alone()


KILLED = """
import os, signal, sys
from foveal.output_folder import OutputFolder
with OutputFolder(sys.argv[1], "demo").writing("page") as aside:
    aside.write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    mine = tmp_path / ".foveal-mine_own"
    mine.mkdir()
    (mine / "lock").write_text("theirs")
    (mine / "new").write_text("theirs")
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    processes[0].send_signal(signal.SIGKILL)
    processes[0].wait()
    # One is dead, the other still writes.
    assert len(list(tmp_path.glob(".foveal-*"))) == 3
    with scratch_folder(tmp_path):
        assert len(list(tmp_path.glob(".foveal-*"))) == 3
    assert len(list(tmp_path.glob(".foveal-*"))) == 2
    processes[1].communicate("")
    assert processes[1].returncode == 0
    assert (tmp_path / "page").read_text() == "half"
    assert {path.name: path.read_text() for path in mine.iterdir()} == {"lock": "theirs", "new": "theirs"}
    assert len(list(tmp_path.glob(".foveal-*"))) == 1


def test_a_lock_is_one_process_s(tmp_path):
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        assert hold(first) is True
        assert hold(second) is False
    with open(tmp_path / "lock", "w") as third:
        assert hold(third) is True


def test_a_folder_is_used_by_one_process_at_a_time(tmp_path):
    folder = OutputFolder(tmp_path / "new" / "run", "train")
    with folder.locked():
        write(folder, page="1")
        message = rf"output {tmp_path}/new/run is in use by process {os.getpid()} on {socket.gethostname()}; wait"
        with pytest.raises(FileExistsError, match=message), OutputFolder(folder.path, "train").locked():
            pytest.fail("two at a time")
        # What need not be alone may write there.
        write(OutputFolder(folder.path, "generate"), video="1")
    with OutputFolder(folder.path, "train").locked():
        pass
    assert sorted(os.listdir(folder.path)) == [LIST_FILE, "page", "video"]


def test_a_lock_leaves_nothing_behind(tmp_path):
    with OutputFolder(tmp_path / "new" / "run", "train").locked():
        assert os.listdir(tmp_path / "new" / "run") == [".foveal-in-use"]
    assert os.listdir(tmp_path) == []


def test_the_lock_of_a_process_that_died_is_taken_over(tmp_path):
    lock = "lock = OutputFolder(sys.argv[1], 'train').locked()\nlock.__enter__()\n"
    script = KILLED.replace("with OutputFolder", f"{lock}with OutputFolder")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    with (
        pytest.raises(FileExistsError, match=f"is in use by process {process.pid} on "),
        OutputFolder(tmp_path, "train").locked(),
    ):
        pytest.fail("two at a time")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / ".foveal-in-use").is_file()
    with OutputFolder(tmp_path, "train").locked():
        assert f"process {os.getpid()} on" in (tmp_path / ".foveal-in-use").read_text()
    assert not (tmp_path / ".foveal-in-use").exists()
