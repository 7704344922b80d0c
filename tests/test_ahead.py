"""Compiling for chips that are not there: names, counting, and a real compilation for a TPU slice."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dpir_jax.cli import main
from dpir_jax.errors import InputError
from dpir_jax.models.attention import attention, use_attention_backend
from dpir_jax.models.layers import Keys
from dpir_jax.models.mmdit import MMDiT
from dpir_jax.parallel import compiled, hlo
from dpir_jax.parallel.flops import count_flops
from dpir_jax.parallel.mesh import axis_sizes, make_mesh
from dpir_jax.parallel.roofline import Roofline, roofline
from dpir_jax.parallel.sharding import replicated
from dpir_jax.parallel.topologies import GENERATIONS, GIB, devices, parse_topology, quickly
from dpir_jax.restore.ahead import abstract_sampling
from dpir_jax.restore.settings import Defaults
from dpir_jax.systems.dalpsr import DaLPSRConfig
from dpir_jax.systems.dpir import DPIRConfig
from dpir_jax.training import ahead
from dpir_jax.training.config import load_recipe
from dpir_jax.training.layout import memory_of
from tests.toy_task import Toy, ToyTask

# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "torus", "chips"),
    [
        ("v5e-1", "v5e:1x1", 1),
        ("v5e-16", "v5e:4x4", 16),
        ("v5e-256", "v5e:16x16", 256),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-128", "v5p:4x4x4", 64),
        ("V6E-8", "v6e:2x4", 8),
    ],
)
def test_names_of_slices(name, torus, chips):
    topology = parse_topology(name)
    assert (str(topology), topology.chips, topology.name) == (torus, chips, name.lower())
    assert parse_topology(torus) == topology


def test_a_torus_without_a_name_is_called_by_the_torus():
    topology = parse_topology("v5p:4x4x12")
    assert (topology.name, topology.chips) == ("v5p:4x4x12", 192)


def test_slices_by_google_clouds_type_of_accelerator():
    assert parse_topology("v5litepod-16") == parse_topology("v5litepod:4x4") == parse_topology("v5e-16")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v7-8", "expected v5e, v5p, v6e"),
        ("v5e", "expected v5e, v5p, v6e"),
        ("v5e-17", "there are v5e-1, v5e-4, .*v5e-256$"),
        ("v5p-4", "there are v5p-8"),
        ("v5e:3x3", "no v5e torus"),
        ("v5e:4x6", "no v5e torus; it must be one of 1x1, 2x2, .*16x16$"),
        ("v5e:32x32", "no v5e torus"),
        ("v5e:4x4x4", "no v5e torus"),
        ("v5e:0x4", "no v5e torus"),
        ("v5p:4x4", "no v5p torus"),
        ("v5p:2x2x20", "no v5p torus; .* or of whole 4x4x4 cubes within the last of these"),
        ("v5p:16x16x28", "no v5p torus"),
        ("v5p:8x4x4", "no v5p torus"),
        ("v5p:0x4x4", "no v5p torus"),
    ],
)
def test_unknown_slices(name, says):
    with pytest.raises(InputError, match=says):
        parse_topology(name)


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def flops_of(function, *shapes):
    abstract = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return count_flops(jax.jit(function).trace(*abstract).jaxpr)


def test_flops_of_products_and_convolutions():
    assert flops_of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (2, 3, 4), (2, 4, 5)) == 2 * 2 * 3 * 4 * 5
    layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 2, "padding": [(1, 1), (1, 1)]}
    grouped = functools.partial(jax.lax.conv_general_dilated, window_strides=(2, 2), **layout)
    assert flops_of(grouped, (2, 10, 10, 6), (3, 3, 3, 8)) == 2 * (2 * 5 * 5 * 8) * (3 * 3 * 3)


def test_flops_of_loops_branches_and_recomputation():
    def layers(x, w, wrap=lambda body: body):
        return jnp.sum(jax.lax.scan(wrap(lambda x, w: (jnp.sin(x @ w), None)), x, w)[0])

    once = 2 * 4 * 8 * 8
    shapes = (4, 8), (5, 8, 8)
    assert flops_of(layers, *shapes) == 5 * once
    assert flops_of(jax.grad(layers, (0, 1)), *shapes) == 3 * 5 * once
    assert flops_of(jax.grad(lambda x, w: layers(x, w, jax.checkpoint), (0, 1)), *shapes) == 4 * 5 * once
    assert (
        flops_of(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x), (8, 8)) == 2 * 2 * 8**3
    )
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    local = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
    assert flops_of(local, (8, 3)) == 4 * 2 * 2 * 2 * 3


def test_flops_of_the_attention_kernel():
    with use_attention_backend("splash"):
        found = flops_of(attention, (2, 4096, 3, 64), (2, 4096, 3, 64), (2, 4096, 3, 64))
    assert found == 2 * 2 * 2 * 3 * 4096**2 * 64


# --- traffic ---------------------------------------------------------------------------------------------------------

PROGRAM = """HloModule jit_f, num_partitions=8

