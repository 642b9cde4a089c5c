"""Outside of `methods/`, nobody finds out which method a configuration is of: the method answers.

Held by reading the source.

A configuration may be made there, as a value ("SLAConfig(keep_ratio=0.1)" in a recipe), and named in an annotation.
"""

import ast
import dataclasses
from pathlib import Path

import pytest

import foveal
from foveal.methods.base import METHODS

ROOT = Path(foveal.__file__).parent
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] != "methods"]
NAMES = {method.name for method in METHODS.values()}
CLASSES = {cls.__name__ for method in METHODS.values() for cls in (method.config_type, method.module_type)}
FIELDS = {field.name for method in METHODS.values() for field in dataclasses.fields(method.config_type)}


def text_in(node):
    """The strings that an expression spells out."""
    return {x.value for x in ast.walk(node) if isinstance(x, ast.Constant) and isinstance(x.value, str)}


def compared_names(*operands):
    """The methods' names among operands that are strings or collections of them."""
    literal = (ast.Constant, ast.Tuple, ast.List, ast.Set)
    return {text.lower() for node in operands if isinstance(node, literal) for text in text_in(node)} & NAMES


def called_and_annotated(tree):
    """The nodes where a class may be named: a call that makes a value, or an annotation."""
    allowed = set()
    for node in ast.walk(tree):
        annotations = [getattr(node, name, None) for name in ("annotation", "returns")]
        if isinstance(node, ast.Call):
            allowed.add(node.func)
        for annotation in filter(None, annotations):
            allowed.update(ast.walk(annotation))
    return allowed


def dispatches(source):
    """Each place that finds out a method by type, by name or by the fields of its configuration."""
    tree, found = ast.parse(source), []
    allowed = called_and_annotated(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="hasattr" | "getattr"), args=[of, name, *_]):
                about_config = ast.unparse(of).split(".")[-1].endswith(("config", "attention"))
                asked = text_in(name)
                if asked & FIELDS or (node.func.id == "hasattr" and about_config and asked):
                    found.append(node)
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in CLASSES and node not in allowed:
                found.append(node)
            case ast.Compare(left=left, comparators=others) if compared_names(left, *others):
                found.append(node)
            case ast.MatchValue(value=value) if compared_names(value):
                found.append(node)
            case ast.Subscript(value=ast.Name(id="METHODS"), slice=ast.Constant()):
                found.append(node)
    return [f"line {node.lineno}: {ast.unparse(node)}" for node in found]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_methods_answer_for_themselves(path):
    assert dispatches(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(config, SLAConfig)",
        "isinstance(config, (int, vsa.config.VSAConfig))",
        "isinstance(module, SparseLinearAttention)",
        "type(config) is SLAConfig",
        "TABLE = {SLAConfig: 1}",
        "match config:\n    case VSAConfig():\n        pass",
        "match name:\n    case 'sla':\n        pass",
        "if name == 'vsa':\n    pass",
        "if name in ('SLA', 'VSA'):\n    pass",
        "hasattr(config, 'drop_ratio')",
        "hasattr(self.config, 'anything')",
        "getattr(final, 'topk', None)",
        "METHODS['sla'].build",
    ],
)
def test_the_reader_finds(source):
    assert len(dispatches(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from foveal.methods.sla.config import SLAConfig",
        "config: SLAConfig | None = SLAConfig(keep_ratio=0.1)",
        "def choose(config: VSAConfig) -> SLAConfig: ...",
        "hasattr(tensor, 'full_tensor')",
        "getattr(self, name)",
        "METHODS[method_of(config).name]",
        "method: str = 'sla'",
        "loss['SLA'] < loss['dense']",
        "arms = {'SLA': SLAConfig(), 'VSA': VSAConfig()}",
    ],
)
def test_the_reader_leaves(source):
    assert dispatches(source) == []
