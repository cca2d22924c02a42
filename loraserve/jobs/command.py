"""A job as a command line of `loraserve train`.

Values that a client chose stand behind `=`, so none of them can be read as an option.
"""

from collections.abc import Sequence
from pathlib import Path

from loraserve.jobs.files import FileStore
from loraserve.jobs.job import Job
from loraserve.train.options import TrainOptions


def train_arguments(job: Job, files: FileStore, adapters_dir: Path, base_options: Sequence[str]) -> list[str]:
    """The arguments after `python -m`, to train into `adapters_dir`; a run that has begun before goes on.

    Raises FileNotFound.
    """
    targets = ",".join(job.targets) if isinstance(job.targets, list) else job.targets
    options = {
        "adapters-dir": adapters_dir,
        "data": files.path(job.training_file),
        "val-data": files.path(job.validation_file) if job.validation_file else None,
        "name": job.name,
        "epochs": job.n_epochs,
        "batch-size": job.batch_size,
        "learning-rate": job.learning_rate_multiplier * TrainOptions.learning_rate,
        "seed": job.seed,
        "rank": job.rank,
        "alpha": job.alpha,
        "targets": targets,
        "lora-plus-ratio": job.lora_plus_ratio,
        "val-split": job.val_split,
        "objective": job.objective,
        "dpo-beta": job.beta,
    }
    given = [f"--{option}={value}" for option, value in options.items() if value is not None]
    given += [f"--{flag}" for flag, wanted in (("rslora", job.rslora), ("dora", job.dora)) if wanted]
    resume = [] if job.process is None else ["--resume"]
    return ["loraserve", "train", *base_options, *given, *resume]
