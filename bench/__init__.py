"""TokenYield: measure, explain, predict and price self-hosted LLM inference."""

__version__ = "0.1.0"