%sliced (p0: f32[6,16,128], p1: s32[]) -> f32[16,128] {
  %p0 = f32[6,16,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  ROOT %ds = f32[1,16,128]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,16,128}
}

%all-reduce-scatter.1 (p: f32[128,128]) -> f32[16,128] {
  %p = f32[128,128]{1,0:T(8,128)} parameter(0)
  %ar = f32[128,128]{1,0:T(8,128)} all-reduce(%p), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %ds = f32[16,128]{1,0:T(8,128)} dynamic-slice(%ar), dynamic_slice_sizes={16,128}
}

%body (s: (s32[], f32[6,16,128])) -> (s32[], f32[6,16,128]) {
  %s = (s32[]{:T(128)}, f32[6,16,128]{2,1,0:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)S(6)} get-tuple-element(%s), index=0
  %w = f32[6,16,128]{2,1,0:T(8,128)} get-tuple-element(%s), index=1
  %piece = f32[16,128]{1,0:T(8,128)S(1)} fusion(%w, %n), kind=kLoop, calls=%sliced
  %ag = f32[128,128]{1,0:T(8,128)S(1)} all-gather(%piece), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'a','b'}
  %rs = f32[16,128]{1,0:T(8,128)S(1)} fusion(%ag), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = (s32[]{:T(128)}, f32[6,16,128]{2,1,0:T(8,128)}) tuple(%n, %w)
}

