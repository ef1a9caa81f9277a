"""What can go wrong in the toolbox.

FactorizeError            a StartError of the engine: the command line prints it and exits with 2
├── DownloadCorrupt       what arrived is not what was asked for; worth one more try
└── SourceRefused         a model that has no exact twin with experts, or a plan for another model
"""

from moestro.engine import StartError


class FactorizeError(StartError):
    """Root of the room; the message is one line with the cause and the next step."""


class DownloadCorrupt(FactorizeError):
    pass


class SourceRefused(FactorizeError):
    pass
