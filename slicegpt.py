"""SliceGPT in one file: compress a language model by deleting rows and columns of its weights.

Read it beside the paper: "SliceGPT: Compress Large Language Models by Deleting Rows and Columns" (Ashkboos, Croci,
Gennari do Nascimento, Hoefler, Hensman; ICLR 2024; arXiv 2401.15024). In three steps:

1. RMSNorm(X Q) Q^T = RMSNorm(X) for an orthogonal matrix Q (Eq. 2). So the signal between a transformer's blocks may
   be kept in any rotated basis: the weights that write it are multiplied by Q, those that read it by Q^T (Theorem 1).
2. In the basis of its principal components (Eq. 8), the signal is well approximated by its first d < D coordinates. So
   the last columns of the matrices that write it, and the last rows of those that read it, are deleted (Eq. 9).
3. Each block has its own principal components. So the residual connection is multiplied by a *shortcut* matrix, which
   takes the signal from the basis of one block to the basis of the next (Figure 4).

The paper's sections 2 and 3 come first, up to "Where an architecture keeps its parts": fuse a model (3.2), then rotate
it (3.1) by matrices Q that also slice it (3.3, 3.4). They call a few functions from below. What one must know of them:
`stages(model)` lists the steps X <- X + Z; `matrix` and `set_matrix` read and write a W; `embed` gives the first
signal; `check_slicing`, `become_sliced` and `rotations` check arguments, the model (and untie its head) and the Qs;
`take_shape` stores the new widths; `total` and `agreed` do nothing in a single process. All the rest can wait: the
table of architectures, the experiments of section 4, what goes beyond the paper, and what a program needs.

Unlike the authors' code, this slices the head, too, unless told otherwise; subtracts the mean in models with LayerNorms
only; adds no random rotation after PCA; and looks for Q on X Q Q^T in the network that is not sliced yet.

    name (shape)    what                                                                            in the paper
    D, d            width of the signal: dense (the embedding dimension), and sliced (D_small)      2, 3.4
    B, N, V         sequences of a batch, their length, size of the vocabulary                      2
    X (B, N, D)     the signal: written by one block and read by the next, a row for each token     2.1
    Z (B, N, D)     what a block adds to the signal; once sliced, both have d columns               Algorithm 1
    W_embd (V, D)   an embedding, of tokens or of positions; together they write the first signal   2.1
    W_in (D, ..)    a matrix of a block that reads the signal, such as W_q, W_k, W_v                2.1
    W_out (.., D)   the matrix of a block that writes to the signal                                 2.1
    W_head (D, V)   the head, which reads the last signal                                           2.1
    M (D, D)        I - 1 1^T / D, which subtracts each row's mean                                  Eq. 1
    C (D, D)        X^T X, summed over the calibration text; its eigenvectors are Q                 Eq. 8
    Q (D, d)        orthonormal columns; if d < D, it is the paper's Q times its deletion matrix,   3.1, Eq. 9
                    which the paper calls D, too
    stage           one step X <- X + Z of one block, or of both blocks of a parallel layer         Algorithm 1
                    (such as Phi-2's); stage(X) gives Z
    Q_in, Q_out     the Q of the signal before a stage, Q_{l-1}, and of the one after it, Q_l       Figure 4
    S (d_in, d_out) a shortcut, Q_in^T Q_out; d_in and d_out are the widths before and after        Figure 4
    reader, writer  a module that has a W_in or W_head; one that has a W_out or W_embd
    shape           config.slicegpt, once a model is fused: {dimensions: the width of each signal, shortcuts: bool;
                    tied: True, beyond the paper}

A weight W multiplies from the right, as in the paper: `matrix(module)` gives it so, in float64, though a Linear stores
the transpose. From Python, with transformers 5.24 or newer:

    model, tokenizer = load("facebook/opt-125m")
    calibration = tokenize(tokenizer, read_text("wikitext2", evaluation=False), seqlen=2048, samples=128, seed=0)
    slice_model(model, calibration, sparsity=0.25)
    save(model, tokenizer, "opt-125m-sliced")

and as a program:

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
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple
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

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
    raise ImportError(f"slicegpt.py needs transformers 5.24 or newer, and this is {transformers.__version__}")


class SliceGPTError(ValueError):
    """An error that the user can fix, said in one line."""


# a bar for what takes over two seconds; it is drawn every 20 s at most where the output is not a terminal
progress = partial(tqdm, delay=2, leave=False, mininterval=0.2 if sys.stderr.isatty() else 20)


# ---- 2.1 The network, with the shortcuts of Figure 4 ----------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / sqrt(|x|^2 / D + eps): Eq. 1's RMSNorm times sqrt(D); M, alpha and beta have moved into the weights (3.2).

    D is the dense width, whatever the width d of X (.., d): deleted dimensions count as zeros.
    """

    def __init__(self, D: int, eps: float):
        super().__init__()
        self.D, self.eps = D, eps

    def forward(self, X):
        # X / (|X|^2 / D + eps).sqrt(), by torch's fast norm, which divides by d instead of D:
        # |x|^2 / D + eps = kept (|x|^2 / d + eps / kept), where kept = d / D
        kept = X.shape[-1] / self.D
        return F.rms_norm(X, X.shape[-1:], eps=self.eps / kept) / math.sqrt(kept)


def sliced_layer(stages_of_layer: list, X: Tensor, *args, **kwargs) -> Tensor:
    """Algorithm 1 for one layer with shortcuts (Figure 4, section 3.3): X (B, N, d_in) to (B, N, d_out).

    The paper writes X <- Norm(X + Z). In real models the norm comes first, in line 4, and line 5 is X <- X + Z. There
    is no dropout on Z: it would depend on the basis. args and kwargs: masks, positions, caches. `take_shape` makes this
    the forward pass of Hugging Face's layer, whose own modules compute Z.
    """
    for stage in stages_of_layer:  # attention, then the FFN; or one stage with both
        # line 4: sigma(RMSNorm(X) W_in + b_in) W_out + b_out, or attention, by our norm and Hugging Face's modules
        Z = stage(X, *args, **kwargs)
        X = X @ stage.shortcut + Z  # line 5: S takes X to the basis of Z
    return X


# ---- 3.1 Computational invariance -----------------------------------------------------------------------------------

@torch.no_grad()
def rotate(model, Q: Tensor | Iterable[Tensor], device=None):
    """Theorem 1 and Figure 4: rotates the signal, in place. If Q is orthogonal, the model's outputs do not change.

    Q: one matrix (D, D) for all signals (Theorem 1), or one for each signal: the embedding's, then the one after every
    stage (Figure 4). Matrices with fewer columns slice (Eq. 9). device: where to compute, in float64; by default where
    the model is. Fuses the model if need be; a rotated model is rotated further. Raises SliceGPTError for a wrong
    number or shape of matrices.

    Q may be an iterator. Then the Q after a stage is taken just before that stage is rotated: two exist at a time, and
    `slice_model` can run the stage with its old weights to find it. After an error halfway, load the model again: it
    is refused.
    """
    fuse(model)
    Qs = rotations(model, Q, device)  # an iterator over the Q of each signal, in float64
    shortcuts = model.config.slicegpt["shortcuts"] or not isinstance(Q, Tensor)  # one Q needs none, as Q^T Q = I
    model.config.slicegpt = {}  # until `take_shape`: a model that an error leaves halfway is refused by `fuse`
    Q_in = next(Qs)  # (D, d)
    widths = [Q_in.shape[1]]
    for embedding in embeddings(model):
        rotate_writer(embedding, Q_in)  # Eq. 3
    for stage in stages(model):
        Q_out = next(Qs)
        for reader in stage.readers:
            rotate_reader(reader, Q_in)  # Eq. 4
        for writer in stage.writers:
            rotate_writer(writer, Q_out)  # Eq. 5, 6
        if shortcuts:
            rotate_shortcut(stage, Q_in, Q_out)  # Figure 4
        Q_in = Q_out
        widths.append(Q_out.shape[1])
    rotate_reader(model.get_output_embeddings(), Q_in)  # Eq. 7
    next(Qs, None)  # raises an error if there are too many
    take_shape(model, {"dimensions": widths, "shortcuts": shortcuts})


def rotate_writer(module, Q: Tensor):
    """Eq. 3, 5, 6: W_embd <- W_embd Q; W_out <- W_out Q; b_out <- b_out Q, as b_out is a row here, not a column."""
    b = getattr(module, "bias", None)
    set_matrix(module, matrix(module).to(Q) @ Q, None if b is None else b.to(Q) @ Q)


def rotate_reader(module, Q: Tensor):
    """Eq. 4 and 7: W_in <- Q^T W_in; W_head <- Q^T W_head; b_in and b_head stay."""
    set_matrix(module, Q.T @ matrix(module).to(Q))


def rotate_shortcut(stage, Q_in: Tensor, Q_out: Tensor):
    """Figure 4: S <- Q_in^T S Q_out (d_in, d_out); at first S is the identity."""
    S = stage.shortcut
    stage.set_shortcut(Q_in.T @ (Q_out if S is None else S.to(Q_out) @ Q_out))


# ---- 3.2 LayerNorm to RMSNorm ---------------------------------------------------------------------------------------

@torch.no_grad()
def fuse(model):
    """Section 3.2, Figure 3: turns every norm into an RMSNorm without scale, in place. The outputs do not change.

    By Eq. 1, LayerNorm(X) = RMSNorm(X M) diag(alpha) sqrt(D) + 1 beta^T; sqrt(D) stays, in our RMSNorm. diag(alpha) and
    beta move into the W_in after the norm, or into the head after the last norm; M into everything that writes the
    signal. A Hugging Face RMSNorm has only alpha. Arithmetic is in float64. A head that shares the embedding's matrix
    gets one of its own, as the two now differ. Sets the model to eval mode, and does nothing else to a fused one.
    Raises SliceGPTError, before a weight changes, if this file cannot slice such a model.
    """
    model.eval()
    if getattr(model.config, "slicegpt", None):  # then it is fused
        return
    become_sliced(model)  # checks that it can be; mixes SlicedForCausalLM into its class; unties its head
    parts, D = architecture(model.config), model.config.hidden_size
    norm = model.get_submodule(parts.norm)
    centre = subtracts_mean(norm)  # all norms of a model are of one kind
    if centre:
        for embedding in embeddings(model):
            centre_writer(embedding)
    for stage in stages(model):
        fuse_stage(stage, D, centre)
    fuse_reader(model.get_output_embeddings(), norm, parts.norm_offset)
    model.set_submodule(parts.norm, rmsnorm_like(norm, D))
    take_shape(model, {"dimensions": [D] * (1 + len(stages(model))), "shortcuts": False})


def fuse_stage(stage, D: int, centre: bool):
    """Figure 3 for one stage. Each of its blocks has a norm, which parallel blocks may share."""
    for path, norm, readers, writers in stage.of_each_block():
        for reader in readers:
            fuse_reader(reader, norm, stage.norm_offset)
        if centre:
            for writer in writers:
                centre_writer(writer)
        stage.layer.set_submodule(path, rmsnorm_like(norm, D))


def fuse_reader(module, norm, offset: float):
    """b_in <- b_in + beta W_in, then W_in <- diag(alpha) W_in; alpha is the norm's weight plus offset."""
    W, b = matrix(module), getattr(module, "bias", None)
    if getattr(norm, "bias", None) is not None:
        b = norm.bias.double() @ W + (0 if b is None else b)
    if getattr(norm, "weight", None) is not None:
        W = (norm.weight.double() + offset)[:, None] * W
    set_matrix(module, W, b)


def centre_writer(module):
    """W_embd <- W_embd M; W_out <- W_out M, b_out <- b_out M. (M itself is never made.)"""
    W, b = matrix(module), getattr(module, "bias", None)
    set_matrix(module, W - W.mean(-1, True), None if b is None else b.double() - b.double().mean(-1, True))


