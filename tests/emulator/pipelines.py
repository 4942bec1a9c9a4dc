"""Programs in which producer warps fill a ring of stages and consumer warps empty it, right by construction.

Shared memory: full mbarriers at 0, 8, ..., empty ones at 128, 136, ..., the stages from 1024 on and, where producers
send from their own memory, as many stages after them. A stage is `units` of 128 bytes. Every synchronisation is a named
part of the text. `needed` says whether the program is wrong without it, or with one of the `FAULTS`.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import harness
from .tensor_maps import encode_array
from .tma_programs import aligned

EMPTY, STAGES, UNIT = 128, 1024, 128
ASYNC_FILLS = ("bulk", "tensor", "multicast", "send")
"""Fills by the async proxy."""
CLUSTER_FILLS = ("multicast", "send", "st.async")
FILLS = ("stores", "cp.async", "cp.async then arrive", "bulk", "tensor", *CLUSTER_FILLS)

FAULTS = ("early release", "fewer fill", "fewer release", "less announced", "more announced")
"""The stage is given back before it is used; barriers count a warp too few; 16 bytes too few or too many announced."""


@dataclass(frozen=True)
class Pipeline:
    """A program.

    expect:  when bytes are announced: "before" the copy with the arrival, "apart" before it, or "after" it
    release: consumers release a stage by one arrival a "warp", by those of all "lanes", or by one for the whole "group"
    modify:  consumers add 1 to the stage in place, each warp to units of its own
    store:   consumers copy their units out by bulk stores, instead of reading them
    split:   a producer's share is copied in pieces
    """

    cluster: int
    clusters: int
    stages: int
    rounds: int
    producers: int
    consumers: int
    fill: str
    expect: str
    release: str
    modify: bool
    store: bool
    split: bool

    @classmethod
    def draw(cls, seed: int) -> Pipeline:
        rng = random.Random(seed)
        fill = rng.choice(FILLS)
        drawn = cls(
            cluster=rng.choice((1, 2, 2, 4)) if fill in CLUSTER_FILLS else rng.choice((1, 1, 2)),
            clusters=rng.choice((1, 2)),
            stages=rng.randint(1, 4),
            rounds=rng.randint(1, 9),
            producers=rng.randint(1, 2),
            consumers=rng.randint(1, 3),
            fill=fill,
            expect=rng.choice(("before", "apart", "after")),
            release=rng.choice(("warp", "lanes", "group")),
            modify=rng.random() < 0.4,
            store=rng.random() < 0.4,
            split=rng.random() < 0.5,
        )
        return dataclasses.replace(drawn, store=False) if fill == "st.async" else drawn

    # ---- sizes

    @property
    def units(self) -> int:
        return self.producers * self.consumers * self.cluster

    @property
    def nbytes(self) -> int:
        return self.units * UNIT

    @property
    def share(self) -> int:
        """Units that one producer warp fills, in its own CTA's stage or, with multicast, in everybody's."""
        return self.consumers if self.fill == "multicast" else self.units // self.producers

    @property
    def wraps(self) -> bool:
        """Whether a stage is filled for the second time."""
        return self.rounds > self.stages

    @property
    def remote(self) -> bool:
        return self.fill in CLUSTER_FILLS

    # ---- the program

    def parts(self, fault: str = "") -> dict[str, str]:
        """The synchronisations by name."""
        across = self.cluster > 1
        both = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
        parts = {
            "init fence": "fence.mbarrier_init.release.cluster;",
            "init barrier": both if across else "bar.sync 0;",
            "empty wait": "EMPTY: mbarrier.try_wait.parity.shared.b64 %p8, [%r12], %r14; @!%p8 bra EMPTY;",
            "full wait": "FULL: mbarrier.try_wait.parity.shared.b64 %p8, [%r11], %r13; @!%p8 bra FULL;",
            "release": self._release(),
        }
        if self.release == "group":
            parts["group barrier"] = f"bar.sync 1, {32 * self.consumers};"
        if self.remote and across:
            parts["end"] = both
        if self.store:
            parts["commit"] = "@%p3 cp.async.bulk.commit_group;"
            parts["read wait"] = "@%p3 cp.async.bulk.wait_group.read 0;"
        if self.consumer_fences:
            parts["consumer's fence"] = "fence.proxy.async.shared::cta;"
        if self.fill == "send" or (self.store and self.fill in ("stores", "cp.async", "cp.async then arrive")):
            parts["producer's fence"] = "fence.proxy.async.shared::cta;"
        if self.fill == "cp.async then arrive":
            parts["copy wait"] = "cp.async.wait_all;"
        return parts | self._arrivals(fault)

    @property
    def consumer_fences(self) -> bool:
        return self.modify and (self.store or self.fill in ASYNC_FILLS)

    def _arrivals(self, fault: str = "") -> dict[str, str]:
        """What producers do at the full barrier, whose address is %r15."""
        if self.fill in ("stores", "cp.async then arrive"):
            return {"arrival": "mbarrier.arrive.shared.b64 _, [%r15];"}
        if self.fill == "cp.async":
            return {"arrival": "cp.async.mbarrier.arrive.noinc.shared.b64 [%r15];"}
        expected = self.nbytes // self.producers + {"less announced": -16, "more announced": 16}.get(fault, 0)
        where = "release.cluster.shared::cluster.b64" if self.fill in ("send", "st.async") else "shared.b64"
        relaxed = where.replace("release", "relaxed")
        if self.expect == "apart":
            return {
                "expect": f"@%p3 mbarrier.expect_tx.{relaxed} [%r15], {expected};",
                "arrival": f"@%p3 mbarrier.arrive.{where} _, [%r15];",
            }
        return {"arrival": f"@%p3 mbarrier.arrive.expect_tx.{where} _, [%r15], {expected};"}

    def _release(self) -> str:
        guard = {"warp": "@%p3", "lanes": "", "group": "@%p4"}[self.release]
        if self.fill == "multicast":
            return "".join(
                f"mapa.shared::cluster.u32 %r16, %r12, {rank};"
                f"{guard} mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r16];"
                for rank in range(self.cluster)
            )
        if self.remote:
            return (
                f"add.u32 %r16, %r42, {self.cluster - 1}; rem.u32 %r16, %r16, {self.cluster};"
                "mapa.shared::cluster.u32 %r16, %r12, %r16;"
                f"{guard} mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r16];"
            )
        return f"{guard} mbarrier.arrive.shared.b64 _, [%r12];"

    @property
    def full_count(self) -> int:
        return self.producers * (32 if self.fill in ("stores", "cp.async", "cp.async then arrive") else 1)

    @property
    def empty_count(self) -> int:
        own = {"warp": self.consumers, "lanes": 32 * self.consumers, "group": 1}[self.release]
        return own * (self.cluster if self.fill == "multicast" else 1)

    def _copies(self) -> str:
        """What fills the stage at %r10 with the producer's share, whose source is %rd5 for lane 0 and %rd6 for each."""
        share, to, out = self.share, "%r17", ""
        sizes = [UNIT * (share // 2), UNIT * (share - share // 2)] if self.split and share > 1 else [UNIT * share]
        pieces = [(sum(sizes[:n]), size) for n, size in enumerate(sizes)]
        if self.fill in ("stores", "send"):
            base = "%r18" if self.fill == "stores" else "%r19"
            for n in range(share):
                out += f"ld.global.u32 %r20, [%rd6+{UNIT * n}]; st.shared.u32 [{base}+{UNIT * n}], %r20;"
        elif self.fill.startswith("cp.async"):
            for n in range(share):
                out += f"cp.async.ca.shared.global [%r18+{UNIT * n}], [%rd6+{UNIT * n}], 4;"
        elif self.fill in ("bulk", "multicast"):
            kind, mask = (".multicast::cluster", ", %h1") if self.fill == "multicast" else ("", "")
            for start, size in pieces:
                out += (
                    f"@%p3 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes{kind} "
                    f"[{to}+{start}], [%rd5+{start}], {size}, [%r15]{mask};"
                )
        elif self.fill == "tensor":
            out += (
                "@%p3 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                f"[{to}], [%rd2, {{%r21, %r22}}], [%r15];"
            )
        elif self.fill == "st.async":
            for n in range(share):
                out += (
                    f"ld.global.u32 %r20, [%rd6+{UNIT * n}]; add.u32 %r23, %r24, {UNIT * n};"
                    "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r23], %r20, [%r15];"
                )
        if self.fill == "send":
            out += "{producer's fence} bar.warp.sync 0xffffffff; {before}"
            for start, size in pieces:
                out += (
                    "@%p3 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
                    f"[%r24+{start}], [%r25+{start}], {size}, [%r15];"
                )
        return out

    def _fill(self) -> str:
        copies = self._copies()
        if "arrive" not in self.fill and self.fill not in ("stores", "cp.async"):
            announce = {"before": "{arrival}", "apart": "{expect}", "after": ""}[self.expect]
            confirm = {"before": "", "apart": "{arrival}", "after": "{arrival}"}[self.expect]
            return (copies.replace("{before}", announce) if "{before}" in copies else announce + copies) + confirm
        if self.fill == "cp.async" and self.store:  # the fence has to follow the copies' completion
            return copies + "cp.async.wait_all; {producer's fence} {arrival}"
        wait = "{copy wait}" if self.fill == "cp.async then arrive" else ""
        return copies + wait + ("{producer's fence}" if self.store else "") + " {arrival}"

    def _use(self) -> str:
        """What a consumer does with the stage at %r10: out [cta, round, consumer, lane] or [cta, round, unit, lane]."""
        units = [n * self.consumers for n in range(self.units // self.consumers)]  # and so many further: the warp's own
        fence = "{consumer's fence}" if self.consumer_fences else ""
        text = "mov.u32 %r20, 0;"
        if self.modify:
            for n in units:
                at = f"[%r18+{UNIT * n}]"
                text += f"ld.shared.u32 %r21, {at}; add.u32 %r21, %r21, 1; st.shared.u32 {at}, %r21;"
        if self.store:
            for n in units:
                text += "" if n else f"{fence} bar.warp.sync 0xffffffff;"
                text += (
                    f"@%p3 cp.async.bulk.global.shared::cta.bulk_group [%rd6+{UNIT * n}], [%r17+{UNIT * n}], {UNIT};"
                )
            return text + "{commit} {read wait}"
        for n in units if self.modify else range(self.units):
            base = "%r18" if self.modify else "%r19"
            text += f"ld.shared.u32 %r21, [{base}+{UNIT * n}]; mad.lo.u32 %r20, %r21, {n + 1}, %r20;"
        return text + "st.global.u32 [%rd6], %r20;" + fence

    def text(self, without: str = "") -> str:
        """without: the name of a part, or a fault."""
        full = self.full_count - (self.full_count // self.producers if without == "fewer fill" else 0)
        empty = self.empty_count - (self.empty_count // self.consumers if without == "fewer release" else 0)
        inits = "".join(
            f"@%p1 mbarrier.init.shared.b64 [{8 * s}], {full};@%p1 mbarrier.init.shared.b64 [{EMPTY + 8 * s}], {empty};"
            for s in range(self.stages)
        )
        first_use, then = (self._use(), "{release}")[:: -1 if without == "early release" else 1]
        sent_to = f"add.u32 %r26, %r42, 1; rem.u32 %r26, %r26, {self.cluster};" if self.remote else ""
        target = "mapa.shared::cluster.u32 %r15, %r11, %r26; mapa.shared::cluster.u32 %r24, {}, %r26;"
        staged = self.stages * self.nbytes
        destination = {
            "send": target.format("%r17") + f"add.u32 %r25, %r17, {staged}; add.u32 %r19, %r18, {staged};",
            "st.async": target.format("%r18"),
        }.get(self.fill, "mov.u32 %r15, %r11;")
        first = f"mad.lo.u32 %r27, %r42, {self.producers}, %r43;" if self.fill == "multicast" else ""
        mine = "%r27" if self.fill == "multicast" else "%r43"
        source_rows = f"div.u32 %r28, %r44, {self.cluster};" if self.fill == "multicast" else "mov.u32 %r28, %r44;"
        stage = f"""
            rem.u32 %r9, %r8, {self.stages}; div.u32 %r13, %r8, {self.stages}; and.b32 %r13, %r13, 1;
            xor.b32 %r14, %r13, 1; shl.b32 %r11, %r9, 3; add.u32 %r12, %r11, {EMPTY};
            mad.lo.u32 %r10, %r9, {self.nbytes}, {STAGES};
        """
        next_round = f"add.u32 %r8, %r8, 1; setp.lt.u32 %p7, %r8, {self.rounds};"
        columns = self.units if self.store else self.consumers
        template = f"""
            setp.eq.u32 %p1, %r50, 0; shr.u32 %r40, %r50, 5; and.b32 %r41, %r50, 31; setp.eq.u32 %p3, %r41, 0;
            mov.u32 %r42, %cluster_ctarank; mov.u32 %r44, %ctaid.x; mov.u16 %h1, {(1 << self.cluster) - 1};
            {inits} {{init fence}} {{init barrier}}
            mov.u32 %r8, 0; {sent_to}
            setp.ge.u32 %p2, %r40, {self.producers}; @%p2 bra CONSUMER;
            mov.u32 %r43, %r40; {first} {source_rows}
        PRODUCER:
            {stage}
            mul.lo.u32 %r16, {mine}, {self.share * UNIT}; add.u32 %r17, %r10, %r16;
            shl.b32 %r29, %r41, 2; add.u32 %r18, %r17, %r29;
            mad.lo.u32 %r30, %r28, {self.rounds}, %r8; mul.lo.u32 %r22, %r30, {self.units};
            mad.lo.u32 %r22, {mine}, {self.share}, %r22; mov.u32 %r21, 0;
            mad.wide.u32 %rd5, %r22, {UNIT}, %rd0; cvt.u64.u32 %rd7, %r29; add.u64 %rd6, %rd5, %rd7;
            {destination}
            {{empty wait}}
            {self._fill()}
            {next_round} @%p7 bra PRODUCER;
            bra DONE;
        CONSUMER:
            sub.u32 %r43, %r40, {self.producers}; setp.eq.u32 %p5, %r43, 0; and.pred %p4, %p3, %p5;
        ROUND:
            {stage}
            shl.b32 %r29, %r41, 2; add.u32 %r19, %r10, %r29; mad.lo.u32 %r17, %r43, {UNIT}, %r10;
            add.u32 %r18, %r17, %r29;
            mad.lo.u32 %r30, %r44, {self.rounds}, %r8; mad.lo.u32 %r30, %r30, {columns}, %r43;
            mad.wide.u32 %rd6, %r30, {UNIT}, %rd1; cvt.u64.u32 %rd7, %r29;
            {"" if self.store else "add.u64 %rd6, %rd6, %rd7;"}
            {{full wait}}
            {first_use}
            {"{group barrier}" if self.release == "group" else ""}
            {then}
            {next_round} @%p7 bra ROUND;
            {"@%p3 cp.async.bulk.wait_group 0;" if self.store else ""}
        DONE:
            {"{end}" if "end" in self.parts() else ""}
        """
        for name, part in self.parts(without).items():
            assert template.count(f"{{{name}}}") == 1, (name, self)
            template = template.replace(f"{{{name}}}", "" if name == without else part)
        return template

    # ---- running it

    def run(self, without: str = "", **options: object) -> np.ndarray:
        """What the program writes; poison stands for what it reads without having waited for it."""
        ctas = self.cluster * self.clusters
        source = aligned(_source(self.clusters if self.fill == "multicast" else ctas, self.rounds, self.units))
        out = np.zeros((ctas, self.rounds, self.units if self.store else self.consumers, 32), np.uint32)
        rows = source.reshape(-1, 32)
        tensor_map = aligned(encode_array(rows, "u32", (32, self.share)))
        harness.run(
            self.text(without),
            {"source": source, "out": out, "map": tensor_map},
            grid=(ctas, 1, 1),
            cluster=(self.cluster, 1, 1),
            block=(32 * (self.producers + self.consumers), 1, 1),
            shared=STAGES + self.stages * self.nbytes * (2 if self.fill == "send" else 1),
            uninitialized_shared="poison",
            **options,
        )
        return out

    def expected(self) -> np.ndarray:
        ctas = self.cluster * self.clusters
        source = _source(self.clusters if self.fill == "multicast" else ctas, self.rounds, self.units)
        cta = np.arange(ctas)
        if self.fill == "multicast":
            origin = cta // self.cluster
        elif self.remote:
            origin = cta // self.cluster * self.cluster + (cta - 1) % self.cluster
        else:
            origin = cta
        stages = source[origin] + np.uint32(self.modify)
        if self.store:
            return stages
        weight = np.arange(1, self.units + 1, dtype=np.uint32)
        total = np.zeros((ctas, self.rounds, self.consumers, 32), np.uint32)
        for consumer in range(self.consumers):
            own = stages[:, :, consumer :: self.consumers] if self.modify else stages
            own_weight = weight[:: self.consumers] if self.modify else weight
            total[:, :, consumer] = (own * own_weight[:, None]).sum(2, dtype=np.uint32)
        return total

    def faults(self) -> list[str]:
        """Those of the `FAULTS` that this program can have."""
        bytes_announced = self.fill in ("bulk", "tensor", *CLUSTER_FILLS)
        possible = {
            "fewer fill": self.producers > 1,
            "fewer release": self.wraps and self.consumers > 1 and self.release != "group",
            "less announced": bytes_announced,
            "more announced": bytes_announced,
        }
        return [fault for fault in FAULTS if possible.get(fault, True)]

    def needed(self, part: str) -> bool:
        """Whether the program is wrong without this part, on some schedule."""
        rules: dict[str, Callable[[], bool]] = {
            # A producer that sends fences after the initialisation, and after the consumers' writes.
            "init fence": lambda: self.fill in ASYNC_FILLS and self.fill != "send",
            "empty wait": lambda: self.wraps,
            "release": lambda: self.wraps,
            "group barrier": lambda: self.wraps and self.consumers > 1,
            "commit": lambda: self.wraps,
            "early release": lambda: self.wraps,
            "read wait": lambda: self.wraps,
            "consumer's fence": lambda: self.store or (self.wraps and self.fill != "send"),
            # What cp.async has written is taken for visible to the async proxy once somebody has waited for it.
            "producer's fence": lambda: self.fill == "send" or (self.fill == "stores" and not self.consumer_fences),
        }
        return rules.get(part, lambda: True)()


def _source(stages: int, rounds: int, units: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 1 << 31, (stages, rounds, units, 32), np.uint32)
