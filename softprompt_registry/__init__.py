"""Soft prompts as first-class MLflow objects: tune, translate into plain language, verify, register and serve.

Import from the module that owns a name, for instance `softprompt_registry.soft_prompts.soft_prompt.SoftPrompt`.
Importing this package loads no torch, transformers or mlflow.
"""

__version__ = "0.1.0"
