"""SliceGPT in one file: compress a language model by deleting rows and columns of its weights.

Read it beside the paper: "SliceGPT: Compress Large Language Models by Deleting Rows and Columns" (Ashkboos, Croci,
Gennari do Nascimento, Hoefler, Hensman; ICLR 2024; arXiv 2401.15024). The sections stand in the paper's order and
bear its numbers, and every function names the equation, algorithm line or figure that it is. In three sentences:

1. RMSNorm commutes with an orthogonal matrix Q, so the signal between a transformer's blocks may be kept in any
   rotated basis, if the weights that write it are multiplied by Q and those that read it by Q^T (Theorem 1).
2. In the basis of its principal components (Eq. 8) the signal needs fewer than D numbers per token, so the last
   columns of the matrices that write it and the last rows of those that read it can be deleted (Eq. 9).
3. Each block has principal components of its own, so the residual connection is multiplied by a *shortcut* matrix,
   which takes the signal from the basis of one block into that of the next (Figure 4).

The notation is the paper's: D embedding dimension, N sequence length, X (B, N, D) the *signal* between the blocks,
here with a batch in front, Q (D, D) orthogonal. A Q of fewer columns, (D, d), stands for the paper's product of Q and
the deletion matrix: to rotate by it is to slice. A weight W is (inputs, outputs) and multiplies from the right.

    python slicegpt.py                                              # a small model trained on the spot, no network
    python slicegpt.py --model facebook/opt-125m --sparsity 0.25    # WikiText-2, from the hub
"""
import argparse
import bisect
import contextlib
import copy
import difflib
import importlib
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
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key
from transformers.pytorch_utils import Conv1D


class SliceGPTError(ValueError):
    """What a user can mend, said in one line."""


# ---- Where an architecture keeps its parts: all that this file knows about any of them ------------------------------

@dataclass(frozen=True)
class Block:
    """One attention or one FFN, Z = sigma(RMSNorm(X) W_in + b_in) W_out + b_out (section 2.1), as paths in its layer.

    The norm in front; the modules that compute Z, one after the other; all matrices W_in; the matrix W_out.
    """
    norm: str
    modules: str
    W_in: str
    W_out: str

    def __call__(self, layer, Z, *args, **kwargs):
        """Algorithm 1, line 4, of a normalised signal. Masks, positions, caches and the like are for attention."""
        for name in self.modules.split():
            module = layer.get_submodule(name)
            Z = module(Z, *args, **kwargs)[0] if "att" in name else module(Z)
        return Z


@dataclass(frozen=True)
class Stage:
    """A layer's way from one signal to the next: the blocks that read the one, and the name of their shortcut."""
    shortcut: str
    blocks: tuple[Block, ...]

    def __call__(self, layer, X, S: Tensor | None, *args, **kwargs):
        """Algorithm 1, lines 4 and 5: X S + Z of every block, with Figure 4's shortcut S; X + Z if there is none."""
        normalised = layer.get_submodule(self.blocks[0].norm)(X)  # without scales, the same for every block
        Z, *others = (block(layer, normalised, *args, **kwargs) for block in self.blocks)
        Z = sum(others, Z)
        # one product and sum for the tokens of the whole batch
        return X + Z if S is None else torch.addmm(Z.flatten(0, -2), X.flatten(0, -2), S).view(Z.shape)

    def readers(self, layer) -> list[nn.Module]:
        return [linear for block in self.blocks for linear in submodules(layer, block.W_in)]

    def writers(self, layer) -> list[nn.Module]:
        return [linear for block in self.blocks for linear in submodules(layer, block.W_out)]


@dataclass(frozen=True)
class Architecture:
    """Paths in a model: all embeddings that add into X, the layers, the last norm; and the blocks of a layer."""
    embeddings: str
    layers: str
    norm: str
    attention: Block
    ffn: Block
    parallel: bool | str = False  # do both blocks read the same signal? Or the config's flag that says so
    norm_offset: float = 0.0  # added to the stored scale of a norm
    one_width: bool = False  # does the model's own forward take the last signal to be as wide as the first?


LLAMA = Architecture(
    "model.embed_tokens", "model.layers", "model.norm",
    Block("input_layernorm", "self_attn", "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj"),
    Block("post_attention_layernorm", "mlp", "mlp.gate_proj mlp.up_proj", "mlp.down_proj"))

ARCHITECTURES = {  # by the config's model_type
    "opt": Architecture(
        "model.decoder.embed_tokens model.decoder.embed_positions", "model.decoder.layers",
        "model.decoder.final_layer_norm",
        replace(LLAMA.attention, norm="self_attn_layer_norm", W_out="self_attn.out_proj"),
        Block("final_layer_norm", "fc1 activation_fn fc2", "fc1", "fc2")),
    "gpt2": Architecture(
        "transformer.wte transformer.wpe", "transformer.h", "transformer.ln_f",
        Block("ln_1", "attn", "attn.c_attn", "attn.c_proj"), Block("ln_2", "mlp", "mlp.c_fc", "mlp.c_proj"),
        one_width=True),
    "llama": LLAMA, "mistral": LLAMA, "ministral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "smollm3": LLAMA,
    "seed_oss": LLAMA, "helium": LLAMA,
    "arcee": replace(LLAMA, ffn=replace(LLAMA.ffn, W_in="mlp.up_proj")),
    "starcoder2": replace(LLAMA, ffn=replace(LLAMA.ffn, W_in="mlp.c_fc", W_out="mlp.c_proj")),
    "nemotron": replace(LLAMA, ffn=replace(LLAMA.ffn, W_in="mlp.up_proj"), norm_offset=1.0),
    "gemma": replace(LLAMA, norm_offset=1.0),
    "phi": Architecture(
        "model.embed_tokens", "model.layers", "model.final_layernorm",
        replace(LLAMA.attention, W_out="self_attn.dense"),
        Block("input_layernorm", "mlp", "mlp.fc1", "mlp.fc2"), parallel=True),
    "phi3": replace(
        LLAMA, attention=replace(LLAMA.attention, W_in="self_attn.qkv_proj"),
        ffn=replace(LLAMA.ffn, W_in="mlp.gate_up_proj")),
    "gpt_neox": Architecture(
        "gpt_neox.embed_in", "gpt_neox.layers", "gpt_neox.final_layer_norm",
        Block("input_layernorm", "attention", "attention.query_key_value", "attention.dense"),
        Block("post_attention_layernorm", "mlp", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"), "use_parallel_residual"),
}


def architecture(config) -> Architecture:
    """The row of the table for a Hugging Face config. Raises SliceGPTError, with the reason, if it cannot be sliced."""
    reasons = [reason for flags, reason in (
        ("is_encoder_decoder", "it is an encoder-decoder"),
        ("add_cross_attention", "it has cross-attention"),
        ("num_experts num_local_experts n_routed_experts", "it is a mixture of experts"),
        ("quantization_config", "its weights are quantised (slice the original and quantise the result)"),
        ("_remove_final_layer_norm", "it has no last norm"),
    ) if any(getattr(config, flag, None) for flag in flags.split())]
    if not getattr(config, "do_layer_norm_before", True):
        reasons.append("it normalises behind its blocks (post-norm), and such a signal cannot be rotated")
    if getattr(config, "word_embed_proj_dim", None) not in (None, config.hidden_size):
        reasons.append("its embedding is projected")
    if config.model_type not in ARCHITECTURES:
        reasons.append("its architecture is not known here")
    if reasons:
        raise SliceGPTError(f"cannot slice a {config.model_type} model like this: {', and '.join(reasons)}. "
                            f"Can be sliced: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[config.model_type]


def embeddings(model) -> list[nn.Embedding]:
    return submodules(model, architecture(model.config).embeddings)


def layers(model) -> nn.ModuleList:
    return model.get_submodule(architecture(model.config).layers)


def stages(model) -> list[Stage]:
    """The stages of each layer: attention and then FFN, or both at once in a parallel layer."""
    parts = architecture(model.config)
    if parts.parallel is True or parts.parallel and getattr(model.config, parts.parallel):
        return [Stage("shortcut", (parts.attention, parts.ffn))]
    return [Stage("attention_shortcut", (parts.attention,)), Stage("mlp_shortcut", (parts.ffn,))]


def submodules(module, paths: str) -> list[nn.Module]:
    return [module.get_submodule(path) for path in paths.split()]


def matrix(module) -> Tensor:
    """W (inputs, outputs) in float64: of an embedding, a Conv1D (GPT-2), or a Linear, which stores its transpose."""
    W = module.weight.detach().double()
    return W.T if isinstance(module, nn.Linear) else W


def set_matrix(module, W: Tensor, bias: Tensor | None):
    """The inverse of `matrix`, with a bias (outputs): of any shape, stored in the dtype of the old weight."""
    inputs, outputs = W.shape
    if isinstance(module, nn.Embedding):
        module.embedding_dim = outputs
    elif isinstance(module, Conv1D):
        module.nx, module.nf = inputs, outputs
    else:
        module.in_features, module.out_features, W = inputs, outputs, W.T
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().to(module.weight.dtype))
    module.weight = nn.Parameter(W.to(module.weight.dtype, copy=True).contiguous())


# ---- Figure 4: the block of a sliced network ------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / sqrt(|x|^2 / D + eps): the RMSNorm of Eq. 1 with its sqrt(D); the scale has gone into the weights (3.2).

    D is the *dense* dimension, whatever the width d of X (..., d): what slicing deleted counts as zero.
    """

    def __init__(self, D: int, eps: float):
        super().__init__()
        self.D, self.eps = D, eps

    def forward(self, X):
        share = X.shape[-1] / self.D  # torch takes the mean over d
        return F.rms_norm(X, X.shape[-1:], eps=self.eps / share) / math.sqrt(share)

    def extra_repr(self):
        return f"D={self.D}, eps={self.eps}"


class SlicedLayer:
    """Figure 4: a Hugging Face layer with a matrix, the shortcut Q_{l-1}^T Q_l, in each residual connection.

    A mixin in front of the layer's own class, which goes on doing all the rest. Dropout between the blocks, which
    acts in training only, is left out: it belongs to coordinates that are gone.
    """

    def forward(self, X, *args, **kwargs):
        for stage in self.stages:
            X = stage(self, X, getattr(self, stage.shortcut), *args, **kwargs)
        return X


def set_shortcut(model, layer, stage, Q_in: Tensor, Q_out: Tensor):
    """Figure 4: gives a stage its shortcut Q_in^T Q_out (d_in, d_out), or rotates the one that it has."""
    name = stage.shortcut
    if not isinstance(layer, SlicedLayer):
        layer.stages = stages(model)
        # under the old name, by which accelerate's device maps know what must not be split
        layer.__class__ = type(type(layer).__name__, (SlicedLayer, type(layer)), {"__module__": __name__})
    S = getattr(layer, name).double() @ Q_out if hasattr(layer, name) else Q_out
    setattr(layer, name, nn.Parameter((Q_in.T @ S).to(model.dtype)))


class SlicedForCausalLM:
    """A Hugging Face causal language model that is fused, and perhaps rotated or sliced; a mixin like SlicedLayer.

    `config.slicegpt` has its shape: `dimensions`, of the signal after the embedding and after every stage, whether
    there are `shortcuts`, and whether its head is `tied` (see `tie_head`). A saved model's `auto_map` names this class,
    for AutoModelForCausalLM.
    """

    def __init__(self, config, *args, **kwargs):
        shape = config.slicegpt
        super().__init__(config, *args, **kwargs)
        fuse(self)  # transformers builds models without data, on the meta device: these lines only set shapes
        Q = [torch.eye(config.hidden_size, d) for d in shape["dimensions"]]
        rotate(self, Q if shape["shortcuts"] else Q[0])
        if shape.get("tied"):
            tie_head(self)

    @classmethod
    def mixed_into(cls, base: type) -> type:
        return type("SlicedForCausalLM", (SlicedForCausalLM, base), {"__module__": __name__})

    @classmethod
    def for_config(cls, config) -> type:
        mixed = issubclass(cls, PreTrainedModel)
        return cls if mixed else cls.mixed_into(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])

    @classmethod
    def from_pretrained(cls, path, *args, config=None, **kwargs):
        """Hugging Face's own from_pretrained, of the class that goes with the config."""
        config = config or AutoConfig.from_pretrained(path)
        return super(SlicedForCausalLM, cls.for_config(config)).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        """Likewise, for AutoModelForCausalLM.from_config: random weights."""
        return super(SlicedForCausalLM, cls.for_config(config))._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class):
        """Called by AutoModelForCausalLM: who loads a sliced model and saves it again gets this file with it."""
        cls._auto_class = auto_class.__name__


# ---- 3.2 LayerNorm to RMSNorm ---------------------------------------------------------------------------------------

@torch.no_grad()
def fuse(model):
    """Section 3.2, Figure 3: makes every norm a scale-free RMSNorm, in place; the network computes what it did.

    diag(alpha) and beta of a norm go into the matrices that read it, W_in <- diag(alpha) W_in, b_in <- b_in + beta
    W_in, the last norm's into the head. If the norm is a LayerNorm, M = I - 1 1^T / D, which subtracts the mean, goes
    into all that writes the signal: W_embd <- W_embd M, W_out <- W_out M, b_out <- b_out M. A head tied to the
    embedding gets a matrix of its own, as the two now differ. Arithmetic is in float64. A fused model stays as it is.
    Raises SliceGPTError if the architecture is not supported.
    """
    parts, D, head = architecture(model.config), model.config.hidden_size, model.get_output_embeddings()
    last_norm = model.get_submodule(parts.norm)
    if isinstance(last_norm, RMSNorm | nn.Sequential):  # the latter with the matrix of `tie_head`
        return
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}  # else transformers would tie the two again when it saves
    model._weight_conversions = []  # nor may it save under names that only the dense model's class understands
    for embedding in embeddings(model):
        fuse_writer(last_norm, embedding)
    for layer in layers(model) if stream(model) is None else []:
        fuse_layer(model, layer)
    fuse_reader(last_norm, head, parts.norm_offset)
    model.set_submodule(parts.norm, without_scale(last_norm, D))

    signals = 1 + len(layers(model)) * len(stages(model))
    model.config.slicegpt = {"dimensions": [D] * signals, "shortcuts": False}
    model.config.auto_map = {"AutoModelForCausalLM": "slicegpt.SlicedForCausalLM"}
    if not isinstance(model, SlicedForCausalLM):
        model.__class__ = SlicedForCausalLM.mixed_into(type(model))


