"""Many photos: files and folders in, a folder of restored photos and run records out.

Each photo becomes NAME.png and NAME.json, and NAME_compare.png if asked for. The record is the mark of a finished
photo: one whose record says the same photo, model, settings and versions is passed over, so a job that was stopped goes
on where it was.
"""

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax

from dpir_jax import files, images
from dpir_jax.captions.caption_files import read_caption
from dpir_jax.errors import InputError
from dpir_jax.restore.restorer import Progress, Restorer, Result
from dpir_jax.restore.settings import Settings

RESTORED = (".png", ".json", "_compare.png")


@dataclasses.dataclass(frozen=True)
class Item:
    """A photo of a job. `name`: of the outputs, below the output folder and without suffix. `index`: for its noise."""

    photo: Path
    name: Path
    index: int

    def output(self, out: Path, suffix: str) -> Path:
        """The output file with one of the suffixes `RESTORED`."""
        return out / self.name.with_name(self.name.name + suffix)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a photo: restored, passed over (`result` is None), or an error."""

    item: Item
    result: Result | None = None
    error: InputError | None = None


def plan_job(sources: Iterable[str | os.PathLike], out: str | os.PathLike) -> list[Item]:
    """The photos of files and folders with the names of their outputs; folders keep their structure.

    A photo's index counts the photos of its source from 0, in order of their names; one given by itself has index 0.

    Raises:
      InputError: a source that does not exist or holds no photo; two photos with one name; outputs over inputs.
    """
    found: dict[Path, tuple[Path, int]] = {}
    for source in map(Path, sources):
        folder = source if source.is_dir() else source.parent
        for index, photo in enumerate(images.find_photos(source)):
            found.setdefault(photo, (photo.relative_to(folder), index))
    stems = Counter(relative.with_suffix("") for relative, _ in found.values())
    items, taken = [], {}
    for photo, (relative, index) in found.items():
        name = relative.with_suffix("")
        if stems[name] > 1:  # a.jpg beside a.png
            name = relative.with_name(relative.name.replace(".", "_"))
        if name in taken:
            raise InputError(f"{taken[name]} and {photo} would both become {name}.png; restore them to two folders")
        taken[name] = photo
        items.append(Item(photo, name, index))
    originals = {photo.resolve(): photo for photo in found}
    for item in items:
        for suffix in RESTORED:
            if over := originals.get(item.output(Path(out), suffix).resolve()):
                raise InputError(f"restoring {item.photo} would overwrite {over}; choose another output folder")
    return items


def run_job(
    restorer: Restorer,
    items: Sequence[Item],
    out: str | os.PathLike,
    settings: Settings,
    *,
    compare: bool = False,
    overwrite: bool = False,
    progress: Callable[[Item], Progress | None] = lambda item: None,
) -> Iterator[Outcome]:
    """Restores photo after photo, and yields what became of each; an error with one does not stop the others.

    Args:
      restorer: the model.
      items: from `plan_job`.
      out: the folder, made if need be.
      settings: for all; without a prompt, each photo's own caption (`NAME.txt` beside it) is read.
      compare: also write the enlarged photo and the restored one side by side.
      overwrite: restore what is already there again, too.
      progress: gives a photo's progress function, see `Restorer`.
    """
    out = Path(out)
    for item in items:
        try:
            own = captioned(restorer, item, settings)
            if not overwrite and up_to_date(restorer, item, out, own, compare):
                yield Outcome(item)
                continue
            result = restorer.restore(item.photo, own, index=item.index, progress=progress(item))
            write(result, item, out, compare)
        except InputError as error:
            yield Outcome(item, error=error)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            reason = (str(error).splitlines() or ["out of memory"])[0]
            yield Outcome(item, error=InputError(f"{item.photo} failed ({reason}); a smaller tile needs less memory"))
        else:
            yield Outcome(item, result)


def captioned(restorer: Restorer, item: Item, settings: Settings) -> Settings:
    """The settings with the caption beside the photo, where the model reads text and no prompt is given."""
    if settings.prompt is not None or not restorer.system.reads_text:
        return settings
    return dataclasses.replace(settings, prompt=read_caption(item.photo))


def up_to_date(restorer: Restorer, item: Item, out: Path, settings: Settings, compare: bool) -> bool:
    """Whether the outputs are there and the record says that restoring would make them again."""
    record = item.output(out, ".json")
    needed = [item.output(out, ".png"), *([item.output(out, "_compare.png")] if compare else [])]
    if not record.is_file() or not all(path.is_file() for path in needed):
        return False
    try:
        known = files.read_json(record)
        same_photo = known["photo"]["sha256"] == files.sha256(item.photo)
        return same_photo and all(known[key] == value for key, value in restorer.identity(settings, item.index).items())
    except (InputError, OSError, KeyError, TypeError):
        return False  # not a record of ours; the photo itself is read, and complained about, later


def write(result: Result, item: Item, out: Path, compare: bool) -> None:
    """Writes a photo's outputs: all, or none of them."""
    with contextlib.ExitStack() as stack:  # renamed in reverse: the record last, when the photo is in place
        record = stack.enter_context(files.atomic_path(item.output(out, ".json")))
        photo = stack.enter_context(files.atomic_path(item.output(out, ".png")))
        files.write_json(record, result.record)
        result.save(photo)
        if compare:
            sheet = stack.enter_context(files.atomic_path(item.output(out, "_compare.png")))
            images.write_png(
                sheet, images.side_by_side([result.before, result.pixels], ["enlarged (bicubic)", "restored"])
            )
