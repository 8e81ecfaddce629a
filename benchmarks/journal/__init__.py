"""What a journal costs: no-op tasks per second without one and with one, in turns."""
