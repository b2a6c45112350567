"""Small splits, and a cache of the test's own."""

import numpy as np
import pytest

from attnjax.data import Split


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    """No test reads or fills the user's cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ATTNJAX_CACHE", str(folder))
    return folder


@pytest.fixture
def make_split():
    """Builds a split from document lengths, with ids that tell where they stand."""

    def make(*lengths, separator=None, dtype=np.uint16, name="train"):
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = (np.arange(offsets[-1]) * 7 + 3) % 251
        return Split(
            tokens=tokens.astype(dtype),
            document_offsets=offsets,
            separator=separator,
            name=name,
        )

    return make
