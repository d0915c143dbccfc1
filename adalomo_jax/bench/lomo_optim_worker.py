"""Like ``worker.py``, for the official PyTorch AdaLomo on a CPU. Run as a file: imports neither JAX nor this package.

The official code puts its state on a GPU by ``.cuda()``; here that call is the identity, and nothing else is changed.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    order = json.loads(sys.stdin.readline())
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import DecoderConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    from lomo_optim import AdaLomo  # pyright: ignore[reportMissingImports]

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or 1)
    sizes = {k: v for k, v in order["sizes"].items() if k not in ("qkv_bias", "o_bias", "rope_scaling", "rope_theta")}
    rope = {"rope_type": "default", "rope_theta": order["sizes"]["rope_theta"]}
    model = LlamaForCausalLM(DecoderConfig(**sizes, rope_parameters=rope, use_cache=False)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = torch.randint(0, sizes["vocab_size"], order["shape"])
    optimizer = AdaLomo(model, lr=1e-3, loss_scale=None)

    def answer(value: object) -> None:
        print(json.dumps(value), file=answers, flush=True)

    params = sum(p.numel() for p in model.parameters())
    answer({"compile_seconds": None, "memory": None, "params": params, "device": "cpu"})
    for _ in sys.stdin:
        began = time.perf_counter()
        optimizer.fused_backward(model(input_ids=tokens, labels=tokens).loss, 1e-3)
        answer(time.perf_counter() - began)
    answer(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


if __name__ == "__main__":
    main()
