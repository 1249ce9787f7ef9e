"""The heads in a tile of a product, rotated by their positions before they are written (see `burnish.kernels.rope`)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def halves_of_heads(acc, HEAD: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The two halves of each head, (rows, heads, HEAD // 2): they are in the same threads."""
    return gl.split(gl.permute(gl.reshape(acc, [BLOCK_M, BLOCK_N // HEAD, 2, HEAD // 2]), [0, 1, 3, 2]))


@gluon.jit
def tables_of_rows(half, first_m, M, rope, HEAD: gl.constexpr, BLOCK_M: gl.constexpr):
    """Cosines and sines for a tile's rows, of a head's first half and of its second, each (rows, HEAD // 2)."""
    cos_ptr, sin_ptr, positions, stride_batch, stride_position, _ = rope
    LINES: gl.constexpr = gl.SliceLayout(1, half.type.layout)
    m = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, LINES))
    line = m // positions * stride_batch + m % positions * stride_position
    places = line.to(gl.int64)[:, None] + gl.arange(0, HEAD // 2, gl.SliceLayout(0, LINES))[None, :]
    inside = (m < M)[:, None]
    first = gl.load(cos_ptr + places, mask=inside, other=0.0), gl.load(sin_ptr + places, mask=inside, other=0.0)
    places += HEAD // 2
    return first, (gl.load(cos_ptr + places, mask=inside, other=0.0), gl.load(sin_ptr + places, mask=inside, other=0.0))


@gluon.jit
def _lines(table, LAYOUT: gl.constexpr):
    """A table for all heads of a tile."""
    return gl.expand_dims(gl.convert_layout(table, gl.SliceLayout(1, LAYOUT)), 1).to(gl.float32)


@gluon.jit
def rotated_heads(acc, tables, first_n, rotated, HEAD: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """A tile's heads, turned as far as they are to be."""
    first, second = halves_of_heads(acc, HEAD, BLOCK_M, BLOCK_N)
    HALVES: gl.constexpr = first.type.layout
    head = gl.arange(0, BLOCK_N // HEAD, gl.SliceLayout(0, gl.SliceLayout(2, HALVES)))
    turns = (first_n + head * HEAD < rotated)[None, :][:, :, None]
    turned = first * _lines(tables[0][0], HALVES) - second * _lines(tables[0][1], HALVES)
    other = second * _lines(tables[1][0], HALVES) + first * _lines(tables[1][1], HALVES)
    both = gl.join(gl.where(turns, turned, first), gl.where(turns, other, second))
    return gl.convert_layout(gl.reshape(gl.permute(both, [0, 1, 3, 2]), [BLOCK_M, BLOCK_N]), acc.type.layout)
