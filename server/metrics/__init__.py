"""What Prometheus is told."""

from .collector import EngineCollector
from .families import ServerMetrics
from .track import Track

__all__ = ["EngineCollector", "ServerMetrics", "Track"]
