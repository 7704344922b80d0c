"""MMDiT, the diffusion transformer of Stable Diffusion 3 and 3.5, with DPIR's branch for the low-quality latent.

Two streams of tokens, picture and context, have weights of their own and attend jointly. Time and pooled condition make
one vector, which modulates every normalisation (AdaLN):

    x <- x + gate * f((1 + scale) * LN(x) + shift)

DPIR (arXiv 2504.17825; kongdehong/DPIR `transformer_sd3_cnext.py`) adds the low-quality photo after block 0:

    y = F_0(z_t) + eta(F_c(z_lq)),    eta(c) = (c - mean(c)) / (std(c) + 1e-9) * std(x) + mean(x)

with one mean and one standard deviation per sample, over tokens and channels. F_c does not see the time, so its tokens
are computed once per photo (`net.lq_branch`) and only eta at each step.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dpir_jax.errors import InputError
from dpir_jax.models.attention import attention
from dpir_jax.models.embeddings import ConditionEmbedding, patchify, position_table, timestep_embedding, unpatchify
from dpir_jax.models.layers import conv, dense, group_norm, rematerialized, rms_norm, scan_blocks, stack
from dpir_jax.models.placement import constrain
from dpir_jax.models.precision import FLOAT32, Precision

Tokens = Float[Array, "B N D"]
Condition = Float[Array, "B D"]

TIME_WIDTH = 256
MLP_RATIO = 4
EPSILON = 1e-6  # of layer and RMS norms
ALIGNMENT_EPSILON = 1e-9


# --- configuration ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LQBranchConfig:
    """Three 3x3 convolutions with group norms: `widths` of the first two (the third has the network's), `groups`."""

    widths: tuple[int, int] = (256, 512)
    groups: tuple[int, int, int] = (4, 8, 8)

    def __post_init__(self):
        if len(self.widths) != 2 or len(self.groups) != 3:
            raise InputError(f"lq_branch needs two widths and three groups, got {self.widths} and {self.groups}")
        for width, groups in zip(self.widths, self.groups):
            if width < 1 or groups < 1 or width % groups:
                raise InputError(f"lq_branch.widths: {width} channels cannot form {groups} groups (lq_branch.groups)")


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of an MMDiT; the defaults are Stable Diffusion 3 medium's.

    Attributes:
      in_channels, out_channels: of the latent.
      patch_size: side of a token, in latent pixels.
      num_layers, num_heads, head_dim: depth; the width of the stream is `num_heads * head_dim`.
      context_dim: width of the joint-attention tokens; pooled_dim: of the pooled condition.
      pos_embed_max_size: side of the position table, in tokens; sample_size: latent side that has spacing one.
      qk_norm: RMS norm of queries and keys per head (SD3.5).
      dual_attention_layers: blocks with a second attention among picture tokens (SD3.5 medium).
      lq_branch: DPIR's branch, or None.
    """

    in_channels: int = 16
    out_channels: int = 16
    patch_size: int = 2
    num_layers: int = 24
    num_heads: int = 24
    head_dim: int = 64
    context_dim: int = 4096
    pooled_dim: int = 2048
    pos_embed_max_size: int = 192
    sample_size: int = 128
    qk_norm: bool = False
    dual_attention_layers: tuple[int, ...] = ()
    lq_branch: LQBranchConfig | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (not isinstance(value, int) or value < 1):
                raise InputError(f"{field.name} must be a whole number of at least 1, got {value!r}")
        if self.num_layers < 2:
            raise InputError(
                f"num_layers must be at least 2 (the last block is of another kind), got {self.num_layers}"
            )
        if self.width % 4:
            raise InputError(f"num_heads * head_dim must be a multiple of 4 (position table), got {self.width}")
        if self.sample_size % self.patch_size:
            raise InputError(f"sample_size {self.sample_size} is not a multiple of patch_size {self.patch_size}")
        layers = self.dual_attention_layers
        if len(set(layers)) != len(layers) or not set(layers) <= set(range(self.num_layers)):
            raise InputError(f"dual_attention_layers must be different blocks below {self.num_layers}, got {layers}")
        if self.lq_branch and self.width % self.lq_branch.groups[-1]:
            raise InputError(f"lq_branch.groups: {self.width} channels cannot form {self.lq_branch.groups[-1]} groups")

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def runs(self) -> tuple[range, ...]:
        """Consecutive blocks of one kind, without the last block. With a branch, block 0 is a run of its own."""
        kind = lambda layer: (layer in self.dual_attention_layers, self.lq_branch is not None and layer == 0)  # noqa: E731
        groups = [tuple(group) for _, group in itertools.groupby(range(self.num_layers - 1), kind)]
        return tuple(range(group[0], group[-1] + 1) for group in groups)

    @classmethod
    def sd3_medium(cls) -> "MMDiTConfig":
        """Stable Diffusion 3 medium: 2.03 G parameters."""
        return cls()

    @classmethod
    def sd35_medium(cls) -> "MMDiTConfig":
        """Stable Diffusion 3.5 medium: 2.24 G parameters."""
        return cls(pos_embed_max_size=384, qk_norm=True, dual_attention_layers=tuple(range(13)))

    @classmethod
    def sd35_large(cls) -> "MMDiTConfig":
        """Stable Diffusion 3.5 large: 8.06 G parameters."""
        return cls(num_layers=38, num_heads=38, qk_norm=True)

    @classmethod
    def dpir(cls) -> "MMDiTConfig":
        """DPIR: Stable Diffusion 3 medium and the branch 16-256-512-1536 of 8.3 M parameters."""
        return cls(lq_branch=LQBranchConfig())

    @classmethod
    def nano(cls) -> "MMDiTConfig":
        """DPIR at a size that two CPU cores can train: 7 M parameters."""
        return cls(
            num_layers=5,
            num_heads=6,
            head_dim=32,
            context_dim=128,
            pooled_dim=128,
            sample_size=64,
            qk_norm=True,
            lq_branch=LQBranchConfig(widths=(64, 128)),
        )

    @classmethod
    def tiny(cls) -> "MMDiTConfig":
        """For tests."""
        return cls(
            in_channels=4,
            out_channels=4,
            num_layers=3,
            num_heads=2,
            head_dim=8,
            context_dim=12,
            pooled_dim=6,
            pos_embed_max_size=16,
            sample_size=16,
            qk_norm=True,
            lq_branch=LQBranchConfig(widths=(8, 16)),
        )


# --- pieces ----------------------------------------------------------------------------------------------------------


class LQBranch(nnx.Module):
    """DPIR's F_c: low-quality latent -> control tokens on the grid of the patches. No activation (as published)."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs, precision: Precision = FLOAT32):
        widths = (config.in_channels, *config.lq_branch.widths, config.width)
        strides = (1, config.patch_size, 1)
        self.convs = nnx.List(
            conv(i, o, 3, stride=stride, padding=1, rngs=rngs, precision=precision)
            for i, o, stride in zip(widths, widths[1:], strides)
        )
        self.norms = nnx.List(
            group_norm(width, groups, epsilon=1e-5, rngs=rngs, precision=precision)
            for width, groups in zip(widths[1:], config.lq_branch.groups)
        )

    def __call__(self, lq_latent: Float[Array, "B H W C"]) -> Tokens:
        x = lq_latent
        for convolution, norm in zip(self.convs, self.norms):
            x = norm(convolution(x))
        return x.reshape(x.shape[0], -1, x.shape[-1])


def align(control: Tokens, hidden: Tokens) -> Tokens:
    """eta: gives `control` the mean and the (unbiased) standard deviation of `hidden`, per sample, in float32."""
    control, x = control.astype(jnp.float32), hidden.astype(jnp.float32)
    over = {"axis": (1, 2), "keepdims": True}
    normal = (control - control.mean(**over)) / (control.std(ddof=1, **over) + ALIGNMENT_EPSILON)
    return (normal * x.std(ddof=1, **over) + x.mean(**over)).astype(hidden.dtype)


def modulate(x: Tokens, shift: Condition, scale: Condition) -> Tokens:
    """`x (1 + scale) + shift`, one pair per sample."""
    return x * (1 + scale[:, None]) + shift[:, None]


def standardize(x: Tokens) -> Tokens:
    """Layer norm without parameters, in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPSILON)


def modulation(features: int, parts: int, rngs: nnx.Rngs, precision: Precision) -> nnx.Linear:
    """The AdaLN linear: `parts` vectors from the condition; zero at the start, so that a block starts as identity."""
    return dense(features, parts * features, "cm", rngs=rngs, precision=precision, init=nnx.initializers.zeros_init())


def vectors(layer: nnx.Linear, condition: Condition, parts: int) -> list[Condition]:
    """What a `modulation` makes of the condition.

    A device computes its own samples. Left alone, the compiler has it compute some columns for the samples of all
    devices and then exchange them: more to send on a larger mesh, and minutes of compilation for 256 chips.
    """
    return jnp.split(constrain(layer(condition), "B_"), parts, axis=-1)


class Projections(nnx.Module):
    """Queries, keys and values of one stream, and optionally the way back."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs, precision: Precision, out: bool = True):
        width = config.width
        self.heads, self.qk_norm = config.num_heads, config.qk_norm
        self.q = dense(width, width, "dh", rngs=rngs, precision=precision)
        self.k = dense(width, width, "dh", rngs=rngs, precision=precision)
        self.v = dense(width, width, "dh", rngs=rngs, precision=precision)
        if config.qk_norm:
            norm = {"epsilon": EPSILON, "axes": "_", "rngs": rngs, "precision": precision}
            self.norm_q = rms_norm(config.head_dim, **norm)
            self.norm_k = rms_norm(config.head_dim, **norm)
        if out:
            self.out = dense(width, width, "hd", rngs=rngs, precision=precision)

    def __call__(self, x: Tokens) -> tuple[Float[Array, "B N H K"], ...]:
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in (self.q, self.k, self.v))
        if self.qk_norm:
            q, k = self.norm_q(q).astype(v.dtype), self.norm_k(k).astype(v.dtype)
        return q, k, v

    def merge(self, attended: Float[Array, "B N H K"]) -> Tokens:
        """Heads back into the stream."""
        return self.out(attended.reshape(*attended.shape[:2], -1))


