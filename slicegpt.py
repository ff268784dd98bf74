"""SliceGPT in one file: compress a language model by deleting rows and columns of its weights.

Read it beside the paper: "SliceGPT: Compress Large Language Models by Deleting Rows and Columns" (Ashkboos, Croci,
Gennari do Nascimento, Hoefler, Hensman; ICLR 2024; arXiv 2401.15024). In three sentences:

1. RMSNorm commutes with an orthogonal matrix Q. So the signal between a transformer's blocks may be kept in any rotated
   basis, if the weights that write it are multiplied by Q and those that read it by Q^T (Theorem 1).
2. In the basis of its principal components (Eq. 8) the signal needs fewer than D numbers per token. So the last columns
   of the matrices that write it, and the last rows of those that read it, can be deleted (Eq. 9).
3. Each block has principal components of its own. So the residual connection is multiplied by a *shortcut* matrix,
   which takes the signal from the basis of one block to that of the next (Figure 4).

The paper's sections 2 and 3 come first, and end where the table of architectures begins: fuse a model (3.2), then rotate
it by matrices Q that also slice it (3.1, 3.3, 3.4). Everything after the table is not needed to follow them: the
experiments of section 4, what goes beyond the paper, and what a program needs (processes, files, the command line).

    D, d            dimension of the signal, embedding dimension: dense, and sliced                         2, 3.4
    B, N, L         batch, sequence length, number of layers                                                2
    X (.., N, D)    the signal: what one block writes and the next reads, a row per token                   2.1
    Z (.., N, D)    what a block adds to the signal                                                         Algorithm 1
    W_embd          the embeddings (V, D), of tokens and perhaps of positions: they write the first signal  2.1
    W_in            all matrices of a block that read the signal (D, ..), such as W_q, W_k and W_v          2.1
    W_out           the matrix of a block that writes to the signal (.., D)                                 2.1
    W_head          the head (D, V): it reads the last signal                                               2.1
    M               subtracts each row's mean, I - 1 1^T / D (D, D)                                         Eq. 1
    Q (D, d)        orthogonal columns; with d < D it is the paper's Q times its deletion matrix D          3.1, Eq. 9
    Q_in, Q_out     the Q of the signal that a block reads, and of the one behind it: Q_{l-1}, Q_l          Figure 4
    C (D, D)        the covariance of a signal, whose eigenvectors are Q                                    Eq. 8
    stage           the way from one signal to the next: a block, attention or FFN; or, in a parallel layer such as
                    Phi-2's, both blocks at once. `stages(model)` lists them: 2 L of them, or L

As in the paper, W multiplies from the right. `matrix(linear)` gives it like that, in float64, although torch stores the
transpose. What else the first part uses of the later ones stands in "Where an architecture keeps its parts" (`stages`,
`embeddings`, `embed`, `architecture`, `matrix`, `set_matrix`, and checks) and in "Several processes" (`total`,
`agreed`, which do nothing in a single process).

    python slicegpt.py                                              # a small model trained on the spot, no network
    python slicegpt.py --model facebook/opt-125m --sparsity 0.25    # WikiText-2, from the hub
"""
import argparse
import bisect
import contextlib
import copy
import ctypes
import glob
import importlib
import itertools
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D


class SliceGPTError(ValueError):
    """An error that the user can fix, said in one line."""


# a bar for what takes more than two seconds; where it cannot move, as in a log, it is seldom redrawn
progress = partial(tqdm, delay=2, leave=False, mininterval=0.2 if sys.stderr.isatty() else 20)


# ---- 2.1 The network, and Figure 4: one layer of it, sliced ---------------------------------------------------------

class RMSNorm(nn.Module):
    """sqrt(D) x / |x|, as x / sqrt(|x|^2 / D + eps): the norm of Eq. 1 and its sqrt(D), without a scale (see `fuse`).

    D is the dense dimension, whatever the width d of X: deleted dimensions count as zeros.
    """

    def __init__(self, D: int, eps: float):
        super().__init__()
        self.D, self.eps = D, eps

    def forward(self, X):  # (.., d)
        # torch divides |x|^2 by d, not D; with s = d / D: |x|^2 / D + eps = s (|x|^2 / d + eps / s)
        s = X.shape[-1] / self.D
        return F.rms_norm(X, X.shape[-1:], eps=self.eps / s) / math.sqrt(s)

    def extra_repr(self):
        return f"D={self.D}, eps={self.eps}"


def sliced_layer(stages, X: Tensor, *args, **kwargs) -> Tensor:
    """Figure 4: the forward pass of a layer with shortcuts, from X (B, N, d_in) to (B, N, d_out).

    Hugging Face's attention and FFN compute Z, which is what they do in the dense layer; only the sum is new. Dropout
    on Z is left out: it zeroes single coordinates, and that does not commute with a rotation. args and kwargs: what
    Hugging Face gives a layer besides X (masks, positions, caches).
    """
    for stage in stages:  # attention, then the FFN
        Z = stage(X, *args, **kwargs)  # Algorithm 1, line 4: sigma(RMSNorm(X) W_in + b_in) W_out + b_out
        X = X @ stage.shortcut + Z  # line 5; the shortcut is Q_in^T Q_out (d_in, d_out)
    return X


# ---- 3.1 Computational invariance -----------------------------------------------------------------------------------

@torch.no_grad()
def rotate(model, Q: Tensor | Iterable[Tensor], device=None):
    """Theorem 1 and Figure 4: rotates the signal, in place. If Q is orthogonal, the network's outputs do not change.

    Q: one matrix (D, D) for the whole network (Theorem 1); or one for the embedding and one for the signal behind every
    stage (Figure 4, with shortcuts), 1 + 2L of L sequential layers, 1 + L of parallel ones. Matrices with fewer columns
    slice (Eq. 9). An iterable is asked for a Q only when it is needed, and no stage has changed before the Q behind it
    is there: so it may compute Q by running the stage. A model that is rotated already is rotated further. device: where
    to compute, in float64; by default where the model is. Fuses the model first if need be. Raises SliceGPTError for a
    wrong number or shape of matrices. After an error in the middle the model has to be loaded again.
    """
    fuse(model)
    with rotating(model, Q, device) as (Qs, with_shortcuts):  # hands out each Q in float64, and notes the new shape
        Q_in = next(Qs)  # (D, d)
        for embedding in embeddings(model):
            rotate_writer(embedding, Q_in)  # Eq. 3
        for stage, Q_out in zip(stages(model), Qs):
            for W_in in stage.readers:
                rotate_reader(W_in, Q_in)  # Eq. 4
            for W_out in stage.writers:
                rotate_writer(W_out, Q_out)  # Eq. 5, 6
            if with_shortcuts:
                rotate_shortcut(stage, Q_in, Q_out)  # Figure 4
            Q_in = Q_out
        rotate_reader(model.get_output_embeddings(), Q_in)  # Eq. 7


def rotate_writer(module, Q: Tensor):
    """Eq. 3, 5 and 6: W_embd <- W_embd Q; W_out <- W_out Q, b_out <- Q^T b_out."""
    b = getattr(module, "bias", None)
    set_matrix(module, matrix(module).to(Q) @ Q, None if b is None else b.to(Q) @ Q)


def rotate_reader(module, Q: Tensor):
    """Eq. 4 and 7: W_in <- Q^T W_in; W_head <- Q^T W_head; b_in and b_head stay."""
    set_matrix(module, Q.T @ matrix(module).to(Q), getattr(module, "bias", None))


def rotate_shortcut(stage, Q_in: Tensor, Q_out: Tensor):
    """Figure 4: the shortcut of a stage becomes Q_in^T S Q_out (d_in, d_out); S is the one it had, at first I."""
    S = stage.shortcut
    stage.set_shortcut(Q_in.T @ (Q_out if S is None else S.to(Q_out) @ Q_out))


# ---- 3.2 LayerNorm to RMSNorm ---------------------------------------------------------------------------------------

@torch.no_grad()
def fuse(model):
    """Section 3.2, Figure 3: turns every norm into an RMSNorm without scale, in place. The outputs do not change.

    By Eq. 1, LayerNorm(X) = RMSNorm(X M) diag(alpha) sqrt(D) + 1 beta^T. So what is linear in it moves to the matrices
    next to it: diag(alpha) and beta to those that read the norm, the last norm's to the head; M to all that write the
    signal. (Hugging Face's RMSNorms have an alpha only, and subtract no mean.) A head that shares the matrix of the
    embedding gets one of its own, as the two now differ. Arithmetic is in float64. A model that is fused stays as it
    is. The model's class becomes one that knows its shape: it is in `config.slicegpt`, see `SlicedForCausalLM`. Raises
    SliceGPTError, before anything changes, if this file cannot slice such a model.
    """
    if hasattr(model.config, "slicegpt"):
        return
    check_row(model)  # raises if a layer computes something else than its row in the table says
    parts, D, head = architecture(model.config), model.config.hidden_size, model.get_output_embeddings()
    last_norm = model.get_submodule(parts.norm)
    head.weight = nn.Parameter(head.weight.detach())  # no longer the embedding's, if it was
    for embedding in embeddings(model):
        fuse_writer(last_norm, embedding)
    for stage in stages(model):
        fuse_stage(stage, D)
    fuse_reader(last_norm, head, parts.norm_offset)
    model.set_submodule(parts.norm, without_scale(last_norm, D))
    become_sliced(model)


def fuse_stage(stage, D: int):
    """Figure 3 for one stage: alpha and beta go to its W_in, M to its W_out, and its norms lose their scale."""
    norms = {block.norm: stage.layer.get_submodule(block.norm) for block in stage.blocks}
    for block in stage.blocks:
        one = replace(stage, blocks=(block,))  # parallel blocks may have a norm each
        for W_in in one.readers:
            fuse_reader(norms[block.norm], W_in, stage.norm_offset)
        for W_out in one.writers:
            fuse_writer(norms[block.norm], W_out)
    for path, norm in norms.items():
        stage.layer.set_submodule(path, without_scale(norm, D))


def fuse_reader(norm, module, offset: float):
    """W_in <- diag(alpha) W_in, b_in <- b_in + beta W_in; alpha (D,) is the norm's weight plus its family's offset."""
    alpha, beta = getattr(norm, "weight", None), getattr(norm, "bias", None)
    W, b = matrix(module), getattr(module, "bias", None)
    if beta is not None:
        b = beta.double() @ W + (0 if b is None else b)
    if alpha is not None:
        W = (alpha.double() + offset)[:, None] * W
    set_matrix(module, W, b)


def fuse_writer(norm, module):
    """W_embd <- W_embd M; W_out <- W_out M, b_out <- b_out M; if the norm subtracts the mean, as a LayerNorm does."""
    if subtracts_mean(norm):
        W, b = matrix(module), getattr(module, "bias", None)
        set_matrix(module, W - W.mean(-1, True), None if b is None else b.double() - b.double().mean(-1, True))


