"""What is said of panels without any memory."""

from gguf_run.kernels_cpu.panels.panels import PANEL_OF, main_panel, panel_id


def test_the_main_panel_holds_most_bytes() -> None:
    """Types that share a panel count together, and types without one are stored as F32."""
    sizes = [("Q4_K", 50), ("Q6_K", 30), ("Q4_K", 10), ("F32", 55)]
    assert main_panel(sizes) == panel_id(PANEL_OF["Q4_K"])
    assert main_panel([*sizes, ("F64", 6)]) == panel_id(PANEL_OF["F32"])
    assert main_panel([("Q6_K", 1)]) == panel_id(PANEL_OF["Q6_K"])
