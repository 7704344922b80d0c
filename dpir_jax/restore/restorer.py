"""A photo in, a restored photo out.

Everything that is compiled works on groups of tiles of one shape; canvases of the photo's size live on the host. So
neither the photo's size nor steps, guidance, seed or fidelity compile anything anew, and memory grows only by the
canvases: the latents of z, of its velocity and of the low-quality photo, and the pixels.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8
from PIL import Image

from dpir_jax.diffusion import ddpm
from dpir_jax.diffusion.ddpm import DDPMSchedule
from dpir_jax.diffusion.guidance import clean_pull, restoration_pull
from dpir_jax.diffusion.samplers import euler
from dpir_jax.diffusion.schedule import FlowSchedule
from dpir_jax.errors import InputError
from dpir_jax.files import sha256
from dpir_jax.images import Photo, to_float, to_uint8, write_png
from dpir_jax.pretrained import find_model
from dpir_jax.restore import color, compilation_cache, record
from dpir_jax.restore.models import ModelInfo, describe, load_system, with_reader
from dpir_jax.restore.noise import canvas_noise
from dpir_jax.restore.prompt_cache import PromptCache
from dpir_jax.restore.settings import Defaults, Settings
from dpir_jax.restore.sources import PhotoLike, as_photo
from dpir_jax.restore.stages import Resident, Stage, Staged, Stages
from dpir_jax.restore.system import Frozen, System
from dpir_jax.restore.tile_store import TileStore
from dpir_jax.restore.tiling import TilePlan, blend_tiles, tiled_ddpm, tiled_euler

OVERLAP = 4  # tiles overlap by at least a fourth of their side

Progress = Callable[[str, int, int], None]  # stage, tiles done, tiles in all
Prompts = Callable[[list[int]], tuple[Any, Any]]  # numbers of tiles -> their conditions and their controls


@dataclasses.dataclass(frozen=True)
class Result:
    """A restored photo.

    Attributes:
      pixels: `[H, W, 3]`, 8-bit sRGB.
      before: the photo as it came, enlarged to the same size by bicubic interpolation.
      record: the run record, plain JSON values.
      alpha: `[H, W]` in [0, 1], or None.
      exif, icc_profile: what the photo's file said and still holds.
    """

    pixels: UInt8[np.ndarray, "H W 3"]
    before: UInt8[np.ndarray, "H W 3"]
    record: dict[str, Any]
    alpha: Float32[np.ndarray, "H W"] | None = None
    exif: bytes | None = None
    icc_profile: bytes | None = None

    @property
    def image(self) -> Image.Image:
        """The photo as a PIL picture, RGB or RGBA."""
        return Image.fromarray(self.pixels if self.alpha is None else np.dstack([self.pixels, to_uint8(self.alpha)]))

    def save(self, path: str | Path) -> None:
        """Writes a PNG with transparency, EXIF and colour profile, whole or not at all."""
        write_png(path, self.pixels, alpha=self.alpha, exif=self.exif, icc_profile=self.icc_profile)


# --- compiled once per shape of tile; the system's weights are arguments ---------------------------------------------


@jax.jit
def _encode(frozen: Frozen, pixels: Array) -> Array:
    return frozen.thaw().encode(pixels)


@jax.jit
def _decode(frozen: Frozen, latent: Array) -> Array:
    return frozen.thaw().decode(latent)


@jax.jit
def _finish(frozen: Frozen, z0: Array, lq_latent: Array) -> Array:
    system = frozen.thaw()
    return system.decode(system.finish(z0, lq_latent))


@jax.jit
def _start(frozen: Frozen, noise: Array, lq_latent: Array) -> Array:
    return frozen.thaw().start(noise, lq_latent)


@jax.jit
def _condition(frozen: Frozen, scene: Any, pixels: Array) -> Any:
    return frozen.thaw().condition(scene, pixels)


@jax.jit
def _control(frozen: Frozen, lq_latent: Array) -> Any:
    return frozen.thaw().control(lq_latent)


def _field(
    frozen: Frozen, z: Array, sigma: Array, lq_latent: Array, prompts: tuple[Any, Any], guidance: Array, fidelity: Array
) -> Float[Array, "G T T C"]:
    system = frozen.thaw()
    v = system.velocity(z, sigma, *prompts, guidance).astype(jnp.float32)
    return restoration_pull(v, z, sigma, system.anchor(lq_latent), fidelity)


@jax.jit
def _velocity(
    frozen: Frozen, z: Array, sigma: Array, lq_latent: Array, prompts: tuple[Any, Any], guidance: Array, fidelity: Array
) -> Float[Array, "G T T C"]:
    return _field(frozen, z, jnp.broadcast_to(sigma, z.shape[:1]), lq_latent, prompts, guidance, fidelity)


@jax.jit
def _sample(
    frozen: Frozen,
    z: Array,
    sigmas: Array,
    steps: Array,
    lq_latent: Array,
    prompts: tuple[Any, Any],
    guidance: Array,
    fidelity: Array,
) -> Float[Array, "1 T T C"]:
    def velocity(z: Array, sigma: Array) -> Array:
        return _field(frozen, z, sigma, lq_latent, prompts, guidance, fidelity)

    return euler(velocity, z, sigmas, steps)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _table(schedule: DDPMSchedule, sampler: str, steps: int) -> ddpm.Table:
    return schedule.table(sampler, steps)


def _clean(
    schedule: DDPMSchedule,
    frozen: Frozen,
    z: Array,
    row: ddpm.Table,
    lq_latent: Array,
    prompts: tuple[Any, Any],
    guidance: Array,
    fidelity: Array,
) -> Float[Array, "G T T C"]:
    system = frozen.thaw()
    output = system.predict(z, jnp.broadcast_to(row.timestep, z.shape[:1]), *prompts, guidance).astype(jnp.float32)
    return clean_pull(schedule.x0(output, z, row.alpha, row.sigma), row.sigma, system.anchor(lq_latent), fidelity)


_estimate = functools.partial(jax.jit, static_argnums=0)(_clean)


@functools.partial(jax.jit, static_argnums=0)
def _walk(
    schedule: DDPMSchedule,
    frozen: Frozen,
    z: Array,
    table: ddpm.Table,
    steps: Array,
    noise: Array | None,
    *conditions: Any,
) -> Float[Array, "1 T T C"]:
    def estimate(z: Array, row: ddpm.Table) -> Array:
        return _clean(schedule, frozen, z, row, *conditions)

    return ddpm.walk(estimate, z, table, steps, None if noise is None else lambda number: noise[number])


# --- the restorer ----------------------------------------------------------------------------------------------------


class Restorer:
    """Restores photos with one model. Holds nothing of a photo, so that threads can share it.

    Args:
      system: see `restore.system.System`.
      model: where it comes from, for the record.
      defaults: the model's own settings.
      schedule: the sampling levels, of a flow or of DDPM.
      group: tiles per call; None: 1 on a CPU, 4 elsewhere.
      tile: side of a tile in pixels of the output; None: the system's.
      dtype: of the weights, for the record.
      prompt_cache: folder for encoded prompts; None: they are forgotten with the restorer.
    """

    def __init__(
        self,
        system: System | Stages,
        *,
        model: ModelInfo = ModelInfo("unnamed"),  # noqa: B008 -- frozen
        defaults: Defaults = Defaults(),  # noqa: B008
        schedule: FlowSchedule | DDPMSchedule = FlowSchedule(),  # noqa: B008
        group: int | None = None,
        tile: int | None = None,
        dtype: str = "float32",
        prompt_cache: str | Path | None = None,
    ) -> None:
        self.stages = system if isinstance(system, Resident | Staged) else Resident(system)
        self.system = self.stages.system
        self.model = model
        self.defaults = defaults
        self.schedule = schedule
        self.group = group or (1 if jax.default_backend() == "cpu" else 4)
        self.tile = tile
        self.dtype = dtype
        maker = {"model": model.sha256, "dtype": dtype, "version": record.versions()["dpir_jax"]}
        self.prompts = PromptCache(maker, None if prompt_cache is None else Path(prompt_cache))
        self.tile_cells(tile)

    def tile_cells(self, pixels: int | None) -> int:
        """The side of a tile in latent cells for a side in pixels; None: the restorer's, else the system's.

        Raises:
          InputError: the system cannot work on tiles of that size.
        """
        pixels = pixels or self.tile
        if pixels is None:
            return self.system.tile
        unit = self.system.latent_factor * self.system.tile_multiple
        if pixels % unit or pixels < 2 * unit:
            raise InputError(f"tile is {pixels}; this model takes multiples of {unit} pixels, from {2 * unit}")
        return pixels // self.system.latent_factor

    @overload
    def __call__(self, photos: PhotoLike, **options: Any) -> Result: ...
    @overload
    def __call__(self, photos: Sequence[PhotoLike], **options: Any) -> list[Result]: ...

    def __call__(
        self,
        photos: PhotoLike | Sequence[PhotoLike],
        *,
        index: int = 0,
        progress: Progress | None = None,
        **options: Any,
    ) -> Result | list[Result]:
        """Restores a photo, or a list of them.

        Args:
          photos: a file, a PIL picture, an array (see `as_photo`), or a list of these.
          index: the (first) photo's number, which goes into its noise together with the seed.
          progress: called with (stage, tiles done, tiles in all).
          **options: the fields of `Settings`.

        Raises:
          InputError: a setting or a photo that cannot be used.
        """
        try:
            settings = Settings(**options)
        except TypeError as error:
            known = ", ".join(field.name for field in dataclasses.fields(Settings))
            raise InputError(f"{error}; settings are {known}".replace("Settings.__init__() ", "")) from error
        if isinstance(photos, list | tuple):
            return [self.restore(p, settings, index=index + i, progress=progress) for i, p in enumerate(photos)]
        return self.restore(photos, settings, index=index, progress=progress)

    def restore(
        self, source: PhotoLike, settings: Settings, *, index: int = 0, progress: Progress | None = None
    ) -> Result:
        """Restores photo number `index`; see `__call__`."""
        watch = record.Stopwatch()
        settings = settings.resolved(self.defaults)
        self._check_sampler(settings.sampler)
        tile = self.tile_cells(settings.tile)
        with watch.stage("read"):
            photo = as_photo(source)
            size = settings.output_size(*photo.pixels.shape[:2], str(photo.path))
            before = enlarge(photo.pixels, size)
        with watch.stage("prompts"):
            degradation = self.system.degradation(photo.pixels, settings.degradation_prompt)
        report = progress or (lambda stage, done, total: None)
        job = _Job(self, settings, tile, index, before, degradation, watch, report)
        content = job.run()
        with watch.stage("color"):
            pixels = np.empty_like(before)
            for rows, values in color.strips(content, before, settings.color):
                if not np.isfinite(values).all():
                    raise InputError(f"{self.model.name} made no numbers of {photo.path}; try dtype float32")
                pixels[rows] = to_uint8(values)
            alpha = None if photo.alpha is None else to_float(enlarge(photo.alpha, size))
        run = self._record(source, photo, size, settings, index, job, watch)
        return Result(pixels, before, run, alpha, photo.exif, photo.icc_profile)

    def identity(self, settings: Settings, index: int) -> dict[str, Any]:
        """The part of a record that decides the result for a given photo: model, settings, index, versions."""
        return {
            "model": record.plain(self.model),
            "settings": record.plain(settings.resolved(self.defaults)),
            "schedule": record.plain(self.schedule),
            "index": index,
            "dtype": self.dtype,
            "versions": record.versions(),
        }

    def _check_sampler(self, sampler: str) -> None:
        known = tuple(ddpm.SAMPLERS) if isinstance(self.schedule, DDPMSchedule) else ("euler",)
        if sampler not in known:
            raise InputError(f"sampler is {sampler}; this model has {', '.join(known)}")

    def _record(
        self,
        source: PhotoLike,
        photo: Photo,
        size: tuple[int, int],
        settings: Settings,
        index: int,
        job: "_Job",
        watch: record.Stopwatch,
    ) -> dict[str, Any]:
        height, width = photo.pixels.shape[:2]
        is_file = isinstance(source, str | Path)
        pixels = job.pixel_plan
        return {
            "photo": {"width": width, "height": height}
            | ({"path": str(source), "sha256": sha256(source)} if is_file else {}),
            "output": {"width": size[1], "height": size[0]},
            **self.identity(settings, index),
            **({} if job.degradation is None else {"degradation_prompt": job.degradation}),
            "tiles": {
                "side": pixels.tile,
                "rows": list(pixels.rows),
                "columns": list(pixels.columns),
                "canvas": [pixels.width, pixels.height],
                "group": self.group,
            },
            "hardware": record.hardware(),
            "seconds": watch.report(),
            "peak_memory": record.peak_memory(),
            "notes": list(photo.notes),
        }


def enlarge(pixels: Float[np.ndarray, "h w ..."], size: tuple[int, int]) -> UInt8[np.ndarray, "H W ..."]:
    """Bicubic (a = -1/2) to `size` (height, width), antialiased where it shrinks, as 8 bits."""
    planes = np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels[None]
    out = np.empty((*size, len(planes)), np.uint8)
    for i, plane in enumerate(planes):  # floats, one plane at a time: a 16-bit photo keeps its precision until here
        image = Image.fromarray(np.ascontiguousarray(plane, np.float32))
        out[..., i] = to_uint8(np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)))
    return out if pixels.ndim == 3 else out[..., 0]


class _Job:
    """One photo on its way through the stages."""

    def __init__(
        self,
        restorer: Restorer,
        settings: Settings,
        tile: int,
        index: int,
        before: UInt8[np.ndarray, "H W 3"],
        degradation: str | None,
        watch: record.Stopwatch,
        progress: Progress,
    ) -> None:
        self.system, self.group, self.watch, self.progress = restorer.system, restorer.group, watch, progress
        self.stages, self.cache = restorer.stages, restorer.prompts
        self.settings, self.index, self.degradation = settings, index, degradation
        self.schedule = restorer.schedule
        self.shape = before.shape
        factor = self.system.latent_factor
        height, width = (max(tile, -(-side // factor)) for side in before.shape[:2])
        self.plan = TilePlan.even(height, width, tile, tile // OVERLAP)
        self.pixel_plan = self.plan.scaled(factor)
        pad = [(0, factor * cells - side) for cells, side in zip((height, width), before.shape)]
        self.photo = np.pad(before, [*pad, (0, 0)], mode="reflect") if any(end for _, end in pad) else before
        self.group = min(self.group, len(self.plan))
        self.done, self.total = 0, len(self.plan) * (3 + settings.steps)

    def run(self) -> Float32[np.ndarray, "H W 3"]:
        """Encode, prompt, sample, decode; pixels in about [0, 1], not clipped."""
        with self.stage("encode"):
            lq_latent = self.over_tiles("encode", lambda n: _encode(self.frozen("encode"), self.pixels(n)), self.plan)
        with TileStore() as prompts, TileStore() as controls:
            self.look(prompts, lq_latent)
            with self.stage("sample"):
                self.steer(controls, lq_latent)
                z0 = self.sample(lambda numbers: (prompts.stacked(numbers), controls.stacked(numbers)), lq_latent)
        with self.stage("decode"):

            def decode(numbers: list[int]) -> Array:
                return _finish(self.frozen("decode"), self.plan.crop(z0, numbers), self.plan.crop(lq_latent, numbers))

            content = self.over_tiles("decode", decode, self.pixel_plan)
        return content[: self.shape[0], : self.shape[1]]

    def frozen(self, stage: Stage) -> Frozen:
        """The system for a stage; not to be kept, or its networks stay in memory."""
        return self.stages.frozen(stage)

    @contextlib.contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Brings the networks of a stage into memory and times both, apart."""
        with self.watch.stage("load"):
            self.frozen(stage)
        with self.watch.stage({"text": "prompts", "look": "prompts"}.get(stage, stage)):
            yield

    def pixels(self, numbers: list[int]) -> Float32[np.ndarray, "G S S 3"]:
        return to_float(self.pixel_plan.crop(self.photo, numbers))

    def over_tiles(self, stage: str, compute: Callable[[list[int]], Array], plan: TilePlan) -> np.ndarray:
        channels = self.system.channels if plan is self.plan else 3
        return blend_tiles(compute, plan, channels, group=self.group, progress=lambda n: self.advance(stage, n))

    def advance(self, stage: str, tiles: int) -> None:
        self.done += tiles
        self.progress(stage, self.done, self.total)

    def look(self, prompts: TileStore, lq_latent: np.ndarray) -> None:
        """Computes the prompts of every tile, which no step changes, or takes them from the cache."""
        photo, restored = self.photo, self.system.prompt_source == "restored"

        def decode(numbers: list[int]) -> Array:
            return _decode(self.frozen("decode"), self.plan.crop(lq_latent, numbers))

        if restored:
            with self.stage("decode"):
                photo = to_uint8(self.over_tiles("prompts", decode, self.pixel_plan))
            self.done -= len(self.plan)
        keys, structure = self.cached_tiles(photo)
        if keys and (known := [self.cache.read(key) for key in keys]) and None not in known:
            for entry in known:
                prompts.append(jax.tree.unflatten(structure, entry))
            self.advance("prompts", len(self.plan))
            return
        texts = [self.text(prompt) for prompt in (self.settings.prompt, self.settings.negative_prompt)]
        with self.stage("look"):
            whole = photo[: self.shape[0], : self.shape[1]]
            scene = self.frozen("look").thaw().scene(whole, *texts, self.degradation)
            for numbers in self.plan.groups(self.group):
                seen = to_float(self.pixel_plan.crop(photo, numbers))
                found = jax.tree.map(np.asarray, _condition(self.frozen("look"), scene, seen))
                for row, number in enumerate(dict.fromkeys(numbers)):
                    tile = jax.tree.map(lambda leaf, row=row: leaf[row], found)
                    prompts.append(tile)
                    if keys:
                        self.cache.write(keys[number], jax.tree.leaves(tile))
                self.advance("prompts", len(set(numbers)))

    def cached_tiles(self, photo: UInt8[np.ndarray, "H W 3"]) -> tuple[list[str], Any]:
        """The names of the tiles' prompts in the cache and their structure; none where they are not kept."""
        structure = getattr(self.system, "prompts_structure", None)
        if structure is None or not self.cache.on_disk:
            return [], None
        texts = self.settings.prompt, self.settings.negative_prompt
        parts = {"photo": hashlib.sha256(photo.tobytes()).hexdigest(), "size": self.shape, "texts": texts}
        parts |= {} if self.degradation is None else {"degradation": self.degradation}
        keys = [self.cache.key(kind="tile", window=window, **parts) for window in self.pixel_plan.windows]
        return keys, structure(texts[1] is not None)

    def text(self, prompt: str | None) -> Any:
        """The prompt, as tokens where the system encodes it on its own."""
        if prompt is None or not hasattr(self.system, "text_tokens"):
            return prompt

        def encode() -> np.ndarray:
            with self.stage("text"):
                return np.asarray(self.frozen("text").thaw().text_tokens(prompt))

        return self.cache.text(prompt, encode)

    def steer(self, controls: TileStore, lq_latent: np.ndarray) -> None:
        """Computes the control of every tile, which no step changes either."""
        for numbers in self.plan.groups(self.group):
            found = jax.tree.map(np.asarray, _control(self.frozen("sample"), self.plan.crop(lq_latent, numbers)))
            for row in range(len(set(numbers))):
                controls.append(jax.tree.map(lambda leaf, row=row: leaf[row], found))

    def start(self, lq_latent: np.ndarray) -> Float32[np.ndarray, "h w C"]:
        """z at sigma 1, on the canvas."""
        noise = canvas_noise(self.settings.seed, self.index, self.plan.height, self.plan.width, self.system.channels)

        def start(numbers: list[int]) -> Array:
            return _start(self.frozen("sample"), self.plan.crop(noise, numbers), self.plan.crop(lq_latent, numbers))

        return blend_tiles(start, self.plan, self.system.channels, group=self.group)

    def sample(self, prompts: Prompts, lq_latent: np.ndarray) -> Float32[np.ndarray, "h w C"]:
        """Noise to z_0: in one program if one tile holds the photo, else step by step on the canvas."""
        if isinstance(self.schedule, DDPMSchedule):
            return self.sample_ddpm(prompts, lq_latent)
        steps, guidance = self.settings.steps, np.float32(self.settings.guidance)
        fidelity = np.float32(self.settings.fidelity)
        sigmas = np.asarray(self.schedule.sampling_table(steps))
        if len(self.plan) == 1:
            z, lq, both = self.start(lq_latent)[None], lq_latent[None], prompts([0])
            z0 = np.asarray(_sample(self.frozen("sample"), z, sigmas, steps, lq, both, guidance, fidelity))[0]
            self.advance("sample", steps)
            return z0

        def velocity(tiles: np.ndarray, k: int, numbers: list[int]) -> Array:
            lq, both = self.plan.crop(lq_latent, numbers), prompts(numbers)
            return _velocity(self.frozen("sample"), tiles, sigmas[k], lq, both, guidance, fidelity)

        return tiled_euler(
            velocity,
            self.start(lq_latent),  # named by nobody, so that it goes when the first step is done
            sigmas[: steps + 1],
            self.plan,
            group=self.group,
            progress=lambda tiles: self.advance("sample", tiles),
        )

    def sample_ddpm(self, prompts: Prompts, lq_latent: np.ndarray) -> Float32[np.ndarray, "h w C"]:
        """The same along DDPM's path, with the sampler that the settings name."""
        settings, shape = self.settings, (self.plan.height, self.plan.width, self.system.channels)
        table = jax.tree.map(np.asarray, _table(self.schedule, settings.sampler, settings.steps))
        strengths = np.float32(settings.guidance), np.float32(settings.fidelity)

        def noise(k: int) -> np.ndarray | float:
            return canvas_noise(settings.seed, self.index, *shape, draw=k + 1) if table.noise[k] else 0.0

        if len(self.plan) == 1:
            noises = None
            if table.noise[: settings.steps].any():
                noises = np.zeros((len(table.noise), 1, *shape), np.float32)
                for k in range(settings.steps):
                    noises[k] = noise(k)
            z, conditions = self.start(lq_latent)[None], (lq_latent[None], prompts([0]), *strengths)
            frozen = self.frozen("sample")
            z0 = np.asarray(_walk(self.schedule, frozen, z, table, settings.steps, noises, *conditions))[0]
            self.advance("sample", settings.steps)
            return z0

        def estimate(tiles: np.ndarray, row: ddpm.Table, numbers: list[int]) -> Array:
            conditions = self.plan.crop(lq_latent, numbers), prompts(numbers), *strengths
            return _estimate(self.schedule, self.frozen("sample"), tiles, row, *conditions)

        return tiled_ddpm(
            estimate,
            self.start(lq_latent),
            jax.tree.map(lambda column: column[: settings.steps], table),
            self.plan,
            noise,
            group=self.group,
            progress=lambda tiles: self.advance("sample", tiles),
        )


