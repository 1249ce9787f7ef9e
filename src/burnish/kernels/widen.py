"""Weights of 8 and 4 bits, as `burnish.quantize` stores them, made tensor cores' left operand in registers.

As float16 or bfloat16 nothing is converted: bits are put where a float has its mantissa, whose exponent and other bits
are a constant or zero, and what that adds is subtracted. All are exact, of int8 and int4 in bfloat16 times `factor_of`.
Two entries are widened at once, which are half a word of 32 bits apart. Instructions for a word: 5 of int8, 9 of fp8
and of int4. As integers, for an x of such (`burnish.kernels.digits`), those of 8 bits are what is stored; those of 4
bits, times 16, take 3 instructions.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

STEP_COLUMNS = {"none": 32, "int8": 64, "fp8": 64, "int4": 128}
"""Columns in 64 bytes of a row."""

# The lookup tables of lop3: 0xEA is (a & b) | c, 0x6A (a & b) ^ c.


def _of_int4(dtype: str, low: tuple[str, str, str], high: tuple[str, str, str]) -> gl.constexpr:
    """Of the lower halves of bytes, and of their upper ones: other bits of the float, its factor, what is added."""
    return gl.constexpr(f"""{{
.reg .b32 low, to_low, high, to_high, s, a, b, c, d;
mov.b32 low, {low[1]};
mov.b32 to_low, {low[2]};
mov.b32 high, {high[1]};
mov.b32 to_high, {high[2]};
shr.u32 s, $4, 8;
lop3.b32 a, $4, 0x000F000F, {low[0]}, 0xEA;
lop3.b32 b, $4, 0x00F000F0, {high[0]}, 0xEA;
lop3.b32 c, s, 0x000F000F, {low[0]}, 0xEA;
lop3.b32 d, s, 0x00F000F0, {high[0]}, 0xEA;
fma.rn.{dtype} $0, a, low, to_low;
fma.rn.{dtype} $1, b, high, to_high;
fma.rn.{dtype} $2, c, low, to_low;
fma.rn.{dtype} $3, d, high, to_high;
}}""")


# 1024 and the entry, or 64 and it where the mantissa's last four bits are zero. In bfloat16 32 and a quarter of it; as
# its mantissa has no room for the bits before these, 2 ** -129 of it, which is a number below the normal ones or one of
# the first that are: the exponent's last bit is worth as much more as it would be in an integer.
INT4_FLOAT16 = _of_int4("f16x2", ("0x64006400", "0x3C003C00", "0xE408E408"), ("0x54005400", "0x3C003C00", "0xD480D480"))
INT4_BFLOAT16 = _of_int4("bf16x2", ("0x42004200", "0x3F803F80", "0xC208C208"), ("0", "0x7F007F00", "0xC000C000"))


def _of_int8(dtype: str, other: str, scale: str, added: str) -> gl.constexpr:
    return gl.constexpr(f"""{{
.reg .b32 scale, added, s, a, c;
mov.b32 scale, {scale};
mov.b32 added, {added};
shr.u32 s, $2, 8;
lop3.b32 a, $2, 0x00FF00FF, {other}, 0x6A;
lop3.b32 c, s, 0x00FF00FF, {other}, 0x6A;
fma.rn.{dtype} $0, a, scale, added;
fma.rn.{dtype} $1, c, scale, added;
}}""")


# 1024 and 128 and the entry; in bfloat16 2 ** -133 of 128 and the entry.
INT8_FLOAT16 = _of_int8("f16x2", "0x64806480", "0x3C003C00", "0xE480E480")
INT8_BFLOAT16 = _of_int8("bf16x2", "0x00800080", "0x7F007F00", "0xC000C000")


def _of_fp8(dtype: str, left: int, right: int, mask: str, scale: str) -> gl.constexpr:
    return gl.constexpr(f"""{{
.reg .b32 scale, zero, s, a, c;
mov.b32 scale, {scale};
mov.b32 zero, 0x80008000;
shl.b32 s, $2, 8;
shl.b32 a, $2, {left};
lop3.b32 a, a, {mask}, 0, 0xC0;
lop3.b32 a, s, 0x80008000, a, 0xEA;
shr.u32 c, $2, {right};
lop3.b32 c, c, {mask}, 0, 0xC0;
lop3.b32 c, $2, 0x80008000, c, 0xEA;
fma.rn.{dtype} $0, a, scale, zero;
fma.rn.{dtype} $1, c, scale, zero;
}}""")


# e4m3's sign, exponent and mantissa where the float has them: 2 ** 120 (of float16 2 ** 8) too small.
FP8_BFLOAT16 = _of_fp8("bf16x2", 4, 4, "0x07F007F0", "0x7B807B80")
FP8_FLOAT16 = _of_fp8("f16x2", 7, 1, "0x3F803F80", "0x5C005C00")


@gluon.jit
def four_of(octets, ASM: gl.constexpr):
    """8-bit weights as the bits of floats, each four of them in columns' order."""
    return gl.inline_asm_elementwise(ASM, "=r,=r,r", [octets], dtype=gl.int16, is_pure=True, pack=4)


