"""binary_conv2d on a GPU against torch's dense convolutions of the same signs. Packing of x is within mlcore's rows, but in
"packed". The rates count twice the products, padding included.
"""

import sys

import _gpu
import torch
import torch.nn.functional as F
from harness import Group

from mlcore.ops import binary_conv2d, pack_binary_conv, pack_pixels

# x, out channels, kernel, stride
PROBLEMS = [
    ((1, 256, 56, 56), 256, 3, 1),
    ((32, 64, 56, 56), 64, 3, 1),
    ((32, 128, 28, 28), 128, 3, 1),
    ((32, 256, 28, 28), 512, 3, 2),
    ((32, 512, 7, 7), 512, 3, 1),
    ((32, 256, 14, 14), 256, 1, 1),
]


def group(shape, out, kernel, stride):
    torch.manual_seed(0)
    weight = torch.randn(out, shape[1], kernel, kernel)
    x, packed = torch.randn(shape, device="cuda"), pack_binary_conv(weight).to("cuda")
    where = {"stride": stride, "padding": kernel // 2}
    ours = where | {"kernel_size": kernel}
    bits, want = pack_pixels(x, impl="reference"), binary_conv2d(x, packed, **ours, impl="reference")
    words = pack_pixels(want, impl="reference").words
    signs, dense = ((1 - 2 * (t.cuda() < 0).float()).bfloat16() for t in (x, weight))
    signs, dense = (t.contiguous(memory_format=torch.channels_last) for t in (signs, dense))
    rows = {}
    for impl in ("cuda", "triton"):
        rows[f"mlcore {impl}"] = lambda impl=impl: binary_conv2d(x, packed, **ours, impl=impl)
        rows[f"mlcore {impl} packed x, packed y"] = lambda impl=impl: (
            binary_conv2d(bits, packed, **ours, packed_output=True, impl=impl).words
        )
    rows["torch bfloat16 channels_last"] = lambda: F.conv2d(signs, dense, **where)

    def check(row, got):
        if row.startswith("mlcore"):
            assert torch.equal(got, words if "packed y" in row else want), f"{row}: not exact"
        return 0.0

    return Group(rows, check, flops=2 * want.numel() * shape[1] * kernel * kernel)


def main(argv=None) -> int:
    def name(shape, out, kernel, stride):
        return f"binary_conv2d ({','.join(map(str, shape))})->{out} k{kernel} s{stride}"

    return _gpu.main([(name(*p), lambda p=p: group(*p)) for p in PROBLEMS], argv)


if __name__ == "__main__":
    sys.exit(main())
