"""Windows, weights and blending."""

import numpy as np
import pytest

from dpir_jax.errors import InputError
from dpir_jax.restore import tiling
from dpir_jax.restore.tiling import TilePlan


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(16, 16, 4), (17, 16, 4), (100, 16, 4), (256, 128, 8), (64, 16, 0)]
)
def test_even_starts(length, tile, overlap):
    starts = tiling.even_starts(length, tile, overlap)
    gaps = np.diff(starts)
    assert starts[0] == 0
    assert starts[-1] == length - tile
    assert all(gaps <= tile - overlap)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1
    fewer = len(starts) - 1  # one window less could not cover the side
    assert fewer * tile - (fewer - 1) * overlap < length


def test_windows_that_cannot_be():
    for length, tile, overlap in ((8, 16, 4), (32, 16, 16), (32, 16, -1)):
        with pytest.raises(InputError, match="do not fit"):
            tiling.even_starts(length, tile, overlap)


def test_weights_are_symmetric_and_the_published_ones_are_not():
    ours, published = tiling.gaussian_weights(12, 12), tiling.gaussian_weights(12, 12, published=True)
    np.testing.assert_allclose(ours, ours[::-1, ::-1], rtol=1e-12)
    np.testing.assert_allclose(ours, ours.T, rtol=1e-12)
    assert published[0, 5] < published[-1, 5]
    np.testing.assert_allclose(published[:, 0], published[:, -1], rtol=1e-12)


@pytest.mark.parametrize("make", [TilePlan.even, TilePlan.published])
def test_shares_add_up_to_one(make):
    plan = make(37, 53, 16, 4)
    total = np.zeros((37, 53, 1))
    for number, (top, bottom, left, right) in enumerate(plan.windows):
        share = plan.share(number)
        assert share.min() > 0
        total[top:bottom, left:right] += share
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_a_tile_counts_least_at_its_border():
    plan = TilePlan.even(16, 28, 16, 4)
    share = plan.share(0)[8, 12:16, 0]  # where it meets its neighbour
    assert all(np.diff(share) < 0)
    assert share[-1] < 0.05
    assert TilePlan.even(128, 224, 128, 32).share(0)[64, -1, 0] < 0.015


@pytest.mark.parametrize("group", [1, 3, 100])
def test_blending_what_agrees_changes_nothing(group):
    plan = TilePlan.even(37, 53, 16, 4)
    canvas = np.random.default_rng(0).standard_normal((37, 53, 2)).astype(np.float32)
    done = []
    sizes = set()

    def compute(numbers):
        sizes.add(len(numbers))
        return plan.crop(canvas, numbers)

    blended = tiling.blend_tiles(compute, plan, 2, group=group, progress=done.append)
    np.testing.assert_allclose(blended, canvas, atol=1e-5)
    assert sizes == {group}
    assert sum(done) == len(plan)


def test_blending_follows_its_definition():
    plan = TilePlan.even(20, 28, 16, 4)
    tiles = np.random.default_rng(1).standard_normal((len(plan), 16, 16, 3))
    weights = tiling.gaussian_weights(16, 16)[..., None]
    total, norm = np.zeros((20, 28, 3)), np.zeros((20, 28, 1))
    for tile, (top, bottom, left, right) in zip(tiles, plan.windows):
        total[top:bottom, left:right] += weights * tile
        norm[top:bottom, left:right] += weights
    blended = tiling.blend_tiles(lambda numbers: tiles[numbers], plan, 3, group=2)
    np.testing.assert_allclose(blended, total / norm, atol=1e-5)


def test_a_plan_in_pixels():
    plan = TilePlan.even(20, 28, 16, 4).scaled(8)
    assert (plan.height, plan.width, plan.tile) == (160, 224, 128)
    assert plan.windows == [tuple(8 * n for n in window) for window in TilePlan.even(20, 28, 16, 4).windows]


def test_tiled_euler_with_an_exact_field_ends_at_its_goal():
    rng = np.random.default_rng(2)
    noise, goal = (rng.standard_normal((20, 28, 2)).astype(np.float32) for _ in range(2))
    plan = TilePlan.even(20, 28, 16, 4)
    for shifts in (None, [0, 3, 5]):
        turn = [0] * 3 if shifts is None else shifts

        def velocity(tiles, k, numbers, turn=turn):
            roll = (turn[k], turn[k])
            return plan.crop(np.roll(noise, roll, (0, 1)), numbers) - plan.crop(np.roll(goal, roll, (0, 1)), numbers)

        z = tiling.tiled_euler(velocity, noise, [1, 0.7, 0.2, 0], plan, group=2, shifts=shifts)
        np.testing.assert_allclose(z, goal, atol=1e-5)
