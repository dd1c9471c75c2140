"""`python -m minillava.cli`: prints the list of commands, for those who look for it under this
name."""

from minillava.cli.doors import main

if __name__ == "__main__":
    main()