%condition (s: (s32[], f32[6,16,128])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[6,16,128]{2,1,0:T(8,128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(6)
  %n = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{:T(512)} compare(%n, %limit), direction=LT
}

ENTRY %main (w: f32[6,16,128], x: bf16[3,5]) -> bf16[3,5] {
  %w = f32[6,16,128]{2,1,0:T(8,128)} parameter(0)
  %x = bf16[3,5]{1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %t = (s32[]{:T(128)}, f32[6,16,128]{2,1,0:T(8,128)}) tuple(%zero, %w)
  %kernel = f32[8]{0:T(128)S(1)} custom-call(), custom_call_target="tpu_custom_call", frontend_attributes={metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/pallas_call"}
  %loop = (s32[]{:T(128)}, f32[6,16,128]{2,1,0:T(8,128)}) while(%t), condition=%condition, body=%body
  ROOT %sum = bf16[3,5]{1,0:T(8,128)(2,1)} all-reduce(%x), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
}
"""


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[16,16]<=[256]", 16),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['a'=4,'b'=1,'c'=8], device_ids=([8,4]T(1,0)) {'a','b'}", 4),
        ("mesh['a'=256] {'a'}", 256),
        ("{}", 256),
    ],
)
def test_sizes_of_groups(groups, size):
    line = "ROOT %sum = f32[8]{0:T(128)} all-reduce(%x), channel_id=1, replica_groups=" + groups + ", to_apply=%add"
    text = "HloModule m, num_partitions=256\n\nENTRY %main (x: f32[8]) -> f32[8] {\n"
    text += "  %x = f32[8]{0:T(128)} parameter(0)\n  "
    assert hlo.traffic(text + line + "\n}\n").collectives == {"all-reduce": 2 * (size - 1) / size * 8 * 4}


def test_a_program_without_an_end_is_an_error():
    with pytest.raises(ValueError, match=r"cannot read the program: main has no root"):
        hlo.traffic(PROGRAM[: PROGRAM.index("  ROOT %sum")])


def test_groups_written_in_an_unknown_way_are_an_error():
    with pytest.raises(ValueError, match="unknown way to write groups"):
        hlo.traffic(PROGRAM.replace("[2,4]<=[8]", "<8>"))


def test_traffic_of_a_program():
    found = hlo.traffic(PROGRAM)
    assert found.collectives == {
        "all-gather": 6 * 7 / 8 * 128 * 128 * 4,
        "reduce-scatter": 6 * 7 / 8 * 128 * 128 * 4,
        "all-reduce": 2 * 3 / 4 * 3 * 5 * 2,
    }
    assert found.memory == 6 * 16 * 128 * 4 + 2 * 8 * 128 * 2  # slices of w; x and its sum in whole tiles
    assert found.unknown_loops == 0


def test_a_loop_whose_counter_grows_by_two():
    counted = "  %two = s32[] constant(2)\n  %next = s32[] add(%n, %two)\n  ROOT %t = "
    body, condition = PROGRAM.split("\n%condition", 1)
    body = body.replace("  ROOT %t = ", counted).replace("tuple(%n, %w)", "tuple(%next, %w)")
    found = hlo.traffic(f"{body}\n%condition{condition}").collectives["all-gather"]
    assert found == hlo.traffic(PROGRAM).collectives["all-gather"] / 2


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("(f32[8,128]{1,0}, f32[64,128]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}", 1 + 8),
        ("((f32[8,128]{1,0}), f32[1,128]{1,0}) reduce-scatter-start(%x), replica_groups=[1,8]<=[8]", 1 + 1 / 8),
        ("f32[8,128]{1,0} all-reduce-start(%x), replica_groups=[1,8]<=[8], to_apply=%add", 2),
        ("(f32[8,128]{1,0}, f32[8,128]{1,0}, u32[]{:S(2)}) collective-permute-start(%x)", 2),
        ("(f32[8,128]{1,0}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%x)", 2),
        ("(f32[8,128]{1,0:S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%x)", 1),
        ("((f32[8,128]{1,0}), f32[1,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:1], [0:128]}", 1 / 8),
    ],
)
def test_memory_traffic_of_an_asynchronous_instruction(line, moved):
    """In arrays of eight rows of 128; what lies in on-chip memory is free."""
    text = "HloModule m, num_partitions=8\n\nENTRY %main (x: f32[8,128]) -> f32[8,128] {\n"
    text += "  %x = f32[8,128]{1,0} parameter(0)\n  ROOT %y = "
    assert hlo.traffic(text + line + "\n}\n").memory == moved * 8 * 128 * 4


def test_what_runs_asynchronously_counts_once():
    kept = "(f32[4]) -> f32[4] {\n  %p = f32[4]{0} parameter(0)\n  ROOT %n = f32[4]{0} negate(%p)\n}\n\n"
    text = f"HloModule m\n\n%wrapped {kept}ENTRY %main (x: f32[4]) -> f32[4] {{\n  %x = f32[4]{{0}} parameter(0)\n"
    text += "  %s = ((f32[4]{0}), f32[4]{0}, s32[]{:S(2)}) async-start(%x), calls=%wrapped\n"
    text += "  ROOT %y = f32[4]{0} async-done(%s), calls=%wrapped\n}\n"
    assert hlo.traffic(text).memory == 2 * 4 * 4


def test_traffic_of_a_compiled_program():
    """XLA's text for eight CPU devices: the weights of a loop are gathered in each round."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    cut, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((None, "fsdp"), ()))
    w = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=cut)
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=whole)

    def layers(x, w):
        gathered = lambda w: jax.lax.with_sharding_constraint(w, whole)  # noqa: E731
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ gathered(w)), None), x, w)[0]

    found = hlo.traffic(jax.jit(layers).lower(x, w).compile().as_text())
    assert found.collectives == {"all-gather": 5 * 7 / 8 * 64 * 64 * 4}
    assert found.unknown_loops == 0


