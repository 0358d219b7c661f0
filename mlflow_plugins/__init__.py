"""MLflow plugins and flavors; importing any module here loads no torch, transformers or vllm."""