def subtracts_mean(norm) -> bool:
    return "LayerNorm" in type(norm).__name__  # there are several classes, torch's own for one


def without_scale(norm, D: int) -> RMSNorm:
    # two names in use for eps; without either (OLMo), it is torch's default
    return RMSNorm(D, getattr(norm, "eps", getattr(norm, "variance_epsilon", 1e-5)))


# ---- 3.3 A transformation per block, and 3.4 Slicing ----------------------------------------------------------------

@torch.no_grad()
def slice_model(model, calibration: Tensor, sparsity: float = 0.25, *, discard_variance: float | None = None,
                round_to: int = 8, signal: str = "input", head: str = "sliced", batch_size: int = 8, device=None):
    """Sections 3.3 and 3.4: slices a model in place and returns it. Fuses it if need be, and sets it to eval mode.

    calibration: tokens (samples, N), int64. sparsity: the share of the D dimensions to delete, see `sliced_dimension`;
    or discard_variance: the share of each signal's variance, see `dimension_by_variance`. round_to: the dimension is a
    multiple of it. signal: the side of the RMSNorm that Eq. 8 looks at, "input" (the authors' code) or "output" (the
    paper's text). head: "sliced", or "full", whose signal keeps all D dimensions (the authors' code). batch_size:
    sequences at a time. device: where to compute, with one layer there at a time; by default where the model is. Raises
    SliceGPTError for bad arguments, before anything changes; and for a signal that is not finite.
    """
    if signal not in ("input", "output") or head not in ("sliced", "full"):
        raise SliceGPTError(f"signal is input or output and head is sliced or full, not {signal} and {head}")
    device, D = torch.device(device or model.device), model.config.hidden_size
    d = sliced_dimension(D, sparsity, round_to) if discard_variance is None else None
    check_sliceable(model.config, calibration, one_width=d == D or d is not None and head == "sliced")
    fuse(model.eval())

    def dimension(eigenvalues: Tensor, stage) -> int:
        if stage is None and head == "full":
            return D
        return d or dimension_by_variance(eigenvalues, discard_variance, round_to)

    rotate(model, principal_components(model, calibration, dimension, signal, batch_size, device), device)
    return model


def principal_components(model, calibration: Tensor, dimension, side: str, batch_size: int, device) -> Iterator[Tensor]:
    """Yields a Q (D, d) for every signal of a fused model, in order; d is dimension(eigenvalues, stage).

    Section 3.3 asks for the signal behind blocks that are sliced already. On X Q (samples, N, d), the sliced blocks
    will compute what the fused ones compute on X Q Q^T (samples, N, D), the same signal in the old basis. So the
    weights can wait: each signal is cut down to its principal components, and the next stage reads that.
    """
    norm = model.get_submodule(architecture(model.config).norm)  # fused, all norms are alike
    observe = norm if side == "output" else nn.Identity()
    for stage, X in signals(model, calibration, batch_size, device):
        C = total_covariance(observe, X, stage, batch_size, device)  # Eq. 8
        eigenvalues, Q = map(agreed, pca(C))
        Q = Q[:, :dimension(eigenvalues, stage)].contiguous()  # Eq. 9: delete the last columns
        QQ = (Q @ Q.T).to(X.dtype)  # (D, D)
        for x in X.split(batch_size):
            x.copy_(x.to(device) @ QQ)  # Eq. 9: the reconstruction X Q Q^T
        yield Q


def signals(model, calibration: Tensor, batch_size: int, device) -> Iterator[tuple]:
    """Algorithm 1 on the calibration tokens (samples, N): yields (stage, X) for every signal X (samples, N, D).

    X is what the stage reads; behind the last stage the head reads X, and instead of a stage there is None. Whoever
    gets X may write into it. X stays on the CPU, and one layer at a time is on the device.
    """
    X, todo = embed(model, calibration, batch_size)  # line 1
    for stage in progress(todo, "signals", unit="signal"):
        stage = stage.on(device)
        yield stage, X
        for x in X.split(batch_size):
            y = x.to(device)
            x.copy_(y + stage(y))  # lines 4 and 5
    yield None, X


def total_covariance(observe, X: Tensor, stage, batch_size: int, device) -> Tensor:
    """Eq. 8: C = sum_i X_i^T X_i (D, D) in float64, of observe(X), over all sequences i of X (samples, N, D).

    Raises SliceGPTError if it is not finite.
    """
    C = total(sum(covariance(observe(x.to(device))) for x in X.split(batch_size)))
    if not C.isfinite().all():
        raise SliceGPTError(f"the signal is not finite in front of {stage or 'the head'} ({X.dtype}); its type may be "
                            "too narrow, try --dtype float32")
    return C


def covariance(X: Tensor) -> Tensor:
    """Eq. 8, one term: X^T X (D, D), in float64, multiplied in the precision of X (B, N, D) or in float32."""
    X = at_least_float32(X.flatten(0, -2))
    return (X.T @ X).double()


def at_least_float32(X: Tensor) -> Tensor:
    return X if X.dtype == torch.float64 else X.float()


def pca(C: Tensor) -> tuple[Tensor, Tensor]:
    """3.3: the eigenvalues (D,) of C (D, D), largest first, and its eigenvectors Q (D, D), in float64 (see A.2)."""
    eigenvalues, Q = torch.linalg.eigh(C.double())
    return eigenvalues.flip(0), Q.flip(1)


def sliced_dimension(D: int, sparsity: float, round_to: int = 8) -> int:
    """3.4: d = (1 - sparsity) D, rounded down to a multiple of `round_to`, as in the authors' code; D for sparsity 0.

    Raises SliceGPTError if nothing is left.
    """
    if not 0 <= sparsity < 1:
        raise SliceGPTError(f"sparsity must be at least 0 and below 1, not {sparsity}")
    d = int((1 - sparsity) * D + 1e-6) // round_to * round_to if sparsity else D
    if d == 0:
        raise SliceGPTError(f"sparsity {sparsity} leaves none of the {D} dimensions (in multiples of {round_to})")
    return d


def dimension_by_variance(eigenvalues: Tensor, discarded: float, round_to: int = 8) -> int:
    """Appendix A.4: the least multiple of `round_to`, or else D, that discards at most that share of the variance."""
    left_out = 1 - eigenvalues.cumsum(0) / eigenvalues.sum()
    needed = 1 + int((left_out > discarded).sum())
    return min(len(eigenvalues), math.ceil(needed / round_to) * round_to)


# ---- Where an architecture keeps its parts --------------------------------------------------------------------------
#
# To add a family, give it a row in ARCHITECTURES; `check_row` refuses a wrong one. The functions behind the table are
# all that the rest of this file knows of the modules of Hugging Face's models.

@dataclass(frozen=True)
class Block:
    """One attention or one FFN, as paths in its layer; several are separated by spaces.

    The norm in front of it; the modules that compute Z from the norm's output, one after the other; all matrices W_in
    and all W_out (experts have several), where a path with a ? is used if the layer has it; whether it is attention,
    whose module takes masks, positions and caches, too, and returns more than Z.
    """
    norm: str
    modules: str
    W_in: str
    W_out: str
    attention: bool = False


@dataclass(frozen=True)
class Architecture:
    """Paths in a model: all embeddings that add up to the first signal, the layers, the last norm; a layer's blocks."""
    embeddings: str
    layers: str
    norm: str
    attention: Block
    ffn: Block
    parallel: bool = False  # both blocks read the same signal (a config's use_parallel_residual goes before this)
    norm_offset: float = 0.0  # added to a norm's weight to give alpha
    one_width: bool = False  # some code of the model takes all its signals to be equally wide
    zero_mean: bool = False  # it has LayerNorms, and its heads need not add up to its hidden size: see `standard`


LLAMA = Architecture(
    "model.embed_tokens", "model.layers", "model.norm",
    Block("input_layernorm", "self_attn", "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj",
          attention=True),
    Block("post_attention_layernorm", "mlp", "mlp.gate_proj mlp.up_proj", "mlp.down_proj"))

MIXTURE = replace(LLAMA, ffn=Block(  # of experts, with shared ones or without; in some layers there is a plain FFN
    "post_attention_layernorm", "mlp",
    "?mlp.gate_proj ?mlp.up_proj ?mlp.gate ?mlp.gate.wg ?mlp.router ?mlp.experts.gate_up_proj "
    "?mlp.shared_expert.gate_proj ?mlp.shared_expert.up_proj ?mlp.shared_expert_gate ?mlp.shared_experts.gate_proj "
    "?mlp.shared_experts.up_proj ?mlp.shared_mlp.gate_proj ?mlp.shared_mlp.up_proj",
    "?mlp.down_proj ?mlp.experts.down_proj ?mlp.shared_expert.down_proj ?mlp.shared_experts.down_proj "
    "?mlp.shared_mlp.down_proj"), one_width=True)  # such modules give back as wide a signal as they get
LATENT = replace(MIXTURE, attention=replace(  # attention through a latent, DeepSeek's
    LLAMA.attention, W_in="?self_attn.q_proj ?self_attn.q_a_proj self_attn.kv_a_proj_with_mqa"))

COHERE = replace(LLAMA, ffn=replace(LLAMA.ffn, norm="input_layernorm"), parallel=True, zero_mean=True)
OPT = Architecture(
    "model.decoder.embed_tokens model.decoder.embed_positions", "model.decoder.layers",
    "model.decoder.final_layer_norm",
    replace(LLAMA.attention, norm="self_attn_layer_norm", W_out="self_attn.out_proj"),
    Block("final_layer_norm", "fc1 activation_fn fc2", "fc1", "fc2"))
GPTJ = Architecture(
    "transformer.wte", "transformer.h", "transformer.ln_f",
    Block("ln_1", "attn", "attn.q_proj attn.k_proj attn.v_proj", "attn.out_proj", attention=True),
    Block("ln_1", "mlp", "mlp.fc_in", "mlp.fc_out"), parallel=True)

