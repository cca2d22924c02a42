"""What a training run is asked to do, and the part of it that decides which adapter comes out."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraserve.errors import InvalidRequest
from loraserve.lora.spec import check_name
from loraserve.train.data import Augmentation
from loraserve.train.tokens import ON_BAD_ROW

REDUCTIONS = ("tokens", "mean")
PUBLISH = ("better", "always")


@dataclass(frozen=True)
class TrainOptions:
    """One run of `loraserve train`. Field names are the command line's, LoRA's own words are PEFT's."""

    data: Path
    name: str
    targets: str | list[str] = "all-linear"
    """A preset, module names, or a regex over module paths."""
    r: int | None = None
    """Rank; 8, and 16 for the preset `minimind`."""
    lora_alpha: float | None = None
    """2·r, and r for the preset `minimind`, whose adapters have scale 1."""
    epochs: int = 10
    batch_size: int = 16
    """Dialogues in one micro-batch."""
    accumulation_steps: int = 1
    learning_rate: float = 1e-3
    grad_clip: float = 1.0
    loss_reduction: str = "tokens"
    """`tokens`: every supervised token of an optimizer step weighs the same. `mean`: MiniMind's mean of means."""
    max_seq_len: int | None = None
    val_split: float = 0.0
    val_data: Path | None = None
    """Dialogues to validate on, instead of some of `data`."""
    patience: int | None = None
    """Epochs without a lower validation loss after which the run ends; None goes on to the last."""
    publish: str = "better"
    """`better`: not unless validation loss, where there is any, is below the base's. `always`: whatever it is."""
    on_bad_row: str = "stop"
    """`stop`: a row that cannot be used ends the run before it begins. `skip`: train on the rest."""
    augmentation: Augmentation = Augmentation()
    seed: int = 42
    log_interval: int = 10
    save_interval: int = 100
    save_dir: Path | None = None
    """Where the state of the unfinished run is kept, in a folder of the adapter's name."""
    resume: bool = False
    report_to: tuple[str, ...] = ()
    """Services that get the losses, of `reporters.REPORTERS`."""
    report_project: str = "loraserve"
    memory_budget: int | None = None
    """Bytes that the run may use; batches are split, and blocks run twice, as it needs."""

    def check(self) -> None:
        """Raise InvalidRequest for a value that cannot be trained with."""
        check_name(self.name, param="name")
        for field in ("epochs", "batch_size", "accumulation_steps", "log_interval", "save_interval"):
            if getattr(self, field) < 1:
                raise InvalidRequest(f"{field} must be at least 1, not {getattr(self, field)}", param=field)
        for field in ("learning_rate", "grad_clip"):
            if not 0 < getattr(self, field) < float("inf"):
                raise InvalidRequest(f"{field} must be above 0, not {getattr(self, field)}", param=field)
        for field, value in (
            ("val_split", self.val_split),
            ("system_prompt", self.augmentation.system_prompt),
            ("drop_empty_think", self.augmentation.drop_empty_think),
        ):
            if not 0 <= value <= 1 or (field == "val_split" and value == 1):
                raise InvalidRequest(f"{field} must be between 0 and 1, not {value}", param=field)
        if self.val_data is not None and self.val_split > 0:
            raise InvalidRequest("val_data and val_split both say what to validate on; give one", param="val_data")
        if self.r is not None and self.r < 1:
            raise InvalidRequest(f"the rank must be at least 1, not {self.r}", param="r")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < float("inf"):
            raise InvalidRequest(f"lora_alpha must be above 0, not {self.lora_alpha}", param="lora_alpha")
        if self.max_seq_len is not None and self.max_seq_len < 2:
            raise InvalidRequest(f"max_seq_len must be at least 2, not {self.max_seq_len}", param="max_seq_len")
        if self.loss_reduction not in REDUCTIONS:
            raise InvalidRequest(f"loss_reduction is one of {', '.join(REDUCTIONS)}", param="loss_reduction")
        if self.patience is not None and self.patience < 1:
            raise InvalidRequest(f"patience must be at least 1, not {self.patience}", param="patience")
        if self.patience is not None and not self.val_split and self.val_data is None:
            raise InvalidRequest(
                "patience needs validation dialogues: --val-split 0.1 or --val-data FILE", param="patience"
            )
        if self.publish not in PUBLISH:
            raise InvalidRequest(f"publish is one of {', '.join(PUBLISH)}", param="publish")
        if self.on_bad_row not in ON_BAD_ROW:
            raise InvalidRequest(f"on_bad_row is one of {', '.join(ON_BAD_ROW)}", param="on_bad_row")

    @property
    def rank(self) -> int:
        return self.r if self.r is not None else 16 if self.targets == "minimind" else 8

    @property
    def alpha(self) -> float:
        if self.lora_alpha is not None:
            return self.lora_alpha
        return self.rank if self.targets == "minimind" else 2 * self.rank

    def steps_per_epoch(self, rows: int) -> int:
        """Micro-batches in which an epoch takes `rows` training samples."""
        return math.ceil(rows / self.batch_size)

    def recipe(self) -> dict[str, Any]:
        """The settings that, with the data and the base, decide the adapter: equal recipes give equal weights."""
        fields = ("epochs", "batch_size", "accumulation_steps", "learning_rate", "grad_clip", "loss_reduction")
        chosen = {field: getattr(self, field) for field in (*fields, "max_seq_len", "val_split", "patience", "seed")}
        lora = {"targets": self.targets, "r": self.rank, "lora_alpha": self.alpha}
        files = {"data": self.data.name, "val_data": self.val_data.name if self.val_data else None}
        return {**files, **lora, **chosen, **dataclasses.asdict(self.augmentation)}
