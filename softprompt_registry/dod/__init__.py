"""Datasets of datasets: tasks, the SQLite store that holds them, and the builders that fill it."""
