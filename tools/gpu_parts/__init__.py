"""The parts of tools/gpu_check.py, which is the command: `common` is what its sections share,
`family` asks after the other networks, `doors` after everything a user can start, and `one_process`
is what `doors` starts with torchrun."""
