"""What a training run is asked to do, and the part of it that decides which adapter comes out."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraserve.base.quantize import QUANTIZATIONS, check_quantization
from loraserve.errors import InvalidRequest
from loraserve.lora.config import ALL_LINEAR
from loraserve.lora.spec import check_name
from loraserve.train.data import Augmentation
from loraserve.train.tokens import ON_BAD_ROW

OBJECTIVES = ("sft", "dpo")
DPO_BETA = 0.1
REDUCTIONS = ("tokens", "mean")
PUBLISH = ("better", "always")
QUANTIZE = ("auto", "none", *QUANTIZATIONS)


@dataclass(frozen=True)
class TrainOptions:
    """One run of `loraserve train`. Field names are the command line's, LoRA's own words are PEFT's."""

    data: Path
    name: str
    targets: str | list[str] | None = None
    """A preset, module names, or a regex over module paths; `all-linear`."""
    r: int | None = None
    """Rank; 8, and 16 for the preset `minimind`."""
    lora_alpha: float | None = None
    """2·r, and r for the preset `minimind`, whose adapters have scale 1; 16 with `use_rslora`, for any rank."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks of the modules that a key matches, as in PEFT: a name or a regex for the end of a path, the first wins."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    """Scale by alpha/sqrt(r) and not by alpha/r."""
    use_dora: bool = False
    """Train a magnitude for every output besides A and B."""
    init_from: str | None = None
    """An adapter to go on with, by name or directory; targets, ranks and alphas are then its own."""
    lora_plus_ratio: float = 1.0
    """LoRA+: the learning rate of B is so many times that of A."""
    objective: str = "sft"
    """`sft`: learn the answers of dialogues. `dpo`: of preference pairs make the chosen answer the likelier one."""
    dpo_beta: float | None = None
    """How much the adapter is held to what it started from; 0.1."""
    epochs: int = 10
    batch_size: int = 16
    """Dialogues or pairs in one micro-batch."""
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
    """Bytes that the run may use; batches are split, blocks run twice, and the base quantised, as it needs."""
    quantize: str = "auto"
    """How the base's layers are kept: `none` as they are, or of `base.quantize.QUANTIZATIONS`; `auto`: as memory_budget
    needs."""

    def check(self) -> None:
        """Raise InvalidRequest for a value that cannot be trained with."""
        check_name(self.name, param="name")
        self._check_adapter()
        self._check_objective()
        for name in ("epochs", "batch_size", "accumulation_steps", "log_interval", "save_interval"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be at least 1, not {getattr(self, name)}", param=name)
        for name in ("learning_rate", "grad_clip", "lora_plus_ratio"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidRequest(f"{name} must be above 0, not {getattr(self, name)}", param=name)
        for name, value in (
            ("val_split", self.val_split),
            ("system_prompt", self.augmentation.system_prompt),
            ("drop_empty_think", self.augmentation.drop_empty_think),
        ):
            if not 0 <= value <= 1 or (name == "val_split" and value == 1):
                raise InvalidRequest(f"{name} must be between 0 and 1, not {value}", param=name)
        if self.val_data is not None and self.val_split > 0:
            raise InvalidRequest("val_data and val_split both say what to validate on; give one", param="val_data")
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
        if self.quantize not in QUANTIZE:
            raise InvalidRequest(f"quantize is one of {', '.join(QUANTIZE)}", param="quantize")
        if self.quantize in QUANTIZATIONS:
            check_quantization(self.quantize)
        if self.on_bad_row not in ON_BAD_ROW:
            raise InvalidRequest(f"on_bad_row is one of {', '.join(ON_BAD_ROW)}", param="on_bad_row")

    def _check_adapter(self) -> None:
        ranks = {"r": self.r} | {f"rank_pattern of {key!r}": r for key, r in self.rank_pattern.items()}
        for name, r in ranks.items():
            if r is not None and r < 1:
                raise InvalidRequest(f"{name} must be at least 1, not {r}", param=name.partition(" ")[0])
        alphas = {"lora_alpha": self.lora_alpha} | {f"alpha_pattern of {k!r}": a for k, a in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            if alpha is not None and not 0 < alpha < float("inf"):
                raise InvalidRequest(f"{name} must be above 0, not {alpha}", param=name.partition(" ")[0])
        if self.init_from is None:
            return
        settings = {
            "--targets": self.targets,
            "--rank": self.r,
            "--alpha": self.lora_alpha,
            "--rank-pattern": self.rank_pattern,
            "--alpha-pattern": self.alpha_pattern,
            "--rslora": self.use_rslora,
            "--dora": self.use_dora,
        }
        if given := [option for option, value in settings.items() if value]:
            raise InvalidRequest(
                f"{', '.join(given)} and --init-from do not go together: the run keeps the targets, ranks and scales "
                f"of {self.init_from!r}; leave out the one or the other",
                param="init_from",
            )

    def _check_objective(self) -> None:
        if self.objective not in OBJECTIVES:
            raise InvalidRequest(f"objective is one of {', '.join(OBJECTIVES)}", param="objective")
        if self.dpo_beta is not None and self.objective != "dpo":
            raise InvalidRequest("dpo_beta goes with --objective dpo only", param="dpo_beta")
        if not 0 < self.beta < float("inf"):
            raise InvalidRequest(f"dpo_beta must be above 0, not {self.dpo_beta}", param="dpo_beta")
        if self.objective == "dpo" and self.augmentation:
            raise InvalidRequest(
                "--random-system-prompt and --drop-empty-think change dialogues; they do not go with --objective dpo",
                param="objective",
            )

    @property
    def rows_are(self) -> str:
        return "preference pairs" if self.objective == "dpo" else "dialogues"

    @property
    def beta(self) -> float:
        return DPO_BETA if self.dpo_beta is None else self.dpo_beta

    @property
    def rank(self) -> int:
        return self.r if self.r is not None else 16 if self.targets == "minimind" else 8

    @property
    def alpha(self) -> float:
        if self.lora_alpha is not None:
            return self.lora_alpha
        if self.use_rslora:
            return 16
        return self.rank if self.targets == "minimind" else 2 * self.rank

    def steps_per_epoch(self, rows: int) -> int:
        """Micro-batches in which an epoch takes `rows` training samples."""
        return math.ceil(rows / self.batch_size)

    def recipe(self) -> dict[str, Any]:
        """The settings that, with the data and the base, decide the adapter: equal recipes give equal weights."""
        rates = ("learning_rate", "lora_plus_ratio", "grad_clip", "loss_reduction")
        names = ("epochs", "batch_size", "accumulation_steps", *rates, "max_seq_len", "val_split", "patience", "seed")
        chosen = {name: getattr(self, name) for name in names}
        lora = {
            "targets": ALL_LINEAR if self.targets is None else self.targets,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "rank_pattern": in_order(self.rank_pattern),
            "alpha_pattern": in_order(self.alpha_pattern),
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
        }
        files = {"data": self.data.name, "val_data": self.val_data.name if self.val_data else None}
        objective = {"objective": self.objective, "dpo_beta": self.beta if self.objective == "dpo" else None}
        return {**files, **objective, **lora, **chosen, **dataclasses.asdict(self.augmentation)}


def in_order(pattern: Mapping[str, float]) -> list[str] | None:
    """A rank or alpha pattern as a recipe has it: of two keys that match the first one counts. None for none."""
    return [f"{key}={value}" for key, value in pattern.items()] or None