def fuse_layer(model, layer):
    """`fuse`, of one layer."""
    blocks = [block for stage in stages(model) for block in stage.blocks]
    for block in blocks:
        norm = layer.get_submodule(block.norm)
        for linear in submodules(layer, block.W_in):
            fuse_reader(norm, linear, architecture(model.config).norm_offset)
        fuse_writer(norm, layer.get_submodule(block.W_out))
    for name in {block.norm for block in blocks}:  # after both blocks, which share one norm in Phi-2
        layer.set_submodule(name, without_scale(layer.get_submodule(name), model.config.hidden_size))


def fuse_reader(norm, linear, offset: float):
    """W_in <- diag(alpha) W_in, b_in <- b_in + beta W_in; alpha is what the norm has stored, and the offset."""
    W, bias = matrix(linear), linear.bias
    if getattr(norm, "bias", None) is not None:
        bias = norm.bias.double() @ W + (0 if bias is None else bias)
    alpha = 1 if norm.weight is None else norm.weight.double()[:, None] + offset
    set_matrix(linear, alpha * W, bias)


def fuse_writer(norm, module):
    """W_out <- W_out M, b_out <- b_out M, in a network with LayerNorms."""
    if isinstance(norm, nn.LayerNorm):
        W, bias = matrix(module), getattr(module, "bias", None)
        set_matrix(module, W - W.mean(1, True), None if bias is None else bias.double() - bias.double().mean())


