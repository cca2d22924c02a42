"""The registry: adapters by name in one directory, for any number of readers and writers at once.

Readers take no lock: they follow `.current` to a version that never changes, and notice a republished adapter by a few
stat calls. Writers hold the file lock `.lock` of the directory, build the next version under `.staging` and rename it
into place; what a crash leaves under `.staging` is removed by the next writer and never listed. Names match an
allowlist and symlinks are not followed, so nothing outside the directory is reached.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraserve.errors import AdapterNotFound, AdapterRefused, Conflict, InvalidRequest, StorageError, VersionNotFound
from loraserve.lora.adapter import Adapter, Shapes, find_size_problems, find_value_problems
from loraserve.lora.config import LoraConfig
from loraserve.lora.files import copy_file, write_file
from loraserve.lora.peft import write_adapter
from loraserve.lora.spec import Spec, check_name, parse_spec
from loraserve.registry.adopt import adopt_dropped, seal, settle
from loraserve.registry.fit import Fit
from loraserve.registry.folder import WATCHED, AdapterFolder, listed
from loraserve.registry.listing import iterate_names, may_name
from loraserve.registry.manifest import MANIFEST_FILE, Manifest
from loraserve.registry.record import Findings, Record, read_record
from loraserve.registry.sound import SoundFiles
from loraserve.registry.sources import blend_of, export_to, import_to
from loraserve.registry.staging import Staging
from loraserve.registry.verify import Problem, find_problems_of, find_strays

READERS_PATIENCE = 0.5
"""Seconds a reader waits for the lock to adopt files changed by hand, before it goes on with the current version."""


class Registry:
    """Adapters in a directory, which need not exist yet.

    Args:
        root: the directory.
        shapes: the base's layers; adapters that do not fit are then refused. None accepts adapters of any base.
        fingerprint: the base's; adapters trained on another are then refused.
        allow_base_mismatch: let adapters of a base with other weights pass, with a warning, but not of other shapes.
    """

    def __init__(
        self,
        root: Path | str,
        shapes: Shapes | None = None,
        fingerprint: str | None = None,
        allow_base_mismatch: bool = False,
    ) -> None:
        self.root = Path(root)
        self.shapes = shapes
        self.fingerprint = fingerprint
        self._fit = Fit(shapes, fingerprint, allow_base_mismatch)
        self._findings = Findings()
        self._sound = SoundFiles()
        self._staging = Staging(self.root)

    def names(self) -> list[str]:
        """Every adapter's name, in order. One or two stat calls each, no file is opened."""
        return list(self.iterate())

    def iterate(self, after: str = "", query: str = "") -> Iterator[str]:
        """The names that come after one and contain a text, in order, each looked for only when it is its turn."""
        return iterate_names(self.root, after, query)

    def has(self, name: str) -> bool:
        """Whether there is an adapter of that name, whatever it is worth; never raises."""
        return may_name(name) and AdapterFolder(self.root / name).signature() is not None

    def is_refused(self, name: str) -> bool:
        """Whether a directory that was dropped in is known to be no adapter; False as long as nobody has asked."""
        return self._findings.refuses(name) and isinstance(
            self._findings.recall(name, self._folder(name).signature()), AdapterRefused
        )

    def get(self, name: str) -> Record:
        """The current version of an adapter; a few stat calls while its files are untouched.

        Raises:
            InvalidRequest: `name` cannot name an adapter.
            AdapterNotFound: there is none; the message has close matches.
            AdapterRefused: it cannot be used, as far as config, header and manifest tell.
        """
        folder = self._folder(name)
        signature = folder.signature()
        if signature is None:
            self._findings.forget(name)
            raise self._not_found(name)
        if (known := self._findings.recall(name, signature)) is not None:
            if isinstance(known, AdapterRefused):
                raise AdapterRefused(name, known.problems)
            return known
        warning, settled = None, True
        if folder.current() is not None and not folder.in_step():
            try:
                with self._staging.locked(f"adopt the changed files of adapter {name!r}", READERS_PATIENCE):
                    warning = settle(folder, self._staging.place(name), self.shapes)
            except (Conflict, StorageError) as error:
                warning, settled = str(error), False
            signature = folder.signature() or ()
        current = folder.current() or 0
        try:
            record = read_record(name, folder, current, self.shapes)
            problems, doubts = self._fit.compare(record.manifest)
            if problems:
                raise AdapterRefused(name, problems)
        except AdapterRefused as refusal:
            if not current:  # the signature covers all that was read
                self._findings.keep(name, signature, refusal)
            raise
        doubts += [warning] if warning else []
        record = replace(record, warnings=record.warnings + doubts, signature=signature)
        if settled:
            self._findings.keep(name, signature, record)
        return record

    def load(self, name: str) -> Adapter:
        """The weights of an adapter's current version, checked whole.

        Raises:
            InvalidRequest, AdapterNotFound: see `get`.
            AdapterRefused: it would do nothing, or the wrong thing; `problems` lists everything found.
        """
        while True:
            record = self.get(name)
            try:
                if (adapter := self._sound.read(record, self.shapes)) is not None:
                    return adapter
            except AdapterRefused:
                if self.get(name).signature == record.signature:  # else its files changed while they were read
                    raise

    def publish(
        self,
        name: str,
        adapter: Adapter,
        config: LoraConfig,
        manifest: Manifest | Mapping[str, Any] | None = None,
        extra_files: Mapping[str, bytes | Path] | None = None,
    ) -> Record:
        """Make `adapter` the next version of `name`, and the current one. All or nothing.

        Args:
            extra_files: the card and whatever else lies beside the weights, by plain file name.

        Raises:
            InvalidRequest: a name that cannot be, or a manifest with fields of the wrong type.
            AdapterRefused: it would do nothing, or the wrong thing, on the registry's base.
            Conflict: the lock was held too long, or something that is no directory has the name.
            StorageError: writing failed; the current version is what it was.
        """
        check_name(name)
        manifest = manifest if isinstance(manifest, Manifest) else Manifest.from_dict(manifest or {})
        files = dict(extra_files or {})
        for file in files:
            if Path(file).name != file or file.startswith(".") or file in (*WATCHED, MANIFEST_FILE):
                raise InvalidRequest(f"{file!r} cannot be the name of a file beside an adapter")
        sizes = {target: (tuple(w.A.shape), tuple(w.B.shape)) for target, w in adapter.weights.items()}
        problems = find_size_problems(sizes, self.shapes) + find_value_problems(adapter)
        problems += self._fit.compare(manifest)[0]
        if problems:
            raise AdapterRefused(name, problems)

        def fill(staging: Path) -> None:
            write_adapter(staging, adapter, config)
            for file, content in files.items():
                if isinstance(content, bytes):
                    write_file(staging / file, content)
                else:
                    copy_file(content, staging / file)
            seal(staging, manifest)

        return self._install(name, fill)

    def import_(self, source: Path | str, name: str | None = None) -> Record:
        """Publish an adapter from elsewhere: a PEFT directory, whose files are taken as they are, or a MiniMind `.pth`.

        Args:
            name: by default that of the directory or file.

        Raises as `publish` does; AdapterRefused also for a manifest that belongs to other weights.
        """
        source = Path(source)
        name = check_name(name or (source.resolve().name if source.is_dir() else source.stem))

        def fill(staging: Path) -> None:
            import_to(staging, source, name, self.shapes)
            seal(staging, self._fit.check(staging, name))

        return self._install(name, fill)

    def export(self, name: str, out: Path | str, format: str = "peft") -> Path:
        """Write an adapter's current version elsewhere.

        Args:
            out: must not exist (an empty directory is fine).
            format: `peft` for a PEFT directory, `minimind` for minimind-3's `.pth` (rank 16, float16), `minimind2` for
                minimind2's (rank 8, float32).

        Raises:
            AdapterRefused: MiniMind's format cannot express it; every reason is named.
            Conflict: `out` exists.
            InvalidRequest: an unknown format, or a MiniMind format without a base to tell which layers are square.
            StorageError: writing failed.
        """
        record = self.get(name)
        return export_to(Path(out), record, self.load(name), format, self.shapes)

    def remove(self, name: str) -> None:
        """Remove an adapter with all its versions; a request that runs on it is not disturbed."""
        self._existing(name)
        with self._staging.locked(f"remove adapter {name!r}"):
            os.rename(self._existing(name).path, self._staging.place(name))  # gone at once; the rest is cleaning up
            self._staging.clean()
        self._findings.forget(name)

    def rename(self, old: str, new: str) -> None:
        """Give an adapter with all its versions another name. Raises Conflict if the new one is taken."""
        self._existing(old)
        check_name(new)
        with self._staging.locked(f"rename adapter {old!r}"):
            folder = self._existing(old)
            if os.path.lexists(self.root / new):
                raise Conflict(f"cannot rename {old!r} to {new!r}: {self.root / new} exists")
            os.rename(folder.path, self.root / new)
        self._findings.forget(old)

    def history(self, name: str) -> list[Record]:
        """Every readable version, the oldest first; for a directory that was dropped in, that alone as version 0."""
        folder = self._existing(name)
        numbers = folder.numbers()
        if not numbers:
            return [read_record(name, folder, 0)]
        records = []
        for number in numbers:
            with suppress(AdapterRefused):  # `verify` says what is wrong with it
                records.append(read_record(name, folder, number))
        return records

    def rollback(self, name: str, version: int | None = None) -> Record:
        """Make an older version the current one again; newer ones stay and can be rolled back to.

        Args:
            version: by default the one before the current one.

        Raises:
            VersionNotFound: there is no such version.
            AdapterRefused: it is damaged, or made for another base; the current version is what it was.
        """
        self._existing(name)
        with self._staging.locked(f"roll adapter {name!r} back"):
            folder = self._existing(name)
            settle(folder, self._staging.place(name), self.shapes)
            current, numbers = folder.current(), folder.numbers()
            if version is None:
                version = max((n for n in numbers if current is None or n < current), default=None)
            if version is None or version not in numbers:
                wanted = str(version) if version is not None else f"older than {current or 'this'}"
                raise VersionNotFound(wanted, hint=f"adapter {name!r} has {listed(numbers)}")
            self._fit.check(folder.version_path(version), name)
            folder.switch(version)
        return self.get(name)

    def blend(self, spec: Spec | str, name: str) -> Record:
        """Publish the exact blend of several adapters as one: their ranks stand side by side, in float32."""
        spec = parse_spec(spec) if isinstance(spec, str) else spec
        if not spec:
            raise InvalidRequest("a blend needs at least one adapter, as in 'a:0.7+b:0.3'", param="adapter")
        records = [self.get(term.name) for term in spec]
        parts = [(self.load(term.name), term.scale) for term in spec]
        return self.publish(name, *blend_of(spec, records, parts, name, self.shapes))

    def verify(self, name: str | None = None) -> list[Problem]:
        """Check every version of one adapter, or of all, against hashes, values and the base. Changes nothing."""
        names = self.names() if name is None else [name]
        problems = find_strays(self.root) if name is None else []
        for each in names:
            problems += find_problems_of(each, self._existing(each), self._fit)
        return problems

    def _install(self, name: str, fill: Callable[[Path], None]) -> Record:
        """Make what `fill` writes into an empty place the next version of `name`."""
        with self._staging.locked(f"publish adapter {name!r}"):
            folder = self._folder(name)
            if os.path.lexists(folder.path) and (folder.path.is_symlink() or not folder.path.is_dir()):
                raise Conflict(f"cannot publish {name!r}: {folder.path} exists and is not a directory")
            staged = self._staging.place(name)
            try:
                fill(staged)
            except BaseException:
                shutil.rmtree(staged, ignore_errors=True)
                raise
            if folder.current() is not None:
                settle(folder, self._staging.place(name), self.shapes)
            elif folder.has_own_files():
                adopt_dropped(folder, self._staging.place(name))
            folder.add(staged)
        return self.get(name)

    def _folder(self, name: str) -> AdapterFolder:
        return AdapterFolder(self.root / check_name(name))

    def _existing(self, name: str) -> AdapterFolder:
        folder = self._folder(name)
        if folder.signature() is None:
            raise self._not_found(name)
        return folder

    def _not_found(self, name: str) -> AdapterNotFound:
        names = self.names()
        return AdapterNotFound(name, names, hint="" if names else f"there are no adapters in {self.root}")
