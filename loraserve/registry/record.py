"""What the registry says of one version of an adapter, without its weights."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from loraserve.errors import AdapterRefused
from loraserve.lora.adapter import Shapes
from loraserve.lora.config import LoraConfig
from loraserve.lora.peft import CONFIG_FILE, scan_adapter
from loraserve.registry.folder import AdapterFolder
from loraserve.registry.manifest import Manifest, read_manifest, sha256_of


@dataclass(frozen=True)
class Record:
    """One version of an adapter."""

    name: str
    version: int
    """Counts from 1; 0 is a directory that was dropped in and never published."""
    path: Path
    """The PEFT directory to read; a published version's files never change under it."""
    config: LoraConfig
    manifest: Manifest
    targets: tuple[str, ...]
    """The module paths it has weights for."""
    num_parameters: int
    rank: int
    """The largest rank of any target."""
    size_bytes: int
    """Of the weights file."""
    warnings: list[str] = field(default_factory=list)
    signature: tuple[object, ...] = ()
    """Equal as long as the adapter's files are untouched: what a cache of loaded weights compares."""

    @property
    def created(self) -> int:
        """Seconds since 1970, by the manifest, else by the config file's time."""
        try:
            moment = datetime.fromisoformat(self.manifest.created or "")
            return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
        except (ValueError, OverflowError):
            try:
                return int((self.path / "adapter_config.json").stat().st_mtime)
            except OSError:
                return 0


def read_record(name: str, folder: AdapterFolder, number: int, shapes: Shapes | None = None) -> Record:
    """Read config, header and manifest of one version; 0 is the top level of a directory that was dropped in.

    Raises:
        AdapterRefused: they do not make an adapter, or not one for a base with `shapes`.
    """
    path = folder.version_path(number) if number else folder.path
    scan = scan_adapter(path, name, shapes)
    manifest, warning = read_manifest(path)
    scan.warnings.extend(manifest.warnings)
    if warning:
        scan.warnings.append(warning)
    if manifest.config_sha256 and sha256_of(path / CONFIG_FILE) != manifest.config_sha256:
        changed = f"{CONFIG_FILE} does not have the sha256 it was published with: changed or damaged"
        (scan.problems if number else scan.warnings).append(changed)
    if scan.problems or scan.config is None:
        raise AdapterRefused(name, scan.problems)
    return Record(
        name=name,
        version=number,
        path=path,
        config=scan.config,
        manifest=manifest,
        targets=tuple(scan.sizes),
        num_parameters=scan.num_parameters,
        rank=scan.rank,
        size_bytes=scan.size_bytes,
        warnings=scan.warnings,
    )


class Findings:
    """What was found of adapters, each for as long as its files have the same signature."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[object, Record | AdapterRefused]] = {}

    def recall(self, name: str, signature: object) -> Record | AdapterRefused | None:
        """The finding; None if there is none of these files."""
        known = self._known.get(name)
        return known[1] if known is not None and known[0] == signature else None

    def refuses(self, name: str) -> bool:
        """Whether the last finding was a refusal, be it of these files or of others."""
        return isinstance(self._known.get(name, (None, None))[1], AdapterRefused)

    def keep(self, name: str, signature: object, finding: Record | AdapterRefused) -> None:
        self._known[name] = signature, finding

    def forget(self, name: str) -> None:
        self._known.pop(name, None)