def without_scale(norm, D: int) -> RMSNorm:
    return RMSNorm(D, norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


# ---- 3.1 Computational invariance -----------------------------------------------------------------------------------

@torch.no_grad()
def rotate(model, Q: Tensor | list[Tensor]):
    """Theorem 1 and Figure 4: rotates the signal, in place; for orthogonal Q the network computes what it did.

    Q: one (D, D) matrix for the whole network (Theorem 1), or a list, one for the embedding and one for the signal
    after every stage: 2L+1 for sequential, L+1 for parallel layers (Figure 4, with shortcuts). A Q of fewer columns
    slices too (Eq. 9). Beyond the paper, a tensor (2L+1, 2, D, d): for each signal the matrix that writes it, in the
    place of Q in Eq. 3, 5 and 6, and the one that reads it, in Eq. 4 and 7. Fuses the model first if need be.
    Arithmetic is in float64. Raises SliceGPTError for a wrong number or shape.
    """
    fuse(model)
    shape = model.config.slicegpt
    shortcuts = shape["shortcuts"] or not isinstance(Q, Tensor)
    writing, reading = ([Q.to(model.device, torch.float64) for Q in Qs] for Qs in per_signal(model, Q))
    for embedding in embeddings(model):
        rotate_writer(embedding, writing[0])
    for number, layer in visit(model):
        for i, stage in enumerate(stages(model), number * len(stages(model))):
            Q_in, Q_out = reading[i], writing[i + 1]
            for linear in stage.readers(layer):
                rotate_reader(linear, Q_in)
            for linear in stage.writers(layer):
                rotate_writer(linear, Q_out)
            if shortcuts:
                set_shortcut(model, layer, stage, Q_in, Q_out)
    head = model.get_output_embeddings()
    if shape.get("tied"):
        last_norm_and_B = model.get_submodule(architecture(model.config).norm)
        rotate_reader(last_norm_and_B[1], reading[-1])
        rotate_writer(last_norm_and_B[1], writing[0])
        head.weight = model.get_input_embeddings().weight
    else:
        rotate_reader(head, reading[-1])
    model.config.slicegpt = shape | {"dimensions": [Q.shape[1] for Q in writing], "shortcuts": shortcuts}


def per_signal(model, Q: Tensor | list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What `rotate` writes each signal of a fused model with, and what it reads it with."""
    dimensions = model.config.slicegpt["dimensions"]
    Qs = [Q] * len(dimensions) if isinstance(Q, Tensor) and Q.dim() == 2 else Q
    writing, reading = zip(*((Q, Q) if Q.dim() == 2 else Q for Q in Qs))
    for Qs in (writing, reading):
        if [len(Q) for Q in Qs] != dimensions:
            raise SliceGPTError(f"this model's rotations have {dimensions} rows, not {[len(Q) for Q in Qs]}")
    return writing, reading


def rotate_writer(module, Q):
    """Eq. 3, 5 and 6: W_embd <- W_embd Q; W_out <- W_out Q, b_out <- Q^T b_out."""
    bias = getattr(module, "bias", None)
    set_matrix(module, matrix(module) @ Q, None if bias is None else bias.double() @ Q)


def rotate_reader(linear, Q):
    """Eq. 4 and 7: W_in <- Q^T W_in, W_head <- Q^T W_head. b_in and b_head stay."""
    set_matrix(linear, Q.T @ matrix(linear), linear.bias)


# ---- 3.3 A transformation per block, and 3.4 Slicing ----------------------------------------------------------------

def covariance(X: Tensor, Y: Tensor | None = None) -> Tensor:
    """Eq. 8, one term: X^T X (D, D), or X^T Y, in float64, multiplied in the precision of X (B, N, D) or in float32."""
    X = at_least_float32(X.flatten(0, -2))
    Y = X if Y is None else at_least_float32(Y.flatten(0, -2))
    return (X.T @ Y).double()


def at_least_float32(X: Tensor) -> Tensor:
    return X if X.dtype == torch.float64 else X.float()


def pca(C: Tensor) -> tuple[Tensor, Tensor]:
    """Section 3.3: eigenvalues (D,) of a covariance C (D, D), largest first, and eigenvectors, the columns of Q (D, D).

    In double precision, as the paper asks for (appendix A.2).
    """
    eigenvalues, Q = torch.linalg.eigh(C.double())
    return eigenvalues.flip(0), Q.flip(1)


def sliced_dimension(D: int, sparsity: float, round_to: int = 8) -> int:
    """(1 - sparsity) D, rounded down to a multiple of `round_to`; D for sparsity 0. Raises if nothing is left."""
    if not 0 <= sparsity < 1:
        raise SliceGPTError(f"sparsity must be at least 0 and below 1, not {sparsity}")
    d = int((1 - sparsity) * D + 1e-6) // round_to * round_to if sparsity else D
    if d == 0:
        raise SliceGPTError(f"sparsity {sparsity} leaves none of the {D} dimensions (in multiples of {round_to})")
    return d


def embed(model, tokens: Tensor) -> tuple[Tensor, list]:
    """Algorithm 1, line 1: the first signal X (B, N, D) of `tokens` (B, N), and what else each layer is called with.

    The model's own forward runs, while its layers hand on what they get and note it: masks, positions and the like.
    """
    calls = []

    def forward(_, X, *args, **kwargs):
        calls.append((X, args, kwargs))
        return X

    with layers_do(forward, model):
        model.base_model(tokens.to(model.device), use_cache=False)
    return calls[0][0], [(args, kwargs) for _, args, kwargs in calls]


@contextlib.contextmanager
def layers_do(forward, model):
    """Inside, the model's layers do forward(layer, X, *args, **kwargs) instead of what is theirs."""
    for layer in layers(model):
        layer.forward = partial(forward, layer)
    try:
        yield
    finally:
        for layer in layers(model):
            del layer.forward


def signals(model, calibration: Tensor, batch_size: int, device) -> Tensor:
    """The first signal X (samples, N, D) of this process's calibration tokens, where it waits for the next block.

    That is in the CPU's memory, pinned if an accelerator will fetch it; or in a file, for a stream that says so.
    """
    calibration, files = share(calibration), stream(model)
    shape = *calibration.shape, model.config.hidden_size
    if files is not None and math.prod(shape) * model.dtype.itemsize > files.signal_memory:
        X = files.memory(shape, model.dtype)
    else:
        X = torch.empty(shape, dtype=model.dtype, pin_memory=device.type == "cuda")
    for x, batch in zip(X.split(batch_size), calibration.split(batch_size)):
        x.copy_(embed(model, batch)[0])
    return X


def visit(model, device=None, state: SimpleNamespace | None = None, rewrites: bool = True):
    """The layers, by number, each on `device` while it is visited.

    Those of a stream are read before and, if the visit rewrites them, written after it; `state` is what else must not
    be lost if the process dies, and is brought back from where an earlier one died.
    """
    files, device = stream(model), device or model.device
    first = files.resume(state, rewrites) if files is not None else 0
    numbers = range(first, len(layers(model)))
    for number in progress(numbers, "layers", unit="layer", initial=first, total=numbers.stop):
        layer = layers(model)[number]
        if files is not None:
            layer = files.read(model, number)
            fuse_layer(model, layer)
        home = next(layer.parameters()).device
        yield number, layer.to(device)
        layer.to(home)
        if files is not None:
            files.finish(number, layer, state, rewrites)
            layer.to("meta")  # its memory is needed for the next one, whoever still refers to it


def sweep(model, calibration: Tensor, device, state: SimpleNamespace, rewrites: bool = True):
    """Walks through the stages of all layers, see `visit`.

    Yields a name for error messages, the layer, the stage, and the other arguments and keyword arguments that the
    layer is called with, which are noted for one sequence, since they are the same for all.
    """
    _, calls = embed(model, calibration[:1])
    for number, layer in visit(model, device, state, rewrites):
        args, kwargs = tree_map(lambda a: a.to(device) if isinstance(a, Tensor) else a, calls[number])
        for stage in stages(model):
            yield f"layer {number}, {stage.blocks[0].modules} ({model.dtype})", layer, stage, args, kwargs


def principal_components(C: Tensor, keep, where: str) -> Tensor:
    """Q D, of Eq. 8 and 9: the first eigenvectors (D, d) of C, as many as `keep` says when it sees the eigenvalues.

    C is this process's part of the sum, and Q the same in all processes.
    """
    C = total(C)
    check_finite(C, where)
    eigenvalues, Q = pca(C)
    return agreed(Q)[:, :keep(eigenvalues)]


def check_finite(C: Tensor, where: str):
    if not C.isfinite().all():
        raise SliceGPTError(f"the signal is not finite after {where}; its type may be too narrow, try --dtype float32")


def kept(model, sparsity: float, discard_variance: float | None, round_to: int, slice_head: bool) -> list:
    """For each signal, the function from its eigenvalues to the dimension that it keeps; D before an unsliced head.

    That is `sliced_dimension(D, sparsity, round_to)`; or, if there is a share of the variance to discard (appendix
    A.4), the least multiple of `round_to`, or else D, whose eigenvectors leave out no more than that share. Raises
    SliceGPTError if the model is sliced already, or cannot have dimensions that differ.
    """
    D, dimensions = model.config.hidden_size, model.config.slicegpt["dimensions"]
    if model.config.slicegpt["shortcuts"] or min(dimensions) < D:
        raise SliceGPTError(f"this model is sliced already: {min(dimensions)} of {D} dimensions")

    if architecture(model.config).one_width and (discard_variance is not None or sparsity and not slice_head):
        raise SliceGPTError(f"a {model.config.model_type}'s last signal must be as wide as its first: it can have "
                            "neither a full head nor dimensions chosen by variance")

    def keep(eigenvalues) -> int:
        if discard_variance is None:
            return sliced_dimension(D, sparsity, round_to)
        left_out = 1 - eigenvalues.cumsum(0) / eigenvalues.sum()
        needed = 1 + int((left_out > discard_variance).sum())
        return min(D, math.ceil(needed / round_to) * round_to)

    return [keep] * (len(dimensions) - 1) + [keep if slice_head else len]


@torch.no_grad()
def slice_model(model, calibration: Tensor, sparsity: float = 0.25, *, discard_variance: float | None = None,
                round_to: int = 8, signal: str = "input", slice_head: bool = True, batch_size: int = 8, device=None):
    """Sections 3.3 and 3.4: slices a model in place and returns it. Fuses it if need be, and sets it to eval mode.

    One sweep over the layers, in which every block runs once: on the output of the blocks before it as slicing has
    left them, and into all D dimensions, from which comes the Q of the next block (Eq. 8) by which its output is then
    sliced.

    calibration: tokens (samples, seqlen), int64. sparsity, discard_variance, round_to, slice_head: how many
    dimensions the signals keep, see `kept`. signal: the side of the RMSNorm that Eq. 8 looks at, "input" (the
    authors' code) or "output" (the paper's text). device: where to compute, with one layer there at a time; by
    default where the model is. Raises SliceGPTError for bad arguments, and for a signal that is not finite (the model
    is then lost).
    """
    device = torch.device(device or model.device)
    check_length(model.config, calibration.shape[1])
    sliced_dimension(model.config.hidden_size, sparsity, round_to)
    fuse(model.eval())
    keep = kept(model, sparsity, discard_variance, round_to, slice_head)
    observe = model.get_submodule(architecture(model.config).norm) if signal == "output" else nn.Identity()

    X = signals(model, calibration, batch_size, device)
    C = sum(covariance(observe(x.to(device))) for x in X.split(batch_size))
    Q = principal_components(C, keep[0], "the embedding")
    for embedding in embeddings(model):
        rotate_writer(embedding, Q.to(model.device))
    state = SimpleNamespace(X=X, Q=Q, dimensions=[Q.shape[1]])
    for where, layer, stage, args, kwargs in sweep(model, calibration, device, state):
        Q, C = state.Q, 0
        for linear in stage.readers(layer):
            rotate_reader(linear, Q)
        QD = Q.to(model.dtype)
        for x in X.split(batch_size):
            Z = x.to(device, non_blocking=True) @ QD  # Eq. 9: (B, N, d)
            Z = stage(layer, Z, QD.T, *args, **kwargs)  # Algorithm 1, line 5: (B, N, D)
            C = C + covariance(observe(Z))  # Eq. 8
            x.copy_(Z)
        state.Q = principal_components(C, keep[len(state.dimensions)], where)
        for linear in stage.writers(layer):
            rotate_writer(linear, state.Q)
        set_shortcut(model, layer, stage, Q, state.Q)
        state.dimensions.append(state.Q.shape[1])
    rotate_reader(model.get_output_embeddings(), state.Q.to(model.device))
    model.config.slicegpt = {"dimensions": state.dimensions, "shortcuts": True}
    return model


def check_length(config, seqlen: int):
    longest = getattr(config, "max_position_embeddings", None) or seqlen
    if seqlen > longest:
        raise SliceGPTError(f"sequences of {seqlen} tokens are longer than the model's {longest} positions")


def progress(*args, **kwargs):
    """A tqdm bar, for what takes more than two seconds; where it cannot move, as in a log, seldom redrawn."""
    return tqdm(*args, **kwargs | {"delay": 2, "leave": False, "mininterval": 0.2 if sys.stderr.isatty() else 20})


# ---- Beyond the paper -----------------------------------------------------------------------------------------------
#
# Nothing in this section is in the paper. It loses less perplexity at the same size, by four ideas that go alone or
# together: one rotation for all blocks, so that there are no shortcuts; rotation and weights that are learned from what
# the dense network predicts; least squares where the paper truncates; and a head that goes on sharing the embedding's
# matrix. With the first, which the second needs, a sliced Llama is a Llama again (`standard`).

@torch.no_grad()
def shared_rotation(model, calibration: Tensor, *, batch_size: int = 8, device=None) -> Tensor:
    """One Q (D, D) for the whole network, in float64; `rotate(model, Q[:, :d])` slices with it, without shortcuts.

    Its columns are the eigenvectors of C, a sum over the signals X of the *dense* network, from the embedding to the
    head: the covariance of RMSNorm(X), which is what the blocks read, and 0.3 times that of X, which is what they add
    to, each divided by its trace, so that every signal has the same say. Fuses the model, and sets it to eval mode.
    Raises SliceGPTError for a signal that is not finite.
    """
    device = torch.device(device or model.device)
    check_length(model.config, calibration.shape[1])
    fuse(model.eval())
    norm = model.get_submodule(architecture(model.config).norm)

    def shares(where) -> Tensor:  # (D, D)
        written = total(sum(covariance(x.to(device)) for x in X.split(batch_size)))
        check_finite(written, where)
        read = total(sum(covariance(norm(x.to(device))) for x in X.split(batch_size)))
        return read / read.trace() + 0.3 * written / written.trace()

    X = signals(model, calibration, batch_size, device)
    state = SimpleNamespace(X=X, C=shares("the embedding"))
    for where, layer, stage, args, kwargs in sweep(model, calibration, device, state, rewrites=False):
        for x in X.split(batch_size):
            Z = x.to(device)
            x.copy_(stage(layer, Z, None, *args, **kwargs))
        state.C = state.C + shares(where)
    return agreed(pca(state.C)[1])


def learn_rotation(model, calibration: Tensor, Q: Tensor, steps: int, *, learning_rate: float | None = None,
                   batch_size: int = 4, seed: int = 0) -> Tensor:
    """A Q (D, d) with orthonormal columns, in float64, that costs the network's output less than the one it starts at.

    Theorem 1 leaves Q free, so it may be chosen by what the sliced network says instead of by variance, see `imitate`:
    Q is the orthogonal factor (QR) of Q + M, and a gradient through that turns the subspace only. No weight is changed.
    learning_rate: by default proportional to the entries of a Q. Fuses the model, and sets it to eval mode.
    """
    Q = agreed(Q)

    def rotation(M) -> Tensor:
        return torch.linalg.qr(Q.to(M) + M).Q

    M = imitate(model, model, calibration, Q.shape, rotation, steps, learning_rate or 0.07 / math.sqrt(len(Q)),
                batch_size, seed)
    return rotation(M.double())


def learn_refit(model, dense, calibration: Tensor, steps: int, *, learning_rate: float | None = None,
                batch_size: int = 4, seed: int = 0):
    """Moves the weights of a sliced model, without shortcuts, in place, to where they cost the output less.

    It goes on where `learn_rotation` or `slice_and_refit` ended, whose least squares weigh all directions of a signal
    alike, and descends on what the dense network's output makes of them, see `imitate`. Each stage reads the signal
    through a matrix I + M (d, d) of its own, and writes through one, so that W_in <- (I + M)^T W_in and
    W_out <- W_out (I + M). learning_rate: by default proportional to a Q's entries.
    Raises SliceGPTError, also, for a model that has shortcuts.
    """
    fuse(model)
    if model.config.slicegpt["shortcuts"]:
        raise SliceGPTError("a refit is learned without shortcuts")
    dimensions = model.config.slicegpt["dimensions"]
    I = torch.eye(dimensions[0], dtype=torch.float64, device=model.device)
    M = imitate(model, dense, calibration, (len(dimensions), 2, *I.shape), lambda M: I.to(M) + M, steps,
                learning_rate or 0.0025 / math.sqrt(dense.config.hidden_size), batch_size, seed)
    rotate(model, I + M)


def imitate(model, dense, calibration: Tensor, shape, rotation, steps: int, learning_rate: float, batch_size: int,
            seed: int) -> Tensor:
    """M, at first 0, for which `model`, rotated and sliced by rotation(M), predicts what the dense network predicts.

    Descends on the Kullback-Leibler divergence, in nats per token, of the sliced network's next-token distributions
    from the dense one's, on sequences of up to 256 calibration tokens, random ones under the seed, `batch_size` in a
    step. Fuses both and sets them to eval mode; no weight of theirs is changed, see `projected`. Memory: signals
    between the layers; within them, one layer's at a time; M, its gradient, and two moments of that. Raises
    SliceGPTError for a divergence that is not finite.
    """
    check_length(model.config, calibration.shape[1])
    fuse(model.eval())
    fuse(dense.eval())
    length = min(256, calibration.shape[1])
    pieces = calibration[:, :calibration.shape[1] // length * length].reshape(-1, length)
    generator = torch.Generator().manual_seed(seed)
    batches = [pieces[torch.randint(len(pieces), (batch_size,), generator=generator)] for _ in range(steps)]
    dtype = torch.promote_types(model.dtype, torch.float32)
    M = torch.zeros(shape, dtype=dtype, device=model.device, requires_grad=True)
    M.register_hook(total)
    frozen = {parameter: parameter.requires_grad for parameter in model.parameters()}

    def divergence(batch):
        mine = share(batch).to(model.device)
        with torch.no_grad():
            expected = dense(mine, use_cache=False).logits
        with projected(model, rotation(M)):
            found = model(mine, use_cache=False).logits
        expected, found = (at_least_float32(logits.flatten(0, 1)).log_softmax(-1) for logits in (expected, found))
        count = total(torch.tensor(mine.numel(), device=mine.device))
        return F.kl_div(found, expected, log_target=True, reduction="sum") / count

    try:
        model.requires_grad_(False)
        descend([M], batches, divergence, learning_rate, "learning to predict as the dense network does")
    finally:
        for parameter, requires_grad in frozen.items():
            parameter.requires_grad = requires_grad
    return M.detach()


@contextlib.contextmanager
def projected(model, Q: Tensor):
    """Inside, a fused model computes what `rotate(model, Q)` would make of it, with no weight rewritten.

    Z Q is written instead of Z, and X Q^T read instead of the normalised X. Of what is computed within a layer nothing
    is kept for the gradient; it is computed again.
    """
    (embedded, *writing), (*reading, last) = per_signal(model, Q)
    maps = iter(zip(reading, writing))
    parts = {layer: [(stage, *next(maps)) for stage in stages(model)] for layer in layers(model)}

    def forward(layer, X, *args, **kwargs):
        for stage, Q_in, Q_out in parts[layer]:
            normalised = layer.get_submodule(stage.blocks[0].norm)(X) @ Q_in.T
            X = X + sum(block(layer, normalised, *args, **kwargs) for block in stage.blocks) @ Q_out
        return X

    def writes(module, Q):
        return module.register_forward_hook(lambda module, inputs, X: X @ Q)

    def reads(module, Q):
        return module.register_forward_pre_hook(lambda module, inputs: inputs[0] @ Q.T)

    hooks = [writes(embedding, embedded) for embedding in embeddings(model)]
    if model.config.slicegpt.get("tied"):  # then what writes the embedding is in the head, too
        B = model.get_submodule(architecture(model.config).norm)[1]
        hooks += [reads(B, last), writes(B, embedded)]
        last = embedded
    hooks.append(reads(model.get_output_embeddings(), last))
    try:
        with layers_do(partial(checkpoint, forward, use_reentrant=False), model):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def slice_and_refit(model, calibration: Tensor, sparsity: float = 0.25, *, Q: Tensor | None = None,
                    discard_variance: float | None = None, round_to: int = 8, slice_head: bool = True,
                    batch_size: int = 8, device=None):
    """Slices like `slice_model`, but fits what is left of the weights to what the dense network does.

    What slicing loses piles up from block to block. So the dense network with its signal X (N, D) and the sliced one,
    whose signal Y (N, D) each block reads as Z = Y Q D (N, d), go through the layers side by side. The sliced weights
    get what a least squares fit of the remaining error adds to them:

        W_in <- (Q D + A)^T W_in    with RMSNorm(Z) A^T ~ RMSNorm(X) - RMSNorm(Z) (Q D)^T
        W_out <- (W_out + B) Q D    with H B ~ X - Y, both behind the block, and H (N, inputs) what this W_out reads

    The last Q is that of the next block (Eq. 8): the principal components of Y, refitted, so that no dimension is
    kept for what the sliced network has lost already.

    Q: the shared rotation (D, D), instead; then there are no shortcuts. The other arguments, and what it raises, are
    those of `slice_model`. It costs a forward pass of the dense network, two of the sliced one, and the fits.
    """
    device, shared = torch.device(device or model.device), Q
    check_length(model.config, calibration.shape[1])
    d = sliced_dimension(model.config.hidden_size, sparsity, round_to)
    fuse(model.eval())
    keep = kept(model, sparsity, discard_variance, round_to, slice_head)
    norm = model.get_submodule(architecture(model.config).norm)
    X, Y = (signals(model, calibration, batch_size, device) for _ in range(2))
    state = SimpleNamespace(X=X, Y=Y, Q=None, dimensions=[])

    def rotation(where) -> Tensor:  # Q D (D, d)
        if shared is not None:
            return shared[:, :d].to(device)
        C = sum(covariance(y.to(device)) for y in Y.split(batch_size))
        return principal_components(C, keep[len(state.dimensions)], where)

    def both():  # X and Z, batch by batch; and where X is kept
        for x, y in zip(X.split(batch_size), Y.split(batch_size)):
            yield x.to(device), y.to(device) @ state.Q.to(y.dtype), x, y

    def input_fit(where) -> Tensor:  # Q D + A (D, d)
        Q = state.Q
        return Q + least_squares(((norm(z), norm(x) - norm(z) @ Q.T.to(x.dtype)) for x, z, *_ in both()), where).T

    state.Q = rotation("the embedding")
    state.dimensions.append(state.Q.shape[1])
    for embedding in embeddings(model):
        rotate_writer(embedding, state.Q.to(model.device))
    for where, layer, stage, args, kwargs in sweep(model, calibration, device, state):
        dense, A, Q, writers = copy.deepcopy(layer), input_fit(where), state.Q, stage.writers(layer)
        for linear in stage.readers(layer):
            rotate_reader(linear, A)

        def forward(z) -> Tensor:  # Y behind the block
            return stage(layer, z, Q.T.to(z.dtype), *args, **kwargs)

        def output_errors():
            for x, z, X_kept, _ in both():
                H = []
                hooks = [linear.register_forward_pre_hook(lambda _, inputs: H.append(inputs[0])) for linear in writers]
                y = forward(z)
                for hook in hooks:
                    hook.remove()
                x = stage(dense, x, None, *args, **kwargs)
                X_kept.copy_(x)
                yield torch.cat(H, -1), x - y  # (B, N, inputs of all writers), (B, N, D)

        B = least_squares(output_errors(), where)
        for linear, rows in zip(writers, B.split([len(matrix(linear)) for linear in writers])):
            set_matrix(linear, matrix(linear) + rows, linear.bias)
        for _, z, _, Y_kept in both():
            Y_kept.copy_(forward(z))
        state.Q = rotation(where)
        for linear in writers:
            rotate_writer(linear, state.Q)
        if shared is None:
            set_shortcut(model, layer, stage, Q, state.Q)
        state.dimensions.append(state.Q.shape[1])
    rotate_reader(model.get_output_embeddings(), input_fit("the last layer").to(model.device))
    model.config.slicegpt = {"dimensions": state.dimensions, "shortcuts": shared is None}
    return model


def least_squares(pairs, where: str) -> Tensor:
    """W (h, t) in float64, the least |T - H W|^2 + 0.01 g |W|^2 over all pairs H (B, N, h), T (B, N, t).

    g is the mean of the diagonal of H^T H. So W is 0 where there is nothing to explain, or nothing to explain it by.
    """
    G = C = 0
    for H, T in pairs:
        G, C = G + covariance(H), C + covariance(H, T)
    G, C = total(G), total(C)
    check_finite(C, where)
    ridge = (0.01 * G.diag().mean()).clamp_min(torch.finfo(G.dtype).tiny)
    return agreed(torch.linalg.solve(G + ridge * torch.eye(len(G), dtype=G.dtype, device=G.device), C))


@torch.no_grad()
def tie_head(model, calibration: Tensor | None = None):
    """Gives a fused model, in place, the embedding's matrix back as its head, with a small matrix B in front.

    Fusing, slicing and refitting leave a head W (d, V) that is no longer the embedding E (V, d), but is still made of
    it: W ~ B E^T with B = W P E (E^T P E)^-1 (d, d), a least squares fit over the vocabulary. The diagonal P weighs its
    tokens by their frequency in the calibration tokens, if there are any. For models whose embedding and head were one
    matrix; a small model has much of its size there.
    """
    embedding, head, path = model.get_input_embeddings(), model.get_output_embeddings(), architecture(model.config).norm
    E, W = matrix(embedding), matrix(head)
    B = nn.Linear(len(W), E.shape[1], bias=False, dtype=model.dtype, device=model.device)
    if not W.is_meta:  # else there are only shapes
        counts = torch.bincount((torch.arange(0) if calibration is None else calibration).flatten(), minlength=len(E))
        PE = (counts / counts.sum().clamp_min(1) + 1 / len(E)).to(E)[:, None] * E  # as if all came up once or so more
        set_matrix(B, W @ PE @ torch.linalg.pinv(E.T @ PE, hermitian=True), None)
    model.set_submodule(path, nn.Sequential(model.get_submodule(path), B))
    set_matrix(head, E.T, head.bias)
    model.config.slicegpt["tied"] = model.config.tie_word_embeddings = True
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()


@torch.no_grad()
def standard(model) -> tuple[PreTrainedModel, str]:
    """A sliced model as one of Hugging Face's own class, equal to it, and ""; or the model, and why there is none.

    Without shortcuts, a sliced Llama is a Llama of a smaller `hidden_size` d. Its RMSNorms see |x|^2 / d + eps, ours
    |x|^2 / D + eps, which is the same if the signal is x sqrt(d / D): so all that writes the signal is multiplied by
    sqrt(d / D), and the norms get a scale of sqrt(D / d). The other weights are shared with the old model.
    """
    shape, config = model.config.slicegpt, copy.deepcopy(model.config)
    if shape["shortcuts"]:
        return model, "it has shortcuts"
    if shape.get("tied"):
        return model, "its head is tied through a matrix of its own"
    if not hasattr(config, "rms_norm_eps"):
        return model, "its norms are LayerNorms, which subtract a mean"
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    config.hidden_size = shape["dimensions"][0]
    del config.slicegpt, config.auto_map
    try:
        config = type(config).from_dict(config.to_dict())  # checks it
    except Exception as error:
        return model, f"transformers refuses its shape: {first_line(error.__cause__ or error)}"
    base = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        stock = base._from_config(config, dtype=model.dtype)
    weights = rescaled(model, model.state_dict())
    if {name: W.shape for name, W in weights.items()} != {name: W.shape for name, W in stock.state_dict().items()}:
        return model, f"a {config.model_type}'s heads must add up to its hidden size"
    if model.device.type == "meta":
        return stock, ""
    stock = base.from_pretrained(None, config=config, state_dict=weights, dtype=model.dtype)
    stock.generation_config = model.generation_config
    return stock.to(model.device), ""


def rescaled(model, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `standard` makes of the weights of a sliced model, or of the embedding's and some layers'."""
    parts, D, d = architecture(model.config), model.config.hidden_size, model.config.slicegpt["dimensions"][0]
    scale, names = math.sqrt(D / d), [(parts.embeddings, parts.norm)]
    for number in range(len(layers(model))):
        for block in (parts.attention, parts.ffn):
            names.append((f"{parts.layers}.{number}.{block.W_out}", f"{parts.layers}.{number}.{block.norm}"))
    new = {}
    for writer, norm in names:
        W = weights.get(f"{writer}.weight")
        if W is not None:
            new[f"{norm}.weight"] = torch.full((d,), scale - parts.norm_offset, dtype=W.dtype, device=W.device)
        # Gemma multiplies by the square root of its hidden size what comes out of its embedding: that is sqrt(d/D) less
        if writer != parts.embeddings or not hasattr(embeddings(model)[0], "embed_scale"):
            new |= {name: (weights[name].double() / scale).to(weights[name].dtype)
                    for name in (f"{writer}.weight", f"{writer}.bias") if name in weights}
    return weights | new


def outline(config) -> tuple[PreTrainedModel, str]:
    """`standard` of a sliced model of this config without its weights, which are on the meta device."""
    with torch.device("meta"):
        return standard(SlicedForCausalLM._from_config(config))


def dimension_for(model, share: float, round_to: int, shape) -> int:
    """The largest d, a multiple of `round_to`, whose sliced network has at most that share of a model's parameters.

    shape: the function from d to the sliced model's `config.slicegpt`. The network is built on the meta device, so
    that all of it is counted and nothing is computed. Raises SliceGPTError, with what can be had, if there is none.
    """
    @cache
    def reached(d) -> float:
        config = copy.deepcopy(model.config)
        config.slicegpt = shape(d)
        return parameters(outline(config)[0]) / parameters(model)

    multiples = range(round_to, model.config.hidden_size + 1, round_to)
    fitting = bisect.bisect_right(multiples, share, key=reached)
    if not fitting:
        reach = f"{reached(multiples[0]):.3f} to {reached(multiples[-1]):.3f}" if multiples else "none"
        raise SliceGPTError(f"a share {share} of the parameters cannot be reached, in multiples of {round_to}: {reach}")
    return multiples[fitting - 1]


# ---- Several processes (torchrun), and a model larger than memory ---------------------------------------------------

def share(samples: Tensor) -> Tensor:
    """This process's part of the samples.

    If there are fewer than processes, each takes all of them: more of the same changes no Q, no fit and no mean.
    """
    if not dist.is_initialized() or len(samples) < dist.get_world_size():
        return samples
    return samples.tensor_split(dist.get_world_size())[dist.get_rank()]


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


class Stream:
    """The layers of a model whose weights are never all in memory (`--stream`), see `visit`.

    Each is read from safetensors files when its turn comes, and written to a file of its own. These, and the state in
    which the last layer has left the calculation, are in the directory `work`; so the same calls with the same
    arguments in another process go on where an earlier one died, and come to the same result, bit for bit.
    signal_memory: bytes; larger signals are in `work` too, mapped into memory.
    """

    def __init__(self, work: Path, signal_memory: float = math.inf):
        self.work, self.signal_memory, self.files = work, signal_memory, {}

    def load(self, path: str, config, dtype):
        """The model, with its layers on the meta device. Raises ValueError if its files are not all there."""
        if not os.path.isdir(path):
            patterns = ["*.safetensors", "*.safetensors.index.json"]
            path = importlib.import_module("huggingface_hub").snapshot_download(path, allow_patterns=patterns)
        single, index = Path(path, "model.safetensors"), Path(path, "model.safetensors.index.json")
        if index.exists():
            files = sorted({Path(path, file) for file in json.loads(index.read_text())["weight_map"].values()})
        elif single.exists():
            files = [single]
        else:
            raise ValueError("--stream needs .safetensors files, and there are none")
        with optional("accelerate").init_empty_weights():  # real buffers, such as rotary tables
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype if dtype == "auto" else dtype).eval()
        with contextlib.suppress(OSError):
            model.generation_config = transformers.GenerationConfig.from_pretrained(path)
        model.stream, self.prefix = self, f"{architecture(config).layers}."
        renamings, own = get_model_conversion_mapping(model), model.state_dict()
        for file in files:
            try:
                for stored in safe_open(file, "pt").keys():
                    name, _ = rename_source_key(stored, renamings, [], model.base_model_prefix, own)
                    self.files[name] = file, stored
            except Exception as error:
                raise ValueError(f"{file.name} is missing or damaged: {first_line(error)}") from error
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        check_complete(own.keys() - self.files.keys() - tied)
        self.fill(model, [name for name in own if not name.startswith(self.prefix) and name not in tied])
        model.tie_weights()
        return model

    def begin(self, options: dict):
        """Makes the directory `work`; what is in it already must have been begun with the same options."""
        begun = self.work / "options.json"
        with disk_errors(self.work):
            self.work.mkdir(parents=True, exist_ok=True)
            if not begun.exists():
                with complete(begun) as unfinished:
                    unfinished.write_text(json.dumps(options))
        other = [name for name, value in json.loads(begun.read_text()).items() if options.get(name) != value]
        if other:
            raise SliceGPTError(f"{self.work} was begun with other options ({', '.join(other)}); "
                                "remove it to begin anew")

    def fill(self, module, names, prefix: str = ""):
        """Gives a module on the meta device the weights of these names."""
        weights = {}
        for name in names:
            file, stored = self.files[prefix + name]
            with safe_open(file, "pt") as file:
                weights[name] = file.get_tensor(stored).to(module.get_parameter(name).dtype, copy=True)
        module.load_state_dict(weights, strict=False, assign=True)

    def read(self, model, number: int) -> nn.Module:
        """A layer with its weights; the model's own stays on the meta device."""
        layer = copy.deepcopy(layers(model)[number])
        self.fill(layer, layer.state_dict(), f"{self.prefix}{number}.")
        return layer

    def memory(self, shape, dtype) -> Tensor:
        """Memory that is the pages of a file without a name: it goes with the last tensor, or with the process."""
        with disk_errors(self.work), tempfile.NamedTemporaryFile(dir=self.work) as file:
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * dtype.itemsize)  # a full disk says so now
            return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)

    def finish(self, number: int, layer, state, rewrites: bool):
        """Writes a layer, if it has been rewritten, and then the state behind it."""
        weights = {f"{self.prefix}{number}.{name}": tensor for name, tensor in layer.state_dict().items()}
        with disk_errors(self.work):
            if rewrites:  # it counts when the state says so
                save_file(weights, self.layer(number), {"format": "pt"})
            with complete(self.state(rewrites)) as unfinished, open(unfinished, "wb") as file:
                torch.save({"next": number + 1} | vars(state or SimpleNamespace()), file)

    def resume(self, state, rewrites: bool) -> int:
        """The layer to begin with; `state` becomes what it was before that layer."""
        if not self.state(rewrites).exists():
            return 0
        saved = torch.load(self.state(rewrites), mmap=True)
        for name in {"X", "Y"} & saved.keys():  # the signals stay where they are
            getattr(state, name).copy_(saved.pop(name))
        first = saved.pop("next")
        vars(state or SimpleNamespace()).update(saved)
        return first

    def layer(self, number: int) -> Path:
        return self.work / f"layer-{number}.safetensors"

    def state(self, rewrites: bool) -> Path:
        return self.work / ("slicing.pt" if rewrites else "rotation.pt")

    def save(self, model, folder: Path) -> PreTrainedModel:
        """What `save_pretrained` does, and an outline of the model that it has written: a standard one if it can be."""
        model_outline, why_not_standard = outline(model.config)
        model_outline.generation_config = model.generation_config

        def weights_of(weights):
            return weights if why_not_standard else rescaled(model, weights)

        rest = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(self.prefix)}
        model_outline.save_pretrained(folder, state_dict=weights_of(rest), max_shard_size="1TB")
        files = [folder / f"model-{i:05}-of-{len(layers(model)) + 1:05}.safetensors"
                 for i in range(1, len(layers(model)) + 2)]
        (folder / "model.safetensors").rename(files[0])
        for number, file in enumerate(files[1:]):
            if why_not_standard:
                os.link(self.layer(number), file)
            else:
                save_file(weights_of(load_file(self.layer(number))), file, {"format": "pt"})
        weight_map, size = {}, 0
        for file in files:
            with safe_open(file, "pt") as tensors:
                weight_map |= dict.fromkeys(tensors.keys(), file.name)
            size += file.stat().st_size
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        return model_outline


@contextlib.contextmanager
def complete(path: Path):
    """The path of a file to write, which gets its name `path` only when it is complete."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    yield unfinished
    unfinished.replace(path)


def stream(model) -> Stream | None:
    return getattr(model, "stream", None)


# ---- 4 Experiments: texts, perplexity, generation, zero-shot tasks, recovery fine-tuning ----------------------------

HUB_TEXTS = {  # name: data set and configuration, with columns `text`
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "alpaca": ("tatsu-lab/alpaca", None),
}


def read_text(name: str, evaluation: bool) -> str:
    """A text to calibrate on, or one to evaluate on: wikitext2, alpaca, pydoc, or the path of a file.

    The file is a UTF-8 text, or a .json, .jsonl or .parquet with a column `text`. Of a data set without a test split,
    random 80% are for calibration and 10% for evaluation, always the same, as in the authors' code. pydoc is the
    language reference that ships with CPython; every tenth of its topics is kept for evaluation.
    """
    if name == "pydoc":
        topics = importlib.import_module("pydoc_data.topics").topics
        return "\n\n".join(topics[key] for i, key in enumerate(sorted(topics)) if (i % 10 == 0) == evaluation)
    kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(Path(name).suffix)
    try:
        if name in HUB_TEXTS:
            splits = optional("datasets").load_dataset(*HUB_TEXTS[name])
            if "test" not in splits:
                halves = splits["train"].train_test_split(0.2, seed=42)
                splits = {"train": halves["train"], "test": halves["test"].train_test_split(0.5, seed=42)["test"]}
            rows = splits["test" if evaluation else "train"]
        elif kind and Path(name).is_file():
            rows = optional("datasets").load_dataset(kind, data_files=name, split="train")
        else:
            return Path(name).read_text(encoding="utf-8")
        if "text" not in rows.column_names:
            raise ValueError(f"it has no column text, only {', '.join(rows.column_names)}")
        return "\n\n".join(text or "" for text in rows["text"])
    except SliceGPTError:
        raise
    except UnicodeDecodeError as error:
        raise SliceGPTError(f"{name} is not a UTF-8 text: {first_line(error)}") from error
    except Exception as error:  # files from elsewhere can be wrong in many ways
        hint = "without a network, name a text file or pydoc" if name in HUB_TEXTS else \
            f"besides files there are {', '.join(HUB_TEXTS)} and pydoc"
        raise SliceGPTError(f"cannot read the text {name}: {first_line(error)}; {hint}") from error


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
    """Section 4: exp of the mean negative log likelihood, in nats, of tokens (samples, seqlen), but each first one.

    batch_size: sequences at a time; by default some 4096 tokens, as the logits (B, N, vocabulary) are large.
    """
    device, mine = device or model.device, share(tokens)
    loss_and_count = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in progress(mine.split(batch_size or max(1, 4096 // tokens.shape[1])), "perplexity", unit="batch"):
        batch = batch.to(device)
        logits = at_least_float32(model(batch, use_cache=False).logits[:, :-1].flatten(0, 1))
        loss_and_count[0] += F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum")
        loss_and_count[1] += len(logits)
    loss, count = total(loss_and_count).tolist()
    return math.exp(loss / count)


def generate(model, tokenizer, prompt: str, device=None) -> str:
    """The prompt, continued by 40 tokens, each the likeliest."""
    inputs = tokenizer(prompt, return_tensors="pt").to(device or model.device)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def parameters(model) -> int:
    """The number of parameters, each tensor counted once: a head tied to the embedding is no second matrix."""
    return sum(parameter.numel() for parameter in model.parameters())


def harness(tasks: str, path: Path | None = None):
    """(names, the LM Evaluation Harness's manager of tasks) of names with commas between them. Raises SliceGPTError.

    path: a directory with more tasks than the harness's own.
    """
    manager, names = optional("lm_eval.tasks").TaskManager(include_path=path), tasks.split(",")
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks)
            raise SliceGPTError(f"there is no task {name}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return names, manager


def zero_shot(model, tokenizer, names: list[str], manager, limit: int | None = None) -> dict[str, tuple]:
    """Section 4, Figure 5: (accuracy, standard error, metric) in each task, by the LM Evaluation Harness's defaults.

    The accuracy is the one normalised by the length of the answers (acc_norm) where a task has it, as in the authors'
    code. limit: questions of each task. The average over the tasks, which the paper plots, comes last.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    network = optional("lm_eval.models.huggingface").HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    try:
        evaluate = optional("lm_eval").simple_evaluate
        results = evaluate(network, tasks=names, task_manager=manager, limit=limit)["results"]
    except (OSError, ValueError) as error:
        raise SliceGPTError(f"cannot run the tasks {','.join(names)}: {first_line(error)}") from error
    scores = {}
    for name in names:
        metric = "acc_norm" if "acc_norm,none" in results[name] else "acc"
        if f"{metric},none" not in results[name]:
            raise SliceGPTError(f"the task {name} measures no accuracy")
        scores[name] = (results[name][f"{metric},none"], results[name][f"{metric}_stderr,none"], metric)
    return scores | {"average": (sum(accuracy for accuracy, *_ in scores.values()) / len(scores), None, "")}


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
    """Trains what is not frozen on each batch of tokens (B, N) once, see `descend`; leaves the model in eval mode."""
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
    known = model.config.model_type in peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    targets = None if known else [path.rpartition(".")[2] for path in parts.attention.W_in.split()]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=32, lora_alpha=10, target_modules=targets))
        batches = tokens.split(batch_size)
        if dist.is_initialized():  # as many for each process, some twice if they do not come out even
            rank, size = dist.get_rank(), dist.get_world_size()
            batches = [batches[i % len(batches)] for i in range(rank, math.ceil(len(batches) / size) * size, size)]
        if model.device.type == "cuda":
            model.activation_checkpointing_enable({"use_reentrant": False})
        try:
            train(adapted, batches, learning_rate, "recovery fine-tuning")
        except SliceGPTError:
            adapted.unload()
            raise
        else:
            adapted.merge_and_unload()
        finally:
            model.activation_checkpointing_disable()
            model.eval().requires_grad_(True)