def test_the_roofline_is_the_slowest_resource():
    chip = GENERATIONS["v5e"].chip
    line = roofline(chip, 197e12, 819e9 * 2, 200e9 * 3)
    assert line == Roofline(1.0, 2.0, 3.0)
    assert (line.step, line.bound) == (3.0, "network")


def test_what_a_refused_program_needed():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.50G of 15.75G hbm. Exceeded"
    assert compiled.needed(message, 7.0) == 24.5 * GIB
    message = (
        "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (39.73G) exceeds available HBM (15.75G)."
    )
    assert compiled.needed(message, 7.0) == 39.73 * GIB + 7


WITHOUT_NUMBER = (
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.50M of 16.00M vmem.",
    "RESOURCE_EXHAUSTED: Out of memory allocating 68719476736 bytes.",
)


@pytest.mark.parametrize("says", WITHOUT_NUMBER)
def test_a_refusal_that_does_not_say_what_is_needed(recipe, monkeypatch, says):
    """The total is that of the arguments, and the report says why."""

    def compile_(*_, **__):
        raise jax.errors.JaxRuntimeError(f"{says}\nIt was large.")

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_)
    found = ahead.compile_for(recipe, parse_topology("v5e-1"), 2)
    assert (next(iter(found)), found["fits"], found["reason"]) == ("fits", False, says)
    memory = found["memory_per_chip"]
    assert memory["total"] == sum(memory[kind] for kind in compiled.MEMORY_KINDS if kind in memory) > 0
    assert f"does not fit ({says}): at least 0.0" in compiled.describe(json.loads(json.dumps(found)))


# --- the step --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TracedToyTask(ToyTask):
    """The toy task, whose networks can be made inside of a trace."""

    def check(self):
        pass

    def create(self, key):
        return Toy(self.width, rngs=Keys(key))

    def load(self, model):
        return model


@pytest.fixture
def recipe():
    return load_recipe("tests/ahead_recipe.py", ["--config.task.width=128"])


def test_a_step_compiled_for_a_tpu_slice(recipe):
    found = ahead.compile_for(recipe, parse_topology("v5e-8"), 2)
    assert found["effort"] == 0
    assert found["fits"]
    assert list(found)[:3] == ["fits", "topology", "name"]
    assert (found["chips"], found["batch"]) == (8, 16)
    pixels, width = 16 * 8 * 8, 128
    kernels = 9 * 3 * width * 2, 4 * width * width * 2  # multiply-adds of the outer convolutions, and of two blocks
    trained = 2 * pixels * (3 * sum(kernels) - 9 * 3 * width)  # the picture itself needs no gradient
    teacher = 2 * pixels * 9 * 3 * 3
    assert found["flops_per_chip"] == (trained + teacher) / 8
    memory = found["memory_per_chip"]
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=0.02)
    assert memory["batch"] == 2 * 8 * 8 * 3 * 4
    assert memory["parameters"] < memory["total"] < memory["available"] == 15.75 * GIB
    weights = 4 * 4 * width * width  # bytes of the two blocks' matrices
    assert found["collectives_per_chip"]["total"] > 7 / 8 * weights  # gathered, and their gradients scattered
    assert found["roofline"]["images_per_second_per_chip"] > 0
    assert json.dumps(found)
    assert "fits, " in compiled.describe(found)


