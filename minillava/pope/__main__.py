"""`python -m minillava.pope`: flags are read before anything else is imported (cli/doors.py)."""

from minillava.cli.doors import begin

if __name__ == "__main__":
    begin("pope")
