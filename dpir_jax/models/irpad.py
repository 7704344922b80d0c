"""IRPAD, the image-restoration prompt alignment decoder of DaLPSR (arXiv 2406.16477): which prompt fits a photo?

    tokens   E = encoder(crops) of the photo
    queries  Q = relu(W prompt_embed), one per candidate prompt
    decoder  N x [cross-attention -> feed forward], no self-attention among prompts: RAM's tagging head
    logits   fc(h), one per prompt

The candidates are either one phrase per type and interval, with a softmax within each type, or every combination as a
whole sentence, with one softmax (the paper's figure allows both). Crops are taken at the photo's own resolution, for
resizing destroys what there is to read.

Two encoders. `SwinConfig`: RAM's Swin-L, frozen, as in the paper's figure. `StatisticsConfig`: ours, small, for crops
whose corner lies on the photo's JPEG grid. A perceptron makes tokens of what is known to tell degradations apart, of
its mean, its least and its greatest over the crops, so that the flattest and the sharpest place of a photo count:

    of the DCT coefficients c of the luma's 8x8 blocks, averaged over a crop:  log(1 + |c|);  whether c is zero;
        log E c^2;  the last two also over the flattest quarter, where noise is alone;  log E c^2 over the richest
        quarter, where blur bends the spectrum;  a comb 1 - 8 t^2 for a range of periods p, t being c / p less its
        nearest whole number: 1 where p is a quantisation step
    of the chroma planes at half their size, where a JPEG file has them:  the same without richest quarter and comb:
        coloured noise is half as strong again as grey noise that looks alike in the luma
    of the luma's differences d over 1 to 8 pixels, first and second:  log E|d|, log (E d^4)^(1/4)
    of the steepest edges, the luma's difference over 2k pixels by that over 2r:  E w d_k / E w d_r, w = d_r^3
    levels: mean, spread and ends of the blocks' means, and how much is cut off at black and white, where noise is too
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dpir_jax.errors import InputError, check_choices
from dpir_jax.models.layers import dense, layer_norm, scan_blocks, stack
from dpir_jax.models.precision import FLOAT32, Precision
from dpir_jax.models.ram import HeadLayer, ram_preprocess
from dpir_jax.models.swin import Swin, SwinConfig

BLOCK = 8  # of a JPEG file
MACROBLOCK = 16  # that of its chroma
LAGS = (1, 2, 3, 4, 6, 8)  # pixels, of the differences
REACH = (1, 2, 3, 4, 6, 8, 11)  # pixels to both sides of an edge
EDGES = (2, 4)  # pixels to both sides over which an edge is found
LEVELS = 8  # how many statistics there are of brightness
OUTLIER = 4.0  # times its spread: further off, a statistic that hardly varies would drown all others
CUT_OFF = 0.005  # how far from black and white a value counts as one of them
_ORDER = np.add.outer(np.arange(BLOCK), np.arange(BLOCK)) + 0.01 * np.maximum.outer(np.arange(BLOCK), np.arange(BLOCK))
LUMA_LOW = np.argsort(_ORDER.reshape(-1), kind="stable")[:32]  # of the comb: higher ones are zero in most files
CHROMA_LOW = np.flatnonzero(_ORDER.reshape(-1) < BLOCK - 2)
_LUMA = (0.299, 0.587, 0.114)
_BLUE = (-0.168736, -0.331264, 0.5)
_RED = (0.5, -0.418688, -0.081312)


@dataclasses.dataclass(frozen=True)
class StatisticsConfig:
    """Sizes of the small encoder.

    Attributes:
      crop: side of a crop in pixels, a multiple of 16.
      periods: of the comb, per DCT coefficient.
      width: of the perceptron's hidden layers.
      tokens: how many it makes of all crops together.
    """

    crop: int = 64
    periods: int = 12
    width: int = 384
    tokens: int = 4

    def __post_init__(self) -> None:
        if self.crop < MACROBLOCK or self.crop % MACROBLOCK:
            raise InputError(f"crop is {self.crop}; it must be a multiple of {MACROBLOCK}")

    @property
    def sections(self) -> dict[str, int]:
        """The groups of statistics of a crop, in order, and how many numbers each holds."""
        lags, reach = (sum(2 * k < self.crop for k in distances) for distances in (LAGS, REACH))
        return {
            "luma": 6 * BLOCK**2,
            "comb": self.periods * len(LUMA_LOW),
            "levels": LEVELS,
            "chroma": 2 * 5 * len(CHROMA_LOW),
            "differences": 2 * 4 * lags,
            "edges": 2 * len(EDGES) * (reach - 1),
        }

    @property
    def features(self) -> int:
        """How many statistics there are of a crop."""
        return sum(self.sections.values())


@dataclasses.dataclass(frozen=True)
class IRPADConfig:
    """Sizes of IRPAD; the decoder's defaults are RAM's head.

    Attributes:
      encoder: a `StatisticsConfig`, or a `SwinConfig` for RAM's.
      types: of degradation, by name and in the order of the prompt.
      intervals: of the severity [0, 1], per type.
      candidates: "phrases" (types x intervals) or "sentences" (intervals ** types).
      looks: crops that are read together: 5 x 5 side by side, or fewer and repeated.
      embed_width: of image tokens and prompt embeddings.
      head_width, head_heads, head_mlp_width, head_layers: of the decoder.
    """

    encoder: StatisticsConfig | SwinConfig = dataclasses.field(default_factory=StatisticsConfig)
    types: tuple[str, ...] = ("blur", "noise", "jpeg")
    intervals: int = 4
    candidates: Literal["phrases", "sentences"] = "phrases"
    looks: int = 25
    embed_width: int = 512
    head_width: int = 768
    head_heads: int = 4
    head_mlp_width: int = 3072
    head_layers: int = 2

    lora_rank = 0  # `HeadLayer` is RAM's, which may be adapted

    def __post_init__(self) -> None:
        check_choices(self)
        for name, least in (("intervals", 2), ("looks", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.types or len(set(self.types)) != len(self.types):
            raise InputError(f"types is {self.types}; it must name each type of degradation once")
        if self.head_width % self.head_heads:
            raise InputError(f"head_heads {self.head_heads} do not divide head_width {self.head_width}")

    @property
    def crop(self) -> int:
        """Side of a crop in pixels."""
        return self.encoder.crop if isinstance(self.encoder, StatisticsConfig) else self.encoder.image_size

    @property
    def prompts(self) -> int:
        """How many candidates."""
        return len(self.types) * self.intervals if self.candidates == "phrases" else self.intervals ** len(self.types)

    @classmethod
    def nano(cls) -> "IRPADConfig":
        """The embedded model's."""
        return cls(embed_width=96, head_width=64, head_mlp_width=128)

    @classmethod
    def ram(cls) -> "IRPADConfig":
        """The paper's, as far as it is known: RAM's Swin-L at 384 pixels and RAM's head."""
        return cls(SwinConfig.large_384(), looks=4)

    @classmethod
    def tiny(cls) -> "IRPADConfig":
        """For tests."""
        encoder = StatisticsConfig(crop=16, periods=2, width=8, tokens=2)
        return cls(encoder, looks=4, embed_width=8, head_width=8, head_heads=2, head_mlp_width=8)


