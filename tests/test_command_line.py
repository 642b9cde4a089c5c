"""How the arguments of the commands are read: a mistake is one line that names the option and what was expected."""

import os

import pytest

pytest.importorskip("tyro")

from foveal.lab import cli
from foveal.lab.command_line import one_line

COMMANDS = "('demo', 'precompute', 'train', 'generate', 'eval', 'calibrate', 'bench', 'inspect', 'doctor', 'ui')"
DOCTOR, TINY = "foveal doctor --help lists the options", "foveal train tiny --help lists the options"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", f"name a command; expected one of {COMMANDS}"),
        ("nonsense", f"unknown command 'nonsense'; expected one of {COMMANDS}"),
        ("doctor --frmes 3", f"unknown option --frmes, perhaps --frames. {DOCTOR}"),
        ("doctor --qqq", f"unknown option --qqq. {DOCTOR}"),
        ("doctor here there", f"unexpected argument here, there. {DOCTOR}"),
        ("doctor --frames x", "--frames: invalid literal for int() with base 10: 'x' (expected INT). " + DOCTOR),
        ("doctor --frames", f"--frames needs a value. {DOCTOR}"),
        ("inspect", "expected --model and --prompt. foveal inspect --help lists the options"),
        ("inspect --model x", "expected --prompt. foveal inspect --help lists the options"),
        ("train tiny --steps 0", "steps must be at least 1, got 0"),
        ("train tiny --data.hold-out 3", f"unknown option --data.hold-out, perhaps --data.held-out. {TINY}"),
        (
            "train tiny --optimizer.trainable everything",
            "invalid choice 'everything' for argument '--optimizer.trainable'. "
            f"Expected one of ('all', 'attention', 'new', 'lora'). {TINY}",
        ),
        # Longer than the terminal, and than any line that tyro would wrap.
        (f"doctor --{'long' * 50}", f"unknown option --{'long' * 50}. {DOCTOR}"),
    ],
)
def test_mistakes_are_one_line(capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("COLUMNS", "50")
    assert cli.main(arguments.split()) == 2
    assert capsys.readouterr().err == f"foveal: {message}\n"
    assert os.environ["COLUMNS"] == "50"


def test_boxes_without_unicode():
    """tyro draws rules of hyphens and no frame where the output cannot show one."""
    box = """
 Value error
 -----------------------------------------
  Error parsing --frames: not a number: 'x'
  -----------------------------------------
  Argument helptext:
      --frames INT
      Frames of the video. (default: 81)
  -----------------------------------------
  For full helptext, see foveal --help
"""
    expected = "--frames: not a number: 'x' (expected INT). foveal doctor --help lists the options"
    assert one_line(box, "foveal doctor") == expected


def test_a_box_of_another_kind_is_its_first_part():
    box = "╭─ Title ─╮\n│ Something │\n│ is wrong. │\n│ ───── │\n│ Advice. │\n╰─────────╯\n"
    assert one_line(box, "foveal doctor") == "Something is wrong. foveal doctor --help lists the options"
    assert one_line("", "foveal doctor").startswith("the arguments cannot be read")


@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--help"], ["train", "tiny", "-h"]])
def test_help_fits_the_terminal(capsys, monkeypatch, arguments):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit, match="0"):
        cli.main(arguments)
    # The lines of the frame, with Unicode or without.
    assert {len(line) for line in capsys.readouterr().out.splitlines() if line and not line.strip("╰╯─- ")} == {60}