ARCHITECTURES = {  # by the config's model_type
    "opt": OPT,
    "gpt2": Architecture(
        "transformer.wte transformer.wpe", "transformer.h", "transformer.ln_f",
        Block("ln_1", "attn", "attn.c_attn", "attn.c_proj", attention=True),
        Block("ln_2", "mlp", "mlp.c_fc", "mlp.c_proj"), one_width=True),
    **dict.fromkeys("llama mistral ministral ministral3 qwen2 qwen3 smollm3 seed_oss helium ernie4_5 hunyuan_v1_dense "
                    "granite stablelm exaone internlm3 cwm".split(), LLAMA),
    "olmo": replace(LLAMA, zero_mean=True),
    "arcee": replace(LLAMA, ffn=replace(LLAMA.ffn, W_in="mlp.up_proj")),
    "jais2": replace(LLAMA, ffn=replace(LLAMA.ffn, W_in="mlp.up_proj"), zero_mean=True),
    "starcoder2": replace(LLAMA, ffn=replace(LLAMA.ffn, W_in="mlp.c_fc", W_out="mlp.c_proj"), zero_mean=True),
    "nemotron": replace(LLAMA, ffn=replace(LLAMA.ffn, W_in="mlp.up_proj"), norm_offset=1.0, zero_mean=True),
    "gemma": replace(LLAMA, norm_offset=1.0),
    "phi": Architecture(
        "model.embed_tokens", "model.layers", "model.final_layernorm",
        replace(LLAMA.attention, W_out="self_attn.dense"),
        Block("input_layernorm", "mlp", "mlp.fc1", "mlp.fc2"), parallel=True, zero_mean=True),
    "phi3": replace(
        LLAMA, attention=replace(LLAMA.attention, W_in="self_attn.qkv_proj"),
        ffn=replace(LLAMA.ffn, W_in="mlp.gate_up_proj")),
    "glm": replace(LLAMA, ffn=replace(LLAMA.ffn, W_in="mlp.gate_up_proj")),
    "apertus": replace(LLAMA, attention=replace(LLAMA.attention, norm="attention_layernorm"),
                       ffn=replace(LLAMA.ffn, norm="feedforward_layernorm", W_in="mlp.up_proj")),
    "cohere": COHERE, "cohere2": COHERE,
    "persimmon": replace(
        LLAMA, norm="model.final_layernorm",
        attention=replace(LLAMA.attention, W_in="self_attn.query_key_value", W_out="self_attn.dense"),
        ffn=replace(LLAMA.ffn, W_in="mlp.dense_h_to_4h", W_out="mlp.dense_4h_to_h")),
    "biogpt": replace(OPT, embeddings="biogpt.embed_tokens biogpt.embed_positions", layers="biogpt.layers",
                      norm="biogpt.layer_norm"),
    "gptj": GPTJ, "codegen": replace(GPTJ, attention=replace(GPTJ.attention, W_in="attn.qkv_proj")),
    "gpt_neox": Architecture(
        "gpt_neox.embed_in", "gpt_neox.layers", "gpt_neox.final_layer_norm",
        Block("input_layernorm", "attention", "attention.query_key_value", "attention.dense", attention=True),
        Block("post_attention_layernorm", "mlp", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
    **dict.fromkeys("mixtral qwen2_moe qwen3_moe olmoe gpt_oss minimax_m2 dots1 glm4_moe ernie4_5_moe hunyuan_v1_moe "
                    "exaone_moe hy_v3 solar_open".split(), MIXTURE),
    **dict.fromkeys("deepseek_v2 deepseek_v3 glm4_moe_lite".split(), LATENT),
    "granitemoe": replace(MIXTURE, ffn=Block(
        "post_attention_layernorm", "block_sparse_moe",
        "block_sparse_moe.router block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj")),
}


def architecture(config) -> Architecture:
    """The row of the table for a Hugging Face config. Raises SliceGPTError, with the reason, if it cannot be sliced."""
    has = vars(config).get
    reasons = [reason for reason, holds in (
        ("it is an encoder-decoder", has("is_encoder_decoder")),
        ("it has cross-attention", has("add_cross_attention")),
        ("its blocks are parallel", config.model_type == "stablelm" and has("use_parallel_residual")),
        ("it has no last norm", has("_remove_final_layer_norm")),
        ("its weights are quantised (slice the original and quantise the result)",
         has("quantization_config") and not has("slicegpt")),
        ("it normalises behind its blocks (post-norm), and such a signal cannot be rotated",
         not has("do_layer_norm_before", True)),
        ("its embedding is projected", has("word_embed_proj_dim") not in (None, has("hidden_size"))),
        ("its architecture is not known here", config.model_type not in ARCHITECTURES),
    ) if holds]
    if reasons:
        raise SliceGPTError(f"cannot slice a {config.model_type} model like this: {', and '.join(reasons)}. "
                            f"Can be sliced: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[config.model_type]


@dataclass(frozen=True)
class Stage:
    """The way from one signal to the next: the block of a layer, or the parallel blocks, that read the first of them.

    Its layer, and the number of that; its blocks; the name of the layer's parameter for the shortcut, which `rotate`
    makes; the norms' offset; a factor of Z, which Granite has; what else the layer is called with, if that is known.
    """
    layer: nn.Module
    number: int
    blocks: tuple[Block, ...]
    shortcut_name: str
    norm_offset: float
    multiplier: float
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)

    def __call__(self, X: Tensor, *args, **kwargs) -> Tensor:
        """Algorithm 1, line 4: Z (B, N, d_out) of the signal X (B, N, d_in); of parallel blocks, the sum."""
        normalised = {path: self.layer.get_submodule(path)(X) for path in {block.norm for block in self.blocks}}
        summands = []
        for block in self.blocks:
            Z = normalised[block.norm]
            for module in submodules(self.layer, block.modules):
                Z = module(Z, *self.args, *args, **self.kwargs, **kwargs) if block.attention else module(Z)
                Z = Z[0] if isinstance(Z, tuple) else Z
            summands.append(Z)
        return self.multiplier * sum(summands[1:], summands[0])

    def __str__(self):
        return f"layer {self.number}, {self.blocks[0].modules}"

    @property
    def readers(self) -> list:
        """All W_in."""
        return [W_in for block in self.blocks for W_in in submodules(self.layer, block.W_in)]

    @property
    def writers(self) -> list:
        """All W_out."""
        return [W_out for block in self.blocks for W_out in submodules(self.layer, block.W_out)]

    @property
    def shortcut(self) -> Tensor | None:
        return getattr(self.layer, self.shortcut_name, None)

    def set_shortcut(self, S: Tensor):
        setattr(self.layer, self.shortcut_name, nn.Parameter(stored(S, like=self.writers[0].weight)))

    def on(self, device: torch.device, dtype: torch.dtype | None = None):
        """This stage with its layer and args on the device, and in the dtype if one is given; a copy if need be."""
        def moved(a):
            return a.to(device, dtype if a.is_floating_point() else None) if isinstance(a, Tensor) else a

        layer, (args, kwargs) = self.layer, tree_map(moved, (self.args, self.kwargs))
        if dtype or self.writers[0].weight.device != device:
            tensors = {id(W): nn.Parameter(moved(W.detach()), W.requires_grad) for W in layer.parameters()}
            layer = copy.deepcopy(layer, tensors | {id(b): moved(b) for b in layer.buffers()})  # with these tensors
        return replace(self, layer=layer, args=args, kwargs=kwargs)


def stages_by_layer(model) -> list[list[Stage]]:
    """For each layer: attention, then FFN; or one stage with both, if they are parallel."""
    parts = architecture(model.config)
    of_layer = [((parts.attention,), "attention_shortcut"), ((parts.ffn,), "mlp_shortcut")]
    if getattr(model.config, "use_parallel_residual", parts.parallel):
        of_layer = [((parts.attention, parts.ffn), "shortcut")]
    return [[Stage(layer, number, *of_stage, parts.norm_offset, getattr(layer, "residual_multiplier", 1.0))
             for of_stage in of_layer] for number, layer in enumerate(layers(model))]


def stages(model) -> list[Stage]:
    """All stages, in the order in which the signal meets them."""
    return [stage for of_layer in stages_by_layer(model) for stage in of_layer]


def layers(model) -> nn.ModuleList:
    return model.get_submodule(architecture(model.config).layers)


def embeddings(model) -> list:
    """All W_embd."""
    return submodules(model, architecture(model.config).embeddings)


def submodules(module, paths: str) -> list:
    """The modules at these paths, separated by spaces; a path with a ? is optional, and counts if it has a weight.

    A parameter of all experts (experts, ..) stands for its experts.
    """
    found = []
    for path in paths.split():
        try:
            part = attrgetter(path.lstrip("?"))(module)
        except AttributeError:
            if path[0] != "?":
                raise
            continue
        if isinstance(part, nn.Parameter):
            owner, _, name = path.lstrip("?").rpartition(".")
            found += [Expert(module.get_submodule(owner), name, number) for number in range(len(part))]
        elif path[0] != "?" or hasattr(part, "weight"):
            found.append(part)
    return found


class Expert:
    """One expert of a mixture, as if it were a module: its weight and bias are rows of all experts' parameters."""

    def __init__(self, module, name: str, number: int):
        self.number, self.of_all = number, (getattr(module, name), getattr(module, f"{name}_bias", None))
        self.weight, self.bias = (None if of_all is None else of_all.data[number] for of_all in self.of_all)
        self.transposed = getattr(module, "is_transposed", False)

    def store(self, *rows):
        """Sets weight and bias, of any shape. The first expert makes room for all, which are set one after another."""
        for of_all, row in zip(self.of_all, rows):
            if row is not None:
                if self.number == 0:
                    of_all.data, of_all.grad = stored(row.expand(len(of_all), *row.shape), like=of_all), None
                of_all.data[self.number] = row


def matrix(module) -> Tensor:
    """W (inputs, outputs) in float64: of an embedding, a Conv1D (GPT-2), or a Linear, which stores its transpose."""
    return as_stored(module, module.weight.detach().double())


def as_stored(module, W: Tensor) -> Tensor:
    """W as a module stores it, from W as it multiplies from the right; or the other way round."""
    straight = isinstance(module, (nn.Embedding, Conv1D)) or getattr(module, "transposed", False)
    return W if straight else W.T


def set_matrix(module, W: Tensor, bias: Tensor | None):
    """The inverse of `matrix`, with a bias (outputs): of any shape, stored in the dtype of the old weight.

    The parameter stays the same one, so whoever shares it, as a tied head does, goes on sharing it.
    """
    inputs, outputs = W.shape
    if isinstance(module, Expert):
        module.store(as_stored(module, W), bias)
        return
    if isinstance(module, nn.Embedding):
        module.embedding_dim = outputs
    elif isinstance(module, Conv1D):
        module.nx, module.nf = inputs, outputs
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = inputs, outputs
    if bias is not None:
        module.bias = nn.Parameter(stored(bias, like=module.weight))
    module.weight.data, module.weight.grad = stored(as_stored(module, W), like=module.weight), None


@contextlib.contextmanager
def layers_do(forward, model):
    """Inside, the model's layers do forward(layer, X, *args, **kwargs) instead of what is theirs."""
    with contextlib.ExitStack() as patches:
        for layer in layers(model):
            patches.enter_context(patch.object(layer, "forward", partial(forward, layer)))
        yield


@torch.no_grad()
def embed(model, tokens: Tensor, batch_size: int = 8) -> tuple[Tensor, list[Stage]]:
    """Algorithm 1, line 1: the signal X (samples, N, D) of tokens (samples, N), on the CPU; and all stages, with args.

    The model's own forward pass runs, while its layers only pass on X, and record what else they are called with: masks
    and the like, which are the same for all sequences.
    """
    calls = []

    def record(_, X, *args, **kwargs):
        calls.append((X, args, kwargs))
        return X

    X = allocate((*tokens.shape, model.config.hidden_size), model.dtype)
    with layers_do(record, model):
        batches = [*zip(X.split(batch_size), tokens.split(batch_size)), (X[:1], tokens[:1])]  # the last is for the args
        for x, batch in batches:
            calls.clear()
            model.base_model(batch.to(model.device), use_cache=False)
            x.copy_(calls[0][0])
    return X, [replace(stage, args=calls[stage.number][1], kwargs=calls[stage.number][2]) for stage in stages(model)]


@contextlib.contextmanager
def rotating(model, Q, device):
    """For `rotate`: gives (an iterator of the Q of all signals, in float64 on the device; whether there are shortcuts).

    At the end, the new shape is noted where it has to be known: in the config, in modules of mixtures, and in layers
    with shortcuts, which get another forward pass. While it lasts the config has no shape, so that a model is refused
    (see `check_row`) if an error has left it half rotated.
    """
    shape, widths = model.config.slicegpt, []
    if shape.get("tied"):  # beyond the paper, see `tie_head`
        raise SliceGPTError("its head is tied to its embedding, which can be rotated before that only")
    shortcuts = shape["shortcuts"] or not isinstance(Q, Tensor)
    Qs = [Q] * len(shape["dimensions"]) if isinstance(Q, Tensor) else Q

    def hand_out():
        for rows, Q in itertools.zip_longest(shape["dimensions"], Qs):
            if Q is None or len(Q) != rows:
                raise SliceGPTError(f"this model's rotations have {shape['dimensions']} rows")
            widths.append(Q.shape[1])
            check_width(model.config, len(widths) < len(shape["dimensions"]) or widths[0] == widths[-1])
            yield Q.to(device or model.device, torch.float64)

    if not isinstance(Qs, Iterator):  # what is there already is checked before anything is rotated
        widths = [0 for _ in hand_out()][:0]
    del model.config.slicegpt
    yield hand_out(), shortcuts
    for stage, D, d in zip(stages(model), shape["dimensions"], widths):
        resize(stage, D, d)
    for of_layer in stages_by_layer(model) if shortcuts else ():
        of_layer[0].layer.forward = partial(sliced_layer, of_layer)
    model.config.slicegpt = shape | {"dimensions": widths, "shortcuts": shortcuts}


def resize(stage: Stage, D: int, d: int):
    """Tells the modules of a mixture of experts, which remember how wide the signal is, that it is d now, not D."""
    for block in stage.blocks:
        for module in () if block.attention else stage.layer.get_submodule(block.modules.split()[0]).modules():
            for name in ("hidden_dim", "hidden_size", "input_size"):
                if getattr(module, name, None) == D:
                    setattr(module, name, d)


@torch.no_grad()
def check_row(model):
    """Raises SliceGPTError if a dense model computes something else than Figure 4 makes of its row in the table.

    A class that only looks like one of the table, or one that has changed, is found out here, before a weight changes.
    Random tokens are embedded. To that signal X, each layer must add the same as it is and fused; both are computed by
    a copy in float32 at least, since a narrow type would hide a difference. What the head reads must have the direction
    of what the last norm gives. Both are medians over the tokens, as rounding may send a few to another expert.
    """
    if hasattr(model, "peft_config"):
        raise SliceGPTError("it has adapters: merge them into the model first (merge_and_unload)")
    if any(isinstance(module, RMSNorm) for module in model.modules()):
        raise SliceGPTError("an error left it half fused or half rotated: load it again")
    D, norm = model.config.hidden_size, model.get_submodule(architecture(model.config).norm)
    if model.device.type == "meta":  # without values
        return
    dtype, training, read = torch.promote_types(model.dtype, torch.float32), model.training, []
    tokens = torch.randint(model.config.vocab_size, (1, min(16, positions(model.config))),
                           generator=torch.Generator().manual_seed(0))
    X, todo = embed(model.eval(), tokens)
    head = model.get_output_embeddings()
    with layers_do(lambda _, X, *args, **kwargs: X, model), head.register_forward_pre_hook(
            lambda _, inputs: read.append(inputs[0])):
        model(tokens.to(model.device), use_cache=False)
    right = F.cosine_similarity(norm(X.to(model.device)).double(), read[0].double(), dim=-1).median() > 0.99
    X = X.to(dtype) - (X.to(dtype).mean(-1, True) if subtracts_mean(norm) else 0)
    for _, of_layer in itertools.groupby(todo, attrgetter("number")):
        expected = None
        for twin in (stage.on(stage.writers[0].weight.device, dtype) for stage in of_layer):
            if expected is None:
                found = X = X.to(twin.writers[0].weight.device)
                expected = twin.layer(X, *twin.args, **twin.kwargs)
                expected = expected[0] if isinstance(expected, tuple) else expected
            fuse_stage(twin, D)
            found = found + twin(found)
        error = found - expected
        error = error - (error.mean(-1, True) if subtracts_mean(norm) else 0)
        right = right and error.norm(dim=-1).median() <= 1e-3 * (expected - X).norm(dim=-1).median()
    model.train(training)
    if not right:
        raise SliceGPTError(f"cannot slice a {model.config.model_type} like this: fused, it computes something else")


def check_tokens(config, tokens: Tensor):
    """Raises SliceGPTError if such a model cannot take these tokens (.., N)."""
    if tokens.numel() == 0:
        raise SliceGPTError("there are no tokens")
    if tokens.shape[-1] > positions(config):
        raise SliceGPTError(f"sequences of {tokens.shape[-1]} tokens are longer than the model's {positions(config)} "
                            "positions")
    if tokens.max() >= config.vocab_size:
        raise SliceGPTError(f"the model knows {config.vocab_size} tokens, and there is a token {tokens.max()}; is the "
                            "tokenizer another model's?")


def check_sliceable(config, calibration: Tensor, one_width: bool = True):
    """Raises SliceGPTError if such a model, by such tokens, cannot be sliced, to one width throughout or not."""
    check_tokens(config, calibration)
    shape = getattr(config, "slicegpt", None)
    if shape and (shape["shortcuts"] or shape.get("tied") or min(shape["dimensions"]) < config.hidden_size):
        raise SliceGPTError(f"sliced already: {min(shape['dimensions'])} of {config.hidden_size} dimensions")
    check_width(config, one_width)


def check_width(config, one_width: bool):
    if architecture(config).one_width and not one_width:
        raise SliceGPTError(f"a {config.model_type}'s last signal must be as wide as its first: it can have neither a "
                            "full head nor dimensions chosen by variance")


def positions(config) -> float:
    """The longest sequence that a model can take, in tokens."""
    return getattr(config, "max_position_embeddings", None) or math.inf


# ---- 4 Experiments: texts, perplexity, generation, recovery fine-tuning ---------------------------------------------

HUB_TEXTS = {  # name: data set and configuration, with columns `text`
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "alpaca": ("tatsu-lab/alpaca", None),
}


def read_text(name: str, evaluation: bool) -> str:
    """A text to calibrate on, or one to evaluate on: wikitext2, alpaca, pydoc, or the path of a file.

    The file is a UTF-8 text, or a .json, .jsonl, .csv or .parquet with a column `text`, which may be compressed (.gz).
    Of a data set without a test split, random 80% are for calibration and 10% for evaluation, always the same, as in
    the authors' code. pydoc is the language reference that ships with CPython; a tenth of it is kept for evaluation.
    """
    if name == "pydoc":
        topics = importlib.import_module("pydoc_data.topics").topics
        return "\n\n".join(topics[key] for i, key in enumerate(sorted(topics)) if (i % 10 == 0) == evaluation)
    suffixes = [suffix for suffix in Path(name.lower()).suffixes if suffix not in (".gz", ".bz2", ".xz", ".zst")]
    kind = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}.get("".join(suffixes[-1:]))
    with failing(f"cannot read the text {name}", "besides text files there are pydoc and, from the hub, "
                 f"{' and '.join(HUB_TEXTS)}"):
        if name in HUB_TEXTS:
            splits = optional("datasets").load_dataset(*HUB_TEXTS[name])
            if "test" not in splits:
                halves = splits["train"].train_test_split(0.2, seed=42)
                splits = {"train": halves["train"], "test": halves["test"].train_test_split(0.5, seed=42)["test"]}
            rows = splits["test" if evaluation else "train"]
        elif kind and Path(name).is_file():
            rows = optional("datasets").load_dataset(kind, data_files=glob.escape(name), split="train")
        else:
            return Path(name).read_text(encoding="utf-8")
        return "\n\n".join(text or "" for text in rows["text"])


def tokenize(tokenizer, text: str, seqlen: int, samples: int | None = None, seed: int | None = None) -> Tensor:
    """A text in pieces, tokens (samples, seqlen), int64: all or the first of them, or random ones under a seed."""
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    pieces = len(tokens) // seqlen
    if pieces == 0:
        raise SliceGPTError(f"the text has only {len(tokens)} tokens, too few for one sequence of {seqlen}")
    order = torch.arange(pieces)
    if seed is not None:
        order = torch.randperm(pieces, generator=torch.Generator().manual_seed(seed))
    return tokens[:pieces * seqlen].view(pieces, seqlen)[order[:samples]]


@torch.no_grad()
def perplexity(model, tokens: Tensor, batch_size: int | None = None, device=None) -> float:
    """Section 4: exp of the mean negative log likelihood, in nats, of tokens (samples, seqlen); the first of each
    sequence is not predicted. Sets the model to eval mode.

    batch_size: sequences at a time; by default some 4096 tokens, as the logits (B, N, vocabulary) are large.
    """
    device = device or model.device
    model.eval()
    loss_and_count = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in progress(tokens.split(batch_size or max(1, 4096 // tokens.shape[1])), "perplexity", unit="batch"):
        batch = batch.to(device)
        logits = at_least_float32(model(batch, use_cache=False).logits[:, :-1]).flatten(0, 1)
        loss_and_count[0] += F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum")
        loss_and_count[1] += len(logits)
    loss, count = total(loss_and_count)
    return (loss / count).exp().item()


def generate(model, tokenizer, prompt: str, device=None) -> str:
    """The prompt, continued by 40 tokens, or as many as the model has positions for, each the likeliest."""
    tokens = tokenizer(prompt, return_tensors="pt").input_ids.to(device or model.device)
    length = min(tokens.shape[1] + 40, positions(model.config))
    with failing(f"cannot continue the prompt {prompt!r}"):  # a checkpoint's own settings can be wrong
        if length > tokens.shape[1]:
            tokens = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_length=length, do_sample=False,
                                    pad_token_id=tokenizer.eos_token_id)
        return tokenizer.decode(tokens[0], skip_special_tokens=True)


def parameters(model) -> int:
    """The number of parameters, each tensor counted once: a head tied to the embedding is no second matrix."""
    return sum(parameter.numel() for parameter in model.parameters())


def descend(weights: list, batches, loss_of, learning_rate: float, label: str):
    """Minimises loss_of(batch) by AdamW, a step for every batch, in bfloat16 where the weights are on an accelerator.

    The learning rate rises for three tenths of the steps and then falls, linearly. Raises SliceGPTError for a loss that
    is not finite, before that step.
    """
    optimizer = torch.optim.AdamW(weights, learning_rate)
    steps, kind = len(batches), weights[0].device.type
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / (0.3 * steps), (steps - i) / (0.7 * steps)))
    bar = progress(batches, label, unit="step")
    for batch in bar:
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda" or weights[0].dtype.itemsize == 2):
            loss = loss_of(batch)
        if not total(loss.detach().clone()).isfinite():
            raise SliceGPTError(f"the loss is not finite in {label}")
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def train(model, batches, learning_rate: float, label: str):
    """Trains what is not frozen by `descend`, on batches of tokens (B, N); ends in eval mode.

    Under torchrun, each process has batches of its own, as many as the others.
    """
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    network = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model

    def loss_of(batch):
        batch = batch.to(model.device)
        return network(batch, labels=batch, use_cache=False).loss

    model.train()
    descend(weights, batches, loss_of, learning_rate, label)
    model.eval()


def finetune(model, tokens: Tensor, batch_size: int = 4, learning_rate: float = 1e-3, seed: int = 0):
    """Section 4, Figure 6, recovery fine-tuning (RFT): trains LoRA adapters by peft on the tokens (samples, N), once.

    r = 32, alpha = 10, and peft's defaults for the rest, as in the paper; an architecture for which peft has no default
    gets adapters on the W_in of attention. They are merged into the weights at the end, in place, so the model stays
    what it was. If the loss stops being finite, the weights stay what they were, and SliceGPTError is raised.
    """
    peft, parts = optional("peft"), architecture(model.config)
    targets = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
    targets = targets or [path.rpartition(".")[2] for path in parts.attention.W_in.split()]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=32, lora_alpha=10, target_modules=targets))
        if model.device.type == "cuda":
            model.activation_checkpointing_enable({"use_reentrant": False})
        try:
            train(adapted, tokens.split(batch_size), learning_rate, "recovery fine-tuning")
            adapted.merge_and_unload()
        finally:
            adapted.unload()  # after an error; what has been merged is no adapter any more
            model.activation_checkpointing_disable()
            model.eval().requires_grad_(True)


