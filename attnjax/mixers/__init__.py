"""Token mixers: one file per mechanism, found by file name."""
