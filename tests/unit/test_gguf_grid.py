"""Changes added on the grid of quantized blocks: nothing is lost on average, and nothing else moves.

Two kinds of rows: what the gguf package's quantizer makes of normal weights (it has none for K-quants; the tests
with a model take llama.cpp's), and random bytes with powers of two for scales, which reach every value of every
type and on which float32 arithmetic is exact.
"""

import hashlib
from typing import Any

import gguf
import numpy as np
import pytest

from sg_local.gguf_io.grid import GRIDS, add_on_grid, round_to_bfloat16

N_COLUMNS = 512
# type → where its blocks have half-precision numbers: first the scale, then the offset's
FLOAT16_AT = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
QUANTIZED_BY_GGUF = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]

# The first digits of the SHA-256 of rows with changes: an export of the same adapter gives the same file as ever.
DIGESTS = {
    "Q4_0": "b86287ebca7bdf9c",
    "Q4_1": "e796755bfc5782d5",
    "Q5_0": "aa91def4b71704ba",
    "Q5_1": "479655f433a57b20",
    "Q8_0": "d478176607d7c5c6",
    "Q4_K": "7abb46d12ca08ccd",
    "Q5_K": "f4312a3e26082047",
    "Q6_K": "4950c8b9720dcd1c",
}

every_type = pytest.mark.parametrize("type_name", GRIDS)


def random_rows(type_name: str, n_rows: int, *, seed: int = 0) -> Any:
    """Rows (n_rows, row_bytes) of random bytes with scales of ±2**-5 and offsets of -2**-4."""
    grid = GRIDS[type_name]
    random = np.random.default_rng(seed)
    blocks = random.integers(
        0, 256, (n_rows * N_COLUMNS // grid.block_elements, grid.block_bytes), dtype=np.uint8
    )
    for at, value in zip(FLOAT16_AT[type_name], (2.0**-5, -(2.0**-4)), strict=False):
        halves = np.full((len(blocks), 1), value, np.float16)
        halves[::3] *= -1
        blocks[:, at : at + 2] = halves.view(np.uint8)
    return blocks.reshape(n_rows, -1)


def set_all(type_name: str, rows: Any, q: int) -> Any:
    """The rows with every value at the same place of its block's range."""
    grid = GRIDS[type_name]
    blocks = rows.reshape(-1, grid.block_bytes).copy()
    grid.write(blocks, np.full((len(blocks), grid.block_elements), q, np.uint8))
    return blocks.reshape(rows.shape)


def places(type_name: str, rows: Any) -> Any:
    """Where in its range each value is: q (n_rows, N_COLUMNS)."""
    grid = GRIDS[type_name]
    return grid.read(rows.reshape(-1, grid.block_bytes)).reshape(len(rows), -1).astype(int)


def steps_of(type_name: str, rows: Any) -> Any:
    """The step of each value, (n_rows, n_columns) float32."""
    grid = GRIDS[type_name]
    steps = grid.steps(rows.reshape(-1, grid.block_bytes))
    return np.repeat(steps, grid.block_elements // steps.shape[1], axis=1).reshape(len(rows), -1)


def dequantize(type_name: str, rows: Any) -> Any:
    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[type_name])


def quantize(type_name: str, values: Any) -> Any:
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[type_name])


@every_type
def test_what_is_read_is_written_and_nothing_else(type_name: str) -> None:
    grid = GRIDS[type_name]
    blocks = random_rows(type_name, 16).reshape(-1, grid.block_bytes)
    q = grid.read(blocks)
    assert (q.min(), q.max()) == (0, grid.highest)
    again = set_all(type_name, blocks, 0)
    assert not grid.read(again).any()
    grid.write(again, q)
    assert np.array_equal(again, blocks)
    assert blocks.shape[1] == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]][1]


@every_type
def test_values_are_steps_times_places(type_name: str) -> None:
    """Against the gguf package: what is left without step · q is the same for all values of one step."""
    rows = random_rows(type_name, 16)
    offsets = dequantize(type_name, rows) - steps_of(type_name, rows) * places(type_name, rows)
    n_of_one_step = 16 if type_name == "Q6_K" else 32
    groups = offsets.reshape(-1, n_of_one_step)
    assert np.array_equal(groups, np.broadcast_to(groups[:, :1], groups.shape))


