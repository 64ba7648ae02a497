"""Certificates that are renewed while we serve: noticed, looked at, and handed to the workers; a bad pair changes nothing."""

import logging
import time
from collections.abc import Iterator
from typing import Final

from ktlsd.errors import SettingsError
from ktlsd.files.watch import Watch
from ktlsd.server.contexts import Pair, expiry_of, fingerprint, key_kind, load_pem, pem_file, read_pair
from ktlsd.server.generation import Generation

_log = logging.getLogger("ktlsd")
_SETTLE: Final = 0.5  # seconds after the last change: a pair is two files
_PATIENCE: Final = 5.0  # seconds, where changes don't end
_ANYWAY: Final = 3600.0  # seconds; where changes are not noticed (network file systems) they are found


class Renewal:
    """The supervisor's. `look_at` is when to call `renewed`, monotonic seconds."""

    def __init__(self) -> None:
        self.watch = Watch()
        self.look_at = float("inf")
        self.wants_reload = False
        self._noticed = 0.0  # when the first change was, since the last look
        self._pairs: list[Pair] = []
        self._seen: dict[Pair, bytes] = {}
        self._ends: dict[str, float] = {}  # of those that are served, whatever is in the files by now

    def look_after(self, generation: Generation) -> None:
        """Notice from now on when this generation's certificates change."""
        self._pairs = generation.pairs
        self._seen = generation.fingerprints
        self._ends = {}
        for pair in self._pairs:
            self._note_end(pair)
        self.watch.look_after([file for pair in self._pairs for file in pair])
        self.look_at = time.monotonic()  # they may have changed since this generation has read them

    def noticed(self, now: float) -> None:
        """Something has happened in a folder with a certificate."""
        if self.watch.drain():
            self._noticed = self._noticed or now
            self.look_at = min(now + _SETTLE, self._noticed + _PATIENCE)

    def renewed(self, generation: Generation | None, now: float) -> Iterator[tuple[int, int]]:
        """Yield (number of the context, descriptor of its new chain and key) for each pair that has changed and is good.

        The generation's own contexts have them already, for workers still to be forked. The descriptor is the caller's.
        """
        self.look_at, self._noticed = now + _ANYWAY, 0.0
        changed = {pair for pair in self._pairs if fingerprint(pair) != self._seen.get(pair)}
        self._seen = self._seen | {pair: fingerprint(pair) for pair in changed}
        self.watch.look_after([file for pair in self._pairs for file in pair])  # links may lead elsewhere now
        if generation is None:
            return
        for pair in sorted(changed):
            try:
                pem = read_pair(pair)
                if key_kind(pem) != generation.kinds.get(pair):
                    _log.info("certificate %s: has another kind of key now: that takes a reload", pair.cert)
                    self.wants_reload = True
                    continue
                fds = [(index, pem_file(pair, pem)) for index, each in enumerate(self._pairs) if each == pair]
            except SettingsError as error:
                _log.warning("%s. The old pair stays", error)
                continue
            _log.info("certificate %s: renewed", pair.cert)
            self._note_end(pair)
            for index, fd in fds:
                load_pem(generation.contexts[index], fd)
                yield index, fd

    def expiries(self) -> dict[str, float]:
        """Return when each certificate ends, seconds since the epoch."""
        return self._ends

    def _note_end(self, pair: Pair) -> None:
        ends = expiry_of(pair.cert)
        if ends is not None:
            self._ends[pair.cert] = ends

    def close(self) -> None:
        """Let go."""
        self.watch.close()
