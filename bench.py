"""Every claim of the paper's section 4 about speed, cost and quality, as a command; and SparseGPT 2:4 beside it.

Four commands need no real weights: speed does not depend on the weights' values, so networks of published shapes get
random ones and nothing is downloaded. Networks take turns within one run, after a warm-up, with the device synchronised
around every measurement; printed are medians and the 10th and 90th percentiles.

    python bench.py latency --shape opt-1.3b     # Table 2: the time of one generated token (what a bare bench.py does)
    python bench.py throughput --shape opt-125m  # A.6: tokens per second, in batches as large as pays
    python bench.py ops --shape opt-6.7b         # A.7: the time of every matrix product of a layer
    python bench.py cost                         # Table 3: the time and memory of slicing and of RFT

The others take a real model, and the options of slicegpt.py for it and for the texts:

    python bench.py table1 --models DIR DIR      # Table 1: perplexity, dense, SparseGPT 2:4, SliceGPT
    python bench.py tasks --model DIR            # Figure 5: zero-shot accuracy, dense and sliced
    python bench.py quality --plot quality.png   # perplexity against parameters and time, for all ways to slice
    python bench.py spectrum --plot spectrum.png # Figure 8: how few directions the signal needs

All take --json FILE and, but for ops and tasks, --plot FILE.png (needs matplotlib).
"""
import argparse
import contextlib
import copy
import difflib
import importlib.util
import itertools
import json
import logging
import sys
import time
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, StaticCache

import slicegpt
from slicegpt import SliceGPTError, parameters, slice_model, sliced_class, sliced_dimension


# ---- Networks of published shapes, with random weights --------------------------------------------------------------

def opt(D, layers, heads):
    return "opt", {"hidden_size": D, "word_embed_proj_dim": D, "ffn_dim": 4 * D, "num_hidden_layers": layers,
                   "num_attention_heads": heads, "vocab_size": 50272, "max_position_embeddings": 2048}


def llama(D, layers, heads, groups, ffn, vocabulary=32000, tied=False):
    return "llama", {"hidden_size": D, "num_hidden_layers": layers, "num_attention_heads": heads,
                     "num_key_value_heads": groups, "intermediate_size": ffn, "vocab_size": vocabulary,
                     "tie_word_embeddings": tied, "max_position_embeddings": 4096}


SHAPES = {
    "opt-125m": opt(768, 12, 12), "opt-350m-like": opt(1024, 24, 16), "opt-1.3b": opt(2048, 24, 32),
    "opt-2.7b": opt(2560, 32, 32), "opt-6.7b": opt(4096, 32, 32), "opt-13b": opt(5120, 40, 40),
    "opt-30b": opt(7168, 48, 56), "opt-66b": opt(9216, 64, 72),
    "smollm2-135m": llama(576, 30, 9, 3, 1536, 49152, tied=True),
    "llama-2-7b": llama(4096, 32, 32, 32, 11008), "llama-2-13b": llama(5120, 40, 40, 40, 13824),
    "llama-2-70b": llama(8192, 80, 64, 8, 28672),
    "mixtral-8x7b": ("mixtral", llama(4096, 32, 32, 8, 14336)[1] | {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3-30b-a3b": ("qwen3_moe", llama(2048, 48, 32, 4, 6144, 151936)[1] | {
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}),
    "gpt-oss-20b": ("gpt_oss", llama(2880, 24, 64, 8, 2880, 201088)[1] | {
        "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4}),
}  # the real OPT-350M has its norms behind the blocks, and cannot be sliced


def build(shape: str, sparsity: float | None, layers: int, dtype, device, shared: bool = False):
    """A network of a published shape with random weights; sliced, if there is a sparsity, by blocks or one rotation."""
    family, options = SHAPES[shape]
    config = AutoConfig.for_model(family, **options | {"num_hidden_layers": layers or options["num_hidden_layers"]})
    with torch.device(device):
        if sparsity is None:
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        d = sliced_dimension(config.hidden_size, sparsity)
        config.slicegpt = {"dimensions": [d] * (1 + 2 * config.num_hidden_layers), "shortcuts": not shared}
        sliced = sliced_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])._from_config(config, dtype=dtype)
        return slicegpt.standard(sliced)[0].eval()