# --- the small encoder -----------------------------------------------------------------------------------------------


def dct_matrix() -> np.ndarray:
    """The orthonormal DCT-II of a whole block, `[64 pixels, 64 coefficients]`, both row by row."""
    frequency = np.arange(BLOCK)[:, None]
    scale = np.where(frequency == 0, BLOCK**-0.5, (2 / BLOCK) ** 0.5)
    axis = scale * np.cos((2 * np.arange(BLOCK) + 1) * frequency * np.pi / (2 * BLOCK))
    return np.kron(axis, axis).T.astype(np.float32)


def comb_periods(count: int) -> np.ndarray:
    """`[64, count]` periods in 8-bit levels: they span the steps of JPEG's tables, which grow with the frequency."""
    growth = 1 + 0.36 * np.add.outer(np.arange(BLOCK), np.arange(BLOCK)).reshape(-1, 1)
    return (np.geomspace(1.2, 30.0, count) * growth).astype(np.float32)


def coefficients(plane: Float[Array, "B S S"]) -> Float[Array, "B n 64"]:
    """The DCT of every 8x8 block."""
    blocks = rearrange(plane, "b (h p) (w q) -> b (h w) (p q)", p=BLOCK, q=BLOCK)
    return jnp.matmul(blocks, dct_matrix(), precision=jax.lax.Precision.HIGHEST)


