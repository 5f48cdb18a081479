"""One training epoch, ours against the paper's loop, side by side in one process, and the peak memory of a training.

    python benchmarks/epoch.py                             photos, 50,000 images, on the CPU: two to three minutes
    python benchmarks/epoch.py --data folder:/some/images --rounds 15

The paper's loop computes each target from its image when it is asked for, collates batches of 256 in a DataLoader and
runs the eager module with autograd. Both train on the same split with the preset `paper`, one epoch and its validation
a turn, in rounds, after a warm-up of each; an epoch's time includes nothing of what is done once before. Memory is
the largest resident size of a fresh process that loads 60,000 images (both splits) and trains on them for two epochs.
"""

import argparse
import resource
import subprocess
import sys
import time

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler

from transformnet_lib import CustomDataset, TrainConfig, train
from transformnet_lib.dataset import split_indices
from transformnet_lib.images import load_images
from transformnet_lib.machine import environment, resolve_device, synchronize
from transformnet_lib.measure import CONFIDENCE, LEAST_ROUNDS, Estimate, estimate, ratio, rounds
from transformnet_lib.model import seeded_model
from transformnet_lib.pipeline import to_float
from transformnet_lib.training import Trainer


class PerImage(Dataset):
    """Pairs of an image and its target, which is computed from it each time it is asked for."""

    def __init__(self, dataset: CustomDataset):
        self.images, self.transform = dataset.images, dataset.pipeline.compose()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = to_float(self.images[i])
        return image, self.transform(image)


class PaperLoop:
    """The training loop as the paper has it: `run_epoch()` trains on all and validates."""

    def __init__(self, images: CustomDataset, config: TrainConfig):
        dataset = PerImage(images)
        self.device = resolve_device(config.device)
        self.model = seeded_model(config.seed).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        train_indices, val_indices = split_indices(len(dataset), val_fraction=config.val_fraction, seed=config.seed)
        generator = torch.Generator().manual_seed(config.seed)
        shuffled = SubsetRandomSampler(train_indices.tolist(), generator)
        self.train_loader = DataLoader(dataset, config.batch_size, sampler=shuffled)
        self.val_loader = DataLoader(dataset, config.batch_size, sampler=val_indices.tolist())

    def run_epoch(self) -> None:
        for images, targets in self.train_loader:
            loss = F.mse_loss(self.model(images.to(self.device)), targets.to(self.device))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()  # the paper prints it
        with torch.no_grad():
            for images, targets in self.val_loader:
                F.mse_loss(self.model(images.to(self.device)), targets.to(self.device)).item()


def seconds(loop: PaperLoop | Trainer) -> float:
    synchronize(loop.device)
    start = time.perf_counter()
    loop.run_epoch()
    synchronize(loop.device)
    return time.perf_counter() - start


def in_words(name: str, found: Estimate, unit: str = "") -> str:
    return f"{name:<24} {found.median:.3g}{unit} [{found.low:.3g}, {found.high:.3g}]"


def peak_memory(options: argparse.Namespace) -> None:
    """Print the largest resident size, in MB, of this process after training on 60,000 images."""
    both = [load_images(options.data, train=split, data_path=options.data_path).pixels for split in (True, False)]
    dataset = CustomDataset(options.data_path, data=options.data, limit=1, cache=False)
    dataset.images = torch.cat(both)
    del both
    train(dataset, TrainConfig(device=options.device, epochs=2))
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6:.0f} MB for {len(dataset):,} images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="photos", help="photos, cifar10, folder:PATH or auto")
    parser.add_argument("--data-path", default="data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=LEAST_ROUNDS, help="of both, at least 9")
    parser.add_argument(
        "--threads", type=int, help="of PyTorch; on a busy machine two can be ten times slower than one"
    )
    parser.add_argument("--memory", action="store_true", help="only the peak memory of a training, in this process")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory:
        peak_memory(options)
        return

    # First, since on Linux a process inherits the largest resident size of the one that starts it.
    print(f"{'peak memory, ours':<24}", end=" ", flush=True)
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--memory"], stderr=subprocess.DEVNULL, check=True)

    config = TrainConfig(device=options.device)
    dataset = CustomDataset(options.data_path, data=options.data)
    ours, papers = Trainer(dataset, config), PaperLoop(dataset, config)
    for loop in (ours, papers):
        loop.run_epoch()
    methods = {"paper's loop": lambda: seconds(papers), "ours": lambda: seconds(ours)}
    table = rounds(methods, compared=[("ours", "paper's loop")], seconds=0, least=options.rounds, title="epochs")

    machine = environment(ours.device)
    print(f"{machine['device_name']}, {machine['threads']} threads, torch {machine['torch']}")
    print(f"{len(ours.train):,} training and {len(ours.val):,} validation images, batch {config.batch_size}")
    print(f"medians of {options.rounds} rounds and their {CONFIDENCE:.0%} intervals; the ratio is that within a round")
    for name in methods:
        print(in_words(f"{name}, an epoch", estimate(table.loc[table["method"] == name, "seconds"]), " s"))
    print(in_words("ratio", ratio(table, "ours", "paper's loop")))
    print(f"{'once before, ours':<24} {ours.setup_seconds:.3g} s")


if __name__ == "__main__":
    main()
