"""Reading checkpoints: every container, every type, no torch on our side; damage and foul play in one sentence."""

import io
import json
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert_weights import readers
from convert_weights.readers import open_source, weights_file
from convert_weights.writer import Mapped, SafetensorsWriter
from dpir_jax.errors import InputError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from safetensors.torch import save_file as save_torch


@pytest.fixture
def tensors() -> dict:
    draw = torch.Generator().manual_seed(0)
    plain = torch.randn(4, 6, generator=draw)
    return {
        "single": plain,
        "half": plain.half(),
        "brain": plain.bfloat16(),
        "double": plain.double(),
        "transposed": plain.half().t(),
        "shared": plain[1:, 2:],
        "number": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(plain[0]),
    }


FORMATS = {
    "zip.pth": lambda tensors, path: torch.save(tensors, path),
    "nested.ckpt": lambda tensors, path: torch.save({"state_dict": tensors, "epoch": 3, "hyper": {"lr": 0.1}}, path),
    "old.bin": lambda tensors, path: torch.save(tensors, path, _use_new_zipfile_serialization=False),
    "new.safetensors": lambda tensors, path: save_torch(
        {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}, path
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_all_containers_hold_the_same(name, tensors, tmp_path):
    FORMATS[name](tensors, tmp_path / name)
    source = open_source(tmp_path / name)
    assert source.keys() == tensors.keys()
    for key, tensor in tensors.items():
        array = source[key]
        assert array.shape == source.shapes[key] == tuple(tensor.shape)
        assert str(source.dtypes[key]) == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(array.astype(np.float64), tensor.detach().double().numpy(), err_msg=key)


def test_float8_is_read(tmp_path):
    tensor = torch.tensor([0.5, -3.5, 448.0]).to(torch.float8_e4m3fn)
    save_torch({"a": tensor}, tmp_path / "a.safetensors")
    assert open_source(tmp_path / "a.safetensors")["a"].astype(np.float32).tolist() == [0.5, -3.5, 448.0]


def test_shards(tmp_path):
    arrays = {key: np.full((2,), i, np.float32) for i, key in enumerate("abcd")}
    for number, keys in enumerate(("ab", "cd")):
        save_file({key: arrays[key] for key in keys}, tmp_path / f"model-{number}.safetensors")
    weights = {key: f"model-{'abcd'.index(key) // 2}.safetensors" for key in "abcd"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weights}))
    assert {key: array.tolist() for key, array in open_source(tmp_path).items()} == {
        key: array.tolist() for key, array in arrays.items()
    }
    index.write_text(json.dumps({"weight_map": weights | {"e": "model-1.safetensors"}}))
    with pytest.raises(InputError, match=r"e is not in model-1\.safetensors"):
        open_source(tmp_path)
    index.write_text(json.dumps({"weight_map": weights}))
    save_file(arrays, tmp_path / "model-1.safetensors")
    with pytest.raises(InputError, match="is in two shards"):
        open_source(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(InputError, match=r"the shard .*model-1\.safetensors is missing"):
        open_source(tmp_path)


def test_the_file_in_a_folder(tmp_path):
    files = ["b.safetensors", "a.safetensors"]
    with pytest.raises(InputError, match=r"several files of weights \(b\.safetensors, a\.safetensors\); name one"):
        weights_file(files, "it")
    files += ["diffusion_pytorch_model.fp16.safetensors", "pytorch_model.bin"]
    assert weights_file(files, "it", "fp16") == "diffusion_pytorch_model.fp16.safetensors"
    assert weights_file(files, "it") == "pytorch_model.bin"
    assert weights_file([*files, "model.safetensors"], "it") == "model.safetensors"
    index = ["model.safetensors.index.json", "model.safetensors.index.fp16.json"]
    assert weights_file([*files, *index], "it") == index[0]
    assert weights_file([*files, *index], "it", "fp16") == "diffusion_pytorch_model.fp16.safetensors"
    assert weights_file(index, "it", "fp16") == index[1]
    with pytest.raises(InputError, match="holds no file of weights"):
        open_source(tmp_path)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.9])
