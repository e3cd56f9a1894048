"""Packaging. `kernels/` has no __init__.py and installs as `mtpkern.kernels`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
INIT = (ROOT / "mtpkern" / "__init__.py").read_text(encoding="utf-8")

setup(
    name="mtpkern",
    version=re.findall(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[0],
    description="Lossless speculative decoding with multi-token prediction for Llama-style models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["mtpkern", "mtpkern.*"]),
        "mtpkern.kernels",
        "mtpkern.kernels.cpu",
    ],
    package_dir={"mtpkern.kernels": "kernels", "mtpkern.kernels.cpu": "kernels/cpu"},
    package_data={"mtpkern": ["pretrained/*/*", "py.typed"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
        "numba>=0.62",
        "llvmlite>=0.45",
        "safetensors>=0.5",
        "tokenizers>=0.20",
        "sentencepiece>=0.2",
        "jinja2>=3.1",
        "gguf>=0.17",
        "tqdm",
        "filelock>=3.12",
    ],
    extras_require={
        "profile": ["nvtx>=0.2.10"],
        "plot": ["matplotlib>=3.8"],
        "completion": ["shtab>=1.6"],
        "peers": ["xllamacpp>=2026.10"],
        "hub": ["huggingface_hub>=0.30"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "transformers>=5.0",
            "setuptools>=77",
            "matplotlib>=3.8",
            "rich>=13",
            "shtab>=1.6",
            "tomli>=2; python_version < '3.11'",
        ],
        "dev": ["ruff==0.17.6", "mypy==2.4.1", "uv==0.13.9"],
    },
    entry_points={"console_scripts": ["mtpkern = mtpkern.cli:main"]},
)
