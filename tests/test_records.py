"""Built data sets and stored embeddings: written without TensorFlow, read by number, mixed, shared, resumed."""

import dataclasses
import io
import json
import logging
import resource
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpir_jax import precompute as precomputing
from dpir_jax.cli import main
from dpir_jax.data import dpir_photos
from dpir_jax.data.embeddings import Embeddings, dequantize, quantize, write_shard
from dpir_jax.data.photos import PhotoFolder
from dpir_jax.data.pipeline import DataConfig, make_dataset
from dpir_jax.data.records import PhotoRecords, parse_example
from dpir_jax.errors import InputError
from dpir_jax.files import read_json, write_json
from dpir_jax.models.attention import use_attention_backend
from dpir_jax.models.layers import Keys
from dpir_jax.precompute import open_photos, precompute
from dpir_jax.systems.dpir import DPIR, DPIRConfig
from dpir_jax.systems.dpir_folder import read_dpir, save_dpir
from dpir_jax.systems.tokenizers import t5_ids
from dpir_jax.training.config import Recipe
from dpir_jax.training.dpir_tasks import DiTTask
from dpir_jax.training.loop import train
from tests.networks import quick_jit, random_network

WORDS = ("a", "rough", "sea", "maple", "photo", "of")


def photo(number, height=40, width=48):
    """Red tells the photo, green the row, blue the column."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([np.full_like(y, 10 * number), y, x], axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """Eight photos in two folders, one of them too small and one no photo at all."""
    root = tmp_path_factory.mktemp("collection")
    for number in range(6):
        folder = root / ("one" if number < 3 else "two/deep")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(number)).save(folder / f"p{number}.png")
    Image.fromarray(photo(9, 20, 60)).save(root / "one" / "small.webp", lossless=True)
    (root / "one" / "text.jpg").write_text("hello")
    facts = {"file_name": "p1.png", "caption": "a rough sea", "license": "CC0-1.0", "source": "https://example.org/1"}
    (root / "one" / "metadata.jsonl").write_text(json.dumps(facts) + "\n")
    (root / "two" / "deep" / "p3.txt").write_text("a maple\n")
    return root


@pytest.fixture(scope="module")
def built(collection, tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    assert main(["pack", str(collection), "--out", str(out)]) == 0
    return out / "dpir_photos" / "local" / "1.0.0"


# --- data sets -------------------------------------------------------------------------------------------------------


def test_a_data_set_holds_the_photos_and_what_is_known_of_them(built, collection, caplog):
    records = PhotoRecords(built)
    facts = {records.facts(i)["name"]: records.facts(i) for i in range(len(records))}
    assert sorted(facts) == ["one/p0.png", "one/p1.png", "one/p2.png", "one/small.webp"] + [
        f"two/deep/p{number}.png" for number in (3, 4, 5)
    ]
    assert facts["one/p0.png"]["image"] == (collection / "one" / "p0.png").read_bytes()
    one = facts["one/p1.png"]
    assert (one["caption"], one["license"], one["source"]) == ("a rough sea", "CC0-1.0", "https://example.org/1")
    assert (one["height"], one["width"]) == (40, 48)
    assert facts["two/deep/p3.png"]["caption"] == "a maple"
    assert facts["one/p0.png"]["caption"] == ""
    small = np.asarray(Image.open(io.BytesIO(facts["one/small.webp"]["image"])))  # a PNG now
    np.testing.assert_array_equal(small, photo(9, 20, 60))
    for index in range(len(records)):
        if not records.facts(index)["name"].endswith("webp"):
            np.testing.assert_array_equal(records[index], photo(records[index][0, 0, 0] // 10))


def test_photos_that_are_left_out_are_named(collection, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(list(dpir_photos.all_examples(collection))) == 7
    assert "text.jpg is not a photo" in caplog.text


def test_neither_writing_nor_reading_needs_tensorflow(built):
    import sys

    assert PhotoRecords(built)[0].shape[2] == 3
    assert "tensorflow" not in sys.modules


def test_beam_builds_the_same_records(built, collection, tmp_path):
    pytest.importorskip("apache_beam", reason="needs the extra [beam]")
    assert main(["pack", str(collection), "--out", str(tmp_path), "--beam=--runner=DirectRunner"]) == 0
    ours, others = PhotoRecords(built), PhotoRecords(tmp_path / "dpir_photos" / "beam" / "1.0.0")
    assert [others.facts(i) for i in range(len(others))] == [ours.facts(i) for i in range(len(ours))]


def test_splits_and_metadata(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        Image.fromarray(photo(len(split))).save(tmp_path / "photos" / split / "a.png")
    built = dpir_photos.build(tmp_path / "photos", tmp_path / "built")
    assert PhotoRecords(built)[0][0, 0, 0] == 50
    assert PhotoRecords(built / "*-validation.array_record*")[0][0, 0, 0] == 100
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "März.png"}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"metadata\.jsonl cannot be read as UTF-8 text"):
        dpir_photos.read_metadata(tmp_path / "metadata.jsonl")
    with pytest.raises(InputError, match="no photos in"):
        dpir_photos.build(tmp_path / "built", tmp_path / "other")


def test_metadata_lines(tmp_path):
    for name in ("a", "b"):
        Image.fromarray(photo(1)).save(tmp_path / f"{name}.png")
    path = tmp_path / "metadata.jsonl"
    caption = "a sea\u2028of\x85fog"  # JSON may hold them as they are
    path.write_text(f'{{"file_name": "a.png", "caption": "{caption}"}}\r\n\n{{"file_name": "b.png"}}\n\n', "utf-8")
    known = dpir_photos.read_metadata(path)
    assert {name: facts.get("caption") for name, facts in known.items()} == {"a.png": caption, "b.png": None}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('["b"]', "line 2 is no JSON object with a file_name"),
        ('{"file_name": "a.png", "caption": 5}', "line 2: caption is 5; it must be text"),
        ('{"file_name": null}', "line 2: file_name is None; it must be text"),
        ('{"file_name": "A.png"}', r"line 2: .* has no photo A.png; correct the name"),
        ('{"file_name": "sub/b.png"}', r"line 2: .* has no photo sub/b.png; .* a metadata.jsonl beside the photo"),
    ],
)
def test_wrong_metadata_is_named_before_anything_is_packed(tmp_path, line, words):
    photos, out = tmp_path / "photos", tmp_path / "out"
    (photos / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        Image.fromarray(photo(1)).save(photos / name)
    (photos / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": null}\n' + line)
    with pytest.raises(InputError, match=words):
        dpir_photos.build(photos, out)
    (photos / "a.png").rename(photos / "sub" / "a.png")  # no folder of photos any more, but the file is still there
    with pytest.raises(InputError, match=r"line 1: .* has no photo a.png"):
        dpir_photos.build(photos, out)
    assert not out.exists()


def test_what_cannot_be_packed(tmp_path, capsys):
    photos, file = tmp_path / "photos", tmp_path / "file"
    (photos / "validation").mkdir(parents=True)
    Image.fromarray(photo(1)).save(photos / "validation" / "a.png")
    file.write_text("")
    assert main(["pack", str(photos), "--out", str(file)]) == 2
    assert f"cannot write a data set to {file}" in capsys.readouterr().err
    out = tmp_path / "sets [v1]"
    assert main(["pack", str(photos), "--out", str(out)]) == 0
    assert "0 photos to train on in" in capsys.readouterr().out
    built = out / "dpir_photos" / "local" / "1.0.0"
    with pytest.raises(InputError, match="no ArrayRecord files to train on in"):
        PhotoRecords(built)
    (built / ".x-validation.array_record.part").write_text("hidden")
    (file,) = built.glob("dpir*-validation.array_record*")
    for path in (built / "*-validation.array_record*", file):
        assert len(PhotoRecords(path)) == 1
    file.rename(built / "dpir_photos-train.array_record [1]")
    for path in (built, built / "dpir_photos-train.array_record [1]"):
        assert len(PhotoRecords(path)) == 1
    (photos / "validation" / "a.png").write_text("hello")
    assert main(["pack", str(photos), "--out", str(tmp_path / "other")]) == 2
    assert "validation can be used; the warnings above say why" in capsys.readouterr().err


def test_what_is_packed_is_not_taken_for_other_photos(tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    Image.fromarray(photo(1)).save(photos / "a.png")
    pack = ["pack", str(photos), "--out", str(out)]
    assert [main(pack), main(pack)] == [0, 0]
    (photos / "a.txt").write_text("a sea")
    assert main(pack) == 2
    assert "was packed from other photos, captions or metadata" in capsys.readouterr().err
    (photos / "a.txt").unlink()
    assert main(pack) == 0
    Image.fromarray(photo(2)).save(photos / "b.png")
    assert main(pack) == 2
    built = out / "dpir_photos" / "local" / "1.0.0"
    (built / "packed.json").unlink()  # as data sets were before
    assert main(pack) == 2
    assert "does not say what it was packed from" in capsys.readouterr().err
    assert len(PhotoRecords(built)) == 1


def test_wrong_record_files(tmp_path):
    with pytest.raises(InputError, match="no ArrayRecord files to train on in"):
        PhotoRecords(tmp_path)
    (tmp_path / "x.array_record").write_bytes(b"hello" * 100)
    with pytest.raises(InputError, match=r"cannot be read|no record"):
        PhotoRecords(tmp_path)
    with pytest.raises(ValueError, match=r"not a tf\.train\.Example"):
        parse_example(b"hello")


# --- batches ---------------------------------------------------------------------------------------------------------


def config(built, **settings):
    plain = {"flips": False, "batch": 4, "threads": 1}
    return DataConfig((), local_crop=16, global_crop=32, records=(str(built),), **plain | settings)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        assert batch.keys() == other.keys()
        for name, value in batch.items():
            np.testing.assert_array_equal(value, other[name])


def test_batches_of_records_resume_and_are_shared_among_processes(built):
    settings = config(built, captions=True)
    whole = take(make_dataset(settings), 6)
    for batch in whole:
        for crop in batch["hq"]:
            number, top, left = crop[0, 0]
            np.testing.assert_array_equal(crop, photo(number // 10)[top : top + 32, left : left + 32])
    assert {caption for batch in whole for caption in batch["caption"]} == {"", "a rough sea", "a maple"}
    fresh = make_dataset(settings)
    fresh.set_state({"step": 4})
    assert_same(whole[4:], take(fresh, 2))
    half = settings.batch // 2
    parts = [take(make_dataset(settings, places=range(first, first + half)), 6) for first in (0, half)]
    for batch, first, second in zip(whole, *parts):
        np.testing.assert_array_equal(batch["hq"], np.concatenate([first["hq"], second["hq"]]))


def test_a_sample_fetches_its_record_once(built, monkeypatch):
    batches = make_dataset(config(built, captions=True)).batches
    fetched, facts = [], batches.sources[0].facts
    monkeypatch.setattr(batches.sources[0], "facts", lambda index: fetched.append(index) or facts(index))
    samples = [batches.sample(number) for number in range(7)]  # an epoch; one photo of it is too small
    assert "a maple" in [sample["caption"] for sample in samples]
    assert len(fetched) == 8


@pytest.mark.slow
def test_worker_processes_change_nothing(built, stored):
    text = {"embeddings": (str(stored),), "central": True, "captions": True}
    settings = dataclasses.replace(config(built), local_crop=32, **text)
    expected = take(make_dataset(settings), 4)
    iterator = make_dataset(dataclasses.replace(settings, workers=2))
    assert_same(expected, take(iterator, 4))
    iterator.close()


def test_an_epoch_shows_every_record_once(built):
    iterator = make_dataset(config(built, batch=7))
    for _ in range(3):  # the photo that is too small has the next one as a stand-in
        numbers = sorted(next(iterator)["hq"][:, 0, 0, 0] // 10)
        assert len(numbers) == 7
        assert set(numbers) == set(range(6))


def test_sources_are_mixed_by_weight(built, tmp_path):
    Image.fromarray(photo(20)).save(tmp_path / "other.png")
    both = dataclasses.replace(config(built, batch=8), folders=(str(tmp_path),), weights=(1.0, 3.0))
    numbers = np.concatenate([batch["hq"][:, 0, 0, 0] for batch in take(make_dataset(both), 5)]) // 10
    assert np.sum(numbers == 20) == 10
    assert set(numbers) == {*range(6), 20}
    unweighted = dataclasses.replace(both, weights=())  # then by size, 1 to 7
    numbers = np.concatenate([batch["hq"][:, 0, 0, 0] for batch in take(make_dataset(unweighted), 3)]) // 10
    assert np.sum(numbers == 20) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"records": ()}, "neither folders nor records"),
        ({"weights": (1.0, 2.0)}, "weights must be 1 positive"),
        ({"weights": (0.0,)}, "weights must be 1 positive"),
        ({"weights": ("a",)}, "weights must be 1 positive"),
        ({"weights": (float("inf"),)}, "weights must be 1 positive"),
        ({"embeddings": ("a", "b")}, "embeddings must be 1 folders"),
        ({"by_area": True}, "by_area"),
        ({"central": True}, "central needs"),
    ],
)
def test_impossible_settings(built, change, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(config(built), **change)


# --- stored embeddings -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny DPIR with random weights, and a tokenizer of six words."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    dpir = random_network(lambda: DPIR(DPIRConfig.tiny(), rngs=Keys(0)))
    save_dpir(folder, dpir, description="tiny", restore={})
    vocabulary = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **marks).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The networks are tiny: compile for one device, without optimisation, with the attention that compiles fastest."""
    options = {"static_argnames": "sizes", "compiler_options": {"xla_backend_optimization_level": 0}}
    with pytest.MonkeyPatch.context() as patch, use_attention_backend("xla"):
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        patch.setattr(precomputing, "_compute", jax.jit(precomputing._compute.__wrapped__, **options))
        yield


