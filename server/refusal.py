"""The start is refused. Imports nothing, so that the command line can name it before all else."""


class Refused(Exception):
    """One line with the cause and what to change; the command line prints it and exits with 2."""
