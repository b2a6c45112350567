"""docs/mechanisms.md is what the catalog writes."""

from pathlib import Path

from attnjax import catalog
from attnjax.core import entries


def test_the_committed_page_is_current():
    page = Path(__file__).parents[1] / "docs" / "mechanisms.md"
    told = catalog.markdown(entries.entries())
    assert page.read_text(encoding="utf-8") == told, (
        "run python -m attnjax.catalog --markdown docs/mechanisms.md"
    )
