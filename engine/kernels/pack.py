"""Weights of a matrix as the bytes of its tiles (layout.py).

`pack_*` take what is quantized already and lose nothing; `encode` rounds.

Shape letters: N outputs, K inputs, Kp inputs of a tile, G groups of a row.
"""

import torch

from .layout import TileFormat, by_tile, lines

LARGEST = 127.0
TINIEST = 1e-30
OFFSET = 128  # of a stored int8
TOP = 15  # of an int4
SHRINKS = (1.0, 0.94, 0.88, 0.82, 0.76)  # of a group's range: its ends cut off, the rest is finer
REFITS = 2  # of a group's scale and zero to the levels that they gave
ROWS_AT_ONCE = 256  # encoded together: their fp32 copies stay in the caches
MXFP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4_BIAS = 127
FP8_LARGEST = 448.0


def _padded(rows: torch.Tensor, width: int, value: int = 0) -> torch.Tensor:
    missing = width - rows.shape[1]
    if not missing:
        return rows
    return torch.nn.functional.pad(rows, (0, missing), value=value)


def pack_floats(weight: torch.Tensor, form: TileFormat) -> torch.Tensor:
    """[N, K] of the format's dtype -> its tiles."""
    rows = _padded(weight.to(getattr(torch, form.kind)), form.padded(weight.shape[1]))
    return lines(rows.contiguous().view(torch.uint8)).flatten(1)


def pack_int8(values: torch.Tensor, scales: torch.Tensor, form: TileFormat) -> torch.Tensor:
    """int8 [N, K] and fp32 [N] -> tiles."""
    stored = values.view(torch.uint8).bitwise_xor(OFFSET)
    stored = _padded(stored, form.padded(values.shape[1]), OFFSET)
    scale = by_tile(scales[:, None].to(getattr(torch, form.scale)))
    return torch.cat([lines(stored).flatten(1), scale.flatten(1)], dim=1)


def _nibble_lines(levels: torch.Tensor, groups: int) -> torch.Tensor:
    """uint8 [N, Kp] of 0..15 -> [T, G, bytes]."""
    eights = levels.view(len(levels), -1, 2, 4)
    packed = eights[:, :, 0] | eights[:, :, 1] << 4
    found = lines(packed.flatten(1))
    return found.view(len(found), groups, -1)


def pack_int4(
    levels: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, form: TileFormat
) -> torch.Tensor:
    """uint8 [N, K] of 0..15; scales and zeros [N, G], zeros as `form.zero` says -> tiles."""
    groups, dtype = scales.shape[1], getattr(torch, form.scale)
    parts = [_nibble_lines(_padded(levels, form.padded(levels.shape[1])), groups)]
    parts.append(by_tile(scales.to(dtype)))
    if zeros is not None:
        parts.append(by_tile(zeros.to(dtype if form.zero == "float" else torch.uint8)))
    return torch.cat(parts, dim=2).flatten(1)


def pack_mxfp4(codes: torch.Tensor, exponents: torch.Tensor, form: TileFormat) -> torch.Tensor:
    """uint8 [N, K] of e2m1 codes and uint8 [N, K/32] of e8m0 exponents -> tiles."""
    padded = _padded(codes, form.padded(codes.shape[1]))
    found = _nibble_lines(padded, exponents.shape[1])
    return torch.cat([found, by_tile(exponents)], dim=2).flatten(1)


def pack_fp8(stored: torch.Tensor, scales: torch.Tensor, form: TileFormat) -> torch.Tensor:
    """uint8 [N, K] of e4m3 and fp32 [N, G] -> tiles."""
    groups = scales.shape[1]
    found = lines(_padded(stored, form.padded(stored.shape[1])))
    found = found.view(len(found), groups, -1)
    return torch.cat([found, by_tile(scales.to(getattr(torch, form.scale)))], dim=2).flatten(1)


def pack_codes(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, form: TileFormat
) -> torch.Tensor:
    """uint8 [N, K], of an int4 or fp8 that is quantized already, with [N, G] -> tiles."""
    if form.kind == "int4":
        return pack_int4(codes, scales, zeros, form)
    assert form.kind == "fp8" and zeros is None
    return pack_fp8(codes, scales, form)


def encode(weight: torch.Tensor, form: TileFormat) -> torch.Tensor:
    """[N, K] of floats -> uint8 [T, tile_bytes], rounded as the format needs."""
    if form.kind in ("float32", "bfloat16", "float16"):
        return pack_floats(weight, form)
    one = {"int8": _int8, "int4": _int4, "mxfp4": _mxfp4, "fp8": _fp8}[form.kind]
    return torch.cat([one(rows.float(), form) for rows in torch.split(weight, ROWS_AT_ONCE)])


def _int8(rows: torch.Tensor, form: TileFormat) -> torch.Tensor:
    scale = rows.abs().amax(dim=1, keepdim=True).mul_(1 / LARGEST).clamp_min_(TINIEST)
    return pack_int8(torch.div(rows, scale).round_().char(), scale[:, 0], form)


