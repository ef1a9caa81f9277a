"""A model understood and its memory planned, before anything is loaded."""

import logging
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from moestro.cache import (
    PackSpec,
)
from moestro.engine.facts import (
    CPU,
    Device,
    EngineConfig,
    Lane,
    ModelRefused,
    StartError,
)
from moestro.engine.formats import (
    Codec,
    ExpertsModule,
    expert_codec,
    in_tiles,
    is_experts_module,
    order_of,
    pack_layer,
)
from moestro.engine.lanes import choose_lane
from moestro.engine.model import Topology, build_meta_model
from moestro.engine.weights import (
    Checkpoint,
    DenseFile,
    Manifest,
    Replacement,
    RouterFacts,
    kept_on_host,
    replacements,
)

log = logging.getLogger("moestro.engine")


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A model understood but not loaded."""

    checkpoint: Checkpoint
    topology: Topology
    experts: tuple[ExpertsModule, ...]  # in the order of a pass
    dense_keys: list[str]
    manifest: Manifest | None
    experts_per_token: int
    output_scale: float
    codec: Codec
    device: Device

    @property
    def family(self) -> str:
        """As transformers calls its type."""
        return str(self.checkpoint.config.model_type)

    @property
    def vocab_size(self) -> int:
        return int(self.checkpoint.config.get_text_config().vocab_size)

    @property
    def num_layers(self) -> int:
        return int(self.checkpoint.config.get_text_config().num_hidden_layers)

    @property
    def itemsize(self) -> int:
        """Bytes of a number that is computed with."""
        return self.device.compute_dtype.itemsize

    def build_model(self) -> PreTrainedModel:
        """Without weights, for its lane."""
        return _build(self.checkpoint, self.device, self.topology)

    @property
    def spec(self) -> PackSpec:
        """The pack that this model needs."""
        layers = tuple(pack_layer(self.codec, entry) for entry in self.experts)
        order = order_of(self.codec)
        return PackSpec(self.checkpoint.fingerprint(), self.codec.name, layers, order)


def inspect(config: EngineConfig, device: Device = CPU) -> Blueprint:
    """Understand the model without loading it. Raises ModelNotFound or ModelRefused."""
    return understand(config, Checkpoint(config.model_path), device)


def understand(config: EngineConfig, checkpoint: Checkpoint, device: Device = CPU) -> Blueprint:
    """The same from files that are already open, or from a sketch of them."""
    manifest, experts_per_token, scale, topology = _by_config(config, checkpoint, device)
    model = _build(checkpoint, device, topology)
    modules, dense_keys = checkpoint.split_keys(model)
    by_path = {entry.path: entry for entry in modules}
    for path in topology.experts_paths:
        if path not in by_path:
            raise ModelRefused(f"{checkpoint.folder}: the files hold no weights for {path}")
    experts = tuple(by_path[path] for path in topology.experts_paths)
    dtype, kind = device.compute_dtype, device.place.type
    codec = expert_codec(config.expert_format, experts, dtype, kind)
    return Blueprint(
        checkpoint, topology, experts, dense_keys, manifest, experts_per_token, scale, codec, device
    )


def check_config(config: EngineConfig, checkpoint: Checkpoint) -> None:
    """Raises StartError where the config and the flags alone say that a start will be refused.

    Among these: dense models, types and quantizations that are not carried. Looks at no weights.
    """
    _by_config(config, checkpoint, CPU)


def _by_config(
    config: EngineConfig, checkpoint: Checkpoint, device: Device
) -> tuple[Manifest | None, int, float, Topology]:
    """Manifest, experts per token, what their sum is multiplied with, and how a step runs."""
    manifest = Manifest.read(config.model_path)
    experts_per_token, scale = _experts_per_token(checkpoint, manifest, config.experts_per_token)
    checkpoint.routers = _with_tau(checkpoint.routers, config)
    packed = build_meta_model(checkpoint, device.compute_dtype)
    _check_experts(checkpoint, packed, experts_per_token)
    topology = choose_lane(
        packed,
        lambda: build_meta_model(checkpoint, device.compute_dtype, Lane.SEQUENTIAL),
    )
    return manifest, experts_per_token, scale, topology


def _with_tau(routers: RouterFacts | None, config: EngineConfig) -> RouterFacts | None:
    """Raises StartError where no router foretells norms that could be compared."""
    if config.experts_tau is None:
        return routers
    if routers is None or routers.target != "norm":
        raise StartError(
            "--experts-tau: this model's routers do not foretell how large outputs are; make one"
            " with `moestro factorize --router norm --tau T`"
        )
    return replace(routers, tau=config.experts_tau)


def _check_experts(checkpoint: Checkpoint, model: PreTrainedModel, per_token: int) -> None:
    """Raises ModelRefused where there are none, StartError where a token cannot have so many."""
    counts = [int(module.num_experts) for module in model.modules() if is_experts_module(module)]  # type: ignore[arg-type]
    if not counts:
        raise ModelRefused(
            f"{checkpoint.folder}: no experts that moestro can offload in a model of type"
            f" {checkpoint.config.model_type!r}; if it is dense, split it with `moestro factorize`"
        )
    if per_token > min(counts):
        raise StartError(
            f"--experts-per-token {per_token}: the model has {min(counts)} experts per layer"
        )


def _build(checkpoint: Checkpoint, device: Device, topology: Topology) -> PreTrainedModel:
    dtype = device.compute_dtype
    return build_meta_model(checkpoint, dtype, topology.lane.lane, topology.absent_paths)


def _experts_per_token(
    checkpoint: Checkpoint, manifest: Manifest | None, wanted: int | None
) -> tuple[int, float]:
    """How many experts each token takes, and what their sum is multiplied with."""
    text_config = checkpoint.config.get_text_config()
    own = getattr(text_config, "num_experts_per_tok", None)
    if wanted is None or wanted == own:
        wanted = own if own is not None else 0
        return wanted, wanted / manifest.output_factor if manifest else 1.0
    if manifest is not None and not manifest.has_router:
        raise StartError(
            "--experts-per-token: this model has no router that could choose fewer for a token; "
            "--experts-density says how many a prompt keeps for its answer"
        )
    if own is None:
        raise ModelRefused(
            f"--experts-per-token: models of type {text_config.model_type!r} do not have one number"
        )
    text_config.num_experts_per_tok = wanted
    if manifest is None:
        log.warning(
            "--experts-per-token %d instead of the model's own %d: answers will differ from the"
            " model's, and nothing rescales its outputs",
            wanted,
            own,
        )
        return wanted, 1.0
    return wanted, wanted / manifest.output_factor


def compact_modules(
    config: EngineConfig, blueprint: Blueprint, model: PreTrainedModel
) -> list[Replacement]:
    """Modules of `model` that take fewer bytes than the compute dtype would.

    Raises StartError where they cannot be computed with on the device.
    """
    found = replacements(
        model,
        blueprint.topology.stock_paths,
        config.dense_format,
        blueprint.checkpoint,
        tiled=in_tiles(blueprint.device.compute_dtype, blueprint.device.place.type),
    )
    if blueprint.device.place.type != "cpu":
        _refuse_odd_shapes(model, [each.path for each in found if each.kind == "int8"])
    if blueprint.device.room is None:
        return found
    on_host = kept_on_host(model)
    paths = {each.path for each in on_host}
    return [*(each for each in found if each.path not in paths), *on_host]


def _refuse_odd_shapes(model: PreTrainedModel, paths: list[str]) -> None:
    """Of int8 products on a GPU."""
    for path in paths:
        outputs, inputs = model.get_submodule(path).get_parameter("weight").shape
        if outputs % 8 or inputs % 8:
            raise StartError(
                f"--dense-format int8: {path} is {outputs} x {inputs}, and a GPU multiplies"
                " multiples of 8 alone; use --dense-format native"
            )


def kept_dense(config: EngineConfig, blueprint: Blueprint) -> DenseFile | None:
    """Where a start keeps its dense weights for the next one; None where it does not."""
    device = blueprint.device
    if device.room is not None:  # a GPU's would have to be kept in their own place and dtype
        return None
    tiled = in_tiles(device.compute_dtype, device.place.type)
    folder = config.pack_path.parent
    return DenseFile.of(blueprint.checkpoint, config.dense_format, folder, tiled=tiled)
