"""`python -m gateway`: the same as the command `mxgate`."""

from gateway.cli import main

if __name__ == "__main__":
    main()
