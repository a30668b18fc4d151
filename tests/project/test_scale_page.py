"""The costs of many volumes in the docs are those of the reports."""

import pytest

from tools import scale_page


@pytest.mark.parametrize("page", ["prepared_volumes.md", "evaluation.md"])
def test_the_pages_hold_the_reports(page):
    """Else run python -m tools.scale_page."""
    text = (scale_page.DOCS / page).read_text(encoding="utf-8")
    written = text.partition(scale_page.BEGIN)[2].partition(scale_page.END)[0]
    assert written == f"\n\n{scale_page.pages()[scale_page.DOCS / page]}\n"


def test_what_is_said_follows_the_report():
    origin = {
        "command": "python x",
        "commit": "abc",
        "date": "2026-11-29T01",
        "machine": {"cores": 2, "processor": "P"},
    }
    trained = {"peak_mib": 100.0}
    limited = {"cases": 9, "same_losses": False, "limited": {"limit": 2**30, "largest_cache": 2**29}, **origin}
    text = scale_page.cohort_text({"limited": {**limited, "unlimited": {"prepared": 3 * 2**30}}})
    assert "9 volumes, 3.00 GiB prepared, in a cache limited to 1.00 GiB" in text and "other losses than" in text
    assert "it held 0.50 GiB at most" in text
    parts = {f"{name}_{count}": {"peak_mib": peak} for name in ("vae", "ldm") for count, peak in ((10, 100), (90, 110))}
    memory = {**parts, "second_start_90": {"first_step_s": 4.0}, **origin}
    preparation = {"volumes": 8, "speedup": 1.8, "one_on_two_cores": 5.0, "one_on_one_core": 9, "two_on_two_cores": 5}
    report = {"memory": memory, "preparation": preparation | origin, "wait": {"data_wait": 0.003, **trained, **origin}}
    said = scale_page.prepared_text(report)
    assert "| autoencoder | 100 MiB | 110 MiB | 1.10 |" in said and "waits 0.3 %" in said and "(1.80 times" in said