def test_what_a_chip_sends_does_not_grow_with_the_slice():
    recipe = load_recipe("tests/ahead_recipe.py", ["--config.task.width=1024", "--config.mesh.data=-1"])
    slices = ("v5e-16", "v5e-32", "v5e-256")
    with quickly():
        found = [ahead.compile_for(recipe, parse_topology(name), 64) for name in slices]
    assert [(one["mesh"]["data"], one["mesh"]["fsdp"]) for one in found] == [(1, 16), (2, 16), (16, 16)]
    one, few, many = (each["collectives_per_chip"] for each in found)
    assert 0 < many["total"] < 1.1 * one["total"]
    # One group that is the whole square torus sums gradients whole; all others scatter them.
    assert 0 < many["reduce-scatter"] < 1.02 * few["reduce-scatter"]
    assert many["total"] < 1.05 * few["total"]
    assert "all-to-all" not in many
    assert "permute" not in one  # weights are gathered, not passed on piece by piece


def test_a_step_that_does_not_fit():
    wide = load_recipe("tests/ahead_recipe.py", ["--config.task.width=32768"])
    found = ahead.compile_for(wide, parse_topology("v5e-8"), 2)
    assert not found["fits"]
    assert found["memory_per_chip"]["parameters"] == pytest.approx(4 * 4 * 2 * 32768**2 / 8, rel=0.01)
    assert found["memory_per_chip"]["total"] > 3 * found["memory_per_chip"]["parameters"]
    assert "does not fit" in compiled.describe(found)


def test_a_step_measured_on_the_devices_here():
    found = ahead.measure(load_recipe("tests/ahead_recipe.py"), 1)
    assert found["fits"]
    assert found["measured"]["images_per_second_per_chip"] == 1 / found["measured"]["step"]
    assert found["memory_per_chip"]["available"] == memory_of(jax.devices()[0])
    assert "fits, " in compiled.describe(found)
    assert "measured:" in compiled.describe(found)


def test_what_fits_on_a_device_of_unknown_kind():
    mesh = make_mesh(devices=jax.devices()[:1])
    x = jax.ShapeDtypeStruct((256,), jnp.float32, sharding=replicated(mesh))
    program = compiled.Program(jax.jit(lambda x: 2 * x), (x,), {"batch": x}, mesh, "dp", 1)
    for available, fits, says in ((1 << 20, True, "fits, 0.00 GiB to spare"), (2047, False, "does not fit, ")):
        found, _ = compiled.report(program, None, available)
        assert found["fits"] is fits
        assert found["memory_per_chip"]["spare"] == available - found["memory_per_chip"]["total"]
        assert says in compiled.describe(found)


def test_a_step_that_does_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(ahead, "least_memory", lambda here: 1000)
    monkeypatch.setattr(ahead, "report", lambda step, chip, available: ({"fits": available > 1000}, None))
    monkeypatch.setattr(ahead, "_filled", None)
    assert ahead.measure(load_recipe("tests/ahead_recipe.py"), 1) == {"fits": False}


def test_a_step_that_runs_out_of_memory_does_not_fit(monkeypatch):
    says = "RESOURCE_EXHAUSTED: Out of memory allocating 4000000000000 bytes."

    def filled(tree):
        raise jax.errors.JaxRuntimeError(f"{says}\nIt was large.")

    monkeypatch.setattr(ahead, "report", lambda *_: ({"fits": True}, None))
    monkeypatch.setattr(ahead, "_filled", filled)
    assert ahead.measure(load_recipe("tests/ahead_recipe.py"), 1) == {"fits": False, "reason": says}


def test_a_search_on_many_chips_also_cuts_by_all_of_them(recipe, monkeypatch):
    """Two meshes of one preset are two candidates: the largest batch is looked for on the mesh that was best."""
    tried = []

    def compile_for(recipe, topology, batch):
        mesh = axis_sizes(recipe.train.mesh, topology.chips)
        tried.append((recipe.train.sharding, mesh["fsdp"], batch))
        fits = recipe.train.sharding == "fsdp" and batch <= (3 if mesh["fsdp"] == 64 else 1)
        return {
            "fits": fits,
            "sharding": recipe.train.sharding,
            "batch_per_chip": float(batch),
            "roofline": {"images_per_second_per_chip": batch},
            "memory_per_chip": {"total": batch},
        }

    monkeypatch.setattr(ahead, "compile_for", compile_for)
    list(ahead.search(recipe, parse_topology("v5e-64")))
    assert [batch for *mesh, batch in tried if mesh == ["fsdp", 16]] == [1, 2]
    assert [batch for *mesh, batch in tried if mesh == ["fsdp", 64]] == [1, 2, 4, 3]
    tried.clear()
    list(ahead.search(recipe, parse_topology("v5e-1")))
    assert tried == [("dp", 1, 1)]  # on one chip all presets are one


