"""The tables of the pages are those of the result files."""

import re
from pathlib import Path

import torch

from studies.benchmarks.own_network import CNN
from studies.tables import __main__ as writer

ROOT = Path(__file__).parents[2]


def test_every_page_shows_the_numbers_of_its_result_files():
    assert [path.name for path in writer.pages()], "no page has a table"
    for path in writer.pages():
        text = path.read_text(encoding="utf-8")
        assert writer.rewritten(text) == text, f"{path.name}: run python -m studies.tables"


def test_a_number_that_was_changed_by_hand_is_noticed():
    text = "<!-- table: demo -->\n| someone typed | 1.00 |\n<!-- end -->\n"
    assert writer.rewritten(text) != text


def test_links_lead_somewhere():
    """Files that pages name, and the headings in them."""
    others = (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "studies/JOURNAL.md"))
    for page in (*others, *(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts)):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if link.startswith("http"):
                continue
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert anchor in slugs, f"{page.name}: {link}"


def test_pages_are_short():
    for page in (ROOT / "docs").rglob("*.md"):
        if page.stem not in ("settings", "commands") and "_build" not in page.parts:  # these two are generated
            assert len(page.read_text(encoding="utf-8").splitlines()) <= 150, page.name


def test_the_network_of_the_tutorial_is_the_one_that_was_measured():
    page = (ROOT / "docs" / "tutorials" / "own_network.md").read_text(encoding="utf-8")
    names = {}
    exec(page.split("```{code-cell}\n")[1].split("```")[0], names)
    values = []
    for kind in (names["CNN"], CNN):
        torch.manual_seed(0)
        network = kind().eval()
        torch.nn.init.normal_(network.head.linear.weight)
        values.append(network(torch.randn(2, 1, 8, 8)))
    assert torch.equal(*values)
