"""The tables of the pages are those of the result files."""

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "results" / "write_tables.py"


def test_every_page_shows_the_numbers_of_its_result_files():
    script = runpy.run_path(str(SCRIPT))
    assert [path.name for path in script["pages"]()], "no page has a table"
    for path in script["pages"]():
        text = path.read_text(encoding="utf-8")
        assert script["rewritten"](text) == text, f"{path.name}: run python studies/results/write_tables.py"


def test_a_number_that_was_changed_by_hand_is_noticed():
    script = runpy.run_path(str(SCRIPT))
    text = "<!-- table: demo -->\n| someone typed | 1.00 |\n<!-- end -->\n"
    assert script["rewritten"](text) != text
