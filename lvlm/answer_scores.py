"""Log-probabilities of whole answer texts: the sum over tokens, each given the tokens before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from groundscope.core.errors import ConfigError
from lvlm.access.shared_vision_run import share_vision_runs
from lvlm.decoding.prefix_run import PrefixBatch
from lvlm.encoding.continued_inputs import append_tokens
from lvlm.model import Batch, Lvlm


@torch.no_grad()
def answer_log_probabilities(model: Lvlm, batch: Batch | PrefixBatch, answers: Sequence[Sequence[int]]) -> Tensor:
    """Return ``sum_t log p(t | prompt, tokens before t)`` of one answer to each prompt of a batch, in nats, float64 ``[B]``.

    One forward pass with the answers appended; interventions act on their tokens as on generated ones.

    Parameters
    ----------
    model
        The model.
    batch
        Encoded examples, with the starts of their answers; also with shared prefixes.
    answers
        The tokens of one answer to each example (`lvlm.answer_keys.answer_tokens`); an answer without tokens has 0.

    Raises
    ------
    ConfigError
        If a decoding method is active: it changes the choice of tokens, not the probabilities of the model.

    Examples
    --------
    >>> import groundscope as gs
    >>> from lvlm.answer_keys import answer_tokens
    >>> from lvlm.answer_scores import answer_log_probabilities
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10)[:1]
    >>> batch = next(model.batches(data.examples))
    >>> tokens = answer_tokens(model, data[0], data[0].answer)
    >>> bool(answer_log_probabilities(model, batch, [tokens])[0] < 0)
    True
    """
    if model.decoder is not None:
        msg = (
            f"{type(model.decoder).__name__} chooses tokens while text is generated, so whole texts have no scores under it; use "
            "score='first_token', or generate=True"
        )
        raise ConfigError(msg)
    extra = max(map(len, answers), default=0)
    if not extra:
        return torch.zeros(len(answers), dtype=torch.float64)
    tokenizer = model.processor.tokenizer
    fill = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)  # never read
    rows = [[*tokens, *[fill] * (extra - len(tokens))] for tokens in answers]
    if isinstance(batch, PrefixBatch):
        logits = batch.answer_logits(rows)
    else:
        inputs = append_tokens(model, batch.inputs, rows)
        with model.reading_answers(batch.encodings[0].tokens.length), share_vision_runs(model, batch.images):
            logits = model.forward(inputs, keep=extra + 1)[:, :-1]  # [B, extra, V]
    chosen = torch.tensor(rows, device=logits.device)
    log_p = logits.float().log_softmax(-1).gather(-1, chosen[..., None])[..., 0].double().cpu()
    used = torch.arange(extra) < torch.tensor([[len(tokens)] for tokens in answers])
    return log_p.masked_fill(~used, 0.0).sum(-1)
