"""How large a launch is, whether the hardware would take it, and the order in which its CTAs start."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .errors import InvalidLaunch
from .memory import Array
from .module import Kernel

Shape = tuple[int, int, int]

MAX_SHARED_BYTES = 232448
"""227 KiB, the most that any architecture so far gives one CTA."""
MAX_CLUSTER = 16
"""CTAs in a cluster, with the attribute that allows more than the portable 8."""


@dataclass(frozen=True)
class LaunchSize:
    """grid, block, cluster: (x, y, z). shared_bytes: dynamic shared memory per CTA.

    cooperative: all CTAs run at the same time, however many.
    """

    grid: Shape
    block: Shape
    shared_bytes: int = 0
    cluster: Shape = (1, 1, 1)
    cooperative: bool = False

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return math.prod(self.block)

    @property
    def cta_lanes(self) -> int:
        """Lanes of a CTA: its last warp is filled up."""
        return -(-self.threads // 32) * 32

    @property
    def cluster_ctas(self) -> int:
        return math.prod(self.cluster)

    def check(self, kernel: Kernel) -> None:
        """Raises InvalidLaunch, naming everything that the kernel or the hardware does not allow."""
        grid, block, cluster = self.grid, self.block, self.cluster
        problems = []
        if min(*grid, *block) < 1:
            problems.append("a dimension of the grid or block is not positive")
        if self.threads > 1024:
            problems.append(f"{self.threads} threads in a block, 1024 are allowed")
        if kernel.required_block and tuple(block) != kernel.required_block:
            problems.append(f"the kernel requires blocks of {kernel.required_block}")
        if kernel.max_threads and self.threads > kernel.max_threads:
            problems.append(f"{self.threads} threads in a block, the kernel allows {kernel.max_threads}")
        if grid[0] > 2**31 - 1 or max(grid[1:]) > 65535:
            problems.append("the grid is larger than (2^31 - 1, 65535, 65535)")
        if min(cluster) < 1 or self.cluster_ctas > MAX_CLUSTER:
            problems.append(f"clusters of {cluster} CTAs, {MAX_CLUSTER} in all are allowed")
        elif any(g % c for g, c in zip(grid, cluster, strict=True)):
            problems.append(f"the grid is not a multiple of the cluster {cluster}")
        if self.shared_bytes + kernel.static_shared_bytes > MAX_SHARED_BYTES:
            problems.append(f"{self.shared_bytes + kernel.static_shared_bytes} bytes of shared memory in a block")
        if problems:
            raise InvalidLaunch(f"cannot launch {kernel.name} with grid {grid}, block {block}: " + "; ".join(problems))

    def cluster_order(self, random: np.random.Generator | None) -> Array:
        """[clusters, CTAs per cluster] linear CTA numbers: clusters in launch order or shuffled, CTAs by rank."""
        (gx, gy, gz), (cx, cy, cz) = self.grid, self.cluster
        numbers = np.arange(gx * gy * gz).reshape(gz // cz, cz, gy // cy, cy, gx // cx, cx)
        rows = numbers.transpose(0, 2, 4, 1, 3, 5).reshape(-1, cx * cy * cz)
        return rows if random is None else random.permutation(rows)
