"""The engine: many requests with different adapters in one forward pass."""

from loraserve.engine.llm import LLM, Completion
from loraserve.engine.params import SamplingParams

__all__ = ["LLM", "Completion", "SamplingParams"]
