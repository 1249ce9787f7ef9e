"""What the ONNX function of an Op computes: the Op's reference, or the same in words that runtimes know better.

A body is plain PyTorch, which torch's own exporter turns into standard operators. From opset 23 on, ONNX has operators
for attention, RMS norms and rotations; they are used where they say the same as the Op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.onnx.ops import symbolic

from burnish.onnx.calls import Signature
from burnish.op import OPS
from burnish.ops import rope
from burnish.ops._common import wide
from burnish.ops._masks import additive_mask, allowed_pairs

Body: TypeAlias = Callable[..., Any]
Settings: TypeAlias = (
    "dict[str, int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]]"
)

OPERATORS_OF_ITS_OWN = 23
"""The opset that brought Attention, RMSNormalization and RotaryEmbedding."""


def body_of(signature: Signature, opset: int) -> Body:
    """A function of all the Op's arguments."""
    made = _BODIES.get(signature.op)
    dtypes = {dtype for _, dtype, _ in signature.tensors}
    if made is None or torch.float64 in dtypes:  # what runtimes know better they know in float32 and below
        return OPS[signature.op].reference
    return made(signature, opset >= OPERATORS_OF_ITS_OWN)


# --- attention --------------------------------------------------------------------------------------------------------


def _attention(signature: Signature, own_operator: bool) -> Body:
    # Each query has a key to attend to: itself.
    causal_alone = _is_causal_alone(signature)

    def attention(
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
    ) -> Tensor:
        if dropout_p:
            reference: Tensor = OPS["attention"].reference(
                q, k, v, bias, key_padding_mask, is_causal, window, scale, dropout_p, seed
            )
            return reference
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if own_operator and causal_alone:
            return _onnx_attention(q, k, v, None, scale, is_causal=True)
        dtype = q.dtype if own_operator else wide(q.dtype)
        mask = additive_mask(bias, allowed_pairs(q, k, key_padding_mask, is_causal, window), dtype)
        attend = _onnx_attention if own_operator else _attention_in_products
        if mask is None or causal_alone:
            return attend(q, k, v, mask, scale)
        # Found in the mask, which is smaller than the scores by as much as there are heads, and is often one for all
        # layers: a runtime then does this once.
        nothing = (mask == -torch.inf).all(dim=-1, keepdim=True)
        return attend(q, k, v, mask.masked_fill(nothing, 0.0), scale).masked_fill(nothing, 0.0)

    return attention


def _is_causal_alone(signature: Signature) -> bool:
    sizes = {name: sizes for name, _, sizes in signature.tensors}
    masked = sizes.keys() & {"bias", "key_padding_mask"} or signature.setting("window") is not None
    return bool(signature.setting("is_causal")) and sizes["q"][2] == sizes["k"][2] and not masked


def _attention_in_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    dtype, groups = wide(q.dtype), q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q.to(dtype) @ k.to(dtype).transpose(-2, -1) * scale
    weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
    return weights.to(v.dtype) @ v


def _onnx_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool = False
) -> Tensor:
    """ONNX's operator, whose causality starts at the first query and key together."""
    if mask is not None:  # ONNX Runtime takes none that is to be repeated for each query
        mask = mask.expand(-1, -1, q.shape[2], -1)
    settings: Settings = {"scale": scale, "is_causal": int(is_causal), "softmax_precision": _FLOAT}
    return symbolic("Attention", (q, k, v, mask), settings, dtype=q.dtype, shape=(*q.shape[:3], v.shape[3]), version=23)


_FLOAT = 1  # as ONNX counts its dtypes


# --- norms ------------------------------------------------------------------------------------------------------------


def _rms_norm(signature: Signature, own_operator: bool) -> Body:
    return _onnx_rms_norm if own_operator and _is_plain_norm(signature) else _rms_norm_by_quotient


def _add_rms_norm(signature: Signature, own_operator: bool) -> Body:
    norm = _rms_norm(signature, own_operator)

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, keep_sum: bool) -> Any:
        total = x + residual
        return norm(total, weight, eps), total

    return add_rms_norm


def _is_plain_norm(signature: Signature) -> bool:
    """ONNX's operator computes in float32, and gives the weight's dtype."""
    dtypes = {dtype for name, dtype, _ in signature.tensors if name in ("x", "weight")}
    has_weight = any(name == "weight" for name, *_ in signature.tensors)
    return has_weight and len(dtypes) == 1


def _onnx_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    settings: Settings = {"axis": -1, "epsilon": eps}
    return symbolic("RMSNormalization", (x, weight), settings, dtype=x.dtype, shape=x.shape, version=23)


def _rms_norm_by_quotient(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The reference multiplies by the inverse root; ONNX Runtime fuses what divides by the root."""
    wide_x = x.to(wide(x.dtype))
    normed = wide_x / torch.sqrt(wide_x.square().mean(-1, keepdim=True) + eps)
    return (normed if weight is None else normed * weight).to(x.dtype)


# --- rotations --------------------------------------------------------------------------------------------------------


def _rope(signature: Signature, own_operator: bool) -> Body:
    interleaved = signature.setting("interleaved")
    return _onnx_rope if own_operator and signature.halves_alike and not interleaved else rope.reference


def _rope_qk(signature: Signature, own_operator: bool) -> Body:
    turn = _rope(signature, own_operator)
    return lambda q, k, *tables: (turn(q, *tables), turn(k, *tables))


def _onnx_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """ONNX's operator: it takes each angle once, and tables for each sample."""
    width = cos.shape[-1]
    cos, sin = (t if t.dim() == 3 else t.unsqueeze(0) for t in (cos, sin))
    cos, sin = (t[..., : width // 2].to(x.dtype).expand(x.shape[0], -1, -1) for t in (cos, sin))
    turned = x[..., :width]
    turned = symbolic("RotaryEmbedding", (turned, cos, sin), {}, dtype=x.dtype, shape=turned.shape, version=23)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)


_BODIES: dict[str, Callable[[Signature, bool], Body]] = {
    "add_rms_norm": _add_rms_norm,
    "attention": _attention,
    "rms_norm": _rms_norm,
    "rope": _rope,
    "rope_qk": _rope_qk,
}
