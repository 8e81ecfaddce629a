"""A real fabric under mixed work and faults, for minutes: `python -m zfabric.testing.soak`."""
