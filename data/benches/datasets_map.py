"""Tokenise and pack a JSON lines file with Hugging Face datasets, as its language-modelling examples do.

usage: datasets_map.py TOKENIZER_FOLDER PROCESSES SEQ_LEN FILE.jsonl

The peer of `cargo run --release -p tangelo-data --example prepare_throughput`.
"""

import itertools
import os
import sys
import tempfile
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
from datasets import load_dataset
from transformers import PreTrainedTokenizerFast


def main():
    folder, processes, seq_len, path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.model_max_length = 1 << 40
    eos = tokenizer.eos_token_id

    def tokenise(batch):
        ids = tokenizer(batch["text"], return_attention_mask=False, add_special_tokens=False)["input_ids"]
        return {"input_ids": [i + [eos] for i in ids]}

    def pack(batch):
        joined = list(itertools.chain.from_iterable(batch["input_ids"]))
        end = len(joined) // seq_len * seq_len
        return {"input_ids": [joined[i : i + seq_len] for i in range(0, end, seq_len)]}

    with tempfile.TemporaryDirectory() as cache:
        data = load_dataset("json", data_files=path, split="train", cache_dir=cache)
        megabytes = sum(len(t.encode()) for t in data["text"]) / 1e6
        start = time.time()
        tokens = data.map(tokenise, batched=True, num_proc=processes, remove_columns=data.column_names)
        rows = tokens.map(pack, batched=True, num_proc=processes)
        seconds = time.time() - start
        count = sum(len(r) for r in tokens["input_ids"])
        print(f"datasets.map: {megabytes:.1f} MB, {count} tokens, {len(rows)} rows in {seconds:.2f} s: {megabytes / seconds:.2f} MB/s")


if __name__ == "__main__":
    main()
