"""Models: they stack nn parts and the configured mixers, whatever those are."""
