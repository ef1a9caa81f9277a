"""What of a checkpoint's experts goes through transformers' conversion, and what it makes of it.

Letters: E experts, O outputs, I inputs, G groups of inputs.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from moestro.engine.facts import ModelRefused
from moestro.engine.formats import ExpertsModule, grid_format
from moestro.engine.kernels import TileFormat
from moestro.engine.quantized import Grid, GridForm, Quantization, form_by_config

ARRANGE = "moestro_arrange"
Wanted = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # parameter -> dtype and shape


def arranged(
    module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """As the experts interface has them, of a class that keeps them in another way."""
    arrange = module.__dict__.get(ARRANGE, dict)
    return {name: tensor.contiguous() for name, tensor in arrange(tensors).items()}


def conversions(model: PreTrainedModel) -> list[Any]:
    """From the names in the files to those of `model`."""
    return [*get_model_conversion_mapping(model), *model.__dict__.get("moestro_renamings", ())]


def meta_parameter(shape: tuple[int, ...], dtype: torch.dtype) -> torch.nn.Parameter:
    empty = torch.empty(shape, dtype=dtype, device="meta")
    return torch.nn.Parameter(empty, requires_grad=False)


def said_form(quantization: Quantization, dtype_name: str) -> GridForm | str:
    """As `Checkpoint.grid_form`, of experts of which only the config is here.

    `dtype_name` is the config's own. Raises ModelRefused.
    """
    return form_by_config(quantization, dtype_name)


def with_grids(
    entry: ExpertsModule, model: PreTrainedModel, forms: Mapping[str, list[GridForm | str]]
) -> ExpertsModule:
    """`entry` with its grids, all of them or none; `forms` are those of each parameter's parts."""
    found = _grids(entry, model, {name: set(each) for name, each in forms.items()})
    if isinstance(found, str):
        return replace(entry, no_grid=found)
    orders = {
        name: max(1, len(forms[name]) // entry.num_experts)
        for name in found
        if isinstance(form := forms[name][0], GridForm) and form.ordered
    }
    return replace(entry, grids=found, orders=orders)


def _grids(
    entry: ExpertsModule, model: PreTrainedModel, forms: Mapping[str, set[GridForm | str]]
) -> dict[str, TileFormat] | str:
    """Or why tiles cannot hold them."""
    if entry.transposed or ARRANGE in model.get_submodule(entry.path).__dict__:
        return "its class keeps matrices in another order than the files"
    found: dict[str, TileFormat] = {}
    for name, (_, shape) in entry.stored.items():
        if len(shape) != 3:
            continue
        each = forms.get(name, set())
        reason = next((form for form in each if isinstance(form, str)), None)
        if reason is not None:
            return reason
        if len(each) != 1 or not _keeps_rows(model, f"{entry.path}.{name}"):
            return f"the parts of {name} cannot be joined as they are"
        (form,) = each
        assert isinstance(form, GridForm)
        grid = grid_format(form.kind, form.group, form.scale, form.zero, shape[2])
        if grid is None:
            return f"groups of {form.group or shape[2]} of {shape[2]} inputs fit no tile"
        found[name] = grid
    return found


def _keeps_rows(model: PreTrainedModel, target: str) -> bool:
    """Whether what becomes this parameter is stacked and joined alone: a row stays a row."""
    return all(
        isinstance(operation, MergeModulelist | Concatenate)
        for entry in conversions(model)
        if isinstance(entry, WeightConverter)
        and any(re.search(pattern, target) for pattern in entry.target_patterns)
        for operation in entry.operations
    )


def parts_of(
    entry: ExpertsModule, grids: Mapping[str, Grid]
) -> Iterator[tuple[Wanted, dict[str, Any]]]:
    """Of codes, scales, zeros, orders: the parameters that they become, and their slices by key.

    `entry` has grids, `grids` are those of its keys. The parameters are [E, O, I] and [E, O, G],
    of orders [E, parts of a matrix, I].
    """
    for kind in ("codes", "scales", "zeros", "orders"):
        wanted: Wanted = {}
        for name, form in entry.grids.items():
            experts, outputs, inputs = entry.stored[name][1]
            groups = form.padded(inputs) // form.group_of(inputs)
            scale = getattr(torch, form.scale)
            if kind == "codes":
                wanted[name] = (torch.uint8, (experts, outputs, inputs))
            elif kind == "scales":
                wanted[name] = (scale, (experts, outputs, groups))
            elif kind == "zeros" and form.zero != "none":
                dtype = scale if form.zero == "float" else torch.uint8
                wanted[name] = (dtype, (experts, outputs, groups))
            elif kind == "orders" and name in entry.orders:
                wanted[name] = (torch.int32, (experts, entry.orders[name], inputs))
        found = ((key, getattr(grid, kind)) for key, grid in grids.items())
        yield wanted, {key: part for key, part in found if part is not None}


def only_orders(
    folder: Path, entry: ExpertsModule, orders: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """[E, parts, I] -> [E, I], the same for all parts of a matrix. Raises ModelRefused."""
    for name, each in orders.items():
        if not torch.equal(each, each[:, :1].expand_as(each)):
            raise ModelRefused(
                f"{folder}: {entry.path}.{name} is joined of matrices that have their inputs in"
                " orders of their own (g_idx); keep its experts with --expert-format int8 or native"
            )
    return {name: each[:, 0].contiguous() for name, each in orders.items()}
