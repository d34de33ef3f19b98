"""Random matrices through torch.optim.Muon, for tests/tests/it/muon.rs: muon.py OUT SEED.

torch orthogonalises in bfloat16 whatever the parameters' type. Here it must be the truth, so `Tensor.bfloat16`, which it
calls for that and nothing else, keeps float64 (and copies, because what it gives is changed in place).
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = [(48, 48), (30, 70), (70, 30), (1, 17), (96, 8), (65, 64)]
STEPS = 5


def make(name, shape, keys):
    start = torch.randn(shape, dtype=torch.float32)
    grads = [torch.randn(shape, dtype=torch.float32) for _ in range(STEPS)]
    weight = torch.nn.Parameter(start.double())
    optimizer = torch.optim.Muon([weight], **keys)
    for grad in grads:
        weight.grad = grad.double()
        optimizer.step()
    tensors = {f"{name}.grad.{step}": grad for step, grad in enumerate(grads)}
    momentum = optimizer.state[weight]["momentum_buffer"]
    return tensors | {f"{name}.start": start, f"{name}.end": weight.data, f"{name}.momentum": momentum}


def main(out, seed):
    torch.manual_seed(int(seed))
    torch.Tensor.bfloat16 = torch.Tensor.clone
    cases, tensors = [], {}
    for shape in SHAPES:
        for momentum, nesterov, adjust in [(0.95, True, "original"), (0.9, False, "match_rms_adamw"), (0.0, True, None)]:
            name = f"case-{len(cases)}"
            keys = dict(lr=0.02, weight_decay=0.1, momentum=momentum, nesterov=nesterov, ns_steps=5 - len(cases) % 2)
            tensors |= make(name, shape, keys | dict(adjust_lr_fn=adjust))
            cases.append(keys | dict(name=name, shape=shape, match_rms=adjust == "match_rms_adamw"))
    save_file(tensors, Path(out) / "tensors.safetensors")
    (Path(out) / "cases.json").write_text(json.dumps(cases))


if __name__ == "__main__":
    main(*sys.argv[1:])
