"""The bugs of benchmarks/mutants.py: each still fits the source. That the tests notice them takes an hour to see."""

import importlib.util
import sys
from pathlib import Path

import pytest

import foveal

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


planted, mutants = load("mutants_planted"), load("mutants")
MUTANTS = [mutant for kind in planted.KINDS.values() for mutant in kind]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.title for mutant in MUTANTS])
def test_a_mutant_fits_the_source(mutant):
    source = (Path(foveal.__file__).parent / mutant.file).read_text()
    assert mutants.mutated(source, mutant) != source
