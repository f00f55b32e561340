"""A picture of lines: each point lies where its numbers say."""

import re
from xml.etree import ElementTree

from gguf_run.runtime.bench.curves import curves


def test_points_lie_where_their_numbers_say() -> None:
    text = curves("a <b>", "steps", {"one": [(0, 4.0), (10, 2.0), (20, 1.0)], "none": []})
    lines = [
        [tuple(map(float, point.split(","))) for point in found.split()]
        for found in re.findall(r'<polyline points="([^"]*)"', text)
    ]
    (x0, y0), (x1, y1), (x2, y2) = lines[0]
    assert (x0, x2) == (70, 775)
    assert x1 == (x0 + x2) / 2
    assert abs((y1 - y0) - 2 * (y2 - y1)) < 0.2  # rounded to a tenth of a pixel
    assert y0 < y1 < y2
    root = ElementTree.fromstring(text)
    words = [one.text for one in root.iter() if one.tag.endswith("text")]
    assert {"a <b>", "steps", "one", "none", "0", "20"} <= {*words}
