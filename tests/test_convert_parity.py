"""Live models of diffusers and transformers, converted, against ours (docs/parity.md is written by the same code)."""

import json
from pathlib import Path

import numpy as np
import pytest

from convert_weights.parity import CASES, TOLERANCE, compare, there_and_back

PAGE = Path(__file__).parent.parent / "docs" / "parity.md"
NOTES = {"architectures", "dtype", "transformers_version"}  # on how a file came to be
UNUSED = {  # no parameter and no output of the network depends on it
    "autoencoder": {"sample_size"},
    "unet": {"sample_size"},
    "clip-text": {"projection_dim"},
    "t5": {"scale_decoder_outputs"},
    "llava": {"image_seq_length"},
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_agree(name, tmp_path):
    theirs, ours = compare(CASES[name], tmp_path)
    assert theirs.keys() == ours.keys()
    for output, value in theirs.items():
        assert np.abs(value).max() > 0.1
        np.testing.assert_allclose(ours[output], value, rtol=TOLERANCE, atol=TOLERANCE, err_msg=output)


def settings(model, family: str) -> dict:
    """What the library keeps in `config.json`."""
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    return json.loads(json.dumps(without(config, NOTES | UNUSED.get(family, set())), default=str))


def without(config, names: set[str]):
    if not isinstance(config, dict):
        return config
    return {key: without(value, names) for key, value in config.items() if key not in names and str(key)[0] != "_"}


@pytest.mark.parametrize("name", CASES)
def test_the_original_library_loads_what_goes_back(name, tmp_path):
    model, loaded, notes = there_and_back(CASES[name], tmp_path)
    assert not any(notes.values()), notes
    family = CASES[name].family
    assert settings(loaded, family) == settings(model, family)
    back = {key.removeprefix("text_model."): value for key, value in loaded.state_dict().items()}
    given = {key.removeprefix("text_model."): value for key, value in model.state_dict().items()}
    given.pop("text_projection.weight", None)  # is left out
    assert back.keys() == given.keys()
    for key, value in given.items():
        slack = 1e-6 if key == "pos_embed.pos_embed" else 0  # a table that each side computes
        np.testing.assert_allclose(back[key].numpy(), value.numpy(), rtol=0, atol=slack, err_msg=key)


def test_the_page_has_every_network():
    page = PAGE.read_text()
    assert all(f"| {case.title} |" in page for case in CASES.values())
