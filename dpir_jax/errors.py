"""The one exception that a user is meant to read."""

import dataclasses
import typing
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Bad input from outside: a photo, a folder, a setting, a weights file.

    The message is one sentence that names the input, says what was expected and, where there is one, the way out.
    The command line prints it after ``dpir: error:`` and exits with status 2; no traceback.
    """


def check_choices(config: Any, prefix: str = "", **more: Iterable[str]) -> None:
    """Holds the `Literal` fields of a config dataclass to their values, which Python does not; `more`: those of others.

    Raises:
      InputError: it names the first field, after `prefix`, that has another value.
    """
    literals = {
        field.name: typing.get_args(field.type)
        for field in dataclasses.fields(config)
        if typing.get_origin(field.type) is typing.Literal
    }
    for name, choices in (more | literals).items():
        if getattr(config, name) not in tuple(choices):
            raise InputError(f"{prefix}{name} is {getattr(config, name)!r}; it must be one of {', '.join(choices)}")
