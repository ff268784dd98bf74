"""How fast a sliced network is, what slicing costs, and how good the result is.

The first two need no real weights: speed does not depend on the weights' values, so networks of published shapes get
random ones and nothing is downloaded. Networks take turns within one run, after a warm-up, with the device synchronised
around every measurement; printed are medians and spreads.

    python bench.py latency --shape opt-1.3b     # Table 2: the time of one generated token
    python bench.py cost --shape opt-125m        # Table 3: the time of slicing, beside a forward pass

The others take a real model, and slicegpt.py's options for it and for the texts:

    python bench.py quality --plot quality.png   # perplexity against parameters and time, for all ways to slice
    python bench.py spectrum --plot spectrum.png # Figure 8: how few directions the signal needs
"""
import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import slicegpt
from slicegpt import SlicedForCausalLM, parameters, progress, slice_model, sliced_dimension


def opt(D, layers, heads):
    return "opt", {"hidden_size": D, "word_embed_proj_dim": D, "ffn_dim": 4 * D, "num_hidden_layers": layers,
                   "num_attention_heads": heads, "vocab_size": 50272, "max_position_embeddings": 2048}


def llama(D, layers, heads, groups, ffn, vocabulary=32000, tied=False):
    return "llama", {"hidden_size": D, "num_hidden_layers": layers, "num_attention_heads": heads,
                     "num_key_value_heads": groups, "intermediate_size": ffn, "vocab_size": vocabulary,
                     "tie_word_embeddings": tied, "max_position_embeddings": 4096}


SHAPES = {
    "opt-125m": opt(768, 12, 12), "opt-1.3b": opt(2048, 24, 32), "opt-2.7b": opt(2560, 32, 32),
    "opt-6.7b": opt(4096, 32, 32), "opt-13b": opt(5120, 40, 40), "opt-30b": opt(7168, 48, 56),
    "opt-66b": opt(9216, 64, 72),
    "smollm2-135m": llama(576, 30, 9, 3, 1536, 49152, tied=True),
    "llama-2-7b": llama(4096, 32, 32, 32, 11008), "llama-2-13b": llama(5120, 40, 40, 40, 13824),
    "llama-2-70b": llama(8192, 80, 64, 8, 28672),
}


