"""`python -m mlcore`: what is usable here, and why not."""

from . import show_config

if __name__ == "__main__":
    show_config()
