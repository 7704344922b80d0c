"""A photo's semantic prompt, as DaLPSR has it: RAM names what is in it, LLaVA describes it and is told these names.

    photo -> RAM -> "tree, boat, lake" -> "The image contains: tree, boat, lake. Describe ..." -> LLaVA -> caption

The tags keep the description from inventing things. Both networks come out of model folders with converted weights:
`llava` with its `tokenizer/`, `ram` with its list of tags (`ram_tag_list.txt`, one a line) and, where there are any,
their thresholds (`ram_tag_list_threshold.txt`).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import Image

from dpir_jax import model_folder
from dpir_jax.errors import InputError
from dpir_jax.models.clip import DEVIATION, MEAN, CLIPVisionConfig
from dpir_jax.models.layers import Keys
from dpir_jax.models.llama import Decoding, LlamaConfig
from dpir_jax.models.llava import Llava, LlavaConfig
from dpir_jax.models.precision import Precision
from dpir_jax.models.ram import RAM, THRESHOLD, RAMConfig, ram_preprocess
from dpir_jax.models.swin import SwinConfig
from dpir_jax.systems.config_json import from_json
from dpir_jax.systems.tokenizers import hugging_face_tokenizer

TAGS, THRESHOLDS = "ram_tag_list.txt", "ram_tag_list_threshold.txt"
CONFIGS = {cls.__name__: cls for cls in (LlavaConfig, LlamaConfig, CLIPVisionConfig, RAMConfig, SwinConfig)}
CHAT = (  # the conversation that LLaVA-1.5 was tuned on (template "vicuna_v1")
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. USER: <image>\n{question} ASSISTANT:"
)
ROUND = 64  # prompts are padded to a multiple of this, so that few lengths compile

INSTRUCTIONS = {
    "tags": "The image contains: {tags}. Describe the content of this image in detail, in plain sentences, mentioning "
    "only what is visible.",
    "tags-short": "The image contains: {tags}. Say in one sentence what this image shows.",
    "detailed": "Describe this image and its style in a very detailed manner.",  # SUPIR's
    "summary": "Please provide a descriptive summary of the content of this image.",  # XPSR's
}


class ChatTokenizer(Protocol):
    """Text to ids and back; `<image>` is one id."""

    def encode(self, text: str) -> list[int]:
        """With the token that begins a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Without special tokens."""


@dataclasses.dataclass(frozen=True)
class Tagger:
    """RAM with the names of its tags and the probability above which each is on."""

    ram: RAM
    names: tuple[str, ...]
    thresholds: Float[np.ndarray, " tags"]

    def __call__(self, pictures: Float[np.ndarray, "B S S 3"]) -> list[list[str]]:
        """The tags of each picture in [0, 1], in the order of the list."""
        on = np.asarray(_probabilities(self.ram, pictures)) > self.thresholds
        return [[self.names[i] for i in np.flatnonzero(row)] for row in on]


@dataclasses.dataclass(frozen=True)
class Captioner:
    """LLaVA with its tokenizer, and a tagger or None."""

    llava: Llava
    tokenizer: ChatTokenizer
    tagger: Tagger | None = None

    def __call__(
        self,
        photos: Sequence[UInt8[np.ndarray, "H W 3"]],
        *,
        instruction: str = "tags",
        decoding: Decoding = Decoding(),  # noqa: B008 -- frozen
        seed: int = 0,
    ) -> list[str]:
        """Captions of photos of any sizes, each on one line; they are described together, in one batch.

        Raises:
          InputError: an unknown instruction, or one with tags and no tagger.
        """
        question = questioned(instruction)
        tags: list[list[str]] = [[] for _ in photos]
        if "{tags}" in question:
            if self.tagger is None:
                plain = ", ".join(name for name, text in INSTRUCTIONS.items() if "{tags}" not in text)
                raise InputError(f"instruction {instruction} needs a tagger; give one, or take one of {plain}")
            size = self.tagger.ram.config.swin.image_size
            tags = self.tagger(np.stack([stretched(photo, size) for photo in photos]))
        ids, mask = self.prompts([question.replace("{tags}", ", ".join(names)) for names in tags])
        size = self.llava.config.vision.image_size
        pixels = np.stack([squared(photo, size) for photo in photos])
        tokens, lengths = jax.device_get(_generate(decoding, self.llava, ids, pixels, mask, jax.random.key(seed)))
        texts = [self.tokenizer.decode(row[:length].tolist()) for row, length in zip(tokens, lengths)]
        return [" ".join(text.split()) for text in texts]

    def prompts(self, questions: Sequence[str]) -> tuple[Int[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """Token ids with the image's places in them, and which are real; padded on the left to one length.

        Raises:
          InputError: the tokenizer has no image token.
        """
        image, rows = self.llava.config.image_token, []
        for question in questions:
            row: list[int] = []
            for token in self.tokenizer.encode(CHAT.replace("{question}", question)):
                row += [image] * self.llava.config.patches if token == image else [token]
            if image not in row:
                raise InputError(f"LLaVA's tokenizer does not read <image> as token {image}; it is another model's")
            rows.append(row)
        length = -(-max(map(len, rows)) // ROUND) * ROUND
        ids = np.array([[0] * (length - len(row)) + row for row in rows], np.int32)
        return ids, np.array([[False] * (length - len(row)) + [True] * len(row) for row in rows])


def questioned(instruction: str) -> str:
    """The text of a named instruction, `{tags}` in it where it wants them; `InputError` if there is none."""
    if instruction not in INSTRUCTIONS:
        raise InputError(f"unknown instruction {instruction!r}; there are {', '.join(INSTRUCTIONS)}")
    return INSTRUCTIONS[instruction]


def stretched(photo: UInt8[np.ndarray, "H W 3"], size: int) -> Float[np.ndarray, "size size 3"]:
    """The photo at RAM's size, aspect not kept (as published), in [0, 1]."""
    image = Image.fromarray(photo).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32) / 255


