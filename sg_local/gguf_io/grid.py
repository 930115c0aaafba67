"""Adds a small change to quantized weights without losing it, on the quantization grid that they have.

    Q4_1 block: value = d · q + m, q in 0..15, and a change of 0.01 d for each of its 32 values
    rounding      q stays: the change is gone, and the merged file answers as its base did
    here          q + 1 at every 100th place of the row, from a random one on

Quantized values lie exactly on their grid. An adapter adds far less than half a step (measured on SmolLM2-135M in
Q4_1: a hundredth), so rounding to the nearest grid point would restore the old value. Instead, the sizes of a row's
changes, in steps, are summed along the row from a random start, and a value moves by one step wherever the sum passes
a whole number ("systematic sampling"). So the expected change of each value is exact, and the number of steps in a row
is right to within one. The scales of a block stay as they are, so no other value changes.

A value at the end of its block's range can only move inwards; a change outwards is lost: 4 % of an adapter in Q4_1,
1 % in Q8_0. The method adds noise: for changes of 1/200 of a step, as much as rounding to a grid four times as fine.

Block layouts: ggml's ggml-common.h (block_q4_0 and the following), as in the gguf package's quants.py.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from sg_local.gguf_io.tensors import Floats

Bytes: TypeAlias = npt.NDArray[np.uint8]
Places: TypeAlias = npt.NDArray[np.uint8]  # of values in the range of their block: q

_FOUR, _LOW_FOUR, _SIGN = np.uint8(4), np.uint8(15), np.uint8(128)

# Rows are added to in parts of about so many values: a dozen arrays of that size fit a core's cache.
PART_ELEMENTS = 64 * 1024


class Grid(NamedTuple):
    """A quantized type: value = step · q + offset, q in 0..highest; a block has one step or several."""

    block_bytes: int
    block_elements: int
    highest: int
    steps: Callable[[Bytes], Floats]  # blocks (n, block_bytes) -> (n, steps of a block)
    read: Callable[[Bytes], Places]  # blocks -> q (n, block_elements)
    write: Callable[[Bytes, Places], None]  # puts q into the blocks


def _float16(blocks: Bytes, at: int) -> Floats:
    """The float16 number at byte `at` of each block, (n, 1)."""
    column: Floats = blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)
    return column


def _first_float16(blocks: Bytes) -> Floats:
    return _float16(blocks, 0)


def _read_nibbles(qs: Bytes) -> Places:
    """(n, m) bytes -> (n, 2 · m): low halves first."""
    q = np.empty((len(qs), 2, qs.shape[1]), np.uint8)
    np.bitwise_and(qs, 15, out=q[:, 0])
    np.right_shift(qs, 4, out=q[:, 1])
    return q.reshape(len(qs), -1)


def _write_nibbles(q: Places) -> Bytes:
    halves = q.reshape(len(q), 2, -1)
    qs: Bytes = halves[:, 1] << _FOUR
    qs |= halves[:, 0]
    return qs


def _nibble_grid(block_bytes: int, qs_at: int, qh_at: int | None) -> Grid:
    """Q4_0, Q4_1 (four bits at byte qs_at) and Q5_0, Q5_1 (fifth bits in a 32-bit word at qh_at)."""

    def read(blocks: Bytes) -> Places:
        q = _read_nibbles(blocks[:, qs_at:])
        if qh_at is not None:
            q |= np.unpackbits(blocks[:, qh_at : qh_at + 4], axis=1, bitorder="little") << 4
        return q

    def write(blocks: Bytes, q: Places) -> None:
        blocks[:, qs_at:] = _write_nibbles(q & _LOW_FOUR)
        if qh_at is not None:
            blocks[:, qh_at : qh_at + 4] = np.packbits(q >> 4, axis=1, bitorder="little")

    return Grid(block_bytes, 32, 15 if qh_at is None else 31, _first_float16, read, write)


def _read_q8_0(blocks: Bytes) -> Places:
    return blocks[:, 2:] ^ _SIGN  # a signed byte and 128


def _write_q8_0(blocks: Bytes, q: Places) -> None:
    blocks[:, 2:] = q ^ _SIGN


def _k_steps(blocks: Bytes) -> Floats:
    """Q4_K and Q5_K: d times a six-bit scale for each 32 values, packed as ggml's get_scale_min_k4 reads it."""
    packed = blocks[:, 4:16]
    low = packed[:, 0:4] & 63
    high = (packed[:, 8:12] & 15) | ((packed[:, 0:4] >> 6) << 4)
    scales: Floats = np.concatenate([low, high], axis=1).astype(np.float32)
    return _float16(blocks, 0) * scales


def _read_k_nibbles(qs: Bytes) -> Places:
    """(n, 128) bytes -> (n, 256): each 32 bytes hold 64 values, low halves first."""
    return _read_nibbles(np.ascontiguousarray(qs).reshape(-1, 32)).reshape(len(qs), 256)


def _write_k_nibbles(q: Places) -> Bytes:
    return _write_nibbles(q.reshape(-1, 64)).reshape(len(q), 128)


def _read_q4_k(blocks: Bytes) -> Places:
    return _read_k_nibbles(blocks[:, 16:])


def _write_q4_k(blocks: Bytes, q: Places) -> None:
    blocks[:, 16:] = _write_k_nibbles(q)


def _read_q5_k(blocks: Bytes) -> Places:
    q = _read_k_nibbles(blocks[:, 48:])
    # bit j of byte i is the fifth bit of value i of the j-th 32
    fifth = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little")  # (n, 32, 8)
    return q | (fifth.transpose(0, 2, 1).reshape(len(blocks), 256) << _FOUR)


