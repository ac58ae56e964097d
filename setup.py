"""Installs ``meduet_fast``; the top-level folder ``kernels`` becomes ``meduet_fast.kernels``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# Relative links and pictures lead nowhere on a package index: their text stays.
RELATIVE_LINK = re.compile(r"!?\[([^\]]*)\]\((?![a-z]+:|#)[^)]*\)")

# What everything but kernels and layers needs: the program, data, models, training, reports.
TRAIN = [
    "numpy",
    "monai>=1.6,<1.7",
    "nibabel>=5.3",
    "safetensors>=0.8",
    "scikit-learn>=1.5",
    "jsonargparse[signatures]>=4.49",
    "PyYAML>=6",
    "rich>=13",
    "matplotlib>=3.9",
    "pillow>=10.1",
    "tensorboard>=2.18",
]

SYNTHESIS = ["diffusers>=0.41,<0.43"]  # schedulers, pipeline and the base classes of networks

setup(
    name="meduet-fast",
    version="0.1.0",
    description="Fast, resumable MeDUET pretraining: content and style of 3D medical volumes, from latents",
    long_description=RELATIVE_LINK.sub(
        r"\1", Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    ),
    long_description_content_type="text/markdown",
    author="meduet-fast developers",
    keywords="self-supervised learning, medical imaging, 3D, MeDUET, PyTorch, Triton",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Healthcare Industry",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
        "Typing :: Typed",
    ],
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=[*find_packages(include=["meduet_fast", "meduet_fast.*"]), "meduet_fast.kernels"],
    package_dir={"meduet_fast.kernels": "kernels"},
    package_data={
        "meduet_fast": ["py.typed", "configs/**/*.yaml", "autoencoder/*.safetensors"],
        "meduet_fast.kernels": ["configs.json"],
    },
    # All that meduet_fast.kernels and meduet_fast.layers need.
    install_requires=["torch>=2.11,<2.16", "triton>=3.6; platform_system == 'Linux'"],
    extras_require={
        "train": TRAIN,
        # Attention backends for CUDA, see meduet_fast/layers/attention.py; flash-attn is built from source.
        "flash2": ["flash-attn>=2.8"],
        "flash4": ["flash-attn-4>=4.0.0b36"],
        "xformers": ["xformers>=0.0.35"],
        "itk": ["SimpleITK>=2.5.4"],  # DICOM series, MetaImage and NRRD, see meduet_fast/data/itk_formats.py
        "wandb": ["wandb>=0.20"],  # see meduet_fast/engine/loggers.py
        "mlflow": ["mlflow>=3"],
        "synthesis": [*TRAIN, *SYNTHESIS],
        "float8": ["torchao>=0.18"],  # see meduet_fast/engine/precision.py
        "dev": [
            *TRAIN,
            *SYNTHESIS,
            "einops",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "setuptools>=77",
            "mypy",
            "types-PyYAML",
            "torchao",
            "SimpleITK>=2.5.4",
        ],
    },
    entry_points={"console_scripts": ["meduet-fast = meduet_fast.__main__:main"]},
)