# ---- Load and save --------------------------------------------------------------------------------------------------

def load(name, dtype="auto", device="cpu", stream: Stream | None = None, **options):
    """(model, tokenizer) of a hub id, a local directory, one that `save` wrote, a .gguf file, or "demo".

    dtype: a torch.dtype, or "auto" for the checkpoint's own. device: where to, or "auto" for wherever there is room, on
    several accelerators, in memory, or on disk (accelerate; such a model is for use, not for slicing). stream: leaves
    the layers where they are. options: from_pretrained's. Raises SliceGPTError if there is no such model, and, before
    its weights are read, if it cannot be sliced.
    """
    path, files = str(name), {}
    if path == "demo":
        path = str(demo())
    elif path.endswith(".gguf") and os.path.isfile(path):
        optional("gguf"), optional("accelerate")
        path, files = os.path.dirname(path) or ".", {"gguf_file": os.path.basename(path)}
    elif not os.path.exists(path) and (path.count("/") > 1 or path.startswith((".", "/")) or path.endswith(".gguf")):
        raise SliceGPTError(f"cannot load {path}: there is no such file or directory")
    try:
        config = AutoConfig.from_pretrained(path, **files)
        architecture(config)
        tokenizer = AutoTokenizer.from_pretrained(path, **files)
        if stream is not None:
            if files or hasattr(config, "slicegpt"):
                raise SliceGPTError(f"--stream needs a dense model's .safetensors files, and {name} is none")
            return stream.load(path, config, dtype), tokenizer
        auto = SlicedForCausalLM if hasattr(config, "slicegpt") else AutoModelForCausalLM
        if files:
            files["quantization_config"] = transformers.GgufConfig(dequantize=True)
        if device == "auto":
            optional("accelerate")
            options["device_map"] = "auto"
        model, found = auto.from_pretrained(path, dtype=dtype, output_loading_info=True, **files, **options)
        check_complete(found["missing_keys"])  # transformers would go on with random ones
        return model if device == "auto" else model.to(device), tokenizer
    except SliceGPTError:
        raise
    except Exception as error:  # files from elsewhere can be wrong in many ways
        reason = first_line(error)
        if "connect" in reason.lower() and not os.path.exists(path):
            reason = "it is not a local path, and the hub cannot be reached; use a local directory, or --model demo"
        raise SliceGPTError(f"cannot load {name}: {reason}") from error


