"""What is known of adapters is asked by many threads while others forget it."""

from loraserve.errors import AdapterRefused
from loraserve.registry.record import Findings


class Fleeting(dict):
    """Findings that another thread forgets as soon as they have been seen."""

    def __contains__(self, name: object) -> bool:
        found = super().__contains__(name)
        self.pop(name, None)
        return found


def test_a_refusal_that_is_forgotten_meanwhile_is_no_error() -> None:
    findings = Findings()
    findings._known = Fleeting()
    findings.keep("broken", "these files", AdapterRefused("broken", ["it has no weights"]))
    assert findings.refuses("broken")
    findings.forget("broken")
    assert not findings.refuses("broken")