@every_type
def test_values_change_by_the_steps_taken_to_a_neighbour_of_the_sum(type_name: str) -> None:
    rows, grid = random_rows(type_name, 16), GRIDS[type_name]
    steps, q = steps_of(type_name, rows), places(type_name, rows)
    wanted = np.random.default_rng(1).normal(size=steps.shape).astype(np.float32) * 3  # in steps
    after = add_on_grid(rows, wanted * steps, type_name, np.random.default_rng(2))
    taken = places(type_name, after) - q
    assert np.array_equal(dequantize(type_name, after) - dequantize(type_name, rows), steps * taken)
    moving = steps != 0
    possible = np.clip(wanted, -q, grid.highest - q)
    assert (np.abs(taken - possible)[moving] < 1).all()
    assert not taken[~moving].any()
    at_the_end = moving & (possible != wanted)
    assert at_the_end.sum() > 50
    assert np.array_equal(taken[at_the_end], possible[at_the_end])
    # Scales and offsets are what they were.
    assert np.array_equal(set_all(type_name, after, 0), set_all(type_name, rows, 0))


@every_type
def test_whole_steps_are_taken_as_they_are(type_name: str) -> None:
    rows = random_rows(type_name, 16)
    steps, q = steps_of(type_name, rows), places(type_name, rows)
    wanted = np.random.default_rng(3).integers(-5, 6, size=steps.shape)
    after = add_on_grid(rows, (wanted * steps).astype(np.float32), type_name, np.random.default_rng(4))
    expected = np.where(steps != 0, np.clip(q + wanted, 0, GRIDS[type_name].highest), q)
    assert np.array_equal(places(type_name, after), expected)


@every_type
def test_no_change_leaves_every_byte(type_name: str) -> None:
    rows = random_rows(type_name, 8)
    nothing = np.zeros((8, N_COLUMNS), np.float32)
    assert np.array_equal(add_on_grid(rows, nothing, type_name, np.random.default_rng(0)), rows)
    # Also beside values that change, and after them in the row.
    some = nothing.copy()
    some[:, 1::3] = steps_of(type_name, rows)[:, 1::3] * 0.3
    after = add_on_grid(rows, some, type_name, np.random.default_rng(0))
    changed = places(type_name, after) != places(type_name, rows)
    assert changed.any()
    assert not changed[some == 0].any()


@every_type
def test_expected_change_of_each_value_is_exact(type_name: str) -> None:
    n_rows = 4000  # copies of one row: each has its own random start
    row = random_rows(type_name, 1)
    steps, q = steps_of(type_name, row), places(type_name, row)
    random = np.random.default_rng(5)
    wanted = random.uniform(0.05, 2, size=steps.shape) * random.choice([-1, 1], size=steps.shape)
    change = (wanted * steps).astype(np.float32)
    rows, changes = np.repeat(row, n_rows, axis=0), np.repeat(change, n_rows, axis=0)
    taken = places(type_name, add_on_grid(rows, changes, type_name, np.random.default_rng(6))) - q
    possible = np.where(steps != 0, np.clip(wanted, -q, GRIDS[type_name].highest - q), 0)[0]
    fractions = possible % 1
    standard_errors = np.sqrt(fractions * (1 - fractions) / n_rows)
    errors = np.abs(taken.mean(axis=0) - possible)
    # Six standard errors in one of 512 columns: a false alarm in a million; 1e-6 is float32's own error.
    assert (errors <= 6 * standard_errors + 1e-6).all()
    assert standard_errors.max() < 0.01


@every_type
def test_each_row_takes_as_many_steps_as_it_should(type_name: str) -> None:
    """Also where changes go up and down: sums of signed changes would give a row many steps or none."""
    rows = random_rows(type_name, 200)
    steps, q = steps_of(type_name, rows), places(type_name, rows)
    wanted = np.random.default_rng(14).normal(size=steps.shape) * 0.02
    after = add_on_grid(rows, (wanted * steps).astype(np.float32), type_name, np.random.default_rng(15))
    n_steps = np.abs(places(type_name, after) - q).sum(axis=1)
    possible = np.where(steps != 0, np.clip(wanted, -q, GRIDS[type_name].highest - q), 0)
    n_wanted = np.abs(possible).sum(axis=1)
    assert n_wanted.min() > 5
    assert (np.abs(n_steps - n_wanted) < 1 + 1e-3).all()