@pytest.fixture(scope="module")
def stored(built, model, tmp_path_factory):
    """All arrays of the data set, in three files."""
    out = tmp_path_factory.mktemp("stored")
    arrays = "text,moments,clip_tokens,clip_embed"
    command = ["precompute", str(built), "--model", str(model), "--out", str(out), "--arrays", arrays]
    assert main([*command, "--crop", "32", "--shard", "3", "--batch", "8", "--form", "int8"]) == 0
    return out


def test_int8_text_is_within_its_bound():
    tokens = np.random.default_rng(0).standard_normal((3, 5, 64)) * np.geomspace(1e-3, 1e3, 5)[:, None]
    tokens[0, 0] = 0
    back = dequantize(*quantize(tokens)).astype(np.float64)
    bound = np.abs(tokens).max(-1, keepdims=True) * (1 / 254 + 2**-8) + 1e-12  # the integer's half step, bfloat16's
    assert (np.abs(back - tokens) <= bound).all()
    assert np.sqrt(np.mean((back[0, 1] - tokens[0, 1]) ** 2) / np.mean(tokens[0, 1] ** 2)) < 0.01
    assert not back[0, 0].any()


def test_stored_arrays_are_what_the_networks_give(built, model, stored):
    records, embeddings = PhotoRecords(built, min_side=32), Embeddings(stored)
    dpir = read_dpir(model, read_json(model / "config.json"))
    assert len(list(stored.glob("*.array_record"))) == 3
    compute = quick_jit(lambda dpir, ids, crop: (dpir.text_tokens(ids)[0], *dpir.autoencoder.encode(2 * crop - 1)))
    for index in (0, 4, 6):
        caption, pixels = records.caption(index), records[index]
        crop = np.float32(pixels[4:36, 8:40][None] / 255)
        text, mean, logvar = compute(dpir, t5_ids([caption], model / "tokenizer", 5), crop)
        found = embeddings[index]
        assert found["text"].dtype == ml_dtypes.bfloat16
        np.testing.assert_allclose(found["text"].astype(np.float32), text, atol=0.02 * np.abs(text).max())
        np.testing.assert_allclose(found["moments"], np.concatenate([mean, logvar], -1)[0], atol=0.02, rtol=0.02)
        assert found["clip_tokens"].shape == (5, 24)
        assert found["clip_embed"].shape == (10,)
    assert 0 < embeddings.relative_error() < 0.02


