"""``python -m structmat``: the command line."""

from structmat.cli import main

if __name__ == "__main__":
    main()