@every_type
def test_values_at_the_end_of_their_range_go_inwards_only(type_name: str) -> None:
    highest = GRIDS[type_name].highest
    for end, inwards in ((0, 1), (highest, -1)):
        rows = set_all(type_name, random_rows(type_name, 8), end)
        steps = steps_of(type_name, rows)
        for outwards in (0.6, 3, 1e6):
            after = add_on_grid(rows, -inwards * outwards * steps, type_name, np.random.default_rng(7))
            assert np.array_equal(after, rows), outwards
        after = add_on_grid(rows, inwards * np.float32(1e30) * steps, type_name, np.random.default_rng(7))
        assert np.array_equal(places(type_name, after), np.where(steps != 0, highest - end, end))


class AlmostOne:
    """The largest random start there is: with it, a sum of whole steps is rounded up to the next one."""

    def random(self, shape: tuple[int, ...]) -> Any:
        return np.full(shape, np.nextafter(1, 0))


@every_type
def test_no_step_goes_over_the_end_where_a_sum_is_rounded_up(type_name: str) -> None:
    highest = GRIDS[type_name].highest
    rows = set_all(type_name, random_rows(type_name, 2), highest - 1)
    steps = steps_of(type_name, rows)
    after = add_on_grid(rows, steps, type_name, AlmostOne())  # type: ignore[arg-type]
    assert np.array_equal(places(type_name, after), np.where(steps != 0, highest, highest - 1))


@every_type
def test_the_seed_decides_the_bytes(type_name: str) -> None:
    rows = random_rows(type_name, 64)
    change = steps_of(type_name, rows) * np.float32(0.3)

    def added(seed: int) -> Any:
        return add_on_grid(rows, change, type_name, np.random.default_rng(seed))

    before = rows.copy()
    assert np.array_equal(added(0), added(0))
    assert np.array_equal(rows, before)  # the caller's rows are left alone
    # Two seeds agree only where each of 64 rows draws about the same tenth of [0, 1): 10**-64.
    assert not np.array_equal(added(0), added(1))
    # Rows in several calls are the rows in one call.
    random = np.random.default_rng(0)
    parts = [add_on_grid(rows[i : i + 7], change[i : i + 7], type_name, random) for i in range(0, 64, 7)]
    assert np.array_equal(np.concatenate(parts), added(0))


@every_type
def test_the_bytes_stay_what_they_were(type_name: str) -> None:
    rows = random_rows(type_name, 4)
    wanted = np.random.default_rng(16).integers(-96, 97, (4, N_COLUMNS)) / 64  # in steps; exact in float32
    change = (wanted * steps_of(type_name, rows)).astype(np.float32)
    after = add_on_grid(rows, change, type_name, np.random.default_rng(17))
    assert hashlib.sha256(after.tobytes()).hexdigest()[:16] == DIGESTS[type_name]


@every_type
def test_blocks_without_a_step_stay_and_broken_scales_are_refused(type_name: str) -> None:
    rows, grid = random_rows(type_name, 2), GRIDS[type_name]
    at = FLOAT16_AT[type_name][0]
    change = np.ones((2, N_COLUMNS), np.float32)

    def with_scale(value: float) -> Any:
        blocks = rows.reshape(-1, grid.block_bytes).copy()
        blocks[:, at : at + 2] = np.array([value], np.float16).view(np.uint8)
        return blocks.reshape(rows.shape)

    random = np.random.default_rng(0)
    assert np.array_equal(add_on_grid(with_scale(0.0), change, type_name, random), with_scale(0.0))
    tiny = add_on_grid(with_scale(6e-8), change * np.float32(3e38), type_name, random)
    assert np.isin(places(type_name, tiny)[steps_of(type_name, tiny) != 0], (0, grid.highest)).all()
    for broken in (np.nan, np.inf):
        with pytest.raises(ValueError, match=f"a block of {type_name} has a scale that is NaN or infinite"):
            add_on_grid(with_scale(broken), change, type_name, random)


def low_rank_change(shape: tuple[int, int], size: float) -> Any:
    """What a LoRA of rank 4 adds, with a root mean square of `size`."""
    random = np.random.default_rng(8)
    change = random.normal(size=(shape[0], 4)) @ random.normal(size=(4, shape[1]))
    return (change * size / np.sqrt((change**2).mean())).astype(np.float32)


