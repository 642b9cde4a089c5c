"""The Python that is promised is one on which the commands can be installed, and every page names the same one."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

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


def test_every_page_names_the_python_that_is_promised():
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + PROMISED.replace(".", "")
    for page in ("README.md", "docs/index.md", ".ci/run"):
        named = re.findall(r"Python (3\.\d+) or newer", (ROOT / page).read_text(encoding="utf-8"))
        assert named == [PROMISED], page
