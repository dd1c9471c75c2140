"""Install minillava: `pip install .`, or `pip install -e '.[test]'` to work on it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="minillava",
    version=re.search(
        r'__version__ = "(.+)"', (HERE / "minillava" / "__init__.py").read_text(encoding="utf-8")
    )[1],
    description="LLaVA-1.5 rebuilt from the ground up in pure PyTorch: readable, bit-exact, fast",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    # the bundled model lies beside the code in a checkout, and inside the package once installed
    packages=[*find_packages(include=["minillava", "minillava.*"]), "minillava.shapes"],
    package_dir={"minillava.shapes": "weights/shapes"},
    entry_points={"console_scripts": ["minillava = minillava.cli.doors:main"]},
    package_data={
        "minillava": ["py.typed"],
        "minillava.serve": ["page/*"],
        "minillava.shapes": ["*.json", "*.model", "*.safetensors", "*.png", "README.md"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "safetensors>=0.4.3",
        "sentencepiece>=0.1.99",
        "pillow>=10.1",
        "numpy>=1.24",
    ],
    extras_require={
        # pytest reads .pytest.ini from 7.2 on; nbclient and ipykernel run
        # minillava/walkthrough.ipynb; pytest-xdist runs the suite in two processes
        "test": ["pytest>=7.2", "pytest-xdist>=3.5", "nbclient>=0.8", "ipykernel>=6"],
        # the implementations that the parity tests and tools/make_reference.py compare with;
        # transformers reads tokenizer.model with protobuf
        "parity": ["transformers>=5.23", "protobuf", "peft>=0.21"],
        # python -m minillava.serve
        "serve": [
            "starlette>=1.7",
            "uvicorn>=0.34",
            "h11>=0.16",
            "msgspec>=0.20",
            "prometheus-client>=0.21",
        ],
        # python -m minillava.batch --on ray; the server in several copies wants 'ray[serve]'
        "ray": ["ray>=2.40"],
        # the tests of pages, those that --html writes and that of serve; they also need Chromium
        "browser": ["playwright>=1.49", "axe-playwright-python>=0.1.8"],
        # python -m minillava.finetune --log tensorboard, --log wandb
        "tensorboard": ["tensorboard>=2.14"],
        "wandb": ["wandb>=0.17"],
        # tools/train_shapes.py: the progress bar
        "tools": ["tqdm>=4.60"],
        # tools/bench.py: whom it compares with, and what draws its pictures; llama.cpp, where it
        # can be built, by pip install llama-cpp-python gguf
        "bench": ["transformers>=5.23", "matplotlib>=3.7"],
    },
)
