"""The examples of convolutional networks: rules, data and a short training each."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples" / "cnn"


def load(name):
    for needed in ("rich", "matplotlib", "sklearn"):
        pytest.importorskip(needed)
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rules_of_go():
    go = load("go")
    board = [0] * 81
    for at in (1, 9, 11):  # three neighbours of 10
        board[at] = 1
    board[10] = -1
    assert go.captures(board, 1) == {19} and go.captures(board, -1) == set()
    after = go.play(board, 19, 1)
    assert after[10] == 0 and after[19] == 1 and board[10] == -1
    assert go.play(after, 10, -1) is None  # suicide
    assert go.play(after, 0, -1) is None and go.play(after, 0, 1) is not None
    stones, liberties = go.group(after, 19)
    assert stones == {19} and liberties == {10, 18, 20, 28}


def test_positions_of_go_keep_their_answer_when_turned():
    go = load("go")
    random.seed(0)
    x, y = go.positions(6, seed=3)
    for _ in range(4):
        turned, answers = go.turned(x, y)
        for planes, answer in zip(turned, answers, strict=True):
            board = (planes[0] - planes[1]).flatten().int().tolist()
            assert go.captures(board, 1) == {int(answer)}


def test_digits_are_learned():
    digits = load("digits")
    (x, y), test = digits.digits()
    assert len(y) + len(test[1]) == 1797 and 350 < len(test[1]) < 370
    moved = digits.augmented(x[:8])
    assert moved.shape == (8, 1, 16, 16) and not torch.equal(moved, x[:8])
    torch.set_num_threads(1)  # as the example does
    for network in digits.NETWORKS:
        _, history = digits.train(network, digits.NETWORKS[network], (x[:640], y[:640]), test, epochs=3)
        assert history[-1][0] < 0.9 * history[0][0]
        # Thirty steps: the running moments of the separable network's norms still lag behind.
        assert network == "separable" or history[-1][1] > 0.5