def subtracts_mean(norm) -> bool:
    """Whether a norm of Hugging Face's subtracts the mean, by its class's name: ..LayerNorm.. does, ..RMSNorm.. not."""
    return "LayerNorm" in type(norm).__name__


def rmsnorm_like(norm, D: int) -> RMSNorm:
    """Our RMSNorm with this norm's eps, which has two names; OLMo's norms have none, and use 1e-5."""
    return RMSNorm(D, getattr(norm, "eps", getattr(norm, "variance_epsilon", 1e-5)))


# ---- 3.3 A transformation per block ---------------------------------------------------------------------------------

@torch.no_grad()
def slice_model(model, calibration: Tensor, sparsity: float = 0.25, *, discard_variance: float | None = None,
                round_to: int = 8, signal: str = "input", head: str = "sliced", batch_size: int = 8, device=None):
    """Sections 3.3 and 3.4: slices a model in place and returns it; fuses it first, and sets it to eval mode.

    calibration: tokens (samples, N), int64.
    sparsity: the share of the D dimensions to delete, see `sliced_dimension`.
    discard_variance: instead of it, the share of each signal's variance to lose, see `dimension_by_variance`.
    round_to: the dimension is a multiple of it.
    signal: what Eq. 8 sums over: the RMSNorm's "input", as in the authors' code, or its "output", as in the text.
    head: "sliced", or "full", as in the authors' code: it reads all D dimensions.
    batch_size: sequences at a time.
    device: where to compute, with a layer or two there at a time; by default where the model is.

    Raises SliceGPTError for bad arguments, before anything changes; and for a signal that is not finite: then load the
    model again.
    """
    check_slicing(model.config, calibration, sparsity, discard_variance, round_to, signal, head, batch_size)
    if discard_variance is None:
        d = sliced_dimension(model.config.hidden_size, sparsity, round_to)
    device = device or model.device
    fuse(model)
    norm = model.get_submodule(architecture(model.config).norm)  # fused, all norms are alike
    observed = norm if signal == "output" else nn.Identity()

    def Qs():
        for stage, X in signals(model, calibration, batch_size, device):
            eigenvalues, Q = pca(covariance_of(X, observed, stage, batch_size, device))  # Eq. 8
            if stage is None and head == "full":  # the last signal
                columns = len(Q)
            elif discard_variance is None:
                columns = d
            else:
                columns = dimension_by_variance(eigenvalues, discard_variance, round_to)
            Q = Q[:, :columns].contiguous()  # Eq. 9: Q times the deletion matrix
            project(X, Q, batch_size, device)  # Eq. 9: what is left of X, which the stage (if not the head) reads
            yield Q

    rotate(model, Qs(), device)
    return model


def project(X: Tensor, Q: Tensor, batch_size: int, device):
    """X <- X Q Q^T, in place, for X (samples, N, D): what slicing leaves of the signal, in the old basis.

    Section 3.3 looks for Q after blocks that are sliced already. But no weight has to be sliced for that: on X Q Q^T,
    in the old basis, the fused stage does what the sliced one does on X Q. For |x Q| = |x Q Q^T|, and our RMSNorm
    divides both by D, so RMSNorm(X Q) Q^T = RMSNorm(X Q Q^T); and the shortcut takes X Q_in to X Q_in Q_in^T Q_out. So
    the next signal is X Q_in Q_in^T + Z in the one network, and the same times Q_out in the other.
    """
    projection = (Q @ Q.T).to(X.dtype)  # (D, D)
    for x in X.split(batch_size):
        x.copy_(x.to(device) @ projection)


def signals(model, calibration: Tensor, batch_size: int, device) -> Iterator[tuple]:
    """Algorithm 1 on the calibration tokens (samples, N): yields (stage, X) for every signal X (samples, N, D).

    The stage is the one that reads X next, or None for the last signal, which the head reads. Both may be changed
    before the next is asked for. X is in the CPU's memory; layers that are elsewhere are copied to the device.
    """
    X, stages_with_args = embed(model, calibration, batch_size)  # line 1; args are masks and the like
    for stage in progress(stages_with_args, "signals", unit="stage"):
        stage = stage.on(device)
        yield stage, X
        for x in X.split(batch_size):
            y = x.to(device)
            x.copy_(y + stage(y))  # lines 4 and 5, without a rotation
    yield None, X


def covariance_of(X: Tensor, observed, stage, batch_size: int, device) -> Tensor:
    """Eq. 8: C = sum_i X_i^T X_i (D, D) in float64, of observed(X), over all sequences i of X (samples, N, D).

    Under torchrun, the sequences are those of all processes. Raises SliceGPTError, with the stage, if C is not finite.
    """
    C = total(sum(covariance(observed(x.to(device))) for x in X.split(batch_size)))
    if not C.isfinite().all():
        raise SliceGPTError(f"the signal is not finite in front of {stage or 'the head'} ({X.dtype}); its type may be "
                            "too narrow, try --dtype float32")
    return C


def covariance(X: Tensor) -> Tensor:
    """X^T X (D, D) of one batch X (B, N, D): products in float32, unless X is in float64; the result in float64.

    For one batch that is enough; the sum over all batches, and the eigenvectors, need float64 (A.2).
    """
    X = at_least_float32(X.flatten(0, -2))
    return (X.T @ X).double()


def at_least_float32(X: Tensor) -> Tensor:
    return X.to(torch.promote_types(X.dtype, torch.float32))


