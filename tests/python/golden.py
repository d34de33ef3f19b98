"""Golden answers from transformers, for tests/tests/it/parity.rs.

  golden.py make OUT SEED          one folder per case in CASES: a random small model, its logits, loss and gradients
  golden.py same OUT                for every case: OUT/CASE/export must give the logits of OUT/CASE/model, bit for bit
  golden.py logits MODEL IDS OUT   logits of a saved model on one sequence, float32
  golden.py gguf FILE OUT PROMPT.. greedy continuations of a GGUF file, its logits, loss and gradients
  golden.py continue FILE OUT COUNT PROMPT.. COUNT greedy tokens after each prompt, many prompts at once

float64 is the truth here, so it must be float64 throughout: transformers computes rotary angles, RMS norms and the
loss in float32 whatever the model's type, so the float64 run replaces those three by plain formulas in the model's
type. Rotary frequencies are derived from the config again, independently of transformers.
"""

import copy
import json
import math
import random
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
# name, config class, keys; every case draws its own sizes. Between them: both kinds of RoPE scaling, windows, biases,
# head norms, tied and untied heads, grouped and plain attention.
CASES = [
    ("llama-plain-tied-gqa", LlamaConfig, dict(tie_word_embeddings=True, grouped=True)),
    ("llama-linear-untied-mha", LlamaConfig, dict(tie_word_embeddings=False, rope=dict(rope_type="linear", factor=4.0))),
    ("llama-llama3-tied-gqa", LlamaConfig, dict(tie_word_embeddings=True, grouped=True, rope=dict(rope_type="llama3", **LLAMA3))),
    ("llama-biases-untied-gqa", LlamaConfig, dict(tie_word_embeddings=False, grouped=True, attention_bias=True, mlp_bias=True)),
    ("mistral-window-untied-gqa", MistralConfig, dict(tie_word_embeddings=False, grouped=True, sliding_window=7)),
    ("mistral-full-tied-mha", MistralConfig, dict(tie_word_embeddings=True, sliding_window=None)),
    ("qwen2-tied-gqa", Qwen2Config, dict(tie_word_embeddings=True, grouped=True)),
    ("qwen2-untied-mha", Qwen2Config, dict(tie_word_embeddings=False)),
    ("qwen3-untied-gqa", Qwen3Config, dict(tie_word_embeddings=False, grouped=True, own_head_dim=True)),
    ("qwen3-tied-mha", Qwen3Config, dict(tie_word_embeddings=True, own_head_dim=True)),
]
NUM_GREEDY = 64
NUM_ORDERS = 8


def draw_config(config_class, keys, rng):
    keys = dict(keys)
    grouped, own_head_dim = keys.pop("grouped", False), keys.pop("own_head_dim", False)
    rope = dict(keys.pop("rope", dict(rope_type="default")), rope_theta=rng.choice([10000.0, 100000.0, 1000000.0]))
    kv_heads, head_dim = rng.choice([1, 2, 3]), rng.choice([8, 16, 20])
    heads = kv_heads * (rng.choice([2, 3]) if grouped else 1)
    hidden = heads * head_dim + (rng.choice([-8, 8, 24]) if own_head_dim else 0)
    return config_class(
        vocab_size=rng.randrange(97, 400),
        hidden_size=max(hidden, 8),
        intermediate_size=rng.randrange(24, 120),
        num_hidden_layers=rng.choice([2, 3]),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=256,
        rms_norm_eps=rng.choice([1e-5, 1e-6]),
        rope_parameters=rope,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **keys,
    )