def check_complete(missing):
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, among them {min(missing)}")


def save(model, tokenizer, path):
    """Writes a directory that `load` reads back bit for bit, as does AutoModelForCausalLM.

    It has Hugging Face's files and, for a model of ours, a copy of this one, which AutoModelForCausalLM needs
    trust_remote_code=True to run. It gets its name only when complete. A streamed model is written as what `standard`
    makes of it. Raises SliceGPTError if something is there, or if the disk refuses.
    """
    path, files = Path(path), stream(model)
    check_free(path)
    unfinished = files.work / "result" if files else path.with_name(f".{path.name}.{os.getpid()}")
    with disk_errors(path):
        try:
            shutil.rmtree(unfinished, ignore_errors=True)  # a process died while it wrote
            path.parent.mkdir(parents=True, exist_ok=True)
            written = files.save(model, unfinished) if files else model
            if not files:
                model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            if isinstance(written, SlicedForCausalLM):
                shutil.copyfile(__file__, unfinished / "slicegpt.py")
            unfinished.replace(path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    if files:
        shutil.rmtree(files.work)


@contextlib.contextmanager
def disk_errors(path):
    """Says in one line that the disk is full and the like."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError):
            error = error.__context__  # torch.save stumbles over the disk's error once more
        if not isinstance(error, OSError | SafetensorError):
            raise
        raise SliceGPTError(f"cannot save to {path}: {first_line(error)}") from error


def check_free(path: Path):
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise SliceGPTError(f"cannot save to {path}: it exists and is not an empty directory")


def optional(package: str):
    """A package that only some uses need. (transformers asks whoever loads a model for all that `import` names.)"""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0].replace("_", "-")
        raise SliceGPTError(f"this needs the package {name}: pip install {name}") from None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def demo() -> Path:
    """The directory of the model that needs no network: a small OPT, trained on pydoc when first asked for."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "slicegpt")
    path = cache / f"demo-{sys.hexversion:x}"  # the text is another in each Python
    if path.exists():
        return path
    if dist.is_initialized():
        raise SliceGPTError("the demo model is trained by one process: run it once without torchrun")
    text = read_text("pydoc", evaluation=False)
    bpe = importlib.import_module("tokenizers").ByteLevelBPETokenizer()
    bpe.train_from_iterator(text.splitlines(True), vocab_size=1024, special_tokens=["</s>"], show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="</s>")
    tokens = tokenize(tokenizer, text, seqlen=256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(transformers.OPTConfig(
            vocab_size=1024, hidden_size=128, word_embed_proj_dim=128, num_hidden_layers=4, num_attention_heads=4,
            ffn_dim=512, max_position_embeddings=256, pad_token_id=0, bos_token_id=0, eos_token_id=0))
        batches = [tokens[torch.randint(len(tokens), (8,))] for _ in range(400)]
        train(model, batches, 3e-3, "training the demo model, this once")
    save(model, tokenizer, path)
    return path


# ---- The command line -----------------------------------------------------------------------------------------------

def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        "slicegpt.py", description="Slice a language model (SliceGPT, arXiv 2401.15024) and measure what that does.")

    def complain(message):
        raise SliceGPTError(f"{message} (--help lists the options)")

    def within(kind, least, below=math.inf):
        def number(text):
            if not least <= kind(text) < below:
                limit = f" and below {below}" if below < math.inf else ""
                raise argparse.ArgumentTypeError(f"{text} must be at least {least}{limit}")
            return kind(text)
        return number

    parser.error, add = complain, parser.add_argument
    add("--model", default="demo", help="hub id, directory, .gguf file, directory saved by this program, or demo (the "
        "default), a small model that is trained on the spot and needs no network")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--sparsity", type=within(float, 0, 1), metavar="SHARE", help="share of the embedding dimension "
        "to delete (default: 0.25)")
    size.add_argument("--params", type=within(float, 0), metavar="SHARE", help="instead: the largest dimension "
        "whose model has at most this share of the dense model's parameters, all counted")
    size.add_argument("--discard-variance", type=within(float, 0, 1), metavar="SHARE", help="instead: for "
        "each block as many dimensions as it takes to discard at most this share of the signal's variance")
    add("--rotation", choices=["block", "shared"], default="block", help="one rotation for each block, as in the "
        "paper, or one for all, without shortcuts (default: block)")
    add("--learn-rotation", type=within(int, 1), metavar="N", help="turn the one rotation for all by N steps of "
        "descent on the divergence of the sliced model's predictions from the dense one's")
    add("--refit", action="store_true", help="fit the sliced weights to the dense network by least squares")
    add("--learn-refit", type=within(int, 1), metavar="N", help="after slicing, move what each block reads and writes "
        "the signal with, by N steps of the same descent (needs --rotation shared)")
    add("--head", choices=["sliced", "full", "tied"], default="sliced", help="slice the head too (default), give it "
        "all dimensions, or keep it one matrix with the embedding, if it was")
    add("--calibration", metavar="TEXT", help="wikitext2, alpaca, pydoc (Python's language reference), or the path of "
        "a UTF-8 text file or of a .json, .jsonl or .parquet file with a column `text` (default: wikitext2; pydoc for "
        "the demo model)")
    add("--eval", metavar="TEXT", help="what perplexity is measured on; as --calibration")
    add("--samples", type=within(int, 1), default=128, help="calibration sequences (default: 128)")
    add("--eval-samples", type=within(int, 1), help="evaluation sequences (default: all of the text)")
    add("--seqlen", type=within(int, 2), help="tokens per sequence (default: 2048, or the model's positions if fewer)")
    add("--batch-size", type=within(int, 1), default=8, help="calibration sequences at a time (default: 8)")
    add("--round-to", type=within(int, 1), help="make the dimension a multiple of this (default: 8; with one rotation "
        "for all, of a model with RMSNorm, its number of heads, as a standard Llama's hidden size must be)")
    add("--dtype", choices=["float64", "float32", "float16", "bfloat16"],
        help="default: float32 on a CPU, elsewhere the checkpoint's own")
    add("--device", help="default: cuda if there is one, else cpu; what does not fit there visits it layer by layer. "
        "auto spreads a sliced model over all devices, memory and disk, to measure it")
    add("--seed", type=int, default=0, help="chooses the calibration sequences (default: 0)")
    add("--finetune", type=within(int, 1), nargs="?", const=1000, metavar="N", help="then recover by LoRA on N "
        "sequences of the calibration text (default: 1000)")
    add("--tasks", metavar="NAMES", help="also measure zero-shot accuracy by the LM Evaluation Harness; commas between")
    add("--tasks-limit", type=within(int, 1), metavar="N", help="questions of each task (default: all)")
    add("--tasks-path", type=Path, metavar="DIR", help="a directory with more tasks")
    add("--stream", action="store_true", help="never have all weights in memory: slice from file to file, to --save; "
        "begun again, it goes on from the last finished layer")
    add("--signal-memory", type=within(float, 0), default=4.0, metavar="GIB", help="of --stream: calibration signals "
        "larger than this are on disk (default: 4)")
    add("--pca", choices=["input", "output"], default="input", help="principal components of the RMSNorm's input, as "
        "in the authors' code, or of its output, as in the paper's text (default: input)")
    add("--slice-head", dest="head", action="store_const", const="sliced", help="the same as --head sliced")
    add("--no-slice-head", dest="head", action="store_const", const="full", help="the same as --head full")
    add("--prompt", default="If the", help="text for the models to continue (default: If the)")
    add("--save", metavar="DIR", type=Path, help="write the sliced model here")
    add("--report", metavar="FILE.json", type=Path, help="write the figures here")
    return parser.parse_args(argv)


