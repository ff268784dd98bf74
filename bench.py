"""Measures what the paper says of speed, cost and quality (section 4, A.4, A.6, A.7); and SparseGPT 2:4 beside it.

    python bench.py latency --shape opt-1.3b     # Table 2: the time of one generated token (default, of opt-125m)
    python bench.py throughput --shape opt-125m  # A.6: tokens per second, in batches as large as pays
    python bench.py ops --shape opt-6.7b         # A.7: the time of every matrix product of a layer
    python bench.py cost                         # Table 3: the time and memory of slicing, and of RFT (needs peft)
    python bench.py table1 --models DIR DIR      # Table 1: perplexity, dense, SparseGPT 2:4, SliceGPT
    python bench.py tasks --model DIR            # Figure 5: zero-shot accuracy, dense and sliced
    python bench.py quality --plot quality.png   # perplexity, parameters and time of all ways to slice
    python bench.py spectrum --plot spectrum.png # Figure 8: how few directions the signal needs

The first four download nothing: networks of published shapes get random weights, as speed does not depend on these,
and --layers of their layers (0: all). The others take a real model, and the options of slicegpt.py. All take --json,
and all but ops and tasks --plot FILE.png. A time is the median of several rounds, in which all that is compared takes
turns; `of dense time` is that of the ratios in the same round. GB/token: without an embedding and idle experts.

A command is a function with its options as parameters behind `args`, the shared ones, and `rows`, which it appends to.
"""
import argparse
import contextlib
import copy
import gc
import inspect
import io
import itertools
import json
import signal
import sys
import time
from functools import cache, partial
from pathlib import Path
from statistics import mean, median

import torch
import transformers
from torch import Tensor, nn

import slicegpt
from slicegpt import SliceGPTError, parameters, slice_model, sliced_dimension, stages


# ---- Networks of published shapes, with random weights --------------------------------------------------------------
def opt(width, layers, heads):
    return "opt", {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width, "vocab_size": 50272,
                   "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": 2048}


def llama_like(width, layers, heads, kv_heads, ffn, vocabulary=32000, family="llama", **more):
    return family, {"hidden_size": width, "intermediate_size": ffn, "vocab_size": vocabulary,
                    "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
                    "tie_word_embeddings": False, "max_position_embeddings": 4096} | more


SHAPES = {  # name: Hugging Face's model_type, and options of its config
    "opt-125m": opt(768, 12, 12), "opt-350m-like": opt(1024, 24, 16), "opt-1.3b": opt(2048, 24, 32),
    "opt-2.7b": opt(2560, 32, 32), "opt-6.7b": opt(4096, 32, 32), "opt-13b": opt(5120, 40, 40),
    "opt-30b": opt(7168, 48, 56), "opt-66b": opt(9216, 64, 72),
    "smollm2-135m": llama_like(576, 30, 9, 3, 1536, 49152, tie_word_embeddings=True),
    "llama-2-7b": llama_like(4096, 32, 32, 32, 11008), "llama-2-13b": llama_like(5120, 40, 40, 40, 13824),
    "llama-2-70b": llama_like(8192, 80, 64, 8, 28672),
    "mixtral-8x7b": llama_like(4096, 32, 32, 8, 14336, family="mixtral", num_local_experts=8, num_experts_per_tok=2),
    "qwen3-30b-a3b": llama_like(2048, 48, 32, 4, 6144, 151936, family="qwen3_moe", head_dim=128, num_experts=128,
                                num_experts_per_tok=8, moe_intermediate_size=768),
    "gpt-oss-20b": llama_like(2880, 24, 64, 8, 2880, 201088, family="gpt_oss", head_dim=64, num_local_experts=32,
                              num_experts_per_tok=4)}  # the real OPT-350M has norms behind its blocks


def build(shape: str, sparsity: float | None, layers: int, dtype, device, shared: bool = False):
    """A network of a published shape, with `layers` (0: all): dense (sparsity None), or sliced (shared: by one Q)."""
    family, options = SHAPES[shape]
    config = transformers.AutoConfig.for_model(family, **options | ({"num_hidden_layers": layers} if layers else {}))
    gc.collect()  # an earlier network that was sliced is a cycle: its layers hold their stages, and these the layers
    with torch.device(device):
        if sparsity is None:
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        d = sliced_dimension(config.hidden_size, sparsity)
        config.slicegpt = {"dimensions": [d] * (1 + 2 * config.num_hidden_layers), "shortcuts": not shared}
        base = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return slicegpt.standard(slicegpt.sliced_class(base)._from_config(config, dtype=dtype))[0].eval()


