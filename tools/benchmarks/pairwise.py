"""Time and memory of the pairwise terms beside their plain torch forms, in one run.

python tools/benchmarks/pairwise.py                     # two CPU cores: about 4 minutes
python tools/benchmarks/pairwise.py --sweep 16384       # contrastive terms from N = 256 on: up to an hour
python tools/benchmarks/pairwise.py --device cuda  # bf16 and tf32, N = 32,768 and 131,072, whatever --rows says

Every round times each form once, one after the other, so that a busy machine slows all alike; after one that warms up,
the table has the medians over the rounds and their ratio, on a GPU beside the plain form by torch.compile. A count of
operations and the machine's own rate for products of matrices, measured in the same rounds, give each kernel's share of
that rate. Memory is measured in a process of its own, as the growth of its peak beyond the inputs and their gradients.
The last table is the error of float32 at logit scale 100, by the size of the loss. Writes bench_pairwise.json and
bench_pairwise.png to --out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, softplus
from tqdm import tqdm

from modstruct.models.build import float32_products
from modstruct.pairwise import (
    contrastive,
    gaussian_potential,
    geometric_consistency,
    nearest_counts,
    sigmoid_contrastive,
)
from modstruct.pairwise.contrast import row_and_column_lse, row_contrast_sum
from modstruct.pairwise.operators import load_extension

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "pairwise"))
import reference  # the formulas as they are printed

MIB = 2**20
T = 2.0  # of the Gaussian potential
LOGIT_SCALE = 20.0
LOGIT_BIAS = -10.0


@dataclass
class Term:
    """One row of the table: a term at one size, and how its plain form compares."""

    name: str
    size: str
    operations: float
    """Of our form, forward and backward, without the exponentials."""
    limit: float | None = None
    """Largest ratio of our time to the plain form's that the project allows itself."""
    seconds: list[float] = field(default_factory=list)
    plain_seconds: list[float] = field(default_factory=list)
    ours: Callable[[], object] | None = field(default=None, repr=False)
    plain: Callable[[], object] | None = field(default=None, repr=False)
    compiled: Callable[[], object] | None = field(default=None, repr=False)
    """The plain form by torch.compile."""
    compiled_seconds: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.seconds) / statistics.median(self.plain_seconds) if self.plain_seconds else None

    def rate(self) -> float:
        """Operations per second."""
        return self.operations / statistics.median(self.seconds)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    device = torch.device(options.device)
    print(machine(device))
    if options.sweep:
        sweep(options)
        return
    terms, product = cuda_terms(device) if device.type == "cuda" else cpu_terms(options)
    for turn in tqdm(range(options.rounds + 1), desc="rounds", leave=False):
        for term in (product, *terms):
            forms = (
                (term.ours, term.seconds),
                (term.plain, term.plain_seconds),
                (term.compiled, term.compiled_seconds),
            )
            for form, seconds in forms:
                if form is not None:
                    taken = timed(form, device)
                    if turn:  # the first round warms up, and compiles
                        seconds.append(taken)
    print_times(terms, product)
    memory = cuda_memory(device) if device.type == "cuda" else cpu_memory(options)
    print_memory(memory)
    accuracy = accuracy_at_scale_100(device)
    print_accuracy(accuracy)
    options.out.mkdir(parents=True, exist_ok=True)
    results = {
        "machine": machine(device),
        "command": " ".join(sys.argv),
        "product_rate": product.rate(),
        "terms": [as_json(term) for term in terms],
        "memory": memory,
        "accuracy_at_scale_100": accuracy,
    }
    Path(options.out, "bench_pairwise.json").write_text(json.dumps(results, indent=1))
    draw(terms, product, Path(options.out, "bench_pairwise.png"))
    print(f"written to {options.out}/bench_pairwise.json and .png")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="Where to measure.")
    parser.add_argument("--rounds", type=int, default=5, help="Rounds that medians are taken of (default: 5).")
    parser.add_argument("--rows", type=int, default=8192, help="N on the CPU (default: %(default)s).")
    parser.add_argument("--dimension", type=int, default=512, help="D on the CPU (default: %(default)s).")
    parser.add_argument("--memory_rows", type=int, default=65_536, help="N of the memory table (default: %(default)s).")
    parser.add_argument("--sweep", type=int, metavar="N", help="Contrastive terms alone, from 256 to N rows.")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="Folder to write to (default: runs/bench)."
    )
    options = parser.parse_args(arguments)
    for name in ("rounds", "rows", "dimension", "memory_rows"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: give at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    return options


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    model = next(
        (line.split(":")[1].strip() for line in cpu_info() if line.startswith("model name")), platform.machine()
    )
    kernels = load_extension().features()["cpu_here"][-1]
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}, {kernels} kernels"


def cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def timed(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rows(count: int, dimension: int, seed: int, like: Tensor | None = None, device: str = "cpu") -> Tensor:
    """(count, dimension), unit norm; with `like`, near its rows, as the other modality's embeddings are."""
    z = torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))
    return normalize(z if like is None else z / dimension**0.5 + like.cpu(), dim=1).to(device)


def forward_and_backward(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], None]:
    def run() -> None:
        leaves = [z.detach().requires_grad_() for z in inputs]
        function(*leaves).backward()

    return run


def ours_contrastive(precision: str) -> Callable[..., Tensor]:
    return lambda x, y, scale: sum(contrastive(x, y, scale, precision)) / 2


def ours_sigmoid(precision: str) -> Callable[..., Tensor]:
    return lambda x, y, scale: sigmoid_contrastive(x, y, scale, torch.full_like(scale, LOGIT_BIAS), precision)


def plain_sigmoid(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return reference.sigmoid_contrastive(x, y, scale, torch.full_like(scale, LOGIT_BIAS))


def ours_potential(precision: str) -> Callable[..., Tensor]:
    return lambda z: gaussian_potential(z, T, precision)


def plain_potential(z: Tensor) -> Tensor:
    return reference.gaussian_potential_of_unit_rows(z, T)


def ours_geometry(precision: str) -> Callable[..., Tensor]:
    return lambda a, b: geometric_consistency(a, b, precision)


def cpu_terms(options: argparse.Namespace) -> tuple[list[Term], Term]:
    n, d = options.rows, options.dimension
    x = rows(n, d, 1)
    y = rows(n, d, 2, like=x)
    scale = torch.tensor([LOGIT_SCALE])
    size = f"N = {n:,}, D = {d}"
    queries, gallery = rows(10_000, d, 3), rows(50_000, d, 4)
    positives = torch.stack((torch.arange(10_000), torch.arange(10_000)), 1)
    terms = [
        Term("contrastive", size, 8 * n * n * d, 0.8),
        Term("sigmoid_contrastive", size, 6 * n * n * d, 0.8),
        Term("gaussian_potential", size, 3 * n * n * d, 0.6),
        Term("geometric_consistency", size, 8 * n * d * d, 1 / 30),
        Term("nearest_counts", f"10,000 x 50,000, D = {d}", 2 * 10_000 * 50_000 * d, 1.0),
    ]
    both = [
        (
            forward_and_backward(ours_contrastive("float32"), x, y, scale),
            forward_and_backward(reference.contrastive, x, y, scale),
        ),
        (
            forward_and_backward(ours_sigmoid("float32"), x, y, scale),
            forward_and_backward(plain_sigmoid, x, y, scale),
        ),
        (
            forward_and_backward(ours_potential("float32"), x),
            forward_and_backward(plain_potential, x),
        ),
        (
            forward_and_backward(ours_geometry("float32"), x, y),
            forward_and_backward(reference.geometric_consistency, x, y),
        ),
        (
            lambda: nearest_counts(queries, gallery, positives),
            lambda: reference.nearest_counts(queries, gallery, positives),
        ),
    ]
    for term, (ours, plain) in zip(terms, both, strict=True):
        term.ours, term.plain = ours, plain
    return terms, Term("product of matrices", size, 2 * n * n * d, ours=lambda: x @ y.T)


def sweep(options: argparse.Namespace) -> None:
    """Prints our processor time over the plain form's, forward and backward, for B rows against 1, 4 and 16 B columns.

    Median of the rounds' ratios, up to the largest plain logits of 4 GiB. Processor time, since a busy machine delays
    the two forms unequally.
    """
    forms = {
        "contrastive": (both_ways, plain_both_ways),
        "info_nce": (
            lambda x, y, s: row_contrast_sum(x, None, y, s, 0, 0.0, "float32") / len(x),
            lambda x, y, s: cross_entropy(s * x @ y.T, torch.arange(len(x))),
        ),
        "soft_contrastive": (
            lambda x, y, s: row_contrast_sum(x, x.detach(), y.detach(), s, 0, 0.4, "float32") / len(x),
            lambda x, y, s: reference.soft_contrastive(x, x.detach(), y.detach(), s, 0.4),
        ),
    }
    print(f"\nprocessor time, ours / plain, D = {options.dimension}")
    print(f"{'threads':>7}{'rows':>8}{'columns':>9}" + "".join(f"{name:>18}" for name in forms))
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        for n, times in itertools.product([2**k for k in range(8, options.sweep.bit_length())], (1, 4, 16)):
            if 4 * n * n * times > 4 * 2**30:
                continue
            inputs = rows(n, options.dimension, 1), rows(n * times, options.dimension, 2), torch.tensor([LOGIT_SCALE])
            ratios = []
            for pair in forms.values():
                ours, plain = (forward_and_backward(form, *inputs) for form in pair)
                taken = [(processor_seconds(ours), processor_seconds(plain)) for _ in range(options.rounds + 1)]
                ratios.append(statistics.median(ours / plain for ours, plain in taken[1:]))  # the first round warms up
            print(f"{threads:>7}{n:>8,}{n * times:>9,}" + "".join(f"{ratio:>18.2f}" for ratio in ratios), flush=True)


def both_ways(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss of a process that has the first of `y` as its own rows."""
    row_lse, column_lse, positive = row_and_column_lse(x, y, scale, 0, "float32")
    margins = torch.stack((row_lse, column_lse[: len(x)])) - positive
    return softplus(margins).mean()


def plain_both_ways(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits = scale * x @ y.T
    own = torch.arange(len(x))
    return (cross_entropy(logits, own) + (logits.logsumexp(0)[: len(x)] - logits.diagonal()).mean()) / 2


def processor_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def cuda_terms(device: torch.device) -> tuple[list[Term], Term]:
    terms = []
    for n, d in ((32_768, 512), (32_768, 1024), (131_072, 512), (131_072, 1024)):
        x = rows(n, d, 1, device=device)
        y = rows(n, d, 2, like=x, device=device)
        scale = torch.tensor([LOGIT_SCALE], device=device)
        for precision in ("bf16", "tf32"):
            cast = torch.bfloat16 if precision == "bf16" else torch.float32
            cases = [
                ("contrastive", 8 * n * n * d, ours_contrastive, reference.contrastive, (x, y, scale)),
                ("sigmoid_contrastive", 6 * n * n * d, ours_sigmoid, plain_sigmoid, (x, y, scale)),
                ("gaussian_potential", 3 * n * n * d, ours_potential, plain_potential, (x,)),
                ("geometric_consistency", 8 * n * d * d, ours_geometry, reference.geometric_consistency, (x, y)),
            ]
            for name, operations, ours, plain, inputs in cases:
                term = Term(name, f"N = {n:,}, D = {d}, {precision}", operations)
                term.ours = forward_and_backward(ours(precision), *inputs)
                if n <= 32_768:  # a plain form at N = 131,072 would need 64 GiB for each array of logits
                    low = [z.to(cast) for z in inputs]
                    term.plain = in_tf32(forward_and_backward(plain, *low))
                    if precision == "bf16":
                        term.compiled = in_tf32(forward_and_backward(torch.compile(plain, dynamic=False), *low))
                        term.limit = 0.5 if name == "contrastive" else None
                terms.append(term)
    queries, gallery = rows(10_000, 512, 3, device=device), rows(50_000, 512, 4, device=device)
    positives = torch.stack((torch.arange(10_000), torch.arange(10_000)), 1).to(device)
    counts = Term("nearest_counts", "10,000 x 50,000, D = 512, float32", 2 * 10_000 * 50_000 * 512)
    counts.ours = lambda: nearest_counts(queries, gallery, positives)
    counts.plain = lambda: reference.nearest_counts(queries, gallery, positives)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    return [*terms, counts], Term("product of matrices", "8,192^3, bf16", 2 * 8192**3, ours=lambda: a @ b)


def in_tf32(function: Callable[[], object]) -> Callable[[], object]:
    """Forward and backward of float32 in tf32, and nothing that is timed beside it."""

    def run() -> None:
        with float32_products(tf32=True):
            function()

    return run


# --- memory ---


def cpu_memory(options: argparse.Namespace) -> list[dict]:
    n, d = options.memory_rows, options.dimension
    cases = [("contrastive", n, 512), ("gaussian_potential", n, 512), ("geometric_consistency", 4 * n, 64)]
    found = [
        {"term": name, "size": f"N = {count:,}, D = {d}", "limit_mib": limit, "extra_mib": extra_mib(name, count, d)}
        for name, count, limit in tqdm(cases, desc="memory", leave=False)
    ]
    counted, plain = extra_mib("nearest_counts", 0, d), extra_mib("nearest_counts, plain", 0, d)
    size = f"10,000 x 50,000, D = {d}; plain {plain:,.0f} MiB"
    return [*found, {"term": "nearest_counts", "size": size, "limit_mib": plain / 20, "extra_mib": counted}]


def extra_mib(name: str, count: int, dimension: int) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_extra_mib_here, (name, count, dimension))


def _extra_mib_here(name: str, count: int, dimension: int) -> float:
    if name.startswith("nearest_counts"):
        queries, gallery = rows(10_000, dimension, 3), rows(50_000, dimension, 4)
        positives = torch.stack((torch.arange(10_000), torch.arange(10_000)), 1)
        function = reference.nearest_counts if "plain" in name else nearest_counts
        return _growth(
            lambda: function(queries, gallery, positives), lambda: function(queries[:9], gallery[:9], positives[:9])
        )
    inputs = [torch.empty(count, dimension).normal_() for _ in range(1 if name == "gaussian_potential" else 2)]
    inputs = [z.div_(z.norm(dim=1, keepdim=True)).requires_grad_() for z in inputs]
    gradients = sum(z.numel() * z.element_size() for z in inputs) / MIB
    scale = [torch.tensor([LOGIT_SCALE])] if name == "contrastive" else []
    function = {
        "contrastive": ours_contrastive,
        "gaussian_potential": ours_potential,
        "geometric_consistency": ours_geometry,
    }
    term = function[name]("float32")
    small = [z.detach()[:dimension].clone().requires_grad_() for z in inputs]
    growth = _growth(lambda: term(*inputs, *scale).backward(), lambda: term(*small, *scale).backward())
    return growth - gradients


def _growth(function: Callable[[], object], warm_up: Callable[[], object]) -> float:
    """By how many MiB the process's peak grows while the function runs, libraries being loaded by the warm-up."""
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
    before = peak_mib()
    function()
    return peak_mib() - before


def peak_mib() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) / 1024


def cuda_memory(device: torch.device) -> list[dict]:
    found = []
    for n, d in ((32_768, 512), (131_072, 512)):
        for name, term, count in (
            ("contrastive", ours_contrastive("bf16"), 2),
            ("gaussian_potential", ours_potential("bf16"), 1),
        ):
            inputs = [rows(n, d, seed, device=device).requires_grad_() for seed in range(count)]
            scale = [torch.tensor([LOGIT_SCALE], device=device)] if name == "contrastive" else []
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            term(*inputs, *scale).backward()
            torch.cuda.synchronize()
            gradients = sum(z.numel() * z.element_size() for z in inputs)
            extra = (torch.cuda.max_memory_allocated() - before - gradients) / MIB
            found.append({"term": name, "size": f"N = {n:,}, D = {d}, bf16", "limit_mib": None, "extra_mib": extra})
    return found


# --- accuracy ---


def accuracy_at_scale_100(device: torch.device) -> list[dict]:
    """Relative error of the contrastive gradient in float32, ours and the plain form's, by the size of the loss.

    Exact is our form in float64: the plain one loses the smallest losses in float64 too.
    """
    found = []
    scale = torch.tensor([100.0])
    ours = ours_contrastive("float32")
    center = rows(1, 64, 3)
    for spread in (0.15, 0.3, 0.4, 0.5, 0.6):  # of the rows around a common direction; the wider, the smaller the loss
        x = normalize(center + spread * rows(512, 64, 1), dim=1)
        y = normalize(x + 0.2 * spread * rows(512, 64, 2), dim=1)
        exact = gradients(ours, x.double(), y.double(), scale.double())
        loss = ours(x.double(), y.double(), scale.double()).item()
        record = {"loss": loss}
        for name, function in (("ours", ours), ("plain", reference.contrastive)):
            made = gradients(function, x.to(device), y.to(device), scale.to(device))
            record[name] = ((made.cpu() - exact).norm() / exact.norm()).item()
        found.append(record)
    return found


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    leaves = [z.detach().requires_grad_() for z in inputs]
    return torch.cat([g.flatten() for g in torch.autograd.grad(function(*leaves), leaves[:2])]).double()


# --- results ---


def as_json(term: Term) -> dict:
    record = {k: v for k, v in asdict(term).items() if k not in ("ours", "plain", "compiled")}
    return record | {"ratio": term.ratio, "operations_per_second": term.rate()}


def print_times(terms: list[Term], product: Term) -> None:
    print(f"\nproducts of matrices run at {product.rate() / 1e9:,.0f} GFLOP/s here ({product.size})\n")
    heads = (
        f"{'ours, ms':>10}{'plain, ms':>11}{'compiled':>10}{'ratio':>8}{'allowed':>9}{'GFLOP/s':>10}{'of products':>13}"
    )
    print(f"{'term':22}{'size':30}{heads}")
    for term in terms:
        ours = statistics.median(term.seconds) * 1e3
        plain, compiled = (
            f"{statistics.median(seconds) * 1e3:.1f}" if seconds else "-"
            for seconds in (term.plain_seconds, term.compiled_seconds)
        )
        ratio = f"{term.ratio:.3f}" if term.ratio is not None else "-"
        allowed = f"{term.limit:.3f}" if term.limit is not None else "-"
        times = f"{ours:>10.1f}{plain:>11}{compiled:>10}{ratio:>8}{allowed:>9}"
        print(f"{term.name:22}{term.size:30}{times}{term.rate() / 1e9:>10,.0f}{term.rate() / product.rate():>13.0%}")


def print_memory(memory: list[dict]) -> None:
    print("\nmemory beyond the inputs and their gradients")
    for row in memory:
        allowed = f"{row['limit_mib']:,.0f} MiB" if row["limit_mib"] is not None else "-"
        print(f"{row['term']:22}{row['size']:50}{row['extra_mib']:>10,.0f} MiB   allowed {allowed}")
    print()


def print_accuracy(accuracy: list[dict]) -> None:
    print("relative error of the contrastive gradient in float32 at logit scale 100")
    print(f"{'loss':>12}{'ours':>12}{'plain':>12}")
    for row in accuracy:
        print(f"{row['loss']:12.1e}{row['ours']:12.1e}{row['plain']:12.1e}")
    print()


def draw(terms: list[Term], product: Term, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.5 * len(terms) + 2.2), layout="constrained")
    names = [f"{term.name}\n{term.size}" for term in terms]
    places = range(len(terms))
    ratios = [term.ratio or 0 for term in terms]
    left.barh(places, ratios, color="#2a6f97")
    for place, term in zip(places, terms, strict=True):
        if term.limit is not None:
            left.plot([term.limit] * 2, [place - 0.45, place + 0.45], color="#bc4749", linewidth=2)
        if term.ratio is not None:
            left.text(term.ratio, place, f" {term.ratio:.3f}", va="center")
    left.set(
        yticks=list(places), yticklabels=names, xlim=(0, 1.1), xlabel="time / time of the plain form (line: allowed)"
    )
    shares = [100 * term.rate() / product.rate() for term in terms]
    right.barh(places, shares, color="#6a994e")
    for place, share in zip(places, shares, strict=True):
        right.text(share, place, f" {share:.0f} %", va="center")
    right.set(yticks=[], xlim=(0, 1.2 * max(*shares, 100)), xlabel="share of the rate of products of matrices, percent")
    right.axvline(100, color="grey", linewidth=1)
    for axis in (left, right):
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
