"""Time of an update of the quickstart's teacher on two threads that wait actively or passively, beside other work.

    python benchmarks/busy_threads.py [--rounds 2] [--updates 10] [--others 4]

Each policy in its own process, since OpenMP reads it once; `others` are processes that keep the cores busy.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

POLICIES: dict[str, dict[str, str]] = {"default": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}
BUSY = "while True: pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--others", type=int, default=4)
    parser.add_argument("--update-here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.update_here:
        time_updates(arguments.updates)
        return
    plain = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(arguments.others)]
    try:
        for _ in range(arguments.rounds):
            for name, policy in POLICIES.items():
                command = [sys.executable, __file__, "--update-here", "--updates", str(arguments.updates)]
                done = subprocess.run(command, env=plain | policy, capture_output=True, text=True, check=True)
                print(f"{name}: {done.stdout.strip()}", flush=True)
    finally:
        for other in others:
            other.kill()


def time_updates(updates: int) -> None:
    """Print the times of an update on two threads."""
    import timm
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(2)
    size = {"img_size": 32, "patch_size": 8, "depth": 6, "embed_dim": 96, "num_heads": 3}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=10, **size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    images, labels = torch.rand(64, 3, 32, 32), torch.randint(0, 10, (64,))

    def update() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    update()
    began, processor = time.perf_counter(), time.process_time()
    for _ in range(updates):
        update()
    wall, used = time.perf_counter() - began, time.process_time() - processor
    print(f"{1000 * wall / updates:.0f} ms, {1000 * used / updates:.0f} ms of processor time")


if __name__ == "__main__":
    main()
