"""Experts of one model in several formats: `--expert-format mixed:FILE`. FILE is JSON:

    {"moestro_formats": 1, "default": "int4",
     "layers": {"model.layers.0.mlp.experts": {"int8": [3, 17]}}}

Who is not named is kept in the default format. Layers are the paths of experts modules, as a trace
and the pack's header name them.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch

from moestro.cache import BlobLayout, PackLayer, TraceInvalid, TraceReader
from moestro.engine.facts import Indices, StartError
from moestro.engine.kernels import ROWS, TILE16, TileMatrix

from .experts_module import ExpertsModule
from .matrices import Codec, Layout, Source, Span
from .named import FORMATS, codec_of
from .tiled import Codes, TileCodec

MIXED = "mixed:"
FILE_FORMAT = 1
MARK = "codec:"  # a tensor of no bytes in each blob says by its name which codec wrote it

Matrix = tuple[Codec, Any]  # what the codec's own `open` gave


@dataclass(frozen=True)
class FormatMap:
    """Which expert is kept in which format."""

    default: str
    layers: Mapping[str, Mapping[str, Sequence[int]]]  # layer -> format -> experts

    @classmethod
    def read(cls, path: Path) -> "FormatMap":
        """Raises StartError where `path` is no such file."""
        try:
            found = json.loads(path.read_text("utf-8"))
            if found["moestro_formats"] != FILE_FORMAT:
                raise ValueError(f"format {found['moestro_formats']}, not {FILE_FORMAT}")
            result = cls(found["default"], found["layers"])
            result._check()
        except OSError as error:
            raise StartError(f"--expert-format {MIXED}{path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StartError(
                f"--expert-format {MIXED}{path}: not a map of formats: {error}"
            ) from error
        return result

    def write(self, path: Path) -> None:
        path.write_text(self._text(indent=1) + "\n", "utf-8")

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self._text(indent=None).encode()).hexdigest()[:8]

    @property
    def formats(self) -> list[str]:
        """The default first."""
        named = (name for layer in self.layers.values() for name in layer)
        return list(dict.fromkeys([self.default, *named]))

    def of(self, layer: str, num_experts: int) -> list[str]:
        """The format of each expert."""
        found = [self.default] * num_experts
        for name, experts in self.layers.get(layer, {}).items():
            for expert in experts:
                found[expert] = name
        return found

    def check_against(self, modules: Iterable[ExpertsModule]) -> None:
        """Raises StartError where the model has no such layers or experts."""
        counts = {entry.path: entry.num_experts for entry in modules}
        for layer, formats in self.layers.items():
            if layer not in counts:
                raise StartError(
                    f"--expert-format: the model has no experts at {layer!r}, which the map names;"
                    f" its first ones are at {next(iter(counts))!r}"
                )
            most = max((expert for experts in formats.values() for expert in experts), default=0)
            if most >= counts[layer]:
                raise StartError(
                    f"--expert-format: the map names expert {most} of {layer}, which has"
                    f" {counts[layer]}"
                )

    def _check(self) -> None:
        for name in self.formats:
            if name not in FORMATS:
                raise ValueError(f"{name!r} is none of {', '.join(FORMATS)}")
        for layer, formats in self.layers.items():
            named = Counter(expert for experts in formats.values() for expert in experts)
            for expert, times in named.items():
                if type(expert) is not int or expert < 0 or times > 1:
                    raise ValueError(f"{layer}: {expert!r} is no expert, or named twice")

    def _text(self, indent: int | None) -> str:
        whole = {"moestro_formats": FILE_FORMAT, "default": self.default, "layers": self.layers}
        return json.dumps(whole, indent=indent, sort_keys=True)


class _Rows:
    """Rows as each codec wants them, made when the first matrix of that codec asks."""

    def __init__(
        self,
        rows: torch.Tensor,
        whole: "_Rows | None" = None,
        places: torch.Tensor | None = None,
    ) -> None:
        self._rows, self._whole, self._places = rows, whole, places
        self._begun: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        return self._rows.device

    def of(self, codec: Codec) -> Any:
        found = self._begun.get(codec.name)
        if found is None:
            if self._whole is None or self._places is None:
                found = codec.begin(self._rows)
            else:
                found = codec.take(self._whole.of(codec), self._places)
            self._begun[codec.name] = found
        return found

    def __len__(self) -> int:
        return len(self._rows if self._places is None else self._places)

    def take(self, places: torch.Tensor) -> "_Rows":
        return _Rows(self._rows, self, places)


class MixedCodec:
    """A codec for each format of a map; every expert is computed by its own."""

    def __init__(self, formats: FormatMap, compute_dtype: torch.dtype, device: str = "cpu") -> None:
        self.formats = formats
        self._indices = Indices()
        self._codecs = {name: codec_of(name, compute_dtype, device) for name in formats.formats}
        layouts = "-".join(sorted({each.name for each in self._codecs.values()}))
        self.name = f"mixed-{formats.digest}-{layouts}"
        self.tiled = all(codec.tiled for codec in self._codecs.values())
        self._by_mark = {MARK + codec.name: codec for codec in self._codecs.values()}

    @property
    def codecs(self) -> list[Codec]:
        return list(self._codecs.values())

    def layout(self, tensors: Source, transposed: bool) -> Layout:
        """Of an expert in the default format."""
        return self._layout(self.formats.default, tensors, transposed)

    def encode(
        self, tensors: Mapping[str, torch.Tensor], transposed: bool
    ) -> dict[str, torch.Tensor]:
        """In the default format."""
        return self._encode(self.formats.default, tensors, transposed)

    def pack_layer(self, entry: ExpertsModule) -> PackLayer:
        names = self.formats.of(entry.path, entry.num_experts)
        layouts = {
            name: BlobLayout.of(self._layout(name, entry.tensors, entry.transposed))
            for name in dict.fromkeys(names)
        }
        return PackLayer.of(entry.path, [layouts[name] for name in names])

    def encode_kinds(
        self, entry: ExpertsModule, tensors: Mapping[str, torch.Tensor]
    ) -> list[dict[str, torch.Tensor]]:
        """One after the other as `PackLayer.kinds` has them: the experts of each format."""
        names = self.formats.of(entry.path, entry.num_experts)
        found = []
        for name in dict.fromkeys(names):
            experts = torch.tensor([e for e, own in enumerate(names) if own == name])
            part = {key: tensor.index_select(0, experts) for key, tensor in tensors.items()}
            found.append(self._encode(name, part, entry.transposed))
        return found

    def open(self, tensors: Mapping[str, torch.Tensor], name: str, transposed: bool) -> Matrix:
        codec = next(self._by_mark[key] for key in tensors if key in self._by_mark)
        return codec, codec.open(tensors, name, transposed)

    def begin(self, rows: torch.Tensor) -> _Rows:
        return _Rows(rows)

    def take(self, rows: _Rows, places: torch.Tensor) -> _Rows:
        return rows.take(places)

    def multiply(self, rows: _Rows, matrix: Matrix) -> torch.Tensor:
        codec, own = matrix
        return codec.multiply(rows.of(codec), own)

    def multiply_each(
        self, rows: _Rows, spans: Sequence[Span], matrices: Sequence[Matrix]
    ) -> torch.Tensor:
        codecs = list(dict.fromkeys(codec for codec, _ in matrices))
        if len(codecs) == 1:
            owns = [own for _, own in matrices]
            return codecs[0].multiply_each(rows.of(codecs[0]), spans, owns)
        below = list(accumulate((end - start for start, end in spans), initial=0))
        outs = dict[int, torch.Tensor]()  # by the number of the matrix
        for codec in codecs:
            mine = [number for number, (whose, _) in enumerate(matrices) if whose is codec]
            owns = [matrices[number][1] for number in mine]
            into = [row for number in mine for row in range(below[number], below[number + 1])]
            counts = [below[number + 1] - below[number] for number in mine]
            part = codec.take(rows.of(codec), self._indices.on(into, rows.device))
            spans_of_part = list(pairwise(accumulate(counts, initial=0)))
            products = codec.multiply_each(part, spans_of_part, owns)
            outs |= zip(mine, torch.split(products, counts), strict=True)
        return torch.cat([outs[number] for number in range(len(matrices))])

    def multiply_apart(self, rows: _Rows, matrices: Sequence[Matrix]) -> torch.Tensor:
        codecs = list(dict.fromkeys(codec for codec, _ in matrices))
        if len(codecs) == 1:
            return codecs[0].multiply_apart(rows.of(codecs[0]), [own for _, own in matrices])
        outs = dict[int, torch.Tensor]()  # by the number of the matrix
        for codec in codecs:
            mine = [number for number, (whose, _) in enumerate(matrices) if whose is codec]
            part = rows.of(codec)
            if len(rows) > 1:
                part = codec.take(part, self._indices.on(mine, rows.device))
            products = codec.multiply_apart(part, [matrices[number][1] for number in mine])
            outs |= zip(mine, torch.split(products, 1), strict=True)
        return torch.cat([outs[number] for number in range(len(matrices))])

    def _layout(self, name: str, tensors: Source, transposed: bool) -> Layout:
        codec = self._codecs[name]
        return {MARK + codec.name: ("uint8", (0,)), **codec.layout(tensors, transposed)}

    def _encode(
        self, name: str, tensors: Mapping[str, torch.Tensor], transposed: bool
    ) -> dict[str, torch.Tensor]:
        codec = self._codecs[name]
        count = len(next(iter(tensors.values())))
        mark = torch.empty((count, 0), dtype=torch.uint8)
        return {MARK + codec.name: mark, **codec.encode(tensors, transposed)}


def as_tile(matrix: Any) -> TileMatrix:
    """What a `tiled` codec's `open` gave, for the call of a whole layer."""
    found = matrix if isinstance(matrix, TileMatrix) else matrix[1]
    assert isinstance(found, TileMatrix)
    return found


