"""Measures what the paper says of speed, cost and quality (section 4, A.4, A.6, A.7).

    python bench.py latency --shape opt-1.3b      # Table 2: the time of one generated token
    python bench.py throughput --shape opt-125m   # A.6: tokens per second, in batches as large as pays
    python bench.py ops --shape opt-6.7b          # A.7: the time of the product with each matrix of a layer
    python bench.py cost                          # Table 3: the time and memory of slicing, and of RFT (needs peft)
    python bench.py table1 --models DIR DIR       # Table 1: perplexity: dense, SparseGPT 2:4, SliceGPT
    python bench.py tasks --model DIR             # Figure 5: zero-shot accuracy (needs lm_eval)
    python bench.py spectrum --plot spectrum.png  # Figure 8: how few directions the signal needs
    python bench.py quality --params 0.9          # beyond the paper: perplexity, size and time of every way to slice

The first four need no model: networks of published shapes get random weights, as speed does not depend on these. The
others take a model and texts, by the options of slicegpt.py. Networks are

    dense   not sliced
    block   sliced with a Q for each block, which needs shortcuts: the paper's method
    shared  sliced with one Q for all blocks, which needs none: beyond the paper

Each command is a function that yields the rows of a table. A row is printed, and written to the file of --json, as soon
as it is measured; "-" means that there is no such figure. All runs without gradients, but for what trains.
"""
import argparse
import contextlib
import copy
import gc
import itertools
import json
import sys
import time
from functools import cache, partial
from pathlib import Path

import torch
import transformers
from torch import Tensor

import slicegpt
from slicegpt import SliceGPTError, dimension_for, parameters, slice_model, sliced_dimension, stages


# ---- Networks of published shapes, with random weights --------------------------------------------------------------
def opt(width, layers, heads):
    return "opt", dict(hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_hidden_layers=layers,
                       num_attention_heads=heads, vocab_size=50272, max_position_embeddings=2048)


def llama_like(width, layers, heads, kv_heads, ffn, vocabulary=32000, family="llama", **more):
    return family, dict(hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
                        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=4096, **more)


SHAPES = {  # name: Hugging Face's model_type, and options of its config
    "opt-125m": opt(768, 12, 12), "opt-350m-like": opt(1024, 24, 16),  # the real one has norms after its blocks
    "opt-1.3b": opt(2048, 24, 32), "opt-2.7b": opt(2560, 32, 32), "opt-6.7b": opt(4096, 32, 32),
    "opt-13b": opt(5120, 40, 40), "opt-30b": opt(7168, 48, 56), "opt-66b": opt(9216, 64, 72),
    "smollm2-135m": llama_like(576, 30, 9, 3, 1536, 49152, tie_word_embeddings=True),
    "llama-2-7b": llama_like(4096, 32, 32, 32, 11008), "llama-2-13b": llama_like(5120, 40, 40, 40, 13824),
    "llama-2-70b": llama_like(8192, 80, 64, 8, 28672),
    "mixtral-8x7b": llama_like(4096, 32, 32, 8, 14336, family="mixtral", num_local_experts=8, num_experts_per_tok=2)}