# ---- Beyond the paper -----------------------------------------------------------------------------------------------
#
# Nothing in this section is in the paper: one rotation for all blocks, which needs no shortcuts and can be learned from
# what the dense network predicts; a head that shares the embedding's matrix; models without any code of ours.

@torch.no_grad()
def shared_rotation(model, calibration: Tensor, *, batch_size: int = 8, device=None) -> Tensor:
    """One Q (D, D) for the whole network, in float64; `rotate(model, Q[:, :d])` slices with it, without shortcuts.

    Its columns are the eigenvectors of a sum over all signals X of the *dense* network: the covariance of RMSNorm(X),
    which is what the blocks read, and 0.3 times that of X, which is what they add to, each divided by its trace, so
    that every signal has the same say. Fuses the model, and sets it to eval mode. Raises SliceGPTError for a signal
    that is not finite.
    """
    device, C = torch.device(device or model.device), 0
    check_sliceable(model.config, calibration)
    fuse(model.eval())
    norm = model.get_submodule(architecture(model.config).norm)  # fused, all norms are alike
    for stage, X in signals(model, calibration, batch_size, device):
        read, written = (total_covariance(observe, X, stage, batch_size, device) for observe in (norm, nn.Identity()))
        C = C + (read / read.trace() + 0.3 * written / written.trace())
    return agreed(pca(C)[1])


