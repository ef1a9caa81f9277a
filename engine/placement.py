"""Measures at the start where experts are better computed: on the device, or where they lie."""

import logging

from moestro.cache import LinkSpec
from moestro.engine.forecasts import Matrices, measure_multiply
from moestro.engine.model import HostShare
from moestro.engine.planning import Blueprint

log = logging.getLogger("moestro.engine")


def host_share(link: LinkSpec, blueprint: Blueprint) -> HostShare:
    """The split for a device behind `link` that computes as this processor does: emulated.

    Takes about half a second.
    """
    first = blueprint.experts[0]
    tensors = first.tensors.items()
    shapes = {name: (dtype, shape[1:]) for name, (dtype, shape) in tensors if len(shape) == 3}
    experts = sum(entry.num_experts for entry in blueprint.experts)
    matrices = Matrices(shapes, first.transposed, 0)
    matrices = Matrices(shapes, first.transposed, experts * matrices.numbers_each)
    compute_s = matrices.numbers_each / measure_multiply(blueprint.codec, matrices, 1)
    copy_s = link.latency_s + blueprint.spec.slot_bytes / link.bandwidth_bytes_per_s
    share = HostShare(copy_s, compute_s, compute_s)
    log.info("experts where they lie: %s; of 4 misses %d are computed there", share, share(0, 4))
    return share