def expert_codec(
    name: str,
    modules: Iterable[ExpertsModule],
    compute_dtype: torch.dtype,
    device: str = "cpu",
) -> Codec:
    """What `--expert-format` names. Raises StartError where a map does not fit the model, or a

    format the device.
    """
    if not name.startswith(MIXED):
        return codec_of(name, compute_dtype, device)
    formats = FormatMap.read(Path(name.removeprefix(MIXED)))
    formats.check_against(modules)
    return MixedCodec(formats, compute_dtype, device)


def order_of(codec: Codec) -> str:
    """In which its matrices lie in the pack: TILE16 where the library computes with any of them."""
    codecs = codec.codecs if isinstance(codec, MixedCodec) else [codec]
    return TILE16 if any(one.tiled for one in codecs) else ROWS


def pack_layer(codec: Codec, entry: ExpertsModule) -> PackLayer:
    """How the experts of a module lie in the pack."""
    if isinstance(codec, MixedCodec):
        return codec.pack_layer(entry)
    if isinstance(codec, TileCodec):
        layout = BlobLayout.of(codec.layout_of(entry))
    else:
        layout = BlobLayout.of(codec.layout(entry.tensors, entry.transposed))
    return PackLayer(entry.path, entry.num_experts, layout)


def keeps_grids(codec: Codec, entry: ExpertsModule) -> bool:
    """Whether the matrices of a module are put into the pack as the files have them quantized."""
    return isinstance(codec, TileCodec) and codec.keeps(entry)


