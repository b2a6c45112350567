"""Reading models: maps, probes, pictures."""