@gluon.jit
def eight_of(octets, ASM: gl.constexpr):
    """4-bit weights as the bits of floats: of each eight, in columns' order, the first four and the last four."""
    return gl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r", [octets], dtype=(gl.int16, gl.int16), is_pure=True, pack=4)


@gluon.jit
def factor_of(KIND: gl.constexpr, DTYPE: gl.constexpr):
    """By what `widened` entries are to be multiplied."""
    if gl.bfloat16 == DTYPE and KIND == "int8":
        return 64.0
    elif gl.bfloat16 == DTYPE and KIND == "int4":
        return 4.0
    else:
        return 1.0


@gluon.jit
def widened(units, DTYPE: gl.constexpr, KIND: gl.constexpr, COLUMNS: gl.constexpr):
    """(splits, rows, 64 bytes) as (splits, rows, COLUMNS), in the order of a tensor core's left operand.

    Each of four threads has a quarter of the columns, of which it takes four to each product (of 16 columns): two to
    its first half and two to its second.
    """
    if KIND == "int4":
        first, last = eight_of(units, INT4_FLOAT16 if gl.float16 == DTYPE else INT4_BFLOAT16)
        # Split, row, thread, word, half of a product, entry, product; to be word, product, half, thread, entry.
        k = gl.reshape(gl.join(first, last), (units.shape[0], units.shape[1], 4, 4, 2, 2, 2))
        k = gl.permute(k, (0, 1, 3, 6, 4, 2, 5))
    else:
        k = units
        if KIND == "int8":
            k = four_of(units, INT8_FLOAT16 if gl.float16 == DTYPE else INT8_BFLOAT16)
        elif KIND == "fp8":
            k = four_of(units, FP8_FLOAT16 if gl.float16 == DTYPE else FP8_BFLOAT16)
        # Split, row, thread, product, half of it, entry; to be product, half, thread, entry.
        k = gl.reshape(k, (units.shape[0], units.shape[1], 4, COLUMNS // 16, 2, 2))
        k = gl.permute(k, (0, 1, 3, 4, 2, 5))
    k = gl.reshape(k, (units.shape[0], units.shape[1], COLUMNS))
    return k if KIND == "none" else k.to(DTYPE, bitcast=True)


# The halves of bytes, less 8 and times 16.
INT4_OCTETS = gl.constexpr("""{
.reg .b32 s;
shl.b32 s, $2, 4;
lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
lop3.b32 $0, s, 0xF0F0F0F0, 0x80808080, 0x6A;
}""")


@gluon.jit
def two_of(octets, ASM: gl.constexpr):
    """4-bit weights as 8-bit ones: bytes' lower halves, and their upper ones."""
    return gl.inline_asm_elementwise(ASM, "=r,=r,r", [octets], dtype=(gl.int8, gl.int8), is_pure=True, pack=4)


@gluon.jit
def octets(units, KIND: gl.constexpr, COLUMNS: gl.constexpr):
    """(splits, rows, 64 bytes) as integers of 8 bits, in the order of a tensor core's left operand.

    Of int4 (splits, rows, COLUMNS), a word's lower halves in the first half of a product and the upper in the second.
    Of int8 each eight rows have sixteen there, first with every second word and then with the others, for only so what
    a thread loads of a row are the registers that a product takes: (splits, 2 * rows, COLUMNS / 2).
    """
    SPLITS: gl.constexpr = units.shape[0]
    ROWS: gl.constexpr = units.shape[1]
    if KIND == "int8":
        # Split, eight rows, row, thread, half of a product, part, octet.
        k = gl.reshape(units, (SPLITS, ROWS // 8, 8, 4, 2, 2, 4))
        return gl.reshape(gl.permute(k, (0, 1, 5, 2, 4, 3, 6)), (SPLITS, 2 * ROWS, COLUMNS // 2))
    else:
        low, high = two_of(units, INT4_OCTETS)
        # Split, row, thread, product, octet, half of the product.
        k = gl.reshape(gl.join(low, high), (SPLITS, ROWS, 4, COLUMNS // 32, 4, 2))
        return gl.reshape(gl.permute(k, (0, 1, 3, 5, 2, 4)), (SPLITS, ROWS, COLUMNS))
