"""The gate, by openat2 and by walking: what leads out is never opened, what leads inside is."""

import errno
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktlsd.errors import RequestError, SettingsError
from ktlsd.files.root import DocumentRoot


@pytest.fixture(params=["openat2", "walk"])
def gate(request):
    return request.param


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "root"
    (root / "d/e").mkdir(parents=True)
    (root / "f").write_bytes(b"inside")
    (root / "d/e/g").write_bytes(b"deep")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root-evil").mkdir()
    (tmp_path / "root-evil/x").write_bytes(b"secret")
    (root / "to-f").symlink_to("f")
    (root / "d/up").symlink_to("../f")
    (root / "to-d").symlink_to("d")
    (root / "absolute-inside").symlink_to(root / "d/e")
    (root / "out").symlink_to("../secret")
    (root / "out-absolute").symlink_to(tmp_path / "secret")
    (root / "out-dir").symlink_to("..")
    (root / "out-evil").symlink_to("../root-evil/x")
    (root / "out-and-in").symlink_to("../root/f")
    (root / "loop").symlink_to("loop")
    (root / "proc").symlink_to("/proc/self/root/etc/passwd")
    os.mkfifo(root / "fifo")
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(root / "socket"))
    sock.close()
    (root / b"\xff\xfe odd \xe2\x82\xac".decode("utf-8", "surrogateescape")).write_bytes(b"odd")
    return root


@pytest.fixture
def opened(tree, gate):
    root = DocumentRoot(str(tree), use_openat2=gate == "openat2")
    assert root.gate == gate
    yield root
    root.close()


def content(root, path):
    file = root.open(path)
    assert file is not None
    try:
        return os.pread(file.fd, 100, 0)
    finally:
        file.release()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"f", b"inside"),
        (b"d/e/g", b"deep"),
        (b"to-f", b"inside"),
        (b"d/up", b"inside"),
        (b"to-d/e/g", b"deep"),
        (b"absolute-inside/g", b"deep"),
        (b"\xff\xfe odd \xe2\x82\xac", b"odd"),
    ],
)
def test_files_and_links_inside_are_opened(opened, path, expected):
    assert content(opened, path) == expected


@pytest.mark.parametrize(
    "path",
    [b"out", b"out-absolute", b"out-dir/secret", b"out-dir", b"out-evil", b"loop", b"proc", b"../secret", b"d/../../secret",
     b"nothing", b"f/x", b"d/e/nothing", b"fifo", b"socket", b"x" * 300, b"d/" * 2100 + b"f", b"../root-evil/x"],
)  # fmt: skip
def test_what_leads_out_or_is_no_file_is_not_found(opened, path):
    with pytest.raises(RequestError) as caught:
        opened.open(path)
    assert caught.value.status == 404


def test_a_link_out_and_in_again_shows_nothing_of_the_outside(opened):
    """Whether it is served or not may differ; what comes is never from outside."""
    try:
        assert content(opened, b"out-and-in") == b"inside"
    except RequestError as error:
        assert error.status == 404


def test_directories_are_told_apart(opened):
    for path in (b".", b"d", b"to-d", b"absolute-inside"):
        assert opened.open(path) is None


def test_no_descriptor_is_left_behind(opened):
    before = len(os.listdir("/proc/self/fd"))
    for path in (b"f", b"d", b"d/e/g", b"out", b"loop", b"fifo", b"to-d/e/g", b"absolute-inside/g", b"f/x"):
        try:
            file = opened.open(path)
        except RequestError:
            continue
        if file is not None:
            file.release()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("number", "status"), [(errno.EACCES, 403), (errno.EMFILE, 503), (errno.ENFILE, 503), (errno.EIO, 500), (errno.ELOOP, 404)]
)
def test_what_the_system_refuses_has_a_status(opened, monkeypatch, number, status):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(opened, "_open_beneath", refuse)
    with pytest.raises(RequestError) as caught:
        opened.open(b"f")
    assert caught.value.status == status


_NAMES = st.sampled_from([b"..", b".", b"d", b"e", b"out-dir", b"to-d", b"root", b"secret", b"up", b"absolute-inside", b"proc"])


@given(st.lists(_NAMES, min_size=1, max_size=8))
def test_no_path_reaches_the_secret(tmp_path_factory, names):
    base = _shared_tree(tmp_path_factory)
    for use_openat2 in (True, False):
        root = DocumentRoot(str(base), use_openat2=use_openat2)
        try:
            assert content(root, b"/".join(names)) != b"secret"
        except (RequestError, AssertionError) as error:
            assert not str(error).startswith("assert b'secret'")
        finally:
            root.close()


_trees = []


def _shared_tree(factory):
    if not _trees:
        base = factory.mktemp("gate")
        (base / "root/d/e").mkdir(parents=True)
        (base / "secret").write_bytes(b"secret")
        (base / "root/out-dir").symlink_to("..")
        (base / "root/to-d").symlink_to("d")
        (base / "root/d/up").symlink_to("../..")
        (base / "root/absolute-inside").symlink_to(base / "root/d")
        (base / "root/proc").symlink_to("/proc/self/cwd")
        _trees.append(base / "root")
    return _trees[0]


@pytest.mark.parametrize(("name", "hint"), [("missing", "create it"), ("file", "name the directory")])
def test_a_root_that_is_none_is_a_settings_error(tmp_path, name, hint):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=hint):
        DocumentRoot(str(tmp_path / name))
