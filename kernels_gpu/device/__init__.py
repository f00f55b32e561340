"""The GPU itself: opening it, its errors, its limits, constants by architecture."""
