"""What a factorization will read, write, compute and hold, foretold from shapes. No tensors.

Letters: L layers, T tokens, S tokens of a window, H hidden size, I neurons of an FFN, N of them
routed, E experts.
"""

from dataclasses import dataclass

from moestro.factorize.facts import SplitOptions
from moestro.factorize.methods import (
    BATCH_TOKENS,
    CLUSTER_ROUNDS,
    CLUSTER_TOKENS,
    SAMPLED_AT_ONCE,
    SWAP_POINTS,
)

from .apply import SHARD_BYTES

FLOAT_BYTES, INDEX_BYTES, ROUTER_BYTES = 4, 8, 2
RIDGES = 5  # that repair tries


@dataclass(frozen=True, slots=True)
class DenseShape:
    layers: int
    hidden: int
    neurons: int
    vocabulary: int
    attention_weights: int  # of one layer
    key_width: int  # of a token's keys in one layer, all heads together
    source_bytes: int  # of all its files
    weight_bytes: int  # of one stored weight

    @property
    def layer_weights(self) -> int:
        return self.attention_weights + 3 * self.hidden * self.neurons


@dataclass(frozen=True, slots=True)
class Stage:
    """Of all layers together; `peak_bytes` at one time, weights and tensors, without Python."""

    name: str
    reads_bytes: int
    writes_bytes: int
    flops: float
    peak_bytes: int


def forecast(
    shape: DenseShape,
    options: SplitOptions,
    *,
    text_bytes: int,
    keeps_work: bool,
    stored_weight_bytes: int,
) -> list[Stage]:
    """The stages in their order. `text_bytes` 0: the model writes its own text."""
    making = [
        _collect(shape, options, text_bytes, keeps_work),
        _split(shape, options, keeps_work),
        _route(shape, options, keeps_work),
    ]
    if not text_bytes:
        making.insert(0, _sample(shape, options))
    return [*making, apply_stage(shape, stored_weight_bytes)]