def encode_layer(
    codec: Codec,
    entry: ExpertsModule,
    tensors: Mapping[str, torch.Tensor],
    codes: Mapping[str, Codes] | None = None,
) -> list[dict[str, torch.Tensor]]:
    """What `PackWriter.add_layer` takes for `pack_layer` of the same.

    `codes` has the matrices, and `tensors` the rest, where the codec keeps the module's grids.
    """
    if codes is not None:
        assert isinstance(codec, TileCodec)
        rest = codec.encode(tensors, entry.transposed)
        return [rest | codec.encode_codes(codes, entry.grids)]
    if isinstance(codec, MixedCodec):
        return codec.encode_kinds(entry, tensors)
    return [codec.encode(tensors, entry.transposed)]


def mix_by_trace(trace: Path, fine: str, coarse: str, share: float) -> FormatMap:
    """The experts that a trace's events ask for most often, over all layers, in the format `fine`.

    `share` of all experts, 0 to 1; the others in `coarse`. Raises StartError where `trace` is none.
    """
    asked: Counter[tuple[int, int]] = Counter()
    try:
        reader = TraceReader(trace)
        for event in reader:
            asked.update((event.layer, expert) for expert in event.experts)
    except TraceInvalid as error:
        raise StartError(str(error)) from error
    layers = reader.header.layers
    total = sum(layer.num_experts for layer in layers)
    chosen: dict[str, dict[str, list[int]]] = {}
    # Of equals, the first layer and expert: the same trace gives the same map.
    ranked = sorted(asked, key=lambda key: (-asked[key], key))
    for layer, expert in sorted(ranked[: round(share * total)]):
        chosen.setdefault(layers[layer].name, {fine: []})[fine].append(expert)
    return FormatMap(coarse, chosen)
