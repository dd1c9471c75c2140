"""Random small LLaVA-1.6 models, drawn and saved by transformers."""

import functools
from types import SimpleNamespace

import hf
import pytest
from paths import REFERENCE
from tiled import config_of


@pytest.fixture(scope="session")
def tiled(tmp_path_factory):
    """`tiled(text, dialect)`: a folder with a model of that language model, in the hub's or the
    original's layout, and its config."""
    pytest.importorskip("transformers", minversion="5", reason="the model is saved by transformers")

    @functools.cache
    def make(text: str, dialect: str = "hub") -> SimpleNamespace:
        config = config_of(text)
        state = hf.random_state(config, 7)
        folder = tmp_path_factory.mktemp(f"tiled-{text}-{dialect}")
        hf.write_checkpoint(
            folder, config, state, dialect=dialect, tokenizer=REFERENCE / "plain/tokenizer.model"
        )
        return SimpleNamespace(folder=folder, config=config, state=state)

    return make
