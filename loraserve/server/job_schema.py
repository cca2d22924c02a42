"""The body that asks for a training job: OpenAI's fields, and those of ours for what it has no word for.

"auto" and nothing are the same: what `loraserve train` does unless told otherwise.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from loraserve.server.schema import Body

MAX_RANK = 1024
MAX_EPOCHS = MAX_BATCH_SIZE = 10_000
Auto = BeforeValidator(lambda value: None if value == "auto" else value)
Positive = Annotated[float, Field(gt=0, le=1e6)]


class Hyperparameters(Body):
    n_epochs: Annotated[Annotated[int, Field(ge=1, le=MAX_EPOCHS)] | None, Auto] = None
    batch_size: Annotated[Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)] | None, Auto] = None
    learning_rate_multiplier: Annotated[Positive | None, Auto] = None
    """Of the learning rate of `loraserve train`."""
    beta: Annotated[Positive | None, Auto] = None
    """Of dpo."""


class Settings(Body):
    hyperparameters: Hyperparameters | None = None


class Method(Body):
    type: Literal["supervised", "dpo"]
    supervised: Settings | None = None
    dpo: Settings | None = None


class CreateJob(Body):
    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    seed: int | None = Field(None, ge=0, le=2**32)
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )
    integrations: list[Any] | None = Field(None, max_length=0)
    rank: int | None = Field(None, ge=1, le=MAX_RANK)
    alpha: Positive | None = None
    targets: str | Annotated[list[Annotated[str, Field(pattern=r"^[\w.]+$")]], Field(min_length=1)] | None = None
    rslora: bool = False
    dora: bool = False
    lora_plus_ratio: Positive | None = None
    val_split: float | None = Field(None, ge=0, lt=1)
