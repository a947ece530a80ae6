"""Processes that a test may kill: forked from a server that has imported everything once."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from lightning_diag.lightning import PACKAGE

ROOT = Path(__file__).parents[2]
SERVER_START = 60.0

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")


def start(target: Callable[..., None], *args: Any) -> BaseProcess:
    """Run a function of `tests.promises.jobs` in a process of its own."""
    process = _server().Process(target=_entered, args=(target, *args))
    process.start()
    return process


def finish(processes: Sequence[BaseProcess], timeout: float) -> None:
    """Wait for processes to end well; if one hangs, kill all and fail."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hanging = [process for process in processes if process.exitcode is None]
    for process in hanging:
        kill(process)
    if hanging:
        pytest.fail(f"{len(hanging)} of {len(processes)} processes hung for {timeout:.0f} s")
    codes = [process.exitcode for process in processes]
    assert not any(codes), f"exit codes {codes}"


def kill(process: BaseProcess) -> None:
    """End a process and what it has started, at once and without a word."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join(10)


def run(target: Callable[..., None], *args: Any, timeout: float = 60) -> None:
    """Run a function in a process of its own, and wait for it."""
    finish([start(target, *args)], timeout)


def run_ranks(target: Callable[..., None], *args: Any, timeout: float = 60) -> None:
    """Run a function in two processes that know each other, as ranks 0 and 1."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    finish([start(_as_rank, rank, port, target, *args) for rank in range(2)], timeout)


def _as_rank(rank: int, port: int, target: Callable[..., None], *args: Any) -> None:
    place = {"NODE_RANK": 0, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in (place | address).items()}
    target(*args)


def _entered(target: Callable[..., None], *args: Any) -> None:
    os.setsid()
    target(*args)


@cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PACKAGE, "tests.promises.jobs"])
    # the server does not take over sys.path
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [before])])
    # and would run the main file of pytest again
    main, sys.modules["__main__"] = sys.modules["__main__"], sys.modules[__name__]
    try:
        first = context.Process(target=os.getpid)
        first.start()
        first.join(SERVER_START)
        assert first.exitcode == 0, "the server of test processes did not start"
    finally:
        sys.modules["__main__"] = main
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context
