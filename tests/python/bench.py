"""The peers that `cargo xtask bench` measures beside Tangelo; each command prints one JSON line on stdout.

  bench.py train CONFIG.json DTYPE MODE STEPS SEQ BATCH   training steps of a random model; MODE is eager or compile;
                                                          seconds of every step, peak memory
  bench.py first-step CONFIG.json TOKENS SEQ BATCH        one step and exit: the caller times the process
  bench.py tokenise TOKENIZER.json CORPUS.jsonl SEQ OUT   datasets.map to packed sequences, 2 processes

The training loop is what a careful user writes with transformers and torch: fused AdamW, logits and loss as the library
computes them, clipping at 1. bf16 is a model whose parameters are bf16 throughout, the fastest form there is (and no
master weights: less work than Tangelo does).
"""

import json
import resource
import sys
import time


def build(config_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(config_path)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def step(model, optimizer, ids):
    import torch

    loss = model(ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train(config_path, dtype, mode, steps, seq, batch):
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = build(config_path)
    if dtype == "bf16":
        model = model.to(torch.bfloat16)
    run = torch.compile(model) if mode == "compile" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    seconds = []
    for _ in range(steps):
        ids = torch.randint(model.config.vocab_size, (batch, seq))
        start = time.perf_counter()
        step(run, optimizer, ids)
        seconds.append(time.perf_counter() - start)
    print(json.dumps(dict(step_seconds=seconds, peak_bytes=peak_bytes())))


def first_step(config_path, tokens_path, seq, batch):
    """As a script that trains on tokens already on disk: read them, build, one step."""
    import numpy
    import torch

    torch.set_num_threads(2)
    tokens = numpy.memmap(tokens_path, dtype=numpy.uint16, mode="r")
    model = build(config_path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.from_numpy(tokens[: batch * seq].astype("int64")).view(batch, seq)
    print(json.dumps(dict(loss=step(model, optimizer, ids))))


def tokenise(tokenizer_path, corpus, seq, out):
    """Tokenise and chunk as transformers' run_clm example does: two maps, then Arrow on disk."""
    from datasets import load_dataset
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_path)
    text = load_dataset("json", data_files=corpus, split="train", cache_dir=out)

    def encode(rows):
        return {"input_ids": tokenizer(rows["text"])["input_ids"]}

    def chunk(rows):
        ids = sum(rows["input_ids"], [])
        end = len(ids) // seq * seq
        return {"input_ids": [ids[i : i + seq] for i in range(0, end, seq)]}

    start = time.perf_counter()
    encoded = text.map(encode, batched=True, num_proc=2, remove_columns=text.column_names)
    packed = encoded.map(chunk, batched=True, num_proc=2)
    print(json.dumps(dict(seconds=time.perf_counter() - start, sequences=len(packed))))


def main():
    match sys.argv[1:]:
        case ["train", config, dtype, mode, steps, seq, batch]:
            train(config, dtype, mode, int(steps), int(seq), int(batch))
        case ["first-step", config, tokens, seq, batch]:
            first_step(config, tokens, int(seq), int(batch))
        case ["tokenise", tokenizer, corpus, seq, out]:
            tokenise(tokenizer, corpus, int(seq), out)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
