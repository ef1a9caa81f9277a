"""The start is refused. Imports nothing, so that the command line can name it before all else."""


def refusal_line(message: str) -> str:
    """What the terminal shows: one line, whatever the message was made of."""
    return "moestro: " + " ".join(message.split())


class Refused(Exception):
    """One line with the cause and what to change; the command line prints it and exits with 2."""