def learn_rotation(model, calibration: Tensor, Q: Tensor, steps: int, *, learning_rate: float | None = None,
                   batch_size: int = 4, seed: int = 0) -> Tensor:
    """A Q (D, d) with orthonormal columns, in float64, that costs the network's output less than the one it starts at.

    Theorem 1 leaves Q free, so it may be chosen by what the sliced network says instead of by variance: by descent on
    the cross entropy, in nats per token, of its next-token distributions with what is expected. That is four fifths the
    dense network's distribution and one fifth the token that follows, which helps on such texts more than it harms on
    others. A step takes `batch_size` sequences of up to 256 calibration tokens, random ones under the seed. What moves
    is B (D - d, d), at first 0; Q is the orthogonal factor (QR) of Q + N B, where N spans the rest. Along a strong
    signal small turns do harm: columns of B with a first gradient above the median move less. learning_rate: by default
    proportional to the entries of a Q. No weight is changed, see `projected`. Fuses the model, and sets it to eval
    mode. Memory: what the layers compute of a step's tokens. Raises SliceGPTError for a loss that is not finite.
    """
    check_sliceable(model.config, calibration)
    fuse(model.eval())
    length, calibration = min(256, calibration.shape[1]), all_samples(calibration)
    pieces = calibration[:, :calibration.shape[1] // length * length].reshape(-1, length)
    generator = torch.Generator().manual_seed(seed)
    first, *batches = (pieces[torch.randint(len(pieces), (batch_size,), generator=generator)] for _ in range(steps + 1))
    start = agreed(Q).double().to(model.device)
    N = agreed(torch.linalg.qr(start, mode="complete").Q[:, Q.shape[1]:])
    B = torch.zeros(N.shape[1], Q.shape[1], dtype=torch.promote_types(model.dtype, torch.float32), device=model.device)
    B.requires_grad_().register_hook(total)
    scale = 1.0

    def loss_of(batch):
        mine = share(batch).to(model.device)
        with torch.no_grad():
            expected = at_least_float32(model(mine, use_cache=False).logits).softmax(-1).mul_(1 - 0.2)
            expected[:, :-1].scatter_(-1, mine[:, 1:, None], 0.2, reduce="add")
        with projected(model, torch.linalg.qr(start.to(B) + N.to(B) @ (B * scale)).Q):
            found = at_least_float32(model(mine, use_cache=False).logits.flatten(0, 1))
        return F.cross_entropy(found, expected.flatten(0, 1), reduction="sum") / total(torch.ones_like(mine).sum())

    try:
        model.requires_grad_(False)
        felt = torch.autograd.grad(loss_of(first), B)[0].norm(dim=0).clamp_min(torch.finfo(B.dtype).tiny)
        scale = (felt.median() / felt).clamp_max(1)
        descend([B], batches, loss_of, learning_rate or 0.07 / math.sqrt(len(Q)), "learning the rotation")
    finally:
        model.requires_grad_(True)
    return torch.linalg.qr(start + N @ (B * scale).detach().double()).Q


@contextlib.contextmanager
def projected(model, Q: Tensor):
    """Inside, a fused model computes what `rotate(model, Q)` would make of it, with no weight rewritten.

    Its signal stays in D dimensions: Z Q Q^T is written instead of Z.
    """
    P, of_layers = (Q @ Q.T).to(model.dtype), {of_layer[0].layer: of_layer for of_layer in stages_by_layer(model)}

    def forward(layer, X, *args, **kwargs):
        for stage in of_layers[layer]:
            X = X + stage(X, *args, **kwargs) @ P
        return X

    with contextlib.ExitStack() as hooks:
        for embedding in embeddings(model):
            hooks.enter_context(embedding.register_forward_hook(lambda module, inputs, X: X @ P))
        hooks.enter_context(layers_do(forward, model))
        yield


@torch.no_grad()
def tie_head(model, calibration: Tensor | None = None):
    """Gives a model, in place, the embedding's matrix back as its head, with a small matrix B in front.

    Fusing and slicing leave a head W (d, V) that is no longer the embedding E (V, d), but is still made of it:
    W ~ B E^T with B = W P E (E^T P E)^-1 (d, d), a least squares fit over the vocabulary. The diagonal P weighs each
    token by its share of the calibration tokens, if there are any, plus 1 / V. For models whose embedding and head
    were one matrix; a small model has much of its size there. Fuses it if need be; a head that is tied stays.
    """
    fuse(model)
    if model.config.slicegpt.get("tied"):
        return
    embedding, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    E, W = matrix(embedding), matrix(lm_head)
    PE = E / len(E)
    if calibration is not None:
        PE += torch.bincount(calibration.flatten(), minlength=len(E)).to(E)[:, None] / calibration.numel() * E
    B = nn.Linear(len(W), E.shape[1], bias=False, dtype=model.dtype, device=model.device)
    set_matrix(B, W @ PE @ torch.linalg.pinv(E.T @ PE, hermitian=True), None)
    path = architecture(model.config).norm
    model.set_submodule(path, nn.Sequential(model.get_submodule(path), B))
    lm_head.in_features, lm_head.weight = E.shape[1], embedding.weight
    model.config.slicegpt["tied"] = model.config.tie_word_embeddings = True
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


@torch.no_grad()
def standard(model) -> tuple[PreTrainedModel, str]:
    """A sliced model as one of Hugging Face's own class, equal to it, and ""; or the model, and why there is none.

    Without shortcuts, a sliced Llama is a Llama of a smaller `hidden_size` d. Its RMSNorms see |x|^2 / d + eps, ours
    |x|^2 / D + eps, which is the same if the signal is x sqrt(d / D): so all that writes the signal is multiplied by
    sqrt(d / D), in place, and the norms get a scale of sqrt(D / d). The given model is then used up. LayerNorms do the
    same to a signal whose mean is 0: so where there are some, the signal is first rotated into one dimension more, see
    `mean_free`, unless its mean is 0 already.
    """
    shape, parts, config = model.config.slicegpt, architecture(model.config), model.config
    for reason, holds in (("it has shortcuts", shape["shortcuts"]),
                          ("its head is tied through a matrix of its own", shape.get("tied")),
                          ("its norms are LayerNorms, which subtract a mean",
                           not parts.zero_mean and not hasattr(config, "rms_norm_eps"))):
        if holds:
            return model, reason
    d, W, H = shape["dimensions"][0], matrix(model.get_input_embeddings()), None
    if parts.zero_mean and (W.is_meta or W.mean(1).abs().max() > 1e-3 * W.abs().mean()):
        d, H = d + 1, mean_free(d)
    try:
        config = stock_config(config, d)
    except Exception as error:
        return model, f"transformers refuses its shape: {first_line(error.__cause__ or error)}"
    base = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        stock = base._from_config(config, dtype=model.dtype)
    if H is not None:
        rotate(model, H)
    scale, weights = math.sqrt(model.config.hidden_size / config.hidden_size), model.state_dict()
    expected = stock.state_dict()
    for fused, pieces in (("qkv_proj", "q_proj k_proj v_proj"), ("gate_up_proj", "gate_proj up_proj")):
        for name in [name for name in weights if fused in name and name not in expected]:  # a Phi-3 as a Mistral
            names = [name.replace(fused, piece) for piece in pieces.split()]
            weights |= zip(names, weights.pop(name).split([len(expected[piece]) for piece in names]))
    # where beta of a LayerNorm became a bias that the stock class has not, its LayerNorms have a bias of 1: on that, as
    # on the signal, W_in is 0, and so it can have any bias in its mean
    biases = [name for name in weights.keys() - expected.keys() if parts.zero_mean and name.endswith("bias")]
    for name in biases:
        W = weights[name.removesuffix("bias") + "weight"]
        weights[name.removesuffix("bias") + "weight"] = W + weights.pop(name)[:, None] / config.hidden_size
    for name in expected.keys() - weights.keys():  # our norms have no scale, and a Qwen2's attention no last bias
        value = float(bool(biases)) if name.endswith("bias") else scale - parts.norm_offset
        weights[name] = torch.full(expected[name].shape, value, dtype=model.dtype, device=model.device)
    if {name: W.shape for name, W in weights.items()} != {name: W.shape for name, W in expected.items()}:
        if H is not None:
            rotate(model, H.T)  # back
        return model, f"a {config.model_type}'s heads must add up to its hidden size"
    if model.device.type == "meta":
        return stock, ""
    # Gemma multiplies by the square root of its hidden size what comes out of its embedding: that is sqrt(d/D) less
    writers = [embedding for embedding in embeddings(model) if not hasattr(embedding, "embed_scale")]
    for module in writers + [linear for stage in stages(model) for linear in stage.writers]:
        for parameter in (module.weight, getattr(module, "bias", None)):
            if parameter is not None:
                parameter.copy_(parameter.double() / scale)
    if parts.norm + ".weight" not in expected:  # Olmo's norms have none: what reads behind them is multiplied
        for module in [model.get_output_embeddings(), *(linear for stage in stages(model) for linear in stage.readers)]:
            module.weight.mul_(scale)
    stock = base.from_pretrained(None, config=config, state_dict=weights, dtype=model.dtype,
                                 attn_implementation=model.config._attn_implementation)
    vars(stock).pop("_weight_conversions", None)  # experts are saved one by one, as engines read them
    stock.generation_config = model.generation_config
    return stock.to(model.device), ""


def mean_free(d: int) -> Tensor:
    """(d, d + 1), with orthonormal rows of mean 0: rotates any signal into d + 1 dimensions in which its mean is 0.

    So a LayerNorm finds no mean to subtract. H is the reflection that takes e_1 to 1 / sqrt(d + 1); all its other rows
    are orthogonal to the vector of ones.
    """
    v = torch.eye(d + 1, dtype=torch.float64)[0] - (d + 1) ** -0.5
    H = torch.eye(d + 1, dtype=torch.float64) - 2 * torch.outer(v, v) / (v @ v)
    return H[1:]


def stock_config(config, d: int):
    """The config of a network like this with a hidden size of d, as a Llama or a Mistral, which most programs run.

    Llama's own class refuses a d that is no multiple of its heads; a Mistral without windows is the same. A Qwen2 is a
    Llama with biases, and a Phi-3 a Mistral whose matrices are in one piece. The others stay what they are. Raises what
    transformers raises of a shape that it does not like.
    """
    values, kind, heads = config.to_dict(), config.model_type, config.num_attention_heads
    values |= {"hidden_size": d, "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads}
    for key in ("slicegpt", "auto_map", "architectures", "model_type"):
        values.pop(key, None)
    if kind == "qwen2" and d % heads == 0 and "sliding_attention" not in config.layer_types:
        kind, values["attention_bias"] = "llama", True
    elif kind == "llama" and d % heads and not (config.attention_bias or config.mlp_bias):
        kind, values["sliding_window"] = "mistral", None
    elif kind == "phi3" and config.rope_parameters.get("partial_rotary_factor", 1) == 1 and (
            config.rope_parameters["rope_type"] != "longrope"):  # whose cache no other class renews
        kind = "mistral"
    if kind != config.model_type:
        values = {key: values[key] for key in AutoConfig.for_model(kind).to_dict().keys() & values.keys()}
    return AutoConfig.for_model(kind, **values)


def dimension_for(config, params: float, round_to: int, rotation: str = "block", head: str = "sliced") -> int:
    """The largest d, a multiple of `round_to`, whose sliced network has at most the share `params` of all parameters.

    The networks are sliced on the meta device, so all of them is counted and nothing is computed. Raises SliceGPTError,
    with what can be had, if there is none.
    """
    def share_of(d) -> float:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
            dense, Q = parameters(model), torch.empty(config.hidden_size, d)
            last = torch.empty(config.hidden_size, config.hidden_size) if head == "full" else Q
            shared = Q[:, :directions(config, d, head)]
            rotate(model, shared if rotation == "shared" else [Q] * len(stages(model)) + [last])
            if head == "tied":
                tie_head(model)
            return parameters(standard(model)[0]) / dense

    multiples = range(round_to, config.hidden_size + 1, round_to)
    fitting = bisect.bisect_right(multiples, params, key=share_of)
    if not fitting:
        reach = f": {share_of(multiples[0]):.3f} to {share_of(multiples[-1]):.3f}" if multiples else ""
        raise SliceGPTError(f"a share {params} of the parameters cannot be reached in multiples of {round_to}{reach}")
    return multiples[fitting - 1]


def directions(config, d: int, head: str) -> int:
    """How many directions to keep for a width of d in the end: one less where `standard` adds one."""
    return d - (architecture(config).zero_mean and head != "tied")


# ---- Several processes (torchrun) -----------------------------------------------------------------------------------

#
# Each process passes its own part of the samples to every function above. What crosses processes is a sum, of
# covariances or losses or gradients, and the Q of the first.

def share(samples: Tensor, even: bool = False) -> Tensor:
    """This process's part of the samples; all, if there are too few: more of the same changes no Q and no mean.

    even: all parts have the same length, so that all processes take as many steps; some samples may come twice.
    """
    if not dist.is_initialized() or len(samples) < dist.get_world_size():
        return samples
    if even:
        return samples[list(torch.utils.data.DistributedSampler(samples, shuffle=False))]
    return samples[dist.get_rank()::dist.get_world_size()]


def total(C: Tensor) -> Tensor:
    """The sum of C over all processes, in each of them."""
    if dist.is_initialized():
        dist.all_reduce(C)
    return C


def agreed(Q: Tensor) -> Tensor:
    """The first process's Q, in all of them: what each computes of the same C may differ in the last bits."""
    if dist.is_initialized():
        Q = Q.contiguous()
        dist.broadcast(Q, 0)
    return Q


def all_samples(mine: Tensor) -> Tensor:
    """The samples of all processes, in each of them, if each has its `share`."""
    if not dist.is_initialized():
        return mine
    everywhere = mine.new_zeros(total(torch.tensor(len(mine))), *mine.shape[1:])
    everywhere[dist.get_rank()::dist.get_world_size()] = mine
    return total(everywhere)


# ---- A model larger than memory -------------------------------------------------------------------------------------
#
# Hugging Face maps a checkpoint's weights into memory and does not read them before they are used. Here, what is made
# of them is in mapped files too, so that the system can drop any page that it needs for something else.

FOLDER: ContextVar[Path | None] = ContextVar("where `larger_than_memory` has its files", default=None)


@contextlib.contextmanager
def larger_than_memory(path: Path):
    """Inside, new weights and signals are in files in the directory `path`, or next to what is to become that.

    The files have no names; they go with the tensors. On Linux, freed matrices go back to the system at once.
    """
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
    token = FOLDER.set(path if path.exists() else path.parent)
    try:
        yield
    finally:
        FOLDER.reset(token)


def map_as(model, dtype):
    """Within `larger_than_memory`: the model's weights in another dtype, in files, too."""
    for parameter in model.parameters():
        if parameter.dtype != dtype:
            parameter.data = stored(parameter, like=torch.empty(0, dtype=dtype))


def allocate(shape, dtype) -> Tensor:
    """An uninitialised tensor on the CPU; within `larger_than_memory`, pages of a file that goes with the tensor."""
    folder, size = FOLDER.get(), math.prod(shape)
    if folder is None or size == 0:
        return torch.empty(shape, dtype=dtype)
    with failing(f"cannot save to {folder}"), tempfile.NamedTemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)  # a full disk says so now
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)