def randomise(model, generator):
    """Weights large enough that attention and gates are far from linear; norms and biases away from 1 and 0."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 1:
                p.copy_(0.1 * noise if name.endswith("bias") else 1.0 + 0.2 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                p.copy_(0.3 * noise)
            else:
                p.copy_(noise * (1.2 / math.sqrt(p.shape[1])))


def inverse_frequencies(config):
    """In float64. Linear: Chen et al. 2023; llama3: frequencies by wavelength, as the Llama 3.1 report describes."""
    rope, dim = config.rope_parameters, config.head_dim
    inv = rope["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if rope["rope_type"] == "linear":
        return inv / rope["factor"]
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * inv / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return inv * keep + inv / rope["factor"] * (1 - keep)
    return inv


def to_float64(model):
    """The same model, computing everything in float64."""
    model = model.double()
    inv = inverse_frequencies(model.config)

    def rotary(self, x, position_ids):
        angles = position_ids[..., None].double() * inv
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    model.model.rotary_emb.forward = types.MethodType(rotary, model.model.rotary_emb)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(norm, module)
    return model


def run(model, documents):
    """Logits of every document, one after the other, and the mean loss over all next tokens, with gradients."""
    model.zero_grad()
    logits = [model(ids[None]).logits[0] for ids in documents]
    losses = [F.cross_entropy(l[:-1], ids[1:], reduction="sum") for l, ids in zip(logits, documents)]
    loss = sum(losses) / sum(len(ids) - 1 for ids in documents)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return torch.cat(logits).detach(), loss.detach(), grads


def permuted(model, generator):
    """The same function with the hidden and the feed-forward units in another order: other sums, other roundings."""
    model, hidden, inner = copy.deepcopy(model), model.config.hidden_size, model.config.intermediate_size
    h, f = (torch.randperm(n, generator=generator) for n in (hidden, inner))
    rows = {"o_proj": h, "down_proj": h, "gate_proj": f, "up_proj": f, "norm": h, "layernorm": h}
    columns = {"down_proj": f, "o_proj": None}
    with torch.no_grad():
        for name, p in model.named_parameters():
            unit = name.split(".")[-2].removeprefix("input_").removeprefix("post_attention_")
            if unit in rows:
                p.copy_(p[rows[unit]])
            if p.dim() == 2 and (order := columns.get(unit, h)) is not None:
                p.copy_(p[:, order])
    return model


def rounding_errors(model, documents, truth, generator):
    """What transformers is off by in fp32 (largest difference of a logit), once for every of NUM_ORDERS orders."""
    errors = []
    for _ in range(NUM_ORDERS):
        run = permuted(model, generator)
        with torch.no_grad():
            logits = torch.cat([run(ids[None]).logits[0] for ids in documents])
        errors.append((logits.double() - truth).abs().max())
    return torch.stack(errors)


def answers_on(model, documents, generator):
    """What tests compare: documents, logits and loss in float64, gradients (float64's, rounded to float32), and by how
    much transformers in float32 is off: its logits at most, each gradient norm-relative."""
    _, _, grads32 = run(model, documents)
    model.zero_grad()
    logits, loss, grads64 = run(to_float64(copy.deepcopy(model)), documents)
    tensors = {"ids": torch.cat(documents), "lengths": torch.tensor([len(ids) for ids in documents])}
    tensors |= {"logits.f64": logits, "loss.f64": loss.reshape(1)}
    for name, truth in grads64.items():
        error = (grads32[name].double() - truth).norm() / truth.norm()
        tensors |= {f"grad.{name}": truth.float().contiguous(), f"grad_error.{name}": error.reshape(1)}
    tensors["logit_errors"] = rounding_errors(model, documents, logits, generator)
    return tensors


def greedy(model, prompt, count):
    """`count` most likely tokens after `prompt` with keys and values kept, and the log-probability of each."""
    ids, logprobs, cache, feed = [], [], None, prompt[None]
    with torch.no_grad():
        for _ in range(count):
            out = model(feed, past_key_values=cache, use_cache=True)
            row = out.logits[0, -1].float().log_softmax(-1)
            token = int(row.argmax())
            ids.append(token)
            logprobs.append(float(row[token]))
            cache, feed = out.past_key_values, torch.tensor([[token]])
    return ids, logprobs


def make(out, seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for name, config_class, keys in CASES:
        config = draw_config(config_class, keys, rng)
        folder = Path(out) / name
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
        randomise(model, generator)
        model.save_pretrained(folder / "model")
        # Of so few tokens that every query sees one or two keys, the gradients of q and k are nearly zero: all rounding.
        lengths = [rng.randrange(16, 40)] + [rng.randrange(2, 40) for _ in range(rng.choice([0, 2, 3]))]
        rng.shuffle(lengths)
        documents = [torch.randint(config.vocab_size, (n,), generator=generator) for n in lengths]
        prompt = torch.randint(config.vocab_size, (rng.randrange(1, 12),), generator=generator)
        greedy_ids, _ = greedy(model, prompt, NUM_GREEDY)
        tensors = {"prompt": prompt, "greedy": torch.tensor(greedy_ids)}
        save_file(tensors | answers_on(model, documents, generator), folder / "golden.safetensors")
    (Path(out) / "cases.json").write_text(json.dumps([name for name, _, _ in CASES]))


def logits_of(folder, ids):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    unexpected = [info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]]
    assert not unexpected, f"{folder}: {unexpected}"
    with torch.no_grad():
        return model.eval()(ids[None]).logits[0].contiguous()


def same(out):
    for case in json.loads((Path(out) / "cases.json").read_text()):
        golden = load_file(Path(out) / case / "golden.safetensors")
        before, after = (logits_of(Path(out) / case / name, golden["ids"]) for name in ("model", "export"))
        assert torch.equal(before, after), f"{case}: exported logits differ by {(before - after).abs().max():.2e}"


def logits(folder, ids, out):
    save_file({"logits": logits_of(folder, torch.tensor(json.loads(ids)))}, out)


def gguf(file, out, prompts):
    folder, name = str(Path(file).parent), Path(file).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    documents = [tokenizer(prompt, return_tensors="pt").input_ids[0] for prompt in prompts]
    answers = [
        dict(prompt=prompt, ids=ids.tolist(), greedy=greedy(model, ids, NUM_GREEDY)[0])
        for prompt, ids in zip(prompts, documents)
    ]
    (Path(out) / "answers.json").write_text(json.dumps(answers))
    save_file(answers_on(model, documents, torch.Generator().manual_seed(0)), Path(out) / "golden.safetensors")


def continue_prompts(file, out, count, prompts):
    folder, name = str(Path(file).parent), Path(file).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.eos_token_id = None  # past the end of text, as the engine without end-of-text tokens
    answers, batch = [], 16
    for start in range(0, len(prompts), batch):
        inputs = tokenizer(prompts[start : start + batch], return_tensors="pt", padding=True)
        length = inputs.input_ids.shape[1]
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=count)
        for row, mask in zip(ids.tolist(), inputs.attention_mask.tolist()):
            answers.append(dict(ids=row[length - sum(mask) : length], greedy=row[length:]))
    Path(out).write_text(json.dumps(answers))


def main():
    torch.set_num_threads(2)
    match sys.argv[1:]:
        case ["make", out, seed]:
            make(out, int(seed))
        case ["same", out]:
            same(out)
        case ["logits", folder, ids, out]:
            logits(folder, ids, out)
        case ["continue", file, out, count, *prompts]:
            continue_prompts(file, out, int(count), prompts)
        case ["gguf", file, out, *prompts]:
            gguf(file, out, prompts)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
