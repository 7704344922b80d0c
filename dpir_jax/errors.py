"""The one exception that a user is meant to read."""


class InputError(ValueError):
    """Bad input from outside: a photo, a folder, a setting, a weights file.

    The message is one sentence that names the input, says what was expected and, where there is one, the way out.
    The command line prints it after ``dpir: error:`` and exits with status 2; no traceback.
    """
