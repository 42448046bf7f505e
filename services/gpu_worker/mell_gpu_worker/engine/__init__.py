"""Engines behind one port: `torch` (the only place for torch) and `fake` (no weights, says so)."""