def weight_bytes(model) -> int:
    """What one token must read: all weights but the embedding, of which it needs a row (a tied head is read).

    Of a mixture's experts it reads those that are chosen.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    bytes = sum(weight.nbytes for weight in model.parameters()) - (0 if embedding is head else embedding.nbytes)
    for stage in slicegpt.stages(model):
        for linear in stage.readers + stage.writers:
            if isinstance(linear, slicegpt.Expert):
                bytes -= linear.weight.nbytes * (1 - model.config.num_experts_per_tok / len(linear.of_all[0]))
    return round(bytes)


# ---- Measuring and showing ------------------------------------------------------------------------------------------

WARM_UP = 4  # rounds


@torch.no_grad()
def in_turns(works: list, rounds: int, device, label: str, warm_up: int = WARM_UP) -> Tensor:
    """The seconds (works, rounds) after a warm-up; what else the machine does falls on all works alike."""
    synchronize = torch.get_device_module(device).synchronize
    seconds = torch.zeros(len(works), warm_up + rounds, dtype=torch.float64)
    for number in slicegpt.progress(range(warm_up + rounds), label, unit="round"):
        for i, work in enumerate(works):
            synchronize()
            start = time.perf_counter()
            work()
            synchronize()
            seconds[i, number] = time.perf_counter() - start
    return seconds[:, warm_up:]


def quantiles(values: Tensor) -> list:
    """Median, 10th and 90th percentile of the last dimension."""
    return values.quantile(torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64), -1).tolist()


@torch.no_grad()
def decoder(model, prompt: Tensor, static: int | None = None):
    """A function that decodes one more token behind a prompt (B, N); compiled, for `static` tokens at most."""
    token = prompt[:, :1].clone()
    if static is None:
        past = model(prompt, use_cache=True, logits_to_keep=1).cache
        return lambda: model(token, cache=past, use_cache=True)
    # the shapes are those of the last step, so on a GPU it is one graph: networks are compared, and not launches
    past = StaticCache(model.config, max_cache_len=static)
    model(prompt, cache=past, use_cache=True, logits_to_keep=1)
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
    positions = torch.full((len(prompt), 1), prompt.shape[1] - 1, device=prompt.device)
    mask = torch.ones(len(prompt), static, dtype=torch.int64, device=prompt.device)
    return lambda: step(token, attention_mask=mask, position_ids=positions.add_(1), cache=past, use_cache=True)


def show(args, title: str, rows: list[dict]):
    """Prints the rows as a table, a column for each key that is a figure to read; and writes them for --json."""
    headings = {"ms": "ms/token", "gigabytes": "GB/token", "held": "GB in all", "bandwidth": "of a copy's",
                "speed": "tokens/s", "sparse": "2:4", "forward": "dense pass", "body": "without head"}  # else the key

    def text(key, value):
        if isinstance(value, float):
            return f"{value:.0%}" if key in ("sparsity", "bandwidth") else f"{value:.3f}"
        return "-" if value is None else f"{value:,d}" if isinstance(value, int) else value

    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in
            ("copy_gigabytes_per_second", "eigenvalues")]
    table = [["", *(headings.get(key, key) for key in keys[1:])]]
    table += [[text(key, row.get(key)) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    print(title)
    for first, *others in table:
        numbers = [f"  {cell:>{width}}" for cell, width in zip(others, widths[1:])]
        print(f"{first:{widths[0]}}", *numbers, sep="")
    print(flush=True)
    if args.json:
        with slicegpt.failing(f"cannot write {args.json}"):
            args.json.write_text(json.dumps(rows, indent=2) + "\n")


def draw(args, rows: list[dict], name: str, x: str, y: str, log: str = ""):
    """--plot: y against x, which may be several keys of the rows, a curve for each name; log: of the axes x and y."""
    if not args.plot:
        return
    pyplot = slicegpt.optional("matplotlib.pyplot")
    panels, names = x.split(), dict.fromkeys(row[name] for row in rows)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(1 + 5.5 * len(panels), 4.5), squeeze=False)
    for axis, x in zip(axes[0], panels):
        for i, label in enumerate(names):
            points = sorted((row[x], row[y]) for row in rows if row[name] == label and row[y] is not None)
            color = pyplot.cm.viridis(0.9 * i / max(1, len(names) - 1))
            axis.plot(*zip(*points), marker="o" if len(points) < 20 else None, label=label, color=color)
        axis.set(xlabel=x, ylabel=y, **{f"{letter}scale": "log" for letter in log})
        axis.grid(True, which="both", alpha=0.3)
    if len(names) < 12:
        axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(args.plot)


# ---- Speed ----------------------------------------------------------------------------------------------------------

def latency(args, rows):
    """Table 2: the time of one token, dense, sliced per block and by one rotation, beside a copy in memory."""
    full = SHAPES[args.shape][1]["num_hidden_layers"]
    # fewer --layers than that are measured at that depth and at half of it; the layers' time is the difference
    depths = [args.layers, args.layers // 2] if args.layers and args.layers < full else [full]
    networks = {"dense": (None, False), f"block {args.sparsity:.0%}": (args.sparsity, False),
                f"shared {args.sparsity:.0%}": (args.sparsity, True)}
    models = [build(args.shape, sparsity, layers, args.dtype, args.device, shared)
              for sparsity, shared in networks.values() for layers in depths]
    source = torch.ones(2**28 if args.device.type == "cuda" else 2**25, device=args.device)  # more than caches hold
    target = torch.empty_like(source)

    def at_full_depth(values):  # of each model -> of each network
        values = values.unflatten(0, (len(networks), len(depths)))
        deep, shallow = values[:, 0], values[:, -1]
        return deep + (deep - shallow) * (full - depths[0]) / max(1, depths[0] - depths[-1])

    held = [sum(weight.nbytes for weight in model.parameters()) for model in models]
    held, sizes = (at_full_depth(torch.tensor(bytes, dtype=torch.float64)).tolist()
                   for bytes in (held, [weight_bytes(model) for model in models]))
    for length in args.prompt_lengths:
        prompt = torch.randint(10, 1000, (args.batch_size, length), device=args.device)
        static = max(args.prompt_lengths) + args.tokens + WARM_UP if args.compile else None
        steps = [decoder(model, prompt, static) for model in models]
        seconds = in_turns([*steps, lambda: target.copy_(source)], args.tokens, args.device, "decoding")
        bandwidth, seconds = 2 * source.nbytes / seconds[-1].median().item(), at_full_depth(seconds[:-1])
        for name, times, size, all_bytes in zip(networks, seconds, sizes, held):
            median, p10, p90 = quantiles(1e3 * times)
            ratio, low, high = quantiles(times / seconds[0])
            rows.append({"network": name, "prompt": length, "ms": median, "p10": p10, "p90": p90, "time": ratio,
                         "time_p10": low, "time_p90": high, "gigabytes": size / 1e9, "bytes": size / sizes[0],
                         "held": all_bytes / 1e9,
                         "bandwidth": size / median * 1e3 / bandwidth, "copy_gigabytes_per_second": bandwidth / 1e9})
    draw(args, rows, "network", "prompt", "ms")
    return (f"{args.shape}, {args.dtype}, {args.device}: one token, batch {args.batch_size}, {args.tokens} times"
            f"{', compiled' * args.compile}; a copy reads and writes {bandwidth / 1e9:.1f} GB/s; {full} layers"
            + f", extrapolated from {depths[0]} and {depths[-1]}" * (len(depths) > 1))


def throughput(args, rows):
    """A.6: tokens per second in the middle of sequences, with batches doubled until that drops or memory runs out."""
    best = {}
    for sparsity in (None, *args.sparsities):
        name, batch = "dense" if sparsity is None else f"block {sparsity:.0%}", 1
        model = build(args.shape, sparsity, args.layers, args.dtype, args.device)
        while batch <= args.max_batch_size:
            prompt = torch.randint(10, 1000, (batch, (args.seqlen - args.tokens) // 2), device=args.device)
            try:
                times = in_turns([decoder(model, prompt)], args.tokens, args.device, "decoding")
                speed = batch / times.median().item()
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                    raise  # the latter is how a CPU says it
                speed = None
            rows.append({"network": name, "batch": batch, "speed": speed})
            if speed is None or speed < best.get(name, 0):
                break
            best[name], batch = speed, 2 * batch
        del model  # before the next is built
    for row in rows:
        row["note"] = "out of memory" if row["speed"] is None else ""
        if row["speed"] and row["speed"] == best[row["network"]]:
            row["note"] = f"best: {row['speed'] / best['dense']:.2f} of dense" if "dense" in best else "best"
    draw(args, rows, "network", "batch", "speed", log="xy")
    return f"{args.shape}, {args.dtype}, {args.device}: sequences of {args.seqlen} tokens"


@torch.no_grad()
def ops(args, rows):
    """A.7: the time of every matrix product of a layer, dense, sliced, and 2:4 sparse where the device has that."""
    dense, sliced = (build(args.shape, sparsity, 1, args.dtype, args.device) for sparsity in (None, args.sparsity))
    why_not = ""

    def random(*shape):
        return torch.randn(*shape, dtype=args.dtype, device=args.device)

    def add(operation, tokens, works):
        medians = quantiles(1e3 * in_turns(list(works.values()), args.repeat, args.device, operation))[0]
        rows.append({"operation": operation, "tokens": tokens} | dict(zip(works, medians)))

    for tokens in args.batch_sizes:
        for before, after in zip(slicegpt.stages(dense), slicegpt.stages(sliced)):
            for path in [path for block in before.blocks for path in (*block.W_in.split(), block.W_out)]:
                linear, narrow = (stage.layer.get_submodule(path) for stage in (before, after))
                works = {"dense": partial(linear, random(tokens, linear.in_features)),
                         "sliced": partial(narrow, random(tokens, narrow.in_features))}
                try:
                    mask = torch.tensor([0, 0, 1, 1]).repeat(linear.in_features // 4).to(linear.weight)
                    W = torch.sparse.to_sparse_semi_structured(linear.weight * mask)
                    works["sparse"] = partial(nn.functional.linear, random(tokens, linear.in_features), W, linear.bias)
                    works["sparse"]()
                except Exception as error:  # torch has many ways to say that it has no such product
                    works.pop("sparse", None)
                    why_not = f"\n2:4: torch has no such product here ({slicegpt.first_line(error)})"
                add(path, tokens, works)
            S = after.shortcut  # (d_in, d_out)
            z, x = random(tokens, S.shape[1]), random(tokens, S.shape[0])
            add(after.shortcut_name, tokens, {"sliced": partial(torch.addmm, z, x, S)})
        products = [row for row in rows if row["tokens"] == tokens]
        total = {name: sum(row.get(name, 0) for row in products) for name in ("dense", "sliced", "sparse")}
        rows.append({"operation": "all", "tokens": tokens} | total | ({"sparse": None} if why_not else {}))
    for row in rows:
        row.setdefault("sparse")
        for name in ("sliced", "sparse"):
            row[f"{name}_time"] = row[name] / row["dense"] if row[name] and row.get("dense") else None
    return (f"{args.shape}, {args.dtype}, {args.device}: a layer's matrix products in ms, {args.repeat} times each, "
            f"sliced {args.sparsity:.0%}{why_not}")


def cost(args, rows):
    """Table 3: seconds and peak memory of slicing and of RFT (by --finetune sequences), beside a dense forward pass."""
    if args.finetune and not importlib.util.find_spec("peft"):
        print("without RFT: this needs the package peft: pip install peft")
        args.finetune = 0
    victim, peaks = None, {}

    def renew():  # what is sliced and then fine-tuned
        nonlocal victim
        victim = copy.deepcopy(model)

    def forward(network):
        for batch in tokens.split(args.batch_size):
            network(batch.to(args.device), use_cache=False)

    @torch.enable_grad()
    def finetuning():
        slicegpt.finetune(victim, torch.randint(10, 1000, (args.finetune, args.seqlen)))

    def watched(name, work):
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
        with contextlib.suppress(OSError):  # Linux has this; elsewhere the peak is the process's, from its beginning
            Path("/proc/self/clear_refs").write_text("5")
        work()
        peaks[f"{name}_peak"] = slicegpt.peak_memory(args.device) / 2**30

    works = {"forward": lambda: forward(model),
             "body": lambda: forward(model.base_model),  # slicing does not need the head, either
             "slicing": lambda: slice_model(victim, tokens, args.sparsity, batch_size=args.batch_size)}
    if args.finetune:
        works["rft"] = finetuning
    turns = [renew, *(partial(watched, name, work) for name, work in works.items())]
    for shape, samples in itertools.product(args.shapes, args.samples):
        model = build(shape, None, args.layers, args.dtype, args.device)
        tokens = torch.randint(10, 1000, (samples, args.seqlen))
        seconds = in_turns(turns, args.repeat, args.device, shape, warm_up=0 if rows else 1)[1:]
        row = {"shape": shape, "samples": samples, "tokens": tokens.numel(), "parameters": parameters(model)}
        row |= dict(zip(works, quantiles(seconds)[0]))
        rows.append(row | peaks | {"ratio": quantiles(seconds[2] / seconds[0])[0]})
    draw(args, rows, "shape", "tokens", "slicing", log="xy")
    return (f"{args.dtype}, {args.device}: seconds, GiB at the peak (two copies of the model are held), sparsity "
            f"{args.sparsity:.0%}, {args.repeat} rounds, RFT by {args.finetune} sequences")


# ---- SparseGPT 2:4, the paper's baseline ----------------------------------------------------------------------------

@torch.no_grad()
def sparsegpt(model, calibration: Tensor, *, batch_size: int = 8, device=None) -> int:
    """Frantar and Alistarh 2023 (arXiv 2301.00774): zeroes 2 of every 4 weights, in place; returns how many in all.

    Layer by layer, each on the signal of the layers that are pruned already. Embedding and head are not pruned, as in
    the paper. calibration: tokens (samples, N), int64. device: where to compute, with one layer there at a time. Raises
    SliceGPTError for a mixture of experts, or a matrix whose inputs do not come in fours.
    """
    device, zeros = torch.device(device or model.device), 0
    parts = slicegpt.architecture(model.config)
    if any(isinstance(linear, slicegpt.Expert) for stage in slicegpt.stages(model) for linear in stage.readers):
        raise SliceGPTError("SparseGPT prunes no experts here")
    for stage, X in slicegpt.signals(model.eval(), calibration, batch_size, device):
        if stage is None or parts.attention not in stage.blocks:
            continue  # a layer's FFN is pruned with its attention, by what it reads before that is pruned
        H = {}
        groups = [slicegpt.submodules(stage.layer, paths)  # the matrices of a group read the same
                  for block in (parts.attention, parts.ffn) for paths in (block.W_in, block.W_out)]

        def observe(linear, inputs):
            H[linear] = H.get(linear, 0) + slicegpt.covariance(inputs[0])

        hooks = [linears[0].register_forward_pre_hook(observe) for linears in groups]
        for x in X.split(batch_size):
            stage.layer(x.to(device), *stage.args, **stage.kwargs)
        for hook in hooks:
            hook.remove()
        for linears in groups:
            W = [slicegpt.matrix(linear) for linear in linears]
            pruned = prune(torch.cat(W, 1), H[linears[0]]).split([w.shape[1] for w in W], 1)
            for linear, w in zip(linears, pruned):
                slicegpt.set_matrix(linear, w, None)  # the bias stays
                zeros += w.numel() // 2
        slicegpt.layers(model)[stage.number].load_state_dict(stage.layer.state_dict())  # on a device it is a copy
    return zeros


def prune(W: Tensor, H: Tensor, damping: float = 0.01, width: int = 128) -> Tensor:
    """W (inputs, outputs) with 2 of every 4 weights of an output zero, and the others such that X W changes little.

    H = X^T X (inputs, inputs), to whose diagonal is added a share of its mean. Its inverse is U^T U, with U upper
    triangular, and U_jj^2 = [H^-1]_jj of the inputs from j on. Going down the inputs, of every four the two weights
    with the least w^2 / U_jj^2 go, and the error of each is spread over the inputs that follow: at once within a block
    of `width` inputs, for those behind it when the block is done.
    """
    if len(W) % 4:
        raise SliceGPTError(f"2:4 needs inputs in fours, and a matrix has {len(W)}")
    W, eye = W.clone(), torch.eye(len(H), dtype=H.dtype, device=H.device)
    L = torch.linalg.cholesky(H + (damping * H.diag().mean()).clamp_min(torch.finfo(H.dtype).tiny) * eye)
    U = torch.linalg.cholesky(torch.cholesky_inverse(L), upper=True)
    for block in torch.arange(len(W)).split(width):
        start, end = block[0].item(), block[-1].item() + 1
        errors = torch.zeros_like(W[start:end])
        for j in range(start, end):
            if j % 4 == 0:
                scores = W[j:j + 4].square() / U.diag()[j:j + 4, None].square()
                goes = torch.zeros_like(scores, dtype=torch.bool).scatter_(0, scores.argsort(0)[:2], True)
            errors[j - start] = torch.where(goes[j % 4], W[j] / U[j, j], 0)
            W[j].masked_fill_(goes[j % 4], 0)
            W[j + 1:end] -= U[j, j + 1:end, None] * errors[j - start]
        W[end:] -= U[start:end, end:].T @ errors
    return W


# ---- Real models ----------------------------------------------------------------------------------------------------

def read_model(args, may_be_sliced: bool = False):
    """(What slicegpt.py's options ask for, the model in eval mode). Completes the options in `args`.

    Raises SliceGPTError for a model that is sliced already, unless it may be one.
    """
    inputs = slicegpt.read_inputs(args)
    if inputs.calibration is None and not may_be_sliced:
        raise SliceGPTError(f"{args.model} is sliced already")
    return inputs, slicegpt.load(args.model, inputs.dtype)[0].eval()


PAPER = {  # Table 1: dense, SparseGPT 2:4, and SliceGPT at 10, 20, 25 and 30%
    "opt-125m": (27.64, 45.07, 29.34, 34.26, 37.74, 43.98), "opt-1.3b": (14.61, 29.61, 15.10, 16.43, 17.46, 19.09),
    "opt-2.7b": (12.46, 14.90, 12.75, 13.73, 14.56, 15.83), "opt-6.7b": (10.85, 13.00, 10.92, 11.48, 11.90, 12.51),
    "opt-13b": (10.12, 11.80, 10.27, 10.66, 10.94, 11.33), "opt-30b": (9.56, 10.53, 9.65, 9.87, 10.04, 10.27),
    "opt-66b": (9.33, 10.22, 9.43, 9.57, 9.68, 9.85), "llama-2-7b": (5.47, 8.69, 5.89, 6.64, 7.24, 8.12),
    "llama-2-13b": (4.88, 7.07, 5.21, 5.81, 6.30, 6.99), "llama-2-70b": (3.32, 4.98, 3.69, 4.25, 4.60, 5.05),
}


def table1(args, rows):
    """Table 1: WikiText-2 perplexity; beside the paper's, where the model's name is one of the paper's."""
    sparsities = (0.1, 0.2, 0.25, 0.3)
    rows += [{"method": name} for name in ("dense", "SparseGPT 2:4", *(f"SliceGPT {s:.0%}" for s in sparsities))]
    labels = {Path(name).name: name for name in [name or args.model for name in args.models]}
    for label, name in labels.items():
        options = argparse.Namespace(**vars(args) | {"model": name})
        inputs, model = read_model(options)
        tokens, where = inputs.calibration, {"batch_size": args.batch_size, "device": inputs.device}
        paper = PAPER.get(label.lower().removesuffix("-hf"), [None] * len(rows))
        for row, sparsity, published in zip(rows, (0, None, *sparsities), paper):
            network = copy.deepcopy(model)
            if sparsity is None:
                sparsegpt(network, tokens, **where)
            elif sparsity > 0:
                slice_model(network, tokens, sparsity, round_to=args.round_to, **where)
            with slicegpt.placed(network, inputs.device):
                row[label] = slicegpt.perplexity(network, inputs.evaluation, device=inputs.device)
            row[f"{label} in the paper"] = published
    draw(args, [{"model": label, "%": 100 * s, "perplexity": row[label]} for label in labels
                for s, row in zip((0, *sparsities), [rows[0], *rows[2:]])], "model", "%", "perplexity", log="y")
    return (f"perplexity on {options.eval}, sequences of {options.seqlen} tokens, calibrated on "
            f"{len(inputs.calibration)} of {options.calibration}")


def tasks(args, rows):
    """Figure 5: zero-shot accuracy of a model and of its slice; or of a model that is sliced already.

    By the LM Evaluation Harness; normalised by the length of the answers (acc_norm) where a task has that, as in the
    authors' code. A group or tag stands for its tasks. --limit: questions of each task, 0 for all. --tasks-path: a
    directory with more tasks.
    """
    manager = slicegpt.optional("lm_eval.tasks").TaskManager(include_path=args.tasks_path or None)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = args.tasks.replace(",", " ").split()
    for name in set(names) - set(manager.all_tasks):
        near = " or ".join(difflib.get_close_matches(name, manager.all_tasks))
        raise SliceGPTError(f"there is no task {name}" + (f"; did you mean {near}?" if near else ""))
    inputs, model = read_model(args, may_be_sliced=True)
    average, title = {"task": "average"}, args.model

    def measure(network: str):
        with slicegpt.placed(model, inputs.device), slicegpt.failing(f"cannot run the tasks {', '.join(names)}"):
            judged = slicegpt.optional("lm_eval.models.huggingface").HFLM(model, tokenizer=inputs.tokenizer)
            results = slicegpt.optional("lm_eval").simple_evaluate(
                judged, tasks=names, task_manager=manager, limit=args.limit or None)
        for name, found in results["results"].items():
            if results["group_subtasks"].get(name):
                continue
            metric = "acc_norm" if "acc_norm,none" in found else "acc"
            if f"{metric},none" not in found:
                raise SliceGPTError(f"the task {name} measures no accuracy")
            accuracy, error = found[f"{metric},none"], found[f"{metric}_stderr,none"]
            if name not in [row["task"] for row in rows]:
                rows.append({"task": name, "metric": metric})
            row = next(row for row in rows if row["task"] == name)
            row.update({network: accuracy, f"{network}_error": None if error == "N/A" else error})
        average[network] = sum(row[network] for row in rows) / len(rows)

    if inputs.calibration is not None:
        measure("dense")
        slice_model(model, inputs.calibration, args.sparsity, batch_size=args.batch_size, device=inputs.device)
        title += (f", sliced {args.sparsity:.0%} by {len(inputs.calibration)} x {args.seqlen} tokens of "
                  f"{args.calibration}")
    measure("sliced")
    rows.append(average)
    return f"{title}: accuracy and its standard error"


def quality(args, rows):
    """Perplexity, parameters, bytes and time per token of every method at every size, from one run on one model.

    --params: sizes as shares of the parameters, for all but the block mode, instead of the sparsities. --learn: steps,
    or 0. --eval-also: a second text. --formats: of llama.cpp, such as Q8_0 and Q4_0, which the matrices are rounded to.
    """
    formats = list(filter(None, args.formats))
    for weights in (quantiser(format)[1] for format in formats):
        if args.round_to % weights:
            raise SliceGPTError(f"{' and '.join(formats)}: --round-to must be a multiple of {weights}")
    inputs, model = read_model(args)
    for format in formats:
        rounded(model, format)  # raises for a matrix that does not come in such blocks
    calibration, where = inputs.calibration, {"batch_size": args.batch_size, "device": inputs.device}
    texts = {"perplexity": inputs.evaluation}
    if args.eval_also:
        text = slicegpt.tokenize(inputs.tokenizer, slicegpt.read_text(args.eval_also, True), args.seqlen)
        texts[f"on {Path(args.eval_also).name}"] = text[:args.eval_samples]
    fused, by_params = copy.deepcopy(model.to(inputs.device)), any(args.params)
    one_matrix = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    d_block = {size: sliced_dimension(model.config.hidden_size, size, args.round_to) for size in args.sparsities}
    d_shared = {False: d_block, True: d_block} if not by_params else {tied: {size: slicegpt.dimension_for(
        inputs.config, size, args.round_to, "shared", "tied" if tied else "sliced") for size in args.params}
        for tied in {False, one_matrix}}
    Q = slicegpt.shared_rotation(fused, calibration, **where)  # one for all sizes

    @cache
    def rotation(d, learned):
        start = Q[:, :d]
        return slicegpt.learn_rotation(fused, calibration, start, args.learn, seed=args.seed) if learned else start

    def spread(d):  # by Theorem 1 it changes nothing, and weights of about one size lose less when they are rounded
        return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, device=inputs.device)).Q

    def shared(network, size, learned=False, tied=False):
        d = d_shared[tied][size]
        slicegpt.rotate(network, rotation(d, learned) @ spread(d))
        if tied:
            slicegpt.tie_head(network, calibration)
        return slicegpt.standard(network)[0]

    def block(network, size):
        slice_model(network, calibration, size, round_to=args.round_to, **where)
        slicegpt.rotate(network, [spread(d) for d in network.config.slicegpt["dimensions"]])
        return network

    methods = {"block": block, "shared": shared, "shared, tied": partial(shared, tied=True),
               "shared, learned": partial(shared, learned=True),
               "shared, learned, tied": partial(shared, learned=True, tied=True)}
    sparse = copy.deepcopy(model)
    networks = [("dense", model, 0), ("SparseGPT 2:4", sparse, sparsegpt(sparse, calibration, **where))]
    for method, sliced in methods.items():
        if ("learned" not in method or args.learn) and ("tied" not in method or one_matrix):
            networks += [(method, sliced(copy.deepcopy(model), size), 0)
                         for size in (args.params if by_params and method != "block" else args.sparsities)]
    prompt = torch.randint(model.config.vocab_size, (1, min(128, args.seqlen // 2)), device=inputs.device)
    steps = [decoder(network, prompt) for _, network, _ in networks]
    seconds = in_turns(steps, max(1, min(50, args.seqlen // 2 - WARM_UP)), inputs.device, "decoding")
    for (method, network, zeros), times in zip(networks, seconds):
        saved = zeros * (network.dtype.itemsize - 2 / 8)  # stored with each weight that is not zero: 2 bits of where
        row = {"method": method, "dimension": network.get_input_embeddings().weight.shape[1],
               "parameters": parameters(network) - zeros, "gigabytes": (weight_bytes(network) - saved) / 1e9}
        row |= {"share": row["parameters"] / parameters(model), "ms": 1e3 * times.median().item(),
                "time": quantiles(times / seconds[0])[0]}
        rows.append(row)
        row |= {name: slicegpt.perplexity(network, text) for name, text in texts.items()}
        for format in formats if not zeros else ():
            stored, smaller = rounded(network, format)
            row[f"{format} GB/token"] = smaller * row["gigabytes"]
            row |= {f"{format} {name}": slicegpt.perplexity(stored, text) for name, text in texts.items()}
    draw(args, rows, "method", "parameters time", "perplexity", log="y")
    return (f"{args.model}: {len(inputs.evaluation)} x {args.seqlen} tokens of {args.eval}, calibrated on "
            f"{len(calibration)} x {args.seqlen} of {args.calibration}; one token on {inputs.device}, batch 1.\n"
            "2:4: parameters that are not zero, bytes in an accelerator's 2:4 format, the time of dense products")


@cache
def quantiser(format: str) -> tuple:
    """How a format of llama.cpp keeps a row of weights: a function that rounds them, weights and bytes a block."""
    gguf, quants = slicegpt.optional("gguf"), slicegpt.optional("gguf.quants")
    with slicegpt.failing(f"cannot round the weights to {format}"):
        kind = gguf.GGMLQuantizationType[format]
        weights, size = gguf.GGML_QUANT_SIZES[kind]

        def round(W: Tensor) -> Tensor:
            return torch.from_numpy(quants.dequantize(quants.quantize(W.float().cpu().numpy(), kind), kind))

        round(torch.zeros(1, weights))  # this package cannot make all that it can read
        return round, weights, size


@torch.no_grad()
def rounded(model, format: str) -> tuple:
    """A copy of a model with its matrices as a format of llama.cpp keeps them, and the share of the bytes that takes.

    (The norms' scales, which are not rounded, are counted as if they were.)
    """
    (round, weights, size), model = quantiser(format), copy.deepcopy(model)
    with slicegpt.failing(f"cannot round the weights to {format}"):
        for W in model.parameters():
            if W.dim() > 1:
                W.copy_(round(W))
    return model, size / weights / model.dtype.itemsize


@torch.no_grad()
def spectrum(args, rows):
    """Figure 8: the eigenvalues of the FFN's inputs in each layer of the dense network, relative to the largest."""
    inputs, model = read_model(args)
    slicegpt.fuse(model)
    parts, shares = slicegpt.architecture(model.config), (0.9, 0.99, 0.999)
    norm = model.get_submodule(parts.norm)  # fused, all norms are alike
    for stage, X in slicegpt.signals(model, inputs.calibration, args.batch_size, inputs.device):
        if stage is not None and parts.ffn in stage.blocks:
            C = slicegpt.covariance_of(X, norm, stage, args.batch_size, inputs.device)
            eigenvalues = slicegpt.pca(C)[0].clamp_min(0).cpu()
            left = eigenvalues.cumsum(0) / eigenvalues.sum()
            rows.append({"layer": str(stage.number), "eigenvalues": (eigenvalues / eigenvalues[0]).tolist()} | {
                f"{share:.1%}": 1 + int((left < share).sum()) for share in shares})
    points = [{"layer": row["layer"], "component": i, "eigenvalue / largest": value}
              for row in rows for i, value in enumerate(row["eigenvalues"]) if value > 1e-6]
    draw(args, points, "layer", "component", "eigenvalue / largest", log="y")
    return (f"{args.model}, inputs of the FFN, {len(inputs.calibration)} x {args.seqlen} tokens of "
            f"{args.calibration}: of {model.config.hidden_size} dimensions, how many have that share of the variance")


# ---- The command line -----------------------------------------------------------------------------------------------

SPEED = {  # the commands, and their options with their defaults
    latency: {"shape": "opt-125m", "sparsity": 0.25, "layers": 0, "batch_size": 1, "prompt_lengths": [128, 512],
              "tokens": 50, "compile": False},
    throughput: {"shape": "opt-125m", "sparsities": [0.25, 0.5], "layers": 0, "max_batch_size": 1024, "seqlen": 128,
                 "tokens": 16},
    ops: {"shape": "opt-125m", "sparsity": 0.25, "batch_sizes": [1, 2048], "repeat": 50},
    cost: {"shapes": ["opt-125m", "opt-350m-like", "opt-1.3b"], "sparsity": 0.25, "layers": 0, "batch_size": 8,
           "samples": [4, 8], "seqlen": 512, "finetune": 4, "repeat": 1},
}
REAL = {  # likewise; these take slicegpt.py's options for a model, too
    table1: {"models": [""], "round_to": 8},
    tasks: {"tasks": "piqa,winogrande,hellaswag,arc_easy,arc_challenge", "sparsity": 0.25, "limit": 0,
            "tasks_path": ""},
    quality: {"sparsities": [0.1, 0.2, 0.3], "params": [0.0], "round_to": 8, "learn": 0, "eval_also": "",
              "formats": [""]},
    spectrum: {},
}


def main(argv=None) -> int:
    """The exit code: 0, 130 after Ctrl-C, or 2 after one line on standard error for an error that the user can fix."""
    parser = argparse.ArgumentParser("bench.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", help="each has its --help")
    for work, options in (SPEED | REAL).items():
        command = commands.add_parser(work.__name__, description=work.__doc__, allow_abbrev=False)
        command.set_defaults(work=work)
        add = command.add_argument
        if work in REAL:
            slicegpt.add_inputs(add)
        else:
            add("--device", help="default: cuda if there is one, else cpu")
            add("--dtype", choices=["float64", "float32", "float16", "bfloat16"], help="float32 on a CPU, else float16")
        for name, default in options.items():  # whose type is the option's
            several = isinstance(default, list)
            kind = {"action": "store_true"} if default is False else {
                "type": type(default[0] if several else default), "nargs": "+" if several else None,
                "choices": SHAPES if "shape" in name else None}
            add("--" + name.replace("_", "-"), default=default, help=f"default: {default}", **kind)
        add("--json", type=Path, metavar="FILE", help="write the figures here")
        if work not in (ops, tasks):
            add("--plot", type=Path, metavar="FILE.png", help="draw them here (needs matplotlib)")
    args = parser.parse_args(argv or sys.argv[1:] or ["latency"])
    torch.manual_seed(0)
    rows, title = [], "measured before it ended:"
    try:
        for path in filter(None, (args.json, getattr(args, "plot", None))):
            with slicegpt.failing(f"cannot write {path}"):
                open(path, "a").close()
        if getattr(args, "plot", None):
            slicegpt.optional("matplotlib").use("Agg")
            kinds = slicegpt.optional("matplotlib.pyplot").figure().canvas.get_supported_filetypes()
            if args.plot.suffix.lower()[1:] not in kinds:
                raise SliceGPTError(f"cannot draw {args.plot}: it must end in one of {', '.join(kinds)}")
        if args.work in SPEED:
            args.device = slicegpt.find_device(args.device)
            args.dtype = getattr(torch, args.dtype or ("float32" if args.device.type == "cpu" else "float16"))
        try:
            title = args.work(args, rows)
        finally:
            if rows:
                show(args, title, rows)
    except SliceGPTError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