def pca(C: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues (D,) of C (D, D), largest first, and its eigenvectors Q (D, D), in float64 (see A.2).

    Under torchrun, all processes get those of the first, as results may differ in the last bits.
    """
    eigenvalues, Q = torch.linalg.eigh(C.double())  # smallest first
    return agreed(eigenvalues.flip(0)), agreed(Q.flip(1))


# ---- 3.4 Slicing: how many dimensions to keep -----------------------------------------------------------------------
#
# The deletion itself is Q[:, :d], in `slice_model`: W_embd, W_in, W_out, W_head and S shrink because Q does.

def sliced_dimension(D: int, sparsity: float, round_to: int = 8) -> int:
    """d = (1 - sparsity) D, rounded down to a multiple of `round_to`, as in the authors' code; sparsity 0 keeps all D.

    Raises SliceGPTError for a sparsity outside of [0, 1), or if nothing is left.
    """
    if not 0 <= sparsity < 1:
        raise SliceGPTError(f"sparsity must be at least 0 and below 1, not {sparsity}")
    if sparsity == 0:
        return D
    d = int((1 - sparsity) * D + 1e-6) // round_to * round_to  # 1e-6, as (1 - 0.9) * 100 is 9.999999999999998
    if d == 0:
        raise SliceGPTError(f"sparsity {sparsity} leaves none of the {D} dimensions (in multiples of {round_to})")
    return d


def dimension_by_variance(eigenvalues: Tensor, discarded: float, round_to: int = 8) -> int:
    """A.4: the least multiple of `round_to` (D, if that is less) that discards at most this share of the variance."""
    lost = 1 - eigenvalues.cumsum(0) / eigenvalues.sum()  # by keeping 1, 2, .. dimensions
    needed = 1 + int((lost > discarded).sum())
    return min(len(eigenvalues), math.ceil(needed / round_to) * round_to)


# ---- Where an architecture keeps its parts --------------------------------------------------------------------------
#
# To add a family, give it a row in ARCHITECTURES; `check_row` refuses a wrong one. How Hugging Face names the modules
# of a model is known here, and hardly anywhere else.

@dataclass(frozen=True)
class Block:
    """One attention or one FFN, as paths in its layer; where there are several, they are separated by spaces."""
    norm: str  # the norm in front of it
    modules: str  # applied one after the other to what the norm gives, they give Z
    W_in: str  # all matrices that read what the norm gives; a path with a ? is used if the layer has it
    W_out: str  # all matrices that write Z
    attention: bool = False  # then its module takes masks, positions and caches, too


@dataclass(frozen=True)
class Architecture:
    """Paths in a model, and the blocks of a layer."""
    embeddings: str  # all that add up to the first signal
    layers: str
    norm: str  # the last
    attention: Block
    ffn: Block
    parallel: bool = False  # both blocks read the same signal; a config's use_parallel_residual overrides this
    norm_offset: float = 0.0  # alpha is a norm's weight plus this
    one_width: bool = False  # all signals must have one width, as code of the model or of its experts assumes it
    mean_free: bool = False  # `standard` can write it, though it has LayerNorms, with a signal of mean 0


LLAMA = Architecture(
    embeddings="model.embed_tokens", layers="model.layers", norm="model.norm",
    attention=Block(norm="input_layernorm", modules="self_attn", attention=True,
                    W_in="self_attn.q_proj self_attn.k_proj self_attn.v_proj", W_out="self_attn.o_proj"),
    ffn=Block(norm="post_attention_layernorm", modules="mlp",
              W_in="mlp.gate_proj mlp.up_proj", W_out="mlp.down_proj"))

UNGATED = replace(LLAMA, ffn=replace(LLAMA.ffn, W_in="mlp.up_proj"))
MIXTURE = replace(LLAMA, one_width=True, ffn=Block(
    "post_attention_layernorm", "mlp",
    "?mlp.gate_proj ?mlp.up_proj "  # a plain FFN, in some layers
    "?mlp.gate ?mlp.gate.wg ?mlp.router "  # whichever name the router has
    "?mlp.experts.gate_up_proj "  # of all experts
    "?mlp.shared_expert.gate_proj ?mlp.shared_expert.up_proj ?mlp.shared_expert_gate "  # three names of shared experts
    "?mlp.shared_experts.gate_proj ?mlp.shared_experts.up_proj ?mlp.shared_mlp.gate_proj ?mlp.shared_mlp.up_proj",
    "?mlp.down_proj ?mlp.experts.down_proj ?mlp.shared_expert.down_proj ?mlp.shared_experts.down_proj "
    "?mlp.shared_mlp.down_proj"))
LATENT = replace(MIXTURE, attention=replace(  # attention through a latent, DeepSeek's
    LLAMA.attention, W_in="?self_attn.q_proj ?self_attn.q_a_proj self_attn.kv_a_proj_with_mqa"))

COHERE = replace(LLAMA, ffn=replace(LLAMA.ffn, norm="input_layernorm"), parallel=True, mean_free=True)
OPT = Architecture(
    "model.decoder.embed_tokens model.decoder.embed_positions", "model.decoder.layers",
    "model.decoder.final_layer_norm",
    replace(LLAMA.attention, norm="self_attn_layer_norm", W_out="self_attn.out_proj"),
    Block("final_layer_norm", "fc1 activation_fn fc2", "fc1", "fc2"))
GPTJ = Architecture(
    "transformer.wte", "transformer.h", "transformer.ln_f",
    Block("ln_1", "attn", "attn.q_proj attn.k_proj attn.v_proj", "attn.out_proj", attention=True),
    Block("ln_1", "mlp", "mlp.fc_in", "mlp.fc_out"), parallel=True)

ARCHITECTURES = {  # by the config's model_type; the tests draw networks of each
    "opt": OPT,
    "gpt2": Architecture(
        "transformer.wte transformer.wpe", "transformer.h", "transformer.ln_f",
        Block("ln_1", "attn", "attn.c_attn", "attn.c_proj", attention=True),
        Block("ln_2", "mlp", "mlp.c_fc", "mlp.c_proj"), one_width=True),
    **dict.fromkeys("llama mistral ministral ministral3 qwen2 qwen3 smollm3 seed_oss helium ernie4_5 hunyuan_v1_dense "
                    "granite stablelm exaone internlm3 cwm".split(), LLAMA),
    "olmo": replace(LLAMA, mean_free=True),
    "arcee": UNGATED, "jais2": replace(UNGATED, mean_free=True),
    "starcoder2": replace(LLAMA, ffn=replace(LLAMA.ffn, W_in="mlp.c_fc", W_out="mlp.c_proj"), mean_free=True),
    "nemotron": replace(UNGATED, norm_offset=1.0, mean_free=True),
    "gemma": replace(LLAMA, norm_offset=1.0),
    "phi": Architecture(
        "model.embed_tokens", "model.layers", "model.final_layernorm",
        replace(LLAMA.attention, W_out="self_attn.dense"),
        Block("input_layernorm", "mlp", "mlp.fc1", "mlp.fc2"), parallel=True, mean_free=True),
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
    get, family = vars(config).get, config.model_type
    reasons = [reason for holds, reason in [
        (get("is_encoder_decoder"), "it is an encoder-decoder"),
        (get("add_cross_attention"), "it has cross-attention"),
        (family == "stablelm" and get("use_parallel_residual"), "its blocks are parallel"),  # with norms of their own
        (get("_remove_final_layer_norm"), "it has no last norm"),
        (get("quantization_config") and not get("slicegpt"),
         "its weights are quantised (slice the original and quantise the result)"),
        (get("do_layer_norm_before") is False,
         "it normalises after its blocks (post-norm), and such a signal cannot be rotated"),
        (get("word_embed_proj_dim") not in (None, get("hidden_size")), "its embedding is projected"),
        (family not in ARCHITECTURES, "its architecture is not known here")] if holds]
    if reasons:
        raise SliceGPTError(f"cannot slice a {family} model like this: {', and '.join(reasons)}. "
                            f"Can be sliced: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[family]


# ---- Stages, and their weights --------------------------------------------------------------------------------------

class BlockModules(NamedTuple):
    """The modules of a block, as they are now."""
    path: str  # of its norm, in the layer
    norm: nn.Module
    readers: list
    writers: list


@dataclass(frozen=True)
class Stage:
    """One step X <- X + Z: a block of a layer, or its parallel blocks."""
    layer: nn.Module
    number: int  # of the layer
    blocks: tuple[Block, ...]
    shortcut_name: str  # of the layer's parameter that holds S, made by `rotate`
    norm_offset: float  # see Architecture
    multiplier: float  # Z is multiplied by it: Granite's residual_multiplier, else 1
    args: tuple = ()  # masks and the like, for calibration, where `embed` records them; else they come with the call
    kwargs: dict = field(default_factory=dict)

    def __call__(self, X: Tensor, *args, **kwargs) -> Tensor:
        """Algorithm 1, line 4: Z (B, N, d_out) of the signal X (B, N, d_in); of parallel blocks, the sum."""
        # each norm once, as parallel blocks may share it; in a fixed order, so that gradients are the same to the bit
        paths = dict.fromkeys(block.norm for block in self.blocks)
        normalised = {path: self.layer.get_submodule(path)(X) for path in paths}
        Z_of_blocks = []
        for block in self.blocks:
            Z = normalised[block.norm]
            for module in submodules(self.layer, block.modules):
                Z = module(Z, *self.args, *args, **self.kwargs, **kwargs) if block.attention else module(Z)
                Z = Z[0] if isinstance(Z, tuple) else Z  # attention gives its weights, too
            Z_of_blocks.append(Z)
        Z = sum(Z_of_blocks[1:], Z_of_blocks[0])
        return Z if self.multiplier == 1 else self.multiplier * Z

    def of_each_block(self) -> list[BlockModules]:
        return [BlockModules(block.norm, self.layer.get_submodule(block.norm), submodules(self.layer, block.W_in),
                             submodules(self.layer, block.W_out)) for block in self.blocks]

    @property
    def readers(self) -> list:
        return [reader for block in self.of_each_block() for reader in block.readers]

    @property
    def writers(self) -> list:
        return [writer for block in self.of_each_block() for writer in block.writers]

    @property
    def shortcut(self) -> Tensor | None:
        """S (d_in, d_out); None for the identity."""
        return getattr(self.layer, self.shortcut_name, None)

    def set_shortcut(self, S: Tensor):
        trained = any(W.requires_grad for W in self.layer.parameters())
        setattr(self.layer, self.shortcut_name, nn.Parameter(stored(S, like=self.writers[0].weight), trained))

    def __str__(self):
        return f"layer {self.number}, {self.blocks[0].modules}"

    def on(self, device):
        """This stage with its layer and args on the device: itself, if the layer is there, or else a copy."""
        device = torch.empty(0, device=device).device  # cuda is cuda:0
        return self if self.writers[0].weight.device == device else self.copied(device)

    def copied(self, device: torch.device, dtype: torch.dtype | None = None):
        """This stage with a copy of its layer on the device, and its args; in this dtype, if one is given."""
        def moved(a):
            return a.to(device, dtype if a.is_floating_point() else None) if isinstance(a, Tensor) else a

        # deepcopy takes what it finds in its memo, so each tensor goes to the device without another copy. One that is
        # there, in that type, is the same in both; but nothing that works on copies writes into a weight in place
        memo = {id(W): nn.Parameter(moved(W.detach()), W.requires_grad) for W in self.layer.parameters()}
        layer = copy.deepcopy(self.layer, memo | {id(b): moved(b) for b in self.layer.buffers()})
        args, kwargs = tree_map(moved, (self.args, self.kwargs))
        return replace(self, layer=layer, args=args, kwargs=kwargs)


def stages_by_layer(model) -> list[list[Stage]]:
    """For each layer: attention, then FFN; or one stage with both, if they are parallel."""
    parts = architecture(model.config)
    if getattr(model.config, "use_parallel_residual", parts.parallel):
        of_a_layer = {"shortcut": (parts.attention, parts.ffn)}
    else:
        of_a_layer = {"attention_shortcut": (parts.attention,), "mlp_shortcut": (parts.ffn,)}
    return [[Stage(layer, number, blocks, shortcut_name, parts.norm_offset, getattr(layer, "residual_multiplier", 1.0))
             for shortcut_name, blocks in of_a_layer.items()] for number, layer in enumerate(layers(model))]


def stages(model) -> list[Stage]:
    """All stages, in the order in which the signal meets them."""
    return [stage for stages_of_layer in stages_by_layer(model) for stage in stages_of_layer]


def layers(model) -> nn.ModuleList:
    return model.get_submodule(architecture(model.config).layers)


def embeddings(model) -> list:
    """The modules that have a W_embd."""
    return submodules(model, architecture(model.config).embeddings)


def submodules(module, paths: str) -> list:
    """The modules at these paths; an optional one (?) is left out if it does not exist, or has no weight.

    If there is a parameter (experts, .., ..) at a path, that stands for an `Expert` for each of them.
    """
    found = []
    for path in paths.split():
        optional, path = path[0] == "?", path.lstrip("?")
        owner, _, name = path.rpartition(".")
        try:
            part = attrgetter(path)(module)
        except AttributeError:
            if not optional:
                raise
            continue
        if isinstance(part, nn.Parameter):
            found += [Expert(module.get_submodule(owner), name, number) for number in range(len(part))]
        elif not optional or hasattr(part, "weight"):
            found.append(part)
    return found


class Expert:
    """One expert of a mixture, as if it were a module: its weight and bias are rows of all experts' parameters.

    They are rows of the parameters as they were when this was made, also after a `store`.
    """

    def __init__(self, module, name: str, number: int):
        self.number, self.of_all = number, (getattr(module, name), getattr(module, f"{name}_bias", None))
        self.weight, self.bias = (None if rows is None else rows.data[number] for rows in self.of_all)
        self.transposed = getattr(module, "is_transposed", False)

    def store(self, *weight_and_bias):
        """Sets weight and bias, of any shape. To be called for all experts, in order: expert 0 makes room for all."""
        for rows, row in zip(self.of_all, weight_and_bias):
            if row is not None:
                if self.number == 0:
                    rows.data = stored(row.expand(len(rows), *row.shape), like=rows)
                    rows.grad = None
                rows.data[self.number] = row


def matrix(module) -> Tensor:
    """W (inputs, outputs) in float64: of an embedding, a Conv1D (GPT-2), or a Linear, which stores its transpose."""
    return as_stored(module, module.weight.detach().double())


def as_stored(module, W: Tensor) -> Tensor:
    """The transpose of W, if the module stores that; its own inverse."""
    as_it_is = isinstance(module, (nn.Embedding, Conv1D)) or getattr(module, "transposed", False)
    return W if as_it_is else W.T


def set_matrix(module, W: Tensor, b: Tensor | None = None):
    """The inverse of `matrix`: W of any shape, in the dtype of the old weight. b (outputs): a new bias, if any.

    The weight stays the same parameter. Without b, the bias stays.
    """
    if isinstance(module, Expert):
        module.store(as_stored(module, W), b)
        return
    inputs, outputs = W.shape
    if isinstance(module, nn.Embedding):
        module.embedding_dim = outputs
    elif isinstance(module, Conv1D):
        module.nx, module.nf = inputs, outputs
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = inputs, outputs
    if b is not None:
        module.bias = nn.Parameter(stored(b, like=module.weight), module.weight.requires_grad)
    module.weight.data = stored(as_stored(module, W), like=module.weight)
    module.weight.grad = None


@contextlib.contextmanager
def replaced_layers(model, forward):
    """Inside, each layer computes forward(layer, X, *args, **kwargs) instead of its own forward pass."""
    with contextlib.ExitStack() as patches:
        for layer in layers(model):
            # afterwards, patch puts back a forward pass that was the layer's own: with shortcuts, or accelerate's
            patches.enter_context(patch.object(layer, "forward", partial(forward, layer)))
        yield


@torch.no_grad()
def embed(model, tokens: Tensor, batch_size: int = 8) -> tuple[Tensor, list[Stage]]:
    """Algorithm 1, line 1: the signal X (samples, N, D) of tokens (samples, N), on the CPU; and all stages, with args.

    For a model whose signal has all D dimensions. Its own forward pass runs, but its layers only pass X on, and record
    what else they get, such as masks.
    """
    calls = []  # of each layer

    def record(_, X, *args, **kwargs):
        calls.append((X, {"args": args, "kwargs": kwargs}))
        return X

    X = allocate((*tokens.shape, model.config.hidden_size), model.dtype)
    with replaced_layers(model, record):
        for x, batch in zip(X.split(batch_size), tokens.split(batch_size)):
            model.base_model(batch.to(model.device), use_cache=False)
            x.copy_(calls[0][0])
            calls.clear()
        model.base_model(tokens[:1].to(model.device), use_cache=False)  # its masks go with batches of any size
    return X, [replace(stage, **calls[stage.number][1]) for stage in stages(model)]


def rotations(model, Q, device) -> Iterator[Tensor]:
    """For `rotate`: the Q of each signal, in float64.

    Raises SliceGPTError for a wrong number or shape of matrices: at once, unless Q is an iterator.
    """
    if model.config.slicegpt.get("tied"):  # beyond the paper, see `tie_head`
        raise SliceGPTError("its head is tied to its embedding: rotate it before `tie_head`")
    if hasattr(model.config, "quantization_config"):
        raise SliceGPTError("its weights are quantised: rotate it before")
    widths = model.config.slicegpt["dimensions"]
    wrong = SliceGPTError(f"this model's rotations have {widths} rows, and are matrices of finite real numbers")
    Qs = [Q] * len(widths) if isinstance(Q, Tensor) else Q
    if not isinstance(Qs, Iterator):
        Qs = list(Qs) if isinstance(Qs, Iterable) else [Qs]
        if len(Qs) != len(widths) or not all(map(is_rotation, Qs, widths)):
            raise wrong
        check_width(model.config, len({Q_of_signal.shape[1] for Q_of_signal in Qs}) == 1)

    def checked():
        remaining = iter(Qs)
        for width in widths:
            Q_of_signal = next(remaining, None)
            if not is_rotation(Q_of_signal, width):
                raise wrong
            yield Q_of_signal.to(device or model.device, torch.float64)
        if next(remaining, None) is not None:
            raise wrong

    return checked()


def is_rotation(Q, rows: int) -> bool:
    """Whether Q is a real matrix with so many rows, at least one column and finite entries."""
    return (isinstance(Q, Tensor) and Q.dim() == 2 and len(Q) == rows and Q.shape[1] > 0 and Q.is_floating_point()
            and (Q.is_meta or bool(Q.isfinite().all())))


def take_shape(model, shape: dict):
    """Stores the shape in the config, and makes the layers fit to it; see `SlicedForCausalLM`.

    Layers with shortcuts get `sliced_layer` as their forward pass. Experts reshape by an attribute that holds the width
    of the signal, and has one of three names.
    """
    check_width(model.config, len(set(shape["dimensions"])) == 1)
    model.config.slicegpt = shape
    ungroup_experts_if_need_be(model, shape["dimensions"][0])
    if shape["shortcuts"]:
        for stages_of_layer in stages_by_layer(model):
            stages_of_layer[0].layer.forward = partial(sliced_layer, stages_of_layer)
    for stage, width in zip(stages(model), shape["dimensions"]):  # the last width is the head's
        for block in stage.blocks:
            if block.attention:
                continue
            for module in stage.layer.get_submodule(block.modules.split()[0]).modules():
                for name in {"hidden_dim", "hidden_size", "input_size"} & vars(module).keys():
                    setattr(module, name, width)


def ungroup_experts_if_need_be(model, width: int):
    """Sets one product for each expert, where torch has none for all: in float64, and unless rows have n x 16 bytes."""
    if model.dtype == torch.float64 or width * model.dtype.itemsize % 16:
        model.config._experts_implementation = "eager"


# ---- Checks ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def check_row(model):
    """Raises SliceGPTError if a dense model computes something else than its row in the table says.

    A class that only looks like one of the table, or one that has changed, is found out here, before a weight changes.
    The signal X of random tokens is given to every layer, and to the head. Medians over the tokens are compared, as
    rounding may send a few to another expert.
    """
    if model.device.type == "meta":  # without values
        return
    tokens = torch.randint(model.config.vocab_size, (1, min(16, positions(model.config))),
                           generator=torch.Generator().manual_seed(0))
    X, stages_with_args = embed(model, tokens)
    right = head_reads_last_norm(model, tokens, X)
    for _, stages_of_layer in itertools.groupby(stages_with_args, attrgetter("number")):
        right = right and layer_is_its_stages([*stages_of_layer], X)
    if not right:
        finite = all(W.isfinite().all() for W in model.parameters())
        reason = "fused, it computes something else than before" if finite else "its weights are not finite"
        raise SliceGPTError(f"cannot slice a {model.config.model_type} like this: {reason}")


def head_reads_last_norm(model, tokens: Tensor, X: Tensor) -> bool:
    """Whether the head reads what the last norm gives, up to a factor; of X, the tokens' first signal."""
    read = []
    head, norm = model.get_output_embeddings(), model.get_submodule(architecture(model.config).norm)
    with replaced_layers(model, lambda _, X, *args, **kwargs: X), head.register_forward_pre_hook(
            lambda _, inputs: read.append(inputs[0])):
        model(tokens.to(model.device), use_cache=False)
    cosines = F.cosine_similarity(norm(X.to(model.device)).double(), read[0].double(), dim=-1)
    return cosines.median() > 0.99


def layer_is_its_stages(stages_of_layer: list[Stage], X: Tensor) -> bool:
    """Whether a dense layer computes of X what a fused copy of it does, by its stages.

    Both compute in float32 at least, as rounding to a narrow type would hide differences: the errors of right models
    are some 1e-6 of what the layer adds, those of wrong ones 1e-2 or more.
    """
    first, dtype = stages_of_layer[0], torch.promote_types(X.dtype, torch.float32)
    device = first.writers[0].weight.device
    first = first.copied(device, dtype)
    centre = subtracts_mean(first.of_each_block()[0].norm)

    def centred(X):
        return X - X.mean(-1, True) if centre else X

    X = centred(X.to(device, dtype))
    expected, found = centred(first.layer(X, *first.args, **first.kwargs)), X
    for stage in [replace(first, blocks=stage.blocks) for stage in stages_of_layer]:
        fuse_stage(stage, X.shape[-1], centre)
        found = found + stage(found)
    error, added = (found - expected).norm(dim=-1), (expected - X).norm(dim=-1)
    return error.median() <= 1e-3 * added.median()


def check_whole(config):
    """Raises SliceGPTError if the model has no shape, which `take_shape` stores in the end."""
    if getattr(config, "slicegpt", None) == {}:
        raise SliceGPTError("an error left it half fused or half rotated: load it again")


def check_tokens(config, tokens: Tensor):
    """Raises SliceGPTError if these are no tokens (samples, N), int64, or such a model cannot take them."""
    check_whole(config)
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.dtype != torch.int64:
        found = f"{tokens.dtype} of shape {(*tokens.shape,)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise SliceGPTError(f"tokens must be a tensor of int64, of shape (samples, N), and not {found}")
    if tokens.numel() == 0:
        raise SliceGPTError("there are no tokens")
    if tokens.shape[1] > positions(config):
        raise SliceGPTError(f"sequences of {tokens.shape[1]} tokens are longer than the model's {positions(config)} "
                            "positions")
    for token in (tokens.min(), tokens.max()):
        if not 0 <= token < config.vocab_size:
            raise SliceGPTError(f"the model knows {config.vocab_size} tokens, and there is a token {token}; is the "
                                "tokenizer another model's?")


def check_positive(**values: int):
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise SliceGPTError(f"{name} must be at least 1, not {value}, and an integer")


def check_sliceable(config, calibration: Tensor):
    """Raises SliceGPTError if such a model cannot be sliced by such tokens."""
    check_tokens(config, calibration)
    shape = getattr(config, "slicegpt", None)
    if shape and (shape["shortcuts"] or shape.get("tied") or min(shape["dimensions"]) < config.hidden_size):
        raise SliceGPTError(f"sliced already: {min(shape['dimensions'])} of {config.hidden_size} dimensions")


def check_slicing(config, calibration, sparsity, discard_variance, round_to, signal, head, batch_size):
    """Raises SliceGPTError for arguments of `slice_model` that are wrong."""
    if signal not in ("input", "output") or head not in ("sliced", "full"):
        raise SliceGPTError(f"signal is input or output and head is sliced or full, not {signal} and {head}")
    if discard_variance is not None and not 0 <= discard_variance < 1:
        raise SliceGPTError(f"discard_variance must be at least 0 and below 1, not {discard_variance}")
    check_positive(round_to=round_to, batch_size=batch_size)
    check_sliceable(config, calibration)
    check_width(config, discard_variance is None and (head == "sliced" or sparsity == 0))


def check_width(config, widths_equal: bool):
    if architecture(config).one_width and not widths_equal:
        raise SliceGPTError(f"a {config.model_type}'s last signal must be as wide as its first, and all others: it can "
                            "have neither a full head nor dimensions chosen by variance")


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

    A file, which is read as a whole for both, is a UTF-8 text, or a .json, .jsonl, .csv or .parquet with a column
    `text`, which may be compressed (.gz).

    Of a data set without a test split, random 80% are for calibration and 10% for evaluation, always the same, as in
    the authors' code. pydoc is the language reference that ships with CPython; a tenth of it is kept for evaluation.
    """
    if name == "pydoc":
        topics = importlib.import_module("pydoc_data.topics").topics
        return "\n\n".join(topics[key] for i, key in enumerate(sorted(topics)) if (i % 10 == 0) == evaluation)
    suffixes = [suffix for suffix in Path(name.lower()).suffixes if suffix not in (".gz", ".bz2", ".xz", ".zst")]
    formats = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
    columns_in = formats.get(suffixes[-1]) if suffixes else None
    with failing(f"cannot read the text {name}", "besides text files there are pydoc and, from the hub, "
                 f"{' and '.join(HUB_TEXTS)}"):
        if name in HUB_TEXTS:
            splits = optional("datasets").load_dataset(*HUB_TEXTS[name])
            if "test" not in splits:
                parts = splits["train"].train_test_split(0.2, seed=42)
                splits = {"train": parts["train"], "test": parts["test"].train_test_split(0.5, seed=42)["test"]}
            rows = splits["test" if evaluation else "train"]
        elif columns_in and Path(name).is_file():
            rows = optional("datasets").load_dataset(columns_in, data_files=glob.escape(name), split="train")
        else:
            return Path(name).read_text(encoding="utf-8")
        return "\n\n".join(text or "" for text in rows["text"])


def tokenize(tokenizer, text: str, seqlen: int, samples: int | None = None, seed: int | None = None) -> Tensor:
    """A text in pieces, tokens (samples, seqlen), int64: the first `samples`, or random ones if there is a seed."""
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
    """Section 4: exp of the mean negative log likelihood (in nats) of all tokens (samples, seqlen) but each first one.

    Sets the model to eval mode. batch_size: sequences at a time; by default some 4096 tokens, as logits are large.
    """
    check_tokens(model.config, tokens)
    if tokens.shape[1] < 2:
        raise SliceGPTError("perplexity needs sequences of at least 2 tokens")
    if batch_size is not None:
        check_positive(batch_size=batch_size)
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
    ours = transformers.GenerationConfig(max_length=length, do_sample=False, eos_token_id=tokenizer.eos_token_id,
                                         pad_token_id=tokenizer.eos_token_id)
    with failing(f"cannot continue the prompt {prompt!r}"), patch.object(model, "generation_config", ours):
        if length > tokens.shape[1]:
            tokens = model.generate(tokens, attention_mask=torch.ones_like(tokens))
        return tokenizer.decode(tokens[0], skip_special_tokens=True)


def own_text(model, tokenizer, samples: int, seqlen: int, seed: int = 0, device=None) -> Tensor:
    """Beyond the paper: what the model itself writes, tokens (samples, seqlen), int64, to calibrate on.

    A sequence begins as texts do in training: with <|endoftext|>, which separates them, if the tokenizer has it (a chat
    model's other special tokens begin chats); else with its token for the beginning of a text, or for the end. All
    others are drawn under the seed from what the model predicts, at temperature 1, with nothing cut off; none ends
    early. Sets the model to eval mode. Raises SliceGPTError for a tokenizer without these tokens.
    """
    separator = tokenizer.get_vocab().get("<|endoftext|>")
    candidates = [separator, tokenizer.bos_token_id, tokenizer.eos_token_id]
    first = next((token for token in candidates if token is not None), None)
    if first is None:
        raise SliceGPTError("the tokenizer has no token with which a text of the model's own could begin")
    check_positive(samples=samples, seqlen=seqlen)
    texts = torch.full((samples, seqlen), first)
    check_tokens(model.config, texts)
    ours = transformers.GenerationConfig(max_length=seqlen, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                         pad_token_id=first)  # no eos_token_id: it is a token like others
    model.eval()
    with torch.random.fork_rng(), failing("the model cannot write a text"), patch.object(
            model, "generation_config", ours), progress(total=texts.numel(), desc="own text", unit="token") as bar:
        torch.manual_seed(seed)
        bar.put, bar.end = lambda tokens: bar.update(tokens.numel()), lambda: None  # it is a streamer
        for text in texts.split(max(1, 16384 // seqlen)):  # no more at a time, as caches are large
            beginning = text[:, :1].to(device or model.device)
            text.copy_(model.generate(beginning, attention_mask=torch.ones_like(beginning), streamer=bar))
    return texts


def parameters(model) -> int:
    """The number of parameters, each tensor counted once: a head tied to the embedding is no second matrix."""
    return sum(parameter.numel() for parameter in model.parameters())


def descend(weights: list, batches, loss_of, learning_rate: float, label: str):
    """Minimises loss_of(batch) by AdamW, a step for every batch; on a GPU and for 16-bit weights, in bfloat16.

    The learning rate rises for three tenths of the steps and then falls, linearly. Raises SliceGPTError for a loss that
    is not finite, before that step.
    """
    optimizer = torch.optim.AdamW(weights, learning_rate)
    steps, device = len(batches), weights[0].device.type
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / (0.3 * steps), (steps - i) / (0.7 * steps)))
    bar = progress(batches, label, unit="step")
    for batch in bar:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda" or weights[0].dtype.itemsize == 2):
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
    """Section 4, Figure 6, recovery fine-tuning (RFT): trains LoRA adapters, one epoch over the tokens (samples, N).

    r = 32, alpha = 10, and peft's defaults for the rest, as in the paper; an architecture for which peft has no default
    gets adapters on the W_in of attention. In the end they are merged into the weights, in place. If the loss is not
    finite, SliceGPTError is raised, and the weights stay what they were.
    """
    check_tokens(model.config, tokens)
    check_positive(batch_size=batch_size)
    peft, parts = optional("peft"), architecture(model.config)
    targets = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
    targets = targets or [path.rpartition(".")[2] for path in parts.attention.W_in.split()]
    with torch.random.fork_rng(), frozen(model):  # but for the adapters, which are new
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=32, lora_alpha=10, target_modules=targets))
        if model.device.type == "cuda":
            model.activation_checkpointing_enable({"use_reentrant": False})
        try:
            train(adapted, tokens.split(batch_size), learning_rate, "recovery fine-tuning")
            with uninterrupted():
                adapted.merge_and_unload()
        finally:
            adapted.unload()  # after an error; it does nothing after merging
            model.activation_checkpointing_disable()
            model.eval()


@contextlib.contextmanager
def frozen(model):
    """Inside, no parameter that the model has now is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


# ---- Beyond the paper -----------------------------------------------------------------------------------------------
#
# One rotation for all blocks, which needs no shortcuts and can be learned from what the dense network predicts; a head
# that shares the embedding's matrix; sliced models that load without any code of ours.

@torch.no_grad()
def shared_rotation(model, calibration: Tensor, *, batch_size: int = 8, device=None) -> Tensor:
    """One Q (D, D) for the whole network, in float64: `rotate(model, Q[:, :d])` slices with it, without shortcuts.

    Its columns are the eigenvectors of a sum over all signals X of the *dense* network: the covariance of RMSNorm(X),
    which the blocks read, and 0.3 times that of X, which they add to, each divided by its trace, so that every signal
    counts the same. (0.3 was found by trial.) Fuses the model, and sets it to eval mode. Raises SliceGPTError for a
    signal that is not finite.
    """
    check_positive(batch_size=batch_size)
    check_sliceable(model.config, calibration)
    device = device or model.device
    fuse(model)
    norm = model.get_submodule(architecture(model.config).norm)  # fused, all norms are alike
    C = 0
    for stage, X in signals(model, calibration, batch_size, device):
        read = covariance_of(X, norm, stage, batch_size, device)
        written = covariance_of(X, nn.Identity(), stage, batch_size, device)
        C = C + (read / read.trace() + 0.3 * written / written.trace())
    return pca(C)[1]


def learn_rotation(model, calibration: Tensor, Q: Tensor, steps: int, *, learning_rate: float | None = None,
                   batch_size: int = 4, seed: int = 0) -> Tensor:
    """A Q (D, d) with orthonormal columns, in float64, that costs the network's output less than the one it starts at.

    Theorem 1 leaves Q free. Here it is chosen by what the sliced network predicts, not by variance. The cost is the
    cross entropy, in nats a token, of the sliced network's next-token distributions with 0.8 p + 0.2 t: p is what the
    dense network predicts, t the token that follows in the text. Q is the orthogonal factor (QR) of Q_0 + K T, where
    K (D, D - d) spans what Q_0 leaves out, and T (D - d, d) is learned, from 0.

    A step takes `batch_size` sequences of up to 256 of the calibration tokens, random ones under the seed.
    learning_rate: by default in proportion to the entries of a Q. Memory: what all layers compute of a step's tokens.
    Fuses the model, and sets it to eval mode; its weights do not change. Raises SliceGPTError for a cost that is not
    finite.
    """
    check_positive(steps=steps, batch_size=batch_size)
    check_sliceable(model.config, calibration)
    if not is_rotation(Q, model.config.hidden_size):
        raise SliceGPTError(f"Q must be a matrix with {model.config.hidden_size} rows, of finite real numbers")
    fuse(model)
    calibration = all_samples(calibration)
    length = min(256, calibration.shape[1])
    pieces = calibration[:, :calibration.shape[1] // length * length].reshape(-1, length)
    generator = torch.Generator().manual_seed(seed)
    first, *batches = (pieces[torch.randint(len(pieces), (batch_size,), generator=generator)] for _ in range(steps + 1))
    Q_0 = agreed(Q).double().to(model.device)
    K = agreed(torch.linalg.qr(Q_0, mode="complete").Q[:, Q.shape[1]:])
    T = torch.zeros(K.shape[1], Q.shape[1], dtype=torch.promote_types(model.dtype, torch.float32), device=model.device)
    T.requires_grad_().register_hook(total)

    def cost(batch, scale):  # of the columns of T
        tokens = share(batch).to(model.device)
        with torch.no_grad():
            expected = at_least_float32(model(tokens, use_cache=False).logits).softmax(-1).mul_(0.8)
            expected[:, :-1].scatter_(-1, tokens[:, 1:, None], 0.2, reduce="add")  # nothing follows the last token
        with torch.autocast(T.device.type, enabled=False):
            Q = torch.linalg.qr(Q_0.to(T) + K.to(T) @ (T * scale)).Q
        with projected(model, Q):
            found = at_least_float32(model(tokens, use_cache=False).logits.flatten(0, 1))
        return F.cross_entropy(found, expected.flatten(0, 1), reduction="sum") / total(torch.ones_like(tokens).sum())

    with frozen(model):
        # along a strong signal small turns do harm: a column whose first gradient is above the median moves less
        gradients = torch.autograd.grad(cost(first, 1.0), T)[0].norm(dim=0).clamp_min(torch.finfo(T.dtype).tiny)
        scale = (gradients.median() / gradients).clamp_max(1)
        if learning_rate is None:
            learning_rate = 0.07 / math.sqrt(len(Q))
        descend([T], batches, partial(cost, scale=scale), learning_rate, "learning the rotation")
    return torch.linalg.qr(Q_0 + K @ (T * scale).detach().double()).Q


@contextlib.contextmanager
def projected(model, Q: Tensor):
    """Inside, a fused model computes what `rotate(model, Q)` would make of it, with no weight rewritten.

    Its signal keeps all D dimensions: Z Q Q^T is added instead of Z.
    """
    with torch.autocast(Q.device.type, enabled=False):
        QQ = (Q @ Q.T).to(model.dtype)
    of_layer = {stages_of_layer[0].layer: stages_of_layer for stages_of_layer in stages_by_layer(model)}

    def forward(layer, X, *args, **kwargs):
        for stage in of_layer[layer]:
            X = X + stage(X, *args, **kwargs) @ QQ
        return X

    with contextlib.ExitStack() as hooks:
        for embedding in embeddings(model):
            hooks.enter_context(embedding.register_forward_hook(lambda module, inputs, X: X @ QQ))
        hooks.enter_context(replaced_layers(model, forward))
        yield


@torch.no_grad()
def tie_head(model, calibration: Tensor | None = None):
    """Gives a model, in place, the embedding's matrix back as its head, with a small matrix in front.

    Fusing and slicing leave a head W (d, V) that is no longer the embedding E (V, d), but is still made of it:
    W ~ A E^T with A = W P E (E^T P E)^-1 (d, d), a least squares fit over the vocabulary. The diagonal P weighs each
    token by its share of the calibration tokens, if there are any, plus 1 / V. For models whose embedding and head
    were one matrix; a small model has much of its size there. Fuses it if need be; a head that is tied stays.
    """
    if calibration is not None:
        check_tokens(model.config, calibration)
    fuse(model)
    if model.config.slicegpt.get("tied"):
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    E, W = matrix(embedding), matrix(head)
    PE = E / len(E)
    if calibration is not None:
        counts = total(torch.bincount(calibration.flatten(), minlength=len(E))).to(E)
        PE += counts[:, None] / counts.sum() * E
    A = nn.Linear(len(W), E.shape[1], bias=False, dtype=model.dtype, device=model.device)
    set_matrix(A, W @ PE @ torch.linalg.pinv(E.T @ PE, hermitian=True))
    path = architecture(model.config).norm
    model.set_submodule(path, nn.Sequential(model.get_submodule(path), A))
    head.in_features, head.weight = E.shape[1], embedding.weight
    model.config.slicegpt["tied"] = True
    model.config.tie_word_embeddings = True
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


@torch.no_grad()
def standard(model) -> tuple[PreTrainedModel, str]:
    """(A model of Hugging Face's own class, equal to a sliced model, ""); or (the model, why there is none).

    Without shortcuts, a sliced Llama is a Llama of a smaller `hidden_size` d. Its RMSNorms see |x|^2 / d + eps, ours
    |x|^2 / D + eps, which is the same if the signal is x / scale, with scale = sqrt(D / d): so all that writes the
    signal is divided by it, and the norms get it as their weight. A LayerNorm does the same to a signal whose mean is
    0, which `into_mean_zero` achieves. All this is done in place: the given model is used up, unless it is returned.
    """
    check_whole(model.config)
    if not hasattr(model.config, "slicegpt"):
        raise SliceGPTError("a dense model is a standard one; this is for sliced ones")
    shape, parts = model.config.slicegpt, architecture(model.config)
    if shape["shortcuts"]:
        return model, "it has shortcuts"
    if shape.get("tied"):
        return model, "its head is tied through a matrix of its own"
    if not parts.mean_free and not hasattr(model.config, "rms_norm_eps"):
        return model, "its norms are LayerNorms, which subtract a mean"
    Q = into_mean_zero(model) if parts.mean_free else None
    D, d = model.config.hidden_size, shape["dimensions"][0] if Q is None else Q.shape[1]
    try:
        config = standard_config(model.config, d)
    except Exception as error:
        return model, f"transformers refuses its shape: {first_line(error.__cause__ or error)}"
    base, scale = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], math.sqrt(D / d)
    with torch.device("meta"):
        stock, twin = base._from_config(config, dtype=model.dtype), type(model)(model.config)
    for each in (twin, model):  # first without values, to see whether the shapes fit
        if Q is not None:
            rotate(each, Q)
        weights = standard_weights(each, stock.state_dict(), scale)
        if weights is None:
            return model, f"a {config.model_type}'s heads must add up to its hidden size"
    if model.device.type == "meta":
        return stock, ""
    # in place, so in `weights`, too
    divide_signal(model, scale, readers_too=parts.norm + ".weight" not in weights)  # OLMo's norms have no weight
    stock = base.from_pretrained(None, config=config, state_dict=weights, dtype=model.dtype,
                                 attn_implementation=model.config._attn_implementation)
    ungroup_experts_if_need_be(stock, d)
    vars(stock).pop("_weight_conversions", None)  # experts are saved one by one, as engines read them
    stock.generation_config = model.generation_config
    return stock.to(model.device), ""


def into_mean_zero(model) -> Tensor:
    """Q (d, d + 1): rotates the signal into one dimension more, where its mean is 0; M (d, d), if that is 0 already.

    So a LayerNorm finds no mean to subtract. The rows of Q are orthonormal, and orthogonal to the vector of ones; so
    the columns of Q^T W_in have mean 0, too, which `standard_weights` needs.
    """
    W_embd = matrix(model.get_input_embeddings())
    is_zero = not W_embd.is_meta and W_embd.mean(1).abs().max() <= 1e-3 * W_embd.abs().mean()
    ones = torch.ones(W_embd.shape[1] + (not is_zero), 1, dtype=torch.float64)
    rows = torch.linalg.qr(ones, mode="complete").Q[:, 1:].T
    return rows.T @ rows if is_zero else rows


def divide_signal(model, scale: float, readers_too: bool):
    """Divides the signal by `scale`, in place; readers_too: and multiplies by it what reads the norms."""
    # Gemma's embedding multiplies by the square root of the hidden size, so it is divided already
    writers = [module for module in embeddings(model) if not hasattr(module, "embed_scale")]
    for module in writers + [writer for stage in stages(model) for writer in stage.writers]:
        for parameter in (module.weight, getattr(module, "bias", None)):
            if parameter is not None:
                parameter.copy_(parameter.double() / scale)
    if readers_too:
        for module in [model.get_output_embeddings(), *(reader for stage in stages(model) for reader in stage.readers)]:
            module.weight.mul_(scale)


def standard_weights(model, expected: dict, scale: float) -> dict | None:
    """A sliced model's weights under the names of its standard class, `expected`; None if the shapes are others."""
    weights, width = model.state_dict(), model.config.slicegpt["dimensions"][0]
    for fused, pieces in (("qkv_proj", "q_proj k_proj v_proj"), ("gate_up_proj", "gate_proj up_proj")):
        for name in [name for name in weights if fused in name and name not in expected]:  # a Phi-3 as a Mistral
            names = [name.replace(fused, piece) for piece in pieces.split()]
            weights |= zip(names, weights.pop(name).split([len(expected[piece]) for piece in names]))
    # beta of a LayerNorm became a bias b of W_in, which that class may lack. With a LayerNorm bias of 1, it reads
    # x + 1 instead of x. Both x and the rows of a Linear's W have mean 0, so (W + b 1^T / d)(x + 1) = W x + b
    lacking = [name for name in weights.keys() - expected.keys()
               if architecture(model.config).mean_free and name.endswith("bias")]
    for name in lacking:
        W = weights[name.removesuffix("bias") + "weight"]
        weights[name.removesuffix("bias") + "weight"] = W + weights.pop(name)[:, None] / width
    offset = architecture(model.config).norm_offset
    for name in expected.keys() - weights.keys():  # of norms; and a Qwen2's attention has one bias less than a Llama's
        value = scale - offset
        if name.endswith("bias"):
            value = 1.0 if lacking else 0.0
        weights[name] = torch.full(expected[name].shape, value, dtype=model.dtype, device=model.device)
    same = {name: W.shape for name, W in weights.items()} == {name: W.shape for name, W in expected.items()}
    return weights if same else None


def standard_config(config, d: int):
    """The config for a hidden size of d: a Llama's or a Mistral's, if possible, as most programs run those.

    Raises what transformers raises of a shape that it does not allow.
    """
    values, family, heads = config.to_dict(), config.model_type, config.num_attention_heads
    values |= {"hidden_size": d, "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads}
    for key in ("slicegpt", "auto_map", "architectures", "model_type"):
        values.pop(key, None)
    if family == "qwen2" and d % heads == 0 and "sliding_attention" not in config.layer_types:  # a Llama with biases
        family = "llama"
        values["attention_bias"] = True
    elif family == "llama" and d % heads and not (config.attention_bias or config.mlp_bias):
        family = "mistral"  # to which transformers allows any d
        values["sliding_window"] = None
    elif family == "phi3" and config.rope_parameters.get("partial_rotary_factor", 1) == 1 and (
            config.rope_parameters["rope_type"] != "longrope"):
        family = "mistral"  # whose matrices are in several pieces
    if family != config.model_type:
        values = {key: values[key] for key in AutoConfig.for_model(family).to_dict().keys() & values.keys()}
    return AutoConfig.for_model(family, **values)


def dimension_for(config, params: float, round_to: int, rotation: str = "block", head: str = "sliced") -> int:
    """The largest d, a multiple of `round_to`, whose sliced network has at most the share `params` of all parameters.

    They are counted in networks that are sliced on the meta device, where there are shapes only. Raises SliceGPTError,
    with what can be had, if there is none.
    """
    def share_of(d) -> float:  # grows with d, so the largest can be found by bisection
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
            dense, D = parameters(model), config.hidden_size
            if rotation == "shared":
                rotate(model, torch.empty(D, columns_to_keep(config, d, head)))
            else:
                last = torch.empty(D, D if head == "full" else d)
                rotate(model, [torch.empty(D, d)] * len(stages(model)) + [last])
            if head == "tied":
                tie_head(model)
            return parameters(standard(model)[0]) / dense

    multiples = range(round_to, config.hidden_size + 1, round_to)
    fitting = bisect.bisect_right(multiples, params, key=share_of)
    if not fitting:
        reach = f": {share_of(multiples[0]):.3f} to {share_of(multiples[-1]):.3f}" if multiples else ""
        raise SliceGPTError(f"a share {params} of the parameters cannot be reached in multiples of {round_to}{reach}")
    return multiples[fitting - 1]


def columns_to_keep(config, d: int, head: str) -> int:
    """How many columns of one shared Q to keep for d dimensions in the end: one less if `standard` adds one; not 0."""
    return max(1, d - 1) if architecture(config).mean_free and head != "tied" else d


# ---- Several processes (torchrun) -----------------------------------------------------------------------------------
#
# Each process passes its own part of the samples to every function. What crosses processes is a sum, of covariances,
# losses or gradients; and the first process's Q.

def share(samples: Tensor, even: bool = False) -> Tensor:
    """This process's part of the samples; all of them, if there are too few: that only scales a sum of all.

    even: all parts are of one length, so that all processes take as many steps; some samples may come twice.
    """
    if not dist.is_initialized() or len(samples) < dist.get_world_size():
        return samples
    if even:
        return samples[list(torch.utils.data.DistributedSampler(samples, shuffle=False))]
    return samples[dist.get_rank()::dist.get_world_size()]


def is_first_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def total(C: Tensor) -> Tensor:
    """The sum of C over all processes, in each of them."""
    if dist.is_initialized():
        dist.all_reduce(C)
    return C


def agreed(Q: Tensor) -> Tensor:
    """The first process's Q, in all of them."""
    if dist.is_initialized():
        Q = Q.contiguous()
        dist.broadcast(Q, 0)
    return Q


def all_samples(mine: Tensor) -> Tensor:
    """The samples of all processes, in the order that they had before `share`."""
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
    """Inside, new weights and signals are in nameless files, in the directory `path` or where that is going to be."""
    with contextlib.suppress(OSError, AttributeError):  # glibc only: freed matrices go back to the system at once
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
    token = FOLDER.set(path if path.exists() else path.parent)
    try:
        yield
    finally:
        FOLDER.reset(token)


def allocate(shape, dtype) -> Tensor:
    """An uninitialised tensor on the CPU; within `larger_than_memory`, pages of a file that goes with the tensor."""
    folder, size = FOLDER.get(), math.prod(shape)
    if folder is None or size == 0:
        return torch.empty(shape, dtype=dtype)
    with failing(f"cannot save to {folder}"), tempfile.NamedTemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)  # a full disk says so now
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)


def stored(W: Tensor, like: Tensor) -> Tensor:
    """A contiguous copy of W, in the dtype and on the device of `like`; on a CPU, it is from `allocate`."""
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
        config = copy.deepcopy(config)  # transformers shall build a dense model, in its own type
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

        The last norm gets a weight of no size: Hugging Face's own class stops there, instead of loading the model
        without its shortcuts.
        """
        check_whole(self.config)
        if kwargs.get("push_to_hub"):
            raise SliceGPTError("it would lack slicegpt.py on the hub: use push_to_hub() of the model")
        weights = kwargs.pop("state_dict", None) or self.state_dict()
        weights = weights | {architecture(self.config).norm + ".weight": torch.empty(0)}
        super().save_pretrained(path, *args, state_dict=weights, **kwargs)
        with contextlib.suppress(shutil.SameFileError):
            shutil.copyfile(__file__, Path(path) / "slicegpt.py")

    @classmethod
    def from_pretrained(cls, path, *args, config=None, **kwargs):
        """Hugging Face's own from_pretrained, of the class that goes with the config."""
        config = config or AutoConfig.from_pretrained(path, **hub_options(kwargs))
        if not issubclass(cls, PreTrainedModel):
            cls = sliced_class(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
        return super(SlicedForCausalLM, cls).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class):
        """Nothing is to do when AutoModelForCausalLM calls this: `save_pretrained` copies the file."""


@cache
def sliced_class(base: type) -> type:
    """SlicedForCausalLM in front of one of Hugging Face's classes; its instances can be copied and pickled."""
    return type("SlicedForCausalLM", (SlicedForCausalLM, base), {
        "__module__": __name__, "__reduce__": lambda self: (blank, (base,), vars(self)),
        # transformers would look for the answer in this file
        "_can_set_experts_implementation": classmethod(lambda cls: base._can_set_experts_implementation())})


def blank(base: type):
    return sliced_class(base).__new__(sliced_class(base))


def become_sliced(model):
    """Turns a dense model, in place, into one of the class SlicedForCausalLM, which `fuse` completes.

    The head gets a matrix of its own. Raises SliceGPTError, before anything changes, if this file cannot slice it.
    """
    if hasattr(model, "peft_config"):
        raise SliceGPTError("it has adapters: merge them into the model first (merge_and_unload)")
    architecture(model.config)  # which says why, if there is none
    if not isinstance(model, transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)]):
        raise SliceGPTError(f"a {type(model).__name__} is not one of transformers' causal language models")
    check_whole(model.config)
    if any(W.is_meta for W in model.parameters()) and any(hasattr(part, "_hf_hook") for part in model.modules()):
        raise SliceGPTError("some of its weights are elsewhere: load it without device_map, and pass `device`")
    if any(type(W.data).__module__.startswith("torchao") for W in model.parameters()):  # in place, the config unchanged
        raise SliceGPTError("its weights are quantised (slice the original and quantise the result)")
    check_row(model)
    shared, config = model.config, copy.deepcopy(model.config)
    for module in model.modules():  # other models may have been made from the same config
        if getattr(module, "config", None) is shared:
            module.config = config
    head = model.get_output_embeddings()
    # the memory is shared, but `set_matrix` writes into no old one
    head.weight = nn.Parameter(head.weight.detach(), head.weight.requires_grad)
    config.slicegpt = {}  # until `take_shape`
    config.tie_word_embeddings = False
    config.auto_map = {"AutoModelForCausalLM": "slicegpt.SlicedForCausalLM"}
    model.all_tied_weights_keys = {}  # else transformers would tie head and embedding again when it saves
    model._keep_in_fp32_modules = set()  # gpt-oss's norms, which will have no weights
    model._weight_conversions = []  # nor may it save under names that only the dense model's class understands
    if not isinstance(model, SlicedForCausalLM):
        model.__class__ = sliced_class(type(model))


