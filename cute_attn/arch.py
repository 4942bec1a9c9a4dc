"""GPU architectures: what a chip can do, and which chips can run which code."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ARCHS", "Arch", "arch_for_capability", "arch_from_name"]


@dataclass(frozen=True)
class Arch:
    """One compilation target of the CuTe DSL.

    name:         target as ptxas spells it, "sm_80" ... "sm_120a"
    capability:   compute capability (major, minor)
    shared_bytes: most dynamic shared memory one CTA may ask for, in bytes (CUDA C++ Programming Guide,
                  table "Technical Specifications per Compute Capability")
    gpus:         chips of this kind that people know by name
    """

    name: str
    capability: tuple[int, int]
    shared_bytes: int
    gpus: str

    @property
    def family_specific(self) -> bool:
        """Code of an "a" target runs on exactly that capability and on no later one."""
        return self.name.endswith("a")

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether machine code for this target runs on a device of that compute capability.

        Machine code is compatible with later minor versions of its own major version, code of an "a" target with none.
        """
        if self.family_specific:
            return capability == self.capability
        return capability[0] == self.capability[0] and capability[1] >= self.capability[1]


ARCHS: dict[str, Arch] = {
    a.name: a
    for a in (
        Arch("sm_80", (8, 0), 163 * 1024, "A100, A30"),
        Arch("sm_86", (8, 6), 99 * 1024, "RTX 30 series, A40, A10"),
        Arch("sm_89", (8, 9), 99 * 1024, "RTX 40 series, L40S, L4"),
        Arch("sm_90a", (9, 0), 227 * 1024, "H100, H200"),
        Arch("sm_100a", (10, 0), 227 * 1024, "B200"),
        Arch("sm_120a", (12, 0), 99 * 1024, "RTX 50 series, RTX PRO 6000 Blackwell"),
    )
}


def arch_from_name(name: str) -> Arch:
    """The `Arch` called ``name`` ("sm_80" ... "sm_120a"). Raises ValueError for others, TypeError for no string."""
    if not isinstance(name, str):
        raise TypeError(f"arch must be a target's name such as 'sm_80', got {type(name).__name__}")
    if name not in ARCHS:
        raise ValueError(f"arch={name!r} is not known; use one of {', '.join(ARCHS)}")
    return ARCHS[name]


def arch_for_capability(capability: tuple[int, int]) -> Arch:
    """The best target for a device: the latest one whose code runs on it.

    Raises ValueError for a device that no target serves (compute capability below 8.0, or newer than this release).
    """
    fits = [a for a in ARCHS.values() if a.runs_on(capability)]
    if not fits:
        raise ValueError(
            f"no kernel runs on compute capability {capability[0]}.{capability[1]}; "
            f"supported are {', '.join(f'{a.name} ({a.gpus})' for a in ARCHS.values())}"
        )
    return max(fits, key=lambda a: a.capability)
