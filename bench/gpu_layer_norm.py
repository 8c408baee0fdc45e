"""Layer norm on a GPU, alone and with the residual added first, against torch's. Shapes and checks: _gpu_norms.py."""

import sys

import _gpu_norms
import torch.nn.functional as F

import mlcore


def main(argv=None) -> int:
    return _gpu_norms.main("layer_norm", mlcore.ops.layer_norm, lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), 2, argv)


if __name__ == "__main__":
    sys.exit(main())
