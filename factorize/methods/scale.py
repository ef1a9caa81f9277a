"""What the sum of a token's experts is multiplied with, one number a layer.

Letters: T tokens, E experts, k of them for each token; Y the dense output of the routed neurons,
Yhat the sum of the chosen experts.
"""

import torch

from .calibration import LayerSample
from .routing import Activity


def fixed_scale(name: str, experts: int, top_k: int) -> float:
    """Before anything is chosen: 1 also for `calibrated`, which is found afterwards.

    Inverse-k is FactorLLM's (arXiv 2408.11855), whose code rounds E / k down; one is MoEfication's.
    """
    return experts / top_k if name == "inverse-k" else 1.0


def best_scale(
    sample: LayerSample, groups: torch.Tensor, activity: Activity, chosen: torch.Tensor
) -> float:
    """<Y, Yhat> / <Yhat, Yhat>: least squares over all tokens; 1 where all experts are chosen.

    `groups` [E, M] neurons, `chosen` [T, k] experts.
    """
    mask = torch.zeros_like(activity.norms).scatter(1, chosen, 1.0)
    routed = groups.flatten()
    kept = sample.neurons[:, routed] * mask.repeat_interleave(groups.shape[1], dim=1)
    found = kept @ sample.down[:, routed].T
    along, size = float((activity.output * found).sum()), float(found.square().sum())
    return along / size if along > 0 else 1.0  # what points away is no estimate at all
