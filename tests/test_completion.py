"""The completions for bash, as docs/faq.md writes them: bash reads the file and completes foveal's commands."""

import shutil
import subprocess
import sys

import pytest

pytest.importorskip("tyro")


def test_bash_completes_the_commands(tmp_path):
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    file = tmp_path / "foveal"
    code = "import sys; from foveal.lab import cli; sys.exit(cli.main())"
    subprocess.run([sys.executable, "-c", code, "--tyro-write-completion", "bash", str(file)], check=True, timeout=300)
    read = subprocess.run(["bash", "-c", f"source '{file}' && complete -p"], capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    assert "foveal" in read.stdout
    assert all(command in file.read_text() for command in ("doctor", "generate", "bench"))
