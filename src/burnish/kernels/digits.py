"""A row of x as integers of three digits, for tensor cores that multiply integers of 8 bits.

They take weights of 8 bits as these are stored, and eight of 4 bits for three instructions: nothing is widened. So each
warp multiplies its columns of x by a power of two and rounds them to integers below 2 ** 21 in magnitude. Their digits
to base 256, from -128 to 127, are columns of the right operand, which has eight of them anyway. Products and their sums
are exact. What is lost is what x was rounded by, for each column at most 2 ** -21 of the warp's largest: sums in
float32 of as many products lose as much. Infinity becomes NaN.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

CHUNK = gl.constexpr(256)  # columns of which a warp makes the digits at once, eight in a thread
DIGITS = gl.constexpr(4)  # sizes are powers of two: the last one is the middle one again, and counts nothing


def _digits_of(dtype: str, order: tuple[int, ...]) -> gl.constexpr:
    """The digits of eight columns, as two words of four in this order: $0 and $1 the highest, then the middle ones."""
    lines = [".reg .b32 y<8>, a, b, c, d;", ".reg .b16 low, high;"]
    for i in range(0, 8, 2):
        pair = f"${6 + i // 2}"
        if dtype == "bf16":
            lines += [f"shl.b32 y{i}, {pair}, 16;", f"and.b32 y{i + 1}, {pair}, 0xFFFF0000;"]
        else:
            lines += ["mov.b32 {low, high}, " + pair + ";", f"cvt.f32.f16 y{i}, low;", f"cvt.f32.f16 y{i + 1}, high;"]
    # 2 ** 23 makes an integer of the lower bytes, and 0x408080 makes all three digits positive.
    lines += [f"fma.rn.f32 y{i}, y{i}, $10, 0f4B408080;" for i in range(8)]
    for word in range(2):
        first, second, third, fourth = (f"y{i}" for i in order[4 * word : 4 * word + 4])
        lines += [
            f"prmt.b32 a, {first}, {second}, 0x5140;",
            f"prmt.b32 b, {third}, {fourth}, 0x5140;",
            f"prmt.b32 c, {first}, {second}, 0x0062;",
            f"prmt.b32 d, {third}, {fourth}, 0x0062;",
            "xor.b32 a, a, 0x80808080;",
            "xor.b32 b, b, 0x80808080;",
            "prmt.b32 c, c, d, 0x5410;",
            "add.u32 c, c, 0x40404040;",
            f"xor.b32 ${word}, c, 0x80808080;",
            f"prmt.b32 ${2 + word}, a, b, 0x7632;",
            f"prmt.b32 ${4 + word}, a, b, 0x5410;",
        ]
    return gl.constexpr("\n".join(["{", *lines, "}"]))


# In the order of the weight's bytes: of int8 as they are stored, of int4 the lower halves of four and then the upper.
INT8_ORDER, INT4_ORDER = (0, 2, 1, 3, 4, 6, 5, 7), (0, 4, 1, 5, 2, 6, 3, 7)
INT8_BFLOAT16, INT8_FLOAT16 = _digits_of("bf16", INT8_ORDER), _digits_of("f16", INT8_ORDER)
INT4_BFLOAT16, INT4_FLOAT16 = _digits_of("bf16", INT4_ORDER), _digits_of("f16", INT4_ORDER)


@gluon.jit
def three_of(x, scale, ASM: gl.constexpr):
    """The highest, middle and lowest digits of x * scale, of each eight columns in ASM's order."""
    return gl.inline_asm_elementwise(
        ASM, "=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r", [x, scale], dtype=(gl.int8, gl.int8, gl.int8), is_pure=True,
        pack=8,
    )  # fmt: skip


@gluon.jit
def _scale_of(chunks, DTYPE: gl.constexpr):
    """By what each split's columns are multiplied, and what a product of its integers is worth then."""
    largest = chunks[0].to(gl.int16, bitcast=True) & 0x7FFF  # no bits are more than those of NaN
    for i in gl.static_range(1, len(chunks)):
        largest = gl.maximum(largest, chunks[i].to(gl.int16, bitcast=True) & 0x7FFF)
    largest = gl.max(largest.to(gl.int32), 1).to(gl.int16).to(DTYPE, bitcast=True).to(gl.float32)
    exponent = gl.maximum(largest.to(gl.int32, bitcast=True) >> 23, 21)  # with less, one of them is no float32
    scale, worth = (274 - exponent) << 23, (exponent - 20) << 23
    return scale.to(gl.float32, bitcast=True), worth.to(gl.float32, bitcast=True) + (largest - largest)


