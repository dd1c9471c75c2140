"""The parts of tools/bench.py, which is the command: `clock` times and watches the neighbours,
`probe` asks what the machine does at most, `work` counts what a token reads, and each of the others
is a subcommand or its table."""