def _sample(shape: DenseShape, options: SplitOptions) -> Stage:
    weights = shape.source_bytes // shape.weight_bytes
    rows = min(SAMPLED_AT_ONCE, max(1, options.calibration_tokens // options.window_tokens))
    keys = 2 * shape.layers * rows * options.window_tokens * shape.key_width * FLOAT_BYTES
    logits = 3 * rows * shape.vocabulary * FLOAT_BYTES
    flops = 2.0 * weights * options.calibration_tokens
    return Stage("sample", shape.source_bytes, 0, flops, weights * FLOAT_BYTES + keys + logits)


def _collect(shape: DenseShape, options: SplitOptions, text_bytes: int, keeps_work: bool) -> Stage:
    tokens, hidden = options.calibration_tokens, shape.hidden
    per_layer = 2 * tokens * shape.layer_weights + 4 * tokens * options.window_tokens * hidden
    stream_bytes = tokens * hidden * FLOAT_BYTES
    # the stream before and behind the layer; what its FFN saw and did, in parts and joined
    peak = shape.layer_weights * FLOAT_BYTES + 4 * stream_bytes + 2 * _neurons_bytes(shape, options)
    return Stage(
        "collect",
        2 * shape.source_bytes + text_bytes,  # once for its checksum
        # the stream is written again behind each layer
        2 * shape.layers * stream_bytes if keeps_work else 0,
        float(shape.layers * per_layer),
        peak,
    )


def _split(shape: DenseShape, options: SplitOptions, keeps_work: bool) -> Stage:
    tokens, hidden = options.calibration_tokens, shape.hidden
    routed = shape.neurons - options.shared_neurons
    points = {"coactivation": min(tokens, CLUSTER_TOKENS), "kmeans": hidden}.get(options.split, 0)
    flops = 2.0 * CLUSTER_ROUNDS * routed * points * options.experts
    held = tokens * shape.neurons * FLOAT_BYTES  # sizes of activations
    if options.split == "coactivation":
        flops += 2.0 * tokens * hidden * (hidden + routed) + 2.0 * points * hidden * routed
        held += tokens * routed * FLOAT_BYTES
    held += 2 * routed * points * FLOAT_BYTES
    if points and routed <= SWAP_POINTS:
        held = max(held, 2 * routed * points * FLOAT_BYTES + 3 * routed**2 * FLOAT_BYTES)
    kept = shape.layers * shape.neurons * INDEX_BYTES if keeps_work else 0
    return Stage("split", 0, kept, shape.layers * flops, _sample_bytes(shape, options) + held)


def _route(shape: DenseShape, options: SplitOptions, keeps_work: bool) -> Stage:
    tokens, hidden, experts = options.calibration_tokens, shape.hidden, options.experts
    routed = shape.neurons - options.shared_neurons
    if options.router == "none":
        return Stage("route", 0, 0, 0.0, _sample_bytes(shape, options))
    flops = 4.0 * tokens * routed * hidden  # all outputs together and each expert's own
    if options.router == "ridge":
        flops += 2.0 * tokens * hidden * (hidden + experts) + 2 / 3 * hidden**3
    else:
        flops += 6.0 * options.router_steps * BATCH_TOKENS * hidden * experts
    if options.scale == "calibrated":
        flops += 2.0 * tokens * routed * hidden
    held = tokens * (routed + 3 * hidden + 4 * experts) * FLOAT_BYTES
    per_layer = shape.neurons * INDEX_BYTES + experts * hidden * ROUTER_BYTES
    kept = shape.layers * per_layer if keeps_work else 0
    return Stage("route", 0, kept, shape.layers * flops, _sample_bytes(shape, options) + held)


def repair_stage(shape: DenseShape, tokens: int) -> Stage:
    """The layer as teacher and as student, and the sums of the fit; twice its neurons are held."""
    moments = 2 * tokens * shape.neurons * (shape.neurons + shape.hidden)
    solved = RIDGES * (2 * shape.neurons**3 // 3 + 4 * shape.neurons**2 * shape.hidden)
    flops = 4.0 * tokens * shape.layer_weights + moments + solved
    held = tokens * (shape.neurons + 4 * shape.hidden) + 4 * shape.neurons**2
    weights = shape.source_bytes // shape.weight_bytes
    return Stage("repair", 0, 0, shape.layers * flops, (held + weights) * FLOAT_BYTES)


def distill_stage(shape: DenseShape, steps: int, window_tokens: int) -> Stage:
    """Teacher forward, student forward and backward; all activations of one window are held."""
    weights = shape.source_bytes // shape.weight_bytes
    per_token = shape.layers * (6 * shape.neurons + 16 * shape.hidden) + 4 * shape.vocabulary
    held = weights + window_tokens * per_token
    return Stage("distill", 0, 0, 6.0 * weights * steps * window_tokens, held * FLOAT_BYTES)


def layers_stage(shape: DenseShape, tokens: int, tries: int, window_tokens: int) -> Stage:
    """Each layer some times anew, with all that are behind it; a stream for every layer is held."""
    weights = shape.source_bytes // shape.weight_bytes
    passes = 2 + tries * shape.layers / 2
    held = weights + tokens * (shape.layers * shape.hidden + shape.vocabulary // 4)
    held += tokens * 3 * shape.neurons + window_tokens * shape.vocabulary
    return Stage("layers", 0, 0, 2.0 * weights * tokens * passes, held * FLOAT_BYTES)


def apply_stage(shape: DenseShape, stored_weight_bytes: int) -> Stage:
    """Reads the source once for its checksum and once for its weights; nothing is computed."""
    written = shape.source_bytes * stored_weight_bytes // shape.weight_bytes
    layer = 3 * shape.layer_weights * FLOAT_BYTES
    peak = min(written, SHARD_BYTES) + layer
    return Stage("apply", 2 * shape.source_bytes, written, 0.0, peak)


def _neurons_bytes(shape: DenseShape, options: SplitOptions) -> int:
    return options.calibration_tokens * shape.neurons * FLOAT_BYTES


def _sample_bytes(shape: DenseShape, options: SplitOptions) -> int:
    """One layer's weights, the stream behind it, what its FFN saw and did."""
    stream = options.calibration_tokens * shape.hidden * FLOAT_BYTES
    return shape.layer_weights * FLOAT_BYTES + 2 * stream + _neurons_bytes(shape, options)
