"""What several test files share: the stored reference, the files that lie beside the repository,
checkpoint folders."""

import os
import shutil
import signal
from pathlib import Path

import hf
import pytest
import torch
from commands import status_of
from models import stored
from paths import REFERENCE, SHARED
from safetensors.torch import load_file

from minillava.assistant import Assistant
from minillava.options import WEIGHTS_VARIABLE

# Toy networks gain nothing from a second thread, and on a busy machine threads that wait for one
# another take ten times as long as one that does not. Whoever asks for more gets them, also more
# than there are processors.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1").partition(",")[0]))

# A shell script starts what it puts into the background with Ctrl-C ignored, and so would every
# process that a test starts, and no test of Ctrl-C could pass.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in two processes if pytest-xdist is installed and the command line does
    not say otherwise (-n 0 does). Each begins with one half of the list, so that nearly all tests
    of a file, which share models, stay together; who is done first takes over from the other."""
    if hasattr(config, "workerinput"):  # this is one of the two
        return
    option = config.option
    part = option.file_or_dir or option.keyword
    watched = option.usepdb or option.trace or option.collectonly or option.capture == "no"
    if not part and not watched and vars(option).get("numprocesses", 0) is None:
        option.numprocesses, option.dist = 2, "worksteal"


@pytest.hookimpl(tryfirst=True)  # before the fixtures that a test is the first to want
def pytest_runtest_setup() -> None:
    """What a test draws does not hang on which tests have run before it in this process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_weights_from_outside(monkeypatch):
    """Whoever runs the tests may have named a model of their own, and seven billion weights."""
    monkeypatch.delenv(WEIGHTS_VARIABLE, raising=False)


@pytest.fixture
def run_main(capsys):
    """`run_main(main, *arguments)`: a command in this process -> (exit status, stdout, stderr)."""

    def in_this_process(main, *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        return (status_of(main, arguments), *capsys.readouterr())

    return in_this_process


@pytest.fixture(scope="session")
def reference() -> Path:
    """tests/reference/, as tools/make_reference.py writes it."""
    return REFERENCE


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the stored `plain` checkpoint, to be changed."""
    return Path(shutil.copytree(REFERENCE / "plain", tmp_path / "plain"))


@pytest.fixture(scope="session")
def assistant() -> Assistant:
    """The stored `plain` checkpoint in float32. It is shared: a test that changes it puts it back."""
    return stored()


@pytest.fixture(scope="session")
def llama_tokenizer() -> Path:
    """Llama's own tokenizer.model, which is not ours to distribute."""
    path = SHARED / "tokenizer" / "tokenizer.model"
    if not path.exists():
        pytest.skip("Llama's tokenizer.model is not at ../shared/tokenizer/")
    return path


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    """Two photographs, which are not ours to distribute."""
    paths = [SHARED / "photos" / name for name in ("extreme_ironing.jpg", "waterview.jpg")]
    if not all(path.exists() for path in paths):
        pytest.skip("the photographs are not at ../shared/photos/")
    return paths


@pytest.fixture(scope="session")
def write_dialect():
    """`write_dialect(dialect, folder, shards=1, dtype="float32")` writes the stored `plain`
    checkpoint in one of hf.DIALECTS and returns what to pass to `minillava.load`: weights, and
    vision_tower where it is a folder of its own.
    """
    dialects = hf.read_json(REFERENCE / "dialects.json")
    stored = load_file(REFERENCE / "plain" / "model.safetensors")

    def write(
        dialect: str, folder: Path, shards: int = 1, dtype: str = "float32"
    ) -> dict[str, Path]:
        for name, described in dialects[dialect].items():
            inside = Path(folder) / name
            inside.mkdir(parents=True, exist_ok=True)
            _write_folder(inside, described, stored, shards, dtype)
        hf.write_bytes(
            (REFERENCE / "plain" / "tokenizer.model").read_bytes(), Path(folder) / "tokenizer.model"
        )
        tower = {"vision_tower": Path(folder) / hf.CLIP_FOLDER} if dialect in hf.TOWERLESS else {}
        return {"weights": Path(folder), **tower}

    return write


def _write_folder(
    folder: Path, described: dict, stored: dict[str, torch.Tensor], shards: int, dtype: str
) -> None:
    for name, content in described["files"].items():
        hf.write_json(content, folder / name)
    tensors = {
        name: stored[key][: described["rows"].get(name)].clone()
        for name, key in described["keys"].items()
    }
    tensors |= {name: torch.full(shape, 0.5) for name, shape in described["shapes"].items()}
    tensors = {name: tensor.to(hf.DTYPES[dtype]) for name, tensor in tensors.items()}
    for name, kept in described["values"].items():
        tensors[name] = torch.tensor(kept["values"], dtype=getattr(torch, kept["dtype"]))
    hf.write_weights(tensors, folder, shards)
