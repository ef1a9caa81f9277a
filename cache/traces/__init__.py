"""Layer events recorded and replayed under any policy and budget."""

from .replayer import LayerReplay, Replayed, belady, replay, replay_events
from .tracefile import LiveCount, TraceEvent, TraceHeader, TraceLayer, TraceReader, TraceWriter

__all__ = [
    "LayerReplay",
    "LiveCount",
    "Replayed",
    "TraceEvent",
    "TraceHeader",
    "TraceLayer",
    "TraceReader",
    "TraceWriter",
    "belady",
    "replay",
    "replay_events",
]
