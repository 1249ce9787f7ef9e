"""Weights of 8 and 4 bits, as `burnish.quantize` stores them, widened to float16 or bfloat16 in registers.

Nothing is converted: bits are put where a float has its mantissa, whose exponent and other bits are a constant, and
what that adds is subtracted. All are exact. Two entries are widened at once, which are half a word of 32 bits apart.
Instructions for a word, in bfloat16 and float16: 7 and 5 of int8, 9 and 9 of fp8, 11 and 11 of int4.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

STEP_COLUMNS = {"none": 32, "int8": 64, "fp8": 64, "int4": 128}
"""Columns in 64 bytes of a row."""

# The lookup tables of lop3: (a & b) | c, and (a & b) ^ c.
_INT4 = """{
.reg .b32 one, bias, s, a, b, c, d;
mov.b32 one, ONE;
mov.b32 bias, BIAS;
lop3.b32 a, $8, 0x000F000F, MAGIC, 0xEA;
shr.u32 s, $8, 4;
lop3.b32 b, s, 0x000F000F, MAGIC, 0xEA;
shr.u32 s, $8, 8;
lop3.b32 c, s, 0x000F000F, MAGIC, 0xEA;
shr.u32 s, $8, 12;
lop3.b32 d, s, 0x000F000F, MAGIC, 0xEA;
fma.rn.TYPE a, a, one, bias;
fma.rn.TYPE b, b, one, bias;
fma.rn.TYPE c, c, one, bias;
fma.rn.TYPE d, d, one, bias;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
mov.b32 {$4, $5}, c;
mov.b32 {$6, $7}, d;
}"""


def _of_int4(dtype: str, one: str, magic: str, bias: str) -> gl.constexpr:
    names = {"TYPE": dtype, "ONE": one, "MAGIC": magic, "BIAS": bias}
    text = _INT4
    for name, value in names.items():
        text = text.replace(name, value)
    return gl.constexpr(text)


# 128 (of float16 1024) and the entry, from which 8 more are subtracted: the middle.
INT4_BFLOAT16 = _of_int4("bf16x2", "0x3F803F80", "0x43004300", "0xC308C308")
INT4_FLOAT16 = _of_int4("f16x2", "0x3C003C00", "0x64006400", "0xE408E408")
# 128 and the entry's lower seven bits, less 128 or, if it is negative, 256: that bit is then the exponent's lowest.
INT8_BFLOAT16 = gl.constexpr("""{
.reg .b32 minus, s, a, b, c, d;
mov.b32 minus, 0xBF80BF80;
shr.u32 s, $4, 8;
lop3.b32 a, $4, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 b, $4, 0x00800080, 0x43004300, 0xEA;
lop3.b32 c, s, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 d, s, 0x00800080, 0x43004300, 0xEA;
fma.rn.bf16x2 a, b, minus, a;
fma.rn.bf16x2 c, d, minus, c;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, c;
}""")
# 1024 and 128 and the entry.
INT8_FLOAT16 = gl.constexpr("""{
.reg .b32 one, bias, s, a, c;
mov.b32 one, 0x3C003C00;
mov.b32 bias, 0xE480E480;
shr.u32 s, $4, 8;
lop3.b32 a, $4, 0x00FF00FF, 0x64806480, 0x6A;
lop3.b32 c, s, 0x00FF00FF, 0x64806480, 0x6A;
fma.rn.f16x2 a, a, one, bias;
fma.rn.f16x2 c, c, one, bias;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, c;
}""")


def _of_fp8(dtype: str, left: int, right: int, mask: str, scale: str) -> gl.constexpr:
    return gl.constexpr(f"""{{
.reg .b32 scale, zero, s, a, c;
mov.b32 scale, {scale};
mov.b32 zero, 0x80008000;
shl.b32 s, $4, 8;
shl.b32 a, $4, {left};
lop3.b32 a, a, {mask}, 0, 0xC0;
lop3.b32 a, s, 0x80008000, a, 0xEA;
shr.u32 c, $4, {right};
lop3.b32 c, c, {mask}, 0, 0xC0;
lop3.b32 c, $4, 0x80008000, c, 0xEA;
fma.rn.{dtype} a, a, scale, zero;
fma.rn.{dtype} c, c, scale, zero;
mov.b32 {{$0, $1}}, a;
mov.b32 {{$2, $3}}, c;
}}""")


# e4m3's sign, exponent and mantissa where the float has them: 2 ** 120 (of float16 2 ** 8) too small.
FP8_BFLOAT16 = _of_fp8("bf16x2", 4, 4, "0x07F007F0", "0x7B807B80")
FP8_FLOAT16 = _of_fp8("f16x2", 7, 1, "0x3F803F80", "0x5C005C00")


@gluon.jit
def four_of(words, ASM: gl.constexpr):
    """The entries of words of 8-bit weights, in columns' order, as the bits of floats."""
    return gl.inline_asm_elementwise(
        ASM, "=h,=h,=h,=h,r", [words], dtype=(gl.int16, gl.int16, gl.int16, gl.int16), is_pure=True, pack=1
    )


