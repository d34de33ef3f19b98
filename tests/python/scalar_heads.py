"""Critics and reward models of transformers, for tests/tests/it/scalar_heads.rs.

  scalar_heads.py make OUT SEED   one folder per case in CASES: a random small model and what it says of each token
  scalar_heads.py same OUT        for every case: OUT/CASE/export must say what OUT/CASE/model says, bit for bit
"""

import json
import random
import sys
from pathlib import Path

import torch
from golden import draw_config, randomise
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaForTokenClassification
from transformers import MistralConfig, MistralForSequenceClassification
from transformers import Qwen2Config, Qwen2ForTokenClassification
from transformers import Qwen3Config, Qwen3ForSequenceClassification

CASES = [
    ("llama-sequence-tied", LlamaConfig, LlamaForSequenceClassification, dict(tie_word_embeddings=True, grouped=True)),
    ("llama-token", LlamaConfig, LlamaForTokenClassification, dict(tie_word_embeddings=False)),
    ("mistral-sequence", MistralConfig, MistralForSequenceClassification, dict(sliding_window=7)),
    ("qwen2-token", Qwen2Config, Qwen2ForTokenClassification, dict(tie_word_embeddings=True)),
    ("qwen3-sequence", Qwen3Config, Qwen3ForSequenceClassification, dict(grouped=True, own_head_dim=True)),
]


def values(model, ids):
    """The score of every token, checked against what the class itself answers."""
    with torch.no_grad():
        found = model.score(model.model(ids).last_hidden_state)[0, :, 0]
        answer = model(ids).logits
    last = answer[0, -1, 0] if answer.dim() == 3 else answer[0, 0]
    assert torch.allclose(found[-1], last, rtol=1e-5, atol=1e-6), (found[-1], last)
    return found


def make(out, seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for name, config_class, model_class, keys in CASES:
        config = draw_config(config_class, keys, rng)
        config.num_labels = 1
        model = model_class(config).float().eval()
        randomise(model, generator)
        ids = torch.tensor([[rng.randrange(config.vocab_size) for _ in range(rng.randrange(5, 40))]])
        folder = out / name
        model.save_pretrained(folder / "model")
        golden = dict(ids=ids[0].contiguous(), values=values(model, ids).contiguous())
        save_file(golden, folder / "golden.safetensors")
    (out / "cases.json").write_text(json.dumps([case[0] for case in CASES]))


def same(out):
    from safetensors.torch import load_file

    for name, _, model_class, _ in CASES:
        ids = load_file(out / name / "golden.safetensors")["ids"][None]
        before, after = (
            model_class.from_pretrained(out / name / part, dtype=torch.float32).eval() for part in ("model", "export")
        )
        ours = dict(after.named_parameters())
        for key, value in before.named_parameters():
            assert torch.equal(value, ours[key]), (name, key)
        # The same weights at other addresses: products of matrices may add in another order.
        torch.testing.assert_close(values(after, ids), values(before, ids), rtol=1e-5, atol=1e-5, msg=name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[2])
    make(out, int(sys.argv[3])) if sys.argv[1] == "make" else same(out)
