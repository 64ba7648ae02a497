"""Counters of one worker, plain numbers by name; told when the worker ends."""

from collections import Counter


class Metrics:
    """What has happened so far. `count` takes a name and, where it helps, a reason behind a colon."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter."""
        self.counters[name] += amount

    def summary(self) -> str:
        """Return all counters in one line, sorted by name."""
        return " ".join(f"{name}={value}" for name, value in sorted(self.counters.items()))
