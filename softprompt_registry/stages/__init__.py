"""The stages as MLflow runs: each wraps one library function, records what went in and out, and links the two.

A stage called inside an active run becomes its child; alone, it takes over the run that `mlflow run` has opened.
"""