# --- loading ---------------------------------------------------------------------------------------------------------


def load(
    name_or_folder: str | Path,
    *,
    dtype: DTypeLike | None = None,
    tile: int | None = None,
    stage_loading: str = "auto",
    text: bool = True,
    prompt_cache: str | Path | None = None,
) -> Restorer:
    """Loads a model and switches the compilation cache on disk on.

    Args:
      name_or_folder: an embedded model (`dpir models` lists them) or a model folder.
      dtype: "float32" or "bfloat16", of the weights and, but for a CPU, the products; None: float32 on a CPU, else
        bfloat16.
      tile: side of a tile in pixels of the output; None: the model's.
      stage_loading: "always" has only the networks of the stage at hand in memory, "never" all of them; "auto": the
        former for a model that would fill more than half of the memory.
      text: False leaves the text encoder out; no prompts then.
      prompt_cache: folder for encoded prompts, which are found again by model, text and photo.

    Raises:
      InputError: no such model, damaged files, a setting that it cannot have.
    """
    compilation_cache.enable()
    folder = find_model(name_or_folder)
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype or default).name
    stages, defaults, schedule = load_system(folder, name, loading=stage_loading, text=text)
    model = with_reader(describe(folder))
    settings = {"defaults": defaults, "schedule": schedule, "tile": tile, "dtype": name}
    return Restorer(stages, model=model, prompt_cache=prompt_cache, **settings)
