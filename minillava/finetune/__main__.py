"""`python -m minillava.finetune`: flags are read before torch is imported (cli/doors.py)."""

from minillava.cli.doors import begin

if __name__ == "__main__":
    begin("finetune")