def stored(W: Tensor, like: Tensor) -> Tensor:
    """A copy of W, contiguous, in the dtype and on the device of `like`; on a CPU, where `allocate` says."""
    if like.device.type == "cpu" and not W.is_meta:
        return allocate(W.shape, like.dtype).copy_(W.detach())
    return W.detach().to(like.device, like.dtype, copy=True).contiguous()


# ---- Load and save, with Hugging Face's classes ---------------------------------------------------------------------

class SlicedForCausalLM:
    """A Hugging Face causal language model that is fused, and perhaps rotated or sliced: a mixin for its class.

    `config.slicegpt` has its shape: `dimensions`, of the signal in front of every stage and of the head; whether there
    are `shortcuts`; and whether its head is `tied` (see `tie_head`). A saved model's `auto_map` names this class, for
    AutoModelForCausalLM.
    """

    _keys_to_ignore_on_load_unexpected = [r"(norm|ln_f)\.weight$"]  # see `save_pretrained`

    def __init__(self, config, *args, **kwargs):
        config = copy.deepcopy(config)  # of a dense model, until this one is sliced and its weights are quantised
        shape, quantised = (vars(config).pop(name, None) for name in ("slicegpt", "quantization_config"))
        super().__init__(config, *args, **kwargs)
        fuse(self)  # transformers builds models without data, on the meta device: these lines only set shapes
        Qs = [torch.eye(config.hidden_size, d) for d in shape["dimensions"]]
        rotate(self, Qs if shape["shortcuts"] else Qs[0])
        if shape.get("tied"):
            tie_head(self)
        if quantised:
            self.config.quantization_config = quantised

    def save_pretrained(self, path, *args, **kwargs):
        """Hugging Face's own; and this file, which AutoModelForCausalLM runs to load the model again.

        Where nothing was deleted, transformers' own class could load the weights, too, and would leave out the
        shortcuts. So the last norm is saved with a weight of no size, at which that class stops, and ours does not.
        """
        if kwargs.get("push_to_hub"):
            raise SliceGPTError("it would lack slicegpt.py on the hub: use push_to_hub() of the model")
        weights = kwargs.pop("state_dict", None) or self.state_dict()
        weights = weights | {architecture(self.config).norm + ".weight": torch.empty(0)}
        super().save_pretrained(path, *args, state_dict=weights, **kwargs)
        shutil.copyfile(__file__, Path(path) / "slicegpt.py")

    @classmethod
    def from_pretrained(cls, path, *args, config=None, **kwargs):
        """Hugging Face's own from_pretrained, of the class that goes with the config."""
        config = config or AutoConfig.from_pretrained(path)
        if not issubclass(cls, PreTrainedModel):
            cls = sliced_class(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
        return super(SlicedForCausalLM, cls).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class):
        """Called by AutoModelForCausalLM, for transformers to copy the class's file; `save_pretrained` does."""


