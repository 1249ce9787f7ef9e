"""Products on Hopper whose last tiles are cut into pieces: right with and without them, of all rows and of some."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from burnish.numerics import assert_close, oracle, randn
from burnish.op import OPS

import burnish.ops  # noqa: F401 isort: skip

pytest.importorskip("triton")

from burnish.kernels.launch import Launch, Target, recording
from burnish.kernels.matmul_configs import Product
from burnish.kernels.matmul_wgmma import matmul_wgmma
from burnish.kernels.matmul_wgmma_configs import matmul_wgmma_configs
from burnish.kernels.matmul_wgmma_pieces import multiply_piece
from tests.kernels.gluon_emulator import emulate

H200, SMS = Target((9, 0), 132), Target((9, 0), 8)
CONFIGS = {
    c["PIECE"]: c
    for c in matmul_wgmma_configs(Product(4096, 3072, 768, torch.float16, H200))
    if "PIECE" in dict(c.blocks)
}

# Rows, columns and depth of products on eight multiprocessors in tiles of 128 x 128, how many rows are wanted, and how
# many pieces of 32 and of 64 columns there are: some hang over; the last wave is full, or holds too many pieces; there
# is no whole wave; all in the first row of tiles.
CASES = [
    ((1100, 128, 392), None, {32: 4, 64: 2}),
    ((1100, 200, 720), None, {32: 8, 64: 4}),
    ((1100, 200, 392), 1025, {32: 8, 64: 4}),
    ((1200, 330, 392), 1100, {32: 0, 64: 6}),
    ((1100, 256, 392), 1024, {32: 0, 64: 0}),
    ((1100, 384, 392), 900, {32: 0, 64: 0}),
    ((1100, 128, 392), 600, {32: 0, 64: 0}),
    ((1100, 128, 392), 0, {32: 0, 64: 0}),
    ((300, 1200, 392), 100, {32: 8, 64: 4}),
]


@pytest.mark.parametrize("piece", [32, 64])
@pytest.mark.parametrize(("sizes", "live", "pieces"), CASES, ids=[f"{sizes} {live}" for sizes, live, _ in CASES])
def test_pieces(
    sizes: tuple[int, int, int], live: int | None, pieces: dict[int, int], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (rows, columns, depth), dtype = sizes, torch.float16
    x, residual = randn(1, rows, depth, dtype=dtype, seed=0), randn(1, rows, columns, dtype=dtype, seed=3)
    weight, bias = randn(columns, depth, dtype=dtype, seed=1) / math.sqrt(depth), randn(columns, dtype=dtype, seed=2)
    seen: list[Any] = []
    multiply = multiply_piece.fn
    monkeypatch.setattr(multiply_piece, "fn", lambda *args: (seen.append(args), multiply(*args)))
    wanted = rows if live is None else live
    x[:, wanted:] = math.nan
    launches: list[Launch] = []
    count = None if live is None else torch.tensor([live], dtype=torch.int32)
    with recording(launches.append, SMS):
        out = matmul_wgmma(x, weight, bias, "gelu", residual, config=CONFIGS[piece], live_rows=count)
    out.fill_(math.nan)
    emulate(launches[0])
    assert len(seen) == pieces[piece]
    assert out[:, wanted:].isnan().all()
    if wanted:
        op = OPS["linear"]
        args = op.bind(x[:, :wanted], weight, bias, "gelu", residual[:, :wanted])
        assert_close(out[:, :wanted], op.reference(*args), oracle(op.reference, *args))


def test_no_pieces_of_few_steps() -> None:
    """Stages are filled before it is known how many rows are wanted: they must be of a program's first tile."""
    assert set(CONFIGS) == {32, 64}
    for config in matmul_wgmma_configs(Product(4096, 3072, 192, torch.float16, H200)):
        assert "PIECE" not in dict(config.blocks)
