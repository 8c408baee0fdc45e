"""Attention on a GPU against torch's: full, causal, windows and documents. Problems and checks: _gpu_attention.py."""

import sys

import _gpu_attention

if __name__ == "__main__":
    sys.exit(_gpu_attention.main())
