"""Our own modules as child processes: found wherever the user stands, with the settings of this one."""

import os
import sys

from orchestrator.local_launcher import source_roots
from orchestrator.settings import KNOWN, Settings

SECRETS = ("CADDIE_TOKEN", "CADDIE_ADMIN_TOKEN")  # orchestrators and trainers call no API: they hold no key to it


def program(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of ours: without -P, a folder named as it in the user's own would come first."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment_of(settings: Settings) -> dict[str, str]:
    """The environment that gives a child process these settings, and this process's source tree."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CADDIE_")}
    chosen = {name: getattr(settings, name.removeprefix("CADDIE_").lower()) for name in KNOWN if name not in SECRETS}
    roots = [*map(str, source_roots()), *([inherited["PYTHONPATH"]] if inherited.get("PYTHONPATH") else [])]
    path = {"PYTHONPATH": os.pathsep.join(roots)} if roots else {}
    return inherited | path | {name: str(value) for name, value in chosen.items() if value is not None}
