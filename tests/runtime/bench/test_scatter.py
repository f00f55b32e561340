"""Pictures of points: where they stand, what joins them."""

import re
from xml.etree import ElementTree

import pytest

from gguf_run.runtime.bench.scatter import Point, round_ticks, scatter


@pytest.mark.parametrize(("low", "high"), [(88.2, 91.9), (91.7, 91.7), (0.004, 13), (700, 15_000), (4.5, 4.6)])
def test_ticks_are_round_and_leave_room(low: float, high: float) -> None:
    ticks = round_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert 2 <= len(ticks) <= 11
    assert ticks[0] <= low < high + step <= ticks[-1] + step
    assert f"{step:.1e}"[0] in "125"


def test_points_of_a_line_are_joined() -> None:
    points = [Point("q3", 80, 0.4, "a", "wiki"), Point("q8", 140, 0.004, "a", "wiki"), Point("<x>", 90, 0.02, "c")]
    picture = scatter("title", "MB", points, round_ticks(80, 140), "MB")
    root = ElementTree.fromstring(picture)
    dots = [
        (float(dot.get("cx", 0)), float(dot.get("cy", 0))) for dot in root.iter("{http://www.w3.org/2000/svg}circle")
    ]
    (q8, other, q3) = dots  # from the largest on
    assert q3[0] < other[0] < q8[0]
    assert q3[1] < other[1] < q8[1]  # more divergence stands higher
    assert (q8[1] - q3[1]) / (other[1] - q3[1]) == pytest.approx(2 / 1.30103, rel=0.01)  # decades
    lines = [line.get("points") for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert lines[0] == " ".join(f"{x:.1f},{y:.1f}" for x, y in (q8, q3))
    assert {"wiki", "q3", "q8", "<x>", "MB"} <= {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert "<x>: 90 MB, KL 0.02" in re.sub("&lt;", "<", re.sub("&gt;", ">", picture))


def test_points_of_one_height() -> None:
    """A divergence that is a power of ten is the lower end of the scale."""
    ElementTree.fromstring(scatter("title", "MB", [Point("a", 5, 0.1), Point("b", 6, 0.1)], [4, 5, 6, 7]))