def kept_share(change: Any, got: Any) -> float:
    """The part of a change that arrived: 1 where it did on average, 0 where nothing or only noise did."""
    return float((got * change).sum() / (change * change).sum())


@pytest.mark.parametrize("type_name", QUANTIZED_BY_GGUF)
def test_nearest_rounding_loses_an_adapter_and_the_grid_keeps_it(type_name: str) -> None:
    """The reason for this module: merged by nearest rounding, a tuned model was its base."""
    weights = np.random.default_rng(9).normal(size=(512, N_COLUMNS)).astype(np.float32) * 0.1
    rows = quantize(type_name, weights)
    steps, q = steps_of(type_name, rows), places(type_name, rows)
    change = low_rank_change(steps.shape, 0.01 * float(np.abs(steps).mean()))
    # The outermost values of each block set its scale; let them be, so that it is the same grid.
    values = dequantize(type_name, rows).reshape(-1, 32)
    outermost = (values == values.max(axis=1, keepdims=True)) | (values == values.min(axis=1, keepdims=True))
    change[outermost.reshape(change.shape)] = 0

    before = dequantize(type_name, rows)
    assert np.array_equal(
        quantize(type_name, before + change), rows
    )  # nearest rounding: the base's own bytes

    after = add_on_grid(rows, change, type_name, np.random.default_rng(10))
    got = dequantize(type_name, after) - before
    # A value's error has the variance step² · p(1 - p), p its change in steps, and a row's errors make up for
    # each other; the share's standard error is 0.027 at most, and six of it are a false alarm in 500 million.
    p = np.abs(change / steps)
    standard_error = np.sqrt((change**2 * steps**2 * p * (1 - p)).sum()) / (change**2).sum()
    assert standard_error < 0.03
    assert abs(kept_share(change, got) - 1) < 6 * standard_error
    assert 0.001 < (places(type_name, after) != q).mean() < 0.02


def test_bfloat16_is_rounded_up_or_down_with_the_right_odds() -> None:
    random = np.random.default_rng(11)
    on_grid = dequantize("BF16", quantize("BF16", random.normal(size=(64, 64)).astype(np.float32)))
    assert np.array_equal(round_to_bfloat16(on_grid, random), quantize("BF16", on_grid))

    values = random.normal(size=256).astype(np.float32)
    n = 4000
    rounded = dequantize("BF16", round_to_bfloat16(np.tile(values, (n, 1)), random))
    low, high = rounded.min(axis=0), rounded.max(axis=0)
    nearest = dequantize("BF16", quantize("BF16", values[None]))[0]
    assert ((low == nearest) | (high == nearest)).all()
    assert ((low <= values) & (values <= high)).all()
    # Six standard errors in one of 256 values: a false alarm in 2 million. A value beside a grid point may have
    # been rounded to it every time; then the error is less than 1/100 of a step, of at most 1/128 of the value.
    standard_errors = (high - low) / 2 / np.sqrt(n)
    bounds = 6 * standard_errors + np.abs(values) * 2**-7 / 100
    assert (np.abs(rounded.mean(axis=0, dtype=np.float64) - values) <= bounds).all()
    largest = np.full((1, 2), 2.0**128 - 2.0**120, np.float32)
    assert np.isfinite(dequantize("BF16", round_to_bfloat16(largest, random))).all()


def test_nearest_rounding_to_bfloat16_loses_a_part_and_the_odds_keep_it() -> None:
    weights = np.random.default_rng(12).normal(size=(512, N_COLUMNS)).astype(np.float32) * 0.1
    before = dequantize("BF16", quantize("BF16", weights))
    change = low_rank_change(before.shape, 1e-4)
    nearest = dequantize("BF16", quantize("BF16", before + change)) - before
    assert kept_share(change, nearest) < 0.7
    got = dequantize("BF16", round_to_bfloat16(before + change, np.random.default_rng(13))) - before
    # The error of a value is under half a step, 1/256 of it: the share's standard error is 0.008
    # at most.
    standard_error = np.sqrt((change**2 * (before / 256) ** 2).sum()) / (change**2).sum()
    assert standard_error < 0.01
    assert abs(kept_share(change, got) - 1) < 6 * standard_error
