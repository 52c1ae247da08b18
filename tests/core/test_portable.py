"""Nothing of ldm needs what only Unix has before it is used."""

from pathlib import Path

import children

ROOT = Path(__file__).resolve().parents[2]

CODE = """
import importlib, os, pathlib, signal, sys
names = [".".join(path.with_suffix("").parts) for path in sorted(pathlib.Path("ldm").rglob("*.py"))]
names = [name for name in names if not name.endswith(("__init__", "__main__"))]
for name in names:
    importlib.import_module(name)  # with the packages they need, which know how to do without
for name in [name for name in sys.modules if name.split(".")[0] in ("ldm", "filelock")]:
    del sys.modules[name]
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGALRM"):
    delattr(signal, name)
for name in ("sysconf", "killpg", "getuid", "sched_getaffinity", "O_CLOEXEC"):
    delattr(os, name)
for name in names:
    importlib.import_module(name)
"""


def test_every_module_can_be_imported_on_a_system_that_is_not_unix() -> None:
    found = children.run("-c", CODE, folder=ROOT)
    assert found.returncode == 0, found.stderr
