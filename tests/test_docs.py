"""What the pages tell: commands that parse, links that lead somewhere, pictures that are there."""

import re
import shlex
from pathlib import Path

import pytest

from harma_ray.cli import make_parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md"]
for folder in ("docs", "cluster", "benchmarks"):
    PAGES += sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in (".md", ".yaml"))


def named(page):
    return str(page.relative_to(ROOT))


def test_every_paper_has_its_page():
    papers = {path.parent.name for path in (ROOT / "harma_ray" / "recipes").glob("*/config.py")}
    assert papers <= {page.stem for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_that_is_told_parses(page):
    for command in re.findall(r"launch\.py ([a-z][^\n`#]*)", page.read_text()):
        make_parser().parse_args(shlex.split(command))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_to_a_file(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
    missing = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert not missing
