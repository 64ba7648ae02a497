"""A small tree and a server for it."""

import pytest


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "root"
    (folder / "private/sub").mkdir(parents=True)
    for name in ("file", "a.iso", "page.html", "private/file", "private/sub/file", "404.html", "app.html"):
        (folder / name).write_bytes(name.encode())
    (folder / 'ünï "q".txt').write_bytes(b"odd")
    return folder
