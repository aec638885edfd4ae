"""What the README and docs/ tell people to type is understood: commands parse, Python runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from mistudio import cli
from mistudio.studio import load_verb

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, *kinds):
    """The fenced blocks of these kinds."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for kind, text in found if kind in kinds]


def commands(page):
    """Each command of the page's blocks (in those that are no shell's, each with flags), as words after `mistudio`."""
    shell, plain = ("\n".join(blocks(page, kind)).replace("\\\n", " ").splitlines() for kind in ("sh", ""))
    found = [shlex.split(line, comments=True) for line in shell + [line for line in plain if " --" in line]]
    return [words[words.index("mistudio") + 1 :] for words in found if "mistudio" in words]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_parses(page):
    for words in commands(page):
        name, rest = cli._verb_name(words)
        cli.parse(load_verb(name), rest)


def test_there_are_commands_to_parse():
    assert len(commands(ROOT / "README.md")) >= 15
    assert len(commands(ROOT / "docs" / "steering.md")) >= 2


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = blocks(ROOT / "README.md", "python")
    small = {"200_000": "1_000", "steps=500": "steps=1, batch_rows=64", "d_sae=1536": "d_sae=64"}
    for of_the_page, here in small.items():
        assert of_the_page in first
        first = first.replace(of_the_page, here)
    known = {"x": torch.randn(5, 192)}
    exec(first, known)
    exec(second, known)
    assert known["reconstructed"].shape == (5, 192)
    assert known["features"].shape == (5, 64)
