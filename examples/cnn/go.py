"""AlphaGo's policy network, small, learns to find the capturing move on a 9 x 9 board.

The task makes itself: random legal games are played, and a position counts where exactly one move captures stones. The network
sees three planes (own stones, the opponent's, empty points), never liberties, so it must find out which groups are surrounded:
a group may be long, and what matters is whether it has one liberty left. Its answer is one of 81 points; guessing among the
empty ones is right about once in fifty. Positions of the test games are of other games than those of the training ones.

    python examples/cnn/go.py                          # curve and two boards in build/cnn
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track

from mlcore.models.cnn import AlphaGoConfig, AlphaGoPolicy

SIZE = 9
NEIGHBOURS = [
    [y * SIZE + x for y, x in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)) if 0 <= y < SIZE and 0 <= x < SIZE]
    for r in range(SIZE)
    for c in range(SIZE)
]


def group(board: list[int], at: int) -> tuple[set[int], set[int]]:
    """The stones connected to the one at `at`, and their liberties."""
    stones, liberties, stack = {at}, set(), [at]
    while stack:
        for n in NEIGHBOURS[stack.pop()]:
            if board[n] == 0:
                liberties.add(n)
            elif board[n] == board[at] and n not in stones:
                stones.add(n)
                stack.append(n)
    return stones, liberties


def play(board: list[int], at: int, colour: int) -> list[int] | None:
    """The board after a stone of `colour` (1 or -1) at `at` and its captures; None for suicide. Ko isn't tracked."""
    after = list(board)
    after[at] = colour
    for n in NEIGHBOURS[at]:
        if after[n] == -colour:
            stones, liberties = group(after, n)
            if not liberties:
                for s in stones:
                    after[s] = 0
    return after if group(after, at)[1] else None


def captures(board: list[int], colour: int) -> set[int]:
    """Points where `colour` captures something: the last liberty of a group of the other colour."""
    found, seen = set(), set()
    for at, stone in enumerate(board):
        if stone == -colour and at not in seen:
            stones, liberties = group(board, at)
            seen |= stones
            if len(liberties) == 1:
                found |= liberties
    return found


def positions(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """planes (count, 3, 9, 9) as the player to move sees them, and the capturing point."""
    chance, planes, labels = random.Random(seed), [], []
    while len(labels) < count:
        board, colour, taken = [0] * (SIZE * SIZE), 1, 0
        for _ in range(90):
            moves = [i for i, stone in enumerate(board) if stone == 0]
            chance.shuffle(moves)
            after = next((b for m in moves if (b := play(board, m, colour)) is not None), None)
            if after is None:
                break
            board, colour = after, -colour
            points = captures(board, colour)
            if len(points) == 1 and taken < 8:  # a few of each game, so that they differ
                stones = torch.tensor(board).view(SIZE, SIZE) * colour
                planes.append(torch.stack([stones == 1, stones == -1, stones == 0]).float())
                labels.append(points.pop())
                taken += 1
    return torch.stack(planes[:count]), torch.tensor(labels[:count])


def turned(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same positions under one of the board's eight symmetries; here flips are as good as the original."""
    points = torch.arange(SIZE * SIZE).view(1, 1, SIZE, SIZE)
    k, flip = random.randrange(4), random.random() < 0.5

    def move(t):
        t = t.rot90(k, (2, 3))
        return t.flip(3) if flip else t

    where = move(points).flatten().argsort()  # the new place of every point
    return move(x), where[y]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--filters", type=int, default=48)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("build/cnn"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0), random.seed(0)
    x, y = positions(options.positions, seed=1)
    test_x, test_y = positions(max(options.positions // 8, 1), seed=2)
    guess = (1 / test_x[:, 2].sum((1, 2))).mean()
    print(f"{len(x)} positions, {len(test_x)} for testing; a guess among empty points is right in {guess:.1%}")
    model = AlphaGoPolicy(AlphaGoConfig(SIZE, 3, options.filters, options.layers))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    steps = options.epochs * -(-len(x) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    history = []
    for _ in track(range(options.epochs), "learning"):
        total = 0.0
        for at in torch.randperm(len(x)).split(128):
            planes, labels = turned(x[at], y[at])
            loss = F.cross_entropy(model(planes), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(at)
        with torch.no_grad():
            history.append((total / len(x), (model(test_x).argmax(1) == test_y).float().mean().item()))
    print(f"loss {history[-1][0]:.3f}, capturing move found in {history[-1][1]:.1%} of the test positions")
    plot(model, history, test_x, test_y, options.out)


def plot(model, history, x, y, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    axes[0].plot([100 * a for _, a in history])
    axes[0].set(xlabel="epoch", ylabel="capturing move found, %", ylim=(0, 100))
    with torch.no_grad():
        p = model.probabilities(x[:2]).view(-1, SIZE, SIZE)
    for axis, planes, chance, label in zip(axes[1:], x, p, y, strict=False):
        axis.imshow(chance, cmap="Greens", vmin=0, vmax=1)
        for colour, edge, plane in (("black", "black", planes[0]), ("white", "black", planes[1])):
            rows, cols = plane.nonzero().T
            axis.scatter(cols, rows, s=160, c=colour, edgecolors=edge)
        axis.set_title(f"to capture: row {int(label) // SIZE}, column {int(label) % SIZE}; black to move", fontsize=9)
    figure.tight_layout()
    figure.savefig(folder / "go.png", dpi=120)
    print(f"curve and boards: {folder}/go.png")


if __name__ == "__main__":
    main()
