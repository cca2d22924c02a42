"""A model that shares another's weights except for some layers: what a merged adapter runs on, beside its base.

What no layer of its own lies in (norms, embeddings, the table of rotations, whole blocks) is the other model's very
object. Layers that are packed together can only change together, so one of its own brings its neighbours along.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from loraserve.base.config import ModelConfig
from loraserve.base.linear import Joint, Linear
from loraserve.base.load import empty_model
from loraserve.base.model import Model


def with_neighbours(model: Model, targets: Iterable[str]) -> set[str]:
    """`targets` and every layer of `model` that is packed together with one of them."""
    wanted = set(targets)
    for joint in model.modules():
        if isinstance(joint, Joint) and wanted & (together := {layer.target for layer in joint.layers}):
            wanted |= together
    return wanted


def derive(model: Model, config: ModelConfig, targets: set[str], weight: Callable[[str], Tensor]) -> Model:
    """Return a packed Model with the layers `targets` of its own and everything else `model`'s.

    Args:
        model: packed; not modified.
        config: its own, or the same with an untied head.
        targets: closed under `with_neighbours`.
        weight: gives the weight (out, in) of a target, in the model's dtype and on its device; the new model owns it.
    """
    assert model.packing is not None
    derived = empty_model(config).requires_grad_(False).eval()
    _share(derived, model, targets)
    for module in derived.modules():
        if isinstance(module, Joint) and module.layers[0].target in targets:
            for layer in module.layers:
                layer.weight = nn.Parameter(weight(layer.target), requires_grad=False)
            module.pack(*model.packing, keep=False)
    derived.pack(*model.packing)
    return derived


def own_bytes(derived: Model, model: Model) -> int:
    """Bytes of the packed layers that `derived` does not share with `model`."""
    shared = set(model.modules())
    return sum(joint.num_bytes for joint in derived.modules() if isinstance(joint, Joint) and joint not in shared)


def _share(mine: nn.Module, theirs: nn.Module, targets: set[str]) -> None:
    """Put `theirs`' children in the place of `mine`'s, except on the way to `targets`."""
    for name, child in theirs.named_children():
        if not any(_computes(module, targets) for module in child.modules()):
            setattr(mine, name, child)
        elif not isinstance(child, Joint | Linear):
            _share(getattr(mine, name), child, targets)


def _computes(module: nn.Module, targets: set[str]) -> bool:
    layers = (module,) if isinstance(module, Linear) else module.layers if isinstance(module, Joint) else ()
    return any(layer.target in targets for layer in layers)
