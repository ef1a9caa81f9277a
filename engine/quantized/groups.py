"""GPTQ and AWQ: whole numbers of few bits, scales and zeros of groups of inputs.

Both keep matrices with inputs first. Letters: O outputs, I inputs, G groups, b bits.
GPTQ (Frantar et al., 2022): X.qweight int32 [I b / 32, O], X.qzeros [G, O b / 32] less one in its
first format, X.scales [G, O], X.g_idx [I]. AWQ (Lin et al., 2023), layout "gemm": X.qweight
[I, O / 8] and X.qzeros [G, O / 8], eight outputs a word in the order below, X.scales [G, O].
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch

from .arithmetic import group_of_input, grouped, unpacked
from .config import Quantization
from .grids import FLOAT_NAMES, gptq_form
from .slices import INT4, Decode, Decoded, Grid, GridForm, Slice, Slices

PACKED, ZEROS, SCALES, GROUPS = ".qweight", ".qzeros", ".scales", ".g_idx"
GPTQ_BITS = (2, 4, 8)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where output n of eight lies in a word
Parts = Mapping[str, torch.Tensor]


def gptq_slices(
    slices: Slices, quantization: Quantization, dtype: torch.dtype
) -> tuple[dict[str, Decoded], set[str]]:
    """Raises ModelRefused."""
    bits, size = quantization.whole("bits", GPTQ_BITS), quantization.group_size()
    form = quantization.text("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise quantization.wrong("checkpoint_format", form, "gptq or gptq_v2")
    less = 1 if form == "gptq" else 0
    found: dict[str, Decoded] = {}
    taken: set[str] = set()
    for name, parts in _modules(slices, (PACKED, ZEROS, SCALES, GROUPS), quantization):
        words, outputs = parts[PACKED].get_shape()
        inputs = words * 32 // bits
        groups = 1 if size == -1 else -(-inputs // size)
        _check(name, parts[SCALES], (groups, outputs), quantization)
        _check(name, parts[ZEROS], (groups, outputs * bits // 32), quantization)
        if GROUPS in parts:
            _check(name, parts[GROUPS], (inputs,), quantization)

        def decode(tensors: Parts, bits: int = bits) -> torch.Tensor:
            return _gptq(tensors, bits, less)

        grid = _gptq_grid(name, parts, less, quantization)
        found[f"{name}.weight"] = Decoded((outputs, inputs), dtype, parts, decode, grid=grid)
        taken |= {f"{name}{part}" for part in parts}
    return found, taken


def _gptq_grid(
    name: str, parts: Mapping[str, Slice], less: int, quantization: Quantization
) -> Grid | str:
    form = gptq_form(quantization, FLOAT_NAMES.get(parts[SCALES].get_dtype(), ""))
    if isinstance(form, str):
        return form

    form = replace(form, ordered=form.ordered and GROUPS in parts)

    def check() -> None:
        if GROUPS not in parts:
            return
        found = parts[GROUPS][...].long()
        wanted = group_of_input(len(found), parts[SCALES].get_shape()[0])
        if form.ordered and not torch.equal(found.sort().values, wanted):
            raise quantization.misfit(f"{name}{GROUPS}", f"has groups not of {form.group} inputs")
        if not form.ordered and not torch.equal(found, wanted):
            raise quantization.misfit(
                f"{name}{GROUPS}", "is not in order, which desc_act false says it is"
            )

    return _grid(
        form,
        parts,
        codes=lambda tensors: unpacked(tensors[PACKED], 4, dim=0).T,
        zeros=lambda tensors: unpacked(tensors[ZEROS], 4, dim=1).T + less,
        check=check,
    )


def _grid(
    form: GridForm,
    parts: Mapping[str, Slice],
    *,
    codes: Decode,
    zeros: Decode,
    check: Callable[[], None] = lambda: None,
) -> Grid | str:
    """Of parts that have inputs first."""
    groups, outputs = parts[SCALES].get_shape()
    inputs = _inputs(parts, outputs)
    if form.scale not in FLOAT_NAMES.values():
        return f"its scales are {parts[SCALES].get_dtype()}"

    def one(kind: str, shape: tuple[int, ...], dtype: torch.dtype, decode: Decode) -> Decoded:
        return Decoded(shape, dtype, {kind: parts[kind]}, decode)

    scale = getattr(torch, form.scale)
    return Grid(
        form,
        one(PACKED, (outputs, inputs), torch.uint8, codes),
        one(SCALES, (outputs, groups), scale, lambda tensors: tensors[SCALES].T),
        one(ZEROS, (outputs, groups), torch.uint8, zeros),
        one(GROUPS, (1, inputs), torch.int32, _sorted_inputs) if form.ordered else None,
        check,
    )


def _sorted_inputs(tensors: Parts) -> torch.Tensor:
    return tensors[GROUPS].argsort(stable=True)[None]


def _inputs(parts: Mapping[str, Slice], outputs: int) -> int:
    """Of a matrix whose numbers have 4 bits."""
    rows, columns = parts[PACKED].get_shape()
    return int(rows * columns * 8 // outputs)


def _gptq(tensors: Parts, bits: int, less: int) -> torch.Tensor:
    """[O, I]"""
    numbers = unpacked(tensors[PACKED], bits, dim=0)  # [I, O]
    zeros = unpacked(tensors[ZEROS], bits, dim=1) + less  # [G, O]
    scales = tensors[SCALES]
    groups = tensors.get(GROUPS)
    if groups is None:
        groups = group_of_input(len(numbers), len(scales))
    groups = groups.long()
    return grouped((numbers - zeros[groups]).T, scales.T, groups)


def awq_slices(
    slices: Slices, quantization: Quantization, dtype: torch.dtype
) -> tuple[dict[str, Decoded], set[str]]:
    """Raises ModelRefused."""
    quantization.whole("bits", (4,), default=quantization.fields.get("w_bit"))
    size = quantization.group_size()
    version = quantization.text("version", "gemm").lower()
    if version != "gemm":
        raise quantization.wrong("version", version, "gemm")
    found: dict[str, Decoded] = {}
    taken: set[str] = set()
    for name, parts in _modules(slices, (PACKED, ZEROS, SCALES), quantization):
        inputs, words = parts[PACKED].get_shape()
        groups = 1 if size == -1 else -(-inputs // size)
        _check(name, parts[SCALES], (groups, words * 8), quantization)
        _check(name, parts[ZEROS], (groups, words), quantization)
        scale = FLOAT_NAMES.get(parts[SCALES].get_dtype(), "")
        grid = _grid(
            GridForm(INT4, max(0, size), scale, "integer"),
            parts,
            codes=lambda tensors: _in_order(tensors[PACKED]).T,
            zeros=lambda tensors: _in_order(tensors[ZEROS]).T,
        )
        found[f"{name}.weight"] = Decoded((words * 8, inputs), dtype, parts, _awq, grid=grid)
        taken |= {f"{name}{part}" for part in parts}
    return found, taken


def _awq(tensors: Parts) -> torch.Tensor:
    """[O, I]"""
    numbers, zeros = (_in_order(tensors[part]) for part in (PACKED, ZEROS))
    scales = tensors[SCALES]
    groups = group_of_input(len(numbers), len(scales))
    return grouped((numbers - zeros[groups]).T, scales.T, groups)


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """[n, O] of int32 [n, O / 8]."""
    spread = unpacked(words, 4, dim=1).view(len(words), -1, 8)
    return spread[..., list(AWQ_ORDER)].flatten(1)


def _modules(
    slices: Slices, kinds: tuple[str, ...], quantization: Quantization
) -> Iterator[tuple[str, dict[str, Slice]]]:
    """(name, its parts by kind) of each quantized matrix; only g_idx may lack.

    Raises ModelRefused.
    """
    for key in slices:
        name = key.removesuffix(PACKED)
        if name == key:
            continue
        parts = {kind: slices[f"{name}{kind}"] for kind in kinds if f"{name}{kind}" in slices}
        for kind in kinds:
            if kind not in parts and kind != GROUPS:
                raise quantization.misfit(key, f"has no {name}{kind} beside it")
        yield name, parts


def _check(name: str, part: Slice, wanted: tuple[int, ...], quantization: Quantization) -> None:
    """Raises ModelRefused for another shape."""
    found = tuple(part.get_shape())
    if found != wanted:
        size = quantization.fields.get("group_size")
        raise quantization.misfit(
            name,
            f"has scales, zeros or groups of shape {found} where group_size {size} needs {wanted}",
        )
