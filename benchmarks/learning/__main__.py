"""What the same seconds of one machine teach an encoder: CIM beside its peers, controls and random weights.

Needs torch and timm alone, and labelled images CLASS/FILE as tar files or folders. Example:

    python -m benchmarks.learning --train train.tar --val val.tar --seconds 200 --seeds 3 --out results.jsonl
    python -m benchmarks.learning --report results.jsonl

Every (method, seed) is a line of --out as soon as it is done, and is not done again, so the command can
be cut and given again. The tokenizer is trained once and kept beside --out.

Equal wall-clock: a pilot measures the median step of each method; steps = seconds / step, so warm-up and
cosine fit the time. Probes do not count. Where others use the machine too, `--clock processor` counts
processor seconds of this process, divided by its threads.
Methods that need a tokenizer get its training for nothing in this account; `simmim-long` and `mae-long`
are given its seconds on top, which is the other account.

`k-NN` and `linear` (logistic regression, strength chosen on held-out training images) are on the mean
over the positions of the encoder's map. `own pooling` is timm's, the class token of a ViT. `fine-tuned`
is all layers trained on a part of the labelled images; in the row `random` that is training from scratch.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.learning.budget import CLOCKS
from benchmarks.learning.report import more_table, picture, row_name, table
from benchmarks.learning.runs import METHODS, record_key, runs
from benchmarks.learning.setup import setting_of
from benchmarks.records import append, read


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--report", type=Path, help="print the table of these results, draw the curves, and end"
    )
    parser.add_argument(
        "--train", type=Path, help="labelled images: trained on without labels; votes and fits probes"
    )
    parser.add_argument("--val", type=Path, help="labelled images that are classified")
    parser.add_argument("--out", type=Path, default=Path("learning.jsonl"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seconds", type=float, default=200, help="training of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--patch", type=int, default=8, help="pixels a token position")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--rate",
        type=float,
        help="peak learning rate of all methods; default: each its own, for batches of 16",
    )
    parser.add_argument("--crop-min", type=float, default=0.3)
    parser.add_argument("--points", type=int, default=8, help="looks at the features during a training")
    parser.add_argument("--labelled", type=int, default=5000, help="labelled images of each set, at most")
    parser.add_argument(
        "--more-probes",
        action="store_true",
        help="also on decoded pictures and on inner stages of CNNs; not of runs that are done already",
    )
    parser.add_argument("--finetune-seconds", type=float, default=60, help="0: no fine-tuning")
    parser.add_argument("--finetune-steps", type=int, help="the same for all, in place of the seconds")
    parser.add_argument("--finetune-images", type=int, default=1000)
    parser.add_argument("--finetune-rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of a tokenizer, made where missing; default beside --out"
    )
    parser.add_argument("--tokenizer-seconds", type=float, default=225)
    parser.add_argument("--tokenizer-width", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--stride", type=int, help="pixels a token; default: half of --patch, as BEiT has it")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="as model.objective.weight=10"
    )
    parser.add_argument("--label", default="", help="name of rows that --set has changed")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Do the runs that are missing, and report."""
    given = arguments(words)
    if given.report is not None:
        report(given.report)
        return
    if given.train is None or given.val is None:
        raise SystemExit("--train and --val are needed, or --report")
    if given.set and not given.label:
        raise SystemExit("--set changes the runs: name them with --label")
    torch.set_num_threads(given.threads)
    setting = setting_of(given)
    done = {record_key(record) for record in read(given.out)}
    for record in runs(setting, methods=given.methods, seeds=given.seeds, done=done):
        append(given.out, record)
        told = ("seed", "steps", "train_seconds", "knn", "linear")
        print(row_name(record), json.dumps({key: record[key] for key in told if key in record}), flush=True)
    report(given.out)


def report(file: Path) -> None:
    """Print the table; draw the curves beside the file."""
    records = read(file)
    print(table(records))
    if more := more_table(records):
        print(f"\nmore probes, inner stages with batch norm of real images:\n\n{more}")
    if any(record.get("curve") for record in records):
        picture(records).save(file.with_suffix(".png"))
        print(f"curves: {file.with_suffix('.png')}")


if __name__ == "__main__":
    main()
