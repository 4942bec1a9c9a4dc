"""Every input that the public functions refuse: the right exception, naming the argument and what to do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import cute_attn
from cute_attn import Problem, Recipe, TileConfig, WarpgroupTileConfig, dispatch, recipes, supports
from cute_attn.arch import Arch


@pytest.fixture(autouse=True)
def on_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "emulator")


def tensor(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


Q, K = (1, 4, 8, 64), (1, 2, 16, 64)


def call(q=None, k=None, v=None, **options):
    q = tensor(*Q) if q is None else q
    k = tensor(*K) if k is None else k
    v = tensor(*k.shape) if v is None else v
    return cute_attn.attention(q, k, v, **options)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8])
def test_dtype(name, dtype):
    with pytest.raises(TypeError, match=rf"^{name} has dtype .*; use torch.float16 or torch.bfloat16"):
        call(**{name: tensor(*(Q if name == "q" else K), dtype=dtype)})


@pytest.mark.parametrize(("name", "other"), [("k", "q"), ("v", "q")])
def test_mixed_dtypes(name, other):
    with pytest.raises(TypeError, match=rf"{other} is torch.float16 and {name} is torch.bfloat16; convert one"):
        call(**{name: tensor(*K, dtype=torch.bfloat16)})


def test_not_an_array():
    with pytest.raises(TypeError, match="q must be a torch tensor or an array with __dlpack__ .* got list"):
        call(q=[1.0])


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_dimensions(name):
    with pytest.raises(ValueError, match=rf"{name} has 3 dimensions, shape \(2, 16, 64\); use 4: \[B, S, H, D\]"):
        call(**{name: tensor(2, 16, 64)}, layout="bshd")


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_head_dim_not_contiguous(name):
    shape = Q if name == "q" else K
    with pytest.raises(ValueError, match=rf"{name} has stride 2 along the head dim; .* {name}.contiguous\(\)"):
        call(**{name: tensor(*shape[:3], 128)[..., ::2]})


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_memory_that_does_not_hold_the_elements(name):
    shape = Q if name == "q" else K
    with pytest.raises(TypeError, match=rf"{name} has the layout torch.sparse_coo; .* {name}.to_dense\(\)"):
        call(**{name: tensor(*shape).to_sparse()})
    with pytest.raises(TypeError, match=rf"{name} is a view that negates lazily; .* {name}.resolve_neg\(\)"):
        call(**{name: torch._neg_view(tensor(*shape))})
    odd = torch.frombuffer(bytearray(2 * tensor(*shape).numel() + 1), dtype=torch.float16, offset=1).view(shape)
    with pytest.raises(ValueError, match=rf"{name} starts at an odd address, .* {name}.clone\(\)"):
        call(**{name: odd})


def test_arrays_that_pytorch_cannot_view():
    """Negative strides would end the process inside PyTorch."""
    with pytest.raises(ValueError, match="q has negative strides .* pass a contiguous copy"):
        call(q=np.zeros(Q, np.float16)[:, :, ::-1])
    with pytest.raises(ValueError, match="k cannot be taken through __dlpack__ .*byte order.* pass a contiguous copy"):
        call(k=np.zeros(K, ">f2"))


@pytest.mark.parametrize("name", ["causal", "return_lse"])
@pytest.mark.parametrize("value", ["no", None, 1])
def test_flags(name, value):
    with pytest.raises(TypeError, match=f"{name} must be True or False, got {value!r}"):
        call(**{name: value})


def test_k_and_v_differ():
    with pytest.raises(ValueError, match=r"k has shape \(1, 2, 16, 64\) and v \(1, 2, 17, 64\)"):
        call(v=tensor(1, 2, 17, 64))


@pytest.mark.parametrize("shape", [(2, 4, 8, 64), (1, 4, 8, 128)])
def test_q_and_k_differ(shape):
    with pytest.raises(ValueError, match="q has batch .* they must be equal"):
        call(q=tensor(*shape))


def test_head_counts():
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key/value heads: .* multiple"):
        call(q=tensor(1, 3, 8, 64))


def test_no_heads():
    with pytest.raises(ValueError, match="heads=0; at least 1"):
        call(q=tensor(1, 0, 8, 64))


def test_unknown_recipe():
    with pytest.raises(
        ValueError, match=r"recipe='int7' is not known; use one of 'int8', 'int8_fp16', 'int8_fp8', 'fp8', "
    ):
        call(recipe="int7")
    with pytest.raises(TypeError, match="recipe must be a preset's name or a Recipe, got int"):
        call(recipe=8)


def test_unknown_recipe_field():
    with pytest.raises(
        ValueError, match=r"v_scale='token' is not offered with .*pv_format='int8'; use 'channel' or 'tensor'"
    ):
        Recipe("int8", v_scale="token")
    with pytest.raises(
        ValueError, match=r"accumulate='int32' is not offered with .*pv_format='float16'; use 'float32'"
    ):
        Recipe("int8_fp16", pv_format="float16")


def test_flags_of_a_recipe_are_bools():
    with pytest.raises(ValueError, match=r"smooth_q=1 is not offered with .*; use False or True"):
        recipes()["int8"].replace(smooth_q=1)


def test_unknown_layout():
    with pytest.raises(ValueError, match=r"layout='sbhd' is not known; use 'bhsd' or 'bshd'"):
        call(layout="sbhd")
    with pytest.raises(ValueError, match=r"layout='HND' is not known; use 'bhsd' or 'bshd'"):
        cute_attn.quantize(tensor(*Q), tensor(*K), tensor(*K), layout="HND")


def test_unknown_arch():
    with pytest.raises(ValueError, match=r"arch='sm_75' is not known; use one of sm_80, "):
        call(arch="sm_75")
    with pytest.raises(TypeError, match="arch must be a target's name such as 'sm_80', got list"):
        call(arch=["sm_80"])


def test_arch_without_kernel():
    with pytest.raises(NotImplementedError, match=r"recipe 'int8' has no kernel for sm_100a .* it runs on sm_80, "):
        call(arch="sm_100a")


def test_recipe_that_the_emulators_usual_target_lacks():
    message = r"'fp8' has no kernel for sm_80 .* sm_90a, sm_120a \(on CPU tensors arch=None is 'sm_80'; pass another"
    with pytest.raises(NotImplementedError, match=message):
        call(recipe="fp8")
    with pytest.raises(NotImplementedError, match=message):
        cute_attn.quantize_key_value(tensor(*K), tensor(*K), recipe="fp8")
    with pytest.raises(NotImplementedError, match=r"runs on sm_89, sm_90a, sm_120a$"):
        call(recipe="fp8", arch="sm_80")


def test_head_dim_without_kernel():
    with pytest.raises(NotImplementedError, match=r"head_dim=84 .*pad Q, K and V with zeros to 88 .*softmax_scale=84"):
        call(q=tensor(1, 4, 8, 84), k=tensor(1, 2, 16, 84))
    with pytest.raises(NotImplementedError, match=r"head_dim=264 .*scaled_dot_product_attention"):
        call(q=tensor(1, 4, 8, 264), k=tensor(1, 2, 16, 264))


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_softmax_scale(scale):
    with pytest.raises(ValueError, match="softmax_scale=.*; use a finite number ≥ 0"):
        call(softmax_scale=scale)


@pytest.mark.parametrize("scale", ["0.1", True, torch.tensor(0.1), [1.0]])
def test_softmax_scale_that_is_no_number(scale):
    with pytest.raises(TypeError, match="softmax_scale must be a number, got (str|bool|Tensor|list)"):
        call(softmax_scale=scale)


def test_softmax_scale_beyond_float32():
    with pytest.raises(ValueError, match=r"softmax_scale=1e\+39; use a finite number ≥ 0, at most 2.4e\+38"):
        call(softmax_scale=1e39)


@pytest.mark.parametrize("axis", ["batch", "heads"])
def test_more_ctas_than_a_grid_has(axis):
    one = tensor(1, 1, 1, 64)
    many = one.expand(70_000, 1, 1, 64) if axis == "batch" else one.expand(1, 70_000, 1, 64)
    for refused in (lambda: call(many, many), lambda: cute_attn.quantize(many, many, many)):
        with pytest.raises(NotImplementedError, match=f"{axis}=70000 has no kernel, .* reaches 65535; split the call"):
            refused()


def test_config():
    with pytest.raises(TypeError, match="config must be a TileConfig or a WarpgroupTileConfig, got dict"):
        call(config={"warps": 4})
    with pytest.raises(ValueError, match="config.warps=3; use one of 1, 2, 4, 8"):
        TileConfig(warps=3)
    with pytest.raises(ValueError, match="config.m_tiles=True; use one of 1, 2"):
        TileConfig(m_tiles=True)
    with pytest.raises(ValueError, match="config.warpgroups=4; use one of 1, 2, 3"):
        WarpgroupTileConfig(warpgroups=4)
    with pytest.raises(ValueError, match="config.overlap=1; use True or False"):
        WarpgroupTileConfig(overlap=1)
    reason = r"WarpgroupTileConfig\(.*\) is not for the kernels of recipe 'int8' on sm_80; use a TileConfig, or None"
    with pytest.raises(NotImplementedError, match=reason):
        call(config=WarpgroupTileConfig())


def test_config_that_does_not_fit_the_chip():
    """Every tile config fits every chip so far (48 KiB would be too little): the check has to be there all the same."""
    small = Arch("sm_small", (8, 0), 48 * 1024, "none")
    reason = dispatch._kernel_refusal(recipes()["int8"], 128, "float16", False, TileConfig(), small)
    assert reason is not None
    assert "bytes of shared memory per CTA, sm_small has 49152; use fewer stages or warps" in reason


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (np.zeros(Q, np.float16), TypeError, "out must be a torch tensor, got ndarray"),
        (tensor(1, 4, 9, 64), ValueError, r"out has shape \(1, 4, 9, 64\) .* the output has \(1, 4, 8, 64\)"),
        (tensor(*Q, dtype=torch.bfloat16), TypeError, "out is torch.bfloat16; the output has q's dtype torch.float16"),
        (tensor(1, 1, 1, 64).expand(Q), ValueError, "several elements share memory"),
        (tensor(4096).as_strided(Q, (0, 512, 32, 1)), ValueError, "several elements share memory"),
        (tensor(4096).as_strided(Q, (0, 96, 64, 1)), ValueError, "several elements share memory"),
        (tensor(*Q).requires_grad_(), RuntimeError, r"out requires grad, .*out.detach\(\)"),
        (torch._neg_view(tensor(*Q)), TypeError, "out is a view that negates lazily"),
    ],
)
def test_out(out, error, message):
    with pytest.raises(error, match=message):
        call(out=out)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_device(name):
    shape = Q if name == "q" else K
    with pytest.raises(ValueError, match="is on (meta|cpu) and . on (meta|cpu); move them to one device"):
        call(**{name: torch.zeros(shape, dtype=torch.float16, device="meta")})


def test_device_of_the_other_backend(monkeypatch):
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"q is on cpu, but the cuda backend takes cuda tensors; move it to the GPU"):
        call()


def test_unknown_backend(monkeypatch):
    monkeypatch.setenv("CUTE_ATTN_BACKEND", "tpu")
    with pytest.raises(ValueError, match="CUTE_ATTN_BACKEND='tpu' is not known; use emulator or cuda"):
        call()


def test_requires_grad():
    q = tensor(*Q).requires_grad_()
    with pytest.raises(RuntimeError, match=r"q requires grad, and there is no backward yet: .*q.detach\(\)"):
        call(q=q)


def test_quantised_inputs_of_another_dtype():
    kv = cute_attn.quantize_key_value(tensor(*K), tensor(*K))
    with pytest.raises(TypeError, match="q is torch.bfloat16 and kv was quantised from torch.float16; convert one"):
        cute_attn.quantize_query(tensor(*Q, dtype=torch.bfloat16), kv)


@pytest.mark.parametrize("seq_k", [0, 64, 129, 1000])
def test_image_of_other_tokens(seq_k):
    kv = cute_attn.quantize_key_value(tensor(1, 1, 100, 64), tensor(1, 1, 100, 64))
    with pytest.raises(ValueError, match=f"seq_k={seq_k} does not fit an image of 2 tiles of 64 tokens"):
        dataclasses.replace(kv, seq_k=seq_k)


def test_image_of_another_layout():
    kv = cute_attn.quantize_key_value(tensor(*K), tensor(*K))
    with pytest.raises(ValueError, match="8704 bytes; 64 channels in recipe 'int8_fp16' take 12800; use quantize_key"):
        dataclasses.replace(kv, recipe=recipes()["int8_fp16"])


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([3], TypeError, "key_lengths must be a torch tensor or an array with __dlpack__ .* got list"),
        (torch.tensor([3]), TypeError, r"key_lengths has dtype torch.int64; use torch.int32 \(key_lengths.int\(\)\)"),
        (
            torch.tensor([3, 3], dtype=torch.int32),
            ValueError,
            r"key_lengths has shape \(2,\); use one length per batch element: \(1,\)",
        ),
        (
            torch.empty(1, dtype=torch.int32, device="meta"),
            ValueError,
            "q is on cpu and key_lengths on meta; move them to one device",
        ),
    ],
)
def test_key_lengths(lengths, error, message):
    with pytest.raises(error, match=message):
        call(key_lengths=lengths)


def test_key_lengths_of_quantised_keys():
    kv = cute_attn.quantize_key_value(tensor(*K), tensor(*K))
    with pytest.raises(TypeError, match="key_lengths was given, but k is a QuantizedKeyValue, which holds its own"):
        cute_attn.attention(tensor(*Q), kv, key_lengths=torch.ones(1, dtype=torch.int32))


def test_smoothing_q_needs_the_unquantised_keys():
    q, k = tensor(*Q), tensor(*K)
    kv = cute_attn.quantize_key_value(k, k, recipe="int4_fp16")
    with pytest.raises(TypeError, match=r"smooths Q, which needs the unquantised k; use quantize\(q, k, v\), or"):
        cute_attn.attention(q, kv)
    with pytest.raises(TypeError, match="k is missing: recipe 'int4_fp16' smooths Q; pass the k that kv was quantised"):
        cute_attn.quantize_query(q, kv)
    with pytest.raises(ValueError, match=r"k is torch.float16 of shape \(1, 2, 15, 64\) .*; pass the k that kv"):
        cute_attn.quantize_query(q, kv, k[:, :, 1:])
    with pytest.raises(TypeError, match="k was given, but recipe 'int8' does not smooth Q; leave it out"):
        cute_attn.quantize_query(q, cute_attn.quantize_key_value(k, k), k)


def test_dtype_of_a_recipe_that_quantises_nothing():
    with pytest.raises(
        NotImplementedError, match="recipe 'bf16' takes bfloat16 tensors, these are float16; use recipe 'fp16'"
    ):
        call(recipe="bf16")
    with pytest.raises(NotImplementedError, match="recipe 'fp16' quantises nothing; pass q, k and v to attention"):
        cute_attn.quantize(tensor(*Q), tensor(*K), tensor(*K), recipe="fp16")
    with pytest.raises(ValueError, match="k was quantised as .*, this call asks for .*'fp16'"):
        cute_attn.attention(tensor(*Q), cute_attn.quantize_key_value(tensor(*K), tensor(*K)), recipe="fp16")


def test_missing_v():
    with pytest.raises(TypeError, match="v is missing"):
        cute_attn.attention(tensor(*Q), tensor(*K))


def test_nothing_to_quantise():
    with pytest.raises(ValueError, match=r"k has shape \(1, 2, 0, 64\) .* nothing to quantise"):
        cute_attn.quantize(tensor(*Q), tensor(1, 2, 0, 64), tensor(1, 2, 0, 64))


def test_quantize_query_takes_quantised_keys():
    with pytest.raises(TypeError, match="kv must be a QuantizedKeyValue"):
        cute_attn.quantize_query(tensor(*Q), tensor(*K))


def test_supports_says_yes():
    problem = Problem(batch=1, heads=4, kv_heads=2, seq_q=7, seq_k=9, head_dim=128, dtype="bfloat16", causal=True)
    for arch in ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120a"):
        answer = supports("int8", arch, problem)
        assert answer, answer.reason
        assert answer.reason is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seq_q", -1, "seq_q=-1 is negative"),
        ("head_dim", 0, "head_dim=0; at least 1"),
        ("dtype", "float32", "dtype='float32' is not offered"),
    ],
)
def test_problem(field, value, message):
    fields = {"batch": 1, "heads": 4, "kv_heads": 2, "seq_q": 7, "seq_k": 9, "head_dim": 64, "dtype": "float16"} | {
        field: value
    }
    with pytest.raises(ValueError, match=message):
        Problem(**fields)


def test_problem_sizes_are_ints():
    with pytest.raises(TypeError, match="seq_k must be an int, got 9.5"):
        Problem(batch=1, heads=4, kv_heads=2, seq_q=7, seq_k=9.5, head_dim=64, dtype="float16")
