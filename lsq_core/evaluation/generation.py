"""Compare the texts that two models generate from the same prompt.

Both texts are scored by both models with the same tokens before each position (teacher forcing),
so a token's two probabilities are conditioned on the same context.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lsq_core.errors import InputError
from lsq_core.progress import Progress, no_progress

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Token:
    """One generated token.

    ``full`` and ``quantized`` are the probabilities, 0 to 1, that the two models assign to it
    after the same preceding tokens, at temperature 1; ``full_top`` and ``quantized_top`` are the
    texts of each model's most probable token at this position.
    """

    id: int
    text: str
    full: float
    quantized: float
    full_top: str
    quantized_top: str


@dataclass(frozen=True)
class GenerationComparison:
    """The texts that the full-precision and the quantized model generate from a prompt.

    ``parts_at`` is the first position at which the two differ, or None. Over the positions of the
    full-precision model's text, ``agreement`` is the share at which both models have the same most
    probable token, and ``kl`` is the mean KL divergence from the full-precision to the quantized
    model, in nats per token.
    """

    prompt: str
    prompt_tokens: int
    full: tuple[Token, ...]
    quantized: tuple[Token, ...]
    parts_at: int | None
    agreement: float
    kl: float
    temperature: float
    seed: int

    def to_json(self) -> dict:
        """Return all fields, as the command line prints them."""
        return asdict(self)


def compare_generation(
    full: nn.Module,
    quantized: nn.Module,
    tokenizer: object,
    prompt: str,
    max_new_tokens: int = 60,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    context: int | None = None,
    progress: Progress = no_progress,
) -> GenerationComparison:
    """Generate a text from a prompt with each model, and score both texts with both models.

    Parameters
    ----------
    temperature
        0 selects the most probable token at each step. Above 0, both models sample with the same
        noise, so that the texts differ only where the predictions do.
    context
        The models' context length in tokens, None for no limit.

    Raises
    ------
    InputError
        If the prompt is empty and the tokenizer has no beginning-of-sequence token, the prompt has
        a token without a row in the model's embedding, prompt and text exceed the context, or a
        number is out of range.
    """
    from lsq_core.model.loading import check_token_ids

    ids = _prompt_ids(tokenizer, prompt)
    check_token_ids(full, ids)
    _check(len(ids), max_new_tokens, temperature, context, seed)
    steps, texts = 2 * max_new_tokens, []
    for name, model in (("full precision", full), ("quantized", quantized)):
        sampler, before = _Sampler(temperature, seed), len(texts) * max_new_tokens

        def report(done: int, name: str = name, before: int = before) -> None:
            progress(before + done, steps, f"{name}: token {done}")

        end_tokens = _end_tokens(model, tokenizer)
        texts.append(_generate(model, ids, max_new_tokens, sampler, end_tokens, report))
    own, other = texts
    tokens, agreement, kl = _score_text(full, quantized, tokenizer, ids, own)
    others, _, _ = _score_text(full, quantized, tokenizer, ids, other)
    progress(steps, steps, "compared")
    return GenerationComparison(
        prompt=prompt,
        prompt_tokens=len(ids),
        full=tokens,
        quantized=others,
        parts_at=first_difference(own, other),
        agreement=agreement,
        kl=kl,
        temperature=temperature,
        seed=seed,
    )


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Return the first position at which two sequences differ or one has ended, else None.

    >>> first_difference([5, 6, 7], [5, 6, 8])
    2
    """
    pairs = zip(a, b, strict=False)
    different = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
    return None if different == len(a) == len(b) else different


def _prompt_ids(tokenizer: object, prompt: str) -> list[int]:
    """Tokenize as in evaluations: no special token except beginning-of-sequence."""
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    ids = ids if bos is None else [bos, *ids]
    if not ids:
        raise InputError(
            "The prompt is empty, and this model has no beginning-of-sequence token to start from."
        )
    return ids


def _check(prompt: int, new: int, temperature: float, context: int | None, seed: int) -> None:
    if not -(2**63) <= seed < 2**63:
        raise InputError("The seed must be a signed 64-bit integer.")
    if new < 1:
        raise InputError("max-new-tokens must be at least 1.")
    if not 0 <= temperature < 100:
        raise InputError("The temperature must be at least 0 (greedy) and below 100.")
    if context is not None and prompt + new > context:
        raise InputError(
            f"The prompt has {prompt} tokens and {new} more are requested, but the context "
            f"is {context} tokens; shorten one of them."
        )


