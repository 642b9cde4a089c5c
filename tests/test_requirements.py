"""The Python that is promised is one on which the commands can be installed, and every page names the same one."""

import importlib.metadata
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import foveal
from foveal.lab.extras import how_to_install

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROMISED = re.fullmatch(r">=(3\.\d+)", PROJECT["project"]["requires-python"])[1]


def required() -> dict[str, Version]:
    """The oldest version that the project and its extras accept of each package they name with one."""
    project = PROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    oldest: dict[str, Version] = {}
    for line in lines:
        requirement = Requirement(line)
        for bound in requirement.specifier:
            if bound.operator == ">=":
                oldest[requirement.name] = max(oldest.get(requirement.name, Version("0")), Version(bound.version))
    return oldest


def series(version: Version) -> tuple[int, int]:
    return version.major, version.minor


def test_the_packages_that_are_required_run_on_the_python_that_is_promised():
    """Of the oldest series that is accepted: pip finds nothing older where that needs a newer Python."""
    read = []
    for name, oldest in required().items():
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if series(Version(found.version)) == series(oldest):
            read.append(name)
            needed = found.metadata["Requires-Python"] or ""
            assert SpecifierSet(needed).contains(PROMISED), f"{name} {found.version} needs Python {needed}"
    assert read


def test_hints_name_extras_that_there_are_and_where_to_find_them(monkeypatch, tmp_path):
    """pip does not find foveal by name: the source folder is named, or that one is needed."""
    extras = PROJECT["project"]["optional-dependencies"]
    used = set()
    for path in (ROOT / "src").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "foveal[" not in text, path
        used |= set(re.findall(r"how_to_install\('(\w+)'\)|\bneed\(\"(\w+)\"", text))
    assert {name for pair in used for name in pair if name} <= set(extras)
    assert len(used) > 5
    asked = shlex.split(how_to_install("demo"))
    assert asked == [sys.executable, "-m", "pip", "install", "-e", f"{ROOT}[demo]"]
    monkeypatch.setattr(foveal, "__file__", str(tmp_path / "site-packages" / "foveal" / "__init__.py"))
    assert how_to_install("demo") == f'in the source folder of foveal, {sys.executable} -m pip install -e ".[demo]"'
    pages = (ROOT / "docs").rglob("*.md")
    for name in re.findall(r"pip install -e \"\.\[(\w+)\]\"", "".join(page.read_text("utf-8") for page in pages)):
        assert name in extras


def test_the_workflow_tests_the_bounds_that_are_promised():
    """The oldest Python and the oldest PyTorch of its matrix are the lower bounds, which pip would not go below."""
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["core"]["strategy"]["matrix"]
    torches = [Version(release.removesuffix(".*")) for release in matrix["torch"]]
    assert min(torches) == required()["torch"]
    assert min(map(Version, matrix["python"])) == Version(PROMISED)


def test_every_page_names_the_python_that_is_promised():
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + PROMISED.replace(".", "")
    for page in ("README.md", "docs/index.md", "docs/faq.md", ".ci/run"):
        named = re.findall(r"Python (3\.\d+) or newer", (ROOT / page).read_text(encoding="utf-8"))
        assert named == [PROMISED], page