@cache
def sliced_class(base: type) -> type:
    """SlicedForCausalLM in front of one of Hugging Face's classes; its instances can be copied and pickled."""
    return type("SlicedForCausalLM", (SlicedForCausalLM, base), {
        "__module__": __name__, "__reduce__": lambda self: (blank, (base,), vars(self))})


def blank(base: type):
    return sliced_class(base).__new__(sliced_class(base))


def become_sliced(model):
    """Gives a model that has just been fused, in place, the class and the config of a sliced one with all dimensions."""
    shared, config = model.config, copy.deepcopy(model.config)
    for module in model.modules():  # other models may have been made from the same config
        if getattr(module, "config", None) is shared:
            module.config = config
    config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}  # else transformers would tie head and embedding again when it saves
    model._weight_conversions = []  # nor may it save under names that only the dense model's class understands
    config.slicegpt = {"dimensions": [config.hidden_size] * (1 + len(stages(model))), "shortcuts": False}
    config.auto_map = {"AutoModelForCausalLM": "slicegpt.SlicedForCausalLM"}
    if not isinstance(model, SlicedForCausalLM):
        model.__class__ = sliced_class(type(model))


def load(name, dtype="auto", device="cpu", **options):
    """(model, tokenizer) of a hub id, a local directory, one that `save` wrote, a .gguf file, or "demo".

    dtype: a torch.dtype, or "auto" for the checkpoint's own. options: from_pretrained's, such as device_map="auto" for
    a model to use and not to slice, which then goes wherever accelerate finds room. Raises SliceGPTError if there is no
    such model, and, before its weights are read, if it cannot be sliced.
    """
    config, tokenizer, path, files = describe(name, **{key: options[key] for key in ("revision", "token", "cache_dir")
                                                       if key in options})
    if name == "demo" and not path.exists():
        model = train_demo(config, tokenizer)
        try:
            save(model, tokenizer, path)
        except SliceGPTError as error:  # another process was faster, or nothing can be written there
            print(f"slicegpt: the demo model is not kept: {error}", file=sys.stderr)
        return model.to(device, None if dtype == "auto" else dtype), tokenizer
    with failing(f"cannot load {name}"):
        auto = SlicedForCausalLM if hasattr(config, "slicegpt") else AutoModelForCausalLM
        if files:
            optional("accelerate")
            files = files | {"quantization_config": transformers.GgufConfig(dequantize=True)}
        model, found = auto.from_pretrained(path, dtype=dtype, output_loading_info=True, **files, **options)
        if missing := found["missing_keys"]:  # transformers would go on with random ones
            raise ValueError(f"{len(missing)} weights are missing, among them {min(missing)}")
        if hasattr(config, "slicegpt") and (unknown := found["unexpected_keys"]):  # or without these
            raise ValueError(f"{len(unknown)} weights are not known, among them {min(unknown)}")
        return model if "device_map" in options else model.to(device), tokenizer


def describe(name, **options) -> tuple:
    """(config, tokenizer, path, how to call a .gguf file) of what `load` takes; reads and trains no weights."""
    path, files = str(name), {}
    if path == "demo":
        cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "slicegpt")
        path = cached / f"demo-{sys.hexversion:x}"  # its text is another in each Python
        if not path.exists():
            return *untrained_demo(), path, files
    elif path.endswith(".gguf") and os.path.isfile(path):
        optional("gguf")
        path, files = os.path.dirname(path) or ".", {"gguf_file": os.path.basename(path)}
    elif not os.path.exists(path) and (path.count("/") > 1 or path.startswith((".", "/")) or path.endswith(".gguf")):
        raise SliceGPTError(f"cannot load {path}: there is no such file or directory")
    elif os.path.exists(os.path.join(path, "adapter_config.json")):
        raise SliceGPTError(f"cannot load {path}: it has adapters; merge them into the model first (merge_and_unload)")
    hint = "" if os.path.exists(path) else "without a network, there are local directories, and demo"
    with failing(f"cannot load {name}", hint):
        config = AutoConfig.from_pretrained(path, **files, **options)
        architecture(config)
        return config, AutoTokenizer.from_pretrained(path, **files, **options), path, files


