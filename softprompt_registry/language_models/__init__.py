"""Text in, text out behind one protocol: target LLMs, and the LLMs that write DoDs. Modules name their engine."""