def load(name, dtype="auto", device="cpu", **options):
    """(model, tokenizer) of a hub id, a local directory, one that `save` wrote, a .gguf file, or "demo".

    dtype: a torch.dtype, or "auto" for the checkpoint's own. options: from_pretrained's, such as device_map="auto" for
    a model to use and not to slice, which then goes wherever accelerate finds room. Raises SliceGPTError if there is no
    such model, and, before its weights are read, if it cannot be sliced.
    """
    config, tokenizer, path, files = describe(name, **hub_options(options))
    if name == "demo" and not path.exists():
        model = train_demo(config, tokenizer)
        try:
            save(model, tokenizer, path)
        except SliceGPTError as error:  # another process was faster, or nothing can be written there
            warn(f"the demo model is not kept: {error}")
        return model.to(device, None if dtype == "auto" else dtype), tokenizer
    sliced = hasattr(config, "slicegpt")
    with failing(f"cannot load {name}"):
        auto = SlicedForCausalLM if sliced else AutoModelForCausalLM
        if files:
            optional("accelerate")
            files = files | {"quantization_config": transformers.GgufConfig(dequantize=True)}
        model, found = auto.from_pretrained(path, dtype=dtype, output_loading_info=True, **files, **options)
        if missing := found["missing_keys"]:  # transformers would go on with random ones
            raise ValueError(f"{len(missing)} weights are missing, among them {min(missing)}")
        if sliced and (unknown := found["unexpected_keys"]):  # it would go on without these
            raise ValueError(f"{len(unknown)} weights are not known, among them {min(unknown)}")
        ungroup_experts_if_need_be(model, config.hidden_size)
        return model if "device_map" in options else model.to(device), tokenizer


