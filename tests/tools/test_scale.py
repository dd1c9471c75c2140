"""The arithmetic of several machines: its formulas, and that the page shows what it prints."""

from fractions import Fraction
from math import factorial

import pytest
import scale
from paths import ROOT

PAGE = ROOT / "minillava" / "fast" / "SCALE.md"


def test_the_page_shows_what_the_script_prints():
    """A table that was typed would stay when a number changes."""
    text = PAGE.read_text(encoding="utf-8")
    assert text.split("<!-- output -->\n")[1].split("\n<!-- end -->")[0] == scale.page()


def test_measured_speeds_stand_where_they_were_measured():
    """A machine would be bought by a number that nobody measured."""
    text = (ROOT / "tools" / "MEASUREMENTS.md").read_text(encoding="utf-8")
    for first, rate, place, _ in scale.MEASURED.values():
        lines = text[text.index(place.replace('"', "").replace("AVX2, ", "")) :].splitlines()
        kind = "captured" if first < 1 else "minillava bfloat16"
        row = next(line for line in lines if line.startswith("| minillava") and kind in line)
        cells = {cell.strip() for cell in row.split("|")}
        assert f"{rate}" in cells, row
        parts = [f"{1e3 * first:.1f}"] if first < 1 else ["2.87", "53.92"]
        assert set(parts) <= cells, row
    assert sum(map(float, ("2.87", "53.92"))) == pytest.approx(
        scale.MEASURED["two CPU cores, bfloat16"][0]
    )


@pytest.mark.parametrize(
    ("servers", "offered"), [(1, Fraction(1, 2)), (3, Fraction(5, 2)), (20, 17)]
)
def test_the_queue_is_erlangs(servers, offered):
    """The recursion against the sum of the book, in whole fractions."""
    last = (
        Fraction(offered) ** servers / factorial(servers) * Fraction(servers) / (servers - offered)
    )
    whole = sum(Fraction(offered) ** k / factorial(k) for k in range(servers)) + last
    assert scale.erlang_c(servers, float(offered)) == pytest.approx(float(last / whole), rel=1e-12)


def test_as_many_replicas_as_needed_and_no_more():
    """One too few, and the queue grows without end."""
    for load in (0.1, 1.0, 30.0):
        count = scale.replicas(load, 0.47)
        assert count > load * 0.47
        assert scale.erlang_c(count, load * 0.47) <= scale.PATIENCE
        fewer = count - 1
        assert fewer <= load * 0.47 or scale.erlang_c(fewer, load * 0.47) > scale.PATIENCE
