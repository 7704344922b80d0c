"""Blur kernels, filtering, sharpening, resizing, noise and JPEG against BasicSR and Real-ESRGAN, draws injected."""

from functools import partial

import jax
import numpy as np

from dpir_jax.degradation import sharpen
from dpir_jax.degradation.blur import filter2d, gaussian_taps
from dpir_jax.degradation.jpeg import jpeg
from dpir_jax.degradation.kernels import gaussian_kernel, sinc_kernel
from dpir_jax.degradation.noise import gaussian_noise, grayscale, poisson_noise, poisson_rate, round_to_8_bit
from dpir_jax.degradation.resize import MODES, resample, resize_matrices
from tests.fixtures import Fixture, nhwc

_gaussian_kernel = jax.jit(gaussian_kernel, static_argnames="width")
_sinc_kernel = jax.jit(sinc_kernel, static_argnames="width")
_filter2d = jax.jit(jax.vmap(filter2d))
_poisson_rate = jax.jit(poisson_rate)


@partial(jax.jit, static_argnames=("table", "differentiable"))
def _jpeg(image: jax.Array, quality: jax.Array, table: str, differentiable: bool = False) -> jax.Array:
    return jax.vmap(partial(jpeg, table=table, differentiable=differentiable))(image, quality)


@partial(jax.jit, static_argnames="size_out")
def _resize(image: jax.Array, mode: int, scale: float | None, size_out: tuple[int, int]) -> jax.Array:
    size_in = image.shape[2:]
    matrices = resize_matrices(mode, size_in, size_out, size_in, size_out, scale)
    return jax.vmap(lambda planes: resample(planes, *matrices))(image)


def check_operators(fixture: Fixture) -> None:
    for case in fixture.config["kernels"]:
        _check_kernel(case, fixture[case["key"]])

    kernels = fixture["input/filter2d/kernels"]
    filtered = _filter2d(fixture["input/odd"], kernels)
    np.testing.assert_allclose(filtered, fixture["output/filter2d/per_sample"], **fixture.tolerance("filter2d"))
    image = fixture["input/img"]
    filtered = _filter2d(image, np.broadcast_to(kernels[0], (len(image), *kernels.shape[1:])))
    np.testing.assert_allclose(filtered, fixture["output/filter2d/single"], **fixture.tolerance("filter2d"))

    np.testing.assert_allclose(jax.vmap(grayscale)(fixture["input/odd"]), fixture["output/grayscale"], atol=1e-6)
    _check_usm(fixture)
    for case in fixture.config["resize"]:
        _check_resize(fixture["input/odd"][:1], case, fixture[case["key"]], **fixture.tolerance("resize"))
    for case in fixture.config["noise"]:
        _check_noise(fixture, case)


def _check_kernel(case: dict, want: np.ndarray) -> None:
    with jax.enable_x64(True):  # the published kernels are float64; in float32 the same code is off by rounding alone
        for dtype, tolerance in (
            (np.float64, {"rtol": 1e-9, "atol": 1e-15}),
            (np.float32, {"rtol": 2e-6, "atol": 1e-7}),
        ):
            if case["family"] == "sinc":
                got = _sinc_kernel(case["size"], dtype(case["cutoff"]), width=len(want))
                tolerance = tolerance if dtype == np.float64 else {"atol": 2e-6}
            else:
                sigma_y, theta = (case["sigma_x"], 0) if case["isotropic"] else (case["sigma_y"], case["theta"])
                numbers = map(dtype, (case["sigma_x"], sigma_y, theta, case["beta"] or 1))
                got = _gaussian_kernel(case["size"], *numbers, case["family"] == "plateau", width=len(want))
            assert got.dtype == dtype
            np.testing.assert_allclose(got, want, err_msg=case["key"], **tolerance)


def _check_usm(fixture: Fixture) -> None:
    config = fixture.config["usm"]
    radius = config["radius"] // 2
    np.testing.assert_allclose(gaussian_taps(radius), fixture["output/usm/kernel_1d"].ravel(), rtol=1e-9)
    for key in (key for key in fixture.keys if key.startswith("output/usm/") and not key.endswith("kernel_1d")):
        name, *changed = key.removeprefix("output/usm/").split("_")
        settings = {"w": config["weight"], "t": config["threshold"]} | {part[0]: float(part[1:]) for part in changed}
        got = sharpen(nhwc(fixture[f"input/{name}"]), radius=radius, weight=settings["w"], threshold=settings["t"])
        np.testing.assert_allclose(got, nhwc(fixture[key]), **fixture.tolerance("usm"))


def _check_noise(fixture: Fixture, case: dict) -> None:
    tag, image = case["tag"], fixture[f"input/{case['image']}"]
    draws = [fixture[f"input/noise/{tag}/draw{i}_{kind}"] for i, kind in enumerate(case["draws"])]
    kind = "poisson" if "poisson" in case["function"] else "gaussian"
    got, rates = _noisy(image, kind, case["args"], draws)
    for i, rate in zip([i for i, draw in enumerate(case["draws"]) if draw == "poisson"], rates):
        np.testing.assert_allclose(rate, fixture[f"input/noise/{tag}/draw{i}_rate"], rtol=1e-6)
    want = fixture[f"output/noise/{tag}/out"]
    if case["args"]["rounds"]:
        assert np.abs(got - want).max() < 1.01 / 255
        assert (np.abs(got - want) > 1e-6).mean() < 1e-3
    else:
        np.testing.assert_allclose(got, want, err_msg=tag, **fixture.tolerance("noise"))


