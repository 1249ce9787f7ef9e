"""What runs `attention` on CUDA, apart from the kernels made for it: PyTorch's kernels, and the one that decodes.

PyTorch's are called directly: F.scaled_dot_product_attention prefers flash attention where cuDNN's is up to 1.8 times
as fast (H200, head_dim 128, causal), and it aligns causality to the first query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.ops import _triton
from burnish.ops._attention import dropout_reasons, for_queries, heads_last
from burnish.ops._common import HALF_TYPES
from burnish.ops._masks import additive_mask, allowed_pairs

_ALIGNMENT = 16  # bytes of one load
_FEWEST_QUERIES = 33  # of the Gluon kernel, whose blocks have 64
_MOST_HEADS, _WIDEST_DECODED = 64, 256  # of the decode kernel: query heads of a key head, and head_dim
_MAX_HEAD_DIM = 512  # of the Triton kernel; in float32 half of it
_BOTTOM_RIGHT = 2  # custom_mask_type: the last query sees all keys


def _reasons(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """What speaks against all three kernels: the device, empty inputs, and what they cannot load."""
    reasons = []
    if not q.is_cuda:
        reasons.append(f"the inputs are on {q.device.type}, not on a CUDA device")
    elif torch.cuda.get_device_capability(q.device) < (8, 0):
        reasons.append(f"compute capability {torch.cuda.get_device_capability(q.device)} is below 8.0")
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        reasons.append("an input is empty")
    entries = _ALIGNMENT // q.element_size()
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.shape[3] % entries:
            reasons.append(f"{name}'s head_dim {tensor.shape[3]} is not a multiple of {entries}")
        if tensor.shape[3] > 1 and tensor.stride(3) != 1:
            reasons.append(f"{name}'s last dimension has stride {tensor.stride(3)}, not 1")
        outer = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
        if tensor.storage_offset() % entries or any(size > 1 and stride % entries for size, stride in outer):
            reasons.append(f"{name}'s rows are not aligned to {_ALIGNMENT} bytes")
    return reasons


def _unmasked_reasons(q: Tensor, bias: Tensor | None, key_padding_mask: Tensor | None, window: int | None) -> list[str]:
    reasons = [] if q.dtype in HALF_TYPES else [f"q is {q.dtype}, not a half-precision type"]
    for name, argument in (("bias", bias), ("key_padding_mask", key_padding_mask), ("window", window)):
        if argument is not None:
            reasons.append(f"the kernel takes no {name}")
    return reasons


def _head_dim_reasons(q: Tensor, v: Tensor, most: int) -> list[str]:
    widest = max(q.shape[3], v.shape[3])
    return [f"head_dim {widest} is above {most}"] if widest > most else []


def flash_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
) -> list[str]:
    reasons = _reasons(q, k, v) + _unmasked_reasons(q, bias, key_padding_mask, window) + dropout_reasons(dropout_p)
    reasons += _head_dim_reasons(q, v, 256)
    if q.shape[3] != v.shape[3]:
        reasons.append(f"v's head_dim is {v.shape[3]} where q's is {q.shape[3]}")
    if is_causal and q.shape[2] > k.shape[2]:
        reasons.append("the first queries may attend to no key")
    return reasons


def torch_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """PyTorch's FlashAttention-2, which aligns causality as the Op does: to the last query."""
    return heads_last(
        torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, is_causal, scale=scale)[0]
    )


def gluon_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
) -> list[str]:
    """What speaks against the Gluon kernel on Hopper."""
    reasons = list(dict.fromkeys(_triton.hopper_why_not(q) + _unmasked_reasons(q, bias, None, window)))
    reasons += dropout_reasons(dropout_p)
    if k.numel() == 0 or v.numel() == 0:
        reasons.append("k or v is empty")
    if q.shape[3] not in (64, 128) or v.shape[3] != q.shape[3]:
        reasons.append(f"head_dim is {q.shape[3]}, of v {v.shape[3]}; the kernel takes 64 and 128, the same for both")
    if q.shape[2] < _FEWEST_QUERIES:
        reasons.append(f"q has {q.shape[2]} queries; the kernel takes {_FEWEST_QUERIES} and more")
    if scale is not None and scale <= 0:
        reasons.append(f"scale is {scale}; it must be positive")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        steps = [stride * tensor.element_size() for stride in tensor.stride()[:3]]
        aligned = tensor.storage_offset() * tensor.element_size() % _ALIGNMENT == 0
        if tensor.stride(3) != 1 or not aligned or any(step <= 0 or step % _ALIGNMENT for step in steps):
            reasons.append(f"{name} has strides {tensor.stride()}; they must be multiples of {_ALIGNMENT} bytes and 1")
    return reasons


def cudnn_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
) -> list[str]:
    reasons = _reasons(q, k, v) + _unmasked_reasons(q, bias, key_padding_mask, window) + dropout_reasons(dropout_p)
    wide = q.is_cuda and torch.cuda.get_device_capability(q.device) == (9, 0)  # what torch itself lets through to cuDNN
    reasons += _head_dim_reasons(q, v, 256 if wide else 128)
    if not torch.backends.cudnn.is_available():
        reasons.append("there is no cuDNN")
    if k.shape[2] == 1:
        reasons.append("there is one key only")
    if is_causal and q.shape[2] not in (1, k.shape[2]):
        reasons.append(f"causality is aligned to the first query: {q.shape[2]} queries are not {k.shape[2]} keys")
    return reasons