def build(shape: str, layers: int, dtype, device, sparsity: float | None = None, shared: bool = False):
    """A network of a published shape, with so many layers (0: all): dense; or block or shared, of this sparsity."""
    family, options = SHAPES[shape]
    config = transformers.AutoConfig.for_model(family, **options | ({"num_hidden_layers": layers} if layers else {}))
    gc.collect()  # an earlier network that was sliced is a cycle: its layers hold their stages, and these the layers
    with torch.device(device):
        if sparsity is None:
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        d = sliced_dimension(config.hidden_size, sparsity)  # of the first signal, and after each attention and FFN
        config.slicegpt = {"dimensions": [d] * (1 + 2 * config.num_hidden_layers), "shortcuts": not shared}
        kind = slicegpt.sliced_class(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
        return slicegpt.standard(kind._from_config(config, dtype=dtype))[0].eval()  # Hugging Face's class, if possible


# ---- Speed ----------------------------------------------------------------------------------------------------------
WARM_UP = 4  # rounds that do not count


def latency(args):
    """Table 2: the time to decode one token after a prompt, in ms: median, 10th and 90th percentile of --tokens rounds.

    time/dense: that time divided by the dense network's in the same round (median). GB/token: the weights that a token
    reads. (It also reads the keys and values of all earlier tokens, which are not counted.) GB/dense: divided by the
    dense network's. bandwidth/copy: GB/token a second, divided by the speed at which memory is copied. Where this is
    near 1, only fewer bytes can make a token faster (gpt-fast's roofline). With --batch-size, a token is one of each
    sequence. Without --compile, small networks and batches on a GPU measure how fast Python launches kernels.
    """
    how = args.shape, args.layers, args.dtype, args.device
    models = {"dense": build(*how), f"block {args.sparsity:.0%}": build(*how, args.sparsity),
              f"shared {args.sparsity:.0%}": build(*how, args.sparsity, shared=True)}
    sizes = [bytes_read(model, args.batch_size) for model in models.values()]
    source, target = torch.ones(2, 2**28 if args.device.type == "cuda" else 2**25, device=args.device)  # beyond caches
    for length in args.prompt_lengths:
        torch.compiler.reset()  # torch compiles a function for a few shapes only, and then refuses
        prompt = torch.randint(10, 1000, (args.batch_size, length), device=args.device)
        works = [decoder(model, prompt, args.compile, WARM_UP + args.tokens) for model in models.values()]
        *seconds, copying = in_turns(works + [lambda: target.copy_(source)], args.tokens, args.device, "decoding")
        bandwidth = 2 * source.nbytes / copying.quantile(0.5).item()  # a copy reads, and writes
        for name, size, times in zip(models, sizes, seconds, strict=True):
            ms, p10, p90 = (1e3 * times).quantile(torch.tensor([0.5, 0.1, 0.9]).double()).tolist()
            yield {"network": name, "prompt": length, "ms/token": ms, "p10": p10, "p90": p90,
                   "time/dense": (times / seconds[0]).quantile(0.5).item(), "GB/token": size / 1e9,
                   "GB/dense": size / sizes[0], "bandwidth/copy": size / (ms / 1e3) / bandwidth}


def decoder(model, prompt: Tensor, compiled: bool = False, calls: int = 0):
    """A function that decodes one more token after a prompt (B, N) at each call; if compiled, for so many calls."""
    token = prompt[:, :1].clone()  # which one it is makes no difference to the time
    if not compiled:
        past = model(prompt, use_cache=True, logits_to_keep=1).cache
        return lambda: model(token, cache=past, use_cache=True)
    length = prompt.shape[1] + calls
    past = transformers.StaticCache(model.config, max_cache_len=length)
    model(prompt, cache=past, use_cache=True, logits_to_keep=1)
    # all steps have the same shapes, so on a GPU they are one CUDA graph, and Python launches no kernels one by one
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
    position = torch.full((len(prompt), 1), prompt.shape[1] - 1, device=prompt.device)
    mask = torch.ones(len(prompt), length, dtype=torch.int64, device=prompt.device)
    # the position grows in place, as a graph reads it from where it was when the graph was recorded
    return lambda: step(token, attention_mask=mask, position_ids=position.add_(1), cache=past, use_cache=True)


def in_turns(works: list, rounds: int, device, label: str, calls: int = 1) -> Tensor:
    """Seconds (works, rounds) of a call. A round runs all works, in random order: what disturbs falls on all alike."""
    seconds = torch.zeros(len(works), WARM_UP + rounds, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)  # its own, so that measuring time changes no other random number
    for number in slicegpt.progress(range(WARM_UP + rounds), label, unit="round"):
        for index in torch.randperm(len(works), generator=generator).tolist():
            seconds[index, number] = seconds_of(works[index], device, calls)
    return seconds[:, WARM_UP:]


def seconds_of(work, device, calls: int = 1) -> float:
    synchronize = partial(torch.get_device_module(device).synchronize, device)  # a GPU works on after a call returns
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize()
    return (time.perf_counter() - start) / calls


def bytes_read(model, batch_size: int = 1) -> int:
    """The weights that a token of each sequence reads: all but idle experts, and an embedding that is not the head."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    idle = 0 if head is embedding else embedding.nbytes
    for module in [module for stage in stages(model) for module in stage.readers + stage.writers]:
        if isinstance(module, slicegpt.Expert):  # of_all[0] has all of the layer; tokens choose some, say at random
            chosen_by_one = model.config.num_experts_per_tok / len(module.of_all[0])
            idle += module.weight.nbytes * (1 - chosen_by_one) ** batch_size
    return round(sum(weight.nbytes for weight in model.parameters()) - idle)


def throughput(args):
    """A.6: tokens per second in the middle of sequences of --seqlen, where a token attends to the average number.

    Batches of 1, 2, 4, ... until the speed drops, memory runs out (in the middle: "-"), or --max-batch-size.
    """
    prompt_length = max(1, (args.seqlen - args.tokens) // 2 - WARM_UP)
    best_dense = None
    for sparsity in (None, *args.sparsities):  # and not in turns, so that each network has the memory to itself
        model, best = build(args.shape, args.layers, args.dtype, args.device, sparsity), 0
        for batch in [2**power for power in range(args.max_batch_size.bit_length())]:
            prompt = torch.randint(10, 1000, (batch, prompt_length), device=args.device)
            speed = None
            with contextlib.suppress(torch.OutOfMemoryError):
                seconds = in_turns([decoder(model, prompt)], args.tokens, args.device, "decoding")
                speed = batch / seconds.quantile(0.5).item()
            yield {"network": "dense" if sparsity is None else f"block {sparsity:.0%}", "batch": batch,
                   "tokens/s": speed, "of best dense": speed / best_dense if speed and best_dense else None}
            if speed is None or speed < best:
                break
            best = speed
        best_dense = best if sparsity is None else best_dense
        del model  # before the next is built


def ops(args):
    """A.7: ms of the product with each matrix of a layer: dense, sliced, and 2:4 sparse ("-": torch has none here).

    A sliced layer also multiplies by its shortcuts. Fewer than 64 tokens are multiplied 20 times in a row, as waiting
    for a GPU takes time. Small layers measure how fast Python launches, and their weights may stay in a cache.
    """
    dense, sliced = (build(args.shape, 1, args.dtype, args.device, sparsity) for sparsity in (None, args.sparsity))
    if "experts" in slicegpt.architecture(dense.config).ffn.W_in:
        raise SliceGPTError("the products of experts are not measured here")

    def row_of(operation, tokens, ms):
        row = {"operation": operation, "tokens": tokens} | {kind: ms.get(kind) for kind in ("dense", "sliced", "2:4")}
        for kind in ("sliced", "2:4"):
            row[f"{kind}/dense"] = ms[kind] / ms["dense"] if kind in ms and "dense" in ms else None
        return row

    for tokens in args.batch_sizes:
        calls, measured = 20 if tokens < 64 else 1, []
        for operation, works in products(dense, sliced, tokens):
            seconds = in_turns(list(works.values()), args.repeat, args.device, operation, calls).quantile(0.5, dim=1)
            measured.append(dict(zip(works, (1e3 * seconds).tolist())))
            yield row_of(operation, tokens, measured[-1])
        whole = [kind for kind in measured[0] if all(kind in ms for ms in measured if "dense" in ms)]
        yield row_of("all", tokens, {kind: sum(ms.get(kind, 0) for ms in measured) for kind in whole})


def products(dense, sliced, tokens: int):
    """(name, {kind: a function that computes it}) of the product of tokens with each matrix of the first layer."""
    random = partial(torch.randn, dtype=dense.dtype, device=dense.device)
    for before, after in zip(stages(dense), stages(sliced)):
        for path in [path for block in before.blocks for path in f"{block.W_in} {block.W_out}".split()]:
            wide, narrow = before.layer.get_submodule(path), after.layer.get_submodule(path)
            X = random(tokens, wide.in_features)
            works = {"dense": partial(wide, X), "sliced": partial(narrow, random(tokens, narrow.in_features))}
            try:
                mask = torch.tensor([0, 0, 1, 1]).repeat(wide.in_features // 4).to(wide.weight)
                W = torch.sparse.to_sparse_semi_structured(wide.weight * mask)
                torch.nn.functional.linear(X, W, wide.bias)
                works["2:4"] = partial(torch.nn.functional.linear, X, W, wide.bias)
            except RuntimeError as error:  # torch has it on some devices, for some types
                if isinstance(error, torch.OutOfMemoryError):
                    raise
            yield path, works
        yield after.shortcut_name, {"sliced": partial(random(tokens, len(after.shortcut)).matmul, after.shortcut)}


def cost(args):
    """Table 3: seconds, and GB of memory at the peak, of slicing, and of RFT on --finetune sequences (0: no RFT).

    forward: one pass of the same tokens through the dense network. All is done twice, and measured the second time.
    """
    def forward(model, tokens):
        for batch in tokens.split(args.batch_size):
            model(batch.to(args.device), use_cache=False)

    if args.finetune:
        slicegpt.optional("peft")  # raises now, rather than after slicing
    for shape, samples in itertools.product(args.shapes, args.samples):
        tokens, tokens_of_rft = (torch.randint(10, 1000, (number, args.seqlen)) for number in (samples, args.finetune))
        row = {"shape": shape, "samples": samples, "tokens": tokens.numel()}
        for _ in ("warm up", "measure"):
            model = works = work = None  # lets go of the network before, whose memory would count
            model = build(shape, args.layers, args.dtype, args.device)
            works = {"forward": partial(forward, model, tokens),
                     "slicing": partial(slice_model, model, tokens, args.sparsity, batch_size=args.batch_size)}
            if args.finetune:  # of the sliced model
                works["RFT"] = partial(torch.enable_grad()(slicegpt.finetune), model, tokens_of_rft)
            for name, work in works.items():
                if args.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(args.device)
                with contextlib.suppress(OSError):  # Linux only; elsewhere a process's peak is that since its beginning
                    Path("/proc/self/clear_refs").write_text("5")
                row[f"{name} s"] = seconds_of(work, args.device)
                row[f"{name} GB"] = slicegpt.peak_memory(args.device) / 1e9
        yield row | {"slicing/forward": row["slicing s"] / row["forward s"]}


# ---- Quality --------------------------------------------------------------------------------------------------------
def read_model(args, sliced_too: bool = False) -> tuple:
    """(model, slicegpt.Inputs, where: batch_size and device for all that calibrates); completes args' device, dtype."""
    inputs = slicegpt.read_inputs(args)
    if inputs.calibration is None and not sliced_too:
        raise SliceGPTError(f"{args.model} is sliced already")
    model = torch.enable_grad()(slicegpt.load)(args.model, inputs.dtype)[0].eval()  # as "demo" is trained on the spot
    if inputs.calibration is not None:
        inputs.calibration = slicegpt.with_own_text(args, inputs, inputs.calibration, args.samples, model)
    args.device, args.dtype = inputs.device, str(model.dtype).removeprefix("torch.")
    return model, inputs, {"batch_size": args.batch_size, "device": inputs.device}


TABLE_1 = {  # the paper's perplexities: dense, SparseGPT 2:4, SliceGPT 10%, 20%, 25%, 30%
    "opt-125m": (27.64, 45.07, 29.34, 34.26, 37.74, 43.98), "opt-1.3b": (14.61, 29.61, 15.10, 16.43, 17.46, 19.09),
    "opt-2.7b": (12.46, 14.90, 12.75, 13.73, 14.56, 15.83), "opt-6.7b": (10.85, 13.00, 10.92, 11.48, 11.90, 12.51),
    "opt-13b": (10.12, 11.80, 10.27, 10.66, 10.94, 11.33), "opt-30b": (9.56, 10.53, 9.65, 9.87, 10.04, 10.27),
    "opt-66b": (9.33, 10.22, 9.43, 9.57, 9.68, 9.85), "llama-2-7b": (5.47, 8.69, 5.89, 6.64, 7.24, 8.12),
    "llama-2-13b": (4.88, 7.07, 5.21, 5.81, 6.30, 6.99), "llama-2-70b": (3.32, 4.98, 3.69, 4.25, 4.60, 5.05)}


def table1(args):
    """Table 1: perplexity of --models (or --model), known by the names of their directories; beside it the paper's.

    The paper's figure is shown only beside its settings: --samples 1024, sequences of 2048, other defaults (with the
    head sliced, as in its text). In --json, the options are those of the last model.
    """
    methods = {"dense": (0, None), "SparseGPT 2:4": (None, sparsegpt)} | {  # in the order of TABLE_1
        f"SliceGPT {share:.0%}": (share, partial(slice_model, sparsity=share)) for share in (0.1, 0.2, 0.25, 0.3)}
    given = {**vars(args)}
    for name in args.models or [args.model]:
        vars(args).update(given, model=name)  # the other defaults, which are filled in now, depend on the model
        model, inputs, where = read_model(args)
        settings = (args.calibration, args.samples, args.eval, args.eval_samples, args.seqlen)
        as_in_paper = settings == (["wikitext2"], 1024, ["wikitext2"], None, 2048)
        published = TABLE_1.get(Path(name).name.lower().removesuffix("-hf")) if as_in_paper else None
        for (method, (sparsity, compress)), paper in zip(methods.items(), published or itertools.repeat(None)):
            network = copy.deepcopy(model)
            if compress:
                compress(network, inputs.calibration, **where)
            with slicegpt.placed(network, inputs.device):
                found = slicegpt.perplexities(network, inputs)
            yield {"model": name, "method": method, "sparsity": sparsity} | found | {"paper": paper}


def tasks(args):
    """Figure 5: zero-shot accuracy (LM Evaluation Harness) of a model and of its slice, or of one sliced already.

    Normalised by the answers' length (acc_norm) where a task has that, as in the authors' code. A group is its tasks.
    """
    manager = slicegpt.optional("lm_eval.tasks").TaskManager(include_path=args.tasks_path)
    model, inputs, where = read_model(args, sliced_too=True)
    for network in ["sliced"] if inputs.calibration is None else ["dense", "sliced"]:
        if network == "sliced" and inputs.calibration is not None:
            slice_model(model, inputs.calibration, args.sparsity, **where)
        with slicegpt.placed(model, inputs.device), slicegpt.failing(f"cannot run the tasks {args.tasks}"):
            lm = slicegpt.optional("lm_eval.models.huggingface").HFLM(model, tokenizer=inputs.tokenizer)
            found = slicegpt.optional("lm_eval").simple_evaluate(
                lm, tasks=args.tasks.replace(",", " ").split(), task_manager=manager, limit=args.limit or None)
        accuracies = []
        for name, result in found["results"].items():
            if found["group_subtasks"].get(name):
                continue  # a group has a result, too
            metric = "acc_norm" if "acc_norm,none" in result else "acc"
            accuracies.append(result.get(f"{metric},none", float("nan")))  # some tasks have no accuracy
            yield {"network": network, "task": name, "metric": metric, "accuracy": accuracies[-1],
                   "standard error": result.get(f"{metric}_stderr,none")}
        yield {"network": network, "task": "average", "accuracy": sum(accuracies) / len(accuracies)}


def spectrum(args):
    """Figure 8: the eigenvalues of what each FFN reads, divided by the largest; they are in --json and --plot.

    Printed: how many of the directions have 90%, 99% and 99.9% of the variance.
    """
    model, inputs, where = read_model(args)
    slicegpt.fuse(model)
    parts = slicegpt.architecture(model.config)
    norm = model.get_submodule(parts.norm)  # all are alike: fused, their scales are in the matrices
    for stage, X in slicegpt.signals(model, inputs.calibration, **where):
        if stage is not None and parts.ffn in stage.blocks:  # the stage that reads X; None is the head
            eigenvalues = slicegpt.pca(slicegpt.covariance_of(X, norm, stage, **where))[0].clamp_min(0).cpu()
            kept = {f"{share:.1%}": slicegpt.dimension_by_variance(eigenvalues, 1 - share, round_to=1)
                    for share in (0.9, 0.99, 0.999)}
            yield {"layer": stage.number} | kept | {"eigenvalues": (eigenvalues / eigenvalues[0]).tolist()}


def draw_spectrum(rows: list[dict], figure):
    """Figure 8: the eigenvalues on a log scale, a line for each layer, from dark to light."""
    panel = figure.subplots()
    for row in rows:
        panel.plot(row["eigenvalues"], color=(0, row["layer"] / len(rows), 0.5), label=f"layer {row['layer']}")
    panel.set(xlabel="direction", ylabel="eigenvalue / the largest", yscale="log", ylim=(1e-6, 2))  # less is rounding
    panel.legend(fontsize="x-small", ncols=1 + len(rows) // 12)


def quality(args):
    """Beyond the paper: perplexity, size and time of every method at every size.

    SparseGPT 2:4  parameters are what is not zero, bytes those of a 2:4 format, the time that of dense products
    block          a network for each of --sparsities
    shared         one for each of --params, or of --sparsities if there are no --params
    .., learned    its Q is improved by --learn steps of descent
    .., tied       embedding and head stay one matrix, if they were one; or else the head is "sliced"
    Q8_0 ..        with weights rounded to one of --formats, which are llama.cpp's; most of them need --round-to 32
    """
    model, inputs, where = read_model(args)
    lengths = {args.round_to} | {W.shape[-1] for W in model.parameters() if W.dim() > 1}  # of rows, sliced and dense
    for name, length in itertools.product(args.formats, lengths):
        rounded(torch.zeros(1, length), name)  # raises, before the work, for a length that the format cannot have
    model.to(inputs.device)
    prompt = inputs.evaluation["perplexity"][:1, :min(128, args.seqlen // 2)].to(inputs.device)
    rounds = max(1, min(50, args.seqlen // 2 - WARM_UP))  # after the prompt, the model may have no positions for more
    for method, network, zeros in networks_to_compare(args, model, inputs.calibration, where):
        gc.collect()  # frees the network before the last one, see `build`
        works = [decoder(each, prompt) for each in ([model] if network is model else [model, network])]
        seconds = in_turns(works, rounds, inputs.device, "decoding")
        left = parameters(network) - zeros
        saved = zeros * (network.dtype.itemsize - 2 / 8)  # as many are kept, and 2 bits for each say where it stands
        row = {"method": method, "dimension": network.get_input_embeddings().weight.shape[1], "parameters": left,
               "parameters/dense": left / parameters(model), "GB/token": (bytes_read(network) - saved) / 1e9,
               "ms/token": 1e3 * seconds[-1].quantile(0.5).item(),
               "time/dense": (seconds[-1] / seconds[0]).quantile(0.5).item()}
        row |= slicegpt.perplexities(network, inputs)
        if not zeros:
            for name in args.formats:
                stored = copy.deepcopy(network)
                for W in stored.parameters():
                    if W.dim() > 1:
                        values, bytes_per_weight = rounded(W, name)
                        W.copy_(values)
                row[f"{name} GB/token"] = row["GB/token"] * bytes_per_weight / network.dtype.itemsize
                row |= {f"{name} {key}": found for key, found in slicegpt.perplexities(stored, inputs).items()}
        yield row


def networks_to_compare(args, model, calibration: Tensor, where: dict):
    """(method, network, its number of pruned weights), one by one, for `quality`. Bad sizes raise before the first."""
    config, shared = model.config, []  # (head, d) of the networks with one Q
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for head in ["sliced", "tied"] if tied else ["sliced"]:
        if args.params:  # of so many, a tied head leaves more for d
            shared += [(head, dimension_for(config, share, args.round_to, "shared", head)) for share in args.params]
        else:
            shared += [(head, sliced_dimension(config.hidden_size, share, args.round_to)) for share in args.sparsities]
    yield "dense", model, 0
    network = copy.deepcopy(model)
    yield "SparseGPT 2:4", network, sparsegpt(network, calibration, **where)
    for sparsity in args.sparsities:
        network = slice_model(copy.deepcopy(model), calibration, sparsity, round_to=args.round_to, **where)
        slicegpt.rotate(network, [random_rotation(d, model.device) for d in network.config.slicegpt["dimensions"]])
        yield "block", network, 0
    fused = copy.deepcopy(model)
    Q = slicegpt.shared_rotation(fused, calibration, **where)  # which fuses it
    learn = torch.enable_grad()(slicegpt.learn_rotation)
    learned = cache(lambda columns: learn(fused, calibration, Q[:, :columns], args.learn, seed=args.seed))
    for head, d in shared:
        columns = slicegpt.columns_to_keep(config, d, head)  # d, or one less, if `standard` adds a dimension
        yield f"shared, {head}", sliced_by(Q[:, :columns], fused, calibration, head), 0
        if args.learn:
            yield f"shared, learned, {head}", sliced_by(learned(columns), fused, calibration, head), 0


def sliced_by(Q: Tensor, fused, calibration: Tensor, head: str):
    """A copy of the fused model, sliced by one Q (D, d); of Hugging Face's own class, if it can be."""
    network = copy.deepcopy(fused)
    slicegpt.rotate(network, Q @ random_rotation(Q.shape[1], fused.device))
    if head == "tied":
        slicegpt.tie_head(network, calibration)
    return slicegpt.standard(network)[0]


def random_rotation(d: int, device) -> Tensor:
    """(d, d). It changes nothing (Theorem 1) but what rounding does: weights of similar size lose less by that."""
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, device=device)).Q


def rounded(W: Tensor, name: str) -> tuple[Tensor, float]:
    """(W as a format of llama.cpp keeps it, bytes for each weight). Raises SliceGPTError for rows of a wrong length."""
    gguf = slicegpt.optional("gguf")
    with slicegpt.failing(f"cannot round the weights to {name}"):
        number = gguf.GGMLQuantizationType[name]
        stored = gguf.quants.quantize(W.detach().float().cpu().numpy(), number)
        return torch.from_numpy(gguf.quants.dequantize(stored, number)), stored.nbytes / W.numel()


# ---- SparseGPT 2:4, which the paper compares with -------------------------------------------------------------------
@torch.no_grad()
def sparsegpt(model, calibration: Tensor, batch_size: int, device) -> int:
    """SparseGPT 2:4 (Frantar and Alistarh 2023, arXiv 2301.00774), in place; returns how many weights are now zero.

    A layer's matrices are pruned together, by their inputs, given that all earlier layers are pruned.
    """
    parts = slicegpt.architecture(model.config)
    attention, ffn, zeros = parts.attention, parts.ffn, 0
    if "experts" in ffn.W_in:
        raise SliceGPTError("SparseGPT prunes no experts here")
    for stage, X in slicegpt.signals(model.eval(), calibration, batch_size, device):
        if stage is None or attention not in stage.blocks:
            continue  # X is read by the head (None), which stays; or by an FFN, pruned with its layer's attention
        linears = slicegpt.submodules(stage.layer, f"{attention.W_in} {attention.W_out} {ffn.W_in} {ffn.W_out}")
        H = dict.fromkeys(linears, 0)
        hooks = [linear.register_forward_pre_hook(
            lambda module, X: H.update({module: H[module] + slicegpt.covariance(X[0])})) for linear in linears]
        for batch in X.split(batch_size):
            stage.layer(batch.to(device), *stage.args, **stage.kwargs)
        for hook in hooks:
            hook.remove()
        for linear in linears:
            slicegpt.set_matrix(linear, prune(slicegpt.matrix(linear), H.pop(linear)))  # the bias stays
            zeros += linear.weight.numel() // 2
        slicegpt.layers(model)[stage.number].load_state_dict(stage.layer.state_dict())  # a copy, if it visits a device
    return zeros


def prune(W: Tensor, H: Tensor, damping: float = 0.01) -> Tensor:
    """W (inputs, outputs) with 2 of every 4 weights of an output zero, and the others such that X W changes little.

    H = X^T X (inputs, inputs), to whose diagonal a share of its mean is added. With H^-1 = U^T U, U upper triangular,
        (H_{j:,j:})^-1 = U_{j:,j:}^T U_{j:,j:}, whose first entry is U_jj^2, and whose first row is U_jj U_{j,j:}.
    So once the inputs before j are settled, a zero for w_j costs w_j^2 / U_jj^2, if the inputs after it make up for it.
    Going down the inputs, of every four weights of an output the two go that cost the least.
    """
    if len(W) % 4:
        raise SliceGPTError(f"2:4 needs inputs in fours, and a matrix has {len(W)}")
    W = W.clone()
    least = torch.finfo(H.dtype).tiny  # even if all inputs are 0, H has an inverse
    H = H + (damping * H.diag().mean()).clamp_min(least) * torch.eye(len(H)).to(H)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for j in range(len(W)):
        if j % 4 == 0:
            scores = W[j:j + 4].square() / U.diag()[j:j + 4, None].square()
            goes = torch.zeros_like(scores, dtype=torch.bool).scatter_(0, scores.argsort(0)[:2], True)
        # w_{j:} <- w_{j:} - (w_j / U_jj^2) U_jj U_{j,j:}, for each output whose w_j goes
        error = torch.where(goes[j % 4], W[j] / U[j, j], 0)
        W[j].masked_fill_(goes[j % 4], 0)  # not just nearly
        W[j + 1:] -= U[j, j + 1:, None] * error
    return W


# ---- The command line -----------------------------------------------------------------------------------------------
def main(argv=None) -> int:
    """Runs a command; returns its exit code, see `slicegpt.exit_code`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", help="each has its --help")
    natural, positive, share = slicegpt.bounded(int, 0), slicegpt.bounded(int, 1), slicegpt.bounded(float, 0, 1)
    options = {  # of more than one command
        "--json": dict(type=Path, metavar="FILE", help="write the rows here, as they are measured"),  # of all
        "--device": dict(help="default: cuda, if there is one"),
        "--dtype": dict(choices="float64 float32 float16 bfloat16".split(), help="default: float32; on a GPU float16"),
        "--shape": dict(choices=SHAPES, default="opt-125m", help="the network (default: opt-125m)"),
        "--layers": dict(type=natural, default=0, help="give networks so many (default: 0, which is all)"),
        "--sparsity": dict(type=share, default=0.25, help="share of dimensions to delete (default: 0.25)")}

    def command(function, *names, model=False):  # adds a command with these options, and returns its add_argument
        subparser = commands.add_parser(function.__name__, description=function.__doc__, allow_abbrev=False,
                                        formatter_class=argparse.RawDescriptionHelpFormatter)
        subparser.set_defaults(command=function, plot=None)
        for name in ("--json", *names):
            subparser.add_argument(name, **options[name])
        if model:
            slicegpt.add_inputs(subparser.add_argument)
        return subparser.add_argument

    add = command(latency, "--device", "--dtype", "--shape", "--layers", "--sparsity")
    add("--batch-size", type=positive, default=1, help="sequences at a time (default: 1)")
    add("--prompt-lengths", type=positive, nargs="+", default=[128, 512], help="in tokens (default: 128 512)")
    add("--tokens", type=positive, default=50, help="tokens to time after a prompt (default: 50)")
    add("--compile", action="store_true", help="by torch.compile: on a GPU, a token is one CUDA graph")
    add = command(throughput, "--device", "--dtype", "--shape", "--layers")
    add("--sparsities", type=share, nargs="+", default=[0.25, 0.5], help="shares to delete (default: 0.25 0.5)")
    add("--max-batch-size", type=positive, default=1024, help="the largest to try (default: 1024)")
    add("--seqlen", type=positive, default=128, help="tokens of a sequence (default: 128)")
    add("--tokens", type=positive, default=16, help="of these, in the middle, timed ones (default: 16)")
    add = command(ops, "--device", "--dtype", "--shape", "--sparsity")
    add("--batch-sizes", type=positive, nargs="+", default=[1, 2048], help="tokens at a time (default: 1 2048)")
    add("--repeat", type=positive, default=50, help="rounds, whose median is printed (default: 50)")
    add = command(cost, "--device", "--dtype", "--layers", "--sparsity")
    add("--shapes", choices=SHAPES, nargs="+", default=list(SHAPES)[:3], help="the networks (default: the first three)")
    add("--samples", type=positive, nargs="+", default=[4, 8], help="calibration sequences (default: 4 8)")
    add("--seqlen", type=positive, default=512, help="tokens per sequence (default: 512)")
    add("--batch-size", type=positive, default=8, help="calibration sequences at a time (default: 8)")
    add("--finetune", type=natural, default=4, help="sequences of RFT, 0 for none (default: 4)")
    add = command(table1, model=True)
    add("--models", nargs="+", default=[], help="several, instead of --model")
    add = command(tasks, "--sparsity", model=True)
    add("--tasks", default="piqa,winogrande,hellaswag,arc_easy,arc_challenge", help="default: the paper's five")
    add("--tasks-path", metavar="DIR", help="more tasks, as YAML files")
    add("--limit", type=natural, default=0, help="questions of each task (default: 0, which is all)")
    add = command(spectrum, model=True)
    add("--plot", type=Path, metavar="FILE.png", help="draw Figure 8 here (needs matplotlib)")
    add = command(quality, model=True)
    add("--sparsities", type=share, nargs="+", default=[0.1, 0.2, 0.3], help="shares to delete (default: 0.1 0.2 0.3)")
    add("--params", type=float, nargs="+", default=[], help="shares of parameters to keep, by one Q for all")
    add("--round-to", type=positive, default=8, help="dimensions are multiples of this (default: 8)")
    add("--learn", type=natural, default=0, help="steps that improve one Q for all (default: 0, none)")
    add("--formats", nargs="+", default=[], help="to round to, too, such as Q8_0 Q4_0 (needs gguf)")
    args = parser.parse_args((sys.argv[1:] if argv is None else argv) or ["latency"])
    return slicegpt.exit_code("bench", partial(run, args))


def run(args):
    """Runs a command: prints and writes each row as soon as it is measured; draws Figure 8, if asked."""
    for path in filter(None, (args.json, args.plot)):
        with slicegpt.failing(f"cannot write {path}"):
            open(path, "a").close()  # fails now, rather than after the work, as does the next line
    plot = args.plot and slicegpt.optional("matplotlib.figure").Figure(layout="tight")
    args.device = slicegpt.find_device(args.device)
    if args.dtype is None and "model" not in args:  # of a model, `read_model` finds it
        args.dtype = "float32" if args.device.type == "cpu" else "float16"
    torch.manual_seed(0)
    rows = []
    with torch.no_grad():  # except where something is trained
        for row in args.command(args):
            rows.append(row)
            show(args, rows)
            if args.json:
                args.json.write_text(json.dumps(about(args) | {"rows": rows}, indent=2, default=str) + "\n")
    if plot:
        draw_spectrum(rows, plot)
        plot.savefig(args.plot, format="png")


def about(args) -> dict:
    """What was run, and where."""
    on = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU"
    options = {name: value for name, value in vars(args).items() if name not in ("command", "json", "plot")}
    return {"command": args.command.__name__, "options": options, "on": on, "torch": torch.__version__,
            "transformers": transformers.__version__}


def show(args, rows: list[dict]):
    """Prints the last row; in front of the first, what it is about, and the names of the columns."""
    row = {key: f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if isinstance(value, float) else value
           for key, value in rows[-1].items()}
    columns = {key: "<21" if isinstance(value, str) else f">{max(9, len(key))}"  # words stand left, and numbers right
               for key, value in rows[0].items() if not isinstance(value, list)}
    if len(rows) == 1:
        print(*(f"{name}: {value}" for name, value in about(args).items()), sep="\n")
        print(*map(format, columns, columns.values()), sep="  ")
    print(*(format(row.get(key) or "-", column) for key, column in columns.items()), sep="  ", flush=True)


if __name__ == "__main__":
    sys.exit(main())
