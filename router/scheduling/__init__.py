"""Which worker takes a request: filter -> score -> pick, run once for each role. See `base`."""
