"""What a warp instruction is, and what it costs: data for the static report.

Costs are cycles that one warp instruction occupies a pipe of one SM sub-partition. They are *assumed* rates, used to
compare kernels with each other; none was measured here.

* Arithmetic: CUDA C++ Programming Guide, table "Throughput of Native Arithmetic Instructions" (results per clock per
  SM), divided by four sub-partitions: 128 → 1 cycle per warp instruction, 64 → 2, 16 → 8. Packed half instructions
  count two results per lane. Conversions between integer and floating point run on the XU pipe with MUFU.
* Tensor: dense multiply-adds per clock per SM of NVIDIA's architecture whitepapers (A100, GA102, Ada, H100, RTX
  Blackwell), divided by four; consumer chips run FP32 accumulation of FP16 and FP8 at half rate.
* Shared memory and shuffles: 128 bytes per clock per SM, shared by four sub-partitions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

__all__ = ["PIPES", "TENSOR_RATES", "Costs", "classify", "costs_for", "macs"]

PIPES = ("tensor", "xu", "alu", "fma", "lsu")

_CLASSES: dict[str, str] = {
    "tensor": "HMMA IMMA QMMA OMMA BMMA DMMA HGMMA IGMMA QGMMA BGMMA",
    "mufu": "MUFU",
    "fp32": "FFMA FMUL FADD FMNMX FMNMX3 FSETP FSEL FSET FCHK FSWZADD FADD2 FMUL2 FFMA2 FADD32I FMUL32I FFMA32I",
    "fp16": "HFMA2 HMUL2 HADD2 HMNMX2 HSETP2 HSET2 HFMA2_32I HADD2_32I HMUL2_32I",
    "convert": "I2F I2FP F2I F2F F2FP I2I I2IP F2IP FRND",
    "integer": "IMAD IADD3 IADD IADD32I LOP3 LOP SHF SHL SHR LEA PRMT SEL ISETP IMNMX VIMNMX VIMNMX3 VIADD VIADDMNMX "
    "IABS BMSK SGXT FLO POPC BREV PLOP3 R2P P2R IDP VABSDIFF IMUL ISCADD LOP32I VHMNMX PSETP SHFX VOTE VOTEU REDUX "
    "CREDUX",
    "move": "MOV MOV32I CS2R S2R MOVM LDC LEPC B2R R2B",
    "shared load": "LDS LDSM LDSMT",
    "shared store": "STS STSM ATOMS STAS",
    "asynchronous": "LDGSTS LDGDEPBAR UTMALDG UTMASTG UTMAPF UTMAREDG UTMACCTL UBLKCP UBLKPF",
    "global": "LDG STG LD ST ATOM ATOMG RED REDG CCTL ULDG",
    "local": "LDL STL",
    "shuffle": "SHFL",
    "synchronisation": "BAR SYNCS DEPBAR WARPSYNC WARPGROUP FENCE MEMBAR ERRBAR ARRIVES NANOSLEEP UTMACMDFLUSH "
    "WARPGROUPSET USETMAXREG ELECT UCGABAR_ARV UCGABAR_WAIT ACQBULK PREEXIT YIELD",
    "branch": "BRA BRX EXIT BSSY BSYNC CALL RET BREAK JMP JMX KILL RPCMOV NOP BMOV BPT BRXU ENDCOLLECTIVE",
    "uniform": "R2UR S2UR LDCU ULDC",
}
_CLASS_OF = {base: name for name, bases in _CLASSES.items() for base in bases.split()}

# Of the classes above, the instructions that leave their class's usual pipe.
_COMPARISONS = frozenset(["FMNMX", "FMNMX3", "FSETP", "FSEL", "FSET", "HMNMX2", "HSETP2", "HSET2"])
_XU_CONVERSIONS = frozenset(["I2F", "F2I", "F2F", "FRND"])
_NO_PIPE = frozenset(["VOTE", "S2R", "CS2R", "LDC", "B2R"])


@dataclass(frozen=True)
class Costs:
    """Cycles per warp instruction of one architecture's pipes.

    tensor: multiply-adds per cycle by operand kind, see `TENSOR_RATES`
    fma:    FFMA, FMUL, FADD
    half:   packed 16-bit arithmetic, on the FMA pipe
    """

    tensor: dict[str, int] = field(default_factory=dict)
    fma: float = 1.0
    half: float = 1.0
    alu: float = 2.0
    imad: float = 2.0
    xu: float = 8.0
    shuffle: float = 4.0

    def of(self, opcode: str) -> dict[str, float]:
        """Pipe to cycles; empty for an instruction that only takes an issue slot."""
        kind, base = classify(opcode), opcode.split(".", 1)[0]
        if kind == "tensor":
            rate = self.tensor.get(_tensor_kind(opcode), 0) or self.tensor.get(_tensor_kind(opcode).split("_")[0], 0)
            return {"tensor": macs(opcode) / rate} if rate else {}
        if kind == "mufu" or base in _XU_CONVERSIONS:
            return {"xu": self.xu}
        if kind in ("shared load", "shared store"):
            return {"lsu": max(_shared_bytes(opcode) / 32, 4.0)}
        if kind == "shuffle":
            return {"lsu": self.shuffle}
        if base in _COMPARISONS:
            return {"alu": self.alu}
        if base in _NO_PIPE:
            return {}
        if base == "IMAD":
            return {"fma": self.imad}
        by_class = {"fp32": ("fma", self.fma), "fp16": ("fma", self.half)}
        by_class |= dict.fromkeys(("convert", "integer", "move"), ("alu", self.alu))
        return dict([by_class[kind]]) if kind in by_class else {}


TENSOR_RATES: dict[str, dict[str, int]] = {
    "sm_80": {"f16": 256, "i8": 512, "i4": 1024},
    "sm_86": {"f16": 128, "f16_f32": 64, "i8": 256, "i4": 512},
    "sm_89": {"f16": 128, "f16_f32": 64, "i8": 256, "i4": 512, "f8": 256, "f8_f32": 128},
    "sm_90": {"f16": 512, "i8": 1024, "f8": 1024},
    "sm_120": {"f16": 128, "f16_f32": 64, "i8": 256, "f8": 256, "f8_f32": 128, "f4": 512},
}
"""Multiply-adds per clock of one sub-partition, by operand kind; "_f32" where accumulating in FP32 is slower."""

_COSTS = {
    "sm_80": Costs(TENSOR_RATES["sm_80"], fma=2.0),
    "sm_86": Costs(TENSOR_RATES["sm_86"], half=2.0),
    "sm_89": Costs(TENSOR_RATES["sm_89"], half=2.0),
    "sm_90": Costs(TENSOR_RATES["sm_90"]),
    "sm_120": Costs(TENSOR_RATES["sm_120"]),
}


def costs_for(arch: str) -> Costs | None:
    """The assumed costs of an architecture, None for one without warp-level tensor instructions in the table."""
    return _COSTS.get(arch.rstrip("af"))


def classify(opcode: str) -> str:
    """The class of an instruction: a key of the class table, or "other"."""
    base = opcode.split(".", 1)[0]
    if opcode.startswith("IMAD.MOV"):
        return "move"
    if base in _CLASS_OF:
        return _CLASS_OF[base]
    return "uniform" if base.startswith("U") else "other"


def _tensor_kind(opcode: str) -> str:
    base = opcode.split(".", 1)[0]
    if base == "IMMA" and ".S4" in opcode:
        return "i4"
    kind = {"IMMA": "i8", "IGMMA": "i8", "QMMA": "f8", "QGMMA": "f8", "OMMA": "f4"}.get(base, "f16")
    return f"{kind}_f32" if kind in ("f8", "f16") and ".F32" in opcode else kind


# Shapes of warp-level MMAs as SASS writes them, m n k run together.
_SHAPES = {
    "168128": (16, 8, 128),
    "168256": (16, 8, 256),
    "16832": (16, 8, 32),
    "16864": (16, 8, 64),
    "16816": (16, 8, 16),
    "1688": (16, 8, 8),
    "8816": (8, 8, 16),
    "8832": (8, 8, 32),
    "884": (8, 8, 4),
}


def macs(opcode: str) -> int:
    """Multiply-adds of one warp's tensor instruction; of a warpgroup's, this warp's quarter. 0 for all others."""
    if classify(opcode) != "tensor":
        return 0
    if spelled := re.search(r"\.(\d+)x(\d+)x(\d+)\b", opcode):
        m, n, k = map(int, spelled.groups())
        return m * n * k // 4
    short = re.search(rf"\.({'|'.join(_SHAPES)})\b", opcode)
    if not short:
        return 0
    m, n, k = _SHAPES[short[1]]
    return m * n * k


def _shared_bytes(opcode: str) -> int:
    """Bytes that a warp's shared memory instruction moves."""
    if opcode.startswith(("LDSM", "STSM")):
        matrices = re.search(r"MT?88\.(\d)", opcode)
        return 128 * (int(matrices[1]) if matrices else 1)
    return 512 if ".128" in opcode else 256 if ".64" in opcode else 128
