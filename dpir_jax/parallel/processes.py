"""Several processes that train one model: start, agree, and end with a sentence when one of them is gone.

JAX's distributed runtime does the work: its coordinator (process 0) watches the heartbeats of all, its collectives
carry the data, its preemption service makes all processes stop at the same step.
"""

import contextlib
import ctypes
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpir_jax.errors import InputError

AUTO = "auto"
START_SECONDS = 300  # how long the processes wait for each other
HEARTBEAT_SECONDS = 30  # a machine that is silent for this long is gone; a process that dies is noticed at once
# Failures of a process's own: no lost connection has these codes. Those that it has differ from backend to backend.
OWN_FAULTS = (
    *("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "OUT_OF_RANGE", "PERMISSION_DENIED"),
    *("NOT_FOUND", "ALREADY_EXISTS"),
)

_handlers = []  # what `_instead_of_abort` installed must outlive it


def start(where: str = AUTO) -> None:
    """Joins the other processes. Before anything asks JAX for its devices.

    Args:
      where: "auto" where JAX finds the others by itself (TPU pods, Slurm, Open MPI, Kubernetes), else
        "HOST:PORT/INDEX/COUNT": the coordinator's address, which process this is, and how many there are.

    Raises:
      InputError: not such a place, its port is in use, or there is no coordinator. When another process does not come,
        this one ends with a sentence and status 2, as it does when one is gone later.
    """
    options: dict[str, str | int] = {}
    if where != AUTO:
        address, *numbers = where.split("/")
        try:
            index, count = map(int, numbers)
        except ValueError:
            index, count = 0, 0
        port = re.fullmatch(r".+:(\d{1,5})", address)
        if not port or not 1 <= int(port[1]) <= 65535 or not 0 <= index < count:
            raise InputError(
                f"--distributed is {where!r}; it must be 'auto' or HOST:PORT/INDEX/COUNT with PORT from 1 to 65535 and "
                "INDEX from 0 to COUNT - 1"
            )
        options = {"coordinator_address": address, "process_id": index, "num_processes": count}
        if index:
            _wait_for_coordinator(address, where)
        else:
            _check_port(int(port[1]), where)
    _instead_of_abort(
        f"--distributed {where}: the processes did not find each other within {START_SECONDS} s; start all of them, "
        "with the same address and COUNT and every INDEX once"
    )
    timeouts = {"initialization_timeout": START_SECONDS, "heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    try:
        jax.distributed.initialize(**timeouts, **options)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--distributed {where}: the processes did not find each other: {reason}") from error
    _instead_of_abort(
        "JAX ended this process, as it does when another one is gone (its reason is above); "
        "start all processes again to go on from the newest checkpoint"
    )


def _check_port(port: int, where: str) -> None:
    """`InputError` if the coordinator cannot listen at this port: JAX would die of it without a word.

    Coordinators of two runs could share a port (JAX asks for SO_REUSEPORT), and processes would find the one or the
    other: that is refused, too.
    """
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what a run that has ended left does not count
        try:
            probe.bind(("", port))
        except OSError as error:
            raise InputError(
                f"--distributed {where}: port {port} cannot be used on this machine ({error.strerror}); choose another "
                "one, the same for all processes"
            ) from error


def _wait_for_coordinator(address: str, where: str) -> None:
    """Returns when something answers at the coordinator's address."""
    host, port = address.rsplit(":", 1)
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"--distributed {where}: nothing answered at {address} within {START_SECONDS} s ({error}); "
                    "start process 0 on that machine, or correct the address"
                ) from error
        time.sleep(1)


def _instead_of_abort(sentence: str) -> None:
    """Lets this process end with a sentence where JAX aborts it from C++: when the coordinator is gone or says that
    another process is. Python's own signal handlers run later than that, and JAX passes no callback from Python on.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def end(_: int) -> None:
        os.write(2, f"dpir: error: {sentence}\n".encode())
        _kill_workers()
        os._exit(2)

    _handlers.append(end)
    ctypes.CDLL(None).signal(signal.SIGABRT, end)


def is_first() -> bool:
    """Whether this process writes what is written once: logs, pictures, the recipe."""
    return jax.process_index() == 0


def agree(value: bool) -> bool:
    """What the first process says; every process has to ask at the same place."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(value)))


def stop_asked(step: int) -> str | None:
    """The signal's name when SIGTERM has reached any process and this is the step at which all stop, else None.

    Every process has to ask after every step.
    """
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
        return signal.SIGTERM.name
    return None


def leave(status: int) -> NoReturn:
    """Ends this process at once: an orderly end would wait for the others, and they are waiting for this one."""
    _kill_workers()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def _kill_workers() -> None:
    for worker in multiprocessing.active_children():
        worker.kill()


@contextlib.contextmanager
def watch_others() -> Iterator[None]:
    """Turns an error of JAX's runtime into `InputError`: another process is gone.

    Those of `OWN_FAULTS` stay as they are, and so do errors of other kinds; with one process it does nothing.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if jax.process_count() == 1 or any(code in reason for code in OWN_FAULTS):
            raise
        raise InputError(
            f"process {jax.process_index()} of {jax.process_count()} lost the connection to another one ({reason}); "
            "start all processes again to go on from the newest checkpoint"
        ) from error
