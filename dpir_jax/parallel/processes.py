"""Several processes that train one model: start, agree, and end with a sentence when one of them is gone.

JAX's distributed runtime does the work: its coordinator (process 0) watches the heartbeats of all, its collectives
carry the data, its preemption service makes all processes stop at the same step.
"""

import contextlib
import signal
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpir_jax.errors import InputError

AUTO = "auto"
HEARTBEAT_SECONDS = 30  # a machine that is silent for this long is gone; a process that dies is noticed at once

# Failures of a computation that no lost connection explains.
OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "OUT_OF_RANGE", "PERMISSION_DENIED")


class LostProcess(InputError):
    """Another process of the run is gone, so this one cannot go on, nor wait for the others at its end."""


def start(where: str = AUTO) -> None:
    """Joins the other processes. Before anything asks JAX for its devices.

    Args:
      where: "auto" where JAX finds the others by itself (TPU pods, Slurm, Open MPI, Kubernetes), else
        "HOST:PORT/INDEX/COUNT": the coordinator's address, which process this is, and how many there are.

    Raises:
      InputError: not such a place, or the others did not come.
    """
    options: dict[str, str | int] = {}
    if where != AUTO:
        address, *numbers = where.split("/")
        try:
            index, count = map(int, numbers)
        except ValueError:
            index, count = 0, 0
        if ":" not in address or not 0 <= index < count:
            raise InputError(
                f"--distributed is {where!r}; it must be 'auto' or HOST:PORT/INDEX/COUNT with INDEX from 0 to COUNT - 1"
            )
        options = {"coordinator_address": address, "process_id": index, "num_processes": count}
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS, **options)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--distributed {where}: the processes did not find each other: {reason}") from error


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


@contextlib.contextmanager
def watch_others() -> Iterator[None]:
    """Turns the failure of a collective into `LostProcess`, no other failure; with one process it does nothing."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if jax.process_count() == 1 or any(code in reason for code in OWN_FAULTS):
            raise
        raise LostProcess(
            f"process {jax.process_index()} of {jax.process_count()} lost the connection to another one ({reason}); "
            "start all processes again to go on from the newest checkpoint"
        ) from error
