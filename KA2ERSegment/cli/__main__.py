"""`python -m KA2ERSegment.cli`."""

from KA2ERSegment.cli import main

if __name__ == "__main__":
    main()
