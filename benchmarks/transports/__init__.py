"""What it costs to move bytes between two processes, by each way that Python offers."""
