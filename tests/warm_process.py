"""Fresh processes that have the libraries below loaded already, which takes a process of its own five seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

SERVER = """
import json, os, sys
import datasets, matplotlib.pyplot, pandas, transformer_lens, wandb
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
# From here on as any other process, to its end: its own streams, arguments and environment, and nothing of the package.
for number, path in enumerate((os.devnull, asked["stdout"], asked["stderr"])):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
sys.argv = ["-c", *asked["arguments"]]
os.environ.clear()
os.environ.update(asked["environment"])
exec(compile(asked["code"], "<string>", "exec"), {"__name__": "__main__"})
"""


class Ended(NamedTuple):
    """How a process ended and what it said."""

    status: int
    stdout: str
    stderr: str


class WarmProcess:
    """`run(code, *arguments)` is `python -c code *arguments` in a process of its own, forked from one that is warm."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, code: str, *arguments: str, environment: dict[str, str] | None = None) -> Ended:
        assert self._server.stdin is not None and self._server.stdout is not None
        streams = {name: self._folder / name for name in ("stdout", "stderr")}
        for path in streams.values():
            path.write_text("")
        asked = {"code": code, "arguments": arguments, "environment": {**os.environ, **(environment or {})}}
        asked |= {name: str(path) for name, path in streams.items()}
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        return Ended(status, *(path.read_text() for path in streams.values()))

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
