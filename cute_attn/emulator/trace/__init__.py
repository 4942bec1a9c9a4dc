"""Which warp did what, and waited where: launches as a trace in Chrome's format, for ui.perfetto.dev.

`with emulator.trace("out.json"):` records the launches inside it. A CTA is a process; its tracks are its warps, each
with its role, and what works asynchronously for it: copies into its shared memory, groups of wgmma, of cp.async and of
bulk stores. An arrow leads from what ended a wait, an arrival or a completed operation, to the end of that wait.

**The time is logical**, a picture of what depends on what and not a measurement:

* Every warp has a clock of its own, which starts at 0 and which each instruction that the warp issues moves on: by one
  unit, and by more for `mma`, special functions, shuffles and shared memory (see `costs`). Warps do not compete for an
  issue slot or a pipe, and a load from global memory costs no more than its issue.
* A copy takes an assumed latency and an assumed time per byte. A warpgroup's wgmma follow one another, each as long as
  the tensor cores take for it, and cost the warps one unit.
* A warp that has waited goes on at the time of what released it, if its own is earlier.

The order in which the emulator steps warps does not enter, but where it decides what the program does.

From the program's text: `work` names instructions, `costs` times them, `source` finds their functions, `stretches` cuts
blocks into pieces under one name, and `roles` names warps. From a run: `wave_trace` follows a wave's warps into the
slices of `launch_trace`, which `chrome_events` writes and `summary` counts.
"""

from .launch_trace import short_name
from .recorder import Recorder, trace

__all__ = ["Recorder", "short_name", "trace"]