def hub_options(options: dict) -> dict:
    """Those of from_pretrained's options that say which files are meant."""
    names = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies")
    return {key: options[key] for key in names if key in options}


def describe(name, **options) -> tuple:
    """(config, tokenizer, path, from_pretrained's option for a .gguf file) of what `load` takes; reads no weights."""
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
        tokenizer = AutoTokenizer.from_pretrained(path, **files, **options)
        if not {*tokenizer("The text").input_ids} - {*tokenizer.all_special_ids}:
            raise ValueError("its tokenizer makes nothing of a text; are its files missing?")
        return config, tokenizer, path, files


def save(model, tokenizer, path):
    """Writes a directory that `load` reads back bit for bit, as does AutoModelForCausalLM.

    It has Hugging Face's files and, for a model of ours, a copy of this one, run with trust_remote_code=True. Nothing
    gets its name before all is written. Raises SliceGPTError if something is there, or if the disk refuses.
    """
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        raise SliceGPTError("save needs the model's tokenizer, too; model.save_pretrained(path) writes just the model")
    check_whole(model.config)
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
            folder = path / f".unfinished.{os.getpid()}"
            if any(not file.name.startswith(".unfinished") for file in path.iterdir()):
                raise OSError("it exists and is not an empty directory")
        shutil.rmtree(folder, ignore_errors=True)  # an earlier process died
        folder.mkdir(parents=True)
        return folder


