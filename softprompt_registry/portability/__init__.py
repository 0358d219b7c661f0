"""Hard prompts at work on other LLMs: what is asked, what comes back, how good it is and what it costs."""
