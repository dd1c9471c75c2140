"""The parts that all doors share: flags, messages, and how a door begins."""
