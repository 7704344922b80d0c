"""The attention backends against the plain one, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.sharding import AxisType

from dpir_jax.errors import InputError
from dpir_jax.models import attention as module
from dpir_jax.models.attention import attention, use_attention_backend
from dpir_jax.models.placement import Placement, use_placement
from dpir_jax.models.platform import current_platform
from dpir_jax.parallel.topologies import devices, parse_topology, without_cache

BATCH, QUERIES, KEYS, HEADS, WIDTH = 2, 7, 9, 3, 8


def operands(batch=BATCH, queries=QUERIES, keys=KEYS, heads=HEADS, width=WIDTH, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(batch, queries, heads, width)] + 2 * [(batch, keys, heads, width)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def biases():
    rng = np.random.default_rng(1)
    one = jnp.asarray(rng.standard_normal((HEADS, QUERIES, KEYS)), jnp.float32)
    return {"none": None, "shared": one, "one": one[None], "each": jnp.stack([one, one[::-1]])}


def mask():
    return jnp.arange(KEYS)[None] < jnp.array([[KEYS], [4]])


def by_hand(q, k, v, mask, bias, scale):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        logits = q[b, :, h] @ k[b, :, h].T * scale
        if bias is not None:
            logits = logits + np.asarray(np.broadcast_to(bias, (q.shape[0], *bias.shape[-3:])), np.float64)[b, h]
        weights = np.exp(logits) * (1 if mask is None else np.asarray(mask)[b])
        out[b, :, h] = weights / weights.sum(-1, keepdims=True) @ v[b, :, h]
    return out


@pytest.mark.parametrize("backend", ["xla", "loop"])
@pytest.mark.parametrize("bias", biases())
@pytest.mark.parametrize("masked", [False, True])
def test_values(backend, bias, masked):
    q, k, v = operands()
    bias, keep = biases()[bias], mask() if masked else None
    found = attention(q, k, v, mask=keep, bias=bias, scale=0.7, backend=backend)
    np.testing.assert_allclose(found, by_hand(q, k, v, keep, bias, 0.7), atol=1e-5)


def test_the_default_scale_is_one_over_root_width():
    q, k, v = operands()
    np.testing.assert_allclose(attention(q, k, v), by_hand(q, k, v, None, None, WIDTH**-0.5), atol=1e-5)


def gradients(*operands, **options):
    def objective(q, k, v, bias):
        return jnp.sum(jnp.sin(attention(q, k, v, bias=bias, **options)))

    argnums = (0, 1, 2) if operands[3] is None else (0, 1, 2, 3)
    return jax.jit(jax.grad(objective, argnums))(*operands)


def test_loop_has_the_same_gradients():
    operands_and_bias = (*operands(), biases()["shared"])
    for options in ({"mask": mask()}, {}):
        expected = gradients(*operands_and_bias, backend="xla", **options)
        for found, wanted in zip(gradients(*operands_and_bias, backend="loop", **options), expected):
            np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("bias", ["shared", "each"])
def test_loop_in_blocks_of_queries(monkeypatch, bias):
    operands_and_bias, keep = (*operands(), biases()[bias]), mask()
    expected = gradients(*operands_and_bias, backend="xla", mask=keep)
    whole = attention(*operands_and_bias[:3], mask=keep, bias=operands_and_bias[3], backend="loop")
    monkeypatch.setattr(module, "LOOP_LOGITS", 3 * KEYS)  # blocks of at most three queries
    found = attention(*operands_and_bias[:3], mask=keep, bias=operands_and_bias[3], backend="loop")
    np.testing.assert_allclose(found, whole, atol=1e-6)
    for one, other in zip(gradients(*operands_and_bias, backend="loop", mask=keep), expected):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_loop_never_holds_all_logits():
    long = jax.ShapeDtypeStruct((1, 8192, 1, 8), jnp.float32)
    program = jax.jit(lambda *a: attention(*a, backend="loop")).lower(long, long, long).compile()
    assert program.memory_analysis().temp_size_in_bytes < 8192**2 * 4 / 4


def test_a_sample_without_keys_stays_finite():
    q, k, v = operands()
    for backend in ("xla", "loop"):
        assert np.isfinite(attention(q, k, v, mask=jnp.zeros((BATCH, KEYS), bool), backend=backend)).all()


def test_half_precision_softmax_is_in_float32():
    q, k, v = operands(dtype=jnp.bfloat16)
    for backend in ("xla", "loop"):
        found = attention(q, k, v, backend=backend)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), by_hand(q, k, v, None, None, WIDTH**-0.5), atol=0.02)


def test_half_precision_queries_are_not_rounded_again():
    q, k, v = operands(width=80, dtype=jnp.bfloat16)
    errors = [
        np.linalg.norm(
            attention(4 * q, k, v, backend=backend).astype(jnp.float32) - by_hand(4 * q, k, v, None, None, 80**-0.5)
        )
        for backend in ("loop", "xla")
    ]
    assert errors[0] < 1.2 * errors[1]


def test_the_platform_is_that_of_the_default_device_not_of_the_first(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert current_platform() == "tpu"
    with jax.default_device(jax.devices("cpu")[0]):
        assert current_platform() == "cpu"


@pytest.mark.parametrize("masked", [False, True])
def test_cudnn_is_called_with_the_same_meaning(monkeypatch, masked):
    """No GPU here: JAX's own XLA form of the same function stands in for the kernel."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **k: plain(*a, **k))
    q, k, v = (x[:, :-1] for x in operands(dtype=jnp.bfloat16))
    keep, bias = mask()[:, :-1] if masked else None, biases()["each"][..., :-1, :-1]
    found = attention(q, k, v, mask=keep, bias=bias, scale=0.7, backend="cudnn").astype(jnp.float32)
    np.testing.assert_allclose(found, by_hand(q, k, v, keep, bias, 0.7), atol=0.03)


