"""Recipes: what is quantised, to what, with which scales."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

__all__ = ["RECIPES", "Recipe", "as_recipe", "recipes"]

_Fields = dict[str, tuple[object, ...]]

_INTEGER_QK: _Fields = {
    "qk_scale": ("token", "thread", "warp", "block"),
    "smooth_k": (True,),
    "smooth_q": (False, True),
    "smooth_v": (False, True),
}
_UNQUANTISED: _Fields = {
    "qk_scale": (None,),
    "smooth_k": (False,),
    "smooth_q": (False,),
    "v_scale": (None,),
    "smooth_v": (False,),
    "accumulate": ("float32",),
}
_E4M3_QK: _Fields = _INTEGER_QK | {"smooth_q": (False,)}
_INT8_PV: _Fields = {"v_scale": ("channel", "tensor"), "accumulate": ("int32",)}
_FLOAT16_PV: _Fields = {"v_scale": ("channel",), "accumulate": ("float32", "float16", "float16+float32")}
_E4M3_PV: _Fields = {
    "v_scale": ("channel",),
    "accumulate": ("float32+float32", "float16+float32"),
    "exponent": ("exact", "fast"),
}
_EXACT: _Fields = {"exponent": ("exact",)}
_FAST: _Fields = {"smooth_q": (False,), "accumulate": ("float32+float32",)}

_ALLOWED: dict[tuple[str, str], _Fields] = {
    ("int8", "int8"): _INTEGER_QK | _INT8_PV,
    ("int8", "float16"): _INTEGER_QK | _FLOAT16_PV,
    ("int8", "e4m3"): _INTEGER_QK | _E4M3_PV,
    ("e4m3", "e4m3"): _E4M3_QK | _E4M3_PV,
    ("int4", "int8"): _INTEGER_QK | _INT8_PV,
    ("int4", "float16"): _INTEGER_QK | _FLOAT16_PV,
    ("float16", "float16"): _UNQUANTISED,
    ("bfloat16", "bfloat16"): _UNQUANTISED,
}
"""What the other fields may be, by (qk_format, pv_format)."""


@dataclass(frozen=True)
class Recipe:
    """How one attention forward is quantised.

    name:       the preset this recipe is, or was made from
    qk_format:  operands of S = Q·Kᵀ: "int8" (symmetric, −127…127), "int4" (−7…7), "e4m3" (8-bit floats up to 448), or
                "float16" or "bfloat16", as Q and K are
    qk_scale:   which tokens of Q and K share a scale; None if they are not quantised. "token": none do. "thread": the
                rows {g, g+8, g+16, g+24} of 32 of Q, and the tokens {16i+4t…16i+4t+3} of a tile of K, which are those
                that one thread of the MMA holds (SageAttention2, arXiv 2411.10958, section 3.2, with this kernel's
                order of tokens). "warp": 32 rows of Q, a tile of K. "block": 128 rows and a tile. A tile is 64 tokens,
                128 on sm_90a. There, "token" costs one instruction more per score than the others; elsewhere all cost
                the same and "token" is the most accurate
    smooth_k:   K's mean over tokens is subtracted before quantisation; softmax does not see it, the LSE is corrected
                (SageAttention, arXiv 2410.02367, section 4.2)
    smooth_q:   the mean of every 128 rows of Q is subtracted before quantisation, and what it took off the scores is
                added to them in float32 (SageAttention2, section 3.1): one instruction more per score than without
    pv_format:  operands of O = P·V: "int8" (P as unsigned 8-bit 0…255, V symmetric −127…127), "e4m3" (P up to 448),
                "float16", or "bfloat16"
    v_scale:    one scale of V per "channel" of a KV head, or one per "tensor" (per batch element and KV head). In
                float16 it is a power of two, which costs no accuracy and keeps bfloat16's range. None: V as it is
    smooth_v:   V's mean over tokens is subtracted before quantisation and added to the output: worth it where V has a
                large mean, which "float16" accumulators and 8-bit values feel (SageAttention2, section 3.3)
    accumulate: accumulator of O = P·V: "int32", rescaled by shifts, for pv_format "int8". For "float16": "float32";
                "float16" for all keys, for tensor cores that are faster so, and the less accurate the more keys
                count; or "float16+float32", float16 within 64 keys, whose sums are added in float32. For "e4m3":
                "float32+float32", the tensor cores' sums, of about 22 bits, within a tile of keys, which are added in
                float32 (SageAttention2, section 3.3); or "float16+float32" (SageAttention2++, arXiv 2505.21136), for
                which V's largest value becomes 2.25, so that no sum of 64 keys passes float16's range
    exponent:   P = 2^x "exact", rounded to pv_format; or "fast", for pv_format "e4m3" on sm_90a: P's byte is the line
                8·x + const, rounded, without 2^x or a conversion. P is then off by 3.14 % in root mean square instead
                of 2.65 %. What quantised tensors hold is the same

    Raises ValueError when a field holds a value that is not offered.
    """

    name: str
    qk_format: str = "int8"
    qk_scale: str | None = "token"
    smooth_k: bool = True
    smooth_q: bool = False
    pv_format: str = "int8"
    v_scale: str | None = "channel"
    smooth_v: bool = False
    accumulate: str = "int32"
    exponent: str = "exact"

    def __post_init__(self) -> None:
        self._check("qk_format", tuple(dict.fromkeys(qk for qk, _ in _ALLOWED)), "")
        with_qk = f" with qk_format={self.qk_format!r}"
        self._check("pv_format", tuple(pv for qk, pv in _ALLOWED if qk == self.qk_format), with_qk)
        for field, allowed in (_EXACT | _ALLOWED[self.qk_format, self.pv_format]).items():
            self._check(field, allowed, f"{with_qk} and pv_format={self.pv_format!r}")
        for field, allowed in (_FAST if self.exponent == "fast" else {}).items():
            self._check(field, allowed, " with exponent='fast'")

    def _check(self, field: str, allowed: tuple[object, ...], where: str) -> None:
        value = getattr(self, field)
        if not any(value == one and type(value) is type(one) for one in allowed):  # 1 equals True, and is no flag
            offered = " or ".join(map(repr, allowed))
            raise ValueError(f"recipe.{field}={value!r} is not offered{where}; use {offered}")

    @property
    def quantises(self) -> bool:
        """Whether Q, K and V are quantised at all."""
        return self.qk_format in ("int8", "int4", "e4m3")

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Element types of Q, K and V that the recipe takes."""
        return ("float16", "bfloat16") if self.quantises else (self.qk_format,)

    @property
    def largest_value(self) -> float | None:
        """What the largest magnitude of V becomes in pv_format; None if V is as it is, or scaled by a power of two."""
        if self.pv_format == "e4m3":
            return 2.25 if self.accumulate == "float16+float32" else 448.0
        return 127.0 if self.pv_format == "int8" else None

    def replace(self, **changes: object) -> Recipe:
        """This recipe with some fields changed, for example ``recipes()["int8"].replace(v_scale="tensor")``."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def quantises_like(self, other: Recipe) -> bool:
        """Whether what was quantised for one of the two can be used with the other."""
        names = {f.name for f in fields(self)} - {"name", "accumulate", "exponent"} | {"largest_value"}
        return all(getattr(self, name) == getattr(other, name) for name in names)


def _unquantised(name: str, element: str) -> Recipe:
    return Recipe(name, element, None, False, pv_format=element, v_scale=None, accumulate="float32")


RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe("int8"),
        Recipe("int8_fp16", pv_format="float16", accumulate="float32"),
        Recipe("int8_fp8", qk_scale="thread", pv_format="e4m3", accumulate="float32+float32"),
        Recipe("fp8", "e4m3", qk_scale="thread", pv_format="e4m3", accumulate="float32+float32"),
        Recipe("int4_int8", "int4", smooth_q=True),
        Recipe("int4_fp16", "int4", smooth_q=True, pv_format="float16", accumulate="float32"),
        _unquantised("fp16", "float16"),
        _unquantised("bf16", "bfloat16"),
    )
}


def recipes() -> dict[str, Recipe]:
    """The named presets that work in this release, by name."""
    return dict(RECIPES)


def as_recipe(recipe: str | Recipe) -> Recipe:
    """A preset's name, or a `Recipe`, as a `Recipe`.

    Raises ValueError for an unknown name (the error lists the presets), TypeError for anything else.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(f"recipe must be a preset's name or a Recipe, got {type(recipe).__name__}")
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r} is not known; use one of {', '.join(map(repr, RECIPES))}")
    return RECIPES[recipe]