def check_free(path: Path):
    """Raises SliceGPTError if `save` could not write there."""
    unfinished(path).rmdir()


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
    """A package that only some uses need.

    It must not stand among the imports: transformers runs a saved copy of this file only if all packages there exist.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0].replace("_", "-")
        raise SliceGPTError(f"this needs the package {name}: pip install {name}") from None


@contextlib.contextmanager
def failing(what: str, hint: str = ""):
    """Inside, any exception becomes a SliceGPTError: files from elsewhere, and disks, can be wrong in many ways."""
    try:
        yield
    except SliceGPTError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            error = error.__context__  # torch.save stumbles over the disk's error once more
        raise SliceGPTError(f"{what}: {first_line(error)}" + (f"; {hint}" if hint else "")) from error


@contextlib.contextmanager
def uninterrupted():
    """Inside, a first Ctrl-C or SIGTERM waits for the end; a second one does not."""
    import signal  # not above, as `slice_model` has a parameter of this name
    received = []

    def wait(number, frame):
        restore()
        received.append(number)
        warn("it is about to end; once more ends it at once")

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    in_main_thread = threading.current_thread() is threading.main_thread()  # the only one that gets signals
    before = {number: signal.signal(number, wait) for number in (signal.SIGINT, signal.SIGTERM) if in_main_thread}
    try:
        yield
    finally:
        restore()
    for number in received:
        signal.raise_signal(number)


@contextlib.contextmanager
def naming(what: str):
    """Inside, a SliceGPTError says in front what it is about."""
    try:
        yield
    except SliceGPTError as error:
        raise SliceGPTError(f"{what}: {error}") from None


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in (str(error).strip() or type(error).__name__).splitlines()]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".")


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

def bounded(kind, least, below=math.inf):
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
    mixture = "; or several, in equal shares, one of which may be own: what the dense model itself writes"
    add("--model", default="demo", help="hub id, directory, .gguf file, or demo: trained on the spot (default)")
    add("--calibration", metavar="TEXT", nargs="+", help=text + mixture)
    add("--eval", metavar="TEXT", nargs="+", help="what perplexity is measured on, one or more; but not own")
    add("--samples", type=bounded(int, 1), default=128, help="calibration sequences (default: 128)")
    add("--eval-samples", type=bounded(int, 1), help="evaluation sequences (default: all of the text)")
    add("--seqlen", type=bounded(int, 2), help="tokens per sequence (default: 2048, or the model's positions if fewer)")
    add("--batch-size", type=bounded(int, 1, 2**31), default=8, help="calibration sequences at a time (default: 8)")
    add("--seed", type=bounded(int, -2**63, 2**63), default=0, help="chooses the calibration sequences (default: 0)")
    add("--dtype", choices=["float64", "float32", "float16", "bfloat16"], help="default: float32 on a CPU, else stored")
    add("--device", help="default: cuda, if there is one")


def parse_arguments(argv):
    parser = argparse.ArgumentParser("slicegpt.py", description="Slice a language model (SliceGPT, arXiv 2401.15024) "
                                     "and measure what that does.")
    add, size = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add_inputs(add)
    size("--sparsity", type=bounded(float, 0, 1), help="share of the dimensions to delete (default: 0.25)")
    size("--params", type=bounded(float, 0), help="instead: at most this share of all parameters is left")
    size("--discard-variance", type=bounded(float, 0, 1), help="instead: at most this share of each signal's is lost")
    add("--round-to", type=bounded(int, 1), default=8, help="the dimension is a multiple of this (default: 8)")
    add("--signal", "--pca", choices=["input", "output"], default="input", help="principal components of the "
        "RMSNorm's input, as in the authors' code (default), or of its output, as in the paper's text")
    add("--head", choices=["sliced", "full", "tied"], default="sliced", help="slice the head too (default), give it "
        "all dimensions, or keep it one matrix with the embedding, if it was")
    add("--rotation", choices=["block", "shared"], default="block", help="one for each block (default), or one for all")
    add("--learn", type=bounded(int, 1), metavar="N", help="turn the one rotation for all by N steps of descent on how "
        "far the predictions are from the dense model's and from the text (implies --rotation shared)")
    add("--finetune", type=bounded(int, 1), nargs="?", const=1000, metavar="N", help="then recover by LoRA on N "
        "sequences of the calibration text (default: 1000)")
    add("--stream", action="store_true", help="larger than memory: weights and signals stay in files next to --save")
    add("--prompt", default="If the", help="text for the models to continue (default: If the)")
    add("--save", metavar="DIR", type=Path, help="write the sliced model here")
    add("--report", metavar="FILE.json", type=Path, help="write the figures here")

    def complain(message):
        raise SliceGPTError(f"{message} (--help lists the options)")

    parser.error = complain
    args = parser.parse_args(argv)
    if args.learn:
        args.rotation = "shared"
    return args


def find_device(name: str | None) -> torch.device:
    """The device of this name, which must have float64; by default a GPU, if there is one. Raises SliceGPTError."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    with failing(f"cannot use --device {name}"):
        zero = torch.zeros(1, device=name, dtype=torch.float64)
        zero.tolist()  # a device that has no values is none to compute on
        return zero.device