def _noisy(image: np.ndarray, kind: str, args: dict, draws: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Replays a noise call: strength and grey flag given or drawn, the grey map if any sample is grey, the colour map.

    Returns the noisy image and the Poisson rates in the order of their draws.
    """
    draws, batch = list(draws), len(image)
    name = "sigma" if kind == "gaussian" else "scale"
    if f"{name}_range" in args:
        low, high = args[f"{name}_range"]
        strength = draws.pop(0) * np.float32(high - low) + np.float32(low)
        grey = draws.pop(0) < args["gray_prob"]
    else:
        strength = np.broadcast_to(np.float32(args[name]), batch)
        grey = np.broadcast_to(args["gray_noise"], batch).astype(bool)
    maps = {True: draws[0] if grey.any() else None, False: draws[-1]}

    noisy, rates = [], {True: [], False: []}
    for i, sample in enumerate(image):
        for flag in (True, False):
            if kind == "poisson" and maps[flag] is not None:
                rates[flag].append(_poisson_rate(sample, flag)[0][: 1 if flag else 3])
        drawn = maps[bool(grey[i])]
        drawn = np.broadcast_to(drawn if drawn.ndim == 2 else drawn[i], sample.shape)
        if kind == "gaussian":
            noise = gaussian_noise(strength[i], grey[i], drawn)
        else:
            noise = poisson_noise(strength[i], grey[i], drawn, *_poisson_rate(sample, grey[i]))
        result = sample + noise
        result = np.clip(np.round(result * 255), 0, 255) / 255 if args["rounds"] else result
        noisy.append(np.clip(result, 0, 1) if args["clip"] else result)
    return np.stack(noisy), [np.stack(rate) for rate in rates.values() if rate]


def _check_resize(image: np.ndarray, case: dict, want: np.ndarray, **tolerance: float) -> None:
    scale, size_out = case.get("scale_factor"), want.shape[2:]
    if scale is not None:
        assert tuple(int(side * scale) for side in image.shape[2:]) == size_out
    got = _resize(image, MODES.index(case["mode"]), scale, size_out)
    np.testing.assert_allclose(got, want, err_msg=str(case), **tolerance)


def check_jpeg(fixture: Fixture) -> None:
    for case in fixture.cases:
        image, key = fixture[f"input/{case['image']}"], case["key"]
        quality = np.broadcast_to(np.float32(case["quality"]), len(image))
        compress = partial(
            _jpeg,
            quality=quality,
            table="published" if case["transposed"] else "standard",
            differentiable=case["differentiable"],
        )
        tolerance = fixture.tolerance("differentiable" if case["differentiable"] else "float")
        np.testing.assert_allclose(compress(image), fixture[key], err_msg=key, **tolerance)
        grad_key = key.replace("_shipped_differentiable", "_differentiable_grad")
        if grad_key != key and grad_key in fixture.keys:
            cotangent = np.linspace(-1, 1, image.size, dtype=np.float32).reshape(image.shape)
            (grad,) = jax.vjp(compress, image)[1](cotangent)
            np.testing.assert_allclose(grad, fixture[grad_key], **fixture.tolerance("grad"))


def check_chain(fixture: Fixture) -> None:
    tolerance = fixture.tolerance("per_step")
    for case in fixture.cases:
        name = case["name"]
        inputs, outputs = fixture.under(f"input/{name}"), fixture.under(f"output/{name}")
        image = outputs["gt_usm"]
        np.testing.assert_allclose(sharpen(nhwc(inputs["gt"])), nhwc(image), **tolerance)
        for step in case["steps"]:
            stem = f"step{step['step']:02d}"
            want = outputs[f"{stem}_{step['op']}"]
            name_of_step = f"{name} {stem} {step['op']}"
            if step["op"] == "resize":
                _check_resize(image, step, want, **tolerance)
                image = want
                continue
            if step["op"] == "filter2d":
                got = _filter2d(image, inputs[step["kernel"]])
            elif step["op"] == "jpeg":
                got = _jpeg(np.clip(image, 0, 1), np.float32(step["quality"]), table="published")
            else:
                draws = [inputs[f"{stem}_draw{i}_{kind}"] for i, kind in enumerate(step["draws"])]
                got, _ = _noisy(image, step["op"].removesuffix("_noise"), step, draws)
            np.testing.assert_allclose(got, want, err_msg=name_of_step, **tolerance)
            image = want
        np.testing.assert_allclose(round_to_8_bit(image), outputs["lq"], atol=1e-6)


CHECKS = {"degradation": check_operators, "degradation_jpeg": check_jpeg, "degradation_chain": check_chain}