def prepare(args) -> tuple:
    """(model, tokenizer, evaluation tokens, device), as the options say. What can be checked early is checked first."""
    text = "pydoc" if args.model == "demo" else "wikitext2"
    args.calibration, args.eval = args.calibration or text, args.eval or text
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=accelerator if args.device in (None, "auto") else args.device).device
    except (RuntimeError, AssertionError) as error:
        raise SliceGPTError(f"cannot use --device {args.device}: {first_line(error)}") from error
    for evaluation, name in enumerate((args.calibration, args.eval)):
        if name not in HUB_TEXTS:
            read_text(name, bool(evaluation))
    if args.rotation == "shared" and (args.head == "full" or args.discard_variance is not None):
        raise SliceGPTError("--rotation shared has one dimension throughout: no full head, and no --discard-variance")
    if (args.learn_rotation or args.learn_refit) and (args.rotation != "shared" or args.stream):
        raise SliceGPTError("what is learned needs --rotation shared and the whole model in memory, so no --stream")
    if args.pca == "output" and (args.rotation == "shared" or args.refit):
        raise SliceGPTError("--pca is for the paper's method: neither for --rotation shared nor for --refit")
    if args.save:
        check_free(args.save)
    if args.report and not args.report.parent.is_dir():
        raise SliceGPTError(f"cannot write {args.report}: there is no directory {args.report.parent}")
    if args.stream and (not args.save or args.finetune or args.tasks or dist.is_initialized()):
        raise SliceGPTError("--stream needs --save, and goes without --finetune, --tasks and torchrun: what it has "
                            "saved can be measured (--device auto) and fine-tuned afterwards")
    args.tasks, args.harness = harness(args.tasks, args.tasks_path) if args.tasks else ([], None)
    if args.finetune:
        optional("peft")
    dtype = getattr(torch, args.dtype) if args.dtype else torch.float32 if device.type == "cpu" else "auto"
    options = {name: str(value) for name, value in vars(args).items()
               if name not in ("save", "report", "prompt", "eval", "eval_samples", "signal_memory")}
    work = args.save.absolute().with_name(f".{args.save.name}.unfinished") if args.stream else None
    files = Stream(work, args.signal_memory * 2**30) if work else None
    model, tokenizer = load(args.model, dtype, "auto" if args.device == "auto" else "cpu", files)
    if args.device == "auto" and not hasattr(model.config, "slicegpt"):
        raise SliceGPTError("--device auto is for a model that is sliced already")
    positions = getattr(model.config, "max_position_embeddings", None) or 2048
    args.seqlen = args.seqlen or min(2048, positions)
    check_length(model.config, args.seqlen)
    if args.finetune:
        text = read_text(args.calibration, False)
        args.finetune_tokens = tokenize(tokenizer, text, min(1024, positions), args.finetune, args.seed)
    evaluation = tokenize(tokenizer, read_text(args.eval, True), args.seqlen, args.eval_samples)
    if files:
        files.begin(options)
    return model, tokenizer, evaluation, device


