"""A thread beside the training leaves no helpers of torch, which would slow down every step on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Each piece of work runs in a thread of its own, which stays alive: helpers of torch end with their thread.
COUNT = """
import json, os, sys, threading
from pathlib import Path
import torch
from PIL import Image
from torch import nn
from cim_core.data.transforms import to_tensor
from cim_core.engine.state import TrainState, take_snapshot

torch.set_num_threads(2)
model = nn.Linear(512, 512)
state = TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters()))
snapshot = take_snapshot(state, fingerprint={})
works = {
    "nothing": lambda: None,
    "a checkpoint": lambda: snapshot.write(Path(sys.argv[1])),
    "a picture": lambda: to_tensor(Image.new("RGB", (512, 512))),
    "a large sum": lambda: torch.ones(512, 512).sum(),
}
over = threading.Event()

def new_threads(work):
    before, done = len(os.listdir("/proc/self/task")), threading.Event()

    def run():
        try:
            work()
        finally:
            done.set()
        over.wait()

    threading.Thread(target=run, daemon=True).start()
    done.wait()
    return len(os.listdir("/proc/self/task")) - before

print(json.dumps({name: new_threads(work) for name, work in works.items()}))
over.set()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_helpers__none_of_a_checkpoint_or_a_picture(tmp_path: Path) -> None:
    command = [sys.executable, "-c", COUNT, str(tmp_path / "checkpoint")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    threads = json.loads(done.stdout)
    assert threads.pop("a large sum") == 2, "the count shows what it should"
    assert threads == {"nothing": 1, "a checkpoint": 1, "a picture": 1}