@dataclass
class Inputs:
    """What the options of `add_inputs` ask for, but for the weights."""
    device: torch.device
    dtype: torch.dtype | str  # to compute in, as `load` takes it
    config: transformers.PreTrainedConfig
    tokenizer: transformers.PreTrainedTokenizerBase
    calibration: Tensor | None  # all tokens (samples, seqlen); None for a model that is sliced already
    evaluation: dict[str, Tensor]  # of each text of --eval: the name of its figure, and its tokens
    finetuning: Tensor | None = None  # as calibration
    saved_in: torch.dtype | None = None  # the type of the result, see `slice_and_measure`


def read_inputs(args) -> Inputs:
    """Completes the options whose defaults depend on the model, and reads what they name. Raises SliceGPTError."""
    texts = ["pydoc" if args.model == "demo" else "wikitext2"]
    args.calibration, args.eval = (list(dict.fromkeys(names or texts)) for names in (args.calibration, args.eval))
    device = find_device(args.device)
    config, tokenizer, *_ = describe(args.model)
    dtype = getattr(torch, args.dtype) if args.dtype else torch.float32 if device.type == "cpu" else "auto"
    args.seqlen = args.seqlen or min(2048, positions(config))
    calibration = None
    if not hasattr(config, "slicegpt"):
        calibration = mixture(args, config, tokenizer, args.seqlen, args.samples)
        own = args.samples // len(args.calibration) * args.seqlen if "own" in args.calibration else 0
        if (count := calibration.numel() + own) < 8 * config.hidden_size:
            warn(f"{count} calibration tokens are few for {config.hidden_size} dimensions: with fewer than 8 for each, "
                 "slicing costs much more than it must")
    evaluation = {}
    for name in args.eval:
        key = f"perplexity_{name}" if evaluation else "perplexity"
        evaluation[key] = tokens_of(name, config, tokenizer, args.seqlen, args.eval_samples, evaluation=True)
    return Inputs(device, dtype, config, tokenizer, calibration, evaluation)


def mixture(args, config, tokenizer, seqlen, samples) -> Tensor:
    """The tokens (samples, seqlen) of the texts of --calibration, in equal shares; for `own`, see `with_own_text`."""
    each = samples // len(args.calibration)
    return torch.cat([torch.empty(0, seqlen, dtype=torch.int64)] + [
        tokens_of(name, config, tokenizer, seqlen, each, args.seed) for name in args.calibration if name != "own"])


def with_own_text(args, inputs: Inputs, tokens: Tensor, samples: int, model) -> Tensor:
    """The tokens of a `mixture` of so many samples and, if `own` is one of its texts, what the dense model writes."""
    if "own" not in args.calibration:
        return tokens
    with placed(model, inputs.device):
        each, seqlen = samples // len(args.calibration), tokens.shape[1]
        own = own_text(model, inputs.tokenizer, each, seqlen, args.seed, inputs.device)
    return torch.cat([tokens, agreed(own)])


def tokens_of(name, config, tokenizer, seqlen, samples, seed=None, evaluation=False) -> Tensor:
    """The tokens (samples, seqlen) of a text, which the model can take; with a warning, if there are fewer."""
    text = read_text(name, evaluation)
    with naming(name):
        tokens = tokenize(tokenizer, text, seqlen, samples, seed)
        check_tokens(config, tokens)
    if samples and len(tokens) < samples:
        warn(f"{name} has {len(tokens)} sequences of {seqlen} tokens, and not {samples}")
    return tokens


def warn(message: str):
    """Says, on standard error, what does not stop the program; of several processes, the first does."""
    if is_first_process():
        print(f"slicegpt: warning: {message}", file=sys.stderr)


def check_options(args):
    """Raises SliceGPTError for options that contradict each other, or need a package that is not there."""
    by_variance = args.discard_variance is not None
    if args.rotation == "shared" and (args.head == "full" or by_variance or args.signal == "output"):
        raise SliceGPTError("one rotation has one dimension throughout, from the dense network: it goes with neither "
                            "--head full, --discard-variance nor --signal output")
    if args.stream and (not args.save or args.learn or dist.is_initialized()):
        raise SliceGPTError("--stream needs --save, and goes with neither --learn nor torchrun")
    if args.stream and os.path.exists(args.model) and not any(Path(args.model).glob("*.safetensors")):
        raise SliceGPTError("--stream needs .safetensors files, which can be mapped into memory, and "
                            f"{args.model} has none")
    if args.params is not None and args.params > 1:
        raise SliceGPTError(f"--params is a share of all parameters, at most 1, and not {args.params}")
    if args.finetune:
        optional("peft")


def dimension_asked(args, config) -> int | None:
    """The sliced dimension d that the options ask for; None, if each signal has its own or nothing is sliced.

    Raises SliceGPTError if such a model cannot have it.
    """
    by_variance = args.discard_variance is not None
    if hasattr(config, "slicegpt"):
        sizes = (args.sparsity, args.params, args.discard_variance)
        if any(size is not None for size in sizes) or args.rotation == "shared" or args.head != "sliced":
            raise SliceGPTError(f"{args.model} is sliced already; it can be measured as it is, and fine-tuned")
        if "own" in args.calibration:
            raise SliceGPTError(f"{args.model} is sliced already, and own is what the dense model writes")
        return None
    if args.head == "tied" and not config.tie_word_embeddings:
        raise SliceGPTError("--head tied is for models whose head and embedding are one matrix")
    check_width(config, args.head != "full" and not by_variance)
    if by_variance:
        return None
    if args.params is not None:
        d = dimension_for(config, args.params, args.round_to, args.rotation, args.head)
    else:
        d = sliced_dimension(config.hidden_size, 0.25 if args.sparsity is None else args.sparsity, args.round_to)
    if d == config.hidden_size:
        asked = "--sparsity 0" if args.params is None else f"--params {args.params} allows all of them"
        warn(f"none of the {d} dimensions is deleted: {asked}")
    return d