class MLP(nnx.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs, precision: Precision):
        hidden = MLP_RATIO * config.width
        self.up = dense(config.width, hidden, "df", rngs=rngs, precision=precision)
        self.down = dense(hidden, config.width, "fd", rngs=rngs, precision=precision)

    def __call__(self, x: Tokens) -> Tokens:
        return self.down(nnx.gelu(self.up(x), approximate=True))


class Block(nnx.Module):
    """One joint block. `dual`: a second attention among picture tokens. `last`: the context is read, not updated."""

    def __init__(
        self, config: MMDiTConfig, *, rngs: nnx.Rngs, precision: Precision, dual: bool = False, last: bool = False
    ):
        make = {"rngs": rngs, "precision": precision}
        self.dual, self.last = dual, last
        self.modulation = modulation(config.width, 9 if dual else 6, **make)
        self.context_modulation = modulation(config.width, 2 if last else 6, **make)
        self.attention = Projections(config, **make)
        self.context_attention = Projections(config, out=not last, **make)
        self.mlp = MLP(config, **make)
        if dual:
            self.dual_attention = Projections(config, **make)
        if not last:
            self.context_mlp = MLP(config, **make)

    def __call__(self, hidden: Tokens, context: Tokens, condition: Condition) -> tuple[Tokens, Tokens]:
        """(picture tokens [B, N, D], context tokens [B, L, D]) -> the same; `condition` = SiLU(time + pooled)."""
        parts = vectors(self.modulation, condition, 9 if self.dual else 6)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts[:6]
        context_parts = vectors(self.context_modulation, condition, 2 if self.last else 6)

        normal = standardize(hidden)
        q, k, v = self.attention(modulate(normal, shift, scale).astype(hidden.dtype))
        context_in = modulate(standardize(context), *context_parts[:2]).astype(context.dtype)
        context_q, context_k, context_v = self.context_attention(context_in)
        queries = q if self.last else jnp.concatenate([q, context_q], axis=1)
        attended = attention(queries, jnp.concatenate([k, context_k], axis=1), jnp.concatenate([v, context_v], axis=1))
        tokens = hidden.shape[1]
        if self.dual:
            dual_shift, dual_scale, dual_gate = parts[6:]
            own = self.dual_attention(modulate(normal, dual_shift, dual_scale).astype(hidden.dtype))
            hidden = hidden + dual_gate[:, None] * self.dual_attention.merge(attention(*own))
        hidden = hidden + gate[:, None] * self.attention.merge(attended[:, :tokens])
        mlp_in = modulate(standardize(hidden), mlp_shift, mlp_scale).astype(hidden.dtype)
        hidden = hidden + mlp_gate[:, None] * self.mlp(mlp_in)
        if self.last:
            return hidden, context

        _, _, gate, mlp_shift, mlp_scale, mlp_gate = context_parts
        context = context + gate[:, None] * self.context_attention.merge(attended[:, tokens:])
        mlp_in = modulate(standardize(context), mlp_shift, mlp_scale).astype(context.dtype)
        return hidden, context + mlp_gate[:, None] * self.context_mlp(mlp_in)


