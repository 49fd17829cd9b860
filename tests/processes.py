"""Functions of the tests in processes of their own, without importing torch once for each.

They are forks of a server that has imported what is needed and done nothing else, so that they
begin like a new interpreter and share nothing with the tests or with each other.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

#: Seconds after which a process is taken to hang.
PATIENCE = 120

_forks = "forkserver" in multiprocessing.get_all_start_methods()
_context: Any = multiprocessing.get_context("forkserver" if _forks else "spawn")


def start(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A process that calls a function of a module; its exit code is 0 if it returns."""
    if _forks:
        _context.set_forkserver_preload(["cg_optim", "tests.models"])
    process: BaseProcess = _context.Process(target=function, args=arguments)
    process.start()
    return process


def finish(*processes: BaseProcess) -> None:
    """Wait for processes that must end well."""
    for process in processes:
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0] * len(processes)


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own."""
    here, there = _context.Pipe(duplex=False)
    process = start(_send, there, function, arguments)
    there.close()
    try:
        result = here.recv() if here.poll(PATIENCE) else None
    except EOFError:  # it ended without sending anything
        result = None
    finish(process)
    return result


def _send(there: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    there.send(function(*arguments))
