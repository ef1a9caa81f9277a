"""Plans and forecasts in words, for people at a terminal."""

from collections.abc import Sequence
from pathlib import Path

from moestro.factorize.facts import Deltas, Plan, SplitOptions
from moestro.factorize.recovery import RecoverOptions
from moestro.factorize.sources import DenseModel

from .forecast import Stage


def summary(plan: Plan, dense: DenseModel, out: Path, deltas: Deltas | None = None) -> str:
    """Of a model that was just written to `out`."""
    options = plan.facts.options
    each = (dense.neurons - options.shared_neurons) / options.experts
    share = (options.shared_neurons + options.mean_top_k * each) / dense.neurons
    size_bytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    experts = f"{options.experts} experts of {_widths(options, dense.neurons)}"
    lines = [
        f"{out}: {dense.layers} layers, each {options.shared_neurons} neurons always on and "
        f"{experts}, {_counts(options)} {_chosen_for(options)} "
        f"({share:.1%} of the FFN), {size_bytes / 1e6:.0f} MB",
        f"plan {plan.sha256[:16]}: {plan.facts.method}",
    ]
    lines += router_lines(options)
    if options.router == "none":
        lines.append(
            "no router: a prompt runs all experts, and its shares choose those of its answer"
        )
    elif deltas is None:
        lines.append(
            f"the routers find {plan.facts.router_hit:.1%} of the {options.top_k} experts that "
            "matter most to a calibration token"
        )
    else:
        lines.append(
            f"deltas {deltas.sha256[:16]}: {deltas.facts.method}; with all experts it is not the "
            "dense model any more"
        )
    if options.scale != "one":
        lines.append(f"{_scales(plan)}; with all experts it is not the dense model any more")
    return "\n".join(lines)


def seconds_of(plan_s: float, apply_s: float) -> str:
    return f"the plan was ready after {plan_s:.1f} s and applied in {apply_s:.1f} s"


def plan_screen(path: Path, plan: Plan) -> str:
    """Everything that a plan says about itself."""
    facts, options = plan.facts, plan.facts.options
    layers, neurons = plan.order.shape
    routers = plan.router_weights
    kind = "".join(f", {more}" for more in routers.beyond_stock()) or ", as stock checkpoints have"
    running = f", of which those run that {_threshold(options)}" if options.tau < 1 else ""
    trained = {"ridge": "solved", "none": "the prompt chooses"}.get(
        options.router, f"{options.router_steps} steps of Adam"
    )
    rows = {
        "plan": f"{path}, format {plan.format}, sha256 {plan.sha256}",
        "source": f"{facts.source}, weights {facts.source_sha256[:16]}",
        "shape": f"{layers} layers, each {options.shared_neurons} of {neurons} neurons always on "
        f"and {options.experts} experts of {_widths(options, neurons)}; "
        f"{_counts(options)} experts {_chosen_for(options)}{running}",
        "text": f"up to {options.calibration_tokens} tokens in windows of {options.window_tokens}, "
        f"ids {facts.texts_sha256[:16]}",
        "split": f"{options.split}, seed {options.seed}",
        "router": f"{options.router} ({trained}); matrices {tuple(routers.last.shape[1:])}{kind}",
        "router hit": f"{facts.router_hit:.1%} of the experts that matter most, on the text itself",
        "written as": _written_as(plan),
        "scale": _scales(plan),
        "method": facts.method,
        "command": facts.command or "not noted",
    }
    return "\n".join(f"{name:<11} {value}" for name, value in rows.items())


def _widths(options: SplitOptions, neurons: int) -> str:
    sizes, places = options.expert_sizes(neurons), options.expert_neurons(neurons)
    words = " or ".join(str(size) for size in sorted({*sizes}, reverse=True))
    return words if {*sizes} == {places} else f"{words} (stored as {places})"


def _counts(options: SplitOptions) -> str:
    if not options.layers:
        return str(options.top_k)
    return f"{min(options.layers)} to {max(options.layers)} ({options.mean_top_k:.4g} on average)"


def _written_as(plan: Plan) -> str:
    if plan.needs_router_file:
        return "weights and a file of routers, for moestro alone"
    if plan.facts.options.layer_top_k:
        return f"weights for moestro alone; experts per token: {plan.facts.options.layer_top_k}"
    return "a stock checkpoint"


def _chosen_for(options: SplitOptions) -> str:
    return "per answer, chosen by its prompt" if options.router == "none" else "per token"


def _threshold(options: SplitOptions) -> str:
    return f"are foretold at least {1 - options.tau:g} of the largest (tau {options.tau:g})"


def router_lines(options: SplitOptions) -> list[str]:
    """One where the routers are more than a stock checkpoint carries."""
    parts = [f"a first layer of {options.router_hidden} neurons"] if options.router_hidden else []
    parts += ["a bias"] if options.router_bias else []
    parts += [f"experts that {_threshold(options)}"] if options.tau < 1 else []
    words = ", ".join(parts)
    return (
        [f"routers: {words}: with a file of routers, which moestro alone serves"] if parts else []
    )


def _scales(plan: Plan) -> str:
    low, high = float(plan.scales.min()), float(plan.scales.max())
    span = f"{low:.3f}" if low == high else f"{low:.3f} to {high:.3f}"
    return f"{plan.facts.options.scale}: the sum of a token's experts is multiplied with {span}"


def forecast_table(
    source: str,
    out: Path,
    stages: Sequence[Stage],
    options: SplitOptions | None,
    work: Path | None,
    recovery: RecoverOptions | None = None,
) -> str:
    """A line for each stage. `options` None: a plan is there, and no other is made."""
    lines = [f"{source} -> {out}: a dry run, nothing is written"]
    lines += [f"{'stage':<8} {'reads':>9} {'writes':>9} {'TFLOP':>8} {'peak memory':>12}"]
    lines += [
        f"{stage.name:<8} {_size(stage.reads_bytes):>9} {_size(stage.writes_bytes):>9} "
        f"{stage.flops / 1e12:>8.2f} {_size(stage.peak_bytes):>12}"
        for stage in stages
    ]
    if options is not None:
        lines.append(
            f"text: {options.calibration_tokens} tokens through every layer; split "
            f"{options.split}, router {options.router}, scale {options.scale}"
        )
        lines.append(
            f"what {work} has of the same weights and text is not computed again"
            if work is not None
            else "what the model does is kept in memory, a layer at a time; --work DIR keeps it"
        )
    if recovery is not None and "lora" in recovery.stages and recovery.steps is None:
        lines.append(
            f"distillation ends after {recovery.minutes:g} minutes; how many steps these are, and "
            "their work, the machine decides"
        )
    lines.append(
        "peak memory: weights and tensors; Python and its libraries take some 0.5 GB more, and "
        "what is mapped of the source's files comes and goes with the free memory"
    )
    return "\n".join(lines)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"