def torch_cudnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """cuDNN's flash attention, through PyTorch."""
    causal = is_causal and q.shape[2] > 1  # a single query is the last: nothing is to come
    kernel = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    return heads_last(kernel(q, k, v, None, False, 0.0, causal, False, scale=scale)[0])


def efficient_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
) -> list[str]:
    reasons = _reasons(q, k, v) + mask_reasons(q, k, bias) + dropout_reasons(dropout_p)
    return reasons + ([f"q is {q.dtype}"] if q.dtype not in (*HALF_TYPES, torch.float32) else [])


def torch_efficient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """PyTorch's memory-efficient attention (CUTLASS), with one mask in memory for all but causality."""
    mask, nothing, mask_type = efficient_mask(q, k, bias, key_padding_mask, is_causal, window)
    q, k, v = (t.transpose(1, 2) for t in (q, for_queries(k, q), for_queries(v, q)))
    kernel = torch.ops.aten._efficient_attention_forward.default
    out = kernel(q, k, v, mask, None, None, None, None, 0.0, mask_type, False, scale=scale)[0].transpose(1, 2)
    return heads_last(out if nothing is None else out.masked_fill_(nothing, 0.0))


def efficient_mask(
    q: Tensor, k: Tensor, bias: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool, window: int | None
) -> tuple[Tensor | None, Tensor | None, int]:
    """The memory-efficient kernel's mask, of all pairs; True for each query that may attend to nothing; and how the
    kernel is to mask by itself."""
    masked = bias is not None or key_padding_mask is not None or window is not None
    skip_future = is_causal and not masked and q.shape[2] <= k.shape[2]
    mask, nothing = safe_mask(q, k, bias, key_padding_mask, is_causal and not skip_future, window)
    if mask is not None:
        mask = _aligned(mask, k.shape[2]).expand(*q.shape[:3], k.shape[2])
    return mask, nothing, _BOTTOM_RIGHT if skip_future else 0


def triton_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
) -> list[str]:
    """What speaks against the Triton kernel."""
    reasons = _triton.triton_why_not(q)
    if k.numel() == 0 or v.numel() == 0:
        reasons.append("k or v is empty")
    limit = _MAX_HEAD_DIM // 2 if q.dtype == torch.float32 else _MAX_HEAD_DIM
    for name, tensor in (("q", q), ("v", v)):
        if tensor.shape[3] > limit:
            reasons.append(f"{name}'s head_dim {tensor.shape[3]} is above {limit}, the kernel's for {q.dtype}")
    return reasons


def decode_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
) -> list[str]:
    reasons = _triton.triton_why_not(q) + _head_dim_reasons(q, v, _WIDEST_DECODED) + dropout_reasons(dropout_p)
    if k.numel() == 0 or v.numel() == 0:
        reasons.append("k or v is empty")
    if q.shape[2] != 1:
        reasons.append(f"there are {q.shape[2]} queries; the kernel is for one")
    if bias is not None:
        reasons.append("the kernel takes no bias here")
    if q.shape[1] // max(1, k.shape[1]) > _MOST_HEADS:
        reasons.append(f"{q.shape[1] // k.shape[1]} query heads share a key head; the kernel takes {_MOST_HEADS}")
    return reasons


def decode_configs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Sequence[Any]:
    from burnish.kernels import decode_attention

    return decode_attention.decode_configs(q, k, v)


def triton_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: Any = None,
) -> Tensor:
    """One query, the keys split among programs: `cached_attention`'s kernel over keys that are all there."""
    from burnish.kernels.decode_attention import decode_attention

    return decode_attention(q, k, v, None, key_padding_mask, window, scale, config=config)


def mask_reasons(q: Tensor, k: Tensor, bias: Tensor | None) -> list[str]:
    """What speaks against a mask in q's dtype."""
    reasons = ["q or k is empty"] if q.numel() == 0 or k.numel() == 0 else []
    if bias is not None and bias.dtype not in (torch.bool, q.dtype):
        reasons.append(f"bias is {bias.dtype} where q is {q.dtype}, the mask's dtype")
    return reasons


def safe_mask(
    q: Tensor, k: Tensor, bias: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool, window: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """One additive mask in q's dtype, and True for each query that may attend to nothing; None and None for no mask.

    Such a query's row of the mask is 0: what a kernel makes of a row of -inf is not documented, NaN for one. Its result
    is to be overwritten with zeros, and gradients stay finite.
    """
    mask = additive_mask(bias, allowed_pairs(q, k, key_padding_mask, is_causal, window), q.dtype)
    if mask is None:
        return None, None
    masked = mask == -torch.inf
    nothing = masked.all(dim=-1, keepdim=True)
    if bias is not None and bias.dtype not in (torch.bool, torch.float16):
        # Kernels multiply by log2(e), and the lowest number, which many a mask is made of, would become -inf.
        mask = mask.clamp_min(torch.finfo(mask.dtype).min / 4).masked_fill(masked, -torch.inf)
    return mask.masked_fill(nothing, 0.0), nothing


def _aligned(mask: Tensor, keys: int) -> Tensor:
    """The mask with all `keys` columns, in memory of which each row starts at a multiple of 16 bytes."""
    rows = mask.new_empty((*mask.shape[:3], (keys + 7) // 8 * 8))[..., :keys]
    return rows.copy_(mask)
