"""No import leads upstairs or next door. The table is that of docs/architecture.md.

Every import counts, also one inside a function: that only hides a stair. Imports under
`if TYPE_CHECKING:` count as well; a type from above is knowledge of what is above.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "zfabric"

# The words of floor 0 may use one another. `testing` is the garden: it builds real machines and
# transports (floors 0-2) into simulators and contract suites, and no room imports it.
# `cli` stands above `demo` and `integrations`, because a command opens their doors; `joblib` and
# `xarray` are such doors, modules to import by a short name.
FLOORS: dict[str, int] = {
    "errors": 0,
    "ids": 0,
    "config": 0,
    "clock": 0,
    "messages": 0,
    "wire": 1,
    "codec": 1,
    "keys": 1,
    "core": 2,
    "transport": 2,
    "runtime": 3,
    "launch": 3,
    "testing": 3,
    "client": 4,
    "demo": 5,
    "integrations": 5,
    "distributed": 6,
    "joblib": 6,
    "xarray": 6,
    "cli": 6,
}
# The front door re-exports floor 4; whoever goes through it stands on that floor.
FRONT_DOOR = 4

# What a room must not do at all, as the modules that would let it.
SOCKETS_CLOCKS_DISKS = frozenset(
    "zmq socket select selectors ssl time threading multiprocessing subprocess asyncio "
    "signal sqlite3 tempfile".split()
)
LAWS: dict[str, frozenset[str]] = {
    # Machines get bytes, time and randomness as arguments.
    "core": SOCKETS_CLOCKS_DISKS | {"pickle", "cloudpickle", "uuid", "secrets"},
    # The wire is pure, and what comes from a peer is never unpickled there.
    "wire": SOCKETS_CLOCKS_DISKS | {"pickle", "cloudpickle"},
    "transport": frozenset({"asyncio", "pickle", "cloudpickle"}),
    "runtime": frozenset({"asyncio"}),
}
EXCEPTIONS = {
    # A task may be a coroutine function; its slot gives it a loop, and has no sockets to share it.
    ("runtime/slot.py", "asyncio"),
}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """`zfabric/core/tasks.py` is in `core`; `zfabric/ids.py` is `ids`; the front door is ''."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts[0] in ("__init__", "__main__") else parts[0]


def imported_modules(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import; `from a import b` gives `a.b`, relative ones resolved."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])
        elif isinstance(node, ast.Call) and _is_import_module(node.func) and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def _is_import_module(func: ast.expr) -> bool:
    name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
    return name in ("import_module", "__import__")


def upward(path: Path, source: str) -> list[str]:
    """One line per import that the house does not allow."""
    room = room_of(path)
    if room == "":
        return []
    found = []
    for line, name in imported_modules(path, source):
        parts = name.split(".")
        if parts[0] != "zfabric" or name == "zfabric.__version__":
            continue
        target = parts[1] if len(parts) > 1 else ""
        floor = FLOORS.get(target, FRONT_DOOR)
        allowed = target == room or floor < FLOORS[room] or floor == FLOORS[room] == 0
        if target == "testing" and room != "testing":
            allowed = False
        if not allowed:
            found.append(
                f"{path.relative_to(ROOT)}:{line}: {room} (floor {FLOORS[room]}) "
                f"imports {name} (floor {floor})"
            )
    return found


def unlawful(path: Path, source: str) -> list[str]:
    room = room_of(path)
    forbidden = LAWS.get(room, frozenset())
    return [
        f"{path.relative_to(ROOT)}:{line}: {room} imports {name}"
        for line, name in imported_modules(path, source)
        if (module := name.split(".")[0]) in forbidden
        and (path.relative_to(PACKAGE).as_posix(), module) not in EXCEPTIONS
    ]


def test_no_import_leads_upstairs_or_next_door() -> None:
    found = [text for path in sources() for text in upward(path, path.read_text())]
    assert not found, "\n" + "\n".join(found)


def test_rooms_keep_their_laws() -> None:
    found = [text for path in sources() for text in unlawful(path, path.read_text())]
    assert not found, "\n" + "\n".join(found)


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(path) for path in sources()} - {""}
    assert rooms <= set(FLOORS), f"no floor for {sorted(rooms - set(FLOORS))}"


def test_the_architecture_page_shows_the_same_floors() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    shown = {
        room: int(match[1])
        for match in re.finditer(r"^\| (\d) \| ([^|]+) \|", page, re.MULTILINE)
        for room in re.findall(r"`(\w+)(?:/|\.py)`", match[2])
    }
    assert shown == {room: floor for room, floor in FLOORS.items() if room != "testing"}


@pytest.mark.parametrize(
    ("where", "line", "bad"),
    [
        ("core/a.py", "from zfabric.runtime import broker", True),
        ("core/a.py", "import zfabric.transport.zmq", True),
        ("core/a.py", "def f():\n    from zfabric.client import Client", True),
        ("core/a.py", "from ..transport import registry", True),
        ("core/a.py", "from . import tasks", False),
        ("core/a.py", "from zfabric import errors", False),
        ("core/a.py", "from zfabric import Client", True),
        ("core/a.py", "from zfabric.wire import parse", False),
        ("core/a.py", "from zfabric.testing import simulator", True),
        ("launch/a.py", "from zfabric.runtime import broker", True),
        ("launch/a.py", "importlib.import_module('zfabric.runtime.broker')", True),
        ("testing/a.py", "from zfabric.core import scheduler", False),
        ("demo/a.py", "import zfabric", False),
        ("demo/a.py", "from zfabric.cli import main", True),
        ("cli/a.py", "from zfabric.demo import job", False),
        ("ids.py", "from zfabric.errors import ConfigError", False),
        ("ids.py", "from zfabric.wire import parse", True),
    ],
)
def test_the_reader_sees_stairs(where: str, line: str, bad: bool) -> None:
    assert bool(upward(PACKAGE / where, line)) is bad
