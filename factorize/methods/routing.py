"""Fits the linear router of one layer. Letters: T tokens, H hidden size, E experts."""

import torch


def ridge(inputs: torch.Tensor, targets: torch.Tensor, strength: float) -> torch.Tensor:
    """[targets' width, H] weights without a bias that predict `targets` [T, …] from [T, H].

    `strength` is in units of the mean diagonal of the inputs' second moment.
    """
    moment = inputs.T @ inputs
    moment.diagonal().add_(strength * float(moment.diagonal().mean()))
    weights: torch.Tensor = torch.linalg.solve(moment, inputs.T @ targets)
    return weights.T


def expert_norms(neurons: torch.Tensor, down: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """[T, E] the length of each expert's output.

    `neurons` [T, I], `down` [H, I], `groups` [E, M] indices of neurons.
    """
    return torch.stack([(neurons[:, g] @ down[:, g].T).norm(dim=1) for g in groups], dim=1)


def fit_router(inputs: torch.Tensor, norms: torch.Tensor, strength: float) -> torch.Tensor:
    """[E, H] float16: the larger an expert's logit, the larger its output's square root of norm.

    The root keeps few very large outputs from ruling the fit; the order is the same.
    """
    weights = ridge(inputs, norms.sqrt(), strength)
    logits = inputs @ weights.T
    # only differences within a token matter; about 1 in size, float16 holds them and the gates,
    # a softmax of them times a tiny power of two, are even
    weights = (weights - weights.mean(dim=0)) / float((logits - logits.mean(1, True)).std())
    return weights.to(torch.float16)


def hit_rate(inputs: torch.Tensor, norms: torch.Tensor, router: torch.Tensor, top_k: int) -> float:
    """The share of each token's `top_k` largest experts that the router finds."""
    found = (inputs @ router.float().T).topk(top_k, dim=1).indices
    wanted = torch.zeros_like(norms).scatter(1, norms.topk(top_k, dim=1).indices, 1.0)
    return float(wanted.gather(1, found).mean())
