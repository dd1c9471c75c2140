"""An HTTP server that OpenAI's clients can ask; `python -m minillava.serve`. It needs the extra
[serve]: pip install 'minillava[serve]'."""
