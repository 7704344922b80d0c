"""Text to token ids: CLIP's own tokenizer, or a small one of whole words; and windows, so that no text is cut unseen.

A text tower reads rows of a fixed length L. A long text fills several, each with its own begin and end:

    [begin, t_1 .. t_(L-2), end], [begin, t_(L-1) .., end, pad ..], ...

whose states are put side by side: a context of any number of rows. What is over the last row is cut, and said.
"""

import dataclasses
import functools
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from dpir_jax.errors import InputError
from dpir_jax.files import read_json

log = logging.getLogger(__name__)

WORDS_FILE = "words.json"
WORD = re.compile(r"[0-9.]*[0-9](?:~[0-9.]*[0-9])?|[^\W\d_]+|,")  # an interval is one word


class Tokenizer(Protocol):
    """`begin`, `end`, `pad`: ids of the tokens around a text."""

    begin: int
    end: int
    pad: int

    def ids(self, text: str) -> list[int]:
        """The text's own tokens."""

    def passed_over(self, text: str) -> str | None:
        """What of the text has no token, in words for a warning; None where all has."""


@dataclasses.dataclass(frozen=True)
class WordTokenizer:
    """Whole words of a list, lower case; words that are not in it are passed over, and said."""

    words: tuple[str, ...]

    pad, begin, end = 0, 1, 2
    first = 3

    @classmethod
    def of(cls, texts: Iterable[str]) -> "WordTokenizer":
        """The words of some texts."""
        return cls(tuple(sorted({word for text in texts for word in WORD.findall(text.lower())})))

    @property
    def vocabulary(self) -> int:
        """Ids in all."""
        return self.first + len(self.words)

    def ids(self, text: str) -> list[int]:
        """One id per known word."""
        return [self.first + self.words.index(word) for word in WORD.findall(text.lower()) if word in self.words]

    def passed_over(self, text: str) -> str | None:
        """The first unknown words."""
        unknown = [word for word in dict.fromkeys(WORD.findall(text.lower())) if word not in self.words]
        if not unknown:
            return None
        some = ", ".join(unknown[:5]) + (" ..." if len(unknown) > 5 else "")
        return f"this model knows {len(self.words)} words and passes over: {some}"


@dataclasses.dataclass(frozen=True)
class CLIPTokenizer:
    """CLIP's byte-pair tokenizer from a folder in Hugging Face's format."""

    folder: str

    begin, end = 49406, 49407

    @property
    def pad(self) -> int:
        """What the folder says: "!" (0) for Stable Diffusion 2, the end token for OpenAI's."""
        return int(hugging_face_tokenizer(self.folder).pad_token_id)

    def ids(self, text: str) -> list[int]:
        """Byte pairs."""
        return list(hugging_face_tokenizer(self.folder)(text, add_special_tokens=False, verbose=False)["input_ids"])

    def passed_over(self, text: str) -> None:
        """Nothing: bytes spell everything."""


@functools.cache
def hugging_face_tokenizer(folder: str) -> Any:
    """The tokenizer in a folder of Hugging Face's files.

    Raises:
      InputError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer  # heavy, and only for a converted model

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged file can raise anything; the Rust library's errors are bare ones
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder} holds no tokenizer that can be read: {reason}") from error


def t5_ids(texts: Sequence[str], folder: str | Path, length: int) -> Int[np.ndarray, "B length"]:
    """T5's ids of some texts: padded to `length`, or cut there with the end token kept.

    Raises:
      InputError: the folder holds no tokenizer.
    """
    made = hugging_face_tokenizer(str(folder))(list(texts), padding="max_length", truncation=True, max_length=length)
    return np.asarray(made["input_ids"], np.int32)


def read_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in a folder: `words.json` or Hugging Face's files.

    Raises:
      InputError: neither, or damaged.
    """
    words = Path(folder) / WORDS_FILE
    if not words.is_file():
        return CLIPTokenizer(str(folder))
    listed = read_json(words)
    if not isinstance(listed, list) or not all(isinstance(word, str) for word in listed):
        raise InputError(f"{words} is not a list of words")
    return WordTokenizer(tuple(listed))


def windows(tokenizer: Tokenizer, text: str, length: int, most: int, *, what: str = "the prompt") -> list[list[int]]:
    """Rows of `length` ids, at least one, at most `most`; what does not fit or has no token is said in one warning.

    Args:
      tokenizer: of the text tower.
      text: any.
      length: that the text tower reads at once.
      most: rows.
      what: the text's name in the warning.
    """
    text = " ".join(text.split())
    tokens, room, unknown = tokenizer.ids(text), length - 2, tokenizer.passed_over(text)
    notes = [unknown] if unknown else []
    if len(tokens) > most * room:
        notes.insert(0, f"{what} has {len(tokens)} tokens; this model reads the first {most * room}")
        tokens = tokens[: most * room]
    if notes:
        log.warning("%s", "; ".join(notes))
    rows = [tokens[start : start + room] for start in range(0, max(len(tokens), 1), room)]
    return [[tokenizer.begin, *row, tokenizer.end] + [tokenizer.pad] * (room - len(row)) for row in rows]


def filled(tokenizer: Tokenizer, rows: list[list[int]], count: int, length: int) -> Int[np.ndarray, "count length"]:
    """The rows and, behind them, rows of no text."""
    empty = [tokenizer.begin, tokenizer.end] + [tokenizer.pad] * (length - 2)
    return np.array(rows + [empty] * (count - len(rows)), np.int32)
