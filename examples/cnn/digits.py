"""The lectures' CNN and a depthwise-separable one learn scikit-learn's handwritten digits (1,797 images of 8 x 8; nothing is
downloaded), with augmentation: each epoch sees every image moved, turned and scaled a little. Not flipped: a flipped 2 is no 2.

    python examples/cnn/digits.py                      # both networks; curves and confusions in build/cnn
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.datasets import load_digits

from mlcore.models.cnn import LectureCNN, LectureCNNConfig

NETWORKS = {
    "lecture": LectureCNNConfig((1, 16, 16), (32, 64), hidden=128, dropout=0.3),
    "separable": LectureCNNConfig((1, 16, 16), (32, 64, 128), hidden=128, dropout=0.3, separable=True),
}


def digits(seed: int = 0):
    """Images (N, 1, 16, 16) in [0, 1], doubled in size so that they can be moved by less than a pixel; labels. A fifth of every
    digit's images are for testing and never trained on: (train, test).
    """
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    x, y = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False), torch.tensor(data.target)
    generator = torch.Generator().manual_seed(seed)
    test = torch.zeros(len(y), dtype=torch.bool)
    for digit in range(10):
        own = (y == digit).nonzero().flatten()
        test[own[torch.randperm(len(own), generator=generator)[: len(own) // 5]]] = True
    return (x[~test], y[~test]), (x[test], y[test])


def augmented(x: torch.Tensor) -> torch.Tensor:
    """Each image turned by up to 12 degrees, scaled by up to 12 % and moved by up to 2 of its 16 pixels."""
    n = len(x)
    angle, scale = (torch.rand(n) - 0.5) * 2 * math.radians(12), 1 + (torch.rand(n) - 0.5) * 0.24
    cos, sin = angle.cos() * scale, angle.sin() * scale
    shift = (torch.rand(2, n) - 0.5) * 4 * 2 / 16
    maps = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    return F.grid_sample(x, F.affine_grid(maps, list(x.shape), align_corners=False), align_corners=False)


def accuracy(model, x, y) -> float:
    model.eval()
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def train(name: str, config: LectureCNNConfig, train_set, test_set, epochs: int, seed: int = 0):
    """The trained model and its history."""
    torch.manual_seed(seed)
    model = LectureCNN(config)
    return model, fit(name, model, train_set, test_set, epochs)


def fit(name: str, model: torch.nn.Module, train_set, test_set, epochs: int):
    """Trains the model. Loss and test accuracy of every epoch; the last epoch counts, not the best one."""
    (x, y), batch = train_set, 64
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.02)
    steps = epochs * math.ceil(len(x) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    history = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task(name, total=epochs, note="")
        for _ in range(epochs):
            model.train()
            total = 0.0
            for at in torch.randperm(len(x)).split(batch):
                loss = F.cross_entropy(model(augmented(x[at])), y[at], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(at)
            history.append((total / len(x), accuracy(model, *test_set)))
            progress.update(bar, advance=1, note=f"loss {history[-1][0]:.3f}, test accuracy {history[-1][1]:.2%}")
    return history


def plot(histories, models, test_set, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for name, history in histories.items():
        left.plot([loss for loss, _ in history], label=name)
        right.plot([100 * a for _, a in history], label=name)
    left.set(xlabel="epoch", ylabel="training loss (augmented, smoothed labels)")
    right.set(xlabel="epoch", ylabel="test accuracy, %", ylim=(90, 100))
    right.axhline(98.5, color="grey", linestyle=":")
    right.legend()
    figure.tight_layout()
    figure.savefig(folder / "digits_curves.png", dpi=120)
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models), 4.5), squeeze=False)
    x, y = test_set
    for axis, (name, model) in zip(axes[0], models.items(), strict=True):
        with torch.no_grad():
            guess = model.eval()(x).argmax(1)
        counts = torch.zeros(10, 10, dtype=torch.int64).index_put_((y, guess), torch.ones_like(y), accumulate=True)
        axis.imshow(counts.log1p(), cmap="Blues")
        for i, j in counts.nonzero().tolist():
            axis.text(j, i, int(counts[i, j]), ha="center", va="center", color="white" if i == j else "black", fontsize=8)
        axis.set(title=f"{name}: {int((guess != y).sum())} of {len(y)} wrong", xlabel="answer", ylabel="digit")
        axis.set_xticks(range(10)), axis.set_yticks(range(10))
    figure.tight_layout()
    figure.savefig(folder / "digits_confusion.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="steps are too short to gain from more")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=Path("build/cnn"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    train_set, test_set = digits(options.seed)
    models, histories = {}, {}
    for name in options.networks:
        models[name], histories[name] = train(name, NETWORKS[name], train_set, test_set, options.epochs, options.seed)
        count = sum(p.numel() for p in models[name].parameters())
        print(f"{name}: {count} parameters, test accuracy {histories[name][-1][1]:.2%} of {len(test_set[1])} images")
    plot(histories, models, test_set, options.out)
    print(f"curves and confusions: {options.out}/digits_curves.png, {options.out}/digits_confusion.png")


if __name__ == "__main__":
    main()
