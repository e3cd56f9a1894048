"""Packaging. `kernels/` has no __init__.py and installs as `mtpkern.kernels`."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="mtpkern",
    version="0.1.0",
    description="Multi-token prediction for Llama-style models: several tokens a step, the same tokens",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["mtpkern", "mtpkern.*"]), "mtpkern.kernels"],
    package_dir={"mtpkern.kernels": "kernels"},
    package_data={"mtpkern": ["pretrained/*/*", "py.typed"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
        "safetensors>=0.5",
        "tokenizers>=0.20",
        "sentencepiece>=0.2",
        "jinja2>=3.1",
        "gguf>=0.17",
        "tqdm",
    ],
    extras_require={
        "hub": ["huggingface_hub>=0.30"],
        "test": ["pytest>=8", "hypothesis>=6", "transformers>=5.0"],
        "dev": ["ruff==0.17.6", "mypy==2.4.1"],
    },
    entry_points={"console_scripts": ["mtpkern = mtpkern.cli:main"]},
)