@gluon.jit
def _share(x, scale, KIND: gl.constexpr):
    """The digits of a chunk in shared memory, as `digits_at` loads them with the fewest instructions."""
    SPLITS: gl.constexpr = gl.num_warps()
    if KIND == "int8":
        high, middle, low = three_of(x, scale, INT8_FLOAT16 if gl.float16 == x.dtype else INT8_BFLOAT16)
        digits = gl.join(gl.join(high, low), gl.join(middle, middle))
        # Split, two words, one of them, octet, digit; to be split, two words, one of them, digit, octet.
        digits = gl.permute(gl.reshape(digits, (SPLITS, CHUNK // 8, 2, 4, DIGITS)), (0, 1, 2, 4, 3))
        PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
        return gl.allocate_shared_memory(gl.int8, [SPLITS, CHUNK // 8, 2, DIGITS, 4], PLAIN, digits)
    else:
        high, middle, low = three_of(x, scale, INT4_FLOAT16 if gl.float16 == x.dtype else INT4_BFLOAT16)
        digits = gl.join(gl.join(high, low), gl.join(middle, middle))
        digits = gl.permute(gl.reshape(digits, (SPLITS, CHUNK, DIGITS)), (0, 2, 1))
        SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 4, [2, 1, 0])
        return gl.allocate_shared_memory(gl.int8, [SPLITS, DIGITS, CHUNK], SWIZZLED, digits)


@gluon.jit
def columns_of(x_ptr, DEPTH: gl.constexpr, WIDTH: gl.constexpr):
    """DEPTH columns, WIDTH for each split, in chunks; what to multiply them by; what a split's sums are then worth."""
    SPLITS: gl.constexpr = gl.num_warps()
    X: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [SPLITS, 1], [1, 0])
    column = gl.arange(0, SPLITS, gl.SliceLayout(1, X))[:, None] * WIDTH
    column = column + gl.arange(0, CHUNK, gl.SliceLayout(0, X))[None, :]
    chunks = ()
    for start in gl.static_range(0, WIDTH, CHUNK):
        if DEPTH == SPLITS * WIDTH and WIDTH % CHUNK == 0:
            chunks = chunks + (gl.load(x_ptr + column + start),)
        else:  # a split's last chunk may go on with the next one's columns, of which the digits are not used
            chunks = chunks + (gl.load(x_ptr + column + start, mask=column + start < DEPTH, other=0.0),)
    scale, worth = _scale_of(chunks, x_ptr.dtype.element_ty)
    return chunks, gl.broadcast(scale[:, None], column)[0], worth


@gluon.jit
def in_digits(chunks, scale, FIRST: gl.constexpr, COUNT: gl.constexpr, KIND: gl.constexpr):
    """The digits of COUNT chunks, or of as many as there are."""
    shared = ()
    for i in gl.static_range(FIRST, FIRST + COUNT):
        if i < len(chunks):
            shared = shared + (_share(chunks[i], scale, KIND),)
    return shared


@gluon.jit
def digits_at(shared, STEP: gl.constexpr, KIND: gl.constexpr, COLUMNS: gl.constexpr):
    """The right operand of a step to `widen.octets`' left one: (splits, columns, 8).

    Of int8 four of the eight have the digits of one part of the step's columns and four those of the other; of int4
    both have those of all.
    """
    SPLITS: gl.constexpr = gl.num_warps()
    START: gl.constexpr = STEP * COLUMNS % CHUNK
    chunk = shared[STEP * COLUMNS // CHUNK]
    if KIND == "int8":
        PARTS: gl.constexpr = gl.BlockedLayout([1, 2, 1, 1, 4], [1, 4, 2, 4, 1], [SPLITS, 1, 1, 1, 1], [4, 1, 3, 2, 0])
        x = chunk.slice(START // 8, COLUMNS // 8, 1).load(PARTS)
        # Split, thread, half of a product, part, digit, octet.
        x = gl.permute(gl.reshape(x, (SPLITS, 4, 2, 2, DIGITS, 4)), (0, 2, 1, 5, 3, 4))
        return gl.reshape(x, (SPLITS, COLUMNS // 2, 8))
    else:
        TWICE: gl.constexpr = gl.BlockedLayout(
            [1, 1, 1, COLUMNS // 4], [1, 2, DIGITS, 4], [SPLITS, 1, 1, 1], [3, 2, 1, 0]
        )
        x = gl.expand_dims(chunk.slice(START, COLUMNS, 2).load(gl.SliceLayout(1, TWICE)), 1)
        x = gl.broadcast(x, gl.full([SPLITS, 2, DIGITS, COLUMNS], 0, gl.int8, TWICE))[0]
        # Split, part and digit, thread, product, half of it, octet.
        x = gl.permute(gl.reshape(x, (SPLITS, 8, 4, COLUMNS // 32, 2, 4)), (0, 3, 4, 2, 5, 1))
        return gl.reshape(x, (SPLITS, COLUMNS, 8))


@gluon.jit
def worth_of(sums, worth, KIND: gl.constexpr, ROWS: gl.constexpr):
    """Sums of products by digits as those of x, of all splits: (ROWS, 1)."""
    SPLITS: gl.constexpr = gl.num_warps()
    n = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, sums.type.layout)))[None, :][:, None, :]
    digit = gl.where(n % 4 == 0, 65536.0, gl.where(n % 4 == 1, 256.0, gl.where(n % 4 == 2, 1.0, 0.0)))
    if KIND == "int8":
        r = gl.arange(0, 2 * ROWS, gl.SliceLayout(0, gl.SliceLayout(2, sums.type.layout)))[None, :][:, :, None]
        digit = gl.where(n // 4 == r // 8 % 2, digit, 0.0)
        # Split, eight rows, part, row, part and digit.
        acc = gl.sum(gl.sum(gl.reshape(sums.to(gl.float32) * digit, (SPLITS, ROWS // 8, 2, 8, 8)), 4), 2)
    else:
        acc = gl.sum(sums * gl.where(n < 4, digit * 2.0**-4, 0.0), 2)
    acc = gl.reshape(acc, (SPLITS, ROWS, 1))
    worth = gl.convert_layout(worth, gl.SliceLayout(1, gl.SliceLayout(2, acc.type.layout)))
    return gl.sum(acc * worth[:, None][:, :, None], 0)
