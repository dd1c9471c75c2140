"""What the doors share: flags, messages, and how each begins."""
