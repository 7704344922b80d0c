"""Every published full size: all keys and shapes are covered, nothing more is wanted, and the counts are the published.

The lists in tests/data/published_keys were made on torch's meta device by tests/data/make_published_keys.py.
"""

import gzip
import json
import math
import warnings
from pathlib import Path

import pytest

from convert_weights.engine import plan, torch_pieces
from convert_weights.families import FAMILIES, recognise
from convert_weights.readers import Slot, Source
from dpir_jax.models.autoencoder import AutoencoderConfig
from dpir_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from dpir_jax.models.controlnet import ControlNetConfig
from dpir_jax.models.llava import LlavaConfig
from dpir_jax.models.mmdit import MMDiTConfig
from dpir_jax.models.ram import RAMConfig
from dpir_jax.models.t5 import T5Config
from dpir_jax.models.unet import UNetConfig

KEYS = Path(__file__).parent / "data" / "published_keys"

# name: family, our config (None: no named constructor), tensors, numbers, keys that are known and not loaded
NETWORKS = {
    "sd3_medium": ("mmdit", MMDiTConfig.sd3_medium(), 683, 2_084_951_104, 1),
    "sd35_medium": ("mmdit", MMDiTConfig.sd35_medium(), 909, 2_469_663_936, 1),
    "sd35_large": ("mmdit", MMDiTConfig.sd35_large(), 1227, 8_146_280_768, 1),
    "dpir": ("mmdit", MMDiTConfig.dpir(), 695, 2_093_252_416, 1),
    "vae_sd3": ("autoencoder", AutoencoderConfig.sd3(), 244, 83_819_683, 0),
    "vae_sd2": ("autoencoder", AutoencoderConfig.sd2(), 248, 83_653_863, 0),
    "clip_vision_b32": ("clip-vision", CLIPVisionConfig.vit_b32(), 200, 87_849_216, 0),
    "clip_vision_l14": ("clip-vision", CLIPVisionConfig.vit_l14(), 392, 303_966_208, 0),
    "clip_vision_l14_336": ("clip-vision", CLIPVisionConfig.vit_l14_336(), 392, 304_293_888, 0),
    "openclip_vision_bigg14": ("clip-vision", CLIPVisionConfig.openclip_bigg14(), 776, 1_844_907_264, 0),
    "clip_text_l14": ("clip-text", CLIPTextConfig.vit_l14(), 197, 123_650_304, 1),
    "openclip_text_h14": ("clip-text", CLIPTextConfig.sd2(), 373, 341_436_416, 1),
    "openclip_text_bigg14": ("clip-text", None, 517, 694_659_840, 1),
    "t5_xxl": ("t5", T5Config.xxl(), 220, 4_893_906_944, 1),
    "t5_base": ("t5", None, 112, 134_302_848, 1),
    "sd2_unet": ("unet", UNetConfig.sd2(), 686, 865_910_724, 0),
    "sd2_controlnet": ("controlnet", ControlNetConfig.sd2(), 340, 364_228_240, 0),
    "seesr_unet": ("unet", UNetConfig.seesr(), 1102, 1_126_760_324, 0),
    "seesr_controlnet": ("controlnet", ControlNetConfig.seesr(), 522, 489_031_440, 0),
    "ram": ("ram", RAMConfig.ram(), 1042, 508_915_117, 676),
    "ram_plus": ("ram", RAMConfig.ram_plus(), 402, 332_396_086, 35),
    "dape": ("ram", RAMConfig.dape(), 1290, 510_692_781, 868),
    "llava15_7b": ("llava", LlavaConfig.llava15_7b(), 686, 7_063_427_072, 0),
    "llava15_13b": ("llava", LlavaConfig.llava15_13b(), 758, 13_351_494_656, 0),
}


def published(name: str) -> tuple[dict, dict[str, tuple[int, ...]]]:
    content = json.loads(gzip.decompress((KEYS / f"{name}.json.gz").read_bytes()))
    return content["config"], {key: tuple(shape) for key, shape in content["tensors"].items()}


def source_of(shapes: dict[str, tuple[int, ...]], config: dict | None) -> Source:
    return Source("it", {key: Slot(Path(), 0, None, shape) for key, shape in shapes.items()}, config)


def test_every_list_is_known():
    assert {path.name.removesuffix(".json.gz") for path in KEYS.iterdir()} == set(NETWORKS)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("ram", "ram_plus", "dape")])
def test_a_list_is_what_torch_says_today(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.data.make_published_keys import listed

        found = listed(name)[1]
    assert {key: tuple(shape) for key, shape in found.items()} == published(name)[1]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_published_network_is_covered_exactly(name):
    family, config, tensors, numbers, ignored = NETWORKS[name]
    written, shapes = published(name)
    source = source_of(shapes, written)
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (tensors, numbers)
    assert [found.name for found in recognise(source)] == [family]
    family = FAMILIES[family]
    ours = family.configure(source)
    assert config in (None, ours)
    if not name.startswith("vae_sd2"):  # its config.json of today says more than it did
        assert family.configure(source_of(shapes, None)) == ours, "from the shapes alone"
    assert family.config(family.published(ours)) == (ours if name != "dpir" else MMDiTConfig.sd3_medium())

    leaves = family.leaves(ours)
    found = plan(leaves, family.rules(ours), shapes)
    found.report.check()
    assert len(found.report.ignored) == ignored
    assert sum(math.prod(leaf.shape) for leaf in leaves.values()) == sum(
        math.prod(shapes[key]) for key in found.report.loaded
    )
    written = torch_pieces(leaves, family.rules(ours))
    assert set(written) == set(found.report.loaded)
    # the original layout holds the same numbers
    for other in FAMILIES.values():
        if other.kind is family.kind and other is not family:
            pieces = torch_pieces(leaves, other.rules(ours))
            total = sum(
                math.prod(part.rule.torch_shape(shape if part.layer is None else shape[1:]))
                for parts in pieces.values()
                for part in parts[:1]
                for shape in [leaves[part.path].shape]
            )
            assert total == sum(math.prod(leaf.shape) for leaf in leaves.values())