def check_results(args, inputs: Inputs):
    """Raises SliceGPTError, before hours of work, if what comes of it cannot be written."""
    with naming("--prompt"):
        check_tokens(inputs.config, torch.tensor([inputs.tokenizer(args.prompt).input_ids], dtype=torch.int64))
    if args.save:
        with failing("cannot save such a model"), tempfile.TemporaryDirectory() as folder:
            inputs.config.save_pretrained(folder)
            inputs.tokenizer.save_pretrained(folder)
            complete(Path(folder), inputs.tokenizer.name_or_path)
        if hasattr(inputs.config, "quantization_config"):
            raise SliceGPTError("--save of a quantised model: save before it is quantised")
        check_free(args.save)
    if args.report:
        if args.save and args.report.resolve().is_relative_to(args.save.resolve()):
            raise SliceGPTError("--report must be outside of --save")
        with failing(f"cannot write {args.report}"):
            open(args.report, "a").close()


@dataclass
class Outcome:
    """What the program has come to. Whatever ends it early, that is printed and saved."""
    figures: dict = field(default_factory=dict)  # a column for each model: dense, sliced, finetuned
    model: PreTrainedModel | None = None
    is_sliced: bool = False
    is_finetuned: bool = False
    not_standard: str = "it was sliced before"  # why it is no standard checkpoint, if it is none
    seconds: float | None = None  # that slicing took


def run(args):
    """The program: check and read what it was given, do the work, print and save what has come of it."""
    check_options(args)
    inputs, outcome = read_inputs(args), Outcome()
    d = dimension_asked(args, inputs.config)
    if args.finetune:
        inputs.finetuning = mixture(args, inputs.config, inputs.tokenizer, min(1024, positions(inputs.config)),
                                    args.finetune)
    check_results(args, inputs)
    with larger_than_memory(args.save.resolve()) if args.stream else contextlib.nullcontext():
        try:
            slice_and_measure(args, inputs, d, outcome)
        finally:
            if is_first_process() and outcome.figures:
                finish(args, inputs, d, outcome)


def finish(args, inputs: Inputs, d: int | None, outcome: Outcome):
    """Prints what has been measured and saves what has been sliced, though it may be an error that ended the work."""
    try:
        report(args, inputs, d, outcome)
    finally:
        if args.save and outcome.is_sliced:
            interrupted = isinstance(sys.exc_info()[1], (KeyboardInterrupt, SystemExit))
            with contextlib.nullcontext() if interrupted else uninterrupted():
                save_result(args, inputs, outcome)


def slice_and_measure(args, inputs: Inputs, d: int | None, outcome: Outcome):
    """Load, measure, slice, measure again, fine-tune, measure again."""
    quantised = hasattr(inputs.config, "quantization_config")
    outcome.model, _ = load(args.model, inputs.dtype if quantised else "auto")
    came_in = outcome.model.dtype
    if inputs.dtype == "auto":
        inputs.dtype = came_in
    inputs.saved_in = inputs.dtype
    if not args.dtype and came_in in (torch.float16, torch.bfloat16):  # computed in float32, but saved as it came
        inputs.saved_in = came_in
    if args.save and d:
        check_room(args.save, parameters(outcome.model) * inputs.saved_in.itemsize * d // inputs.config.hidden_size)
    if inputs.calibration is not None:
        outcome.figures["dense"] = measure(args, inputs, outcome.model)  # which gives it the type to compute in, too
        inputs.calibration = with_own_text(args, inputs, inputs.calibration, args.samples, outcome.model)
        if args.finetune:
            inputs.finetuning = with_own_text(args, inputs, inputs.finetuning, args.finetune, outcome.model)
        start = time.perf_counter()
        outcome.model, outcome.not_standard = slice_as_asked(args, inputs, d, outcome.model)
        outcome.seconds = time.perf_counter() - start
        largest = torch.finfo(inputs.saved_in).max
        if inputs.saved_in != inputs.dtype and any(W.abs().max() > largest for W in outcome.model.parameters()):
            warn(f"its weights have become too large for {inputs.saved_in}, so it is saved in {inputs.dtype}")
            inputs.saved_in = inputs.dtype
    outcome.is_sliced = True
    outcome.figures["sliced"] = measure(args, inputs, outcome.model)
    if args.finetune:
        generator = torch.Generator().manual_seed(args.seed)
        tokens = inputs.finetuning[torch.randperm(len(inputs.finetuning), generator=generator)]  # texts alternate
        finetune(outcome.model.to(inputs.device), share(tokens, even=True), seed=args.seed)
        outcome.is_finetuned = True
        outcome.figures["finetuned"] = measure(args, inputs, outcome.model)


def measure(args, inputs: Inputs, model) -> dict:
    """A column of figures of a model, as it is when it is saved: its weights are rounded to that type.

    Its dimensions (but the head's), parameters and their bytes, its perplexity, and what it writes.
    """
    D = model.config.hidden_size
    widths = sorted(set(getattr(model.config, "slicegpt", {}).get("dimensions", [D, D])[:-1]))
    convert(model, inputs.saved_in)
    size = sum(W.nbytes for W in model.parameters())
    convert(model, inputs.dtype)
    with placed(model, inputs.device):
        figures = {"dimension": widths[0] if len(widths) == 1 else f"{widths[0]} to {widths[-1]}",
                   "parameters": parameters(model), "bytes": size} | perplexities(model, inputs)
        try:
            return figures | {"text": generate(model, inputs.tokenizer, args.prompt, inputs.device)}
        except SliceGPTError as error:
            return figures | {"text": f"({error})"}


def perplexities(model, inputs: Inputs) -> dict[str, float]:
    """The perplexity on each text of --eval, by the name of its figure; bench.py needs them too."""
    return {key: perplexity(model, share(tokens), device=inputs.device) for key, tokens in inputs.evaluation.items()}


def convert(model, dtype: torch.dtype):
    """Gives the weights another type; but not those of quantised models, nor what transformers keeps in float32."""
    if hasattr(model.config, "quantization_config"):
        return
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()  # routers, such as "gate.weight"
    for name, W in model.named_parameters():
        if W.dtype != dtype and not any(part in name for part in kept):
            W.data = stored(W, like=W.new_empty(0, dtype=dtype))
    ungroup_experts_if_need_be(model, model.get_input_embeddings().weight.shape[1])


def slice_as_asked(args, inputs: Inputs, d: int | None, model) -> tuple[PreTrainedModel, str]:
    """Slices by the paper's method or one beyond it. Returns what `standard` makes of the sliced model."""
    where, tokens = {"batch_size": args.batch_size, "device": inputs.device}, share(inputs.calibration)
    if args.rotation == "block":
        slice_model(model, tokens, 0 if d is None else 1 - d / inputs.config.hidden_size, round_to=args.round_to,
                    discard_variance=args.discard_variance, signal=args.signal,
                    head="full" if args.head == "full" else "sliced", **where)
    else:
        Q = shared_rotation(model, tokens, **where)[:, :columns_to_keep(inputs.config, d, args.head)]
        if args.learn:
            Q = learn_rotation(model.to(inputs.device), tokens, Q, args.learn, seed=args.seed)
        rotate(model, Q, inputs.device)
    if args.head == "tied":
        tie_head(model, tokens)
    return standard(model)


def report(args, inputs: Inputs, d: int | None, outcome: Outcome):
    """Prints a column of figures for each model, and what the models wrote; and writes the file of --report."""
    figures, tokens, peak = outcome.figures, inputs.calibration, peak_memory(inputs.device)
    rows = {"dimension": "", "parameters": ",d", "bytes": ",d"} | dict.fromkeys(inputs.evaluation, ".2f")
    width = max(14, *map(len, rows))
    print(f"\n{args.model}\n  {'':{width}}" + "".join(f"{name:>17}" for name in figures))
    for key, form in rows.items():
        print(f"  {key:{width}}" + "".join(f"{column[key]:>17{form}}" for column in figures.values()))
    for name, on in zip(args.eval, inputs.evaluation.values()):
        print(f"  perplexity on {len(on)} x {args.seqlen} tokens of {name}")
    if outcome.seconds is not None:
        print(f"  sliced in {outcome.seconds:.1f} s, by {len(tokens)} x {args.seqlen} tokens of "
              f"{' and '.join(args.calibration)}")
    print(f"  peak memory {peak / 2**30:.2f} GiB\n")
    for name, column in figures.items():
        print(textwrap.fill(f"{name}: {column['text']}", 118, initial_indent="  ", subsequent_indent="    "))
    for key in inputs.evaluation if "finetuned" in figures else ():
        if (after := figures["finetuned"][key]) > (before := figures["sliced"][key]):
            warn(f"fine-tuning made it worse: {key} {before:.2f} before, and {after:.2f} after it; the fine-tuned "
                 "model is the one that is saved")
    if args.report:
        values = vars(args) | {
            "device": inputs.device, "dtype": inputs.dtype, "saved_in": inputs.saved_in, "d": d,
            "sparsity": None if d is None else 1 - d / inputs.config.hidden_size,
            "calibration": " ".join(args.calibration), "eval": " ".join(args.eval),
            "samples_used": None if tokens is None else len(tokens),
            "finetune_used": None if inputs.finetuning is None else len(inputs.finetuning),
            "slice_seconds": outcome.seconds, "dimension": inputs.config.hidden_size,
            "peak_memory_bytes": peak}
        values |= {key.replace("perplexity", "eval_samples", 1): len(on) for key, on in inputs.evaluation.items()}
        values |= {f"{name}_{key}": value for name, column in figures.items() for key, value in column.items()}
        with failing(f"cannot save to {args.report}"):
            args.report.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")


def save_result(args, inputs: Inputs, outcome: Outcome):
    """Saves the model under --save, or beside that, if something has come there meanwhile; and says where."""
    path, model = args.save, outcome.model
    try:
        check_free(path)
    except SliceGPTError as error:
        path = path.resolve().with_name(f"{path.resolve().name}-{os.getpid()}")
        warn(f"{error}; it is saved to {path}")
    convert(model, inputs.saved_in)
    try:
        save(model, inputs.tokenizer, path)
    except (KeyboardInterrupt, SystemExit):
        warn("the sliced model is not saved")
        raise
    if outcome.is_finetuned and "finetuned" not in outcome.figures:
        warn("the model that is saved is fine-tuned, and was not measured")
    kind = f"an ordinary {model.config.model_type} model"
    if outcome.not_standard:
        kind = f"to load with trust_remote_code=True, as {outcome.not_standard}"
    size = sum(file.stat().st_size for file in path.resolve().iterdir())
    print(f"\nsaved to {path}, {kind}; {str(model.dtype).removeprefix('torch.')}, {size:,} bytes")


def check_room(path: Path, size: int):
    """Raises SliceGPTError if there is surely no room for so many bytes."""
    existing = next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.exists())
    if size > (free := shutil.disk_usage(existing).free):
        raise SliceGPTError(f"cannot save to {path}: it takes {size:,} bytes, and {free:,} are free")


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
    """Runs the program with these arguments, by default the command line's; returns its exit code, see `exit_code`."""
    def program():
        args = parse_arguments(argv)
        if dist.is_torchelastic_launched():
            dist.init_process_group()
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        run(args)

    return exit_code("slicegpt", program)


def exit_code(name: str, program) -> int:
    """Calls program(). Returns 0; 2 after an error that the user can fix, said in one line; or 130 after Ctrl-C."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # what libraries tell each other
    transformers.logging.set_tqdm_hook(lambda factory, args, kwargs: progress(*args, **kwargs))  # its bars, too
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):  # a console that lacks a character gets another
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        program()
    except (SliceGPTError, torch.OutOfMemoryError) as error:
        print(f"{name}: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as batch systems end a program: it still saves its result
    sys.exit(main())