@pytest.fixture
def context_mesh():
    """Two pieces of the samples, two of the queries."""
    mesh = jax.make_mesh((2, 2), ("data", "context"), devices=jax.devices()[:4], axis_types=(AxisType.Auto,) * 2)
    return Placement(mesh, {"B": ("data",), "T": ("context",)})


def test_cudnn_runs_per_device_of_a_mesh(monkeypatch, context_mesh):
    plain, pieces = jax.nn.dot_product_attention, []

    def piece(q, k, v, *, implementation, **options):
        pieces.append((q.shape, k.shape))
        return plain(q, k, v, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", piece)
    q, k, v = (x[:, : 2 * (x.shape[1] // 2)] for x in operands(dtype=jnp.bfloat16))  # 6 queries: pieces of 3
    keep = mask()[:, :8]
    for mask_of_keys, queries in ((None, 3), (keep, 4)):
        with use_placement(context_mesh):
            found = jax.jit(lambda *a, m=mask_of_keys: attention(*a, mask=m, backend="cudnn"))(q, k, v)
        assert pieces.pop() == ((1, queries, HEADS, WIDTH), (1, 8, HEADS, WIDTH))
        expected = by_hand(q, k, v, mask_of_keys, None, WIDTH**-0.5)
        np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.03)


def test_cudnn_is_lowered_for_gpus_with_the_queries_cut(monkeypatch, context_mesh):
    """JAX's own partitioner of this kernel refuses queries and keys that are cut differently."""
    for name, found in (("check_cudnn_version", 91000), ("check_compute_capability", True)):
        monkeypatch.setattr(fused_attention_stablehlo, name, lambda *a, found=found: found)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda *a: False)
    q = jax.ShapeDtypeStruct((4, 128, 4, 64), jnp.bfloat16)
    with use_placement(context_mesh):
        traced = jax.jit(jax.grad(lambda *a: attention(*a, backend="cudnn").astype(jnp.float32).sum())).trace(q, q, q)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("@__cudnn$fmha") == 2  # forward, backward
    assert "CustomSPMDPartitioning" not in program


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the TPU kernel's program on the CPU."""
    make = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", make)


@pytest.mark.usefixtures("interpreted")
def test_splash_values_and_gradients():
    q, k, v = operands(batch=2, queries=130, keys=150, heads=2, width=64)
    keep = jnp.arange(150)[None] < jnp.array([[150], [100]])

    def objective(operands, backend):
        out = attention(*operands, mask=keep, backend=backend)
        return jnp.sum(jnp.sin(out)), out

    differentiate = jax.jit(jax.grad(objective, has_aux=True), static_argnums=1)
    found, expected = (differentiate((q, k, v), backend) for backend in ("splash", "xla"))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, atol=5e-5)


def tpu_program(length):
    q, k, v = (jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16) for _ in range(3))
    with use_attention_backend("splash"):
        return jax.export.export(jax.jit(lambda *a: attention(*a)), platforms=["tpu"])(q, k, v).mlir_module()


