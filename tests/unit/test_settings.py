import pytest

from ktlsd.errors import SettingsError
from ktlsd.settings import parse_listen
from ktlsd.validation import load_file
from tests import pki


@pytest.mark.parametrize(
    ("text", "expected"),
    [("localhost:8443", ("localhost", 8443)), (":443", ("", 443)), ("*:443", ("", 443)), ("[::1]:0", ("::1", 0))],
)
def test_listen(text, expected):
    assert parse_listen(text) == expected


@pytest.mark.parametrize("text", ["localhost", "::1:443", "a:b", "a:70000", "a:-1", "", "a:¹"])
def test_bad_listen_names_the_value(text):
    with pytest.raises(SettingsError, match="listen"):
        parse_listen(text)


def test_a_whole_file(tmp_path):
    _, cert, key = pki.write(tmp_path)
    (tmp_path / "c.toml").write_text(
        'root = "."\nlisten = ["127.0.0.1:1", "[::1]:2"]\n[tls]\ncert = "cert.pem"\nkey = "key.pem"\n'
        '[ktls]\nmode = "require"\nhandover_bytes = 0\n[limits]\nidle_timeout = 5\n[log]\naccess = "-"\nformat = "combined"\n'
    )
    settings = load_file(str(tmp_path / "c.toml"))
    assert settings.root == str(tmp_path), "paths count from the file"
    assert (settings.tls.cert, settings.tls.key) == (str(cert), str(key))
    assert (settings.ktls.mode, settings.ktls.handover_bytes, settings.ktls.rekey_bytes) == ("require", 0, None)
    assert (settings.limits.idle_timeout, settings.log.access) == (5, "-")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[ktls]\nhandover_bytes = -1", "ktls.handover_bytes"),
        ('[ktls]\nhandover_bytes = "1"', "ktls.handover_bytes"),
        ('[ktls]\nmode = "sometimes"', "ktls.mode"),
        ("[ktls]\nmod = 1", "ktls"),
        ("nonsense = 1", "nonsense"),
        ("[limits]\nidle_timeout = 0", "limits.idle_timeout"),
        ("listen = []", "listen"),
        ('listen = ["x"]', "listen"),
        ('root = "missing"', "root"),
        ('[tls]\ncert = "missing.pem"\nkey = "missing.key"', "tls.cert"),
        ('[tls]\ncert = "c.toml"', "tls.key"),
        ("= 1", "TOML"),
        ("a = \x00", "TOML"),
        ("a = " + "[" * 5000, "TOML"),
    ],
)
def test_mistakes_name_file_and_key_in_one_line(tmp_path, text, key):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_file(str(tmp_path / "c.toml"))
    assert "c.toml" in str(caught.value)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("missing", "binary", "."):
        with pytest.raises(SettingsError, match="missing|binary|cannot be read"):
            load_file(str(tmp_path / name))