def test_the_best_of_a_search():
    def report(fits, speed, total):
        return {
            "fits": fits,
            "roofline": {"images_per_second_per_chip": speed},
            "memory_per_chip": {"total": total},
        }

    reports = [report(True, 1.0, 5), report(True, 2.0, 9), report(True, 2.0, 7), report(False, 9.0, 1)]
    assert ahead.best(reports) is reports[2]
    assert ahead.best(reports[3:]) is None
    assert ahead.least(reports) is reports[3]
    assert ahead.least([reports[0], reports[3] | {"reason": "no more is known"}]) is reports[0]


def test_all_that_a_search_tried_is_written(monkeypatch, tmp_path, capsys):
    """What is fastest need not be the largest that fits."""
    reports = [
        {
            "fits": fits,
            "sharding": preset,
            "mesh": {"fsdp": 8},
            "batch_per_chip": batch,
            "roofline": {"images_per_second_per_chip": speed},
            "memory_per_chip": {"total": batch},
        }
        for preset, batch, speed, fits in (
            *(("dp", 1, 1, True), ("dp", 2, 0, False), ("fsdp", 1, 2, True), ("fsdp", 2, 3, True)),
            *(("fsdp", 4, 2, True), ("fsdp", 8, 4, False), ("fsdp_tp", 6, 1, True)),
        )
    ]
    monkeypatch.setattr(ahead, "search", lambda *_: iter(reports))
    monkeypatch.setattr(compiled, "describe", str)
    out = tmp_path / "new" / "report.json"
    command = ["compile", "--config", "tests/ahead_recipe.py", "--topology", "v5e-8", "--search", "--json", str(out)]
    assert main(command) == 0
    found = json.loads(out.read_text())
    assert (next(iter(found)), found) == ("fits", reports[3] | {"largest_batch_per_chip": 4, "tried": reports})
    assert "(the largest batch that fits there is of 4 images a chip)" in capsys.readouterr().out


def test_a_search_is_of_training_steps(capsys):
    with pytest.raises(SystemExit):
        main(["compile", "--config", "tests/ahead_recipe.py", "--topology", "v5e-8", "--search", "--sampling"])
    assert "--sampling: not allowed with argument --search" in capsys.readouterr().err


@pytest.mark.parametrize("unit", [1, 2])
def test_a_search_ends_at_the_largest_batch(recipe, monkeypatch, unit):
    """In whole parts of accumulated gradients."""
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, batch=8 * unit, accumulate=unit))
    most = {"dp": 0, "zero1": 5 * unit, "fsdp": 11 * unit, "fsdp_tp": 11 * unit, "fsdp_cp": 0}  # images that fit
    tried = []

    def compile_for(recipe, topology, batch):
        name = recipe.train.sharding
        tried.append((name, batch))
        speed = {"zero1": 2, "fsdp": 2, "fsdp_tp": 1}.get(name, 0) * batch / (batch + 8)
        return {
            "fits": batch <= most[name],
            "sharding": name,
            "batch_per_chip": float(batch),
            "roofline": {"images_per_second_per_chip": speed},
            "memory_per_chip": {"total": batch},
        }

    monkeypatch.setattr(ahead, "compile_for", compile_for)
    reports = list(ahead.search(recipe, parse_topology("v5e-8")))
    doubled = [("dp", 1), *(("zero1", n) for n in (1, 2, 4, 8))]
    doubled += [(name, n) for name in ("fsdp", "fsdp_tp") for n in (1, 2, 4, 8, 16)]
    wanted = [*doubled, ("fsdp_cp", 1), ("fsdp", 12), ("fsdp", 10), ("fsdp", 11)]
    assert tried == [(name, n * unit) for name, n in wanted]
    assert ahead.best(reports)["batch_per_chip"] == 11 * unit


