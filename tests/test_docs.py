"""What README and docs say is true: code runs, commands are understood, and tables are those of the CSV files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from flowkern.bench.docs import benchmarks, headline, kernels, with_headline

from flowkern import cli

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/guide.md", "docs/benchmarks.md")


def blocks(page: str, language: str) -> list[str]:
    """The code of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_code_runs(page: str) -> None:
    """One block after the other, as a reader would."""
    names: dict[str, Any] = {}
    assert blocks(page, "python")
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page}, block {number}", "exec"), names)


def commands() -> list[str]:
    """Every command of flowkern's in the pages, with lines that go on joined, and without comments."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line.split("flowkern.cli ")[-1] for line in lines if "flowkern.cli " in line]
            found += [line.removeprefix("flowkern ") for line in lines if line.startswith("flowkern ")]
    return found


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command: str) -> None:
    cli._parser().parse_args(shlex.split(command, comments=True))


def test_tables_are_those_of_the_files() -> None:
    """``python -m bench --docs`` writes both."""
    assert (ROOT / "docs" / "benchmarks.md").read_text("utf-8") == benchmarks()
    assert (ROOT / "docs" / "kernels.md").read_text("utf-8") == kernels()
    readme = (ROOT / "README.md").read_text("utf-8")
    assert headline() in readme
    assert with_headline(readme) == readme


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text("utf-8")):
        assert link.startswith("https://") or (path.parent / link).exists(), link


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 130
