"""The public names are typed: a type checker finds no unknown type in them, and understands a program that uses them.

Needs pyright, which `pip install -e ".[lint]"` brings; skipped without it.
"""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import foveal

ROOT = Path(__file__).parent.parent


def pyright(*arguments):
    """What pyright says, run with this Python's packages."""
    if importlib.util.find_spec("pyright") is None:
        pytest.skip('needs pyright: pip install -e ".[lint]"')
    # It looks for packages by the `python` on the path, and for foveal where this Python has found it.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(Path(foveal.__file__).parent.parent)}
    command = [sys.executable, "-m", "pyright", *arguments, "--outputjson"]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500)
    return json.loads(run.stdout)


def test_no_public_name_has_an_unknown_type():
    found = pyright("--verifytypes", "foveal", "--ignoreexternal")["typeCompleteness"]["symbols"]
    assert {f"foveal.{name}" for name in foveal.__all__} <= {symbol["name"] for symbol in found}
    public = tuple(f"{x.__module__}.{x.__qualname__}" for x in (getattr(foveal, name) for name in foveal.__all__))
    unknown = [
        f"{symbol['name']}: {[problem['message'] for problem in symbol['diagnostics']]}"
        for symbol in found
        if not symbol["isTypeKnown"] and any(f"{symbol['name']}.".startswith(f"{name}.") for name in public)
    ]
    assert not unknown, "\n".join(unknown)


def test_a_users_program_is_understood():
    said = pyright()
    assert said["summary"]["filesAnalyzed"] == 1
    problems = [f"line {x['range']['start']['line'] + 1}: {x['message']}" for x in said["generalDiagnostics"]]
    assert not problems, "\n".join(problems)


def test_decorators_of_public_functions_say_what_they_return():
    """mypy takes what an untyped decorator makes for `Any`, where pyright looks through the decorator."""
    seen = 0
    for function in filter(inspect.isfunction, (getattr(foveal, name) for name in foveal.__all__)):
        names, decorated = function.__globals__, inspect.unwrap(function) is not function
        if decorated and names["__name__"].startswith("foveal."):
            decorator = names[function.__code__.co_qualname.partition(".")[0]]
            assert "return" in decorator.__annotations__, f"{function.__name__}: {decorator.__name__} is untyped"
            seen += 1
    assert seen >= 2
