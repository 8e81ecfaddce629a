"""Does the sampler choose right? Links throttled for real, real processes, each kind of data."""
