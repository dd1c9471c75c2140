"""What the tests of the server share."""

import pytest
from paths import ROOT

import minillava


@pytest.fixture(scope="module")
def assistant():
    return minillava.load(ROOT / "weights" / "shapes", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def shared(assistant):
    """A server that a file's tests share."""
    from served import Running  # which needs the extra [serve]

    running = Running(assistant)
    yield running
    running.close()


@pytest.fixture
def start(assistant):
    """`start(*flags, **settings)`: a server that ends with the test."""
    from served import Running

    started = []

    def begin(*flags, **settings) -> Running:
        started.append(Running(assistant, *flags, **settings))
        return started[-1]

    yield begin
    for running in started:
        running.close()
