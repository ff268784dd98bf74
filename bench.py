"""Every claim of the paper's section 4 about speed, cost and quality, as a command; and SparseGPT 2:4 beside it.

Four commands need no real weights: speed does not depend on the weights' values, so networks of published shapes get
random ones and nothing is downloaded. Networks take turns within one run, after a warm-up, with the device synchronised
around every measurement; printed are medians and the 10th and 90th percentiles.

    python bench.py latency --shape opt-1.3b     # Table 2: the time of one generated token (what a bare bench.py does)
    python bench.py throughput --shape opt-125m  # A.6: tokens per second, in batches as large as pays
    python bench.py ops --shape opt-6.7b         # A.7: the time of every matrix product of a layer
    python bench.py cost                         # Table 3: the time and memory of slicing, and how they grow

The others take a real model, and slicegpt.py's options for it and for the texts:

    python bench.py table1 --models DIR DIR      # Table 1: perplexity, dense, SparseGPT 2:4, SliceGPT
    python bench.py quality --plot quality.png   # perplexity against parameters and time, for all ways to slice
    python bench.py spectrum --plot spectrum.png # Figure 8: how few directions the signal needs

All take --json FILE and, but for ops, --plot FILE.png (needs matplotlib).
"""
import argparse
import contextlib
import copy
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

import slicegpt
from slicegpt import SlicedForCausalLM, SliceGPTError, parameters, progress, slice_model, sliced_dimension


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
}  # the real OPT-350M has its norms behind the blocks, and cannot be sliced


def depth(shape: str) -> int:
    return SHAPES[shape][1]["num_hidden_layers"]


def build(shape: str, sparsity: float | None, layers: int, dtype, device, shared: bool = False):
    """A network of a published shape with random weights; sliced, if there is a sparsity, per block or by one rotation.

    With one rotation its dimension is a multiple of what slicegpt.py would make it one of, and a Llama is a Llama.
    """
    family, options = SHAPES[shape]
    config = AutoConfig.for_model(family, **options | {"num_hidden_layers": layers})
    with torch.device(device):
        if sparsity is None:
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        round_to = config.num_attention_heads if shared and family == "llama" else 8
        d = sliced_dimension(config.hidden_size, sparsity, round_to)
        config.slicegpt = {"dimensions": [d] * (2 * layers + 1), "shortcuts": not shared}
        return slicegpt.standard(SlicedForCausalLM._from_config(config, dtype=dtype))[0].eval()


def weight_bytes(model) -> int:
    """What one token must read: all weights but the embedding, of which it needs a row (a tied head is read)."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(weight.nbytes for weight in model.parameters()) - (0 if embedding is head else embedding.nbytes)


# ---- Measuring and showing ------------------------------------------------------------------------------------------

WARM_UP = 4  # rounds


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def in_turns(works: list, rounds: int, device, label: str, warm_up: int = WARM_UP) -> list[list[float]]:
    """The seconds of every work in every round, after a warm-up; what else the machine does falls on all alike."""
    seconds = [[] for _ in works]
    for number in progress(range(warm_up + rounds), label, unit="round"):
        for work, times in zip(works, seconds):
            synchronise(device)
            start = time.perf_counter()
            work()
            synchronise(device)
            if number >= warm_up:
                times.append(time.perf_counter() - start)
    return seconds


def quantiles(values) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    return tuple(torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.1, 0.9]).double()).tolist())


def ratios(seconds, reference) -> tuple[float, float, float]:
    """Quantiles of the ratio, round by round."""
    return quantiles([s / r for s, r in zip(seconds, reference)])


@torch.no_grad()
def decoder(model, prompt: Tensor, static: int | None = None):
    """A function that decodes one more token behind the prompt (B, N), by the KV cache.

    static: for how many tokens there is room in a static cache, with which the model is compiled.
    """
    token = prompt[:, :1].clone()
    if static is None:
        cache = model(prompt, use_cache=True, logits_to_keep=1).cache
        return lambda: model(token, cache=cache, use_cache=True)
    # the shapes are those of the last step, so on a GPU it is one graph: networks are compared, and not launches
    cache = StaticCache(model.config, max_cache_len=static)
    model(prompt, cache=cache, use_cache=True, logits_to_keep=1)
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
    positions = torch.full((len(prompt), 1), prompt.shape[1] - 1, device=prompt.device)
    mask = torch.ones(len(prompt), static, dtype=torch.int64, device=prompt.device)
    return lambda: step(token, attention_mask=mask, position_ids=positions.add_(1), cache=cache, use_cache=True)


def copying(device):
    """(a function that copies more than caches hold, the bytes that it reads and writes)."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes


