"""minillava: LLaVA-1.5 in pure PyTorch.

    import minillava
    assistant = minillava.load("path/to/llava-1.5-7b-hf")
    print(assistant.ask("x.jpg", "What is in this image?"))

Reading order, which is the order of the data: config, image, prompt, tokenizer, attention, vision,
projector, cache, llama, llava, checkpoint, sampling, loop, beam, generate, assistant. CLASSROOM.md has the
questions that people ask on the way, and exercises.
"""

__version__ = "0.1.0"
__all__ = ["Assistant", "__version__", "load"]


def __getattr__(name: str):
    # `load` and `Assistant` are fetched on first use: importing minillava alone stays instant, and
    # `python -m minillava.generate` does not find its own module already imported.
    if name in ("load", "Assistant"):
        from minillava import assistant

        return vars(assistant)[name]
    raise AttributeError(f"module 'minillava' has no attribute {name!r}")