def save(model, tokenizer, path):
    """Writes a directory that `load` reads back bit for bit, as does AutoModelForCausalLM.

    It has Hugging Face's files and, for a model of ours, a copy of this one, run with trust_remote_code=True. Nothing
    gets its name before all is written. Raises SliceGPTError if something is there, or if the disk refuses.
    """
    path = Path(path).resolve()
    folder = unfinished(path)
    with failing(f"cannot save to {path}"):
        try:
            model.save_pretrained(folder, max_shard_size="5GB")
            tokenizer.save_pretrained(folder)
            complete(folder, tokenizer.name_or_path)
            if path.exists():  # it may be a mount point, which cannot be replaced
                for file in sorted(folder.iterdir(), key=lambda file: file.name == "config.json"):
                    file.replace(path / file.name)
            else:
                folder.replace(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def unfinished(path: Path) -> Path:
    """A new directory for what is to become `path`: next to it, or in it, if it exists.

    Raises SliceGPTError if something else is there already, or if there can be nothing.
    """
    with failing(f"cannot save to {path}"):
        path = Path(path).resolve()
        folder = path.with_name(f".{path.name}.{os.getpid()}")
        if path.exists():
            folder, there = path / f".unfinished.{os.getpid()}", {file.name for file in path.iterdir()}
            begun = {name for name in there if name.startswith(".unfinished")}
            if there - begun and (not begun or "config.json" in there):  # else a process died while it moved files here
                raise OSError("it exists and is not an empty directory")
        shutil.rmtree(folder, ignore_errors=True)  # a process died while it wrote
        folder.mkdir(parents=True)
        return folder


def complete(folder: Path, source: str):
    """Adds to a saved model what other programs read, and transformers 5 does not write.

    The files of the tokenizer's `source`, a directory or hub id, that are missing here; and transformers 4's names.
    """
    files = ["tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "generation_config.json"]
    if source and not os.path.isdir(source):
        with contextlib.suppress(Exception):  # without a network, or such a repository, there is no more than we have
            source = importlib.import_module("huggingface_hub").snapshot_download(source, allow_patterns=files)
    for name in files if source else ():
        if Path(source, name).is_file() and not (folder / name).exists():
            shutil.copyfile(Path(source, name), folder / name)
    names = ("config.json", "tokenizer_config.json")
    config, tokenizer = (json.loads((folder / name).read_text(encoding="utf-8")) for name in names)
    rotary = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rotary:
        outside = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
        config |= {key: rotary[key] for key in outside if key in rotary}
        del rotary["rope_theta"]
        config["rope_scaling"] = None if rotary["rope_type"] == "default" else rotary
    if tokenizer["tokenizer_class"] == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    for name, content in zip(names, (config, tokenizer)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def optional(package: str):
    """A package that only some uses need. (transformers wants all that an `import` in a model's own file names.)"""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0].replace("_", "-")
        raise SliceGPTError(f"this needs the package {name}: pip install {name}") from None


@contextlib.contextmanager
def failing(what: str, hint: str = ""):
    """Inside, whatever goes wrong is said in one line: files from elsewhere, and disks, can be wrong in many ways."""
    try:
        yield
    except SliceGPTError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            error = error.__context__  # torch.save stumbles over the disk's error once more
        raise SliceGPTError(f"{what}: {first_line(error)}" + (f"; {hint}" if hint else "")) from error


def first_line(error: Exception) -> str:
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join([first, *others[:first.endswith(":")]]).rstrip(".")


def untrained_demo() -> tuple:
    """(config, tokenizer) of the model that needs no network: a small OPT for the language of pydoc."""
    bpe = importlib.import_module("tokenizers").ByteLevelBPETokenizer()
    bpe.train_from_iterator(read_text("pydoc", evaluation=False).splitlines(True), vocab_size=1024,
                            special_tokens=["</s>"], show_progress=False)
    config = transformers.OPTConfig(
        vocab_size=1024, hidden_size=128, word_embed_proj_dim=128, num_hidden_layers=4, num_attention_heads=4,
        ffn_dim=512, max_position_embeddings=256, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    return config, transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="</s>")


def train_demo(config, tokenizer):
    """The demo model, trained on the language reference."""
    if dist.is_initialized():
        raise SliceGPTError("the demo model is trained by one process: run it once without torchrun")
    tokens = tokenize(tokenizer, read_text("pydoc", evaluation=False), seqlen=256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        batches = [tokens[torch.randint(len(tokens), (8,))] for _ in range(400)]
        train(model, batches, 3e-3, "training the demo model, this once")
    return model


# ---- The command line -----------------------------------------------------------------------------------------------

def number(kind, least, below=math.inf):
    """The type of an argument: a number that is at least `least` and below `below`."""
    def parse(text):
        if not least <= kind(text) < below:
            limit = f" and below {below}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} must be at least {least}{limit}")
        return kind(text)
    parse.__name__ = kind.__name__  # argparse: invalid int value
    return parse


def add_inputs(add):
    """The options that say what is sliced, by which text, and where; bench.py has them too."""
    text = "wikitext2 (default), alpaca, pydoc (demo's default), a text file, or a .json, .csv, .parquet with a `text`"
    add("--model", default="demo", help="hub id, directory, .gguf file, or demo: trained on the spot (default)")
    add("--calibration", metavar="TEXT", help=text)
    add("--eval", metavar="TEXT", help="what perplexity is measured on; as --calibration")
    add("--samples", type=number(int, 1), default=128, help="calibration sequences (default: 128)")
    add("--eval-samples", type=number(int, 1), help="evaluation sequences (default: all of the text)")
    add("--seqlen", type=number(int, 2), help="tokens per sequence (default: 2048, or the model's positions if fewer)")
    add("--batch-size", type=number(int, 1, 2**31), default=8, help="calibration sequences at a time (default: 8)")
    add("--seed", type=number(int, -2**63, 2**63), default=0, help="chooses the calibration sequences (default: 0)")
    add("--dtype", choices=["float64", "float32", "float16", "bfloat16"], help="default: float32 on a CPU, else stored")
    add("--device", help="default: cuda, if there is one")


def parse_arguments(argv):
    parser = argparse.ArgumentParser("slicegpt.py", description="Slice a language model (SliceGPT, arXiv 2401.15024) "
                                     "and measure what that does.")
    add, size = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add_inputs(add)
    size("--sparsity", type=number(float, 0, 1), help="share of the dimensions to delete (default: 0.25)")
    size("--params", type=number(float, 0), help="instead: at most this share of all parameters is left")
    size("--discard-variance", type=number(float, 0, 1), help="instead: at most this share of each signal's is lost")
    add("--round-to", type=number(int, 1), default=8, help="the dimension is a multiple of this (default: 8)")
    add("--signal", "--pca", choices=["input", "output"], default="input", help="principal components of the "
        "RMSNorm's input, as in the authors' code (default), or of its output, as in the paper's text")
    add("--head", choices=["sliced", "full", "tied"], default="sliced", help="slice the head too (default), give it "
        "all dimensions, or keep it one matrix with the embedding, if it was")
    add("--rotation", choices=["block", "shared"], default="block", help="one for each block (default), or one for all")
    add("--learn", type=number(int, 1), metavar="N", help="turn the one rotation for all by N steps of descent on how "
        "far the predictions are from the dense model's and from the text (implies --rotation shared)")
    add("--finetune", type=number(int, 1), nargs="?", const=1000, metavar="N", help="then recover by LoRA on N "
        "sequences of the calibration text (default: 1000)")
    add("--stream", action="store_true", help="larger than memory: weights and signals stay in files next to --save")
    add("--prompt", default="If the", help="text for the models to continue (default: If the)")
    add("--save", metavar="DIR", type=Path, help="write the sliced model here")
    add("--report", metavar="FILE.json", type=Path, help="write the figures here")

    def complain(message):
        raise SliceGPTError(f"{message} (--help lists the options)")

    parser.error = complain
    return parser.parse_args(argv)


def find_device(name: str | None) -> torch.device:
    """The device of this name; by default an accelerator, if there is one. Raises SliceGPTError."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    with failing(f"cannot use --device {name}"):
        zero = torch.zeros(1, device=name)
        zero.tolist()  # a device that has no values is none to compute on
        return zero.device


def read_inputs(args):
    """Completes the options that `add_inputs` names, and adds what they ask for, but for the weights.

    That is config, tokenizer, and as tokens, this process's share of them, calibration_tokens (None for a model that is
    sliced already) and evaluation_tokens. dtype becomes what `load` takes. Raises SliceGPTError.
    """
    text = "pydoc" if args.model == "demo" else "wikitext2"
    args.device = find_device(args.device)
    args.calibration, args.eval = args.calibration or text, args.eval or text
    args.dtype = getattr(torch, args.dtype) if args.dtype else torch.float32 if args.device.type == "cpu" else "auto"
    args.config, args.tokenizer, *_ = describe(args.model)
    args.seqlen = args.seqlen or min(2048, positions(args.config))
    args.calibration_tokens = None
    if not hasattr(args.config, "slicegpt"):
        tokens = tokenize(args.tokenizer, read_text(args.calibration, False), args.seqlen, args.samples, args.seed)
        check_tokens(args.config, tokens)
        args.samples, args.calibration_tokens = len(tokens), share(tokens)
    tokens = tokenize(args.tokenizer, read_text(args.eval, True), args.seqlen, args.eval_samples)
    check_tokens(args.config, tokens)
    args.eval_samples, args.evaluation_tokens = len(tokens), share(tokens)


def prepare(args):
    """`read_inputs`, and all other checks that need no weights. Raises SliceGPTError.

    It adds d, the sliced dimension (None where each signal has its own), and finetune_tokens.
    """
    read_inputs(args)
    config, sliced, by_variance = args.config, args.calibration_tokens is None, args.discard_variance is not None
    args.rotation = "shared" if args.learn else args.rotation
    shared = args.rotation == "shared"
    way = args.sparsity, args.params, args.discard_variance, args.round_to, args.head, args.signal, args.rotation
    for wrong, message in (
            (shared and (args.head == "full" or by_variance or args.signal == "output"),
             "one rotation has one dimension throughout, from the dense network: it goes with neither --head full, "
             "--discard-variance nor --signal output"),
            (args.stream and (not args.save or args.learn or dist.is_initialized()),
             "--stream needs --save, and goes with neither --learn nor torchrun"),
            (args.stream and os.path.exists(args.model) and not any(Path(args.model).glob("*.safetensors")),
             f"--stream needs .safetensors files, which can be mapped into memory, and {args.model} has none"),
            (sliced and way != (None, None, None, 8, "sliced", "input", "block"),
             f"{args.model} is sliced already; it can be measured as it is, and fine-tuned"),
            (not sliced and args.head == "tied" and not config.tie_word_embeddings,
             "--head tied is for models whose head and embedding are one matrix")):
        if wrong:
            raise SliceGPTError(message)
    check_width(config, sliced or args.head != "full" and not by_variance)
    args.d = None
    if args.params is not None:
        args.d = dimension_for(config, args.params, args.round_to, args.rotation, args.head)
    elif not sliced and not by_variance:
        args.d = sliced_dimension(config.hidden_size, 0.25 if args.sparsity is None else args.sparsity, args.round_to)
    args.sparsity = args.d and 1 - args.d / config.hidden_size
    with failing(f"cannot continue the prompt {args.prompt!r}"):
        check_tokens(config, torch.tensor(args.tokenizer(args.prompt).input_ids))
    if args.finetune:
        optional("peft")
        tokens = tokenize(args.tokenizer, read_text(args.calibration, False), min(1024, positions(config)),
                          args.finetune, args.seed)
        args.finetune, args.finetune_tokens = len(tokens), share(tokens, even=True)
    with failing("cannot save such a model"), tempfile.TemporaryDirectory() as folder:  # if so, it fails now
        config.save_pretrained(folder)
        args.tokenizer.save_pretrained(folder)
        complete(Path(folder), args.tokenizer.name_or_path)
    if args.save:
        unfinished(args.save).rmdir()
    if args.report:
        with failing(f"cannot write {args.report}"):
            open(args.report, "a").close()


def run(args):
    """The program: load, measure, slice, measure again, fine-tune, measure again, save, print."""
    prepare(args)
    model, _ = load(args.model, "auto" if args.stream else args.dtype)
    figures, why = {}, "it was sliced before"
    with larger_than_memory(args.save.resolve()) if args.stream else contextlib.nullcontext():
        if args.stream and args.dtype != "auto":
            map_as(model, args.dtype)
        if args.calibration_tokens is not None:
            figures["dense"] = measure(args, model)
            model, why = slice_as_asked(args, model)
        try:
            figures["sliced"] = measure(args, model)
            if args.finetune:
                finetune(model.to(args.device), args.finetune_tokens, seed=args.seed)
                figures["finetuned"] = measure(args, model)
        finally:  # whatever fails, what has been sliced is saved
            if not dist.is_initialized() or dist.get_rank() == 0:
                if args.save:
                    save(model, args.tokenizer, args.save)
                report(args, figures)
                if args.save:
                    print(f"\nsaved to {args.save}, " + (f"to load with trust_remote_code=True, as {why}" if why else
                                                         f"an ordinary {model.config.model_type} model"))


def measure(args, model) -> dict:
    """A column of figures of a model: its dimensions (but the head's), parameters, perplexity, and what it writes."""
    D = model.config.hidden_size
    widths = sorted(set(getattr(model.config, "slicegpt", {}).get("dimensions", [D, D])[:-1]))
    with placed(model, args.device):
        return {"dimension": widths[0] if len(widths) == 1 else f"{widths[0]} to {widths[-1]}",
                "parameters": parameters(model),
                "perplexity": perplexity(model, args.evaluation_tokens, device=args.device),
                "text": generate(model, args.tokenizer, args.prompt, args.device)}


def slice_as_asked(args, model) -> tuple[PreTrainedModel, str]:
    """Slices by the paper's method or one beyond it. Returns what `standard` makes of the sliced model."""
    where, start = {"batch_size": args.batch_size, "device": args.device}, time.perf_counter()
    tokens = args.calibration_tokens
    if args.rotation == "block":
        slice_model(model, tokens, args.sparsity or 0, discard_variance=args.discard_variance, round_to=args.round_to,
                    signal=args.signal, head="full" if args.head == "full" else "sliced", **where)
    else:
        Q = shared_rotation(model, tokens, **where)[:, :directions(args.config, args.d, args.head)]
        if args.learn:
            Q = learn_rotation(model.to(args.device), tokens, Q, args.learn, seed=args.seed)
        rotate(model, Q, args.device)
    if args.head == "tied":
        tie_head(model, tokens)
    result = standard(model)
    args.slice_seconds = time.perf_counter() - start
    return result


def report(args, figures: dict):
    """Prints a column of figures for each model, and what the models wrote; and writes the file of --report."""
    values = {name: value for name, value in vars(args).items() if not name.endswith(("tokens", "config", "tokenizer"))}
    values |= {f"{name}_{key}": value for name, column in figures.items() for key, value in column.items()}
    values |= {"dimension": args.config.hidden_size, "peak_memory_bytes": peak_memory(args.device)}
    print(f"\n{args.model}\n  {'':14}" + "".join(f"{name:>17}" for name in figures))
    for key, form in {"dimension": "", "parameters": ",d", "perplexity": ".2f"}.items():
        print(f"  {key:14}" + "".join(f"{column[key]:>17{form}}" for column in figures.values()))
    print(f"  perplexity on {args.eval_samples} x {args.seqlen} tokens of {args.eval}")
    if "dense" in figures:
        print(f"  sliced in {args.slice_seconds:.1f} s, by {args.samples} x {args.seqlen} tokens of {args.calibration}")
    print(f"  peak memory {values['peak_memory_bytes'] / 2**30:.2f} GiB\n")
    for name, column in figures.items():
        print(textwrap.fill(f"{name}: {column['text']}", 118, initial_indent="  ", subsequent_indent="    "))
    if args.report:
        with failing(f"cannot save to {args.report}"):
            args.report.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")


@contextlib.contextmanager
def placed(model, device):
    """The model on `device`, for good if it fits there; else its weights come and go as needed (accelerate)."""
    if fits(model, device):
        model.to(device)
        yield
        return
    accelerate = optional("accelerate")
    accelerate.cpu_offload(model, device)
    try:
        yield
    finally:
        accelerate.hooks.remove_hook_from_submodules(model)
        model.tie_weights()  # on the way, a head that is tied became a parameter of its own


def fits(model, device) -> bool:
    """Whether a model is on the accelerator, or there is room for 1.2 times its size."""
    size = sum(weight.nbytes for weight in model.parameters())
    return device.type != "cuda" or model.device.type == "cuda" or 1.2 * size < torch.cuda.mem_get_info(device)[0]


def peak_memory(device) -> int:
    """The most bytes in use so far, on the accelerator, or else by this process, with the files that it has mapped."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resource = importlib.import_module("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(argv=None) -> int:
    """The exit code: 0, or 2 after one line on standard error for what the user can mend."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # what libraries tell each other
    transformers.logging.set_tqdm_hook(lambda factory, args, kwargs: progress(*args, **kwargs))
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):  # a console that lacks a character gets another
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        args = parse_arguments(argv)
        if dist.is_torchelastic_launched():
            dist.init_process_group()
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        run(args)
    except (SliceGPTError, torch.OutOfMemoryError) as error:
        print(f"slicegpt: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
