"""What xlmega needs and which versions it is known to work with; the exact tested set is constraints.txt.

`make quickstart` and `make test` install torch first, pinned: resolved together with the rest on a machine without a
GPU, it would bring the CUDA packages along.
"""

from __future__ import annotations

from setuptools import find_packages, setup

# wandb and TensorBoard are asked for by name in a run (`--wandb`, `--tensorboard`) and never otherwise imported.
TRACK = ["wandb>=0.18", "tensorboard>=2.16"]
# Features of languages; it imports pkg_resources, so it works beside the setuptools named below.
TYPOLOGY = ["lang2vec>=1.1.2,<2"]
# Parquet, data sets of the Hugging Face hub, and language identification; each is asked for by name when it is missing.
TEXT = ["datasets>=4", "pyarrow>=17", "py3langid>=0.4"]
# OPUS by name, and sentence embeddings (LaBSE).
BITEXT = [*TEXT, "opustools>=1.7", "sentence-transformers>=5"]

setup(
    name="xlmega",
    version="0.1.0",
    description="Training multilingual language models on Megatron-core and DeepSpeed",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["xlmega", "xlmega.*"]),
    package_data={"xlmega": ["recipes/*.toml"]},
    install_requires=[
        "torch>=2.6,<3",
        # 0.16.1 is the last for Python 3.10 and 3.11; later ones move the modules that models/ and parallel/ stand on.
        "megatron-core>=0.16.1,<0.17",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.20,<6",
        "tokenizers>=0.22,<0.24",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "numpy>=1.26,<3",
        "scipy>=1.11",
        "scikit-learn>=1.5",
        "zstandard>=0.22",
        "matplotlib>=3.8",
        # pkg_resources, which older plug-ins of these libraries import, went with setuptools 81.
        "setuptools>=77.0.3,<81",
        'tomli>=2; python_version < "3.11"',
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2"],
        "mpi": ["mpi4py>=3.1"],
        "eval": ["lm_eval>=0.4.8"],
        "text": TEXT,
        "bitext": BITEXT,
        "track": TRACK,
        "typology": TYPOLOGY,
        "dev": [
            *BITEXT,
            *TRACK,
            *TYPOLOGY,
            "pytest>=8",
            "hypothesis>=6.100",
            "ruff>=0.17,<0.18",
            "mypy>=2.4,<2.5",
            "import-linter>=2.15",
        ],
    },
)
