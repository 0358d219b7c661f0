"""Registering, promoting and tracing soft prompts and translators in MLflow."""
