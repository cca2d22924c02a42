"""Which adapters a request means, from its `model` and `adapter` fields.

    adapter     a SPEC, or [{"name", "scale"}]
    model       the base's name, an adapter's name (or SPEC), or base:SPEC
    neither     the server's default

Knows no HTTP and no registry: whether the adapters exist is the engine's to say.
"""

from dataclasses import dataclass

from loraserve.errors import InvalidRequest, ModelNotFound
from loraserve.lora.spec import BASE, Spec, format_spec, parse_spec


@dataclass(frozen=True)
class Selection:
    """What a request asked for, and the field that said so (None: the default answered)."""

    spec: Spec
    param: str | None = None

    @property
    def text(self) -> str:
        return format_spec(self.spec)


def select(model: str | None, adapter: Spec | None, *, base_name: str, default: Spec) -> Selection:
    """Decide the adapters of a request.

    Raises ModelNotFound for a `model` that cannot name an adapter, and InvalidRequest where `model` and `adapter`
    name different ones. `model` naming the base alone leaves the choice to `adapter`.
    """
    named = _spec_of_model(model, base_name) if model else None
    if adapter is None:
        return Selection(default) if named is None else Selection(named, "model")
    if named and dict(named_terms(named)) != dict(named_terms(adapter)):
        raise InvalidRequest(
            f"model {model!r} and adapter {format_spec(adapter)!r} name different adapters: "
            f"leave one out, or give model {base_name!r}",
            param="adapter",
        )
    return Selection(adapter, "adapter")


def named_terms(spec: Spec) -> list[tuple[str, float]]:
    return [(term.name, term.scale) for term in spec]


def _spec_of_model(model: str, base_name: str) -> Spec:
    if model in (base_name, BASE):
        return ()
    rest = model
    for prefix in (f"{base_name}:", f"{BASE}:"):
        if model.startswith(prefix):
            rest = model.removeprefix(prefix)
            break
    try:
        return parse_spec(rest, param="model")
    except InvalidRequest as error:
        if ":" in rest or "+" in rest:  # meant as a SPEC, and wrong as one
            raise
        raise ModelNotFound(model, [base_name], param="model", hint="GET /v1/models lists what there is") from error
