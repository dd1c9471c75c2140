"""`python -m minillava`: the list of doors, or one of them by its name."""

from minillava.cli.doors import main

if __name__ == "__main__":
    main()
