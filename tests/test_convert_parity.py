"""Live models of diffusers and transformers, converted, against ours (docs/parity.md is written by the same code)."""

from pathlib import Path

import numpy as np
import pytest

from convert_weights.parity import CASES, TOLERANCE, compare

PAGE = Path(__file__).parent.parent / "docs" / "parity.md"


@pytest.mark.parametrize("name", CASES)
def test_outputs_agree(name, tmp_path):
    theirs, ours = compare(CASES[name], tmp_path)
    assert theirs.keys() == ours.keys()
    for output, value in theirs.items():
        assert np.abs(value).max() > 0.1
        np.testing.assert_allclose(ours[output], value, rtol=TOLERANCE, atol=TOLERANCE, err_msg=output)


def test_the_page_has_every_network():
    page = PAGE.read_text()
    assert all(f"| {case.title} |" in page for case in CASES.values())
