"""GPT-2 as `transformers` and torch run it, on the weights of a case: the peers of `gpt2`.

Each adaptor raises `PeerMissing` as those of `peers` do, loads its own copy of the weights, and
computes in `dtype` ("float32" or "bfloat16") on the kind of device that JAX uses. Results stay
tensors on that device; `to_numpy` reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from benchmarks.harness import Peer, PeerMissing
from benchmarks.peers import require
from jaxrl_llm.lm import decoding, optimizer
from jaxrl_llm.nn.gpt2 import GPT2Config
from jaxrl_llm.types import Array, PyTree

NAME = "transformers"


def decode(
    config: GPT2Config, params: PyTree, dtype: str, tokens: Array, sampling: decoding.Config
) -> Peer:
    """Text by `generate` with its cache; it never ends a row.

    Args:
      config: of the model.
      params: of the model, in float32.
      dtype: of weights and computation.
      tokens: `[B, P]`, prompts without padding.
      sampling: of which `max_new_tokens`, `temperature` (0 is greedy) and `top_p` count.

    Returns:
      A peer whose result is `[B, P + N]`.
    """
    torch, model, prompt = _load(config, params, dtype, tokens)
    law: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        # Left alone, it would also cut to the 50 most likely tokens.
        law = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0}
        law["top_p"] = 1.0 if sampling.top_p is None else sampling.top_p

    def run() -> Any:
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
            **law,
        )

    return _inference(torch, run)


def prefill(config: GPT2Config, params: PyTree, dtype: str, tokens: Array) -> Peer:
    """`(logits [B, V], cache)` after reading `tokens`."""
    torch, model, inputs = _load(config, params, dtype, tokens)

    def run() -> Any:
        outputs = model(inputs, use_cache=True, logits_to_keep=1)
        return outputs.logits[:, -1], outputs.past_key_values

    return _inference(torch, run)


def forward(config: GPT2Config, params: PyTree, dtype: str, tokens: Array) -> Peer:
    """Logits `[B, L, V]`."""
    torch, model, inputs = _load(config, params, dtype, tokens)
    return _inference(torch, lambda: model(inputs, use_cache=False).logits)


def score(config: GPT2Config, params: PyTree, dtype: str, tokens: Array) -> Peer:
    """Log-probabilities `[B, L - 1]` of all tokens but the first."""
    torch, model, inputs = _load(config, params, dtype, tokens)

    def run() -> Any:
        logits = model(inputs, use_cache=False).logits[:, :-1]
        log_probabilities = torch.log_softmax(logits.float(), dim=-1)
        return log_probabilities.gather(-1, inputs[:, 1:, None])[..., 0]

    return _inference(torch, run)


def train(
    config: GPT2Config, params: PyTree, dtype: str, tokens: Array, adamw: optimizer.Config
) -> Peer:
    """`(loss, gradient norm)` of an AdamW step, fused, on the mean over all tokens but the first.

    Weights stay float32, and `dtype` is that of autocast. The learning rate is 0, as ours is at the
    start of its warm-up, so that every call takes the same step.
    """
    torch, model, inputs = _load(config, params, "float32", tokens)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    adam = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.0,
        betas=(adamw.beta1, adamw.beta2),
        eps=adamw.epsilon,
        weight_decay=adamw.weight_decay,
        fused=True,
    )
    mixed = torch.autocast(inputs.device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    model.train()

    def step() -> Any:
        with mixed:
            loss = model(inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), adamw.max_gradient_norm)
        adam.step()
        adam.zero_grad()
        return loss.detach(), norm

    return Peer(NAME, _waited_for(torch, step), items=inputs.numel())


def to_numpy(tensor: Any) -> np.ndarray:
    """A tensor of any device, floating point in float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _load(config: GPT2Config, params: PyTree, dtype: str, tokens: Array) -> tuple[Any, Any, Any]:
    """torch, a `GPT2LMHeadModel` that holds a copy of `params`, and `tokens` as its input."""
    torch, transformers = require("torch"), require("transformers")
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise PeerMissing("peer torch sees no GPU: install its build for CUDA")
    with torch.device("meta"):  # drawing weights of its own would take seconds
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**dataclasses.asdict(config)))
    leaves: Any = flatten_dict(params, sep=".")
    state = {name: torch.from_numpy(np.array(leaf, np.float32)) for name, leaf in leaves.items()}
    state.setdefault("lm_head.weight", state["transformer.wte.weight"])
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model = model.eval().to(device, getattr(torch, dtype))
    return torch, model, torch.from_numpy(np.array(tokens, np.int64)).to(device)


def _inference(torch: Any, run: Callable[[], Any]) -> Peer:
    return Peer(NAME, _waited_for(torch, torch.inference_mode()(run)))


def _waited_for(torch: Any, run: Callable[[], Any]) -> Callable[[], Any]:
    """`run`, returning only when the device is done."""
    if jax.default_backend() == "cpu":
        return run

    def wait() -> Any:
        result = run()
        torch.cuda.synchronize()
        return result

    return wait