def by_detail(c: Float[Array, "B n F"]) -> tuple[Int[Array, "B n"], int]:
    """Order of the blocks by the energy of all coefficients but the first, and how many are a quarter."""
    return jnp.square(c[..., 1:]).sum(-1).argsort(1), max(c.shape[1] // 4, 1)


def luma_statistics(c: Float[Array, "B n 64"], periods: int) -> Float[Array, "B F"]:
    """Of the coefficients of a crop's luma, in 8-bit levels: numbers of the order of 1."""
    order, quarter = by_detail(c)
    energy = jnp.square(c)
    flat, rich = (jnp.take_along_axis(energy, part[..., None], 1) for part in (order[:, :quarter], order[:, -quarter:]))
    parts = [
        jnp.log1p(jnp.abs(c)).mean(1) / 2 - 1,
        jnp.exp(-2 * energy).mean(1),
        jnp.log(energy.mean(1) + 0.1) / 4 - 0.5,
        jnp.log(rich.mean(1) + 0.1) / 4 - 1,
        jnp.log(flat.mean(1) + 0.1) / 4,
        jnp.exp(-2 * flat).mean(1),
    ]
    for steps in comb_periods(periods)[LUMA_LOW].T:
        ratio = c[..., LUMA_LOW] * (1 / steps)
        parts.append(1 - 8 * jnp.square(ratio - jnp.round(ratio)).mean(1))  # a cosine would take ten times as long
    level = c[..., 0] / 1020 + 0.5
    ends = jnp.take_along_axis(level, order, 1)
    of_flat, of_rich = ends[:, :quarter].mean(1), ends[:, -quarter:].mean(1)
    levels = (level.mean(1), level.std(1), level.min(1), level.max(1), of_flat, of_rich)
    return jnp.concatenate([*parts, jnp.stack(levels, -1)], -1)


def chroma_statistics(c: Float[Array, "B n 64"]) -> Float[Array, "B F"]:
    """Of the coefficients of one of a crop's chroma planes, at half their size."""
    c = c[..., CHROMA_LOW]
    order, quarter = by_detail(c)
    energy = jnp.square(c)
    flat = jnp.take_along_axis(energy, order[:, :quarter, None], 1)
    parts = (
        jnp.log1p(jnp.abs(c)).mean(1) / 2 - 0.5,
        jnp.exp(-energy).mean(1),
        jnp.log(energy.mean(1) + 0.1) / 4,
        jnp.log(flat.mean(1) + 0.1) / 4,
        jnp.exp(-flat).mean(1),
    )
    return jnp.concatenate(parts, -1)


def line_statistics(luma: Float[Array, "B S S"]) -> Float[Array, "B F"]:
    """Differences and edges along both axes of a luma plane in 8-bit levels."""
    side = luma.shape[1]
    lags, reach = ([k for k in distances if 2 * k < side] for distances in (LAGS, REACH))
    planes = jnp.moveaxis(luma, 0, -1)  # crops last: sums over pixels are then vectorised
    differences, edges = [], []
    for axis in (0, 1):
        cut = functools.partial(jax.lax.slice_in_dim, axis=axis)

        def apart(x: Array, lag: int, axis: int = axis, cut: Callable = cut) -> Array:
            return cut(x, lag, x.shape[axis]) - cut(x, 0, x.shape[axis] - lag)

        for lag in lags:
            first = apart(planes, lag)
            for d in (first, apart(first, lag)):
                differences.append(jnp.log(jnp.abs(d).mean((0, 1)) + 0.1) / 2 - 0.5)
                differences.append(jnp.log(jnp.square(jnp.square(d)).mean((0, 1)) + 0.1) / 8 - 0.5)
        margin = reach[-1]
        span = {k: cut(planes, margin + k, side - margin + k) for k in (*reach, *(-k for k in reach))}
        span = {k: span[k] - span[-k] for k in reach}
        for r in EDGES:
            weight = (span[r] / 64) ** 3
            whole = (weight * span[r]).mean((0, 1)) + 1e-6
            edges += [(weight * span[k]).mean((0, 1)) / whole - 1 for k in reach if k != r]
    return jnp.concatenate([jnp.stack(differences, -1), jnp.clip(jnp.stack(edges, -1), -3, 6)], -1)


def crop_statistics(crops: Float[Array, "B S S 3"], periods: int) -> Float[Array, "B F"]:
    """All statistics of crops in [0, 1], in the order of `StatisticsConfig.sections`."""
    red, green, blue = jnp.moveaxis(
        crops * 255, -1, 0
    )  # a matrix product with three rows would take five times as long

    def plane(weights: tuple[float, ...]) -> Array:
        return weights[0] * red + weights[1] * green + weights[2] * blue

    luma = plane(_LUMA)
    chroma = []
    for weights in (_BLUE, _RED):
        full = plane(weights)
        rows = full[:, ::2] + full[:, 1::2]
        chroma.append(chroma_statistics(coefficients((rows[..., ::2] + rows[..., 1::2]) / 4)))
    cut_off = [(crops > 1 - CUT_OFF).mean((1, 2, 3)), (crops < CUT_OFF).mean((1, 2, 3))]
    parts = (luma_statistics(coefficients(luma - 128), periods), jnp.stack(cut_off, -1), *chroma, line_statistics(luma))
    return jnp.concatenate(parts, -1)


def pooled(statistics: Float[Array, "B N F"]) -> Float[Array, "B 3*F"]:
    """Mean, least and greatest over the crops of each photo."""
    return jnp.concatenate([statistics.mean(1), statistics.min(1), statistics.max(1)], -1)


class StatisticsEncoder(nnx.Module):
    """Crops on the JPEG grid -> tokens of all of them together.

    `centre` and `spread` of the statistics are not trained (`standardise`).
    """

    def __init__(self, config: StatisticsConfig, width: int, *, rngs: nnx.Rngs, precision: Precision) -> None:
        make = {"rngs": rngs, "precision": precision}
        self.config = config
        pooled = 3 * config.features
        self.centre = nnx.Param(jnp.zeros(pooled, precision.param_dtype), axes="_")
        self.spread = nnx.Param(jnp.ones(pooled, precision.param_dtype), axes="_")
        self.fc1 = dense(pooled, config.width, "cf", **make)
        self.fc2 = dense(config.width, config.width, "df", **make)
        self.norm = layer_norm(config.width, epsilon=1e-6, **make)
        self.fc3 = dense(config.width, config.tokens * width, "fc", **make)

    def statistics(self, crops: Float[Array, "*B S S 3"]) -> Float[Array, "*B F"]:
        """Of each crop."""
        return crop_statistics(crops.reshape(-1, *crops.shape[-3:]), self.config.periods).reshape(*crops.shape[:-3], -1)

    def read(
        self, statistics: Float[Array, "B N F"], seen: Bool[Array, "B 3*F"] | None = None
    ) -> Float[Array, "B T E"]:
        """The perceptron alone: tokens of the statistics of N crops. What is not `seen` counts as usual."""
        x = jnp.clip((pooled(statistics) - self.centre[...]) / self.spread[...], -OUTLIER, OUTLIER)
        x = x if seen is None else jnp.where(seen, x, 0)
        x = nnx.silu(self.fc1(x))
        x = self.fc3(self.norm(x + nnx.silu(self.fc2(x))))  # without the norm attention saturates and stops learning
        return x.reshape(len(x), self.config.tokens, -1)

    def standardise(self, statistics: Float[Array, "B N F"]) -> None:
        """Takes mean and spread of what these photos show for those that are usual."""
        with jax.ensure_compile_time_eval():  # or a traced caller would carry them all as a constant
            shown = pooled(statistics)
            centre, spread = shown.mean(0), shown.std(0) + 0.01
        self.centre[...], self.spread[...] = centre, spread

    def __call__(self, crops: Float[Array, "B N S S 3"]) -> Float[Array, "B T E"]:
        """Crops in [0, 1]."""
        return self.read(jax.lax.stop_gradient(self.statistics(crops)))


class SwinEncoder(nnx.Module):
    """RAM's image encoder: Swin and projection, the mean token first."""

    def __init__(self, config: SwinConfig, width: int, *, rngs: nnx.Rngs, precision: Precision) -> None:
        self.visual_encoder = Swin(config, rngs=rngs, precision=precision)
        self.image_proj = dense(config.widths[-1], width, "dc", rngs=rngs, precision=precision)

    def __call__(self, crops: Float[Array, "B N S S 3"]) -> Float[Array, "B T E"]:
        """Crops in [0, 1] of the encoder's own size; their tokens side by side."""
        flat = ram_preprocess(crops.reshape(-1, *crops.shape[2:]), crops.shape[2])
        tokens = self.image_proj(self.visual_encoder(flat)).astype(jnp.float32)
        return tokens.reshape(len(crops), -1, tokens.shape[-1])


# --- the decoder -----------------------------------------------------------------------------------------------------


class IRPAD(nnx.Module):
    """Crops of a photo -> a logit per candidate prompt."""

    def __init__(self, config: IRPADConfig, *, rngs: nnx.Rngs, precision: Precision = FLOAT32) -> None:
        make = {"rngs": rngs, "precision": precision}
        width, normal = config.embed_width, nnx.initializers.normal(1.0)
        self.config = config
        kind = StatisticsEncoder if isinstance(config.encoder, StatisticsConfig) else SwinEncoder
        self.encoder = kind(config.encoder, width, **make)
        self.prompt_embed = nnx.Param(normal(rngs.params(), (config.prompts, width), precision.param_dtype), axes="vc")
        self.wordvec_proj = dense(width, config.head_width, "cd", **make)
        self.blocks = stack(lambda r: HeadLayer(config, rngs=r, precision=precision), config.head_layers, rngs)
        zeros = nnx.initializers.zeros_init()  # at first all prompts fit equally
        self.fc = dense(config.head_width, 1, "d_", init=zeros, **make)
        self.gauge = dense(width, len(config.types), "c_", init=zeros, **make)

    def tokens(self, crops: Float[Array, "B N S S 3"]) -> Float[Array, "B T E"]:
        """Image tokens of all crops of each photo; crops in [0, 1]."""
        return self.encoder(crops)

    def logits(self, tokens: Float[Array, "B T E"]) -> Float[Array, "B Q"]:
        """One per candidate prompt; float32."""
        queries = jax.nn.relu(self.wordvec_proj(self.prompt_embed[...]))
        h = jnp.broadcast_to(queries, (len(tokens), *queries.shape))
        h = scan_blocks(self.blocks, h, lambda block, h: block(h, tokens))
        return self.fc(h)[..., 0].astype(jnp.float32)

    def severities(self, tokens: Float[Array, "B T E"]) -> Float[Array, "B types"]:
        """An estimate of each severity, about [0, 1], from the first token: a second target in training."""
        return self.gauge(tokens[:, 0]).astype(jnp.float32)

    def log_probabilities(self, logits: Float[Array, "B Q"]) -> Float[Array, "B types intervals"]:
        """Of the intervals of each type, in either form of candidates."""
        types, intervals = len(self.config.types), self.config.intervals
        if self.config.candidates == "phrases":
            return jax.nn.log_softmax(logits.reshape(-1, types, intervals))
        joint = jax.nn.log_softmax(logits).reshape(-1, *[intervals] * types)
        axes = set(range(1, types + 1))
        marginals = [jax.nn.logsumexp(joint, tuple(axes - {axis})) for axis in sorted(axes)]
        return jnp.stack(marginals, 1)

    def __call__(self, crops: Float[Array, "B N S S 3"]) -> Float[Array, "B types intervals"]:
        """Probabilities of the intervals of each type, for the crops of each photo, in [0, 1]."""
        return jnp.exp(self.log_probabilities(self.logits(self.tokens(crops))))
