"""RMS norm on a GPU, alone and with the residual added first, against torch's. Shapes and checks: _gpu_norms.py."""

import sys

import _gpu_norms
import torch.nn.functional as F

import mlcore


def main(argv=None) -> int:
    return _gpu_norms.main("rms_norm", mlcore.ops.rms_norm, lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6), 1, argv)


if __name__ == "__main__":
    sys.exit(main())
