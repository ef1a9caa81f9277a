"""The plan for a GPU that is here or only planned for, as text or as one JSON object.

The object's keys, all sizes in bytes, all rates in tokens or bytes per second:

    model    as of a plan for the CPU (cpu.py)
    memory   device_dense, device_workspace, device_experts, device_kv, device_packing, and the
             host's: host_interpreter, host_workspace, host_experts, host_packing, host_dense (each
             with _bytes); total_bytes, limit_bytes and limit of the card, host_total_bytes,
             host_limit_bytes, host_limit; kv_tokens, max_model_len_tokens, max_step_tokens,
             max_step_reason
    experts  slots (of the card), host_slots, total, resident_share (on the card), host_share
    link     bytes_per_s, source
    disk     bytes_per_s, source; null where the host holds every expert
    decode, prefill
             tokens (of one step), low and high: each with hit_rate (on the card), link_bytes,
             link_s, disk_bytes, disk_s, tokens_per_s (a bound; null where nothing has to come),
             limit ("link", "disk" or "none")
    formats  list of the others: expert_format, resident_share (null where it cannot be), why
    measured_on_a_gpu
             false: no figure of this plan was
"""

from typing import Any

from moestro.engine import CardBound, CardForecast, CardOutlook
from moestro.server.facts import size_words

from .words import between, model_lines, model_object, rate_words, time_words

NOT_MEASURED = (
    "These are bounds of link and disk, not promises; how fast the card computes is not foretold:"
    " not measured on a GPU."
)


def card_object(forecast: CardForecast) -> dict[str, Any]:
    """The object that the head of this file describes."""
    plan, work, links = forecast.plan, forecast.work, forecast.links
    host = plan.host
    assert host is not None
    disk = {"bytes_per_s": links.disk_bytes_per_s, "source": links.disk_source}
    return {
        "model": model_object(forecast),
        "memory": {f"{name}_bytes": count for name, count in plan.parts().items()}
        | {
            "total_bytes": plan.total_bytes,
            "limit_bytes": plan.limit_bytes,
            "limit": plan.limit_name,
            "host_total_bytes": host.total_bytes,
            "host_limit_bytes": host.limit_bytes,
            "host_limit": host.limit_name,
            "kv_tokens": plan.kv_tokens,
            "max_model_len_tokens": plan.longest_tokens,
            "max_step_tokens": plan.demand.step_tokens,
            "max_step_reason": plan.step_reason,
        },
        "experts": {
            "slots": forecast.slots,
            "host_slots": forecast.host_slots,
            "total": work.total_experts,
            "resident_share": forecast.resident_share,
            "host_share": forecast.host_slots / work.total_experts,
        },
        "link": {"bytes_per_s": links.into_card_bytes_per_s, "source": links.into_card_source},
        "disk": None if forecast.host_holds_all else disk,
        "decode": _outlook_object(forecast.decode),
        "prefill": _outlook_object(forecast.prefill),
        "formats": [
            {"expert_format": one.expert_format, "resident_share": one.share, "why": one.why}
            for one in forecast.formats
        ],
        "measured_on_a_gpu": False,
    }


def _outlook_object(outlook: CardOutlook) -> dict[str, Any]:
    ends = {"low": _bound_object(outlook.low), "high": _bound_object(outlook.high)}
    return {"tokens": outlook.low.tokens, **ends}


def _bound_object(bound: CardBound) -> dict[str, Any]:
    return {
        "hit_rate": bound.hit_rate,
        "link_bytes": bound.link_bytes,
        "link_s": bound.link_s,
        "disk_bytes": bound.disk_bytes,
        "disk_s": bound.disk_s,
        "tokens_per_s": bound.tokens_per_s,
        "limit": bound.limit,
    }


def card_lines(forecast: CardForecast) -> list[str]:
    """The text for people."""
    links, total = forecast.links, forecast.work.total_experts
    found = [
        *model_lines(forecast),
        forecast.lane.line,
        *forecast.plan.lines(),
        "",
        f"on the card {forecast.slots} of {total} experts ({100 * forecast.resident_share:.0f} %)",
        f"on the host {forecast.host_slots} of {total} ({100 * forecast.host_slots / total:.0f} %),"
        " in pinned memory",
        f"link        {links.into_card_bytes_per_s / 1e9:.3g} GB/s ({links.into_card_source})",
    ]
    if not forecast.host_holds_all:
        found.append(f"disk        {rate_words(links.disk_bytes_per_s)} ({links.disk_source})")
    return [
        *found,
        *_outlook_lines("decode", forecast.decode),
        *_outlook_lines("prefill", forecast.prefill),
        NOT_MEASURED,
        "",
        *_format_lines(forecast),
    ]


def _outlook_lines(name: str, outlook: CardOutlook) -> list[str]:
    low, high = outlook.low, outlook.high
    rates = between(f"{100 * low.hit_rate:.0f}", f"{100 * high.hit_rate:.0f}")
    unit = "token" if low.tokens == 1 else f"{low.tokens} tokens"
    if low.tokens_per_s is None:
        return [f"{name:<11} not limited by link or disk: every expert is on the card"]
    most = "no bound" if high.tokens_per_s is None else f"{high.tokens_per_s:.3g}"
    speed = between(f"{low.tokens_per_s:.3g}", most)
    limit = low.limit if high.limit in (low.limit, "none") else f"{low.limit} or {high.limit}"
    link = between(size_words(high.link_bytes), size_words(low.link_bytes))
    link_time = between(time_words(high.link_s), time_words(low.link_s))
    found = [
        f"{name:<11} at most {speed} tokens/s, limited by {limit}",
        f"            per {unit}: {link} over the link in {link_time}",
    ]
    if low.disk_bytes:
        disk = between(size_words(high.disk_bytes), size_words(low.disk_bytes))
        disk_time = between(time_words(high.disk_s), time_words(low.disk_s))
        found.append(f"            of these {disk} from disk in {disk_time}")
    routing = "if every expert is equally likely (skewed routing finds more)"
    return [*found, f"            {rates} % hits on the card {routing}"]


def _format_lines(forecast: CardForecast) -> list[str]:
    own = f"{100 * forecast.resident_share:.0f} %"
    return [
        f"--expert-format {one.expert_format}: "
        + (
            f"{100 * one.share:.0f} % instead of {own} in the card's slots"
            if one.share is not None
            else one.why
        )
        for one in forecast.formats
    ]
