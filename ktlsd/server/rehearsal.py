"""Whether it could be served, without serving: `ktlsd serve --check`, which is also what an upgrade asks of the new program."""

import os
from collections.abc import Callable

from ktlsd.server import process
from ktlsd.server.generation import check, prepare
from ktlsd.server.sockets import Sockets
from ktlsd.server.upgrade import take_state
from ktlsd.settings import Settings


def rehearse(load: Callable[[], Settings]) -> None:
    """Do everything that `Supervisor.run` does before it forks, and end. Raises SettingsError, StartError.

    In a process that a running server has started for its upgrade, with its sockets; else only what needs none.
    """
    process.forbid_core_dumps()
    state = take_state(os.environ)
    if state is None:
        check(load())
    else:
        prepare(load(), Sockets.take_over(state.sockets), 1)
