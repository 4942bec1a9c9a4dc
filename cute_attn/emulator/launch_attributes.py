"""What a launch asks for besides its sizes: cudaLaunchAttribute."""

from __future__ import annotations

from cute_attn.emulator.errors import EmulatorError
from cute_attn.emulator.runtime import LaunchConfig

__all__ = ["check_attributes"]

# cudaLaunchAttributeID
_COOPERATIVE, _CLUSTER_DIMENSION = 2, 4
_WITHOUT_EFFECT = {
    0: "ignored",
    1: "access policy window",
    3: "synchronisation policy of the stream",
    5: "cluster scheduling policy",
    6: "programmatic stream serialization: launches are finished when they return",
    8: "priority",
    9: "memory synchronisation domain map",
    10: "memory synchronisation domain",
    14: "preferred shared memory carveout",
}


def check_attributes(name: str, requested: LaunchConfig) -> None:
    """Raise EmulatorError for a launch attribute that would change what the kernel does and is not modelled."""
    for attribute in requested.attributes[: requested.attribute_count]:
        if attribute.id == _CLUSTER_DIMENSION:
            cluster = tuple(attribute.value[:3])
            if cluster != (1, 1, 1):
                raise EmulatorError(f"launch of {name}: clusters of more than one CTA {cluster} are not modelled")
        elif attribute.id == _COOPERATIVE:
            if attribute.value[0]:  # CTAs run in groups, one after another: they cannot wait for each other
                raise EmulatorError(f"launch of {name}: cooperative launches are not modelled")
        elif attribute.id not in _WITHOUT_EFFECT:
            raise EmulatorError(f"launch of {name}: cudaLaunchAttributeID {attribute.id} is not modelled")