def run(args):
    """The program: load, measure, slice, measure again, fine-tune, measure again, print, save."""
    model, tokenizer, evaluation, device = prepare(args)
    D, figures, why, failure = model.config.hidden_size, {}, "it was sliced before", None

    def measure() -> dict:
        outlined = outline(model.config)[0] if args.stream and hasattr(model.config, "slicegpt") else model
        kept = getattr(model.config, "slicegpt", {"dimensions": [model.config.hidden_size] * 2})["dimensions"]
        kept = sorted(set(kept[:-1]))  # the last is the head's
        found = {"dimension": kept[0] if len(kept) == 1 else f"{kept[0]} to {kept[-1]}",
                 "parameters": parameters(outlined)}
        if args.stream:
            return found
        with placed(model, device):
            return found | {
                "perplexity": perplexity(model, evaluation, device=device),
                "tasks": zero_shot(model, tokenizer, args.tasks, args.harness, args.tasks_limit) if args.tasks else {},
                "text": generate(model, tokenizer, args.prompt, device)}

    if not hasattr(model.config, "slicegpt"):
        choose_size(args, model)
        calibration = calibration_tokens(args, tokenizer)
        args.samples = len(calibration)
        figures["dense"] = measure()
        start = time.perf_counter()
        model, why = slice_as_asked(args, model, calibration, device)
        args.slice_seconds = time.perf_counter() - start
    elif any(size is not None for size in (args.sparsity, args.params, args.discard_variance)):
        raise SliceGPTError(f"{args.model} is sliced already; leave out the size to measure it as it is")
    figures["sliced"] = measure()
    if args.finetune:
        try:
            if not fits(model, device):
                raise SliceGPTError("--finetune needs a device that holds the model")
            finetune(model.to(device), args.finetune_tokens, seed=args.seed)
            figures["finetuned"] = measure()
        except SliceGPTError as error:  # what has been sliced is saved all the same
            failure = error
    if not dist.is_initialized() or dist.get_rank() == 0:
        report(args, D, figures, len(evaluation), device)
        if args.save:
            save(model, tokenizer, args.save)
            print(f"\nsaved to {args.save}, " + (f"to load with trust_remote_code=True, as {why}" if why else
                                                 f"an ordinary {model.config.model_type} model"))
    if failure:
        raise failure


