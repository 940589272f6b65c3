"""A reader under a fuzzer that is guided by coverage: started by `faults.py hostile --guided`, needs atheris.

    python benchmarks/guided.py READER RUNS FOLDER FINDINGS

atheris keeps inputs that reach new code of ours, in FOLDER, where the next call goes on, and damages them as
`damage` does. An input that is a finding lies there too, as `finding_NUMBER`.
"""

import hashlib
import json
import os
import random
import resource
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

with atheris.instrument_imports(include=["pixio", "dense"]):
    import faults
    from damage import damage
    from hostile import READERS

from pixio.files import write_json


def main(name: str, runs: int, output: Path, findings: Path) -> None:
    """Fuzz, which ends the process."""
    reader = READERS[name]
    seeds = reader.seeds()
    first = next(iter(seeds[0]))
    corpus = output / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed{number}").write_bytes(next(iter(seed.values())))
    made = TemporaryDirectory()
    folder = Path(made.name).resolve()
    os.chdir(folder)
    watch = faults.Watch(folder)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    measured = {"slowest": 0.0, "memory": 0.0}
    done = 0

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        return damage(data, reader.format, rng, next(iter(rng.choice(seeds).values())))[:max_size]

    def read(data: bytes) -> None:
        nonlocal done
        began = time.perf_counter()
        wrong = faults.attempt(reader, seeds[0] | {first: data}, folder, watch)
        measured["slowest"] = max(measured["slowest"], time.perf_counter() - began)
        done += 1
        if wrong:
            number = int(hashlib.sha256(data).hexdigest()[:8], 16)
            (output / f"finding_{number}").write_bytes(data)
            with open(findings, "a") as file:
                file.write(json.dumps({"number": number, "what": wrong}) + "\n")
        if done >= runs:  # nothing runs after `Fuzz`
            measured["memory"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
            write_json(output / "measured.json", measured)

    flags = [f"-runs={runs}", f"-timeout={faults.SECONDS:g}", "-max_len=4194304", "-rss_limit_mb=4096"]
    flags += [f"-artifact_prefix={output}/", str(corpus)]
    atheris.Setup(["guided", *flags], read, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *map(Path, sys.argv[3:]))
