"""The samples of a run: which are held out, in which order an epoch takes them, and MiniMind's random changes of them.

All randomness is a function of (seed, epoch, row): a resumed run repeats an interrupted one without saved generators.
The order of an epoch is MiniMind's, `torch.randperm` seeded with seed + epoch. Memory holds 8 bytes per row and order,
and no row.
"""

import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from loraserve.train.data import UNCHANGED, Augmentation, Encoder, Sample
from loraserve.train.dialogue import Dialogue, read_dialogue
from loraserve.train.options import TrainOptions
from loraserve.train.pairs import read_pair
from loraserve.train.rows import DataFile, Row
from loraserve.train.tokens import Facts, Note, TokenFile, discard_tokens, tokenize

VALIDATION = "validation"
"""Where the tokens of a validation file are, in the run's folder."""


def num_held_out(rows: int, val_split: float) -> int:
    """How many of `rows` are for validation; at least one when `val_split` is above 0, and never all."""
    return min(max(round(val_split * rows), 1), rows - 1) if val_split > 0 else 0


class Dataset:
    """The samples of a training run, split into training and validation.

    Args:
        data: where the rows of `tokens` are from; read again for random changes.
        val_split: the fraction of rows held out, drawn by `seed`.
        validation: a file of its own to validate on, and its tokens; then no row is held out.
    """

    def __init__(
        self,
        data: DataFile,
        tokens: TokenFile,
        encoder: Encoder,
        *,
        seed: int,
        val_split: float = 0.0,
        validation: tuple[DataFile, TokenFile] | None = None,
        augmentation: Augmentation = UNCHANGED,
    ) -> None:
        self._data, self._tokens, self._encoder = data, tokens, encoder
        self._augmentation, self._seed = augmentation, seed
        held_out = num_held_out(len(tokens), val_split)
        shuffled = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
        self._train, self._val = shuffled[held_out:].sort().values, shuffled[:held_out].sort().values
        self._val_data, self._val_tokens = validation or (data, tokens)
        if validation is not None:
            self._val = torch.arange(len(self._val_tokens))
        self._order: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._train)

    @property
    def num_val(self) -> int:
        return len(self._val)

    def order(self, epoch: int) -> Tensor:
        """The rows (N,) of one epoch (counted from 0), in the order they are trained on."""
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._order = epoch, torch.randperm(len(self), generator=generator)
        return self._order[1]

    def sample(self, epoch: int, row: int) -> Sample:
        """The training sample of `row` as it is in `epoch`."""
        place = int(self._train[row])
        if self._augmentation:
            rng = random.Random(f"{self._seed}/{epoch}/{row}")
            changed = self._encoder.encode_augmented(self._dialogue(place), self._augmentation, rng)
            if changed is not None:
                return changed
        return self._tokens.sample(place)

    def samples(self, epoch: int, row: int) -> list[Sample]:
        """All samples of `row` as they are in `epoch`: one, or of a pair the chosen and the rejected one."""
        if self.samples_per_row == 1:
            return [self.sample(epoch, row)]
        return self._tokens.samples(int(self._train[row]))

    @property
    def samples_per_row(self) -> int:
        return self._tokens.facts.samples_per_row

    def longest(self, count: int) -> list[int]:
        """Tokens of the longest `count` rows, of those trained on and those held out, without random changes."""
        return sorted(self._tokens.lengths().tolist())[-count:]

    def val_sample(self, row: int) -> Sample:
        return self._val_tokens.sample(int(self._val[row]))

    def val_samples(self, row: int) -> list[Sample]:
        return self._val_tokens.samples(int(self._val[row]))

    def dialogues(self) -> Iterator[Dialogue]:
        """The dialogues validated on, or those trained on if there are none; of pairs the chosen ones."""
        for place in self._val:
            yield self._read(self._val_data.row(*self._val_tokens.place(int(place))))
        for place in self._train if not len(self._val) else ():
            yield self._dialogue(int(place))

    def _dialogue(self, place: int) -> Dialogue:
        return self._read(self._data.row(*self._tokens.place(place)))

    def _read(self, row: Row) -> Dialogue:
        return read_dialogue(row) if self.samples_per_row == 1 else read_pair(row).chosen


def open_dataset(
    options: TrainOptions, encoder: Encoder, folder: Path, note: Note
) -> tuple[DataFile, Facts, Dataset, str | None]:
    """Tokenize a run's files into its folder, unless they are there.

    Returns:
        the training file, what was found in it, the samples, and the validation file's SHA-256 if it has one.

    Raises as `tokenize` and `DataFile` do.
    """
    data, pairs = DataFile(options.data), options.objective == "dpo"
    tokens = tokenize(data, encoder, folder, options.on_bad_row, note, pairs=pairs)
    validation = None
    if options.val_data is not None:
        val_data = DataFile(options.val_data)
        place = folder / VALIDATION
        validation = val_data, tokenize(val_data, encoder, place, options.on_bad_row, note, pairs=pairs)
    dataset = Dataset(
        data,
        tokens,
        encoder,
        seed=options.seed,
        val_split=options.val_split,
        validation=validation,
        augmentation=options.augmentation,
    )
    return data, tokens.facts, dataset, validation[0].sha256 if validation else None


def discard_dataset(folder: Path) -> None:
    """Remove what `open_dataset` left in a run's folder; rejected rows stay."""
    discard_tokens(folder)
    discard_tokens(folder / VALIDATION)
    with suppress(OSError):  # missing, or rejected rows are in it
        (folder / VALIDATION).rmdir()
