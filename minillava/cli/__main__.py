"""`python -m minillava.cli`: who looks for the command line finds the list of commands."""

from minillava.cli.doors import main

if __name__ == "__main__":
    main()
