"""Text from a model: temperature and nucleus sampling over a cache of keys and values.

Dims: B prompts, S positions, V vocabulary.
"""

import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moesaic.data.tokenizer import Tokenizer
from moesaic.models.transformer import Transformer
from moesaic.parallel.ranks import ALONE, Ranks
from moesaic.train.assemble import print_warning, restore_run
from moesaic.train.config import RunConfig


@torch.no_grad()
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    ranks: Ranks = ALONE,
) -> str:
    """Continue `prompt` by up to `max_tokens` tokens; stops where the model begins another document.

    Temperature 0 takes the likeliest token. Equal arguments give equal text. Returns the continuation alone. Over
    several ranks all call it together, with the same arguments.
    """
    device = model.embedding.device
    generator = torch.Generator().manual_seed(seed)
    ids = [tokenizer.mark, *map(int, tokenizer.encode(prompt))]
    cache = model.new_cache(1, len(ids) + max_tokens, dtype=dtype)
    pending, written = ids, []
    for _ in range(max_tokens):
        tokens = torch.tensor([pending], device=device)
        logits = model(tokens, mode="eval", dtype=dtype, cache=cache).logits
        assert logits is not None
        last = logits[0, -1].float().cpu()
        # the first rank's choice: where tokens travel, the last bits of logits depend on the rank
        chosen = ranks.shared(
            lambda last=last: sample(last, temperature=temperature, top_p=top_p, generator=generator)
        )
        if chosen == tokenizer.mark:
            break
        written.append(chosen)
        pending = [chosen]
    return tokenizer.decode(np.array(written, dtype=np.int64))


def sample(
    logits: Float[Tensor, " V"], *, temperature: float, top_p: float, generator: torch.Generator
) -> int:
    """Draw a token from the smallest set of likeliest ones that holds `top_p` of the probability."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (
        ((logits - logits.max()).double() / temperature).softmax(-1).sort(descending=True, stable=True)
    )
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= top_p] = 0  # the first one always stays
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def generate_run(
    run: RunConfig,
    folder: Path,
    prompts: list[str],
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    step: int | None,
) -> list[str]:
    """Continue each prompt with the model of the run in `folder`, from its newest checkpoint or that of `step`."""
    if max_tokens < 1:
        raise ValueError(f"--max-tokens: {max_tokens} is not positive")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"--temperature: {temperature} is not 0 or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p: {top_p} is not in (0, 1]")
    if not 0 <= seed < 1 << 62:
        raise ValueError(f"--seed: {seed} is not in 0 to 2^62 - 1")
    restored = restore_run(run, folder, step=step, say=print_warning)
    return [
        generate(
            restored.model,
            restored.tokenizer,
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed + number,
            dtype=restored.compute.dtype,
        )
        for number, prompt in enumerate(prompts)
    ]
