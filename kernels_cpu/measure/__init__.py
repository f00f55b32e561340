"""What the machine can do: bandwidth and operations per second."""