def test_precompute_goes_on_and_is_shared_among_processes(built, model, tmp_path):
    photos = open_photos([built], 32)
    settings = {"crop": 32, "shard": 2, "batch": 8, "form": "bfloat16"}
    first = precompute(photos, model, tmp_path, process_index=1, process_count=2, **settings)
    assert (first.written, first.found, first.relative_error) == (2, 0, None)
    with pytest.raises(InputError, match="run `dpir precompute` again to finish"):
        Embeddings(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.array_record")}
    second = precompute(photos, model, tmp_path, **settings)
    assert (second.written, second.found) == (2, 2)
    assert second.relative_error < 0.004
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    with pytest.raises(InputError, match="another form"):
        precompute(photos, model, tmp_path, **settings | {"form": "int8"})


def test_training_reads_text_from_disk_or_ids_for_the_step(built, model, stored):
    central = {"flips": True, "central": True, "captions": True}
    text = {"embeddings": (str(stored),), "tokenizer": str(model / "tokenizer"), "text_tokens": 5}
    settings = dataclasses.replace(config(built), local_crop=32, **central, **text)
    embeddings, records = Embeddings(stored), PhotoRecords(built, min_side=32)
    numbers = {records.read(i)[1][0, 0, 0]: records.read(i)[0] for i in range(len(records))}
    for batch in take(make_dataset(settings), 2):
        assert batch["text"].shape == (4, 5, 16)
        np.testing.assert_array_equal(batch["ids"], t5_ids(batch["caption"], model / "tokenizer", 5))
        for crop, text, moments in zip(batch["hq"], batch["text"], batch["moments"]):
            wanted = embeddings[numbers[crop[0, 0, 0]]]
            np.testing.assert_array_equal(text, wanted["text"])
            np.testing.assert_array_equal(moments, wanted["moments"])
            np.testing.assert_array_equal(crop, photo(crop[0, 0, 0] // 10)[4:36, 8:40])


def test_embeddings_of_other_photos_or_crops_are_refused(built, stored, collection):
    with pytest.raises(InputError, match=r"central crops of 32 pixels; set data\.central"):
        make_dataset(config(built, embeddings=(str(stored),)))
    with pytest.raises(InputError, match="computed from other photos"):
        make_dataset(
            DataConfig((str(collection),), 32, 32, 4, central=True, embeddings=(str(stored),))  # the folder, unbuilt
        )


def recipe(built, stored, init_from, **task):
    data = {"folders": (), "records": (str(built),), "embeddings": (str(stored),), "central": True, "flips": False}
    return Recipe.from_json(
        {
            **{"steps": 1, "batch": 8, "learning_rate": 1e-4, "data": data | {"local_crop": 32, "global_crop": 32}},
            "task_type": "dpir_jax.training.dpir_tasks:DiTTask",
            "task": {"system": "tiny", "local_crop": 32, "init_from": str(init_from), **task},
        }
    )


@pytest.mark.parametrize(("task", "name"), [({"text": "stored"}, "t5"), ({"stored_latents": True}, "autoencoder")])
def test_training_refuses_what_another_network_made(built, model, stored, tmp_path, task, name):
    dpir = random_network(lambda: DPIR(DPIRConfig.tiny(), rngs=Keys(0)))  # the model's
    half = save_dpir(tmp_path / "half", dpir, description="tiny", restore={}, dtype=jnp.float16)
    setattr(dpir, name, random_network(lambda: getattr(DPIR(DPIRConfig.tiny(), rngs=Keys(0)), name), seed=1))
    other = save_dpir(tmp_path / "other", dpir, description="tiny", restore={})
    with pytest.raises(InputError, match=f"by another {name} than that of task.init_from, .*other; run"):
        train(recipe(built, stored, other, **task), tmp_path / "run", progress=False)
    read = [Embeddings(stored)]
    for folder in (model, half):  # the same, and the same in another precision
        DiTTask.from_config({"system": "tiny", "init_from": str(folder), **task}).check_embeddings(read)
    DiTTask.from_config({"system": "tiny", "init_from": str(other)}).check_embeddings(read)  # it reads neither
    (other / f"{name}.safetensors").unlink()  # a stage-1 folder has no T5 to compare with
    DiTTask.from_config({"system": "tiny", "init_from": str(other), **task}).check_embeddings(read)


def test_arrays_of_a_version_that_noted_no_weights_can_be_read(stored, tmp_path, model):
    old = shutil.copytree(stored, tmp_path / "old")
    meta = read_json(old / "meta.json")
    assert set(meta.pop("weights")) == {"t5", "autoencoder", "clip_tokens", "clip_embed"}
    write_json(old / "meta.json", meta)
    assert Embeddings(old)[0].keys() == Embeddings(stored)[0].keys()
    task = DiTTask.from_config({"system": "tiny", "init_from": str(model), "text": "stored"})
    task.check_embeddings([Embeddings(old)])


def test_a_folder_needs_no_data_set(collection, model, tmp_path):
    folders = tmp_path / "photos", tmp_path / "stored"
    photos = open_photos([shutil.copytree(collection, folders[0])], 32)
    assert isinstance(photos, PhotoFolder)
    summary = precompute(photos, model, folders[1], crop=32, batch=8)
    assert summary.written == 1
    settings = DataConfig((str(folders[0]),), 16, 32, 4, embeddings=(str(folders[1]),))
    assert next(make_dataset(settings))["text"].shape == (4, 5, 16)
    (folders[0] / "one" / "p0.txt").write_text("a photo of a sea")
    with pytest.raises(InputError, match="others by name, size or caption"):
        make_dataset(settings)
    with pytest.raises(InputError, match="another set of photos or captions; choose another folder"):
        precompute(open_photos([folders[0]], 32), model, folders[1], crop=32, batch=8)


def test_precompute_passes_over_what_training_does(built, model, stored, tmp_path, monkeypatch, caplog):
    facts = PhotoRecords.facts

    def damaged(photos, index):
        return facts(photos, index) if index != 2 else facts(photos, 99)

    monkeypatch.setattr(PhotoRecords, "facts", damaged)
    settings = {"crop": 32, "shard": 3, "batch": 8, "arrays": ("text", "moments", "clip_tokens", "clip_embed")}
    with caplog.at_level(logging.WARNING):
        assert precompute(open_photos([built], 32), model, tmp_path, **settings).written == 3
    assert "precompute.py:" in caplog.text
    assert "passed over: record 99 of" in caplog.text
    central = {"local_crop": 32, "central": True, "flips": False}
    numbers = range(14)
    batches = [
        make_dataset(dataclasses.replace(config(built), embeddings=(str(folder),), **central)).batches
        for folder in (tmp_path, stored)
    ]
    for number in numbers:  # two epochs: the stand-in's arrays come with the stand-in
        found, wanted = (each.sample(number) for each in batches)
        for name in ("hq", "text", "moments"):
            np.testing.assert_array_equal(found[name], wanted[name])


def test_a_full_disk(tmp_path):
    path = tmp_path / "x.array_record"
    numbers = np.random.default_rng(0).random((9, 4000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # bytes
    try:
        with pytest.raises(InputError, match=r"cannot write .*/x.array_record: .*File too large"):
            write_shard(path, ({"a": row} for row in numbers))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_what_precompute_cannot_do(built, model, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["precompute", str(built), "--model", str(model), "--out", str(out), "--crop", "32"]
    for extra, words in (
        (["--arrays", "text,smell"], "cannot store smell"),
        (["--form", "int4"], "form is 'int4'"),
        (["--process", "2/2"], "--process is 2/2"),
        (["--batch", "0"], "batch is 0; it must be at least 1"),
        (["--batch", "-16"], "batch is -16; it must be at least 1"),
        (["--arrays", "moments", "--crop", "30"], "crop is 30; moments need a multiple of 4"),
    ):
        assert main([*command, *extra]) == 2
        assert words in capsys.readouterr().err
    wordless = shutil.copytree(model, tmp_path / "wordless", ignore=shutil.ignore_patterns("tokenizer"))
    command[3] = str(wordless)
    assert main(command) == 2
    assert "no text encoder with a tokenizer" in capsys.readouterr().err
    (wordless / "tokenizer").mkdir()
    assert main(command) == 2
    assert "holds no tokenizer that can be read" in capsys.readouterr().err
    assert not out.exists()  # so that the right command can follow


def test_a_process_without_a_file_of_its_own_may_come_first(built, model, tmp_path, capsys):
    command = ["precompute", str(built), "--model", str(model), "--out", str(tmp_path), "--crop", "32"]
    assert main([*command, "--process", "1/2"]) == 0
    assert "0 files written, 0 found\n" in capsys.readouterr().out
