"""docs/configuration.md is true: every key has its row, every default is the code's."""

import importlib.util
import re
from pathlib import Path

import msgspec
import pytest

from ktlsd import settings

DOCS = Path(__file__).parents[2] / "docs"
SECTIONS = {
    "Top level": settings.Settings, "[tls]": settings.Tls, "[ktls]": settings.Ktls, "[limits]": settings.Limits,
    "[process]": settings.Process, "[metrics]": settings.MetricsListener, "[log]": settings.Log,
    "[files]": settings.Files, "[[rule]]": settings.Rule, "[[site]]": settings.Site,
    "[[http]]": settings.Http,
}  # fmt: skip
TABLES = {"process", "metrics", "tls", "ktls", "limits", "log", "files", "rule", "site", "http"}  # sections of their own


def rows(section):
    text = (DOCS / "configuration.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.MULTILINE))


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_is_documented_with_its_default(section):
    struct = SECTIONS[section]
    fields = {f.name: f for f in msgspec.structs.fields(struct)}
    if struct is settings.Settings:
        fields = {name: field for name, field in fields.items() if name not in TABLES}
    documented = rows(section)
    assert documented.keys() == fields.keys()
    for name, field in fields.items():
        shown = documented[name]
        if field.default is msgspec.NODEFAULT and field.default_factory is msgspec.NODEFAULT:
            assert shown == "must be there"
        elif match := re.fullmatch(r"`(.*)`", shown):
            default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
            value = msgspec.toml.decode(f"x = {match[1]}".encode())["x"]
            assert (tuple(value) if isinstance(value, list) else value) == default
        else:
            assert field.default in (None, ()), f"{name}: {shown}"


def test_the_example_is_valid(tmp_path):
    text = (DOCS / "configuration.md").read_text().partition("```toml\n")[2].partition("```")[0]
    (tmp_path / "k.toml").write_text(text)
    read = settings.read_file(str(tmp_path / "k.toml"))
    assert len(read.rule) == 2


def test_links_between_the_pages_lead_somewhere():
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_tables_in_the_documents_are_those_of_the_saved_results():
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    text = (DOCS / "performance.md").read_text()
    assert text.count("<!-- tables of figures/") >= 3
    assert figures.filled(text) == text, "run: python docs/figures.py"