def test_long_sequences_take_the_kernel_on_a_tpu_and_short_ones_do_not():
    assert "tpu_custom_call" in tpu_program(module.SPLASH_MIN_LENGTH + 333)
    assert "tpu_custom_call" not in tpu_program(module.SPLASH_MIN_LENGTH - 1)


def test_the_kernel_is_compiled_for_a_tpu_forward_and_backward():
    """By the TPU's own compiler, at the length of a 1024-pixel photo with its prompt."""
    chip = jax.sharding.SingleDeviceSharding(devices(parse_topology("v5e-1"))[0])
    q = jax.ShapeDtypeStruct((1, 4429, 2, 64), jnp.bfloat16, sharding=chip)
    keep = jax.ShapeDtypeStruct((1, 4429), bool, sharding=chip)

    def objective(q, k, v, keep):
        return jnp.sum(attention(q, k, v, mask=keep).astype(jnp.float32))

    with use_attention_backend("splash"), without_cache():
        compiled = jax.jit(jax.grad(objective, (0, 1, 2))).lower(q, q, q, keep).compile()
    assert compiled.as_text().count("tpu_custom_call") == 3  # forward, gradient of q, gradients of k and v
    logits = 2 * 4429**2 * 4  # bytes of what plain attention would store
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 8


@pytest.mark.usefixtures("interpreted")
def test_splash_runs_per_shard_of_a_mesh():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    q, k, v = operands(batch=4, queries=130, keys=150, heads=2, width=64)
    expected = attention(q, k, v, backend="xla")
    with use_placement(Placement(mesh, {"B": ("data",), "H": ("tensor",)})):
        found = jax.jit(lambda *a: attention(*a, backend="splash"))(q, k, v)
    assert found.addressable_shards[0].data.shape == (1, 130, 1, 64)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_preference_and_its_limits(monkeypatch):
    used = []
    for name in module._BACKENDS:
        monkeypatch.setitem(module._BACKENDS, name, lambda *a, name=name: used.append(name))
    q, k, v = operands()
    attention(q, k, v)
    with use_attention_backend("cudnn"):
        attention(q, k, v)  # float32
        attention(*operands(dtype=jnp.bfloat16))
        attention(*operands(dtype=jnp.bfloat16, width=10))
        attention(*operands(dtype=jnp.bfloat16), mask=mask())  # nine keys: no gradient
    with use_attention_backend("xla"):
        attention(q, k, v)
    attention(q, k, v)
    assert used == ["loop", "xla", "cudnn", "xla", "xla", "xla", "loop"]


def test_errors():
    q, k, v = operands()
    with pytest.raises(InputError, match="unknown attention backend 'flash'"):
        attention(q, k, v, backend="flash")
    with pytest.raises(InputError, match="unknown attention backend"), use_attention_backend("flash"):
        pass
    with pytest.raises(InputError, match="cannot take a bias"):
        attention(q, k, v, bias=biases()["shared"], backend="splash")
    with pytest.raises(InputError, match="cannot take float32 inputs"):
        attention(q, k, v, backend="cudnn")
    with pytest.raises(InputError, match=r"cannot take a mask or a bias with odd lengths \(7 and 9\)"):
        attention(*operands(dtype=jnp.bfloat16), bias=biases()["shared"], backend="cudnn")