def _write_q5_k(blocks: Bytes, q: Places) -> None:
    blocks[:, 48:] = _write_k_nibbles(q & _LOW_FOUR)
    fifth = (q >> 4).reshape(len(q), 8, 32).transpose(0, 2, 1)
    blocks[:, 16:48] = np.packbits(fifth, axis=2, bitorder="little")[:, :, 0]


def _q6_k_steps(blocks: Bytes) -> Floats:
    """d times a signed scale for each 16 values."""
    scales: Floats = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return _float16(blocks, 208) * scales


def _read_q6_k(blocks: Bytes) -> Places:
    # Two halves of 128 values; in each, two rows of 32 bytes hold four bits of 128 values, one row two bits.
    low = blocks[:, 0:128].reshape(-1, 2, 2, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 32)
    q = np.empty((len(blocks), 2, 4, 32), np.uint8)
    np.bitwise_and(low, 15, out=q[:, :, 0:2])
    np.right_shift(low, 4, out=q[:, :, 2:4])
    for row in range(4):
        q[:, :, row] |= ((high >> (2 * row)) & 3) << 4
    return q.reshape(len(blocks), 256)


def _write_q6_k(blocks: Bytes, q: Places) -> None:
    parts = q.reshape(-1, 2, 4, 32)
    low, top = parts & 15, parts >> 4
    blocks[:, 0:128] = (low[:, :, 0:2] | (low[:, :, 2:4] << 4)).reshape(len(q), 128)
    high = top[:, :, 0] | (top[:, :, 1] << 2) | (top[:, :, 2] << 4) | (top[:, :, 3] << 6)
    blocks[:, 128:192] = high.reshape(len(q), 64)


GRIDS = {
    "Q4_0": _nibble_grid(18, 2, None),
    "Q4_1": _nibble_grid(20, 4, None),
    "Q5_0": _nibble_grid(22, 6, 2),
    "Q5_1": _nibble_grid(24, 8, 4),
    "Q8_0": Grid(34, 32, 255, _first_float16, _read_q8_0, _write_q8_0),
    "Q4_K": Grid(144, 256, 15, _k_steps, _read_q4_k, _write_q4_k),
    "Q5_K": Grid(176, 256, 31, _k_steps, _read_q5_k, _write_q5_k),
    "Q6_K": Grid(210, 256, 63, _q6_k_steps, _read_q6_k, _write_q6_k),
}


def add_on_grid(rows: Bytes, change: Floats, type_name: str, rng: np.random.Generator) -> Bytes:
    """Quantized rows (n_rows, row_bytes) with a change (n_rows, n_columns) added; type_name is one of GRIDS.

    Each value moves to one of the two grid points around the sum, or to the end of its block's range. A block
    whose step is 0 stays as it is. The change has to be finite.

    Raises ValueError if a step is NaN or infinite.
    """
    result = rows.copy()
    n_rows = max(1, PART_ELEMENTS // change.shape[1])
    for start in range(0, len(rows), n_rows):
        part = slice(start, start + n_rows)
        _add_to_part(result[part].reshape(-1, GRIDS[type_name].block_bytes), change[part], type_name, rng)
    return result


def _add_to_part(blocks: Bytes, change: Floats, type_name: str, rng: np.random.Generator) -> None:
    """`add_on_grid` on a few rows, in place: blocks (n, block_bytes), change (n_rows, n_columns)."""
    grid = GRIDS[type_name]
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged block may hold anything
        steps = grid.steps(blocks)
    if not np.isfinite(steps).all():
        raise ValueError(f"a block of {type_name} has a scale that is NaN or infinite")
    steps[steps == 0] = np.inf  # over it, a change is 0
    values = np.empty_like(change)
    with np.errstate(over="ignore"):  # a change over a tiny step; limited below
        np.divide(change.reshape(steps.size, -1), steps.reshape(-1, 1), out=values.reshape(steps.size, -1))
    places = grid.read(blocks).reshape(change.shape)
    q = places.astype(np.float32)
    # Without the limits, whole steps would be given to values that cannot move.
    np.maximum(values, -q, out=values)
    np.minimum(values, grid.highest - q, out=values)
    # Sizes, without signs: a signed sum goes up and down. It passes a whole number many times in one row and never in
    # the next, which makes an adapter 3 to 8 times noisier in its strongest direction. Double precision, since a row
    # may have tens of thousands of columns with changes of a thousandth of a step.
    sums = np.abs(values, dtype=np.float64)
    np.cumsum(sums, axis=1, out=sums)
    sums += rng.random((len(change), 1))
    passed = sums.astype(np.int32)  # rounds down: no sum is below 0
    taken = passed.astype(np.float32)
    np.subtract(passed[:, 1:], passed[:, :-1], out=taken[:, 1:], casting="unsafe")
    np.copysign(taken, values, out=taken)
    q += taken
    # A sum that was rounded up to a whole number could move a value one step too far.
    np.clip(q, 0, grid.highest, out=q)
    np.copyto(places, q, casting="unsafe")
    grid.write(blocks, places.reshape(len(blocks), -1))


def round_to_bfloat16(values: Floats, rng: np.random.Generator) -> Bytes:
    """Finite values (n_rows, n_columns) as BF16 rows (n_rows, 2 · n_columns), up or down at random.

    The expected result is the value itself. BF16 is a grid too: its steps are 1/256 to 1/128 of a value, and
    rounding to the nearest loses a quarter of an adapter (measured on SmolLM2-135M). The steps of F16 are an
    eighth of that and lose less than 1/500.
    """
    # bfloat16 is the upper half of a float32.
    bits = values.view(np.uint32) + rng.integers(0, 1 << 16, values.shape, np.uint32)
    rows: Bytes = (bits >> 16).astype(np.uint16).view(np.uint8)
    return rows
