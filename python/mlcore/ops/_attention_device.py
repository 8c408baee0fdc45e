"""Tile schedules as GPU kernels take them: on the device, without tiles outside of the band, and turned around as well.

A list comes twice in the same arrays: row_ptr has sets * (q_tiles + k_tiles) + 1 elements, the rows of query tiles first, whose
cols are key tiles, and then those of key tiles, whose cols are query tiles; ids go with the pairs both times.
"""

from __future__ import annotations

import weakref

import torch

from ._attention_schedule import TILE, Schedule

_kept: dict[tuple, tuple] = {}  # (of the list's row_ptr, device, lengths, band) -> (row_ptr's weak reference, schedule)


def on_device(s: Schedule, Tq: int, Tk: int, device: torch.device) -> Schedule:
    """The schedule for scores (..., Tq, Tk) as the CUDA and Triton kernels take it; kept as long as the list it is from."""
    if s.row_ptr is None:
        return s
    key = (id(s.row_ptr), device, Tq, Tk, s.left, s.right, s.offset)
    found = _kept.get(key)
    if found is None or found[0]() is not s.row_ptr:
        arrays = (t.to(device) for t in (*_both_ways(s, Tq, Tk), s.bits))
        found = weakref.ref(s.row_ptr, lambda _: _kept.pop(key, None)), s._replace(**dict(zip(_LIST, arrays)))
        _kept[key] = found
    return found[1]


_LIST = ("row_ptr", "cols", "ids", "bits")


def _both_ways(s: Schedule, Tq: int, Tk: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(row_ptr, cols, ids) of the list without tiles that the band hides, by query tiles and then by key tiles."""
    sets, q_tiles, k_tiles = s.set_b * s.set_h, -(-Tq // TILE), -(-Tk // TILE)
    row = torch.repeat_interleave(torch.arange(s.row_ptr.numel() - 1), s.row_ptr.diff())
    col, tile = s.cols.long(), s.ids
    if s.row_ptr.numel() == sets + 1 and q_tiles != 1:  # one row a set, for all of its query tiles
        of = torch.arange(sets * q_tiles) // max(q_tiles, 1)
        count = s.row_ptr.diff()[of]
        row = torch.repeat_interleave(torch.arange(sets * q_tiles), count)
        at = torch.arange(row.numel()) - (torch.cumsum(count, 0) - count)[row] + s.row_ptr[of][row]
        col, tile = col[at], tile[at]
    qt = row % max(q_tiles, 1)
    ahead = (col - qt) * TILE - s.offset  # of the first key over the first query
    seen = torch.ones_like(col, dtype=torch.bool)
    if s.left >= 0:
        seen &= ahead + TILE - 1 >= -s.left
    if s.right >= 0:
        seen &= ahead - (TILE - 1) <= s.right
    row, col, tile, qt = row[seen], col[seen], tile[seen], qt[seen]
    turned = torch.argsort(row // max(q_tiles, 1) * k_tiles + col, stable=True)
    rows = torch.cat([row, (sets * q_tiles + row // max(q_tiles, 1) * k_tiles + col)[turned]])
    row_ptr = torch.zeros(sets * (q_tiles + k_tiles) + 1, dtype=torch.int64)
    row_ptr[1:] = torch.bincount(rows, minlength=sets * (q_tiles + k_tiles)).cumsum(0)
    return row_ptr, torch.cat([col, qt[turned]]).int(), torch.cat([tile, tile[turned]])