def show(args, title: str, rows: list[dict], columns: dict, figures: list[dict] | None = None):
    """Prints the rows as a table, with a heading and a format for each column; --json gets the figures, or the rows."""
    print(title)
    cells = [[heading for heading, _ in columns.values()]]
    for row in rows:
        cells.append(["-" if row.get(key) is None else f"{row[key]:{form}}" for key, (_, form) in columns.items()])
    widths = [max(map(len, column)) for column in zip(*cells)]
    for first, *others in cells:
        numbers = (f"{text:>{width}}" for text, width in zip(others, widths[1:]))
        print("  ".join([f"{first:{widths[0]}}", *numbers]).rstrip())
    print(flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures or rows, indent=2) + "\n")


def draw(args, *panels: tuple[dict, dict]):
    """--plot: panels side by side, each of curves by their names, as lists of (x, y), and the settings of its axes."""
    if not args.plot:
        return
    pyplot = slicegpt.optional("matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(1 + 5.5 * len(panels), 4.5), squeeze=False)
    for axis, (curves, settings) in zip(axes[0], panels):
        for name, points in curves.items():
            axis.plot(*zip(*sorted(points)), marker="o", label=name)
        axis.set(**settings)
        axis.grid(True, which="both", alpha=0.3)
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(args.plot)


def curves(rows: list[dict], name: str, x: str, y: str) -> dict:
    return {label: [(row[x], row[y]) for row in rows if row[name] == label and row[y] is not None]
            for label in dict.fromkeys(row[name] for row in rows)}


# ---- Speed ----------------------------------------------------------------------------------------------------------

def latency(args):
    """Table 2: the time of one token, dense, sliced per block and by one rotation, beside a copy in memory.

    A network of which only some layers are asked for is measured at that depth and at half of it; the difference is the
    time of the layers, by which the time at full depth is extrapolated.
    """
    full, names = depth(args.shape), ["dense", f"block {args.sparsity:.0%}", f"shared {args.sparsity:.0%}"]
    depths = [args.layers, args.layers // 2] if args.layers and args.layers < full else [full]
    models = [build(args.shape, sparsity, layers, args.dtype, args.device, shared)
              for sparsity, shared in ((None, False), (args.sparsity, False), (args.sparsity, True))
              for layers in depths]
    copy_once, copied = copying(args.device)

    def at_full_depth(a, b=None):
        return a if b is None else a + (a - b) * (full - depths[0]) / (depths[0] - depths[1])

    def of_each(values):  # of each network, from its values at all depths
        return [values[i:i + len(depths)] for i in range(0, len(values), len(depths))]

    sizes, rows = [at_full_depth(*pair) for pair in of_each([weight_bytes(model) for model in models])], []
    for length in args.prompt_lengths:
        prompt = torch.randint(10, 1000, (args.batch_size, length), device=args.device)
        static = max(args.prompt_lengths) + args.tokens + WARM_UP if args.compile else None
        steps = [decoder(model, prompt, static) for model in models]
        *times, copies = in_turns([*steps, copy_once], args.tokens, args.device, "decoding")
        times = [[at_full_depth(*pair) for pair in zip(*lists)] for lists in of_each(times)]
        bandwidth = copied / quantiles(copies)[0]
        for name, seconds, size in zip(names, times, sizes):
            median, p10, p90 = (1e3 * value for value in quantiles(seconds))
            ratio, low, high = ratios(seconds, times[0])
            rows.append({"network": name, "prompt": length, "ms": median, "p10": p10, "p90": p90, "time": ratio,
                         "time_p10": low, "time_p90": high, "gigabytes": size / 1e9, "bytes": size / sizes[0],
                         "bandwidth": size / median * 1e3 / bandwidth, "copy_gigabytes_per_second": bandwidth / 1e9})
    show(args, f"{args.shape}, {args.dtype}, {args.device}: one token, batch {args.batch_size}, {args.tokens} times"
         f"{', compiled' * args.compile}; a copy reads and writes {bandwidth / 1e9:.1f} GB/s"
         + (f"; {full} layers, extrapolated from {depths[0]} and {depths[1]}" if len(depths) == 2 else ""), rows,
         {"network": ("", ""), "prompt": ("prompt", ""), "ms": ("ms/token", ".2f"), "p10": ("p10", ".2f"),
          "p90": ("p90", ".2f"), "time": ("time", ".3f"), "time_p10": ("p10", ".2f"), "time_p90": ("p90", ".2f"),
          "bytes": ("bytes", ".3f"), "gigabytes": ("GB/token", ".3f"), "bandwidth": ("of a copy's", ".0%")})
    draw(args, (curves(rows, "network", "prompt", "ms"), {"xlabel": "tokens of the prompt", "ylabel": "ms per token"}))


def throughput(args):
    """A.6: tokens per second of `seqlen` tokens each, with batches doubled until that drops or memory runs out.

    Decoded are `tokens` tokens in the middle of the sequences, where the KV cache has its average length.
    """
    rows = []
    for sparsity in (None, *args.sparsities):
        model = build(args.shape, sparsity, args.layers or depth(args.shape), args.dtype, args.device)
        best, batch = 0, 1
        while batch <= args.max_batch_size:
            name = "dense" if sparsity is None else f"block {sparsity:.0%}"
            rows.append({"network": name, "batch": batch, "speed": None})
            prompt = torch.randint(10, 1000, (batch, (args.seqlen - args.tokens) // 2), device=args.device)
            try:
                times, = in_turns([decoder(model, prompt)], args.tokens, args.device, "decoding")
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                break
            rows[-1]["speed"] = batch / quantiles(times)[0]
            if rows[-1]["speed"] < best:
                break
            best, batch = rows[-1]["speed"], 2 * batch
        del model
    best = {name: max((y, x) for x, y in points) for name, points in curves(rows, "network", "batch", "speed").items()
            if points}
    for row in rows:
        speed = best.get(row["network"], (None, None))[0]
        row["note"] = "out of memory" if row["speed"] is None else "" if row["speed"] < speed else (
            f"best: {speed / best['dense'][0]:.2f} of dense" if "dense" in best else "best")
    show(args, f"{args.shape}, {args.dtype}, {args.device}: sequences of {args.seqlen} tokens", rows,
         {"network": ("", ""), "batch": ("batch", ""), "speed": ("tokens/s", ".1f"), "note": ("", "")})
    draw(args, (curves(rows, "network", "batch", "speed"),
                {"xlabel": "batch size", "ylabel": "tokens per second", "xscale": "log", "yscale": "log"}))


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # the latter on a CPU


@torch.no_grad()
def ops(args):
    """A.7: the time of every matrix product of a layer, dense, sliced, and 2:4 sparse where the device has that."""
    dense, sliced = (build(args.shape, sparsity, 1, args.dtype, args.device) for sparsity in (None, args.sparsity))
    rows, sparse, why_not = [], {}, ""
    for batch in args.batch_sizes:
        total = {"operation": "all", "tokens": batch, "dense": 0, "sliced": 0, "sparse": 0}
        for stage in slicegpt.stages(dense):
            paths = [path for block in stage.blocks for path in (*block.W_in.split(), block.W_out)]
            for path in [*paths, stage.shortcut]:
                works = {}
                for name, model in (("dense", dense), ("sliced", sliced)):
                    layer = slicegpt.layers(model)[0]
                    if path in paths:
                        works[name] = product(layer.get_submodule(path), batch, args)
                    elif model is sliced:
                        S = getattr(layer, path)
                        x, z = (torch.randn(batch, n, dtype=args.dtype, device=args.device) for n in S.shape)
                        works[name] = lambda x=x, z=z, S=S: torch.addmm(z, x, S)
                if path in paths:
                    try:
                        linear = slicegpt.layers(dense)[0].get_submodule(path)
                        sparse[path] = sparse.get(path) or semi_structured(linear)
                        works["sparse"] = product(sparse[path], batch, args)
                        works["sparse"]()
                    except Exception as error:  # torch has many ways to say that it has no such product
                        works.pop("sparse", None)
                        why_not = f"2:4: torch has no such product here ({slicegpt.first_line(error)})"
                times = dict(zip(works, in_turns(list(works.values()), args.repeat, args.device, path)))
                medians = {name: 1e3 * quantiles(seconds)[0] for name, seconds in times.items()}
                rows.append({"operation": path, "tokens": batch} | medians)
                for name in ("dense", "sliced", "sparse"):
                    total[name] = None if name == "sparse" and why_not else total[name] + medians.get(name, 0)
        rows.append(total)
    for row in rows:
        for name in ("sliced", "sparse"):
            row[f"{name}_time"] = row[name] / row["dense"] if row.get(name) and row.get("dense") else None
    show(args, f"{args.shape}, {args.dtype}, {args.device}: a layer's matrix products in ms, {args.repeat} times each, "
         f"sliced {args.sparsity:.0%}", rows,
         {"operation": ("", ""), "tokens": ("tokens", ""), "dense": ("dense", ".3f"), "sliced": ("sliced", ".3f"),
          "sliced_time": ("time", ".2f"), "sparse": ("2:4", ".3f"), "sparse_time": ("time", ".2f")})
    if why_not:
        print(why_not)


def product(linear, tokens: int, args):
    x = torch.randn(tokens, linear.in_features, dtype=args.dtype, device=args.device)
    return lambda: linear(x)


def semi_structured(linear):
    """A copy with two of every four weights zero, stored in the device's 2:4 format. Raises what torch raises."""
    pruned = copy.deepcopy(linear)
    mask = torch.tensor([0, 0, 1, 1], dtype=linear.weight.dtype, device=linear.weight.device)
    pruned.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(
        pruned.weight.detach() * mask.repeat(linear.in_features // 4)))
    return pruned


def cost(args):
    """Table 3: seconds and peak memory of slicing and of RFT, beside a dense forward pass over the same tokens.

    The pass is timed both with the head, which computes logits, and without it, since slicing does not need the head.
    """
    rows, finetuned = [], args.finetune * args.seqlen
    try:
        finetuned and slicegpt.optional("peft")
    except SliceGPTError as error:
        print(f"without RFT: {error}")
        finetuned = 0
    for shape in args.shapes:
        model = build(shape, None, args.layers or depth(shape), args.dtype, args.device)
        for samples in args.samples:
            tokens = torch.randint(10, 1000, (samples, args.seqlen))
            victims, peaks = [], {}  # a copy of the model, which is sliced and then fine-tuned

            def watched(name, work):
                def watch():
                    reset_peak_memory(args.device)
                    work()
                    peaks[name] = slicegpt.peak_memory(args.device)
                return watch

            def forward(network, **options):
                for batch in tokens.split(args.batch_size):
                    network(batch.to(args.device), use_cache=False, **options)

            def slicing():
                slice_model(victims[0], tokens, args.sparsity, batch_size=args.batch_size)

            @torch.enable_grad()
            def finetuning():
                slicegpt.finetune(victims[0], torch.randint(10, 1000, (args.finetune, args.seqlen)))

            works = {"forward": lambda: forward(model), "body": lambda: forward(model.base_model),
                     "slicing": slicing} | ({"rft": finetuning} if finetuned else {})
            times = [[] for _ in works]
            warm_up = 0 if rows else 1
            for number in range(warm_up + args.repeat):
                victims[:] = [copy.deepcopy(model)]
                for seconds, more in zip(times, in_turns([watched(*work) for work in works.items()], 1, args.device,
                                                         shape, warm_up=0)):
                    seconds.extend(more if number >= warm_up else [])
            victims.clear()
            times = dict(zip(works, times))
            rows.append({"shape": shape, "samples": samples, "tokens": samples * args.seqlen,
                         "parameters": parameters(model), "sizes": sizes(model),
                         "ratio": ratios(times["slicing"], times["forward"])[0]}
                        | {name: quantiles(seconds)[0] for name, seconds in times.items()}
                        | {f"{name}_peak": peak / 2**30 for name, peak in peaks.items()})
    show(args, f"{args.dtype}, {args.device}: seconds, and GiB at the peak (two copies of the model are held), "
         f"sparsity {args.sparsity:.0%}, {args.repeat} rounds" + f"; RFT by {finetuned} tokens" * bool(finetuned), rows,
         {"shape": ("", ""), "parameters": ("parameters", ",d"), "tokens": ("tokens", ",d"),
          "forward": ("dense pass", ".2f"), "body": ("without head", ".2f"), "slicing": ("slicing", ".2f"),
          "ratio": ("ratio", ".2f"), "forward_peak": ("pass GiB", ".2f"), "slicing_peak": ("slicing GiB", ".2f")}
         | ({"rft": ("RFT", ".2f"), "rft_peak": ("RFT GiB", ".2f")} if finetuned else {}))
    draw(args, (curves(rows, "shape", "tokens", "slicing"),
                {"xlabel": "calibration tokens", "ylabel": "seconds of slicing", "xscale": "log", "yscale": "log"}))
    if len(rows) > 2:
        extrapolate(rows, finetuned)


def sizes(model) -> tuple[int, int, int]:
    """What cost grows with: the layers' parameters; those and the head's; and the arithmetic of the rotations.

    To rotate a weight takes D times its parameters, and an eigendecomposition some 6 D^3, in units of the former.
    """
    body, D = parameters(slicegpt.layers(model)), model.config.hidden_size
    head, signals = D * model.config.vocab_size, 1 + len(slicegpt.layers(model)) * len(slicegpt.stages(model))
    return body, body + head, D * (body + 2 * head + 6 * signals * D**2)


def extrapolate(rows: list[dict], finetuned: int):
    """Prints what larger networks would take on this device, by the law that fits the rows, and how well it fits.

    Slicing grows with the layers' parameters times the tokens, and with what the rotations take without any token.
    What attention computes on N^2 pairs of tokens is neglected.
    """
    def law(name, features):
        A = torch.tensor([[f / row[name] for f in features(row["sizes"], row["tokens"])] for row in rows]).double()
        weights = torch.linalg.lstsq(A, torch.ones(len(A), 1, dtype=A.dtype)).solution
        if (weights < 0).any():  # too few rows to tell the features apart: the first alone
            A, weights = A[:, :1], A[:, :1].mean().reciprocal().view(1, 1)
        misfit = (A @ weights - 1).abs().max().item()
        return lambda *arguments: (torch.tensor(features(*arguments)).double()[:len(weights)] @ weights).item(), misfit

    laws = {"dense pass": law("forward", lambda size, tokens: [size[1] * tokens]),
            "slicing": law("slicing", lambda size, tokens: [size[0] * tokens, size[2]])}
    if finetuned:
        laws["RFT"] = law("rft", lambda size, _: [size[1] * finetuned])
    print(f"extrapolated to 128 x 2048 tokens{' (RFT: 1000 x 1024)' * bool(finetuned)} on this device, in hours; "
          "not measured:")
    for shape in ("llama-2-7b", "llama-2-70b"):
        size = sizes(build(shape, None, depth(shape), torch.float16, "meta"))
        hours = {name: predict(size, 128 * 2048) / 3600 for name, (predict, _) in laws.items()}
        if finetuned:
            hours["RFT"] *= 1000 * 1024 / finetuned
        print(f"  {shape:12}", ", ".join(f"{name} {value:.3g}" for name, value in hours.items()))
    print("  the law misses what was measured by at most",
          ", ".join(f"{misfit:.0%} ({name})" for name, (_, misfit) in laws.items()))


def reset_peak_memory(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # Linux has this; elsewhere the peak is the process's, from its beginning
        Path("/proc/self/clear_refs").write_text("5")


# ---- SparseGPT 2:4, the paper's baseline ----------------------------------------------------------------------------

@torch.no_grad()
def sparsegpt(model, calibration: Tensor, *, batch_size: int = 8, device=None) -> int:
    """Frantar and Alistarh 2023 (arXiv 2301.00774): zeroes 2 of every 4 weights, in place; returns how many in all.

    Layer by layer, each on the output of the layers that are pruned already. All matrices that read or write the signal
    are pruned, embedding and head are not, as in the paper. calibration: tokens (samples, seqlen), int64. device: where
    to compute, with one layer there at a time. Raises SliceGPTError if a matrix has inputs that do not come in fours.
    """
    device, parts, zeros = torch.device(device or model.device), slicegpt.architecture(model.config), 0
    X = slicegpt.signals(model.eval(), calibration, batch_size, device)
    _, calls = slicegpt.embed(model, calibration[:1])
    for number, layer in slicegpt.visit(model, device):
        args, kwargs = tree_map(lambda a: a.to(device) if isinstance(a, Tensor) else a, calls[number])
        groups = [slicegpt.submodules(layer, paths)  # matrices that read the same
                  for block in (parts.attention, parts.ffn) for paths in (block.W_in, block.W_out)]
        H = [0] * len(groups)

        def forward():
            for x in X.split(batch_size):
                yield x, layer(x.to(device), *args, **kwargs)

        def observe(i):
            def hook(_, inputs):
                H[i] = H[i] + slicegpt.covariance(inputs[0])
            return groups[i][0].register_forward_pre_hook(hook)

        hooks = [observe(i) for i in range(len(groups))]
        for _ in forward():
            pass
        for hook in hooks:
            hook.remove()
        for linears, hessian in zip(groups, H):
            W = [slicegpt.matrix(linear) for linear in linears]
            pruned = prune(torch.cat(W, 1), hessian).split([w.shape[1] for w in W], 1)
            for linear, w in zip(linears, pruned):
                slicegpt.set_matrix(linear, w, linear.bias)
                zeros += w.numel() // 2
        for x, y in forward():
            x.copy_(y)
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


# ---- Quality, of real models ----------------------------------------------------------------------------------------

METHODS = {  # as options of slicegpt.py
    "block": [], "block, refit": ["--refit"],
    "shared": ["--rotation", "shared"], "shared, refit": ["--rotation", "shared", "--refit"],
    "shared, refit, tied": ["--rotation", "shared", "--refit", "--head", "tied"],
    "shared, learned": ["--rotation", "shared", "--learn-rotation", "N"],
    "shared, refit, learned": ["--rotation", "shared", "--refit", "--learn-refit", "N"],
    "shared, learned twice": ["--rotation", "shared", "--learn-rotation", "N", "--learn-refit", "N"],
    "shared, learned twice, tied": ["--rotation", "shared", "--learn-rotation", "N", "--learn-refit", "N",
                                    "--head", "tied"],
}  # N: as many steps as --learn says


def compressed(model, options: list[str], sparsity: float | None, calibration: Tensor, device):
    """(a copy of the model, sliced as slicegpt.py does it with these options, or else 2:4 sparse; how many zeros)."""
    model = copy.deepcopy(model)
    setting = slicegpt.parse_arguments(options + (["--sparsity", str(sparsity)] if sparsity else []))
    if sparsity is None:
        return model, sparsegpt(model, calibration, batch_size=setting.batch_size, device=device)
    slicegpt.choose_size(setting, model)
    return slicegpt.slice_as_asked(setting, model, calibration, device)[0], 0


def quality(args, options):
    """Perplexity, parameters, bytes and time per token of every method at every sparsity, from one run on one model."""
    setting = slicegpt.parse_arguments(options)
    model, tokenizer, evaluation, device = slicegpt.prepare(setting)
    calibration = slicegpt.calibration_tokens(setting, tokenizer)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    rows, models = [], []

    def add(method, sparsity, network, zeros=0):
        kept_bits = 8 * network.dtype.itemsize + 2  # 2:4 stores, of every four, two weights, and where they were
        rows.append({"method": method, "sparsity": sparsity, "parameters": parameters(network) - zeros,
                     "gigabytes": (weight_bytes(network) - 2 * zeros * network.dtype.itemsize + zeros * kept_bits / 8)
                     / 1e9, "perplexity": slicegpt.perplexity(network, evaluation)})
        models.append(network)

    add("dense", 0.0, model.to(device).eval())
    add("SparseGPT 2:4", 0.5, *compressed(model, options, None, calibration, device))
    for method, flags in METHODS.items():
        if "tied" in flags and not tied or "N" in flags and not args.learn:
            continue
        flags = [str(args.learn) if flag == "N" else flag for flag in flags]
        for sparsity in args.sparsities:
            add(method, sparsity, *compressed(model, [*options, *flags], sparsity, calibration, device))
    prompt = torch.randint(model.config.vocab_size, (1, min(128, setting.seqlen // 2)), device=device)
    tokens = min(50, setting.seqlen // 2 - WARM_UP)
    seconds = in_turns([decoder(network, prompt) for network in models], tokens, device, "decoding")
    for row, times in zip(rows, seconds):
        row |= {"seconds": quantiles(times)[0], "time": ratios(times, seconds[0])[0],
                "share": row["parameters"] / rows[0]["parameters"]}
        row["ms"] = 1e3 * row["seconds"]
    show(args, f"{setting.model}: {len(evaluation)} x {setting.seqlen} tokens of {setting.eval}, calibrated on "
         f"{len(calibration)} x {setting.seqlen} of {setting.calibration}; one token on {device}, batch 1", rows,
         {"method": ("", ""), "sparsity": ("sparsity", ".0%"), "parameters": ("parameters", ",d"),
          "share": ("share", ".2f"), "gigabytes": ("GB/token", ".3f"), "perplexity": ("perplexity", ".2f"),
          "ms": ("ms/token", ".2f"), "time": ("time", ".2f")})
    print("2:4: parameters that are not zero, bytes in an accelerator's 2:4 format, and the time of dense products")
    draw(args, *((curves(rows, "method", key, "perplexity"),
                  {"xlabel": label, "ylabel": "perplexity", "yscale": "log"})
                 for key, label in (("parameters", "parameters"), ("time", "time per token (dense: 1)"))))


PAPER = {  # Table 1: dense, SparseGPT 2:4, and SliceGPT at 10, 20, 25 and 30%
    "opt-125m": (27.64, 45.07, 29.34, 34.26, 37.74, 43.98), "opt-1.3b": (14.61, 29.61, 15.10, 16.43, 17.46, 19.09),
    "opt-2.7b": (12.46, 14.90, 12.75, 13.73, 14.56, 15.83), "opt-6.7b": (10.85, 13.00, 10.92, 11.48, 11.90, 12.51),
    "opt-13b": (10.12, 11.80, 10.27, 10.66, 10.94, 11.33), "opt-30b": (9.56, 10.53, 9.65, 9.87, 10.04, 10.27),
    "opt-66b": (9.33, 10.22, 9.43, 9.57, 9.68, 9.85), "llama-2-7b": (5.47, 8.69, 5.89, 6.64, 7.24, 8.12),
    "llama-2-13b": (4.88, 7.07, 5.21, 5.81, 6.30, 6.99), "llama-2-70b": (3.32, 4.98, 3.69, 4.25, 4.60, 5.05),
}


def table1(args, options):
    """Table 1: WikiText-2 perplexity; with the paper's in brackets, where the model's name is one of the paper's."""
    sparsities = (0.1, 0.2, 0.25, 0.3)
    rows = [{"method": name} for name in ("dense", "SparseGPT 2:4", *(f"SliceGPT {s:.0%}" for s in sparsities))]
    for name in args.models:
        setting = slicegpt.parse_arguments([*options, "--model", name])
        model, tokenizer, evaluation, device = slicegpt.prepare(setting)
        calibration = slicegpt.calibration_tokens(setting, tokenizer)
        label = Path(name).name
        paper = PAPER.get(label.lower().removesuffix("-hf"), [None] * len(rows))
        for row, sparsity, published in zip(rows, (0, None, *sparsities), paper):
            network = model if sparsity == 0 else compressed(model, [*options, "--model", name], sparsity, calibration,
                                                             device)[0]
            with slicegpt.placed(network, device):
                row[label] = slicegpt.perplexity(network, evaluation, device=device)
            row[f"{label} in the paper"] = published
    labels = [Path(name).name for name in args.models]
    shown = [row | {label: f"{row[label]:.2f}" + (f" ({row[f'{label} in the paper']})" if
             row[f"{label} in the paper"] else "") for label in labels} for row in rows]
    show(args, f"perplexity on {setting.eval}, sequences of {setting.seqlen} tokens, calibrated on "
         f"{len(calibration)} of {setting.calibration}; in brackets: the paper's", shown,
         {"method": ("", "")} | {label: (label, "") for label in labels}, rows)
    draw(args, ({label: [(100 * s, row[label]) for s, row in zip((0, *sparsities), [rows[0], *rows[2:]])]
                 for label in labels}, {"xlabel": "% sliced", "ylabel": "perplexity", "yscale": "log"}))


@torch.no_grad()
def spectrum(args, options):
    """Figure 8: the eigenvalues of the FFN's inputs in each layer of the dense network, relative to the largest."""
    setting = slicegpt.parse_arguments(options)
    model, tokenizer, _, device = slicegpt.prepare(setting)
    calibration = slicegpt.calibration_tokens(setting, tokenizer)
    slicegpt.fuse(model.eval())
    parts = slicegpt.architecture(model.config)
    norm, lines = model.get_submodule(parts.norm), []
    X = slicegpt.signals(model, calibration, setting.batch_size, device)
    state = slicegpt.SimpleNamespace(X=X)
    for _, layer, stage, others, kwargs in slicegpt.sweep(model, calibration, device, state, rewrites=False):
        C = 0
        for x in X.split(setting.batch_size):
            Z = x.to(device)
            C = C + slicegpt.covariance(norm(Z))
            x.copy_(stage(layer, Z, None, *others, **kwargs))
        if parts.ffn in stage.blocks:
            lines.append(slicegpt.pca(C)[0].clamp_min(0).cpu())
    shares = (0.9, 0.99, 0.999)
    rows = []
    for number, eigenvalues in enumerate(lines):
        left = eigenvalues.cumsum(0) / eigenvalues.sum()
        rows.append({"layer": str(number), "eigenvalues": (eigenvalues / eigenvalues[0]).tolist()}
                    | {f"{share:.1%}": 1 + int((left < share).sum()) for share in shares})
    show(args, f"{setting.model}, inputs of the FFN, {len(calibration)} x {setting.seqlen} tokens of "
         f"{setting.calibration}: of {model.config.hidden_size} dimensions, how many have that share of the variance",
         rows, {"layer": ("layer", "")} | {f"{share:.1%}": (f"{share:.1%}", "d") for share in shares})
    if args.plot:
        pyplot = slicegpt.optional("matplotlib.pyplot")
        figure, axis = pyplot.subplots(figsize=(7, 4.5))
        for number, row in enumerate(rows):
            axis.semilogy(row["eigenvalues"], color=pyplot.cm.viridis(number / max(1, len(rows) - 1)), linewidth=0.8)
        axis.set(xlabel="principal component", ylabel="eigenvalue / largest", ylim=(1e-6, 1.5),
                 title="inputs of the FFN, first layer dark, last layer bright")
        figure.tight_layout()
        figure.savefig(args.plot)


# ---- The command line -----------------------------------------------------------------------------------------------

OPTIONS = {
    "shape": {"choices": SHAPES, "default": "opt-125m"},
    "shapes": {"choices": SHAPES, "nargs": "+", "default": ["opt-125m", "opt-350m-like", "opt-1.3b"]},
    "sparsity": {"type": float, "default": 0.25},
    "sparsities": {"type": float, "nargs": "+"},
    "learn": {"type": int, "metavar": "N", "help": "also the methods that learn, by N steps (default: without)"},
    "layers": {"type": int, "help": "build so many layers (latency: measure these and half as many, and extrapolate)"},
    "batch_size": {"type": int},
    "batch_sizes": {"type": int, "nargs": "+", "default": [1, 2048], "help": "tokens at a time (default: 1 2048)"},
    "max_batch_size": {"type": int, "default": 1024},
    "prompt_lengths": {"type": int, "nargs": "+", "default": [128, 512], "help": "default: 128 512"},
    "tokens": {"type": int, "help": "tokens to decode"},
    "samples": {"type": int, "nargs": "+", "default": [4, 8], "help": "sequences to slice with (default: 4 8)"},
    "seqlen": {"type": int},
    "repeat": {"type": int, "help": "rounds"},
    "finetune": {"type": int, "default": 4, "help": "sequences of RFT (default: 4; 0: none)"},
    "compile": {"action": "store_true", "help": "torch.compile and a static KV cache, for all networks"},
    "device": {"type": torch.device, "default": "cuda" if torch.cuda.is_available() else "cpu"},
    "dtype": {"choices": ["float64", "float32", "float16", "bfloat16"],
              "help": "default: float32 on a CPU, else float16"},
    "models": {"nargs": "+", "default": ["facebook/opt-125m"], "help": "default: facebook/opt-125m"},
    "json": {"type": Path, "metavar": "FILE", "help": "write the figures here"},
    "plot": {"type": Path, "metavar": "FILE.png", "help": "draw them here (needs matplotlib)"},
}
COMMANDS = {  # the function, its options, those of their defaults that are its own
    "latency": (latency, "shape sparsity layers batch_size prompt_lengths tokens compile device dtype json plot",
                {"batch_size": 1, "tokens": 50}),
    "throughput": (throughput, "shape sparsities layers max_batch_size seqlen tokens device dtype json plot",
                   {"sparsities": [0.25, 0.5], "seqlen": 128, "tokens": 16}),
    "ops": (ops, "shape sparsity batch_sizes repeat device dtype json", {"repeat": 50}),
    "cost": (cost, "shapes sparsity layers batch_size samples seqlen finetune repeat device dtype json plot",
             {"batch_size": 8, "seqlen": 512, "repeat": 1}),
    "table1": (table1, "models json plot", {}),
    "quality": (quality, "sparsities learn json plot", {"sparsities": [0.1, 0.2, 0.3]}),
    "spectrum": (spectrum, "json plot", {}),
}


def main(argv=None) -> int:
    """The exit code: 0, or 2 after one line on standard error for what the user can mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "latency"
    if command not in COMMANDS:
        print(f"bench: there is no command {command}, only {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    work, names, defaults = COMMANDS[command]
    real = command in ("table1", "quality", "spectrum")
    parser = argparse.ArgumentParser(
        f"bench.py {command}", description=work.__doc__.splitlines()[0], allow_abbrev=False,
        epilog="All other options are slicegpt.py's." if real else None)
    for name in names.split():
        settings = OPTIONS[name] | ({"default": defaults[name]} if name in defaults else {})
        parser.add_argument("--" + name.replace("_", "-"), **settings)
    args, options = parser.parse_known_args(argv)
    if options and not real:
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    torch.manual_seed(0)
    try:
        if getattr(args, "plot", None):
            slicegpt.optional("matplotlib").use("Agg")
        if real:
            work(args, options)
        else:
            args.dtype = getattr(torch, args.dtype or ("float32" if args.device.type == "cpu" else "float16"))
            work(args)
    except SliceGPTError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
