"""What a launch asks for besides its sizes: cudaLaunchAttribute."""

from __future__ import annotations

from dataclasses import dataclass

from cute_attn.emulator.errors import EmulatorError
from cute_attn.emulator.runtime import LaunchConfig
from cute_attn.emulator.wave import Shape

__all__ = ["LaunchAttributes", "read_attributes"]

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
    11: "preferred cluster dimension: a hint beside the cluster dimension, which is what CTAs run in",
    14: "preferred shared memory carveout",
}


@dataclass(frozen=True)
class LaunchAttributes:
    """The attributes that change what a kernel does.

    cluster:     CTAs per cluster (x, y, z); None if the launch does not say
    cooperative: all CTAs of the grid run at the same time
    """

    cluster: Shape | None = None
    cooperative: bool = False


def read_attributes(name: str, requested: LaunchConfig) -> LaunchAttributes:
    """The attributes of a launch of kernel ``name``. Raises EmulatorError for one that is not modelled."""
    cluster, cooperative = None, False
    for attribute in requested.attributes[: requested.attribute_count]:
        if attribute.id == _CLUSTER_DIMENSION:
            x, y, z = attribute.value[:3]
            cluster = (x, y, z)
        elif attribute.id == _COOPERATIVE:
            cooperative = bool(attribute.value[0])
        elif attribute.id not in _WITHOUT_EFFECT:
            raise EmulatorError(f"launch of {name}: cudaLaunchAttributeID {attribute.id} is not modelled")
    return LaunchAttributes(cluster, cooperative)
