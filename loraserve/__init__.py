"""loraserve: many LoRA adapters on one small frozen model.

Importing the package imports neither torch nor flask: `loraserve --help` has to answer at once. `LLM` and
`SamplingParams` are loaded on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraserve.engine import LLM, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "SamplingParams"):
        from loraserve import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'loraserve' has no attribute {name!r}")