def test_the_compilers_effort(monkeypatch):
    seen = []

    def compile_for(*_):
        seen.append(jax.config.jax_exec_time_optimization_effort)
        raise InputError("enough")

    monkeypatch.setattr(ahead, "compile_for", compile_for)
    command = ["compile", "--config", "tests/ahead_recipe.py", "--topology", "v5e-8"]
    assert [main(command), main([*command, "--full-effort"])] == [2, 2]
    assert seen == [-1, 0]


def test_a_sampling_step_compiled_for_a_tpu(capsys, tmp_path):
    """The restorer's own step; along DDPM's path it is traced alone."""
    out = tmp_path / "report.json"
    command = ["compile", "--config", "tests/ahead_recipe.py:dpir", "--sampling", "--topology", "v5e-1"]
    assert main([*command, "--batch-per-chip", "2", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["effort"], jax.config.jax_exec_time_optimization_effort) == (-1, 0)  # of this compilation alone
    assert (next(iter(found)), found["batch"], found["steps"]) == ("fits", 2, 28)
    net = nnx.eval_shape(lambda: MMDiT(DPIRConfig.tiny().mmdit, rngs=Keys(0)))
    weights = 2 * sum(leaf.size for leaf in jax.tree.leaves(net))  # bytes in bfloat16; the scale of residuals beside
    assert weights <= found["memory_per_chip"]["parameters"] <= weights + 16
    speed = found["roofline"]["images_per_second_per_chip"]
    assert speed == pytest.approx(2 / found["roofline"]["step"] / 28)
    assert "in 28 steps" in capsys.readouterr().out

    config = dataclasses.replace(DaLPSRConfig.tiny(), objective="epsilon", flow="latent", prediction="velocity")
    program = abstract_sampling(config, Defaults(steps=10, guidance=5.5), jax.devices()[0], 2)
    assert program.function.trace(*program.arguments).out_info.shape == (2, 8, 8, 4)
    assert (program.samples, program.rounds) == (2, 20)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--topology", "v9-8"], "the topology is 'v9-8'"),
        (["--topology", "v5e-8", "--config.nothing=1"], "--config.nothing: the recipe has no such setting"),
        (["--search"], "--search needs a --topology"),
        (["--sampling"], "--sampling needs a --topology"),
        (["--topolgy", "v5e-8"], "there is no option --topolgy;"),
        (["--json", "tests"], "--json is tests, which is a folder; name a file in it"),
        (["--json", "README.md/report.json"], "cannot write README.md/report.json"),
        (["--search", "--topology", "v5e-8", "--config.mesh.data=2"], "leave --config.mesh.data=2 out, or --search"),
        (["--search", "--topology", "v5e-8", "--config.sharding=dp"], "leave --config.sharding=dp out, or --search"),
        (["--sampling", "--topology", "v5e-8"], "TracedToyTask makes no system that restores photos"),
        (["--topology", "v5e-8", "--batch-per-chip", "0"], "the batch per chip is 0"),
        (["--search", "--topology", "v5e-8", "--batch-per-chip", "0"], "the batch per chip is 0"),
        (
            ["--search", "--topology", "v5e-8", "--batch-per-chip", "3", "--config.accumulate=2"],
            "the batch per chip is 3, which config.accumulate (2) does not divide",
        ),
        (["--config", "tests/ahead_recipe.py:dpir", "--topology", "v5e-8"], "has no config.data.global_crop"),
        (["--topology", "v5e-8", "--config.batch=9"], "batch is 9"),
        (["--topology", "v5e-8", "--config.mesh.fsdp=3"], "needs 3 devices"),
    ],
)
def test_wrong_settings_end_with_a_sentence(arguments, says, capsys):
    assert main(["compile", "--config", "tests/ahead_recipe.py", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'dpir-jax\[tpu\]'"):
        devices(parse_topology("v5e-4"))
