"""What the README tells people to type works as it stands there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = dict(enumerate(re.findall(r"```python\n(.*?)```", README, re.DOTALL)))


def test_the_first_block_is_the_two_commands():
    first = re.search(r"```bash\n(.*?)```", README, re.DOTALL)
    assert README[: first.start()].strip() == "# foveal"
    run, check = first.group(1).strip().split("\n")
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command, extra in ((run, "demo"), (check, "test")):
        assert command.startswith("python3 -m venv .venv && ")
        assert f".[{extra}]" in command
        assert extra in extras
    assert run.endswith("foveal demo")
    assert check.endswith("pytest")


def test_local_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_wan_example_runs(monkeypatch, tmp_path):
    """With a tiny pipeline in place of the download, and no text encoder."""
    diffusers = pytest.importorskip("diffusers")
    from tiny_wan import tiny_transformer

    calls = []

    class Pipeline:
        transformer = tiny_transformer()

        def to(self, device):
            assert device == "cuda"
            return self

        def __call__(self, prompt):
            latents = torch.randn(1, self.transformer.config.in_channels, 3, 8, 12)
            text = torch.randn(1, 4, self.transformer.config.text_dim)
            with torch.no_grad():
                calls.append(self.transformer(latents, torch.tensor([500.0]), text, return_dict=False)[0])
            return type("Output", (), {"frames": [calls[-1]]})

    monkeypatch.setattr(diffusers.WanPipeline, "from_pretrained", lambda *args, **kwargs: Pipeline())
    monkeypatch.chdir(tmp_path)
    example = next(code for code in BLOCKS.values() if "WanPipeline" in code)
    scope = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert calls[0].isfinite().all()
    assert (tmp_path / "wan-sla" / "foveal.safetensors").exists()
    assert len([line for line in example.split("\n") if line.strip() and not line.startswith(("import", "from"))]) <= 10


def test_function_example_runs():
    example = next(code for code in BLOCKS.values() if "select_blocks" in code)
    scope = {}
    exec(compile(example, "README.md", "exec"), scope)
    for name in ("sparse", "sla", "vsa"):
        assert scope[name].shape == scope["query"].shape
        assert scope[name].isfinite().all()


def test_tables_are_those_of_the_results():
    """Figures come from the JSON that the tools wrote, not from hands."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for page in tables.PAGES:
        text = page.read_text()
        assert "<!-- table:" in text
        assert tables.rendered(text) == text, f"{page.name}: run python docs/tables.py"
