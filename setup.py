"""Packaging: metadata, dependencies, the `dpir` command. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"
CONVERT = ["diffusers", "torch==2.13.0"]  # what the converters are tested against; the library never imports them
TFDS = ["importlib_resources", "tensorflow-datasets"]  # the former is missing among the latter's own dependencies
TPU = ["jax[tpu]>=0.10,<0.13"]  # libtpu: the chips' driver, and their compiler also where there are none
TEST = ["beartype", "hypothesis", "pytest>=8", "pytest-xdist", "ruff>=0.17,<0.18", *CONVERT, *TFDS, *TPU]

setup(
    name="dpir-jax",
    version=re.search(r'^__version__ = "(.+)"', (HERE / "dpir_jax" / "__init__.py").read_text(), re.M)[1],
    description="Restore degraded photographs with diffusion transformers (DPIR), in JAX and Flax NNX",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    keywords=["image restoration", "super-resolution", "diffusion", "jax", "flax", "tpu"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["dpir_jax", "dpir_jax.*", "convert_weights", "convert_weights.*"]),
    package_data={"dpir_jax": ["pretrained/**", "metrics/weights/**", "demo_photos/**"]},
    entry_points={"console_scripts": ["dpir=dpir_jax.cli:main"]},  # the generated script passes the status to sys.exit
    install_requires=[
        "absl-py",
        "array-record",
        "einops",
        "flax>=0.12",
        "grain>=0.2.12",
        "jax>=0.10,<0.13",
        "jaxtyping",
        "ml_collections",
        "numpy>=2",
        "optax",
        "orbax-checkpoint",
        "pillow>=11.3",
        "protobuf",
        "safetensors",
        "sentencepiece",  # transformers reads T5's own spiece.model with it
        "tensorboardX",
        "tqdm",
        "transformers",
    ],
    extras_require={
        "test": TEST,
        "convert": CONVERT,
        "tfds": TFDS,
        "beam": ["apache-beam", *TFDS],
        "tpu": TPU,
        "cuda": ["jax[cuda13]>=0.10,<0.13"],
    },
)
