#!/usr/bin/env python
"""Feed damaged and hostile bytes to everything that reads files of others, and report what should not happen.

    python tools/fuzz_readers.py --minutes 10 --seed 0
    python tools/fuzz_readers.py --minutes 10 --engine atheris     # guided by coverage; pip install 'modstruct[fuzz]'

A reader may return, or raise one of its documented errors. Anything else is a finding: another exception, a crash, more
than 5 seconds or 500 MiB for one input. Findings are kept in --findings, named by reader and kind; exit status 1 if
there is any. Inputs are mutations of sound files: made here, and, if they are there, of the shards of --shards.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("fuzz", "checkpoints", "data/shards", "data/downstream")]
NAMES = ("tar", "image", "caption", "metadata", "index", "yaml", "checkpoint", "tokenizer", "task")
SECONDS_ALLOWED, MIB_ALLOWED = 5, 500
LONGEST_INPUT = 1 << 18
TOKENS = [
    b"\0" * 8,
    b"\xff" * 8,
    b"\xff\xda",
    b"[" * 2000,
    b'{"a":' * 500,
    b"\\ud800",
    b"\xed\xa0\x80",
    b"\n",
    b"9" * 40,
]
TOKENS += [b"../../", b"GNU.sparse.map=0,1", b"size=-1", b"&a [*a, *a]", b"!!python/object/apply:os.system", b"1e999"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="in total, shared among the readers")
    parser.add_argument("--seed", type=int, default=0)
    today = {"picture": "image"}  # a former name
    parser.add_argument(
        "--readers", nargs="+", choices=NAMES, default=list(NAMES), type=lambda name: today.get(name, name)
    )
    parser.add_argument("--engine", choices=["mutation", "atheris"], default="mutation")
    parser.add_argument("--shards", type=Path, nargs="*", default=[], help="tar shards to start from as well")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--child", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return run_reader(options)
    found = 0
    for reader in options.readers:
        found += watch_reader(options, reader)
    return 1 if found else 0


def watch_reader(options: argparse.Namespace, reader: str) -> int:
    """Run one reader in processes of its own until its time is up; returns the number of findings."""
    seconds = 60 * options.minutes / len(options.readers)
    end, seed, inputs, findings = time.monotonic() + seconds, options.seed, 0, set()
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # what is synced to a disk there waits for none
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        while (left := end - time.monotonic()) > 0 and len(findings) < 20:
            current, report = Path(folder, "current"), Path(folder, "report")
            report.unlink(missing_ok=True)
            arguments = [*sys.argv[1:], "--child", reader, "--seed", str(seed), "--minutes", str(left / 60)]
            done = subprocess.run(
                [sys.executable, __file__, *arguments, "--findings", folder],
                capture_output=True,
                text=True,
                check=False,
            )
            counts = json.loads(report.read_text()) if report.exists() else {}
            inputs += counts.get("inputs", 0)
            kind = counts.get("finding") or (None if done.returncode == 0 else _death(done))
            if kind is not None and kind not in findings:
                findings.add(kind)
                options.findings.mkdir(parents=True, exist_ok=True)
                kept = options.findings / f"{reader}-{len(findings)}"
                kept.write_bytes(current.read_bytes() if current.exists() else b"")
                kept.with_suffix(".txt").write_text(f"{kind}\n{counts.get('traceback', done.stderr)}")
                print(f"{reader}: FOUND {kind}; the input is {kept}", flush=True)
            seed += 1_000_003
    print(f"{reader}: {inputs:,} inputs in {seconds:.0f} s, {len(findings)} findings", flush=True)
    return len(findings)


def _death(done: subprocess.CompletedProcess) -> str:
    if done.returncode == -signal.SIGPROF or "ALARM: working on the last Unit" in done.stderr:
        return f"more than {SECONDS_ALLOWED} seconds"
    return f"the process ended with status {done.returncode}"


def run_reader(options: argparse.Namespace) -> int:
    """In the child: feed one reader until the time is up or something is found."""
    if options.engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["modstruct", "yaml"]):
            from hostile_readers import READERS
    else:
        from hostile_readers import READERS
    from sound_inputs import sound_inputs

    seeds = sound_inputs(options.child, options.shards)
    read, documented = READERS[options.child](Path(tempfile.mkdtemp(dir=options.findings)))
    for seed in seeds:  # what is imported or built at first use is no cost of an input
        with suppress(*documented):
            read(seed)
    end = time.monotonic() + 60 * options.minutes
    counts = {"inputs": 0}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGPROF, signal.SIG_DFL)

    def one(content: bytes) -> None:
        (options.findings / "current").write_bytes(content)
        counts["inputs"] += 1
        signal.setitimer(signal.ITIMER_PROF, SECONDS_ALLOWED)  # of this process: a busy machine is no hang
        try:
            read(content)
        except documented:
            pass
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            counts["finding"] = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
            counts["traceback"] = traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
        if grown > MIB_ALLOWED:
            counts["finding"] = f"more than {MIB_ALLOWED} MiB"
        over = "finding" in counts or time.monotonic() > end
        if over or counts["inputs"] % 50 == 0:
            (options.findings / "report").write_text(json.dumps(counts))
        if over:
            os._exit(0)  # atheris gives no other way back

    if options.engine == "atheris":
        mend = repair_tar if options.child == "tar" else bytes
        mutator = {"custom_mutator": lambda data, size, _: mend(atheris.Mutate(data, size))}
        corpus = options.findings / "corpus"
        corpus.mkdir(exist_ok=True)
        for number, seed in enumerate(seeds):
            (corpus / str(number)).write_bytes(seed)
        flags = [f"-seed={options.seed % 2**31 + 1}", f"-max_len={LONGEST_INPUT}", "-timeout=60", "-rss_limit_mb=0"]
        atheris.Setup([sys.argv[0], *flags, f"-artifact_prefix={options.findings}/", str(corpus)], one, **mutator)
        atheris.Fuzz()
    generator = random.Random(options.seed)
    while True:
        content = mutated(generator, seeds)
        one(repair_tar(content) if options.child == "tar" and generator.random() < 0.8 else content)


def mutated(generator: random.Random, seeds: list[bytes]) -> bytes:
    """A sound file after one to eight changes: bytes, numbers, cuts, repetitions, pieces of other files."""
    content = bytearray(generator.choice(seeds))
    for _ in range(generator.choice([1, 1, 2, 3, 5, 8])):
        # Most of what decides lies at the start of a file or of a block.
        place = generator.randrange(min(len(content), generator.choice([64, 600, 1 << 30])) + 1) if content else 0
        length = generator.choice([1, 1, 2, 4, 16, 100, 512, 1024])
        change = generator.randrange(8)
        if change == 0 and content:
            content[min(place, len(content) - 1)] ^= 1 << generator.randrange(8)
        elif change == 1:
            content[place : place + 1] = bytes([generator.choice([0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)])])
        elif change == 2:
            number = generator.choice([0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, generator.getrandbits(32)])
            content[place : place + 4] = struct.pack(generator.choice(["<I", ">I"]), number)
        elif change == 3:
            del content[place : place + length]
        elif change == 4:
            content[place:place] = content[place : place + length] * generator.choice([1, 2, 30])
        elif change == 5:
            content[place : place + generator.choice([0, length])] = generator.choice(TOKENS)
        elif change == 6:
            other = generator.choice(seeds)
            start = generator.randrange(len(other) + 1)
            content[place:place] = other[start : start + length]
        elif generator.random() < 0.3:
            del content[place:]
    return bytes(content[:LONGEST_INPUT])


def repair_tar(content: bytes) -> bytes:
    """The same with right checksums in every block that looks like a header, so that damage gets past them."""
    repaired = bytearray(content)
    for start in range(0, len(content) - 511, 512):
        block = content[start : start + 512]
        if block[257:262] == b"ustar":
            total = sum(block) - sum(block[148:156]) + 256
            repaired[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(repaired)


if __name__ == "__main__":
    sys.exit(main())
