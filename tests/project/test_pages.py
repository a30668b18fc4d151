"""tools/markdown.py writes figures into pages."""

from pathlib import Path

import pytest

from tools import samplers_page
from tools.markdown import rewrite_between, table


def test_a_table_has_a_line_under_its_header():
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


def test_only_what_is_between_the_comments_is_rewritten(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before <!-- a -->\nold\n<!-- z -->\nafter\n")
    for _ in range(2):  # a second time changes nothing
        rewrite_between(page, "<!-- a -->", "<!-- z -->", "new\n")
        assert page.read_text() == "before <!-- a -->\nnew\n<!-- z -->\nafter\n"


@pytest.mark.parametrize("text", ["", "<!-- a -->", "<!-- z --><!-- a -->", "<!-- a --><!-- a --><!-- z -->"])
def test_a_page_without_the_two_comments_is_refused(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"page\.md: needs the lines <!-- a --> and <!-- z -->, once each"):
        rewrite_between(page, "<!-- a -->", "<!-- z -->", "new\n")
    assert page.read_text() == text


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["hippocampus", "hippocampus-fast"])
def test_the_page_on_quality_has_the_figures_of_the_weights(name):
    figures = samplers_page.measured(ROOT / "weights" / name / "results" / "samplers_validation.json")
    assert figures in (ROOT / "docs" / "quality_and_speed.md").read_text()
