"""The errors a user may meet, each carrying the exit code of the command that meets it."""


class MedSoftError(Exception):
    """Something is wrong with the data, a file or the machine (exit code 1).

    The message is one sentence for the user: which file, key or sample; what was expected; what was found;
    what to do about it. ``ldm.core.cli.run`` prints it without a traceback.
    """

    exit_code = 1
    reason: str | None = None  # the sentence without the file's name, where it is kept apart

    def cause(self, path: object) -> str:
        """The sentence without ``path`` in front of it."""
        return self.reason or str(self).removeprefix(f"{path}: ")


class UsageError(MedSoftError):
    """The command was called in a way that cannot work: flags, configuration keys, an existing output (exit code 2)."""

    exit_code = 2
