"""The architecture, enforced: who may import whom, and which of Python's modules the pure layers may not have."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ktlsd"

# Lower layers know nothing of higher ones (docs/how-it-works.md).
LAYERS = {
    0: ["errors", "uapi", "slices", "__init__"],
    1: ["tls", "protocol", "files.plan", "files.mime", "files.multipart", "files.globs", "files.listing", "files.__init__"],
    2: ["net", "files.root", "files.digests", "files.siblings", "files.watch"],
    3: ["settings", "validation", "server", "devcert", "hashing", "status"],
    4: ["bench", "cli", "__main__"],
}
# In layer 1 these two don't know each other; net doesn't know HTTP.
STRANGERS = [
    ("tls", "protocol"),
    ("protocol", "tls"),
    ("net", "protocol"),
    ("net", "files"),
    ("protocol", "files"),
    ("files", "net"),
]
# Layer 1 takes bytes and the time as arguments.
IMPURE = {
    "socket",
    "os",
    "select",
    "random",
    "threading",
    "subprocess",
    "asyncio",
    "logging",
    "datetime",
    "secrets",
    "selectors",
}
MAX_LINES = 400

MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py"))


def layer(module: str) -> int:
    for number, prefixes in LAYERS.items():
        if any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes):
            return number
    raise AssertionError(f"{module} has no layer: say in test_layers.py where it belongs")


def imports(module: str) -> set[str]:
    tree = ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            assert node.module
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module.startswith("ktlsd") else {node.module}
            )
    return found


def own(module: str) -> set[str]:
    """The project's modules that `module` imports."""
    names = set()
    for name in imports(module):
        if name.split(".")[0] == "ktlsd":
            inner = name.removeprefix("ktlsd").lstrip(".")
            while inner and inner not in MODULES:
                inner = inner.rpartition(".")[0] if f"{inner}.__init__" not in MODULES else f"{inner}.__init__"
            names.add(inner or "__init__")
    return names


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_from_lower_layers(module):
    for other in own(module):
        assert layer(other) <= layer(module), f"{module} (layer {layer(module)}) imports {other} (layer {layer(other)})"
        for one, stranger in STRANGERS:
            assert not (module.startswith(one + ".") and other.startswith(stranger + "."))


@pytest.mark.parametrize("module", [m for m in MODULES if layer(m) == 1])
def test_pure_modules_have_no_socket_file_or_clock(module):
    used = {name.split(".")[0] for name in imports(module)}
    assert not used & IMPURE
    tree = ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text())
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"time.time", "time.monotonic", "open", "print", "input"}


@pytest.mark.parametrize("module", MODULES)
def test_only_the_poller_waits(module):
    waits = {"select", "selectors", "asyncio"} & {name.split(".")[0] for name in imports(module)}
    assert not waits or module == "net.poller"


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_longer_than_a_reader_can_hold(module):
    lines = (PACKAGE / (module.replace(".", "/") + ".py")).read_text().count("\n")
    assert lines <= MAX_LINES
