"""Cross entropy over rows of logits: the loss of each, and the logits' gradient, in two walks over a row.

A program takes whole rows. Its first walk keeps the largest logit and the sum of exponentials as it goes (the online
softmax), its second one writes the gradient; what it reads again then lies in the L2 cache, if not too many rows are
under way at once: a bfloat16 row of 128256 logits has 256 KB, and the H200's cache 50 MB. So logits come from memory
once and their gradient goes there once, 4.2 GB for 8192 x 128256, where a backward pass of its own makes it 6.3.

- Each thread keeps a maximum and a sum of its own, of the 16 bytes that one load brings it (an axis of E entries that
  lies within a thread), so that a walk has no barrier, and one more exponential for E entries.
- A tile is asked for before the one ahead of it is computed: that doubles the bytes under way.
- The second walk goes backwards. What was read last is there most surely.
- The target's own entry is written once more at the end: to compare each column with it costs two of ten instructions.

Sources: Milakov, Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867; that the forward pass may
leave the gradient: Hsu et al., "Liger Kernel", arXiv:2410.10989.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.activations import tanh
from burnish.kernels.launch import (
    Config,
    Target,
    cdiv,
    first_config,
    launch,
    launch_dependents,
    next_power_of_2,
    target_of,
    wait_for_inputs,
)

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # not -infinity, which less itself is NaN
_L2_BYTES = 32 << 20  # of the H200's 50 MB, what rows on their way may take: the gradient passes through it, too


@triton.jit
def _tile(N: tl.constexpr, E: tl.constexpr, ALIGNED: tl.constexpr):
    """The columns of a tile (N, E), whose last axis lies within a thread: neighbours there, which one load brings, or,
    where rows do not begin at 16 bytes and each entry is a load of its own, neighbours among the threads."""
    if ALIGNED:
        return tl.arange(0, N)[:, None] * E + tl.arange(0, E)[None, :]
    else:
        return tl.arange(0, N)[:, None] + tl.arange(0, E)[None, :] * N


@triton.jit
def _load_logits(row, column, width, WALK: tl.constexpr, HINTS: tl.constexpr):
    """As they are stored, with -infinity past the row's ends. The second walk is the last that wants them."""
    policy: tl.constexpr = ("evict_last" if WALK == 1 else "evict_first") if HINTS else ""
    return tl.load(row + column, (column >= 0) & (column < width), other=-float("inf"), eviction_policy=policy)


@triton.jit
def _capped(x, softcap):
    """In float32, through `softcap * tanh(x / softcap)` where there is one; -infinity stays."""
    x = x.to(tl.float32)
    if softcap is not None:
        x = tl.where(x == -float("inf"), x, softcap * tanh(x * (1.0 / softcap)))
    return x


@triton.jit
def _within(x, column, size, softcap, PADDED: tl.constexpr):
    """`_capped`, and -infinity past the row's end, also where padding was loaded."""
    x = _capped(x, softcap)
    return tl.where(column < size, x, -float("inf")) if PADDED else x


@triton.jit
def _slope(capped, softcap):
    """The derivative of `_capped`, by its result."""
    share = capped * (1.0 / softcap)
    return 1.0 - share * share


