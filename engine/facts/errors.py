"""What can go wrong in the engine.

EngineError
├── StartError            before serving; the command line prints it and exits with 2
│   ├── ModelNotFound     no such folder, or nothing in it that is a model
│   ├── ModelRefused      found, but not carried: dense, truncated, unknown mask, pickle only …
│   ├── BudgetTooSmall    the memory plan does not work out (the message has the sums)
│   └── LoadCancelled     the user stopped the start
├── RequestError          one request's fault; the server answers 400
│   ├── BadParameter      a sampling parameter out of range (`param` names it)
│   ├── PromptTooLong     prompt + max_tokens exceed the context or the KV budget
│   ├── TemplateRefused   the model's chat template does not take the messages, or there is none
│   └── GrammarRefused    no grammar, one that no text fits, or one too large
└── Unavailable           nobody's fault; the server answers 503
    ├── NotReady          still loading
    ├── QueueFull         too many requests wait
    ├── Draining          shutting down, running work finishes
    └── EngineFailed      the engine thread died; restart the server
        └── EngineLost    ended for good by what a new start may mend; so ends the process, too
            ├── PackLost    the file of the experts cannot be read any more
            └── DeviceLost  the GPU reports an error that stays, or is gone
"""

NO_SEQUENCE_EXPERTS = "this model's routers do not let a sequence have experts of its own"


class EngineError(Exception):
    """Root of the room."""


class StartError(EngineError):
    """The server cannot start; the message is one line with the cause and the next step."""


class ModelNotFound(StartError):
    pass


class ModelRefused(StartError):
    pass


class BudgetTooSmall(StartError):
    pass


class LoadCancelled(StartError):
    pass


class RequestError(EngineError):
    """Raised by `EngineWorker.submit`; `param` is the request field at fault, if one is."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BadParameter(RequestError):
    pass


class PromptTooLong(RequestError):
    @classmethod
    def for_context(cls, most_tokens: int, request: str, reduce: str = "it") -> "PromptTooLong":
        """In the words by which clients recognise a full context; `request` says what it has."""
        limit = f"This model's maximum context length is {most_tokens} tokens."
        return cls(f"{limit} However, {request}. Please reduce {reduce}.", "prompt")


class TemplateRefused(RequestError):
    """Has the template's own words, where it has raised."""


class GrammarRefused(RequestError):
    """What the answer must look like is wrong, impossible or too large; says which."""

    def __init__(self, message: str, param: str | None = "response_format") -> None:
        super().__init__(message, param)


class Unavailable(EngineError):
    """Raised by `EngineWorker.submit`, or delivered to an open stream; try again later."""


class NotReady(Unavailable):
    pass


class QueueFull(Unavailable):
    pass


class Draining(Unavailable):
    pass


class EngineFailed(Unavailable):
    """Not worth a retry on this process."""


class EngineLost(EngineFailed):
    """No step can succeed any more: whoever watches the process starts it again."""


class PackLost(EngineLost):
    """The experts' file cannot be read any more: this engine has ended, a new start rebuilds it."""


class DeviceLost(EngineLost):
    """Nothing works any more on the device that computes, until the process is another one."""