def weight_bytes(model) -> int:
    """What one token reads: all weights but the embedding's, if the head has others, and those of idle experts."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    idle = 0 if head is embedding else embedding.nbytes
    for linear in (linear for stage in stages(model) for linear in stage.readers + stage.writers):
        if isinstance(linear, slicegpt.Expert):  # of_all[0] has a row for each expert of a layer
            idle += linear.weight.nbytes * (1 - model.config.num_experts_per_tok / len(linear.of_all[0]))
    return round(sum(weight.nbytes for weight in model.parameters()) - idle)


# ---- Measuring and showing ------------------------------------------------------------------------------------------
WARM_UP = 4  # rounds, which do not count
HEADINGS = {  # of the columns, where the keys of --json do not say enough
    "ms": "ms/token", "time": "of dense time", "time_p10": "its p10", "time_p90": "its p90", "gigabytes": "GB/token",
    "bytes": "of dense GB", "held": "GB held", "bandwidth": "of copy GB/s", "copy_gigabytes_per_second": "copy GB/s",
    "speed": "tokens/s", "sparse": "2:4", "sliced_time": "sliced/dense", "sparse_time": "2:4/dense",
    "share": "of dense parameters"}


@torch.no_grad()
def in_turns(works: list, rounds: int, device, label: str, warm_up: int = WARM_UP) -> Tensor:
    """Seconds (works, rounds): each is called once a round, in random order, so what disturbs it falls on all alike."""
    synchronize = torch.get_device_module(device).synchronize
    seconds = torch.zeros(len(works), warm_up + rounds, dtype=torch.float64)
    for number in slicegpt.progress(range(warm_up + rounds), label, unit="round"):
        for i in torch.randperm(len(works)).tolist():
            synchronize()
            start = time.perf_counter()
            works[i]()
            synchronize()
            seconds[i, number] = time.perf_counter() - start
    return seconds[:, warm_up:]


@torch.no_grad()
def decoder(model, prompt: Tensor, room: int | None = None):
    """A function whose every call decodes one more token behind a prompt (B, N); compiled, for a room of so many."""
    token = prompt[:, :1].clone()  # which one it is makes no difference to the time
    if room is None:
        past = model(prompt, use_cache=True, logits_to_keep=1).cache
        return lambda: model(token, cache=past, use_cache=True)
    past = transformers.StaticCache(model.config, max_cache_len=room)
    model(prompt, cache=past, use_cache=True, logits_to_keep=1)
    # all steps have the same shapes: on a GPU they are one graph, and Python's time to hand out the work does not count
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
    positions = torch.full((len(prompt), 1), prompt.shape[1] - 1, device=prompt.device)
    mask = torch.ones(len(prompt), room, dtype=torch.int64, device=prompt.device)
    return lambda: step(token, attention_mask=mask, position_ids=positions.add_(1), cache=past, use_cache=True)


def show(args, note: str | None, rows: list[dict]):
    """Prints options, a note, and a table: of each row a name, under its first key, and figures; or as JSON, too."""
    def text(value):
        if isinstance(value, str | None):
            return value or "-"
        return f"{value:,d}" if isinstance(value, int) else f"{value:.3f}"
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "eigenvalues"]
    table = [["", *(HEADINGS.get(key, key) for key in keys[1:])]]
    table += [[text(row.get(key)) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    options = vars(args) | dict.fromkeys(("command", "options", "json", "plot"))
    said = [f"{name} {value}" for name, value in options.items() if value not in (None, "", ())]
    print(f"{args.command.__name__}: {', '.join(filter(None, [*said, note]))}")
    for name, *cells in table:
        print(name.ljust(widths[0]), *map(str.rjust, cells, widths[1:]), sep="  ")
    print(flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


def draw(args, rows: list[dict], name: str, x: str, y: str, x_scale="linear", y_scale="linear"):
    """--plot: y against x, with a curve for all rows of one name."""
    if not args.plot:
        return
    names = list(dict.fromkeys(row[name] for row in rows))
    plot = slicegpt.optional("matplotlib.figure").Figure(layout="tight")
    panel = plot.subplots()
    panel.set_prop_cycle(color=slicegpt.optional("matplotlib").colormaps["viridis"](torch.linspace(0, 0.9, len(names))))
    for label in names:
        points = sorted((row[x], row[y]) for row in rows if row[name] == label and None not in (row[x], row[y]))
        panel.plot(*zip(*points), marker=".", label=label)
    panel.set(xlabel=HEADINGS.get(x, x), ylabel=HEADINGS.get(y, y), xscale=x_scale, yscale=y_scale)
    panel.legend(fontsize="x-small", ncols=1 + len(names) // 12)
    plot.savefig(args.plot)


# ---- Speed ----------------------------------------------------------------------------------------------------------
def latency(args, rows, shape="opt-125m", sparsity=0.25, layers=0, batch_size=1, prompt_lengths=(128, 512), tokens=50,
            compile=False):
    """Table 2: the time of one token: dense, sliced by a Q per block, and, beyond the paper, by one Q shared by all.

    prompt: tokens before it. of copy GB/s: the speed of reading the network, to that of copying memory. With --layers,
    so many and half as many are measured, and the medians (thus also p10, p90) extrapolated. Without --compile, small
    networks and batches on a GPU measure how fast Python hands out the work.
    """
    published = SHAPES[shape][1]["num_hidden_layers"]
    depths = [layers, layers // 2] if 0 < layers < published else [published]
    if depths[-1] < 1:
        raise SliceGPTError("--layers must be 0, for all, or at least 2")
    further = (published - depths[0]) / max(1, depths[0] - depths[-1])
    networks = {"dense": partial(build, shape, None), f"block {sparsity:.0%}": partial(build, shape, sparsity),
                f"shared {sparsity:.0%}": partial(build, shape, sparsity, shared=True)}
    models = [new(layers=depth, dtype=args.dtype, device=args.device) for depth in depths for new in networks.values()]
    whole = [new(layers=0, dtype=args.dtype, device="meta") for new in networks.values()]
    sizes = [(weight_bytes(model), sum(weight.nbytes for weight in model.parameters())) for model in whole]
    source, target = torch.ones(2, 2**28 if args.device.type == "cuda" else 2**25, device=args.device)  # beyond caches
    percentiles = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    for length in prompt_lengths:
        if compile:
            torch.compiler.reset()  # torch compiles a function for a few shapes only, and then refuses
        prompt = torch.randint(10, 1000, (batch_size, length), device=args.device)
        room = length + WARM_UP + tokens if compile else None
        works = [*(decoder(model, prompt, room) for model in models), lambda: target.copy_(source)]
        seconds = in_turns(works, tokens, args.device, "decoding")
        copied = 2 * source.nbytes / seconds[-1].quantile(0.5).item()
        if further:  # each layer adds the same; of medians, as of each round it would be the noise that is extrapolated
            deep, shallow, _ = seconds.quantile(0.5, dim=1, keepdim=True).split(len(networks))
            seconds = deep + (deep - shallow) * further
        for name, times, (read, held) in zip(networks, seconds, sizes):
            ms, p10, p90 = (1e3 * times).quantile(percentiles).tolist()
            ratio, ratio_p10, ratio_p90 = (times / seconds[0]).quantile(percentiles).tolist()
            rows.append({"network": name, "prompt": length, "ms": ms, "p10": p10, "p90": p90, "time": ratio,
                         "time_p10": ratio_p10, "time_p90": ratio_p90, "gigabytes": read / 1e9,
                         "bytes": read / sizes[0][0], "held": held / 1e9, "bandwidth": 1e3 * read / ms / copied,
                         "copy_gigabytes_per_second": copied / 1e9})
    draw(args, rows, "network", "prompt", "ms")


def throughput(args, rows, shape="opt-125m", sparsities=(0.25, 0.5), layers=0, max_batch_size=1024, seqlen=128,
               tokens=16):
    """A.6: tokens/s in the middle of --seqlen, in batches that are doubled until it drops or memory runs out."""
    prompt_length = (seqlen - tokens) // 2 - WARM_UP
    if prompt_length < 1:
        raise SliceGPTError(f"--seqlen must be at least {tokens + 2 * WARM_UP + 2} for --tokens {tokens}")
    for sparsity in sparsities:
        sliced_dimension(SHAPES[shape][1]["hidden_size"], sparsity)  # raises for what cannot be, before the work
    for sparsity in (None, *sparsities):
        name = "dense" if sparsity is None else f"block {sparsity:.0%}"
        best = {"speed": 0}  # the row of the best batch so far
        model = build(shape, sparsity, layers, args.dtype, args.device)
        for batch in [2**i for i in range(max_batch_size.bit_length())]:
            row = {"network": name, "batch": batch, "speed": None, "note": "out of memory"}
            prompt = torch.randint(10, 1000, (batch, prompt_length), device=args.device)
            with contextlib.suppress(torch.OutOfMemoryError):
                seconds = in_turns([decoder(model, prompt)], tokens, args.device, "decoding").quantile(0.5).item()
                row |= {"speed": batch / seconds, "note": ""}
            rows.append(row)
            if row["speed"] is None or row["speed"] < best["speed"]:
                break
            best = row
        del model  # before the next is built
        if sparsity is None:
            dense = best
        best["note"] = f"best: {best['speed'] / dense['speed']:.2f} of dense" if dense["speed"] else "best"
    draw(args, rows, "network", "batch", "speed", "log", "log")


@torch.no_grad()
def ops(args, rows, shape="opt-125m", sparsity=0.25, batch_sizes=(1, 2048), repeat=50):
    """A.7: ms of every matrix product of a layer: dense, sliced (with shortcuts, X S), and 2:4 sparse if torch can."""
    dense, sliced = (build(shape, each, 1, args.dtype, args.device) for each in (None, sparsity))
    if "experts" in slicegpt.architecture(dense.config).ffn.W_in:
        raise SliceGPTError("the products of experts are not measured here")
    random = partial(torch.randn, dtype=args.dtype, device=args.device)
    why_not = None  # there is no 2:4 product
    for tokens in batch_sizes:
        products = {}  # name: {kind: function}
        for before, after in zip(stages(dense), stages(sliced)):
            for path in [path for block in before.blocks for path in f"{block.W_in} {block.W_out}".split()]:
                linear, narrow = (stage.layer.get_submodule(path) for stage in (before, after))
                x, x_sliced = (random(tokens, module.in_features) for module in (linear, narrow))
                products[path] = {"dense": partial(linear, x), "sliced": partial(narrow, x_sliced)}
                try:
                    mask = torch.tensor([0, 0, 1, 1]).repeat(linear.in_features // 4).to(linear.weight)
                    W = torch.sparse.to_sparse_semi_structured(linear.weight * mask)
                    nn.functional.linear(x, W, linear.bias)
                    products[path]["sparse"] = partial(nn.functional.linear, x, W, linear.bias)
                except Exception as error:  # torch has many ways to say that it has no such product
                    why_not = f"2:4: torch has no such product here ({slicegpt.first_line(error)})"
            X = random(tokens, len(after.shortcut))
            products[after.shortcut_name] = {"sliced": partial(torch.matmul, X, after.shortcut)}
        total = {"dense": 0, "sliced": 0, "sparse": 0}
        for operation, works in products.items():
            seconds = in_turns(list(works.values()), repeat, args.device, operation).quantile(0.5, dim=1)
            ms = dict(zip(works, (1e3 * seconds).tolist()))
            total |= {kind: total[kind] + ms[kind] for kind in ms}
            rows.append({"operation": operation, "tokens": tokens} | dict.fromkeys(total) | ms)
        if any("dense" in works and "sparse" not in works for works in products.values()):
            total["sparse"] = None  # a sum of some only
        rows.append({"operation": "all", "tokens": tokens} | total)
    for row in rows:
        for kind in ("sliced", "sparse"):
            row[f"{kind}_time"] = row[kind] / row["dense"] if row[kind] and row["dense"] else None
    return why_not


def cost(args, rows, shapes=("opt-125m", "opt-350m-like", "opt-1.3b"), sparsity=0.25, layers=0, batch_size=8,
         samples=(4, 8), seqlen=512, finetune=4, repeat=1):
    """Table 3: seconds and peak GB of slicing (ratio: to a dense forward pass) and of RFT, by --finetune sequences.

    Medians of --repeat rounds, after one that warms up. A new network runs on the --samples, with head (forward) and
    without (body), as slicing needs none; is sliced by them; and is trained (set up, a step for 4 sequences, merged).
    """
    if finetune:
        slicegpt.optional("peft")  # raises, before the work, if it is not there; --finetune 0 does without

    def forward(network, tokens):
        for batch in tokens.split(batch_size):
            network(batch.to(args.device), use_cache=False)
    for shape, count in itertools.product(shapes, samples):
        tokens, tokens_of_rft = (torch.randint(10, 1000, (number, seqlen)) for number in (count, finetune))
        rounds = []
        for _ in range(1 + repeat):
            model = build(shape, None, layers, args.dtype, args.device)
            row = {"shape": shape, "samples": count, "tokens": tokens.numel(), "parameters": parameters(model)}
            works = {"forward": partial(forward, model, tokens), "body": partial(forward, model.base_model, tokens),
                     "slicing": partial(slice_model, model, tokens, sparsity, batch_size=batch_size)}
            if finetune:  # with gradients, which `in_turns` disables
                works["rft"] = torch.enable_grad()(partial(slicegpt.finetune, model, tokens_of_rft))
            costs = {}
            for name, work in works.items():
                if args.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(args.device)
                with contextlib.suppress(OSError):  # 5 resets Linux's peak; elsewhere it is that since the beginning
                    Path("/proc/self/clear_refs").write_text("5")
                costs[name] = in_turns([work], 1, args.device, name, warm_up=0).item()
                costs[f"{name}_peak"] = slicegpt.peak_memory(args.device) / 1e9
            rounds.append(costs | {"ratio": costs["slicing"] / costs["forward"]})
            del model, works, work  # before the next is built
        rows.append(row | {key: median(costs[key] for costs in rounds[1:]) for key in rounds[0]})
    draw(args, rows, "shape", "tokens", "slicing", "log", "log")


# ---- Quality --------------------------------------------------------------------------------------------------------
def prune(W: Tensor, H: Tensor, damping: float = 0.01, width: int = 128) -> Tensor:
    """W (inputs, outputs) with 2 of every 4 weights of an output zero, and the others such that X W changes little.

    H = X^T X, to whose diagonal is added a share of its mean, and H^-1 = U^T U with U upper triangular: without the
    inputs before j, the first entry of H^-1 is U_jj^2. Going down the inputs, of every four the two weights with the
    least w^2 / U_jj^2 go; their errors are spread over the inputs that follow, behind `width` of them by a product.
    """
    if len(W) % 4:
        raise SliceGPTError(f"2:4 needs inputs in fours, and a matrix has {len(W)}")
    W = W.clone()
    damped = (damping * H.diag().mean()).clamp_min(torch.finfo(H.dtype).tiny)  # more than 0, even if all inputs are 0
    L = torch.linalg.cholesky(H + damped * torch.eye(len(H), dtype=H.dtype, device=H.device))
    U = torch.linalg.cholesky(torch.cholesky_inverse(L), upper=True)
    for start in range(0, len(W), width):
        end = min(start + width, len(W))
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


@torch.no_grad()
def sparsegpt(model, calibration: Tensor, *, batch_size: int = 8, device=None) -> int:
    """Frantar and Alistarh 2023 (arXiv 2301.00774): zeroes 2 of every 4 weights, in place; returns how many in all."""
    parts = slicegpt.architecture(model.config)
    if "experts" in parts.ffn.W_in:
        raise SliceGPTError("SparseGPT prunes no experts here")
    device = device or model.device
    zeros = 0
    for stage, X in slicegpt.signals(model.eval(), calibration, batch_size, device):  # behind what is pruned already
        if stage is None or parts.attention not in stage.blocks:
            continue  # the FFN is pruned with its layer's attention, by what both read before either is pruned
        linears = [linear for block in (parts.attention, parts.ffn)
                   for linear in slicegpt.submodules(stage.layer, f"{block.W_in} {block.W_out}")]
        H = dict.fromkeys(linears, 0)
        hooks = [linear.register_forward_pre_hook(lambda linear, inputs: H.update(
            {linear: H[linear] + slicegpt.covariance(inputs[0])})) for linear in linears]
        for x in X.split(batch_size):
            stage.layer(x.to(device), *stage.args, **stage.kwargs)
        for hook in hooks:
            hook.remove()
        for linear in linears:
            slicegpt.set_matrix(linear, prune(slicegpt.matrix(linear), H.pop(linear)))  # the bias stays
            zeros += linear.weight.numel() // 2
        slicegpt.layers(model)[stage.number].load_state_dict(stage.layer.state_dict())  # on a device it is a copy
    return zeros


def read_model(args) -> tuple:
    """(model, slicegpt.Inputs, batch_size and device) that the options ask for; those left out are filled in."""
    inputs = slicegpt.read_inputs(args)
    if inputs.calibration is None and args.command is not tasks:
        raise SliceGPTError(f"{args.model} is sliced already")
    model = slicegpt.load(args.model, inputs.dtype)[0].eval()
    return model, inputs, {"batch_size": args.batch_size, "device": inputs.device}


PAPER = {  # Table 1: dense, SparseGPT 2:4, and SliceGPT at 10, 20, 25 and 30%
    "opt-125m": (27.64, 45.07, 29.34, 34.26, 37.74, 43.98), "opt-1.3b": (14.61, 29.61, 15.10, 16.43, 17.46, 19.09),
    "opt-2.7b": (12.46, 14.90, 12.75, 13.73, 14.56, 15.83), "opt-6.7b": (10.85, 13.00, 10.92, 11.48, 11.90, 12.51),
    "opt-13b": (10.12, 11.80, 10.27, 10.66, 10.94, 11.33), "opt-30b": (9.56, 10.53, 9.65, 9.87, 10.04, 10.27),
    "opt-66b": (9.33, 10.22, 9.43, 9.57, 9.68, 9.85), "llama-2-7b": (5.47, 8.69, 5.89, 6.64, 7.24, 8.12),
    "llama-2-13b": (4.88, 7.07, 5.21, 5.81, 6.30, 6.99), "llama-2-70b": (3.32, 4.98, 3.69, 4.25, 4.60, 5.05)}


def table1(args, rows, models: str = (), round_to=8):
    """Table 1: perplexity of --models (or --model), and in the paper, if a directory is named like a model of its."""
    methods = {"dense": 0, "SparseGPT 2:4": None} | {f"SliceGPT {share:.0%}": share for share in (0.1, 0.2, 0.25, 0.3)}
    rows += [{"method": method} for method in methods]  # a model adds columns to all
    points = []  # for --plot
    for name in models or [args.model]:
        label = name if Path(name).name in rows[0] else Path(name).name
        args.model = name
        model, inputs, layerwise = read_model(args)
        paper = PAPER.get(label.lower().removesuffix("-hf"), [None] * len(rows))
        for row, sparsity, published in zip(rows, methods.values(), paper):
            network = copy.deepcopy(model)
            if sparsity is None:
                sparsegpt(network, inputs.calibration, **layerwise)
            elif sparsity:
                slice_model(network, inputs.calibration, sparsity, round_to=round_to, **layerwise)
            with slicegpt.placed(network, inputs.device):
                row[label] = slicegpt.perplexity(network, inputs.evaluation, device=inputs.device)
            row[f"{label} in the paper"] = published
            points.append({"model": label, "sparsity": sparsity, "perplexity": row[label]})
    draw(args, points, "model", "sparsity", "perplexity", y_scale="log")


def tasks(args, rows, tasks="piqa,winogrande,hellaswag,arc_easy,arc_challenge", sparsity=0.25, limit=0, tasks_path=""):
    """Figure 5: zero-shot accuracy (LM Evaluation Harness) of a model and of its slice, or of one sliced already.

    Normalised by the answers' length (acc_norm) where a task has that, as in the authors' code. A group or tag stands
    for its tasks. --limit: questions of each task, 0 for all. --tasks-path: a directory with more tasks.
    """
    manager = slicegpt.optional("lm_eval.tasks").TaskManager(include_path=tasks_path or None)
    names = tasks.replace(",", " ").split()
    for name in set(names) - set(manager.all_tasks):
        raise SliceGPTError(f"there is no task {name}")
    model, inputs, layerwise = read_model(args)
    networks = ["sliced"] if inputs.calibration is None else ["dense", "sliced"]
    sliced_dimension(model.config.hidden_size, sparsity)  # raises for what cannot be, before the work
    for network in networks:
        with slicegpt.placed(model, inputs.device), slicegpt.failing(f"cannot run the tasks {', '.join(names)}"):
            lm = slicegpt.optional("lm_eval.models.huggingface").HFLM(model, tokenizer=inputs.tokenizer)
            results = slicegpt.optional("lm_eval").simple_evaluate(
                lm, tasks=names, task_manager=manager, limit=limit or None)
            if not rows:
                rows += [{"task": name} for name in results["results"] if not results["group_subtasks"].get(name)]
            for row in rows:
                found = results["results"][row["task"]]
                metric = "acc_norm" if "acc_norm,none" in found else "acc"
                row |= {"metric": metric, network: found[f"{metric},none"],
                        f"{network}_error": found[f"{metric}_stderr,none"]}
        if network == "dense":
            slice_model(model, inputs.calibration, sparsity, **layerwise)
    rows.append({"task": "average"} | {network: mean(row[network] for row in rows) for network in networks})


def by_every_method(model, calibration, layerwise, sparsities, params, round_to, learn, seed) -> list[tuple]:
    """(method, network, number of weights that are pruned), for `quality`. Raises, before the work, for bad sizes."""
    by_sparsity = [sliced_dimension(model.config.hidden_size, sparsity, round_to) for sparsity in sparsities]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    dimensions = {head: [slicegpt.dimension_for(model.config, share, round_to, "shared", head) for share in params]
                  or by_sparsity for head in ("sliced", "tied")[:1 + tied]}  # of networks with one Q for all
    fused = copy.deepcopy(model)
    Q = slicegpt.shared_rotation(fused, calibration, **layerwise)  # of which each size takes the first columns
    learned = cache(lambda columns: slicegpt.learn_rotation(fused, calibration, Q[:, :columns], learn, seed=seed))

    def spread(d: int) -> Tensor:  # it changes nothing (Theorem 1), but weights of one size lose less when rounded
        return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, device=model.device)).Q

    sparse = copy.deepcopy(model)
    networks = [("dense", model, 0), ("SparseGPT 2:4", sparse, sparsegpt(sparse, calibration, **layerwise))]
    for sparsity in sparsities:
        network = slice_model(copy.deepcopy(model), calibration, sparsity, round_to=round_to, **layerwise)
        slicegpt.rotate(network, [spread(d) for d in network.config.slicegpt["dimensions"]])
        networks.append(("block", network, 0))
    for by_learning, head in itertools.product([False, True] if learn else [False], dimensions):
        for d in dimensions[head]:
            network = copy.deepcopy(model)
            columns = slicegpt.columns_to_keep(model.config, d, head)
            rotation = learned(columns) if by_learning else Q[:, :columns]  # cached: a tied head may ask once more
            slicegpt.rotate(network, rotation @ spread(columns))
            if head == "tied":
                slicegpt.tie_head(network, calibration)
            method = "shared" + ", learned" * by_learning + ", tied" * (head == "tied")
            networks.append((method, slicegpt.standard(network)[0], 0))
    return networks


@torch.no_grad()
def rounded(model, format: str) -> tuple:
    """(A copy of a model with its matrices as a format of llama.cpp keeps them, the share of the bytes that takes)."""
    gguf = slicegpt.optional("gguf")
    model = copy.deepcopy(model)
    with slicegpt.failing(f"cannot round the weights to {format}"):
        number = gguf.GGMLQuantizationType[format]
        weights_of_a_block, bytes_of_a_block = gguf.GGML_QUANT_SIZES[number]
        for W in model.parameters():
            if W.dim() > 1:
                stored = gguf.quants.quantize(W.float().cpu().numpy(), number)
                W.copy_(torch.from_numpy(gguf.quants.dequantize(stored, number)))
    return model, bytes_of_a_block / weights_of_a_block / W.itemsize  # as if norms were rounded, too


def quality(args, rows, sparsities=(0.1, 0.2, 0.3), params: float = (), round_to=8, learn=0, eval_also="",
            formats: str = ()):
    """Perplexity, parameters, bytes and time per token of every method at every size.

    block is the paper's; shared, one Q for all, learned by --learn steps; tied, with one matrix for embedding and head.
    --params: sizes of the shared ones, as shares of the dense parameters, not --sparsities. --eval-also: a second text.
    --formats: those of llama.cpp, such as Q8_0, that matrices are rounded to.
    """
    model, inputs, layerwise = read_model(args)
    widths = {W.shape[-1] for W in model.parameters() if W.dim() > 1} | {round_to}
    for format, width in itertools.product(formats, widths):
        rounded(nn.Embedding.from_pretrained(torch.zeros(1, width)), format)  # raises for rows that it cannot have
    texts = {"perplexity": inputs.evaluation}
    samples, seqlen = inputs.evaluation.shape
    if eval_also:
        text = slicegpt.read_text(eval_also, evaluation=True)
        texts[f"on {Path(eval_also).name}"] = slicegpt.tokenize(inputs.tokenizer, text, seqlen, samples)
    model.to(inputs.device)
    networks = by_every_method(model, inputs.calibration, layerwise, sparsities, params, round_to, learn, args.seed)
    prompt = torch.randint(model.config.vocab_size, (1, min(128, seqlen // 2)), device=inputs.device)
    rounds = max(1, min(50, seqlen // 2 - WARM_UP))  # behind the prompt, the model may have no positions for more
    seconds = in_turns([decoder(network, prompt) for _, network, _ in networks], rounds, inputs.device, "decoding")
    for (method, network, zeros), times in zip(networks, seconds):
        saved = zeros * (network.dtype.itemsize - 2 / 8)  # 2 bits for each weight that is kept say where it stands
        left = parameters(network) - zeros
        row = {"method": method, "dimension": network.get_input_embeddings().weight.shape[1], "parameters": left,
               "gigabytes": (weight_bytes(network) - saved) / 1e9, "share": left / parameters(model),
               "ms": 1e3 * times.quantile(0.5).item(), "time": (times / seconds[0]).quantile(0.5).item()}
        rows.append(row)  # already, so that it is shown if something ends the rest
        row |= {name: slicegpt.perplexity(network, text) for name, text in texts.items()}
        for format in formats if not zeros else ():
            stored, smaller = rounded(network, format)
            row[f"{format} GB/token"] = smaller * row["gigabytes"]
            row |= {f"{format} {name}": slicegpt.perplexity(stored, text) for name, text in texts.items()}
    draw(args, rows, "method", "parameters", "perplexity", y_scale="log")
    return (f"{inputs.device}, {model.dtype}; 2:4: weights that are not zero, bytes in a 2:4 format, the time of dense "
            "products; formats: sliced networks, but not the dense one, are turned at random before rounding")


@torch.no_grad()
def spectrum(args, rows):
    """Figure 8: eigenvalues of the FFN's inputs, for --json and --plot; printed: how many have so much of their sum."""
    model, inputs, layerwise = read_model(args)
    slicegpt.fuse(model)
    parts = slicegpt.architecture(model.config)
    norm = model.get_submodule(parts.norm)  # fused, all norms are alike
    for stage, X in slicegpt.signals(model, inputs.calibration, **layerwise):
        if stage is not None and parts.ffn in stage.blocks:
            eigenvalues = slicegpt.pca(slicegpt.covariance_of(X, norm, stage, **layerwise))[0].clamp_min(0).cpu()
            kept = {f"{share:.1%}": slicegpt.dimension_by_variance(eigenvalues, 1 - share, round_to=1)
                    for share in (0.9, 0.99, 0.999)}
            rows.append({"layer": str(stage.number), "eigenvalues": (eigenvalues / eigenvalues[0]).tolist()} | kept)
    points = [{"layer": row["layer"], "component": i, "eigenvalue / largest": value}
              for row in rows for i, value in enumerate(row["eigenvalues"]) if value > 1e-6]
    draw(args, points, "layer", "component", "eigenvalue / largest", y_scale="log")


