"""A server for a folder with some rules, and one question to it."""

from ktlsd.settings import Files, Settings
from tests.client import Client
from tests.serving import ThreadServer


def served(root, *rules, **files):
    return ThreadServer(root, None, settings=Settings(root=str(root), rule=rules, files=Files(**files)))


def ask(server, target, **fields):
    peer = Client(server.port)
    try:
        return peer.get(target, **fields)
    finally:
        peer.close()
