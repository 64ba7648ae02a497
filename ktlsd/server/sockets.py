"""The listening sockets of a server, by where they listen: kept from one configuration, and one program, to the next."""

import os
import socket
from collections.abc import Mapping

from ktlsd.net import listeners


class Sockets:
    """The supervisor's. Those systemd has opened stand for what the configuration says of their kind."""

    def __init__(self, activated: Mapping[str, list[socket.socket]]) -> None:
        """`activated` by kind: "https", "http", "metrics"."""
        self._activated = dict(activated)
        self._bound: dict[str, list[socket.socket]] = {}
        self._new: list[str] = []

    def activated(self, kind: str) -> list[socket.socket]:
        """Return what systemd has opened of this kind."""
        return self._activated.get(kind, [])

    def bind(self, name: str, host: str, port: int) -> list[socket.socket]:
        """Return the sockets that listen there: those there are, or new ones. Raises StartError."""
        if name not in self._bound:
            self._bound[name] = listeners.bind(host, port)
            self._new.append(name)
        return self._bound[name]

    def rollback(self) -> None:
        """Close what was bound since the last `commit`: the configuration it was for is not taken."""
        for name in self._new:
            for sock in self._bound.pop(name):
                sock.close()
        self._new.clear()

    def commit(self, names: set[str]) -> None:
        """Keep these; close others that were bound for earlier configurations."""
        self._new.clear()
        for name in self._bound.keys() - names:
            for sock in self._bound.pop(name):
                sock.close()

    def close(self) -> None:
        """Close all."""
        for group in (*self._bound.values(), *self._activated.values()):
            for sock in group:
                sock.close()
        self._bound.clear()
        self._activated.clear()

    def hand_over(self) -> dict[str, dict[str, list[int]]]:
        """Return the descriptors, which outlive an exec from now on, for `take_over`."""
        state = {}
        for key, groups in (("activated", self._activated), ("bound", self._bound)):
            state[key] = {name: [sock.fileno() for sock in group] for name, group in groups.items()}
            for fds in state[key].values():
                for fd in fds:
                    os.set_inheritable(fd, True)
        return state

    def keep(self) -> None:
        """End the sockets with an exec again."""
        for group in (*self._bound.values(), *self._activated.values()):
            for sock in group:
                sock.set_inheritable(False)

    @classmethod
    def take_over(cls, state: Mapping[str, Mapping[str, list[int]]]) -> "Sockets":
        """Return what an earlier program has handed over."""
        made = cls({name: [listeners.adopt(fd) for fd in fds] for name, fds in state["activated"].items()})
        made._bound = {name: [listeners.adopt(fd) for fd in fds] for name, fds in state["bound"].items()}
        return made