def _end_tokens(model: nn.Module, tokenizer: object) -> set[int]:
    """Return the end-of-sequence tokens of a model and its tokenizer."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


class _Sampler:
    """Selects the next token: the most probable one, or a sample by the Gumbel-max trick.

    The noise at each step depends only on the seed, not on the model.
    """

    def __init__(self, temperature: float, seed: int) -> None:
        import torch

        self.temperature = temperature
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        import torch

        logits = logits.float().cpu()
        if self.temperature > 0:
            noise = torch.rand(logits.shape, generator=self.generator).clamp_(min=1e-20)
            logits = logits / self.temperature - (-noise.log()).log()
        return int(logits.argmax())


def _generate(
    model: nn.Module,
    prompt: list[int],
    count: int,
    sample: _Sampler,
    end_tokens: set[int],
    report: Callable[[int], None],
) -> list[int]:
    """Generate at most ``count`` tokens, up to and including an end token."""
    import torch

    device = next(model.parameters()).device
    generated: list[int] = []
    inputs, past = torch.tensor([prompt], device=device), None
    with torch.inference_mode():
        while len(generated) < count and not (generated and generated[-1] in end_tokens):
            out = model(inputs, past_key_values=past, use_cache=True)
            generated.append(sample(out.logits[0, -1]))
            report(len(generated))
            past = getattr(out, "past_key_values", None)
            if past is None:  # a model without a cache needs the full sequence
                inputs = torch.tensor([prompt + generated], device=device)
            else:
                inputs = torch.tensor([generated[-1:]], device=device)
    return generated


def _score_text(
    full: nn.Module, quantized: nn.Module, tokenizer: object, prompt: list[int], text: list[int]
) -> tuple[tuple[Token, ...], float, float]:
    """Return a text's tokens with both models' probabilities, and top-1 agreement and mean KL."""
    a, b = (_log_probabilities(model, prompt, text) for model in (full, quantized))
    tops = a.argmax(-1), b.argmax(-1)
    pieces = _token_texts(tokenizer, prompt, text)
    tokens = tuple(
        Token(
            id=id,
            text=pieces[i],
            full=float(a[i, id].exp()),
            quantized=float(b[i, id].exp()),
            full_top=_token_text(tokenizer, [*prompt, *text[:i]], int(tops[0][i])),
            quantized_top=_token_text(tokenizer, [*prompt, *text[:i]], int(tops[1][i])),
        )
        for i, id in enumerate(text)
    )
    agreement = float((tops[0] == tops[1]).float().mean())
    return tokens, agreement, float((a.exp() * (a - b)).sum(-1).mean())


def _log_probabilities(model: nn.Module, prompt: list[int], text: list[int]) -> torch.Tensor:
    """Return log-probabilities (text, vocabulary) at each position, in float32 on the CPU."""
    import torch

    from lsq_core.model.loading import last_logits

    device = next(model.parameters()).device
    with torch.inference_mode():
        ids = torch.tensor([prompt + text], device=device)
        logits = last_logits(model, ids, len(text) + 1)[0, :-1]
    return logits.float().log_softmax(-1).cpu()


def _token_texts(tokenizer: object, prompt: list[int], ids: list[int]) -> list[str]:
    """Return the text added by each token; a character of several tokens appears at the last one.

    Decoding includes the prompt, since some tokenizers drop the space at the start of a text.
    """
    pieces, shown = [], _decode(tokenizer, prompt)
    for end in range(1, len(ids) + 1):
        text = _decode(tokenizer, [*prompt, *ids[:end]])
        complete = text if not text.endswith("�") or end == len(ids) else shown
        pieces.append(complete[len(shown) :])
        shown = complete
    return pieces


def _token_text(tokenizer: object, before: list[int], id: int) -> str:
    """Return the text that a token adds after those before it."""
    return _decode(tokenizer, [*before, id])[len(_decode(tokenizer, before)) :]


def _decode(tokenizer: object, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
