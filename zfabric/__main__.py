"""`python -m zfabric` is the same as `zfabric`."""

from zfabric.cli import main

if __name__ == "__main__":
    main()
