"""Sizes, times and shares in words, and what every plan begins with."""

from typing import Any

from moestro.engine import CardForecast, Forecast
from moestro.server.facts import size_words

ROUTING = {
    "uniform": "if every expert is equally likely (skewed routing finds more)",
    "trace": "in the trace: as the cache decides, and with perfect foresight",
}


def between(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def time_words(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def rate_words(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e6:.0f} MB/s"


def model_lines(forecast: Forecast | CardForecast) -> list[str]:
    work = forecast.work
    layer, chosen = work.layers[0], [each.experts_per_token for each in work.layers]
    found = [
        f"{forecast.family}: {len(work.layers)} layers of {layer.num_experts} experts of"
        f" {size_words(forecast.slot_bytes)} ({forecast.expert_format}),"
        f" {between(str(min(chosen)), str(max(chosen)))} per token"
    ]
    if not forecast.has_weights:
        found.append(
            f"the weights are not here: shapes are those of config.json, stored as"
            f" {forecast.stored_dtype}"
        )
    if forecast.format_reason is not None:
        found.append(forecast.format_reason)
    if forecast.quantized is not None:
        found.append(forecast.quantized)
    return found


def _whole(mean: float) -> float:
    """A whole number where it is one."""
    return int(mean) if mean.is_integer() else mean


def model_object(forecast: Forecast | CardForecast) -> dict[str, Any]:
    """What cpu.py describes under `model`."""
    work = forecast.work
    layer = work.layers[0]
    return {
        "family": forecast.family,
        "layers": len(work.layers),
        "experts_per_layer": layer.num_experts,
        "experts_per_token": _whole(work.mean_experts_per_token),
        "expert_bytes": forecast.slot_bytes,
        "expert_format": forecast.expert_format,
        "expert_format_reason": forecast.format_reason,
        "dense_format": forecast.dense_format,
        "stored_dtype": forecast.stored_dtype,
        "quantized": forecast.quantized,
        "weights": "files" if forecast.has_weights else "absent",
        "lane": forecast.lane.lane.value,
        "lane_reason": forecast.lane.reason,
    }
