"""What options of devices mean; values that are not allowed. test_model.py has the others."""

from typing import Any

import pytest

from gguf_run.formats.errors import OptionError
from gguf_run.runtime.load.options import CPU, Device, LoadOptions, Wanted

GPU = [Device("cuda", i) for i in range(3)]


@pytest.mark.parametrize(
    ("options", "wanted", "cpu_only", "insists"),
    [
        ({}, Wanted(), False, False),
        ({"gpu_layers": "auto"}, Wanted(), False, False),
        ({"device": "cpu"}, Wanted((CPU,)), True, False),
        ({"device": "cpu", "gpu_layers": 0}, Wanted((CPU,), 0), True, False),
        ({"device": "cuda"}, Wanted((GPU[0],)), False, True),
        ({"device": "cuda:0", "gpu_layers": "0"}, Wanted((GPU[0],), 0), True, False),
        ({"device": "cuda:12", "gpu_layers": 7}, Wanted((Device("cuda", 12),), 7), False, True),
        ({"gpu_layers": "all"}, Wanted((), -1), False, True),
        ({"device": "cuda:1,cuda:0", "tensor_split": "3,1.5"}, Wanted((GPU[1], GPU[0]), None, (3, 1.5)), False, True),
    ],
)
def test_options(options: dict[str, Any], wanted: Wanted, cpu_only: bool, insists: bool) -> None:
    found = LoadOptions(**options).wanted
    assert (found, found.cpu_only, found.insists) == (wanted, cpu_only, insists)
    assert str(GPU[1]) == "cuda:1"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(
            ({"device": text}, f"--device {text!r}: allowed are cpu, cuda")
            for text in ("CPU", "cpu:0", "cuda:", "cuda:-1")
        ),
        *(
            ({"device": text}, "allowed are cpu, cuda")
            for text in ("", "cuda:x", "cuda:0 ", "cuda:1000", "cuda:٣", "cuda,")
        ),
        *(({"device": text}, "must be different GPUs") for text in ("cuda,cuda:0", "cpu,cuda", "auto,cuda")),
        *(({"gpu_layers": text}, "--gpu-layers") for text in ("", "-1", "some", "1.5", "٣", -1)),
        ({"device": "cpu", "gpu_layers": "all"}, "--gpu-layers all with --device cpu: name a GPU"),
        ({"device": "cpu", "gpu_layers": 3}, "--gpu-layers 3 with --device cpu: name a GPU"),
        ({"tensor_split": "1,1"}, "--tensor-split 1,1 has 2 parts, --device auto 1"),
        *(
            ({"device": "cuda:0,cuda:1", "tensor_split": text}, f"--tensor-split {text}")
            for text in ("1", "0,0", "1,-1", "1,x", "1,2,3", "nan,1", "1;2")
        ),
    ],
)
def test_options_not_allowed(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError) as error:
        LoadOptions(**options)
    assert words in str(error.value)
