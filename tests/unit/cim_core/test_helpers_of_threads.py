"""A thread beside the training leaves no helpers of torch, which would slow down every step on a CPU."""

import subprocess
import sys
from pathlib import Path

import pytest

COUNT = """
import os, sys, threading
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
work = {
    "nothing": lambda: None,
    "a checkpoint": lambda: snapshot.write(Path(sys.argv[2])),
    "a picture": lambda: to_tensor(Image.new("RGB", (512, 512))),
    "a large sum": lambda: torch.ones(512, 512).sum(),
}[sys.argv[1]]
found = []

def count():
    work()
    found.append(len(os.listdir("/proc/self/task")))

thread = threading.Thread(target=count)
thread.start()
thread.join()
print(found[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_helpers__none_of_a_checkpoint_or_a_picture(tmp_path: Path) -> None:
    def threads(work: str) -> int:
        command = [sys.executable, "-c", COUNT, work, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        return int(done.stdout)

    alone = threads("nothing")
    assert threads("a large sum") == alone + 1, "the count shows what it should"
    assert threads("a checkpoint") == alone
    assert threads("a picture") == alone
