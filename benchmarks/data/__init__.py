"""What it costs to move values: scatter, gather, broadcast, shuffle."""
