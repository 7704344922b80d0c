"""Model folders: what is saved is loaded; what is missing, damaged or of another network is named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from dpir_jax.errors import InputError
from dpir_jax.files import sha256
from dpir_jax.model_folder import (
    has_weights,
    load_network,
    named_variables,
    read_config,
    sample_weights,
    save_networks,
    verify,
)
from dpir_jax.models.layers import Keys
from tests.toy_task import Net, random_weights


def make(width):
    return lambda: Net(width, rngs=Keys(0))


def net(width=4, seed=0):
    return random_weights(make(width), seed)


def abstract(width=4):
    return nnx.eval_shape(make(width))


@pytest.fixture
def folder(tmp_path):
    return save_networks(tmp_path / "model", {"system": "toy", "width": 4}, {"net": net(), "other": net(seed=1)})


@pytest.mark.parametrize("dtype", [None, jnp.float16, jnp.bfloat16])
def test_round_trip(tmp_path, dtype):
    model = net()
    folder = save_networks(tmp_path / "model", {"width": 4}, {"net": model}, dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "manifest.json", "net.safetensors"]
    assert read_config(folder) == {"width": 4}
    assert set(verify(folder)) == {"config.json", "net.safetensors"}
    with safe_open(folder / "net.safetensors", "flax") as file:
        stored = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118  (not a dict)
    assert set(stored.values()) == {jnp.dtype(dtype or jnp.float32)}
    assert "blocks.up.kernel" in stored
    loaded = load_network(folder, "net", abstract())
    for (path, saved), (_, got) in zip(nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(loaded))):
        assert got.dtype == jnp.float32
        assert got.get_metadata() == saved.get_metadata()
        wanted = saved[...].astype(dtype) if dtype else saved[...]
        np.testing.assert_array_equal(got[...], np.asarray(wanted, np.float32), err_msg=str(path))
    loaded(jnp.zeros((1, 4, 4, 3)))


def test_a_model_folder_is_replaced_and_nothing_else_is(folder, tmp_path):
    save_networks(folder, {"width": 5}, {"net": net(5)})
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "manifest.json", "net.safetensors"]
    assert load_network(folder, "net", abstract(5)).inner.kernel.shape == (3, 3, 3, 5)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match="photos exists and is not a model folder"):
        save_networks(tmp_path / "photos", {}, {"net": net()})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file/model"):
        save_networks(tmp_path / "file" / "model", {}, {"net": net()})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model", "photos"]


def test_a_failed_save_leaves_the_old_folder(folder):
    before = verify(folder)
    with pytest.raises(ValueError, match="JSON"):
        save_networks(folder, {"width": float("nan")}, {"net": net(5)})
    assert verify(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_damage_is_found(folder):
    path = folder / "net.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"net.safetensors is damaged: its sha256"):
        load_network(folder, "net", abstract())
    load_network(folder, "other", abstract())
    path.write_bytes(data[:50])
    with pytest.raises(InputError, match=r"net.safetensors is damaged"):
        load_network(folder, "net", abstract(), check=False)
    path.unlink()
    for check in (True, False):
        with pytest.raises(InputError, match=r"has no net.safetensors"):
            load_network(folder, "net", abstract(), check=check)


def test_another_network_is_named(folder):
    with pytest.raises(InputError, match=r"blocks.down.bias is \(2, 4\), not \(2, 8\)"):
        load_network(folder, "net", abstract(8))
    arrays = {name: np.asarray(variable[...]) for name, variable in named_variables(net()).items()}
    for change, word in (({"extra": np.zeros(1)}, "extra is unknown"), ({}, "inner.bias is missing")):
        kept = {name: value for name, value in arrays.items() if change or name != "inner.bias"}
        save_file(kept | change, folder / "net.safetensors")
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["sha256"]["net.safetensors"] = sha256(folder / "net.safetensors")
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(InputError, match=word):
            load_network(folder, "net", abstract())


def test_not_a_model_folder(tmp_path, folder):
    with pytest.raises(InputError, match=r"is not a model folder: it has no config.json"):
        read_config(tmp_path)
    with pytest.raises(InputError, match=r"has no manifest.json|cannot read"):
        load_network(tmp_path, "net", abstract())
    with pytest.raises(InputError, match=r"does not list third.safetensors"):
        load_network(folder, "third", abstract())
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(InputError, match="lists no sha256"):
        verify(folder)


def test_an_empty_array_has_no_weight_to_sample(folder):
    sample = sample_weights(folder, "net")
    arrays = {name: np.asarray(variable[...]) for name, variable in named_variables(net()).items()}
    save_file(arrays | {"empty": np.zeros((0, 4), np.float32)}, folder / "net.safetensors")
    assert has_weights(folder, "net", sample)


def test_random_number_state_is_not_saved():
    class WithDropout(nnx.Module):
        def __init__(self):
            self.net, self.dropout = net(), nnx.Dropout(0.1, rngs=nnx.Rngs(0))

    names = named_variables(WithDropout())
    assert names.keys() == {f"net.{name}" for name in named_variables(net())}
    assert all(isinstance(variable[...], jax.Array) for variable in names.values())
