"""Selection of training data with OpenAI-compatible endpoints: ``python -m tools.curate``."""