def squared(photo: UInt8[np.ndarray, "H W 3"], size: int) -> Float[np.ndarray, "size size 3"]:
    """The whole photo in the middle of a square of CLIP's mean colour, as LLaVA-1.5 sees it, normalised."""
    side = max(photo.shape[:2])
    canvas = np.empty((side, side, 3), np.uint8)
    canvas[...] = np.array([int(255 * mean) for mean in MEAN])
    top, left = ((side - length) // 2 for length in photo.shape[:2])
    canvas[top : top + photo.shape[0], left : left + photo.shape[1]] = photo
    image = Image.fromarray(canvas).resize((size, size), Image.Resampling.BICUBIC)
    return (np.asarray(image, np.float32) / 255 - np.asarray(MEAN, np.float32)) / np.asarray(DEVIATION, np.float32)


@jax.jit
def _probabilities(ram: RAM, pictures: Array) -> Array:
    return jax.nn.sigmoid(ram(ram_preprocess(pictures, ram.config.swin.image_size))[1])


def _generated(
    decoding: Decoding, llava: Llava, ids: Array, pixels: Array, mask: Array, key: Array
) -> tuple[Array, Array]:
    return llava.generate(ids, pixels, decoding, key, mask)


_generate = jax.jit(_generated, static_argnums=0)


# --- model folders ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LlamaTokenizer:
    """Of transformers, from its folder."""

    tokenizer: Any

    @classmethod
    def read(cls, folder: Path) -> "LlamaTokenizer":
        """`InputError` if the folder holds none."""
        if not folder.is_dir():  # transformers would look for a model of that name on the network
            raise InputError(f"there is no {folder}; put the files of LLaVA's tokenizer there")
        return cls(hugging_face_tokenizer(str(folder)))

    def encode(self, text: str) -> list[int]:
        """With the token that begins a text."""
        return list(self.tokenizer(text)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def read_captioner(folder: str | Path, tagger: str | Path | None = None, *, dtype: str = "float32") -> Captioner:
    """LLaVA of a model folder and RAM of another, or of the same where `tagger` is None and it holds one.

    Raises:
      InputError: a network, tokenizer or list of tags that is missing, damaged or does not fit.
    """
    folder = Path(folder)
    precision = Precision(jnp.dtype(dtype), jnp.dtype(dtype))
    llava = _read(folder, "llava", LlavaConfig, Llava, precision)
    if tagger is None and (folder / "ram.safetensors").is_file():
        tagger = folder
    tokenizer = LlamaTokenizer.read(folder / "tokenizer")
    return Captioner(llava, tokenizer, None if tagger is None else read_tagger(tagger, dtype=dtype))


def read_tagger(folder: str | Path, *, dtype: str = "float32") -> Tagger:
    """RAM, RAM++ or DAPE of a model folder, with its tags.

    Raises:
      InputError: as for `read_captioner`.
    """
    folder = Path(folder)
    ram = _read(folder, "ram", RAMConfig, RAM, Precision(jnp.dtype(dtype), jnp.dtype(dtype)))
    names = tuple(_lines(folder / TAGS))
    if len(names) != ram.config.tags:
        raise InputError(f"{folder / TAGS} has {len(names)} tags; the checkpoint beside it has {ram.config.tags}")
    if not (folder / THRESHOLDS).is_file():
        return Tagger(ram, names, np.full(len(names), THRESHOLD, np.float32))
    try:
        thresholds = np.array([float(line) for line in _lines(folder / THRESHOLDS)], np.float32)
    except ValueError as error:
        raise InputError(f"{folder / THRESHOLDS} must hold one number a line: {error}") from error
    if len(thresholds) != len(names):
        raise InputError(f"{folder / THRESHOLDS} has {len(thresholds)} thresholds for {len(names)} tags")
    return Tagger(ram, names, thresholds)


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _read(folder: Path, name: str, kind: type, network: type, precision: Precision) -> Any:
    listed = model_folder.read_config(folder).get("networks")
    entry = listed.get(name) if isinstance(listed, dict) else None
    if not isinstance(entry, dict):
        raise InputError(f"{folder} holds no network {name}")
    config = from_json(entry.get("config"), CONFIGS)
    if not isinstance(config, kind):
        raise InputError(f"{folder / 'config.json'} holds no {kind.__name__} for {name}")
    abstract = nnx.eval_shape(lambda: network(config, rngs=Keys(0), precision=precision))
    return model_folder.load_network(folder, name, abstract)
