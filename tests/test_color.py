"""Colour correction; parity with the published code is in the golden tests."""

import numpy as np
import pytest

from dpir_jax.restore import color


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return rng.random((150, 90, 3), np.float32), rng.random((150, 90, 3), np.float32) ** 2


@pytest.mark.parametrize("method", ["wavelet", "adain"])
@pytest.mark.parametrize("rows", [1, 32, 149])
def test_strips_give_what_the_whole_gives(pair, method, rows):
    run = getattr(color, method)
    whole = np.concatenate([values for _, values in run(*pair, rows=1000)])
    strips = list(run(*pair, rows=rows))
    np.testing.assert_allclose(np.concatenate([values for _, values in strips]), whole, atol=2e-6)
    assert [part.start for part, _ in strips] == list(range(0, 150, rows))


@pytest.mark.parametrize("method", color.METHODS)
def test_a_photo_keeps_its_own_colours(pair, method):
    np.testing.assert_allclose(color.match_color(pair[0], pair[0], method), pair[0], atol=1e-5)


@pytest.mark.parametrize("method", ["wavelet", "adain"])
def test_a_tint_is_taken_back(pair, method):
    tinted = pair[0] * 0.8 + np.float32([0.1, -0.05, 0.2])
    before = np.abs(tinted.mean((0, 1)) - pair[0].mean((0, 1))).max()
    after = np.abs(color.match_color(tinted, pair[0], method).mean((0, 1)) - pair[0].mean((0, 1))).max()
    assert after < 0.02 * before


def test_wavelet_keeps_the_detail(pair):
    content, reference = pair
    out = color.match_color(content, reference, "wavelet")
    np.testing.assert_allclose(out - color.low_pass(reference), content - color.low_pass(content), atol=1e-5)


def test_eight_bits_and_floats_agree(pair):
    bytes_ = [np.rint(255 * picture).astype(np.uint8) for picture in pair]
    floats = [picture.astype(np.float32) / 255 for picture in bytes_]
    for method in color.METHODS:
        np.testing.assert_allclose(color.match_color(*bytes_, method), color.match_color(*floats, method), atol=1e-6)
