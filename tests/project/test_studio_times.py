"""The times in docs/studio.md are those of docs/studio_times.json."""

from pathlib import Path

from files.documents import read_object

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_holds_the_times():
    seconds = read_object(DOCS / "studio_times.json")["seconds"]
    first, stroke = seconds["command_to_first_volume"], seconds["stroke_to_volume"]
    text = (DOCS / "studio.md").read_text(encoding="utf-8")
    assert f"| from the command to the first volume | {first['median']:.1f} s | {first['longest']:.1f} s |" in text
    assert f"| from a stroke to the new volume | {stroke['median']:.2f} s | {stroke['longest']:.2f} s |" in text