def test_a_truncated_file_is_one_sentence(name, kept, tensors, tmp_path):
    path = tmp_path / name
    FORMATS[name]({key: tensor.repeat(40, 1) if tensor.ndim == 2 else tensor for key, tensor in tensors.items()}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(InputError, match=r"truncated|damaged|neither safetensors nor") as caught:
        open_source(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def with_header(header: dict | bytes, size: int = 100) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


HEADERS = {
    "not JSON": (b"{", "header cannot be read"),
    "a list": (b"[]", "header cannot be read"),
    "an unknown type": ({"a": {"dtype": "Q3", "shape": [1], "data_offsets": [0, 4]}}, "header cannot be read"),
    "a wrong size": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "a does not have the size"),
    "a hole": ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, "a does not have the size"),
    "beyond the end": ({"a": {"dtype": "F32", "shape": [99], "data_offsets": [0, 396]}}, "is truncated: a ends"),
    "twice": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', "a is there twice"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_bad_header_is_one_sentence(name, tmp_path):
    header, message = HEADERS[name]
    path = tmp_path / "a.safetensors"
    path.write_bytes(with_header(header))
    with pytest.raises(InputError, match=message):
        open_source(path)


# --- foul play -------------------------------------------------------------------------------------------------------


class Writes:
    """Unpickling it would write a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "owned")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_runs_code_is_refused_and_does_nothing(legacy, protocol, tmp_path):
    path, victim = tmp_path / "evil.pth", tmp_path / "victim"
    content = {"weight": torch.zeros(2), "evil": Writes(victim)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    with pytest.raises(InputError, match=r"evil\.pth is refused: its pickle asks for .*; nothing was run") as caught:
        open_source(path)
    assert "\n" not in str(caught.value)
    assert not victim.exists()
    torch.load(path, weights_only=False)  # the bomb is a real one
    assert victim.exists()


def archive(path: Path, program: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", program)
    return path


def tensor_program(size: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> bytes:
    """A pickle of {"a": tensor}, by hand: what torch itself would never write."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> tuple | None:
            return ("storage", torch.FloatStorage, "0", "cpu", size) if value is Pickler else None

        def reducer_override(self, value: object) -> object:
            if value is torch.Tensor:
                return torch._utils._rebuild_tensor_v2, (Pickler, offset, shape, strides, False, None)
            return NotImplemented

    stream = io.BytesIO()
    Pickler(stream, 2).dump({"a": torch.Tensor})
    return stream.getvalue()


BOMBS = {
    "a huge memo": (b"\x80\x02}r\xff\xff\xff\x7f.", "a memory address beyond its own length"),
    "an expanded tensor": (tensor_program(1, (1 << 40,), (0,)), "a tensor that reaches beyond its storage"),
    "a view beyond the end": (tensor_program(4, (4,), (1,), offset=2), "a tensor that reaches beyond its storage"),
    "a storage that is not there": (tensor_program(1 << 40, (2,), (1,)), "storage 0 are not all there"),
    "nothing in it": (pickle.dumps({"a": 1}, 2), "holds no state dict"),
    "eval by name": (b"cbuiltins\neval\n(V1+1\ntR.", "asks for builtins.eval"),
    "a getattr": (b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.", "asks for builtins.getattr"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickle_bombs(name, tmp_path):
    program, message = BOMBS[name]
    with pytest.raises(InputError, match=message):
        open_source(archive(tmp_path / "a.pth", program))


def test_training_gear_beside_the_weights_is_inert(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"a": torch.ones(2)}, "score": np.float64(0.5), "steps": np.arange(3)}, path)
    assert open_source(path)["a"].tolist() == [1, 1]


def test_reading_needs_no_torch(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(2, dtype=torch.bfloat16)}, path)
    code = f"import sys; sys.modules['torch'] = None; from convert_weights.readers import open_source; \
print(open_source({str(path)!r})['a'].sum())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "2"


# --- the network is never asked unless named -------------------------------------------------------------------------


def test_a_missing_path_does_not_reach_for_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_download", lambda *_: pytest.fail("downloaded"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no owner/name; to fetch it from Hugging Face, write hf:owner/name"):
        open_source("owner/name")


@pytest.fixture
def hub(monkeypatch):
    """A Hugging Face without a network: the files of its repository, and what was fetched of them."""
    fetched = []

    def snapshot_download(repository: str, **settings: object) -> str:
        fetched.append((repository, settings["revision"], sorted(settings["allow_patterns"])))
        return str(hub.root)

    hub = SimpleNamespace(files=[], fetched=fetched, root=None)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: hub.files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return hub


def test_a_hub_name_fetches_only_what_is_needed(tmp_path, hub):
    hub.root, folder = tmp_path, tmp_path / "vae"
    folder.mkdir()
    save_file({"a": np.zeros(1, np.float32)}, folder / "diffusion_pytorch_model.safetensors")
    kept = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    hub.files = ["sd3.safetensors", "model_index.json", "vae/diffusion_pytorch_model.fp16.safetensors", *kept]
    (folder / "config.json").write_text("{}")
    assert list(open_source("hf:owner/name@main", subfolder="vae")) == ["a"]
    assert list(open_source("hf:owner/name/vae")) == ["a"]
    readers.locate("hf:owner/name")
    assert hub.fetched == [
        ("owner/name", "main", kept),
        ("owner/name", None, kept),
        ("owner/name", None, ["model_index.json"]),
    ]
    with pytest.raises(InputError, match="hf:owner is not of the form"):
        open_source("hf:owner")


@pytest.mark.parametrize(("name", "mark"), [("model", ""), ("model", ".fp16"), ("pytorch_model", "")])
def test_all_shards_are_fetched(tmp_path, hub, name, mark):
    """As many as the index lists, whatever they are called."""
    hub.root = tmp_path
    shards = [f"{name}{mark}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = f"model.safetensors.index{mark}.json"
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1], "c": shards[1]}}))
    others = ["pytorch_model-00001-of-00002.bin", "model.other-00001-of-00002.safetensors"]
    hub.files = [*shards, index, *others]
    readers.locate("hf:owner/name", variant=mark[1:] or None)
    assert set(hub.fetched[-1][2]) == {index, *shards}


# --- writing ---------------------------------------------------------------------------------------------------------


def test_the_writer_takes_rows_in_any_order(tmp_path):
    whole = np.arange(6, dtype=np.float32).reshape(2, 3)
    brain = np.asarray([1.5, -2], ml_dtypes.bfloat16)
    path = tmp_path / "a.safetensors"
    entries = {
        "brain": (brain.shape, brain.dtype),
        "rows": (whole.shape, whole.dtype),
        "none": ((0, 2), np.dtype("f4")),
    }
    with SafetensorsWriter(path, entries) as writer:
        writer.write("rows", whole[1], 1)
        writer.write("brain", brain)
        writer.write("rows", whole[0], 0)
        with pytest.raises(ValueError, match="rows needs float32"):
            writer.write("rows", whole.astype(np.float64))
    source = open_source(path)
    np.testing.assert_array_equal(source["rows"], whole)
    np.testing.assert_array_equal(Mapped(source.slots)["rows"][1], whole[1])
    np.testing.assert_array_equal(source["brain"], brain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from safetensors.torch import load_file
    assert load_file(path)["rows"].tolist() == whole.tolist()
