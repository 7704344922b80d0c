import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dpir_jax.errors import InputError
from dpir_jax.models.layers import Keys
from dpir_jax.models.patch_autoencoder import (
    PatchAutoencoder,
    PatchAutoencoderConfig,
    PatchEncoder,
    from_patches,
    to_patches,
)


def smooth_pictures(rng, count=8, size=32):
    noise = rng.standard_normal((count, size, size, 3)).astype(np.float32)
    for axis in (1, 2):
        noise = sum(np.roll(noise, k, axis) for k in range(-3, 4)) / 7
    return np.clip(2 * noise, -1, 1)


def test_patches_round_trip():
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.uniform(-1, 1, (2, 12, 20, 3)), jnp.float32)
    np.testing.assert_array_equal(from_patches(to_patches(image, 4), 4), image)


def test_fit_gives_white_latents_and_good_pictures():
    pictures = smooth_pictures(np.random.default_rng(1))
    net = PatchAutoencoder(PatchAutoencoderConfig.nano(), rngs=Keys(0))
    net.fit(pictures)
    latent, _ = net.encode(pictures)
    np.testing.assert_allclose(np.std(latent, axis=(0, 1, 2)), 1, atol=0.05)
    np.testing.assert_allclose(np.mean(latent, axis=(0, 1, 2)), 0, atol=0.05)
    error = np.mean((net.decode(latent) - pictures) ** 2)
    assert error < 0.08 * pictures.var()  # 16 of 48 channels of almost white colours


def test_neighbours_help():
    pictures = smooth_pictures(np.random.default_rng(4))
    errors = []
    for reach in (0, 1):
        net = PatchAutoencoder(PatchAutoencoderConfig(reach=reach), rngs=Keys(0))
        net.fit(pictures)
        errors.append(float(np.mean((net.decode(net.encode(pictures)[0]) - pictures) ** 2)))
    assert errors[1] < errors[0]


def test_all_channels_reconstruct_exactly():
    pictures = smooth_pictures(np.random.default_rng(2), size=48)
    net = PatchAutoencoder(PatchAutoencoderConfig(latent_channels=48, reach=0), rngs=Keys(0))
    net.fit(pictures)
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(net.decode(net.encode(pictures)[0]), pictures, atol=1e-3)


def test_the_robust_encoder_starts_as_the_plain_one_and_takes_any_grid():
    config = PatchAutoencoderConfig.tiny()
    robust = PatchEncoder(config, rngs=Keys(0))
    plain = PatchEncoder(dataclasses.replace(config, widths=(), depths=()), rngs=Keys(1))
    nnx.update(plain.project, nnx.state(robust.project))
    image = jnp.asarray(smooth_pictures(np.random.default_rng(3), 1, 32))[:, :28, :20]  # a 7 x 5 grid
    np.testing.assert_array_equal(robust(image)[0], plain(image)[0])
    assert robust(image)[0].shape == (1, 7, 5, 16)


def test_contradictory_settings_are_named():
    with pytest.raises(InputError, match="latent_channels"):
        PatchAutoencoderConfig(latent_channels=49)
    with pytest.raises(InputError, match="widths"):
        PatchAutoencoderConfig(widths=(8,))