def report(args, D: int, figures: dict, eval_samples: int, device):
    """Prints the figures, and writes them to the file of --report."""
    options = {name: value for name, value in vars(args).items() if name not in ("harness", "finetune_tokens")}
    values = options | {"dimension": D, "eval_samples": eval_samples, "device": str(device)}
    values |= {f"{name}_{key}": value for name, column in figures.items() for key, value in column.items()}
    values["peak_memory_bytes"] = peak_memory(device)
    print_report(values, figures)
    if args.report:
        args.report.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")


def calibration_tokens(args, tokenizer) -> Tensor:
    return tokenize(tokenizer, read_text(args.calibration, False), args.seqlen, args.samples, args.seed)


def choose_size(args, model):
    """Sets --round-to and --sparsity to their defaults, or to what --params comes to. Raises SliceGPTError."""
    D, signals = model.config.hidden_size, 1 + len(layers(model)) * len(stages(model))
    heads = model.config.num_attention_heads if hasattr(model.config, "rms_norm_eps") else 8
    args.round_to = args.round_to or (heads if args.rotation == "shared" else 8)
    if args.head == "tied" and model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise SliceGPTError("--head tied is for models whose head and embedding are one matrix")
    if args.params is not None:
        d = dimension_for(model, args.params, args.round_to, lambda d: {
            "dimensions": [d] * (signals - 1) + [D if args.head == "full" else d],
            "shortcuts": args.rotation == "block", "tied": args.head == "tied"})
        args.sparsity = 1 - d / D
    elif args.sparsity is None and args.discard_variance is None:
        args.sparsity = 0.25
    sliced_dimension(D, args.sparsity or 0, args.round_to)


def slice_as_asked(args, model, calibration, device) -> tuple[PreTrainedModel, str]:
    """Slices by the paper's method or one beyond it. Returns what `standard` makes of the sliced model."""
    D, where = model.config.hidden_size, {"batch_size": args.batch_size, "device": device}
    size = {"sparsity": args.sparsity or 0, "discard_variance": args.discard_variance, "round_to": args.round_to,
            "slice_head": args.head != "full"}
    Q, learning = None, {"calibration": calibration, "seed": args.seed}
    if (args.learn_rotation or args.learn_refit) and not fits(model, device):
        raise SliceGPTError("learning needs a device that holds the model")
    if args.rotation == "shared":
        Q = shared_rotation(model, calibration, **where)[:, :sliced_dimension(D, args.sparsity, args.round_to)]
    if args.learn_rotation:
        Q = learn_rotation(model.to(device), Q=Q, steps=args.learn_rotation, **learning)
    dense = copy.deepcopy(model) if args.learn_refit else None
    if args.refit:
        slice_and_refit(model, calibration, Q=Q, **size, **where)
    elif Q is not None:
        rotate(model, Q)
    else:
        slice_model(model, calibration, signal=args.pca, **size, **where)
    if args.head == "tied":
        tie_head(model, calibration)
    if args.learn_refit:  # last, so that what ties the head is learned too
        learn_refit(model.to(device), dense.to(device), steps=args.learn_refit, **learning)
    return (model, outline(model.config)[1]) if args.stream else standard(model)


def print_report(report: dict, figures: dict):
    """A column of figures for each model, and under them what the models wrote, side by side."""
    print(f"\n{report['model']}\n  {'':14}" + "".join(f"{name:>17}" for name in figures))
    for key, form in {"dimension": "", "parameters": ",d", "perplexity": ".2f"}.items():
        if f"sliced_{key}" in report:
            print(f"  {key:14}" + "".join(f"{column[key]:>17{form}}" for column in figures.values()))
    for task in report["tasks"] and [*report["tasks"], "average"]:
        scores = [column["tasks"][task] for column in figures.values()]
        print(f"  {task:14}" + "".join(f"{100 * accuracy:>11.2f}" + (f" ± {100 * error:.2f}" if error else 6 * " ")
                                       for accuracy, error, _ in scores) + f"  {scores[0][2]}")
    if "sliced_perplexity" in report:
        print(f"  perplexity on {report['eval_samples']} x {report['seqlen']} tokens of {report['eval']}")
    if "slice_seconds" in report:
        print(f"  sliced in {report['slice_seconds']:.1f} s, by {report['samples']} x {report['seqlen']} tokens of "
              f"{report['calibration']}")
    print(f"  peak memory {report['peak_memory_bytes'] / 2**30:.2f} GiB\n")
    width = 114 // len(figures) - 3
    texts = [textwrap.wrap(f"{name}: {column['text']}", width) for name, column in figures.items() if "text" in column]
    for lines in zip_longest(*texts, fillvalue=""):
        print("  " + " | ".join(f"{line:{width}}" for line in lines).rstrip())


def fits(model, device) -> bool:
    """Whether a model is on the accelerator, or that has room for it and for a fifth more, for what it computes."""
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    return device.type != "cuda" or model.device.type == "cuda" or 1.2 * size < torch.cuda.mem_get_info(device)[0]


@contextlib.contextmanager
def placed(model, device):
    """The model on `device`, for good if it fits there; else its weights come and go as needed (accelerate)."""
    if hasattr(model, "hf_device_map"):  # accelerate has placed it already
        yield model
        return
    if fits(model, device):
        yield model.to(device)
        return
    accelerate = optional("accelerate")
    accelerate.cpu_offload(model, device)
    try:
        yield model
    finally:
        accelerate.hooks.remove_hook_from_submodules(model)


def peak_memory(device) -> int:
    """The most bytes in use so far, on the accelerator, or else by this process."""
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
    try:
        args = parse_arguments(argv)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has started this process, and others
            dist.init_process_group()
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        run(args)
    except SliceGPTError as error:
        print(f"slicegpt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