@gluon.jit
def eight_of(words, ASM: gl.constexpr):
    """The entries of words of 4-bit weights, in columns' order, as the bits of floats."""
    return gl.inline_asm_elementwise(
        ASM, "=h,=h,=h,=h,=h,=h,=h,=h,r", [words],
        dtype=(gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _four_in_order(words, ASM: gl.constexpr):
    """(splits, rows, 16 words) as (splits, rows, 64 entries), ordered as in `widened`."""
    e = four_of(words, ASM)
    k = gl.join(gl.join(e[0], e[1]), gl.join(e[2], e[3]))
    # split, row, thread, word, entry of a pair, half; to be word, half, thread, entry
    k = gl.permute(gl.reshape(k, (k.shape[0], k.shape[1], 4, 4, 2, 2)), (0, 1, 3, 5, 2, 4))
    return gl.reshape(k, (words.shape[0], words.shape[1], 64))


@gluon.jit
def _eight_in_order(words, ASM: gl.constexpr):
    """(splits, rows, 16 words) as (splits, rows, 128 entries), ordered as in `widened`."""
    e = eight_of(words, ASM)
    low, high = gl.join(gl.join(e[0], e[1]), gl.join(e[2], e[3])), gl.join(gl.join(e[4], e[5]), gl.join(e[6], e[7]))
    k = gl.join(low, high)
    # split, row, thread, word, entry of a pair, half of a product, product; to be word, product, half, thread, entry
    k = gl.permute(gl.reshape(k, (k.shape[0], k.shape[1], 4, 4, 2, 2, 2)), (0, 1, 3, 6, 5, 2, 4))
    return gl.reshape(k, (words.shape[0], words.shape[1], 128))


@gluon.jit
def widened(units, DTYPE: gl.constexpr, KIND: gl.constexpr, COLUMNS: gl.constexpr):
    """(splits, rows, units of 64 bytes) as (splits, rows, COLUMNS), in the order of a tensor core's left operand.

    Each of four threads has a quarter of the columns, of which it takes four to each product (of 16 columns): two to
    its first half and two to its second.
    """
    if KIND == "none":
        k = gl.reshape(units, (units.shape[0], units.shape[1], 4, 2, 2, 2))
        return gl.reshape(gl.permute(k, (0, 1, 3, 4, 2, 5)), (units.shape[0], units.shape[1], COLUMNS))
    elif KIND == "int4":
        k = _eight_in_order(units, INT4_FLOAT16 if gl.float16 == DTYPE else INT4_BFLOAT16)
        return k.to(DTYPE, bitcast=True)
    elif KIND == "int8":
        k = _four_in_order(units, INT8_FLOAT16 if gl.float16 == DTYPE else INT8_BFLOAT16)
        return k.to(DTYPE, bitcast=True)
    else:
        k = _four_in_order(units, FP8_FLOAT16 if gl.float16 == DTYPE else FP8_BFLOAT16)
        return k.to(DTYPE, bitcast=True)
