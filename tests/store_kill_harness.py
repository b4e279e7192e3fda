"""Writers of a small feature store that are killed or starved, for test_store_faults.py.

Run as a script, `store_kill_harness.py SCENARIO FOLDER`, because it forks, which a pytest process that has
started torch's threads must not do. Prints the outcome as JSON.
"""

import hashlib
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np

from qscope.errors import StorageError
from qscope.store import StoreSettings, StoreWriter, pack_layer, shard_arrays

SHARDS = 4
D_SAE = 70_000


def settings_of(**changes):
    fields = {
        "qscope_version": "0.1.0",
        "device": "cpu",
        "model": {"name": "tiny", "sha256": "a" * 64},
        "tokenizer_sha256": "b" * 64,
        "saes": [{"layer": 5, "sha256": "c" * 64, "d_sae": D_SAE, "k": 8}],
        "dtype": "float32",
        "precision": "exact",
        "context_size": 16,
        "shard_bytes": 1024,
    }
    return StoreSettings.model_validate(fields | changes)


def arrays_of(index, seed=0, n=64):
    rng = np.random.default_rng([index, seed])
    ids = np.sort(rng.integers(0, D_SAE - 8, (n, 8))) + np.arange(8)
    packed = {5: pack_layer(rng.random((n, 8)), ids, D_SAE)}
    return shard_arrays(np.repeat(index, n), np.arange(n), rng.integers(0, 1000, n), packed)


class Tokenizer:
    def save_pretrained(self, folder):
        Path(folder, "tokenizer.json").write_text("{}")


def encode(path, seeds=(0,) * SHARDS, **options):
    """What an encode run does with the writer: skip what is finished with the right key, write the rest."""
    with StoreWriter.open(path, settings_of(), **options) as writer:
        writer.save_tokenizer(Tokenizer())
        for index, seed in enumerate(seeds):
            writer.add(index, f"text-{seed}", arrays_of(index, seed), {"carry": [index, seed]})
        writer.truncate_from(len(seeds))
        writer.complete({"documents": len(seeds)})


def contents(path):
    """sha256 of every file but the lock."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name != ".lock"]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def in_child(work, *args):
    """Runs `work(*args)` in a fork. Returns its pid; the child ends with status 0, or 1 with a traceback."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work(*args)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def status_of(pid):
    return os.waitpid(pid, 0)[1]


def die_at(step):
    """Makes the process vanish, as by kill -9, at the `step`-th system call that changes the disk."""
    left = [step]

    def counted(call, torn=False):
        def run(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                if torn:  # half of the bytes reach the file
                    call(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return run

    os.write = counted(os.write, torn=True)
    for name in ("fsync", "replace", "rename", "unlink", "ftruncate", "mkdir", "open"):
        setattr(os, name, counted(getattr(os, name)))


def encode_and_die(path, seeds, step):
    die_at(step)
    encode(path, seeds)


def exhaustive(folder):
    """Dies at every step of a first run and of one that replaces the last shard, and at a random step of the
    run after; then finishes."""
    os.fsync = lambda handle: None  # a killed process loses nothing that it wrote: only a power cut would
    rng, results = random.Random(7), {}
    for name, before, seeds in (("first", None, (0, 0)), ("changed", (0, 0), (0, 1))):
        stores, status, step = [], None, 0
        while status != 0:
            step += 1
            path = folder / f"{name}-{step}"
            if before:
                encode(path, before)
            status = status_of(in_child(encode_and_die, path, seeds, step))
            again = status_of(in_child(encode_and_die, path, seeds, rng.randrange(1, 60)))
            assert status in (0, signal.SIGKILL) and again in (0, signal.SIGKILL)
            encode(path, seeds)
            stores.append(contents(path))
        encode(folder / f"{name}-whole", seeds)
        results[name] = {"whole": contents(folder / f"{name}-whole"), "stores": stores}
    return results


def at_random(folder):
    """Kills writers from outside at random times until 12 have died; each store is finished in the end."""
    rng, kills, stores = random.Random(11), 0, 0
    start = time.perf_counter()
    encode(folder / "timing")
    usual = time.perf_counter() - start
    while kills < 12:
        pid = in_child(encode, folder / f"codes-{stores}")
        time.sleep(rng.uniform(0, usual))
        os.kill(pid, signal.SIGKILL)
        died = status_of(pid) == signal.SIGKILL
        kills += died
        stores += not died
    for index in range(stores + 1):
        encode(folder / f"codes-{index}")
    return [contents(folder / f"codes-{index}") for index in range(stores + 1)]


def on_a_small_disk(folder):
    """A file size limit stands in for a full disk: the kernel refuses the write half way through a shard."""
    path = folder / "codes"

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        try:
            encode(path)
        except StorageError as error:
            (folder / "error").write_text(str(error))

    status = status_of(in_child(work))
    left = sorted(os.listdir(path))
    encode(path)
    return {
        "status": status,
        "error": (folder / "error").read_text(),
        "left": left,
        "stores": [contents(path)],
    }


if __name__ == "__main__":
    json.dump(globals()[sys.argv[1]](Path(sys.argv[2])), sys.stdout)
