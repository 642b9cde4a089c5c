"""Config files of the commands: what they may say, that the command line wins, and which mistakes they name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("tyro")

from foveal.lab import cli, media_commands
from foveal.lab.config_file import arguments_of, read_config


@pytest.fixture
def ran(monkeypatch):
    """The commands that `cli.main` ran, which do nothing here."""
    commands = []
    for command in cli.COMMANDS.values():
        monkeypatch.setattr(command, "run", lambda self: commands.append(self))
    return commands


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


GENERATE = {
    "a.toml": 'model = "wan"\nprompt = ["a cat", "a dog"]\nseed = [1, 2]\nguidance-scale = 5\nexact = true\n',
    "a.yaml": "model: wan\nprompt:\n- a cat\n- a dog\nseed: [1, 2]\nguidance_scale: 5\nexact: true\n",
    "a.json": json.dumps(
        {"model": "wan", "prompt": ["a cat", "a dog"], "seed": [1, 2], "guidance-scale": 5, "exact": True}
    ),
}


@pytest.mark.parametrize("name", GENERATE)
def test_options_of_a_command(tmp_path, ran, name):
    file = write(tmp_path / name, GENERATE[name])
    assert cli.main(["generate", "--config", file]) == 0
    expected = media_commands.Generate(
        config=Path(file), model="wan", prompt=("a cat", "a dog"), seed=(1, 2), guidance_scale=5.0, exact=True
    )
    assert ran == [expected]
    assert cli.main(["generate", f"--config={file}", "--seed", "7", "--no-exact", "--model", "other"]) == 0
    assert (ran[1].seed, ran[1].exact, ran[1].model, ran[1].prompt) == ((7,), False, "other", ("a cat", "a dog"))
    # Wherever the option stands, what else the command line says wins.
    assert cli.main(["generate", "--seed", "7", "--no-exact", "--model", "other", "--config", file]) == 0
    assert ran[2] == ran[1]


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name != "train"])
def test_every_command_takes_one(tmp_path, ran, command):
    required = dict.fromkeys(("generate", "eval", "calibrate", "inspect"), "model") | {"precompute": "videos"}
    entries = {required[command]: "x"} if command in required else {"output": "x"}
    entries |= {"precompute": {"output": "y"}, "inspect": {"prompt": "y"}}.get(command, {})
    entries = {"doctor": {"frames": 5}, "ui": {"port": 5}}.get(command, entries)
    file = write(tmp_path / "a.json", json.dumps(entries))
    assert cli.main([command, "--config", file]) == 0
    for name, value in entries.items():
        assert str(getattr(ran[0], name)) == str(value)


def test_settings_of_training(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("diffusers")
    from foveal.lab.train.recipes import RECIPES, parse

    text = """
recipe = "tiny"
steps = 5
resume = true
export_formats = []
[optimizer]
learning-rate = 0.01
name = "adamw"
[model]
gradient_checkpointing = true
[model.architecture]
num_layers = 3
[sparsity]
layer_keep_ratio = {0 = 0.5, 1 = 0.25}
[sparsity.attention]
keep_ratio = 0.3
"""
    file = write(tmp_path / "run.toml", text)
    built = parse(["--config", file])
    assert (built.steps, built.resume, built.optimizer.learning_rate) == (5, True, 0.01)
    assert (built.model.architecture.num_layers, built.model.gradient_checkpointing) == (3, True)
    assert built.sparsity.attention == RECIPES["tiny"]().sparsity.attention.replace(keep_ratio=0.3)
    assert built.sparsity.layer_keep_ratio == {0: 0.5, 1: 0.25}
    command_line = ["--steps", "6", "--no-resume", "--sparsity.attention.keep-ratio", "0.4"]
    over = parse(["tiny", "--config", file, *command_line])
    assert (over.steps, over.resume, over.sparsity.attention.keep_ratio) == (6, False, 0.4)
    assert over.optimizer == built.optimizer


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", 'config = "b.toml"', "unknown key config; expected some of"),
        ("a.toml", "frame = 5", "unknown key frame; expected some of ['frames', "),
        ("a.json", '{"frames": {"number": 5}, "--height": 3}', "unknown key --height; expected some of"),
        ("a.toml", "frames = 1979-05-27", "frames must be text, a number, true or false, or a list of these, got"),
        ("a.toml", "frames = [[1]]", "frames must be text, a number, true or false, or a list of these, got [[1]]"),
        ("a.toml", 'model = ["-x"]', "model has a text that begins with a hyphen, like an option: ['-x']"),
        ("a.toml", "frames = ", "cannot read config file"),
        ("a.yaml", "frames: [", "cannot read config file"),
        ("a.json", "[1]", "must hold names and values, got list"),
        ("a.yaml", "", "must hold names and values, got NoneType"),
        ("a.txt", "frames = 5", "must end in one of .toml, .yaml, .yml, .json"),
    ],
)
def test_mistakes_in_a_file(tmp_path, ran, capsys, name, text, message):
    assert cli.main(["doctor", "--config", write(tmp_path / name, text)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("foveal: ")
    assert message in error
    assert name in error
    assert error.count("\n") == 1
    assert ran == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctor", "--config"], "--config needs a file"),
        (["doctor", "--config", "--json"], "--config needs a file"),
        (["doctor", "--config", "none.toml"], "no such config file: none.toml"),
        (["doctor", "--config", "a.toml", "--config", "b.toml"], "give --config once, got a.toml, b.toml"),
    ],
)
def test_mistakes_on_the_command_line(ran, capsys, arguments, message):
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"foveal: {message}")
    assert ran == []


def test_mistakes_in_a_training_file(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("diffusers")
    from foveal.lab.train.recipes import RECIPES, parse

    def parse_text(text):
        return parse(["tiny", "--config", write(tmp_path / "a.toml", text)])

    with pytest.raises(ValueError, match=r"unknown key data\.folders; expected some of \['caption_dropout', "):
        parse_text('[data]\nfolders = "x"')
    with pytest.raises(ValueError, match="data must be a table, got 'x'"):
        parse_text('data = "x"')
    with pytest.raises(ValueError, match=r"name a recipe, one of .* or as recipe in the config file"):
        parse(["--config", write(tmp_path / "a.toml", "steps = 5")])
    with pytest.raises(FileNotFoundError, match="no such config file"):
        parse(["tiny", "--config", str(tmp_path / "none.toml")])
    assert arguments_of({}, "", RECIPES["tiny"]()) == []
    assert read_config(Path(write(tmp_path / "a.json", "{}"))) == {}