def build(shape: str, sparsity: float | None, layers: int, dtype, device):
    """A network of a published shape with random weights; sliced if there is a sparsity."""
    family, options = SHAPES[shape]
    config = AutoConfig.for_model(family, **options | {"num_hidden_layers": layers})
    with torch.device(device):
        if sparsity is None:
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        d = sliced_dimension(config.hidden_size, sparsity)
        config.slicegpt = {"dimensions": [d] * (2 * layers + 1), "shortcuts": True}
        return SlicedForCausalLM._from_config(config, dtype=dtype).eval()


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def weight_bytes(model) -> int:
    """What one token must read: all weights but the embedding, of which it needs a row (a tied head is read)."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(weight.nbytes for weight in model.parameters()) - (0 if embedding is head else embedding.nbytes)


def quantiles(seconds) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    return tuple(torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.1, 0.9]).double()).tolist())


@torch.no_grad()
def decode_seconds(models: list, batch_size: int, prompt_length: int, tokens: int, device) -> list[list[float]]:
    """The time of every token that each model decodes with its KV cache, after a prompt; the models take turns."""
    prompt = torch.randint(models[0].config.vocab_size, (batch_size, prompt_length), device=device)
    caches = [model(prompt, use_cache=True, logits_to_keep=1).cache for model in models]
    seconds, warm_up = [[] for _ in models], 4
    for step in progress(range(tokens + warm_up), "decoding", unit="token"):
        for i, model in enumerate(models):
            synchronise(device)
            start = time.perf_counter()
            model(prompt[:, :1], cache=caches[i], use_cache=True)
            synchronise(device)
            if step >= warm_up:
                seconds[i].append(time.perf_counter() - start)
    return seconds


def latency(args):
    """Table 2: the time of one token, and the bandwidth that reading the weights in that time amounts to.

    A network of which only some layers are asked for is measured at that depth and at half of it; the difference is the
    time of the layers, by which the time at full depth is extrapolated.
    """
    depth = SHAPES[args.shape][1]["num_hidden_layers"]
    depths = [args.layers, args.layers // 2] if args.layers and args.layers < depth else [depth]
    models = [build(args.shape, sparsity, layers, args.dtype, args.device)
              for sparsity in (None, args.sparsity) for layers in depths]
    times = decode_seconds(models, args.batch_size, args.prompt_length, args.tokens, args.device)
    sizes = [weight_bytes(model) for model in models]
    if len(depths) == 2:
        a, b = depths

        def full_depth(at_a, at_b):
            return at_a + (at_a - at_b) * (depth - a) / (a - b)

        times = [[full_depth(x, y) for x, y in zip(times[i], times[i + 1])] for i in (0, 2)]
        sizes = [full_depth(sizes[i], sizes[i + 1]) for i in (0, 2)]
        print(f"extrapolated to {depth} layers from {a} and {b}")
    dense = quantiles(times[0])[0]
    ratio = quantiles([sliced / dense for dense, sliced in zip(*times)])
    print(f"{args.shape}, {args.dtype}, {args.device}: one token, batch {args.batch_size}, after {args.prompt_length} "
          f"tokens, {args.tokens} times")
    print(f"{'':14}{'ms/token':>10}{'p10':>10}{'p90':>10}{'GB/token':>10}{'GB/s':>10}{'time':>8}{'bytes':>8}")
    for name, seconds, size in zip(("dense", f"sliced {args.sparsity:.0%}"), times, sizes):
        median, p10, p90 = quantiles(seconds)
        print(f"{name:14}{1e3 * median:10.2f}{1e3 * p10:10.2f}{1e3 * p90:10.2f}{size / 1e9:10.3f}"
              f"{size / median / 1e9:10.1f}{median / dense:8.2f}{size / sizes[0]:8.2f}")
    print(f"sliced / dense, token by token: {ratio[0]:.2f} (p10 {ratio[1]:.2f}, p90 {ratio[2]:.2f})")


@torch.no_grad()
def cost(args):
    """Table 3: the time of slicing beside one dense forward pass over the same tokens, in turns.

    The pass is timed both with the head, which computes logits, and without it, since slicing does not need the head.
    """
    model = build(args.shape, None, args.layers or SHAPES[args.shape][1]["num_hidden_layers"], args.dtype, args.device)
    tokens = torch.randint(10, 1000, (args.samples, args.seqlen))
    times = {"dense forward pass": [], "the same without the head": [], "slicing": []}

    def forward(network, **options):
        for batch in tokens.split(args.batch_size):
            network(batch.to(args.device), use_cache=False, **options)

    for _ in progress(range(args.repeat + 1), "rounds", unit="round"):
        victim = copy.deepcopy(model)
        for name, work in zip(times, (
                lambda: forward(model), lambda: forward(model.base_model),
                lambda: slice_model(victim, tokens, args.sparsity, batch_size=args.batch_size))):
            synchronise(args.device)
            start = time.perf_counter()
            work()
            synchronise(args.device)
            times[name].append(time.perf_counter() - start)
    print(f"{args.shape} ({parameters(model) / 1e6:.0f}M), {args.dtype}, {args.device}: {args.samples} x {args.seqlen} "
          f"tokens, sparsity {args.sparsity:.0%}, {args.repeat} rounds after a warm-up")
    print(f"{'':28}{'seconds':>10}{'p10':>10}{'p90':>10}{'ratio':>8}")
    for name, seconds in times.items():
        ratio = quantiles([second / first for first, second in zip(times["dense forward pass"][1:], seconds[1:])])[0]
        print(f"{name:28}" + "".join(f"{value:10.2f}" for value in quantiles(seconds[1:])) + f"{ratio:8.2f}")


METHODS = {  # as options of slicegpt.py
    "block": [], "block, refit": ["--refit"],
    "shared": ["--rotation", "shared"], "shared, refit": ["--rotation", "shared", "--refit"],
    "shared, refit, tied": ["--rotation", "shared", "--refit", "--head", "tied"],
}


def quality(args, options):
    """Perplexity, parameters and token latency of every method at every sparsity, from one run on one model."""
    setting = slicegpt.parse_arguments(options)
    model, tokenizer, evaluation, device = slicegpt.prepare(setting)
    calibration = slicegpt.calibration_tokens(setting, tokenizer)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    rows, models = [("dense", 0.0)], [model.to(device).eval()]
    for method, flags in METHODS.items():
        for sparsity in args.sparsities if tied or "tied" not in flags else []:
            sliced = slicegpt.parse_arguments([*options, *flags, "--sparsity", str(sparsity)])
            slicegpt.choose_size(sliced, model)
            rows.append((method, sparsity))
            models.append(slicegpt.slice_as_asked(sliced, copy.deepcopy(model), calibration, device)[0])
    table = []
    seconds = decode_seconds(models, 1, min(128, setting.seqlen // 2), min(50, setting.seqlen // 2 - 4), device)
    print(f"{setting.model}: {len(evaluation)} x {setting.seqlen} tokens of {setting.eval}, calibrated on "
          f"{len(calibration)} x {setting.seqlen} of {setting.calibration}; one token on {device}, batch 1")
    print(f"{'':22}{'sparsity':>9}{'parameters':>15}{'share':>8}{'perplexity':>12}{'ms/token':>10}{'time':>7}")
    for (method, sparsity), network, times in zip(rows, models, seconds):
        table.append({"method": method, "sparsity": sparsity, "parameters": parameters(network),
                      "perplexity": slicegpt.perplexity(network, evaluation), "seconds": quantiles(times)[0],
                      "time": quantiles([s / d for s, d in zip(times, seconds[0])])[0]})
        row = table[-1]
        print(f"{method:22}{sparsity:>9.0%}{row['parameters']:>15,}{row['parameters'] / parameters(model):>8.2f}"
              f"{row['perplexity']:>12.2f}{1e3 * row['seconds']:>10.2f}{row['time']:>7.2f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(table, indent=2) + "\n")
    if args.plot:
        pyplot = slicegpt.optional("matplotlib.pyplot")
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
        for axis, key, label in zip(axes, ("parameters", "time"), ("parameters", "time per token (dense: 1)")):
            for method in dict.fromkeys(name for name, _ in rows):
                points = sorted((row[key], row["perplexity"]) for row in table if row["method"] == method)
                axis.plot(*zip(*points), marker="o", label=method)
            axis.set(xlabel=label, yscale="log")
            axis.grid(True, which="both", alpha=0.3)
        axes[0].set_ylabel("perplexity")
        axes[0].legend()
        figure.tight_layout()
        figure.savefig(args.plot)


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
    print(f"{setting.model}, inputs of the FFN, {len(calibration)} x {setting.seqlen} tokens of {setting.calibration}: "
          f"of {model.config.hidden_size} dimensions, how many have that share of the variance")
    shares = (0.9, 0.99, 0.999)
    print(f"{'layer':>5}" + "".join(f"{share:>9.1%}" for share in shares))
    for number, eigenvalues in enumerate(lines):
        left = eigenvalues.cumsum(0) / eigenvalues.sum()
        print(f"{number:>5}" + "".join(f"{1 + int((left < share).sum()):>9}" for share in shares))
    if args.json:
        args.json.write_text(json.dumps([(line / line[0]).tolist() for line in lines]) + "\n")
    if args.plot:
        pyplot = slicegpt.optional("matplotlib.pyplot")
        figure, axis = pyplot.subplots(figsize=(7, 4.5))
        for number, line in enumerate(lines):
            axis.semilogy(line / line[0], color=pyplot.cm.viridis(number / max(1, len(lines) - 1)), linewidth=0.8)
        axis.set(xlabel="principal component", ylabel="eigenvalue / largest", ylim=(1e-6, 1.5),
                 title="inputs of the FFN, first layer dark, last layer bright")
        figure.tight_layout()
        figure.savefig(args.plot)


def real_model(command, argv):
    """`quality` and `spectrum`: what is not an option here is one of slicegpt.py."""
    parser = argparse.ArgumentParser(f"bench.py {command}", epilog="All other options are slicegpt.py's.")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.1, 0.2, 0.3], help="of quality")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it (needs matplotlib)")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write the figures here")
    args, options = parser.parse_known_args(argv)
    if args.plot:
        slicegpt.optional("matplotlib").use("Agg")
    torch.manual_seed(0)
    {"quality": quality, "spectrum": spectrum}[command](args, options)


def main():
    if sys.argv[1:2] in (["quality"], ["spectrum"]):
        return real_model(sys.argv[1], sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", nargs="?", choices=["latency", "cost", "quality", "spectrum"], default="latency")
    add("--shape", choices=SHAPES, default="opt-125m")
    add("--sparsity", type=float, default=0.25)
    add("--layers", type=int, help="latency: measure this many layers and extrapolate; cost: build this many")
    add("--batch-size", type=int, default=None, help="default: 1 for latency, 8 for cost")
    add("--prompt-length", type=int, default=128)
    add("--tokens", type=int, default=50, help="tokens to decode")
    add("--samples", type=int, default=32, help="sequences to slice with")
    add("--seqlen", type=int, default=512)
    add("--repeat", type=int, default=3, help="rounds of cost")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", type=lambda name: getattr(torch, name), default=None, help="default: float32 on a CPU, else float16")
    args = parser.parse_args()
    args.dtype = args.dtype or (torch.float32 if args.device.type == "cpu" else torch.float16)
    args.batch_size = args.batch_size or (1 if args.command == "latency" else 8)
    torch.manual_seed(0)
    {"latency": latency, "cost": cost}[args.command](args)


if __name__ == "__main__":
    main()
