"""Choices that do not go together, refused by name before anything else is looked at."""

from moestro.engine.facts import Device, EngineConfig, StartError
from moestro.engine.formats import AUTO, FORMATS, MIXED
from moestro.engine.weights import DENSE_FORMATS


def check_choices(config: EngineConfig) -> None:
    named = config.expert_format in (AUTO, *FORMATS)
    if not named and not config.expert_format.startswith(MIXED):
        raise StartError(
            f"--expert-format {config.expert_format}: this build has {', '.join(FORMATS)}, {AUTO}"
            f" and {MIXED}FILE"
        )
    if config.dense_format not in DENSE_FORMATS:
        raise StartError(
            f"--dense-format {config.dense_format}: this build has {', '.join(DENSE_FORMATS)}"
        )


def check_device(config: EngineConfig, device: Device) -> None:
    """Choices that hang on the device. Raises StartError."""
    if device.room is None and config.link is None and config.device_memory_bytes is not None:
        raise StartError(
            f"--device-memory: {device.why}, which has no memory of its own to hold experts"
        )