# --- the network -----------------------------------------------------------------------------------------------------


class MMDiT(nnx.Module):
    """The transformer: `runs` of stacked equal blocks, then the `last` block.

    In the last block the queries of the context are a published parameter that nothing reads.
    """

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs, precision: Precision = FLOAT32):
        make = {"rngs": rngs, "precision": precision}
        width, patch = config.width, config.patch_size**2
        self.config, self.precision = config, precision
        self.patch_embed = dense(patch * config.in_channels, width, "_d", **make)
        self.time_embed = ConditionEmbedding(TIME_WIDTH, width, **make)
        self.pooled_embed = ConditionEmbedding(config.pooled_dim, width, **make)
        self.context_embed = dense(config.context_dim, width, "cd", **make)
        self.lq_branch = LQBranch(config, **make) if config.lq_branch else None

        def run(layers: range) -> Block:
            dual = layers[0] in config.dual_attention_layers
            return stack(lambda rngs: Block(config, rngs=rngs, precision=precision, dual=dual), len(layers), rngs)

        self.runs = nnx.List(run(layers) for layers in config.runs)
        self.last = Block(config, **make, dual=config.num_layers - 1 in config.dual_attention_layers, last=True)
        self.final_modulation = modulation(width, 2, **make)
        self.final = dense(width, patch * config.out_channels, "d_", **make, init=nnx.initializers.zeros_init())

    def embed(
        self,
        latent: Float[Array, "B H W C"],
        timestep: Float[Array, " B"],
        context: Float[Array, "B L J"],
        pooled: Float[Array, "B P"],
    ) -> tuple[Tokens, Tokens, Condition]:
        """Picture tokens with their places, context tokens, and time + pooled vector (before its SiLU)."""
        config, dtype = self.config, self.precision.dtype
        height, width = self.grid(latent)
        table = position_table(
            height, width, config.width, config.pos_embed_max_size, config.sample_size // config.patch_size
        )
        hidden = self.patch_embed(patchify(latent, config.patch_size)) + jnp.asarray(table, dtype)
        time = self.time_embed(timestep_embedding(timestep, TIME_WIDTH))
        return hidden, self.context_embed(context), time + self.pooled_embed(pooled)

    def grid(self, latent: Float[Array, "B H W C"]) -> tuple[int, int]:
        """Rows and columns of tokens; `InputError` if the latent is not made of whole patches."""
        height, width = latent.shape[1:3]
        size = self.config.patch_size
        if height % size or width % size:
            raise InputError(f"a latent of {height}x{width} cannot be cut into patches of {size}x{size}")
        return height // size, width // size

    def project(self, hidden: Tokens, condition: Condition, grid: tuple[int, int]) -> Float[Array, "B H W C"]:
        """The final norm and projection: tokens -> velocity."""
        shift, scale = vectors(self.final_modulation, condition, 2)
        tokens = self.final(modulate(standardize(hidden), shift, scale).astype(hidden.dtype))
        return unpatchify(tokens, *grid, self.config.patch_size)

    def __call__(
        self,
        latent: Float[Array, "B H W C"],
        timestep: Float[Array, " B"],
        context: Float[Array, "B L J"],
        pooled: Float[Array, "B P"],
        control: Float[Array, "B N D"] | None = None,
        *,
        remat: Callable | None = None,
    ) -> Float[Array, "B H W C"]:
        """Velocity of the noised latent, in the latent's dtype.

        Args:
          latent: z_t, in the latent space that the network was trained in.
          timestep: 1000 sigma.
          context: joint-attention tokens.
          pooled: pooled condition.
          control: `lq_branch(lq_latent)`, computed once per photo; None leaves the branch out.
          remat: None for the policy of `layers.use_remat`, or a wrapper to put around each block.

        Raises:
          InputError: the latent is not made of whole patches or larger than the position table.
        """
        hidden, context, condition = self.embed(latent, timestep, context, pooled)
        condition = nnx.silu(condition)  # every block takes its modulation from this

        def call(block: Block, carry: tuple[Tokens, Tokens]) -> tuple[Tokens, Tokens]:
            return block(*carry, condition)

        for index, run in enumerate(self.runs):
            hidden, context = scan_blocks(run, (hidden, context), call, remat=remat)
            if index == 0 and control is not None:
                hidden = hidden + align(control, hidden)
        hidden, _ = rematerialized(call, remat)(self.last, (hidden, context))
        return self.project(hidden, condition, self.grid(latent)).astype(latent.dtype)
