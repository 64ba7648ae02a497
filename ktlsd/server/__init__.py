"""One process: accept, pump, drain."""