def _int4(rows: torch.Tensor, form: TileFormat) -> torch.Tensor:
    group = form.group_of(rows.shape[1])
    grouped = _padded(rows, form.padded(rows.shape[1])).view(len(rows), -1, group)
    if form.zero == "float":
        levels, scales, zeros = nearest_affine(grouped, getattr(torch, form.scale))
    else:
        levels, scales = nearest_symmetric(grouped, getattr(torch, form.scale))
        zeros = torch.full_like(scales, 8)
    flat = levels.view(len(rows), -1)
    return pack_int4(flat, scales, None if form.zero == "none" else zeros, form)


def nearest_affine(
    values: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp32 [N, G, g] -> levels uint8 [N, G, g], scales and zeros [N, G] that `dtype` can hold.

    Of a few ranges, each group takes the one with the least squared error, after its scale and
    zero were fitted to the levels in turn (least squares).
    """
    low, high = values.amin(dim=2, keepdim=True), values.amax(dim=2, keepdim=True)
    middle, mean = (high + low) / 2, values.mean(dim=2, keepdim=True)
    best: tuple[torch.Tensor, ...] | None = None
    for shrink in SHRINKS:
        scale = ((high - low) * (shrink / TOP)).clamp_min_(TINIEST)
        zero = middle - scale * (TOP / 2)
        for fit in range(REFITS + 1):
            scale, zero = scale.to(dtype).float().clamp_min_(TINIEST), zero.to(dtype).float()
            levels = ((values - zero) / scale).round_().clamp_(0, TOP)
            if fit == REFITS:
                break
            level_mean = levels.mean(dim=2, keepdim=True)
            spread = levels - level_mean
            variance = spread.square().sum(dim=2, keepdim=True)
            fitted = (spread * values).sum(dim=2, keepdim=True) / variance
            scale = torch.where((variance > 0) & (fitted > 0), fitted, scale)
            zero = mean - scale * level_mean
        error = (levels * scale).add_(zero).sub_(values).square_().sum(dim=2, keepdim=True)
        best = _better(best, (error, levels, scale, zero))
    assert best is not None
    _, levels, scale, zero = best
    return levels.to(torch.uint8), scale[:, :, 0], zero[:, :, 0]


def nearest_symmetric(
    values: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [N, G, g] -> levels uint8 [N, G, g] about 8, and scales [N, G] that `dtype` can hold.

    The number of the largest magnitude becomes -8 steps: one level more on its side.
    """
    largest = values.abs().amax(dim=2, keepdim=True)
    extreme = torch.where(values.amax(dim=2, keepdim=True) == largest, largest, -largest)
    best: tuple[torch.Tensor, ...] | None = None
    for shrink in SHRINKS:
        scale = extreme * (shrink / -8)
        for fit in range(REFITS + 1):
            scale = scale.to(dtype).float()
            scale = torch.where(scale == 0, torch.full_like(scale, TINIEST), scale)
            levels = (values / scale).round_().clamp_(-8, 7)
            if fit == REFITS:
                break
            energy = levels.square().sum(dim=2, keepdim=True)
            fitted = (levels * values).sum(dim=2, keepdim=True) / energy
            scale = torch.where(energy > 0, fitted, scale)
        error = (levels * scale).sub_(values).square_().sum(dim=2, keepdim=True)
        best = _better(best, (error, levels, scale))
    assert best is not None
    _, levels, scale = best
    return levels.add_(8).to(torch.uint8), scale[:, :, 0]


def _better(
    best: tuple[torch.Tensor, ...] | None, found: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Group by group the one with the smaller error, which comes first in each."""
    if best is None:
        return found
    better = found[0] < best[0]
    return tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))


def _mxfp4(rows: torch.Tensor, form: TileFormat) -> torch.Tensor:
    grouped = _padded(rows, form.padded(rows.shape[1])).view(len(rows), -1, form.group)
    largest = grouped.abs().amax(dim=2, keepdim=True).clamp_min_(2.0**-120)
    exponents = (largest / MXFP4_VALUES[-1]).log2().ceil_()
    scaled = grouped / exponents.exp2()
    steps = torch.tensor(MXFP4_VALUES)
    codes = torch.bucketize(scaled.abs().contiguous(), (steps[1:] + steps[:-1]) / 2)
    codes = codes.to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3
    stored = (exponents[:, :, 0] + MXFP4_BIAS).to(torch.uint8)
    return pack_mxfp4(codes.view(len(rows), -1), stored, form)


def _fp8(rows: torch.Tensor, form: TileFormat) -> torch.Tensor:
    group = form.group_of(rows.shape[1])
    grouped = _padded(rows, form.padded(rows.shape[1])).view(len(rows), -1, group)
    scales = grouped.abs().amax(dim=2, keepdim=True).div_(FP8_LARGEST).clamp_min_(TINIEST)
    stored = (grouped / scales).to(torch.float8_e4m3fn).view(torch.uint8)
    return pack_fp8(stored.view(len(rows), -1), scales[:, :, 0], form)
