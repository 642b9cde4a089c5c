"""The documentation is true: its Python examples run, they print what it says, its links lead somewhere.

The blocks of a page share a namespace and run in order. A text block titled "prints" right after a Python block holds
what that block prints; `python tests/test_docs.py` rewrites them all.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch

import foveal
from foveal.kernels.api import IMPLS
from foveal.methods.sla.config import FEATURE_MAPS, LINEAR_SCOPES, TOKEN_ORDERS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
EXAMPLE = re.compile(
    r'^```python\n(?P<code>.*?)^```\n(?:\n```text title="prints"\n(?P<prints>.*?)^```\n)?', re.MULTILINE | re.DOTALL
)

# What stands in for a GPU and for hours: each of these is on a page as it reads on the left, and runs as on the right.
STAND_INS = {
    '.to("cuda")': '.to("cpu")',
    'device = "cuda"': 'device = "cpu"',
    "height, width, num_frames = 480, 832, 81": "height, width, num_frames = 96, 160, 9",
    "steps = 2000": "steps = 2",
}


@dataclass
class Example:
    """One Python block, what the page says that it prints (None for nothing said), and where it is."""

    code: str
    prints: str | None
    line: int


def examples_of(page: Path) -> list[Example]:
    text = page.read_text(encoding="utf-8")
    return [
        Example(found["code"], found["prints"], text[: found.start()].count("\n") + 2)
        for found in EXAMPLE.finditer(text)
    ]


def tiny_pipeline(*args, **kwargs):
    """A random Wan pipeline that answers to the calls of the pages, in place of the download that they ask for."""
    import diffusers
    from tiny_wan import tiny_transformer

    class TinyPipeline(diffusers.WanPipeline):
        def encode_prompt(self, prompt, *args, **kwargs):
            return torch.zeros(1, 7, 8), torch.ones(1, 7, 8)

        def __call__(self, prompt, **kwargs):
            sizes = {"height": 96, "width": 160, "num_frames": 9, "num_inference_steps": 2}
            return super().__call__(prompt, **kwargs | sizes)

    torch.manual_seed(0)
    pipeline = TinyPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny_transformer(),
    )
    pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std = [0.0] * 4, [1.0] * 4
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_page(page: Path) -> list[str]:
    """What each Python block of a page prints, all run in one namespace, in an empty folder with a clip in it."""
    import diffusers

    from foveal.lab.data.windows import sample_clip

    printed, scope = [], {"__name__": "__main__"}
    former = Path.cwd()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(sample_clip("bigbuckbunny"), Path(folder, "clip.mp4"))
        os.chdir(folder)
        try:
            for example in examples_of(page):
                code = example.code
                for written, run in STAND_INS.items():
                    code = code.replace(written, run)
                # Blank lines in front, so that a traceback gives the line in the page.
                compiled = compile("\n" * (example.line - 1) + code, str(page), "exec")
                output = io.StringIO()
                with (
                    mock.patch.object(diffusers.WanPipeline, "from_pretrained", tiny_pipeline),
                    contextlib.redirect_stdout(output),
                ):
                    exec(compiled, scope)
                printed.append("\n".join(line.rstrip() for line in output.getvalue().splitlines()) + "\n")
        finally:
            os.chdir(former)
    return printed


@pytest.mark.parametrize("page", [page for page in PAGES if examples_of(page)], ids=lambda page: page.name)
def test_examples_run_and_print_what_the_page_says(page):
    for name in ("diffusers", "av", "skvideo"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")
    for name in ("peft", "accelerate", "tyro"):
        if name in page.read_text(encoding="utf-8"):
            pytest.importorskip(name)
    for example, printed in zip(examples_of(page), run_page(page), strict=True):
        expected = example.prints or "\n"
        assert printed == expected, (
            f"{page.name}:{example.line} prints something else; python tests/test_docs.py rewrites it"
        )


def test_every_stand_in_stands_for_something():
    code = "".join(example.code for page in PAGES for example in examples_of(page))
    assert [written for written in STAND_INS if written not in code] == []


def test_every_python_block_is_found():
    """A fence that the pattern above misses, indented say, would be an example that nobody runs."""
    for page in PAGES:
        fences = re.findall(r"^\s*```\s*python", page.read_text(encoding="utf-8"), re.M)
        assert len(fences) == len(examples_of(page)), page.name


def anchors_of(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_internal_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{page.name} links to {target}"
        # The names of the API page come from the code.
        if anchor and file.name != "api.md":
            assert anchor in anchors_of(file), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_figures_lead_to_themselves_at_full_size(page):
    text = page.read_text(encoding="utf-8")
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert re.search(rf"\[!\[[^\]]*\]\({re.escape(picture)}\)\]\({re.escape(picture)}\)", text), picture


def nav_files(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [file for part in (entry.values() if isinstance(entry, dict) else entry) for file in nav_files(part)]


def test_navigation_lists_every_page_once():
    yaml = pytest.importorskip("yaml")
    listed = nav_files(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def test_start_page_has_the_commands_of_the_readme():
    commands = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    shown = re.findall(r"```bash\n(.*?)```", (DOCS / "index.md").read_text(encoding="utf-8"), re.DOTALL)
    assert "".join(shown) == commands.group(1)


def test_api_page_has_every_public_name():
    listed = re.findall(r"^::: foveal\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.M)
    assert set(foveal.__all__) <= set(listed)
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize(
    ("page", "names"),
    [("functions.md", IMPLS), ("sla.md", FEATURE_MAPS), ("sla.md", LINEAR_SCOPES), ("sla.md", TOKEN_ORDERS)],
)
def test_tables_have_every_choice(page, names):
    rows = re.findall(r'^\| `"(\w+)"`', (DOCS / page).read_text(encoding="utf-8"), re.M)
    assert set(names) <= set(rows)


def prose_of(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_paths_on_a_page_exist(page):
    """Paths of the repository in code spans, with NAME for what a reader fills in."""
    folders = "|".join(("src", "tests", "docs", "benchmarks", "examples", "recipes"))
    paths = re.findall(rf"`(?:python )?((?:{folders})/[\w./-]+)", prose_of(page))
    assert [path for path in paths if "NAME" not in path and not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_names_on_a_page_exist(page):
    """Dotted names of foveal, in code spans and links."""

    def missing(name: str) -> bool:
        found, *attributes = name.split(".")
        found = importlib.import_module(found)
        for index, attribute in enumerate(attributes, 2):
            if not hasattr(found, attribute):
                module = ".".join(name.split(".")[:index])
                if importlib.util.find_spec(module) is None:
                    return True
                importlib.import_module(module)
            found = getattr(found, attribute)
        return False

    files = {"foveal.json", "foveal.safetensors"}
    names = set(re.findall(r"\bfoveal(?:\.[A-Za-z_]\w*)+", prose_of(page))) - files
    assert sorted(name for name in names if missing(name)) == []


def test_pages_keep_to_the_style_page():
    """The phrases in the left column of its table are on no other page."""
    rows = re.findall(r"^\| (.+?) \| .+ \|$", (DOCS / "style.md").read_text(encoding="utf-8"), re.M)
    phrases = [phrase for row in rows[1:] for phrase in (row.split(", ") if not row.startswith(",") else [row])]
    assert len(phrases) > 10
    for page in (*PAGES, ROOT / "README.md"):
        if page.name != "style.md":
            text = " ".join(prose_of(page).lower().split())
            assert [phrase for phrase in phrases if re.search(rf"{re.escape(phrase)}\b", text)] == [], page.name


def load_figures():
    spec = importlib.util.spec_from_file_location("docs_figures", DOCS / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_are_drawn_by_their_script(tmp_path, monkeypatch):
    """And with letters that can be read on a page, where a figure is at most 940 pixels wide."""
    matplotlib_figure = pytest.importorskip("matplotlib.figure")
    matplotlib_text = pytest.importorskip("matplotlib.text")
    pytest.importorskip("av")
    image = pytest.importorskip("PIL.Image")
    save = matplotlib_figure.Figure.savefig

    def save_readable(figure, path):
        save(figure, path)
        width = figure.get_figwidth()
        pixels = min(100, 940 / width) / 72
        smallest = min(text.get_fontsize() for text in figure.findobj(matplotlib_text.Text) if text.get_text())
        assert smallest * pixels >= 12, f"{path.name} has letters of {smallest * pixels:.1f} pixels"

    monkeypatch.setattr(matplotlib_figure.Figure, "savefig", save_readable)
    for name, draw in load_figures().FIGURES.items():
        draw(tmp_path / name)
        drawn, committed = image.open(tmp_path / name), image.open(DOCS / "assets" / name)
        # Fonts differ from machine to machine, so a few pixels may; a figure of something else does not pass.
        size = (96, 48)
        pixels = [torch.tensor(list(x.convert("L").resize(size).tobytes())).float() for x in (drawn, committed)]
        assert (pixels[0] - pixels[1]).abs().mean() < 6, f"docs/assets/{name} is not what docs/figures.py draws"


def test_tables_of_features_name_tests_that_exist():
    spec = importlib.util.spec_from_file_location("docs_features", DOCS / "features.py")
    features = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(features)

    def source(file):
        return (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")

    for file, owner in features.ROWS.values():
        text = source(file) + (source("family_checks") if owner else "")
        assert owner is None or f"class {owner}(" in text
    wan = "".join(source(file) for file in ("test_wan", "test_wan_variants", "family_checks"))
    for column, beginnings in features.COLUMNS.items():
        assert all(f"def {beginning}" in wan for beginning in beginnings if column != "pipeline"), column
    for file, beginning in (*features.COMBINATIONS.values(), *(x for many in features.OF_WAN.values() for x in many)):
        assert f"def {beginning}" in source(file), (file, beginning)
    page = (DOCS / "families.md").read_text(encoding="utf-8")
    assert all(f"| {row} |" in page for row in features.ROWS), "run python docs/features.py"
    assert "fail |" not in page


def test_table_of_wrappers_is_that_of_the_tests():
    spec = importlib.util.spec_from_file_location("docs_wrappers", DOCS / "wrappers.py")
    wrappers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wrappers)
    assert wrappers.PAGE.read_text(encoding="utf-8") == wrappers.page(), "run python docs/wrappers.py"


def test_site_builds_without_a_warning(tmp_path):
    for name in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f'needs {name}: pip install -e ".[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    built = {page.stem: page.relative_to(DOCS).with_suffix("") for page in PAGES if page.stem != "index"}
    pages = {stem: tmp_path / "site" / path / "index.html" for stem, path in built.items()}
    assert all(file.is_file() for file in pages.values())
    assert "<math" in pages["sla"].read_text(encoding="utf-8")
    for name in foveal.__all__:
        assert f'id="foveal.{name}"' in pages["api"].read_text(encoding="utf-8"), name
    # The site works offline: whatever a page loads, it has.
    for file in pages.values():
        assert re.findall(r'(?:src|rel="stylesheet" href)="https?://', file.read_text(encoding="utf-8")) == []


def rewrite(page: Path) -> None:
    printed = iter(run_page(page))

    def replace(found: re.Match) -> str:
        output = next(printed)
        shown = f'\n```text title="prints"\n{output}```\n' if output.strip() else ""
        return f"```python\n{found['code']}```\n{shown}"

    page.write_text(EXAMPLE.sub(replace, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    for path in PAGES:
        if examples_of(path):
            rewrite(path)
