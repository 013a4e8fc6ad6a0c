"""Python processes that start at once: a first one has imported what takes seconds, and each is a fork of it."""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from places import python_path

SECONDS = 300  # after which a process is stopped
LIBRARIES = ["torch._dynamo", "transformers.trainer", "transformers.models.qwen2.modeling_qwen2", "datasets", "peft"]
LIBRARIES += ["trl.trainer.dpo_trainer", "liger_kernel.chunked_loss", "cut_cross_entropy", "matplotlib.pyplot"]


class Forks:
    """`imports`: modules that each process finds loaded, as far as they are installed. They must start no threads."""

    def __init__(self, *imports, **environment):
        self._command = [sys.executable, __file__, *imports]
        self._env = _environment(environment)
        self._first = None

    def run(self, *arguments, cwd=None, **environment):
        """What `python ARGUMENTS` ends with: a file, or -m and a module, and what they are given. `environment`: for
        what is not imported yet."""
        if self._first is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._first = subprocess.Popen(self._command, env=self._env, **pipes)
        with tempfile.TemporaryDirectory() as folder:
            printed = [Path(folder) / name for name in ("stdout", "stderr")]
            wanted = [list(map(str, arguments)), environment, str(cwd or os.getcwd()), *map(str, printed)]
            print(json.dumps(wanted), file=self._first.stdin, flush=True)
            status = int(self._first.stdout.readline())
            return subprocess.CompletedProcess(arguments, status, *(path.read_text() for path in printed))

    def close(self):
        if self._first is not None:
            self._first.communicate()


def _environment(more):
    """Not that of a test: pytest may be what is started."""
    here = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return here | {"OMP_NUM_THREADS": "1"} | more


@functools.cache
def ready():
    """Processes with the libraries that this package works with, and without the package. Nothing is compiled."""
    found = Forks(*LIBRARIES, PYTHONPATH=python_path(), TRITON_INTERPRET="0", TORCHDYNAMO_DISABLE="1")
    atexit.register(found.close)
    return found


def python(*arguments, **options):
    return ready().run(*arguments, **options)


def python_alone(*arguments, cwd=None, **environment):
    """The same in a process that imports all that it needs, and compiles."""
    environment = _environment({"PYTHONPATH": python_path(), "TRITON_INTERPRET": "0"} | environment)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=SECONDS)


def first():
    """The process that forks. Returns in the others alone, with what they are to run."""
    for name in sys.argv[1:]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # nobody has to look through it for garbage, at the end least of all
    for line in sys.stdin:
        arguments, environment, folder, *printed = json.loads(line)
        if (process := os.fork()) == 0:
            signal.alarm(SECONDS)
            os.environ.update(environment)
            os.chdir(folder)
            for number, path in enumerate([os.devnull, *printed]):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
            return arguments
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    sys.exit()


if __name__ == "__main__":
    sys.path.pop(0)  # this folder
    arguments = first()
    try:
        if arguments[0] == "-m":
            sys.argv, sys.path[:0] = arguments[1:], [os.getcwd()]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            file = os.path.abspath(arguments[0])
            sys.argv, sys.path[:0] = arguments, [os.path.dirname(file)]
            runpy.run_path(file, run_name="__main__")
    finally:
        gc.freeze()
