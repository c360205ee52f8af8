"""Vectors of texts by the static embeddings in the wheel ``wordllama``: the mean of the vectors of a text's tokens.

The package's own loader looks for its files elsewhere and downloads them, so the two files are read here.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .base import Constraint, ConstraintRefusedError, Job, Message, Prompt, PromptRefusedError, Switches

__all__ = ["WordLlamaEngine"]

_WEIGHTS = "weights/l2_supercat_256.safetensors"
_TOKENIZER = "tokenizers/l2_supercat_tokenizer_config.json"


class WordLlamaEngine:
    """A model of embeddings that takes some 10,000 short texts a second on a CPU. It answers no prompts.

    Parameters
    ----------
    max_model_len : int, default 8192
        Tokens of a text; a longer one is refused.
    """

    model = "wordllama"
    max_logprobs = 0
    generates = False
    alive = True

    def __init__(self, *, max_model_len: int = 8192) -> None:
        from safetensors.numpy import load_file  # only with the extra ``local``
        from tokenizers import Tokenizer

        spec = importlib.util.find_spec("wordllama")  # not imported: its own modules are of no use here
        assert spec is not None
        assert spec.origin is not None
        folder = Path(spec.origin).parent
        tensors = load_file(folder / _WEIGHTS)
        self._vectors = next(iter(tensors.values()))
        self._tokenizer = Tokenizer.from_file(str(folder / _TOKENIZER))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.max_model_len = max_model_len
        self.dimensions = int(self._vectors.shape[1])

    def prompt(self, value: str | list[int], *, add_special_tokens: bool) -> Prompt:
        """See `Engine.prompt`."""
        ids = self.encode(value, add_special_tokens=add_special_tokens) if isinstance(value, str) else value
        return Prompt(value if isinstance(value, str) else self.decode(ids), ids, len(ids))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """See `Engine.encode`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids  # none has a part in the mean
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Engine.decode`."""
        if unknown := [i for i in ids if not 0 <= i < len(self._vectors)]:
            raise PromptRefusedError(f"Token id {unknown[0]} is out of vocabulary")
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    async def embed(self, prompts: Sequence[Prompt], dimensions: int, address: str) -> list[bytes]:
        """See `Engine.embed`: unit vectors."""
        return await asyncio.to_thread(self._embed, [prompt.ids or [] for prompt in prompts], dimensions)

    def _embed(self, texts: Sequence[Sequence[int]], dimensions: int) -> list[bytes]:
        found = []
        for ids in texts:
            mean = self._vectors[ids, :dimensions].astype(np.float32).mean(axis=0)
            found.append((mean / max(float(np.linalg.norm(mean)), 1e-12)).astype("<f4").tobytes())
        return found

    def render(self, messages: Sequence[Message], switches: Switches | None = None, *, reply: bool = True) -> str:
        """See `Engine.render`: there is no template."""
        return "\n".join(message["content"] for message in messages)

    def check(self, constraint: Constraint) -> None:
        """See `Engine.check`."""
        raise ConstraintRefusedError("The model does not support text generation")

    def submit(self, job: Job) -> None:
        """See `Engine.submit`: the server refuses prompts."""

    def cancel(self, job: Job) -> None:
        """See `Engine.cancel`."""

    def abort(self) -> None:
        """See `Engine.abort`."""

    def load(self, address: str) -> tuple[int, int]:
        """See `Engine.load`."""
        return 0, 0

    def close(self) -> None:
        """See `Engine.close`."""