@triton.jit
def _statistics(
    row, size, width, softcap, SMOOTH: tl.constexpr, HINTS: tl.constexpr, ALIGNED: tl.constexpr, PADDED: tl.constexpr,
    N: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Of one row: the largest logit, the sum of exponentials relative to it, and, with SMOOTH, the sum of all."""
    tile = _tile(N, E, ALIGNED)
    most = tl.full((N,), _LOWEST, tl.float32)
    total = tl.zeros((N,), tl.float32)
    plain = tl.zeros((N,), tl.float32)
    ahead = _load_logits(row, tile, width, 1, HINTS)
    for start in range(0, size, N * E):
        x = _within(ahead, tile + start, size, softcap, PADDED)
        ahead = _load_logits(row, tile + (start + N * E), width, 1, HINTS)
        larger = tl.maximum(most, tl.max(x, axis=1))
        each = tl.math.exp2((x - larger[:, None]) * _LOG2_E)
        total = total * tl.math.exp2((most - larger) * _LOG2_E) + tl.sum(each, axis=1)
        most = larger
        if SMOOTH:
            plain += tl.sum(tl.where(tile + start < size, x, 0.0), axis=1)
    largest = tl.max(most, axis=0)
    total = tl.sum(total * tl.math.exp2((most - largest) * _LOG2_E), axis=0)
    return largest, total, tl.sum(plain, axis=0)


@triton.jit
def _write_gradient(
    row, to, size, width, softcap, largest, factor, less, HINTS: tl.constexpr, ALIGNED: tl.constexpr,
    PADDED: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """`exp(x - largest) * factor - less` for each logit of a row, from its end; `to` may be `row`."""
    tile = _tile(N, E, ALIGNED)
    last = (tl.cdiv(size, N * E) - 1) * (N * E)
    ahead = _load_logits(row, tile + last, width, 2, HINTS)
    for passed in range(0, size, N * E):
        column = tile + (last - passed)
        x = _within(ahead, column, size, softcap, PADDED)
        ahead = _load_logits(row, column - N * E, width, 2, HINTS)  # of no tile before the first one
        grad = tl.math.exp2((x - largest) * _LOG2_E) * factor - less
        if softcap is not None:
            grad *= _slope(x, softcap)
        tl.store(to + column, grad.to(to.dtype.element_ty), column < width)


@triton.jit
def _write_zeros(to, width, ALIGNED: tl.constexpr, N: tl.constexpr, E: tl.constexpr):
    tile = _tile(N, E, ALIGNED)
    for start in range(0, width, N * E):
        tl.store(to + tile + start, tl.zeros((N, E), to.dtype.element_ty), tile + start < width)


@triton.jit(do_not_specialize=["rows"])
def _cross_entropy_kernel(
    logits, target, share, grad_loss, losses, gradient, rows, size, width, stride, target_step, grad_step,
    gradient_stride, ignore_index, smoothing, z_loss, softcap, SMOOTH: tl.constexpr, ALIGNED: tl.constexpr,
    PADDED: tl.constexpr, N: tl.constexpr, E: tl.constexpr, HINTS: tl.constexpr, PER_SM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Each row's loss and, where `gradient` is given, its gradient times `share` and `grad_loss`, if there are such.

    PADDED: rows of `size` logits go on to `width` in memory that may be read and overwritten."""
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    for at in range(tl.program_id(0), rows, tl.num_programs(0)):
        wide = tl.zeros((), tl.int64) + at  # rows begin beyond 2**31 entries, too
        label = tl.load(target + at * target_step)
        row = logits + wide * stride
        if label == ignore_index:
            tl.store(losses + at, 0.0)
            if gradient is not None:
                _write_zeros(gradient + wide * gradient_stride, width, ALIGNED, N, E)
        else:
            inside = (label >= 0) & (label < size)
            poison = tl.where(inside, 0.0, float("nan"))  # what a target is that no logit stands for
            label = tl.where(inside, label, 0)
            picked = _capped(tl.load(row + label), softcap)
            largest, total, plain = _statistics(row, size, width, softcap, SMOOTH, HINTS, ALIGNED, PADDED, N, E)
            log_total = tl.log2(total) * _LN_2
            # Differences to the largest first: at 1e4 a logsumexp in float32 is off by 5e-4.
            loss = (largest - picked) * (1.0 - smoothing) + log_total + poison
            if SMOOTH:
                loss += smoothing * (largest - plain / size)
            log_sum_exp = largest + log_total
            tl.store(losses + at, loss + z_loss * log_sum_exp * log_sum_exp)
            if gradient is not None:
                weight = poison + 1.0
                if share is not None:
                    weight *= tl.load(share)
                if grad_loss is not None:
                    weight *= tl.load(grad_loss + at * grad_step).to(tl.float32)
                factor = weight * (1.0 + 2.0 * z_loss * log_sum_exp) / total
                less = weight * smoothing / size
                to = gradient + wide * gradient_stride
                _write_gradient(row, to, size, width, softcap, largest, factor, less, HINTS, ALIGNED, PADDED, N, E)
                own = tl.math.exp2((picked - largest) * _LOG2_E) * factor - less - weight * (1.0 - smoothing)
                if softcap is not None:
                    own *= _slope(picked, softcap)
                tl.debug_barrier()  # another thread has written there
                tl.store(to + label, own.to(gradient.dtype.element_ty))


@triton.jit(do_not_specialize=["rows"])
def _share_kernel(target, share, rows, target_step, ignore_index, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One over the number of targets that count; NaN where none does, as the mean of no losses is."""
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    counts = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, rows, BLOCK):
        at = start + tl.arange(0, BLOCK)
        label = tl.load(target + at * target_step, at < rows, other=0)
        counts += ((label != ignore_index) & (at < rows)).to(tl.int32)
    count = tl.sum(counts, axis=0)
    tl.store(share, tl.where(count > 0, 1.0 / tl.maximum(count, 1).to(tl.float32), float("nan")))


@triton.jit(do_not_specialize=["rows"])
def _total_kernel(losses, share, out, rows, BLOCK: tl.constexpr, PDL: tl.constexpr):
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rows, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(losses + at, at < rows, other=0.0)
    total = tl.sum(sums, axis=0)
    if share is not None:
        total *= tl.load(share)
    tl.store(out, total)


@triton.jit(do_not_specialize=["rows"])
def _scale_kernel(
    values, factor, out, rows, size, factor_step, PER_ROW: tl.constexpr, IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr, PER_SM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows times `factor`, one number or one for each row. In place, where that is 1, memory is left alone."""
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    scale = tl.load(factor).to(tl.float32)
    if IN_PLACE and not PER_ROW:
        rows = tl.where(scale == 1.0, 0, rows)
    column = tl.arange(0, BLOCK)
    for at in range(tl.program_id(0), rows, tl.num_programs(0)):
        if PER_ROW:
            scale = tl.load(factor + at * factor_step).to(tl.float32)
        begin = (tl.zeros((), tl.int64) + at) * size
        row, to = values + begin, out + begin
        end = size
        if IN_PLACE and PER_ROW:
            end = tl.where(scale == 1.0, 0, size)
        for start in range(0, end, BLOCK):
            x = tl.load(row + start + column, start + column < size, other=0.0).to(tl.float32)
            tl.store(to + start + column, (x * scale).to(out.dtype.element_ty), start + column < size)


_REDUCING = Config.of(num_warps=8, num_stages=1, BLOCK=4096)


def cross_entropy_configs(rows: int, size: int, dtype: torch.dtype, backward: bool, target: Target) -> list[Config]:
    """How to walk over `rows` rows of `size` logits, the most promising first.

    A tile is N by E entries, E of them one load of 16 bytes; PER_SM programs for each multiprocessor loop over the
    rows; HINTS tells the cache what is wanted again.
    """
    E = 16 // dtype.itemsize
    vectors = next_power_of_2(cdiv(size, E))
    row_bytes = size * dtype.itemsize
    if vectors <= 512:  # short rows: one tile each, and many of them
        warps = max(1, min(8, vectors // 32))
        return [Config.of(num_warps=w, N=vectors, E=E, HINTS=0, PER_SM=32 // w) for w in {warps: 1, -(-warps // 2): 1}]
    configs = []
    # By warps, loads of each thread for a tile, and programs of a multiprocessor.
    shapes = [(16, 2, 2), (8, 4, 2), (32, 1, 1), (16, 2, 1), (8, 2, 4), (4, 4, 8)]
    if not backward:  # nothing is read again, so any number of rows may be under way
        shapes = [(8, 2, 4), (8, 4, 3), (16, 2, 2), (4, 4, 8)]
    for warps, loads, per_sm in shapes:
        N = min(32 * warps * loads, vectors)
        crowded = backward and per_sm * target.num_sms * row_bytes > 2 * _L2_BYTES
        if 32 * warps <= N and not (crowded and per_sm > 2):
            configs.append(Config.of(num_warps=warps, N=N, E=E, HINTS=int(backward), PER_SM=per_sm))
    if backward:
        first = configs[0]
        configs.insert(2, Config.of(num_warps=first.num_warps, N=first["N"], E=E, HINTS=0, PER_SM=first["PER_SM"]))
    return configs


def cross_entropy(
    logits: Tensor, target: Tensor, grad_loss: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float,
    softcap: float | None, reduction: str, backward: bool, config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The loss and, with `backward`, the gradient of the logits, contiguous; arguments as of the Op."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    share = mean_share(target, ignore_index) if reduction == "mean" else None
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    gradient = logits.new_empty(logits.shape) if backward else None
    rows(logits, target, share, grad_loss, losses, gradient, ignore_index, label_smoothing, z_loss, softcap, config)
    return (losses if reduction == "none" else total(losses, share)), gradient


def rows(
    logits: Tensor, target: Tensor, share: Tensor | None, grad_loss: Tensor | None, losses: Tensor,
    gradient: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
    config: Config | None = None, padded: bool = False,
) -> None:  # fmt: skip
    """Writes each row's loss and, where `gradient` is given (it may be `logits`), its gradient times `share` and
    `grad_loss` (one number, or one for each row). The columns of logits and gradient have a stride of 1.

    `padded`: rows go on in memory to a multiple of 16 entries, which may be read and, in `gradient`, overwritten. With
    a mask at 50257 each entry would be a load of its own.
    """
    count, size = logits.shape
    target_device = target_of(logits)
    if config is None:
        config = first_config(cross_entropy_configs, count, size, logits.dtype, gradient is not None, target_device)
    grad_step = 0 if grad_loss is None or grad_loss.dim() == 0 else grad_loss.stride(0)
    width = -(-size // 16) * 16 if padded else size
    aligned = width % config["E"] == 0 and all(
        t.stride(0) % config["E"] == 0 and t.data_ptr() % 16 == 0 for t in (logits, gradient) if t is not None
    )
    launch(
        _cross_entropy_kernel, (min(count, config["PER_SM"] * target_device.num_sms),), logits, target, share,
        grad_loss, losses, gradient, count, size, width, logits.stride(0), target.stride(0), grad_step,
        0 if gradient is None else gradient.stride(0), ignore_index, float(label_smoothing), float(z_loss),
        None if softcap is None else float(softcap), config=config, like=logits, SMOOTH=label_smoothing != 0,
        ALIGNED=aligned, PADDED=width != size,
    )  # fmt: skip


def mean_share(target: Tensor, ignore_index: int) -> Tensor:
    """One over the number of targets that are not ignored, float32, on the device; NaN where all are."""
    share = target.new_empty((), dtype=torch.float32)
    launch(
        _share_kernel, (1,), target, share, target.shape[0], target.stride(0), ignore_index, config=_REDUCING,
        like=target,
    )  # fmt: skip
    return share


def total(losses: Tensor, share: Tensor | None) -> Tensor:
    """The sum of `losses` (T,), times `share` where there is one; always in the same order."""
    out = losses.new_empty(())
    launch(_total_kernel, (1,), losses, share, out, losses.shape[0], config=_REDUCING, like=losses)
    return out


def scale_gradient(gradient: Tensor, factor: Tensor, out: Tensor, config: Config | None = None) -> None:
    """`gradient * factor` into `out`, which may be `gradient`; both contiguous. factor is one number, or one for each
    row."""
    size = gradient.shape[-1] if gradient.dim() else 1
    count = gradient.numel() // size
    target = target_of(gradient)
    config = config or first_config(scale_configs, size)
    launch(
        _scale_kernel, (min(count, config["PER_SM"] * target.num_sms),), gradient, factor, out, count, size,
        factor.stride(0) if factor.dim() else 0, config=config, like=gradient, PER_ROW=factor.dim() == 1,
        IN_PLACE=out is gradient,
    )  # fmt: skip


def scale_configs(size: int) -> list[Config]:
    """How to scale rows of `size` entries, the most promising first."""
    block = next_power_of_2(size)
    pairs = ((4096, 4, 8), (8192, 8, 4), (2048, 4, 8))
    found = [Config.of(num_warps=max(1, min(w, block // 256)), BLOCK=min(b, block), PER_SM=n) for b, w, n in pairs]
    return list(dict.fromkeys(found))
