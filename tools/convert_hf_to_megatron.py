"""The same as `asd-megatron convert hf-to-megatron`, for those who look for a script here."""

from __future__ import annotations

import sys

from asd_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "hf-to-megatron", *sys.argv[1:]]))
