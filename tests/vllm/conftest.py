"""These tests need an environment with vLLM: `make test-vllm`. Elsewhere nothing of this folder is collected.

vLLM binds threads, sets seeds and patches torch in the process that it runs in, so each engine gets a process.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["*"]

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def run_engine(tmp_path_factory):
    """run_engine(job) -> what engine.py found, as plain data."""

    def run(job: dict) -> dict:
        folder = tmp_path_factory.mktemp("engine")
        (folder / "job.json").write_text(json.dumps(job))
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if job.get("processes") else "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound threads that spin for each other crawl on a busy machine
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, HERE / "engine.py", folder / "job.json", folder / "found.json"]
        with open(folder / "log.txt", "w") as log:
            done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=1800)
        assert done.returncode == 0, (folder / "log.txt").read_text()[-6000:]
        return json.loads((folder / "found.json").read_text())

    return run
