"""Which modules of a model the library computes in one call: found, compared, trusted."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moestro.engine.kernels import Scratch
from moestro.engine.routers import CarriedRouter

from .kv import PackedCache
from .thin import ThinAttention, ThinNorm, attention_of, mlp_of, norm_of, router_of
from .thin_layer import StepMemory, ThinLayer, layer_of

log = logging.getLogger("moestro.engine")


class Thinner:
    """All replacements of one model."""

    def __init__(self, model: torch.nn.Module, cache: PackedCache | None) -> None:
        """`model` has its weights. What can be compared at once is replaced at once.

        Attention and layers, where its keys and values are in `cache`.
        """
        scratch, memory = Scratch(), StepMemory()
        self._cache = cache
        self.counts = {"norms": 0, "routers": 0, "MLPs": 0}
        self.attentions: list[ThinAttention] = []
        self.layers: list[ThinLayer] = []
        with torch.inference_mode():
            for module in list(model.modules()):
                self._replace(module, scratch)
                if cache is not None and (found := attention_of(module, cache, scratch)):
                    module.__dict__["forward"] = found
                    self.attentions.append(found)
        if cache is None:
            return
        for module in list(model.modules()):
            if (layer := layer_of(module, cache, memory, scratch)) is not None:
                module.__dict__["forward"] = layer
                self.layers.append(layer)
        cache.forgets.append(memory.forget)

    def _replace(self, module: torch.nn.Module, scratch: Scratch) -> None:
        if (norm := norm_of(module)) is not None:
            module.__dict__["forward"] = ThinNorm(module.forward, norm)
            self.counts["norms"] += 1
        elif isinstance(module, CarriedRouter):
            self.counts["routers"] += module.take_rows_alone()
        elif (router := router_of(module)) is not None:
            module.__dict__["forward"] = router
            self.counts["routers"] += 1
        elif (mlp := mlp_of(module, scratch)) is not None:
            module.__dict__["forward"] = mlp
            self.counts["MLPs"] += 1

    @contextmanager
    def compare(self) -> Iterator[None]:
        """Steps inside run both ways: one of prompts, and one of single tokens.

        Who agrees is trusted from then on, attention with each of the two apart.
        """
        assert self._cache is not None
        both: list[ThinAttention | ThinLayer] = [*self.attentions, *self.layers]
        for each in both:
            each.comparing = True
        try:
            yield
        finally:
            for each in both:
                each.comparing = False
            self._cache.attended_by_library |= {a.layer for a in self.attentions if a.trusted}
            log.info(
                "one call each: %s, attention of %d layers (prompts': %d), %d whole layers"
                " but their experts",
                ", ".join(f"{count} {name}" for name, count in self.counts.items()),
                sum(each.trusted for each in self.attentions),
                sum(each.takes_prompts for each in self.attentions),
                sum(each.trusted for each in self.layers),
            )
