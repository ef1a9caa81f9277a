"""The plan for this machine's CPU, as text or as one JSON object.

The object's keys, all sizes in bytes, all rates in tokens or bytes per second:

    model    family, layers, experts_per_layer, experts_per_token (the mean where layers differ),
             expert_bytes (one, as kept),
             expert_format (settled), expert_format_reason (of auto, a sentence; null for a named
             one), dense_format, stored_dtype, weights ("files", or "absent": the shapes
             are those of config.json), quantized (what becomes of the experts of a quantized
             checkpoint, a sentence; null for another)
    memory   interpreter, dense, workspace, experts, kv, packing (each with _bytes; what only the
             first start takes beyond the others), their total_bytes, limit_bytes, limit, kv_tokens,
             max_model_len_tokens, max_step_tokens (which the workspace is for), max_step_reason
    experts  slots, total, slots_per_layer (average), resident_share
    link     scattered_bytes_per_s (one expert a read, decode), ordered_bytes_per_s (neighbours
             together, prefill), source
    compute  threads, products (the instruction set that they use, or "torch": no library here)
    decode, prefill
             tokens (of one step), routing ("uniform" or "trace"), low and high: each with
             hit_rate, link_bytes (read in one step), link_s, compute_s, tokens_per_s (a bound),
             limit ("disk" or "compute")
    formats  null where nothing is native or torch computes; else token_bytes (weights that one
             token is multiplied with), and smaller: a list of others that read less, each with
             expert_format, dense_format, token_bytes, ratio, demo_perplexity (the demo model's,
             over its own in native)
    changes  list of flags ("" where none helps) and effect
"""

from typing import Any

from moestro.engine import DEMO_PERPLEXITY, Bound, Forecast, Gains, Outlook, changes
from moestro.server.facts import size_words

from .words import ROUTING, between, model_lines, model_object, rate_words, time_words


def cpu_object(forecast: Forecast) -> dict[str, Any]:
    """The object that the head of this file describes."""
    plan, work = forecast.plan, forecast.work
    return {
        "model": model_object(forecast),
        "memory": {f"{name}_bytes": count for name, count in plan.parts().items()}
        | {
            "total_bytes": plan.total_bytes,
            "limit_bytes": plan.limit_bytes,
            "limit": plan.limit_name,
            "kv_tokens": plan.kv_tokens,
            "max_model_len_tokens": forecast.context_tokens,
            "max_step_tokens": plan.demand.step_tokens,
            "max_step_reason": plan.step_reason,
        },
        "experts": {
            "slots": forecast.slots,
            "total": work.total_experts,
            "slots_per_layer": forecast.slots / len(work.layers),
            "resident_share": forecast.resident_share,
        },
        "link": {
            "scattered_bytes_per_s": forecast.link.scattered_bytes_per_s,
            "ordered_bytes_per_s": forecast.link.ordered_bytes_per_s,
            "source": forecast.link.source,
        },
        "compute": {
            "threads": forecast.compute.threads,
            "products": forecast.compute.products,
        },
        "decode": _outlook_object(forecast.decode, forecast.decode_routing),
        "prefill": _outlook_object(forecast.prefill, forecast.prefill_routing),
        "formats": _gains_object(forecast.gains),
        "changes": [{"flags": one.flags, "effect": one.effect} for one in changes(forecast)],
    }


def _gains_object(gains: Gains | None) -> dict[str, Any] | None:
    if gains is None:
        return None
    smaller = [
        {
            "expert_format": one.expert_format,
            "dense_format": one.dense_format,
            "token_bytes": one.token_bytes,
            "ratio": gains.ratio(one),
            "demo_perplexity": DEMO_PERPLEXITY[one.formats],
        }
        for one in gains.smaller
    ]
    return {"token_bytes": gains.now.token_bytes, "smaller": smaller}


def _outlook_object(outlook: Outlook, routing: str) -> dict[str, Any]:
    ends = {"low": _bound_object(outlook.low), "high": _bound_object(outlook.high)}
    return {"tokens": outlook.low.tokens, "routing": routing, **ends}


def _bound_object(bound: Bound) -> dict[str, Any]:
    return {
        "hit_rate": bound.hit_rate,
        "link_bytes": bound.link_bytes,
        "link_s": bound.link_s,
        "compute_s": bound.compute_s,
        "tokens_per_s": bound.tokens_per_s,
        "limit": bound.limit,
    }


def cpu_lines(forecast: Forecast) -> list[str]:
    """The text for people."""
    return [
        *model_lines(forecast),
        forecast.lane.line,
        *forecast.plan.lines(),
        *([forecast.gains.line()] if forecast.gains else []),
        "",
        *_speed_lines(forecast),
        "",
        *_change_lines(forecast),
    ]


def _speed_lines(forecast: Forecast) -> list[str]:
    work, link = forecast.work, forecast.link
    per_layer = forecast.slots / len(work.layers)
    found = [
        f"in RAM      {forecast.slots} of {work.total_experts} experts"
        f" ({100 * forecast.resident_share:.1f} %), {per_layer:.1f} of"
        f" {work.layers[0].num_experts} per layer on average",
    ]
    if not forecast.holds_all:
        found.append(
            f"disk        {rate_words(link.scattered_bytes_per_s)} expert by expert,"
            f" {rate_words(link.ordered_bytes_per_s)} in order ({link.source})"
        )
    return [
        *found,
        f"products    {forecast.compute.products}",
        *_outlook_lines("decode", forecast.decode, forecast.decode_routing),
        *_outlook_lines("prefill", forecast.prefill, forecast.prefill_routing),
        f"These are bounds, not promises: what the disk and {forecast.compute.threads} thread(s)"
        " allow when nothing",
        "else takes time (no attention over long contexts, no fixed cost per layer).",
    ]


def _outlook_lines(name: str, outlook: Outlook, routing: str) -> list[str]:
    low, high = outlook.low, outlook.high
    speed = between(f"{low.tokens_per_s:.3g}", f"{high.tokens_per_s:.3g}")
    limit = low.limit if low.limit == high.limit else f"{low.limit} or {high.limit}"
    rates = between(f"{100 * low.hit_rate:.0f}", f"{100 * high.hit_rate:.0f}")
    sizes = between(size_words(high.link_bytes), size_words(low.link_bytes))
    times = between(time_words(high.link_s), time_words(low.link_s))
    unit = "token" if low.tokens == 1 else f"{low.tokens} tokens"
    return [
        f"{name:<11} at most {speed} tokens/s, limited by {limit}",
        f"            per {unit}: {sizes} read in {times}, computed in {time_words(low.compute_s)}",
        f"            {rates} % hits {ROUTING[routing]}",
    ]


def _change_lines(forecast: Forecast) -> list[str]:
    found = changes(forecast)
    if not found:
        return ["all experts and the whole context fit: more memory changes nothing"]
    return ["what would change it"] + [
        f"  {one.flags + ': ' if one.flags else ''}{one.effect}" for one in found
    ]