# ---- The command line -----------------------------------------------------------------------------------------------
SPEED = (latency, throughput, ops, cost)
REAL = (table1, tasks, quality, spectrum)


def run(args):
    """Checks what needs no work, works, and shows the rows, even if something ends the work early."""
    for path in filter(None, (args.json, args.plot)):
        with slicegpt.failing(f"cannot write {path}"):
            open(path, "a").close()
            if path is args.plot:  # whose name must end as a picture's
                slicegpt.optional("matplotlib.figure").Figure().savefig(io.BytesIO(), format=path.suffix[1:])
    if args.command in SPEED:
        args.device = slicegpt.find_device(args.device)
        args.dtype = getattr(torch, args.dtype or ("float32" if args.device.type == "cpu" else "float16"))
    torch.manual_seed(0)
    rows = []
    note = "measured before it ended"
    try:
        note = args.command(args, rows, **{name: getattr(args, name) for name in args.options})
    finally:
        if rows:
            show(args, note, rows)


def main(argv=None) -> int:
    """The exit code, see `slicegpt.exit_code`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", help="each has its --help")
    for command in SPEED + REAL:
        subparser = commands.add_parser(command.__name__, description=command.__doc__, allow_abbrev=False)
        add = subparser.add_argument
        _, _, *options = inspect.signature(command).parameters.values()  # behind args and rows
        subparser.set_defaults(command=command, options=[option.name for option in options], plot=None)
        if command in REAL:
            slicegpt.add_inputs(add)
        else:
            add("--device", help="default: cuda if there is one, else cpu")
            add("--dtype", choices=["float64", "float32", "float16", "bfloat16"], help="float32 on a CPU, else float16")
        for option in options:  # of its default's type, or, if that is empty, as annotated
            default, several = option.default, isinstance(option.default, tuple)
            kind = option.annotation if default == () else type(default[0] if several else default)
            least = 1 if kind is int and default and option.name != "finetune" else 0
            how = {"action": "store_true"} if kind is bool else {
                "type": kind if kind is str else slicegpt.bounded(kind, least), "nargs": "+" if several else None,
                "choices": SHAPES if "shape" in option.name else None}
            add("--" + option.name.replace("_", "-"), default=default, help=f"default: {default}", **how)
        add("--json", type=Path, metavar="FILE", help="write the figures here")
        if command not in (ops, tasks):
            add("--plot", type=Path, metavar="FILE.png", help="draw them here (needs matplotlib)")
    args = parser.parse_args(argv or sys.argv[1:] or ["latency"])
    return slicegpt.exit_code("bench", lambda: run(args))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as batch systems end a program: it still shows its rows
    sys.exit(main())
