"""`python -m tokenworks` is the same as `tokenworks`."""

from tokenworks.cli.main import main

if __name__ == "__main__":
    main()
