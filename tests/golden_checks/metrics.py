"""The published image-quality measures on pairs of photos."""

import functools
import re

import jax
import numpy as np

from dpir_jax.errors import InputError
from dpir_jax.images import to_float
from dpir_jax.metrics import DISTS, LPIPS, NIQE, psnr, ssim
from dpir_jax.metrics.weight_files import weight_path
from tests.fixtures import SHARED, Fixture

VGG_FILES = ("lpips_vgg16.safetensors", "dists_vgg16_alpha_beta.safetensors")
FIDELITY = {
    "psnr_rgb": functools.partial(psnr, channel="rgb"),
    "psnr_y601": psnr,
    "psnr_y601_crop4": functools.partial(psnr, crop=4),
    "ssim_rgb": functools.partial(ssim, channel="rgb"),
    "ssim_y601": ssim,
    "ssim_y601_crop4": functools.partial(ssim, crop=4),
    "ssim_y601_round_relu": functools.partial(ssim, round_relu=True),
}
NIQE_OPTIONS = {
    "niqe_ref": ("ref", "y601"),
    "niqe_dist": ("dist", "y601"),
    "niqe_gray_ref": ("ref", "grey"),
    "niqe_gray_dist": ("dist", "grey"),
}
LEARNED = ("lpips_alex", "lpips_vgg", "dists")

_niqe = jax.jit(lambda metric, image, kind, crop: metric(image, kind=kind, crop=crop), static_argnums=(2, 3))
_stages = jax.jit(lambda metric, a, b: metric.per_stage(metric.features(a), metric.features(b)))
_distance = jax.jit(lambda metric, a, b: metric(a, b))


def check_metrics(fixture: Fixture) -> None:
    names = fixture.config["names"]
    assert set(names) == {*FIDELITY, *NIQE_OPTIONS, *LEARNED}, (
        "the fixture holds a metric that this check does not know"
    )
    ref, dist = to_float(fixture["input/ref"]), to_float(fixture["input/dist"])
    for name in FIDELITY:
        _close(fixture, name, FIDELITY[name](ref, dist), name[:4])
    _check_niqe(fixture, {"ref": ref, "dist": dist})
    _check_lpips(fixture, "alex", ref, dist)
    if _vgg_is_here(fixture):
        _check_lpips(fixture, "vgg", ref, dist)
        _check_dists(fixture, ref, dist)


def _close(fixture: Fixture, name: str, value: np.ndarray, kind: str) -> None:
    column = fixture.config["names"].index(name)
    np.testing.assert_allclose(value, fixture[f"output/{name}"], **fixture.tolerance(kind), err_msg=name)
    np.testing.assert_allclose(value, fixture["output/values"][:, column], **fixture.tolerance(kind), err_msg=name)


def _check_niqe(fixture: Fixture, images: dict[str, np.ndarray]) -> None:
    near = {"rtol": 0, "atol": float(re.search(r"float32 implementations (\S+)", fixture.meta["tolerance"]["niqe"])[1])}
    niqe = NIQE.load()
    for name, (which, kind) in NIQE_OPTIONS.items():
        np.testing.assert_allclose(_niqe(niqe, images[which], kind, 0), fixture[f"output/{name}"], **near, err_msg=name)
    large = to_float(fixture["input/niqe_large"])[None]
    crops = [int(number) for number in re.findall(r"crop_border (\d+)", fixture.config["niqe_large"])]
    values = [_niqe(niqe, large, "y601", crop)[0] for crop in crops]
    np.testing.assert_allclose(values, fixture["output/niqe_large"], **near)


def _check_lpips(fixture: Fixture, net: str, ref: np.ndarray, dist: np.ndarray) -> None:
    lpips = LPIPS.load(net)
    stages = np.concatenate(
        [np.stack(_stages(lpips, ref[i : i + 4], dist[i : i + 4]), -1) for i in range(0, len(ref), 4)]
    )
    near = fixture.tolerance("lpips")
    np.testing.assert_allclose(stages, fixture[f"output/lpips_{net}_per_layer"], **near)
    _close(fixture, f"lpips_{net}", stages.sum(-1), "lpips")
    _check_other_precisions(fixture, f"lpips_{net}", stages.sum(-1), near)


def _check_dists(fixture: Fixture, ref: np.ndarray, dist: np.ndarray) -> None:
    dists = DISTS.load()
    values = np.concatenate([_distance(dists, ref[i : i + 4], dist[i : i + 4]) for i in range(0, len(ref), 4)])
    _close(fixture, "dists", values, "dists")
    _check_other_precisions(fixture, "dists", values, fixture.tolerance("dists"))


def _check_other_precisions(fixture: Fixture, name: str, values: np.ndarray, near: dict[str, float]) -> None:
    for key in ("lpips_vgg_and_dists_fp16_trunk", "lpips_alex_vgg_dists_float64"):
        columns = [column for column in LEARNED if column.removeprefix("lpips_") in key]
        if name in columns:
            np.testing.assert_allclose(values, fixture[f"output/{key}"][:, columns.index(name)], **near, err_msg=key)


def _vgg_is_here(fixture: Fixture) -> bool:
    """VGG16's weights are too large to ship: without them its part is left out, but never beside the shared folder."""
    try:
        return all(weight_path(name) for name in VGG_FILES)
    except InputError:
        assert fixture.path.parent.resolve() != (SHARED / "golden").resolve(), "../shared holds no VGG16 weights"
        return False


CHECKS = {"metrics": check_metrics}
