"""The broker's process cannot unpickle what a peer sends: it has no pickle code of ours."""

from __future__ import annotations

import subprocess
import sys

FORBIDDEN = {"cloudpickle", "zfabric.codec", "numpy", "blosc", "asyncio", "click"}


def test_the_broker_loads_no_code_that_unpickles() -> None:
    code = "import zfabric.runtime.broker, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = set(done.stdout.split())
    assert not loaded & FORBIDDEN
    assert not {name for name in loaded if name.startswith("zfabric.codec")}


def test_nothing_that_the_broker_loads_of_ours_imports_pickle() -> None:
    code = (
        "import ast, sys, zfabric.runtime.broker\n"
        "for name, module in sorted(sys.modules.items()):\n"
        "    if not name.startswith('zfabric') or not getattr(module, '__file__', None):\n"
        "        continue\n"
        "    for node in ast.walk(ast.parse(open(module.__file__).read())):\n"
        "        names = [a.name for a in getattr(node, 'names', []) if isinstance(a, ast.alias)]\n"
        "        names.append(getattr(node, 'module', None) or '')\n"
        "        if any(n.split('.')[0] in ('pickle', 'cloudpickle', 'marshal') for n in names):\n"
        "            print(name, node.lineno)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == ""
